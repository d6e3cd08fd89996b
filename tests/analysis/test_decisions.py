"""Promotion and the winner on hand-made cases with known answers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from src.analysis.decisions import Measured, faster, promote, winner
from src.analysis.repeats import Noise

# --- promotion ----------------------------------------------------------------------------------

NOISE = Noise(sd=0.005, df=4)  # t(0.975, 4) = 2.776: threshold 0.0196 for one seed each


@pytest.mark.parametrize(
    ("second", "promoted", "message"),
    [(3.50, ("emb25",), "one goes on"), (3.475, ("emb25", "emb35"), "two go on")],
)
def test_a_clear_lead_promotes_one_and_a_thin_one_two(
    second: float, promoted: tuple[str, ...], message: str
) -> None:
    result = promote({"emb35": [second], "emb25": [3.46], "emb45": [3.60]}, NOISE)
    assert result.promoted == promoted and message in result.reason
    assert [name for name, _ in result.ranking] == ["emb25", "emb35", "emb45"]
    assert result.threshold == pytest.approx(2.7764 * 0.005 * math.sqrt(2), rel=1e-4)


def test_more_seeds_make_the_same_lead_safe() -> None:
    assert len(promote({"a": [3.475] * 8, "b": [3.46] * 8}, NOISE).promoted) == 1


def test_unmeasured_noise_never_calls_a_lead_safe() -> None:
    assert promote({"a": [3.0], "b": [4.0]}, None).promoted == ("a", "b")


def test_what_was_stopped_is_not_promoted_and_an_empty_field_is_refused() -> None:
    assert promote({"a": [], "b": [4.0]}, None).promoted == ("b",)
    with pytest.raises(ValueError, match="no configuration is left"):
        promote({"a": []}, None)


# --- the winner ---------------------------------------------------------------------------------


def measured(
    name: str, ppl: float, l128: float | None = 10.0, l512: float | None = 20.0, mib: float = 50.0
) -> Measured:
    return Measured(
        name=name,
        log_perplexities=(math.log(ppl),) * 3,
        latency_ms_l128=l128,
        latency_ms_l512=l512,
        peak_memory_mib=mib,
    )


BASE = measured("emb35", 100.0)


@pytest.mark.parametrize(
    ("ppl", "cost", "strict", "margin", "message"),
    [
        (95.0, {}, "emb25", "emb25", "at least 5% below"),
        (95.1, {}, None, None, "not 5% below"),
        (90.0, {"l128": 10.2}, None, "emb25", "latency at L=128 +2.00% (above"),
        (90.0, {"l512": 20.4}, None, "emb25", "latency at L=512 +2.00% (above"),
        (90.0, {"mib": 51.0}, None, "emb25", "peak memory +2.00% (above"),
        (80.0, {"l128": 10.4}, None, None, "latency at L=128 +4.00% (above"),
        (80.0, {"l512": None}, None, None, "latency at L=512 was not measured"),
    ],
)
def test_five_percent_at_equal_cost_wins_and_three_percent_more_cost_with_the_margin(
    ppl: float, cost: dict[str, Any], strict: str | None, margin: str | None, message: str
) -> None:
    result = winner(BASE, [measured("emb25", ppl, **cost)])
    assert (result.winner_strict, result.winner_margin) == (strict, margin)
    assert message in "; ".join(result.candidates[0].reasons)
    assert f"strict: {strict or 'no winner'};" in result.readings
    assert result.readings.endswith(f"margin: {margin or 'no winner'}")


def test_both_readings_are_named_also_where_they_name_two_models() -> None:
    """The miniature's case: the best one is above the baseline's memory by a hair."""
    best, second = measured("emb25", 90.0, mib=50.2), measured("emb45", 92.0)
    result = winner(BASE, [best, second])
    assert (result.winner_strict, result.winner_margin) == ("emb45", "emb25")
    assert "emb45" in result.readings and "emb25" in result.readings
    assert winner(BASE, [second]).readings.count("emb45") == 2


@pytest.mark.parametrize("few", ["candidate", "baseline"])
def test_one_seed_names_no_winner(few: str) -> None:
    base, ours = BASE, measured("emb25", 50.0)
    if few == "baseline":
        base = replace(base, log_perplexities=base.log_perplexities[:1])
    else:
        ours = replace(ours, log_perplexities=ours.log_perplexities[:1])
    result = winner(base, [ours])
    assert (result.winner_strict, result.winner_margin) == (None, None)
    assert "no verdict" in result.candidates[0].reasons[0]
    assert winner(base, [ours], least_seeds=1).winner_strict == "emb25"


def test_the_lowest_perplexity_wins_unless_tied_with_a_faster_one() -> None:
    slow, quick = measured("slow", 90.0), measured("quick", 90.2, l128=8.0, l512=18.0)
    assert winner(BASE, [slow, quick]).winner_strict == "slow"
    tied = winner(BASE, [slow, quick], ties=[frozenset(("slow", "quick"))])
    assert tied.winner_strict == "quick" and "not told apart" in tied.reason


def test_a_tie_with_a_configuration_that_fails_the_bars_changes_nothing() -> None:
    heavy = measured("heavy", 90.1, l128=5.0, l512=5.0, mib=80.0)
    result = winner(BASE, [measured("slow", 90.0), heavy], ties=[frozenset(("slow", "heavy"))])
    assert result.winner_strict == "slow"


def test_no_candidates_is_no_winner() -> None:
    assert winner(BASE, []).winner_strict is None


def test_faster_uses_the_geometric_mean_of_both_lengths() -> None:
    a = measured("a", 90.0, l128=10.0, l512=40.0)  # 20 ms
    b = measured("b", 90.0, l128=18.0, l512=18.0)  # 18 ms
    assert faster([a, b]) == "b"
    assert faster([measured("c", 90.0, l128=None), b]) == "b"
    assert faster([measured("c", 90.0, l128=None), measured("d", 90.0, l128=None)]) == "c"
