"""Phase 0: the checks find what they are for, and the range test's rule reads known curves."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from src import preflight
from src.models.transformer import Transformer
from src.preflight import RunContext
from src.run import Preempted
from src.spec import config
from src.spec.allocation import count_params
from src.spec.config import ModelConfig
from src.study import sanity, sanity_training
from src.study.plan import allocate
from tests import python


def context(sweep_file: Path, name: str, log_dir: Path) -> RunContext:
    sweep = config.load_sweep(sweep_file, (), "rank")
    where: dict[str, Any] = {"log_dir": log_dir, "device": "cpu", "remote": None}
    return preflight.check(sweep.run(name, 0), sweep, allocate(sweep), **where)


def curve(loss: Callable[[float], float]) -> list[dict[str, Any]]:
    return sanity_training.ramp(lambda number, rate: loss(rate), "test")


def logistic(rate: float, middle: float = 4e-3) -> float:
    """Falls from 6 to 4, fastest at `middle`, on a logarithmic axis."""
    return 6 - 2 / (1 + (middle / rate) ** 2)


def test_the_suggestion_is_where_the_loss_falls_fastest() -> None:
    for middle in (1e-3, 4e-3, 1e-2):
        suggested = sanity_training.suggested_rate(curve(lambda rate, m=middle: logistic(rate, m)))
        assert suggested is not None and middle <= suggested <= 2 * middle  # smoothing lags a bit


def test_a_later_explosion_changes_nothing() -> None:
    calm = sanity_training.suggested_rate(curve(logistic))
    wild = curve(lambda rate: logistic(rate) + (rate > 0.1) * 50)
    assert sanity_training.suggested_rate(wild) == calm
    assert len(wild) < sanity_training.RANGE_STEPS and wild[-1]["learning_rate"] < 0.13
    nan = curve(lambda rate: math.nan if rate > 0.05 else logistic(rate))
    assert sanity_training.suggested_rate(nan) == calm and nan[-1]["learning_rate"] <= 0.05


@pytest.mark.parametrize("loss", [lambda rate: 6.0, lambda rate: 6.0 + rate, lambda rate: math.nan])
def test_a_loss_that_never_falls_suggests_nothing(loss: Callable[[float], float]) -> None:
    assert sanity_training.suggested_rate(curve(loss)) is None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rank", [None, 8])
def test_blocks_are_counted_tensor_by_tensor(tied: bool, rank: int | None) -> None:
    model = ModelConfig(
        vocab_size=300, d_model=32, n_layers=2, n_heads=2, head_dim=16, d_ff=80,
        tie_embeddings=tied, embedding_dim=rank,
    )  # fmt: skip
    assert sanity_training.blocks(Transformer(model)) == config.to_dict(count_params(model))


def test_the_phase_checks_and_does_not_check_twice(tiny_sweep: Path, tmp_path: Path) -> None:
    line = ("run_experiment.py", "--config", tiny_sweep, "--exp", "base", "--phase", "sanity",
            "--log_dir", tmp_path, "--device", "cpu")  # fmt: skip
    done = python(*line)
    assert done.returncode == 0, done.stderr
    output = done.stdout
    folder = tmp_path / "base-sanity"
    result = json.loads((folder / "sanity.json").read_text())
    assert result["passed"] is True and all(result["checks"].values())
    assert result["overfit_loss"] < sanity_training.OVERFIT_LOSS and result["overfit_tokens"] == 256
    assert abs(result["initial_loss"] - math.log(300)) < 0.1
    assert sum(result["params"].values()) == result["total_params_built"]
    assert "embedding" in output and f"{result['total_params_built']:,}" in output
    ramp = json.loads((folder / "learning_rates.json").read_text())
    assert ramp["suggested"] == result["suggested_learning_rate"] and ramp["rule"]
    rates = [row["learning_rate"] for row in ramp["rows"]]
    assert rates == sorted(rates)
    assert (folder / "learning_rates.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["base-sanity"]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert python(*line).stdout == output
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_model_that_cannot_learn_fails_the_phase(
    tiny_sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sanity_training, "OVERFIT_STEPS", 20)
    result = sanity.check(context(tiny_sweep, "idle", tmp_path))
    assert result["checks"]["overfits"] is False and result["passed"] is False
    assert result["checks"]["parameters as planned"] is True
    assert "FAIL overfits" in sanity.report(result)


def test_a_ramp_that_was_cut_goes_on_and_finds_the_same(
    tiny_sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sanity_training, "RANGE_STEPS", 20)
    monkeypatch.setattr(sanity_training, "OVERFIT_TOKENS", 64)  # two sequences
    whole = sanity.check(context(tiny_sweep, "base", tmp_path / "whole"))
    cut, train_once = context(tiny_sweep, "base", tmp_path / "cut"), sanity_training.train_once
    ramped: list[float] = []

    def signalled(stepper: Any, batch: Tensor, rate: float) -> float:
        if len(batch) > 2:
            ramped.append(rate)
            if len(ramped) in (3, 8, 16):
                os.kill(os.getpid(), signal.SIGTERM)
        return train_once(stepper, batch, rate)

    monkeypatch.setattr(sanity_training, "train_once", signalled)
    for _ in range(3):
        with pytest.raises(Preempted):
            sanity.check(cut)
    again = sanity.check(cut)
    assert len(ramped) == len(set(ramped)) == 20  # no step twice
    clocks = ("wall_seconds", "tokens_per_s", "cost_usd")
    assert {**again, **dict.fromkeys(clocks)} == {**whole, **dict.fromkeys(clocks)}
    rows = [tmp_path / name / "base-sanity/learning_rates.json" for name in ("cut", "whole")]
    assert rows[0].read_bytes() == rows[1].read_bytes()
    assert not (tmp_path / "cut" / "base-sanity" / "ramp").exists()


def test_finished_checks_of_another_configuration_are_refused(
    tiny_sweep: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "base-sanity"
    folder.mkdir()
    (folder / "sanity.json").write_text('{"config_digest": "another", "passed": true}')
    with pytest.raises(ValueError, match=r"sanity.json: found the checks of another"):
        sanity.check(context(tiny_sweep, "base", tmp_path))
