"""Short rankings against full ones, on known orders."""

from __future__ import annotations

import pytest

from src.analysis.rankings import log_slope, rank_agreement

# --- rankings -----------------------------------------------------------------------------------


def at_seed_0(**losses: float) -> dict[str, dict[int, float]]:
    return {name: {0: loss} for name, loss in losses.items()}


def test_rank_agreement_on_known_orders() -> None:
    short = at_seed_0(a=3.0, b=3.1, c=3.2, d=3.3)
    same = rank_agreement(short, at_seed_0(a=2.0, b=2.1, c=2.2, d=2.3))
    assert (same.spearman, same.top1_same, same.top1_regret) == (pytest.approx(1.0), True, 0.0)
    assert same.p == pytest.approx(1 / 24) and same.left_out == 0
    reversed_ = rank_agreement(short, at_seed_0(a=2.3, b=2.2, c=2.1, d=2.0))
    assert reversed_.spearman == pytest.approx(-1.0)
    assert reversed_.top1_regret == pytest.approx(0.3)
    assert reversed_.p == pytest.approx(1.0)


def test_ties_share_their_mean_rank() -> None:
    """Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: rho 4.5 / sqrt(4.5 x 5) by hand."""
    result = rank_agreement(at_seed_0(a=1, b=2, c=2, d=3), at_seed_0(a=1, b=2, c=3, d=4))
    assert result.spearman == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert result.p == pytest.approx(2 / 24)  # the two orders of the tie


def test_leaders_that_tie_cost_what_the_worse_of_them_costs() -> None:
    result = rank_agreement(at_seed_0(a=1.0, b=1.0, c=2.0), at_seed_0(a=3.0, b=3.2, c=3.1))
    assert not result.top1_same and result.top1_regret == pytest.approx(0.2)


def test_rank_agreement_compares_equal_seeds_and_counts_the_others() -> None:
    """b's bad seed 1 was stopped in the full phase: its good seed is not compared with a's mean."""
    short = {"a": {0: 3.0, 1: 3.2}, "b": {0: 2.9, 1: 3.5}}
    full = {"a": {0: 2.0, 1: 2.2}, "b": {0: 2.1}}
    result = rank_agreement(short, full)
    assert (result.names, result.short, result.left_out) == (("a", "b"), (3.0, 2.9), 2)
    assert not result.top1_same and result.top1_regret == pytest.approx(0.1)


def test_rank_agreement_leaves_out_what_one_budget_lacks() -> None:
    short, full = at_seed_0(a=3.0, b=3.1, x=1.0), at_seed_0(a=2.1, b=2.0, y=1.0)
    result = rank_agreement(short, full)
    assert (result.n, result.spearman, result.top1_same) == (2, None, False)
    assert result.left_out == 2
    apart = {"a": {0: 1.0}, "b": {1: 1.0}}
    for short, full in (
        (at_seed_0(a=1.0), at_seed_0(b=1.0)),
        ({"a": {0: 1.0}}, {"a": {1: 1.0}}),
        (apart, apart),
    ):
        with pytest.raises(ValueError, match="no seed was run by every"):
            rank_agreement(short, full)


def test_log_slope_recovers_a_power_law() -> None:
    curve = [(t, 500.0 * t**-0.12) for t in range(100_000, 5_000_001, 100_000)]
    assert log_slope(curve) == pytest.approx(-0.12)
    assert log_slope(curve[:1]) is None
    assert log_slope([(0, 16000.0), (10, 3.0)]) is None
