"""The largest one-step rises: which step they name, what is no rise, and that they are carried."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.recipe import REMEDIES, measure
from src.evaluation.stability import Stability


def seen(losses: list[float], norms: list[float] | None = None) -> Stability:
    stability = Stability()
    for step, (loss, norm) in enumerate(zip(losses, norms or losses, strict=True), start=1):
        stability.see(step, loss, norm)
    return stability


def test_loss_and_norm_have_a_rise_and_a_step_each():
    metrics = seen([9.0, 7.5, 11.0, 8.0, 8.5], [1.0, 0.5, 0.75, 40.0, 2.0]).metrics()
    assert metrics == {
        "loss_largest_rise_nats": 3.5,
        "loss_largest_rise_step": 3,
        "grad_norm_largest_rise": 39.25,
        "grad_norm_largest_rise_step": 4,
    }


def test_a_loss_that_only_falls_has_a_rise_below_zero():
    metrics = seen([9.0, 8.0, 7.75]).metrics()
    assert (metrics["loss_largest_rise_nats"], metrics["loss_largest_rise_step"]) == (-0.25, 3)


@pytest.mark.parametrize("losses", [[], [9.0]])
def test_fewer_than_two_steps_have_no_rise(losses):
    assert set(seen(losses).metrics().values()) == {None}


def test_a_step_left_out_by_the_scaler_is_no_rise():
    metrics = seen([9.0, 8.0, 8.5, 8.0], [1.0, math.inf, 5.0, 6.0]).metrics()
    assert (metrics["grad_norm_largest_rise"], metrics["grad_norm_largest_rise_step"]) == (1.0, 4)
    assert metrics["loss_largest_rise_nats"] == 0.5


def test_a_rise_across_a_cut_counts():
    """Step 3 comes after the cut: it must know the loss of step 2."""
    losses = [9.0, 7.5, 11.0, 8.0]
    whole = seen(losses)
    resumed = Stability()
    resumed.load(seen(losses[:2]).state())
    for step in (3, 4):
        resumed.see(step, losses[step - 1], losses[step - 1])
    assert resumed.state() == whole.state()
    assert resumed.metrics()["loss_largest_rise_step"] == 3


def test_the_benchmark_of_remedies_trains_what_it_names(tiny_sweep: Path):
    """Centred, the output embedding keeps no common direction; untouched, it has one."""
    metrics = {name: measure(tiny_sweep, "base", 0, REMEDIES[name]) for name in ("none", "center")}
    assert metrics["center"]["common_share_largest"] < 1e-6
    assert metrics["none"]["common_share_largest"] > 0.01
    assert len({row["dev_loss"] for row in metrics.values()}) == 2
