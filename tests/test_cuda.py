"""What runs differently on a GPU, against its reference. Skipped where there is none.

python -m pytest tests/test_cuda.py                     # on a machine with a GPU
TEST_DEVICE=cpu python -m pytest tests/test_cuda.py     # the same assertions, rehearsed
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from src.compute import autotune as probe
from src.compute import runtime
from src.compute.compute_config import ComputeConfig
from src.evaluation import latency as eval_latency
from src.evaluation import perplexity
from src.models.loss import chunked_cross_entropy
from src.models.transformer import Transformer, causal_attention
from src.spec.config import ModelConfig
from src.training_step import next_token_loss
from tests.models.test_loss import plain_cross_entropy

DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cuda"))
GPU = DEVICE.type == "cuda"
pytestmark = [
    pytest.mark.skipif(GPU and not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("ignore:TensorFloat32"),  # the compiler's advice on float32
]

MODEL = ModelConfig(vocab_size=512, d_model=64, n_layers=2, n_heads=2, head_dim=32, d_ff=176)
LOW = [torch.float32, torch.bfloat16, *([torch.float16] if GPU else [])]
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@pytest.fixture(autouse=True)
def needs_native_bf16(request: pytest.FixtureRequest) -> None:
    dtype = request.node.funcargs.get("dtype") if hasattr(request.node, "funcargs") else None
    if GPU and dtype is torch.bfloat16 and not torch.cuda.is_bf16_supported(False):
        pytest.skip("this GPU has no bf16")


def compute(dtype: torch.dtype, **changes: Any) -> ComputeConfig:
    plain = ComputeConfig(
        device=DEVICE, precision=NAMES[dtype], micro_batch=4, compile=False, threads=1,
        loss_chunk=64,
    )  # fmt: skip
    return replace(plain, **changes)


def model_and_tokens() -> tuple[Transformer, torch.Tensor]:
    torch.manual_seed(0)
    model = Transformer(MODEL)
    return model, torch.randint(MODEL.vocab_size, (4, 65))


def near(ours: torch.Tensor, theirs: torch.Tensor, bound: float) -> None:
    ours, theirs = ours.float().cpu(), theirs.float().cpu()
    assert float((ours - theirs).norm()) <= bound * float(theirs.norm())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", LOW)
def test_the_chunked_loss_equals_the_plain_one(dtype: torch.dtype, compiled: bool) -> None:
    """Tolerance as on the CPU: products of 8 bits (bf16) are 0.4 % each and average out."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(200, 64, generator=generator)
    table = torch.randn(512, 64, generator=generator)
    targets = torch.randint(512, (200,), generator=generator)

    def gradients(loss: Any, device: torch.device, **options: Any) -> list[torch.Tensor]:
        parts = [part.to(device).requires_grad_() for part in (hidden, table)]
        objective, nats = loss(*parts, targets.to(device), 1e-4, **options)
        return [nats, *torch.autograd.grad(objective, parts)]

    expected = gradients(plain_cross_entropy, torch.device("cpu"))
    found = gradients(chunked_cross_entropy, DEVICE, chunk=64, dtype=dtype, compiled=compiled)
    for ours, theirs in zip(found, expected, strict=True):
        near(ours, theirs, 1e-4 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("dtype", LOW)
def test_attention_equals_softmax_written_out(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 40, 32, generator=generator).to(dtype) for _ in range(3))
    scores = q.float() @ k.float().mT / 32**0.5
    future = torch.ones(40, 40, dtype=torch.bool).triu(1)
    expected = scores.masked_fill(future, float("-inf")).softmax(-1) @ v.float()
    found = causal_attention(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE))
    near(found, expected, 1e-5 if dtype == torch.float32 else 0.01)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile asks, not we
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", LOW)
def test_a_step_has_the_cpus_loss_and_gradients(dtype: torch.dtype, compiled: bool) -> None:
    model, tokens = model_and_tokens()
    plain = ComputeConfig(
        device=torch.device("cpu"), precision="fp32", micro_batch=4, compile=False, threads=1
    )
    objective, expected = next_token_loss(model, tokens, plain, 1e-4)
    objective.backward()
    reference = {name: p.grad for name, p in model.named_parameters()}
    other = Transformer(MODEL)
    other.load_state_dict(model.state_dict())
    other.to(DEVICE)
    if compiled:
        for block in other.blocks:
            block.compile(dynamic=False)
    asked = compute(dtype, compile=compiled)
    scale = 1024.0 if dtype == torch.float16 else 1.0
    objective, nats = next_token_loss(other, tokens.to(DEVICE), asked, 1e-4)
    (scale * objective).backward()
    assert float(nats) == pytest.approx(float(expected), rel=1e-5 if dtype.itemsize > 2 else 5e-3)
    for name, parameter in other.named_parameters():
        assert parameter.grad is not None and reference[name] is not None
        near(parameter.grad / scale, reference[name], 1e-3 if dtype.itemsize > 2 else 0.08)
    torch.compiler.reset()


