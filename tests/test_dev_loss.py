"""The dev loss of a compiled model: compiled code for whole micro-batches, the same number."""

from __future__ import annotations

import pytest
import torch

from src.compute.compiler import compiler
from src.compute.compute_config import ComputeConfig
from src.models.transformer import Transformer
from src.spec.config import ModelConfig
from src.train import dev_loss
from src.training_step import build_model, compile_blocks


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_compiled_blocks_read_whole_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = ComputeConfig(
        device=torch.device("cpu"), precision="bf16", micro_batch=4, compile=True, threads=1
    )
    windows = torch.randint(0, 40, (10, 17), generator=torch.Generator().manual_seed(0))
    model = build_model(
        ModelConfig(vocab_size=40, d_model=16, n_layers=2, n_heads=2, head_dim=8, d_ff=32), 0
    )
    expected = dev_loss(model, compute, windows)
    compile_blocks(model, compute)
    stances, hidden = [], Transformer.hidden

    def seen(self: Transformer, tokens: torch.Tensor) -> torch.Tensor:
        stances.append((len(tokens), torch._dynamo.eval_frame._stance.stance))
        return hidden(self, tokens)

    monkeypatch.setattr(Transformer, "hidden", seen)
    loss = dev_loss(model, compute, windows)
    assert stances == [(4, "default"), (4, "default"), (2, "force_eager")]
    assert loss == pytest.approx(expected, abs=5e-4)
