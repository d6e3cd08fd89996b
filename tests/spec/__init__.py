"""The PRD's experiment files, and requests for shapes with what holds for every allocation."""

from __future__ import annotations

import torch
import yaml

from src.models.transformer import Transformer
from src.spec.allocation import WIDE, WIDEST, Allocation, allocate, count_params
from src.spec.config import ModelConfig, ModelRequest, Sweep, load_sweep
from tests import ROOT

EMBED_RATIO = """\
# configs/embed_ratio.yaml
model:
  total_params: 10_000_000
  vocab_size: 16_000
experiments:
  - name: emb35
    embedding_ratio: 0.35
  - name: emb25
    embedding_ratio: 0.25
  - name: emb45
    embedding_ratio: 0.45
training:
  tokens: 50_000_000
  batch_size: 256
evaluation:
  metrics: ["perplexity", "smallbench_accuracy"]
"""


GLU_EXPANSION = """\
# configs/glu_expansion.yaml
model:
  total_params: 10_000_000
  vocab_size: 16_000
experiments:
  - name: glu2x
    glu_expansion: 2.0
  - name: glu266x
    glu_expansion: 2.66
  - name: glu3x
    glu_expansion: 3.0
  - name: glu4x
    glu_expansion: 4.0
training:
  tokens: 50_000_000
  batch_size: 256
evaluation:
  metrics: ["perplexity", "smallbench_accuracy"]
"""


def request(**values: object) -> ModelRequest:
    return ModelRequest(**{"embedding_ratio": 0.35, **values})  # type: ignore[arg-type]


def one(request: ModelRequest) -> Allocation:
    return allocate({"x": request})["x"]


def shipped(name: str) -> Sweep:
    return load_sweep(ROOT / "configs" / f"{name}.yaml")


def shapes_of(sweep: Sweep) -> dict[str, Allocation]:
    return allocate({run.experiment: run.model for run in sweep.runs}, sweep.baseline)


def integers(allocation: Allocation) -> tuple[int, int, str, int]:
    model = allocation.model
    return model.d_model, model.n_layers, f"{model.n_heads}x{model.head_dim}", model.d_ff


def built_params(config: ModelConfig) -> int:
    with torch.device("meta"):
        model = Transformer(config)
    return sum(parameter.numel() for parameter in model.parameters())


def assert_sound(allocation: Allocation) -> None:
    """What holds for every allocation, whatever was asked."""
    request, model = allocation.request, allocation.model
    assert abs(allocation.params.total / request.total_params - 1) <= WIDE.total
    if request.embedding_ratio is not None:
        assert abs(allocation.params.share - request.embedding_ratio) <= WIDE.share
    glu = 0.20 if request.d_model and request.n_heads else WIDE.glu
    assert abs(model.d_ff / model.d_model / request.glu_expansion - 1) <= glu
    assert model.d_model % 8 == 0 and model.d_ff % 8 == 0 and model.n_layers >= 1
    assert model.n_layers <= 128 and model.n_heads >= (1 if request.n_heads else 2)
    if request.head_dim is None:
        assert model.head_dim in ((16, 32, 64) if request.total_params < 3_000_000 else (32, 64))
    width = model.n_heads * model.head_dim
    if request.allocate == "attention":
        assert model.n_heads >= 4
    elif request.n_heads is None or request.head_dim is None:
        assert abs(width / model.d_model - 1) <= WIDEST.attention + 1e-9
    assert (model.vocab_size, model.embedding_dim) == (request.vocab_size, request.embedding_dim)
    assert (model.tie_embeddings, model.qk_norm) == (request.tie_embeddings, request.qk_norm)
    assert allocation.params == count_params(model)


def way_out(message: str) -> dict[str, dict[str, object]]:
    """The keys, by experiment, that a refusal offers to paste."""
    _, _, text = message.partition("\nexperiments:\n")
    entries = yaml.safe_load(text) or []
    return {entry.pop("name"): entry for entry in entries}