def test_documents_score_as_on_the_cpu() -> None:
    model, _ = model_and_tokens()
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 512, 900).astype(np.uint16)
    offsets = np.array([0, 200, 210, 900], dtype=np.int64)
    tokens[offsets[:-1]] = 0
    common: dict[str, Any] = {"context": 64, "autocast_dtype": None}
    theirs = perplexity.score_documents(model, tokens, offsets, device="cpu", **common)
    ours = perplexity.score_documents(model.to(DEVICE), tokens, offsets, device=DEVICE, **common)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)


def test_latency_and_memory_are_measured_compiled_too() -> None:
    model, _ = model_and_tokens()
    found = eval_latency.measure(
        model.to(DEVICE), device=DEVICE, autocast_dtype=None, warmup=2, repeats=5, compiled=GPU
    )
    assert 0 < found["latency_ms_p50_l128"] <= found["latency_ms_p95_l128"]
    assert found["peak_memory_mib"] > found["weights_mib"] > 0
    if GPU:
        assert any(key.startswith("latency_compiled_") for key in found)


def test_the_probe_answers_with_what_fits() -> None:
    found = probe.measure(MODEL, 64, device=DEVICE, dtype=torch.bfloat16, most_tokens=8_192)
    assert found["micro_batch_tokens"] <= 8_192 and found["loss_chunk"] in probe.CHUNKS[DEVICE.type]
    assert all(value > 0 for value in (*found["block_us"].values(), *found["head_us"].values()))


def test_auto_precision_is_one_that_the_device_has() -> None:
    chosen = runtime.resolve_precision("auto", DEVICE)
    assert chosen in (("bf16", "fp16") if GPU else ("bf16", "fp32"))


def test_a_cut_run_ends_as_an_uninterrupted_one(tiny_sweep: Path, run_cli, tmp_path: Path) -> None:
    """With training.deterministic, to the same bits; cut by a checkpoint every five steps."""
    stated = [
        "--config", tiny_sweep, "--exp", "base", "--device", str(DEVICE),
        "--set", "training.deterministic=true", "--set", "training.precision=fp32",
        "--set", "training.checkpoint_every_steps=5",
    ]  # fmt: skip
    run_cli(*stated, "--log_dir", tmp_path / "whole")
    run_cli(*stated, "--log_dir", tmp_path / "cut")
    cut = tmp_path / "cut" / "base"
    (cut / "metrics.json").unlink()  # as if killed before its end, after a checkpoint
    newest = max((cut / "checkpoints").glob("*.json"))
    newest.unlink()
    run_cli(*stated, "--log_dir", tmp_path / "cut")
    ends = [
        json.loads((tmp_path / name / "base" / "metrics.json").read_text())
        for name in ("whole", "cut")
    ]
    assert ends[0]["device"] == DEVICE.type
    for key in ("dev_loss", "test_loss", "train_loss"):
        assert ends[0][key] == ends[1][key], key


def test_a_gpu_run_records_its_utilisation_and_memory(
    tiny_sweep: Path, run_cli, tmp_path: Path
) -> None:
    run_cli("--config", tiny_sweep, "--exp", "base", "--device", str(DEVICE), "--set",
            "training.precision=auto", "--log_dir", tmp_path)  # fmt: skip
    found = json.loads((tmp_path / "base" / "metrics.json").read_text())
    assert found["train_peak_memory_mib"] > 0 and found["tokens_per_s"] > 0
    assert found["device"] == DEVICE.type and found["cost_usd"] > 0
