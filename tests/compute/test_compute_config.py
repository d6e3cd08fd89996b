"""What a run chooses by itself: once per log directory, whatever one run's settings were."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch

from src.compute import autotune, compute_config, runtime
from src.models.transformer import Block, Transformer
from src.spec.config import ModelConfig, TrainingConfig
from src.training_step import compile_blocks

MODEL = ModelConfig(vocab_size=300, d_model=16, n_layers=2, n_heads=1, head_dim=16, d_ff=40)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No timing and no other thread count: what is tested is who decides."""
    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: True)
    monkeypatch.setattr(runtime, "bf16_speedup", lambda **_: 2.0)
    monkeypatch.setattr(compute_config, "_can_compile", lambda _: True)
    fastest = {"micro_batch_tokens": 2_048, "loss_chunk": 128}
    monkeypatch.setattr(autotune, "measure", lambda *_, **__: dict(fastest))


def test_one_run_does_not_choose_for_the_next(quiet: None, tmp_path: Path) -> None:
    plain = TrainingConfig(tokens=5_000_000, threads=1)
    stated = replace(plain, precision="fp32", micro_batch=4, tokens=100_000)
    first = compute_config.choose(stated, MODEL, tmp_path, "cpu")
    assert (first.precision, first.micro_batch, first.compile) == ("fp32", 4, False)
    second = compute_config.choose(plain, MODEL, tmp_path, "cpu")
    assert (second.precision, second.micro_batch, second.compile) == ("bf16", 16, True)


def test_the_choice_is_kept_when_the_machine_would_choose_otherwise(
    quiet: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = TrainingConfig(threads=1)
    first = compute_config.choose(training, MODEL, tmp_path, "cpu")
    monkeypatch.setattr(runtime, "bf16_speedup", lambda **_: 0.5)
    assert compute_config.choose(training, MODEL, tmp_path, "cpu") == first


def test_without_a_compiler_a_run_is_eager_and_says_so(
    quiet: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compute_config, "_can_compile", lambda _: False)
    assert not compute_config.choose(TrainingConfig(threads=1), MODEL, tmp_path, "cpu").compile
    assert "so eager" in capsys.readouterr().out


def test_the_micro_batch_divides_the_batch(quiet: None, tmp_path: Path) -> None:
    training = TrainingConfig(batch_size=250, threads=1)
    chosen = compute_config.choose(training, MODEL, tmp_path, "cpu").micro_batch
    assert 250 % chosen == 0 and chosen * training.seq_len <= compute_config.CPU_MICRO_BATCH_TOKENS


def test_more_shapes_than_dynamo_counts_are_all_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its limit is so many recompilations a code object; `compile_blocks` starts a new count."""
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        compiled.append(1)
        return graph.forward

    compile_with = partialmethod(torch.nn.Module.compile, backend=backend)
    monkeypatch.setattr(Block, "compile", compile_with)
    chosen = compute_config.ComputeConfig(
        device=torch.device("cpu"), precision="fp32", micro_batch=1, compile=True, threads=1
    )
    # Not by monkeypatch, whose undoing would take the setting away (findings/pytest-torch-config).
    with torch._dynamo.config.patch(recompile_limit=2), torch.no_grad():
        for d_ff in (8, 16, 24, 32):
            model = Transformer(replace(MODEL, n_layers=1, d_ff=d_ff))
            compile_blocks(model, chosen)
            model(torch.zeros(1, 4, dtype=torch.int64))
    torch.compiler.reset()
    assert len(compiled) == 4


def test_a_long_run_is_autotuned_once_and_a_short_one_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(compute_config, "_can_compile", lambda _: True)

    def measure(*arguments: Any, **named: Any) -> dict[str, Any]:
        calls.append(named["compiled"])
        return real(*arguments, **named | {"compiled": False})  # compiling is test_loss.py's

    real = autotune.measure
    monkeypatch.setattr(autotune, "measure", measure)
    monkeypatch.setitem(autotune.HEAD_ROWS, "cpu", 64)
    short = TrainingConfig(threads=1, precision="fp32", tokens=100_000, seq_len=16)
    long = replace(short, tokens=2_000_000)
    assert (
        compute_config.choose(short, MODEL, tmp_path, "cpu").loss_chunk
        == compute_config.LOSS_CHUNK["cpu"]
    )
    assert not calls
    chosen = [compute_config.choose(long, MODEL, tmp_path, "cpu") for _ in range(2)]
    assert chosen[0] == chosen[1] and len(calls) == 1
    assert chosen[0].loss_chunk in autotune.CHUNKS["cpu"]
    assert chosen[0].micro_batch * 16 <= compute_config.CPU_MICRO_BATCH_TOKENS
    stated = replace(long, micro_batch=2, loss_chunk=77)
    as_stated = compute_config.choose(stated, MODEL, tmp_path / "other", "cpu")
    assert (as_stated.micro_batch, as_stated.loss_chunk, len(calls)) == (2, 77, 1)
    compute_config.choose(replace(long, compile="off"), MODEL, tmp_path, "cpu")
    assert calls == [True, False]  # as each will run, side by side in one directory


def test_autotuning_draws_nothing_from_the_global_generator() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    autotune.measure(MODEL, 16, device=torch.device("cpu"), dtype=torch.bfloat16, most_tokens=512)
    assert torch.equal(torch.rand(3), expected)
    assert autotune.micro_batch_candidates(torch.device("cpu"), 100) == [100]


@pytest.mark.parametrize(
    "damage", [{}, {"threads": "two"}, {"threads": 0}, {"can_compile": 1}, {"precision": None}]
)
def test_stored_choices_that_are_not_ours_are_refused(
    quiet: None, tmp_path: Path, damage: dict[str, Any]
) -> None:
    compute_config.choose(TrainingConfig(), MODEL, tmp_path, "cpu")
    path = tmp_path / "choices.json"
    stored = {k: {**v, **damage} if damage else {} for k, v in json.loads(path.read_text()).items()}
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="choices.json.*delete the file to choose again"):
        compute_config.choose(TrainingConfig(), MODEL, tmp_path, "cpu")
