"""The kill rule on hand-made curves, and properties that hold for any curve."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.spec.config import KillRule
from src.spec.kill_rule import Verdict, can_ever_fire, comparable, verdict

EVERY = 250_000
RULE = KillRule(grace_tokens=0)  # the PRD's


def rule(**values: int) -> KillRule:
    return replace(RULE, **values)


def curve(perplexities: list[float], every: int = EVERY) -> list[tuple[int, float]]:
    return [((i + 1) * every, ppl) for i, ppl in enumerate(perplexities)]


def flat(value: float, checks: int) -> list[tuple[int, float]]:
    return curve([value] * checks)


def test_kills_at_the_check_where_the_streak_reaches_one_million_tokens() -> None:
    result = verdict(RULE, flat(30.0, 8), flat(30.5, 8))
    assert (result.kind, result.tokens) == ("kill", 5 * EVERY)  # 250k .. 1,250k spans 1M
    assert "1,250,000" in result.reason and "0.500" in result.reason
    assert (result.literal_kind, result.literal_tokens) == ("kill", 5 * EVERY)


@pytest.mark.parametrize(
    ("baseline", "run", "killed_at"),
    [
        (flat(30.0, 4), flat(30.5, 4), None),  # one check short of the window
        (flat(30.0, 20), flat(30.4375, 20), None),  # just under the margin
        (flat(30.0, 9), curve([31.0] * 4 + [30.25] + [31.0] * 4), None),  # a good check between
        (flat(30.0, 10), curve([31.0] * 4 + [30.25] + [31.0] * 5), 10),
        (flat(30.0, 10), curve([31.0] * 5 + [29.0] * 5), 5),  # a recovery after the kill
        (flat(30.0, 5), flat(31.0, 7), 5),  # what is decided needs no further baseline
        ([(0, 16000.0), *flat(30.0, 4)], [(0, 16100.0), *flat(31.0, 4)], None),  # untrained
        (flat(30.0, 10)[1::2], flat(31.0, 10), None),  # a baseline checked half as often
        (flat(30.0, 5), flat(math.inf, 5), 5),  # infinite is worse than any finite one
        (flat(math.inf, 5), flat(math.inf, 5), None),
    ],
)
def test_what_kills_and_what_does_not(
    baseline: list[tuple[int, float]], run: list[tuple[int, float]], killed_at: int | None
) -> None:
    result = verdict(RULE, baseline, run)
    assert result.kind == ("keep" if killed_at is None else "kill")
    assert result.tokens == (None if killed_at is None else killed_at * EVERY)


def test_grace_delays_the_kill_and_both_verdicts_are_told() -> None:
    result = verdict(rule(grace_tokens=4 * EVERY), flat(30.0, 10), flat(31.0, 10))
    assert (result.kind, result.tokens) == ("kill", 8 * EVERY)
    assert (result.literal_kind, result.literal_tokens) == ("kill", 5 * EVERY)
    assert "Without grace" in result.reason


def test_grace_can_save_a_run_that_starts_badly() -> None:
    run = curve([33.0] * 5 + [29.0] * 5)
    result = verdict(rule(grace_tokens=5 * EVERY), flat(30.0, 10), run)
    assert (result.kind, result.literal_kind, result.literal_tokens) == ("keep", "kill", 5 * EVERY)


def test_no_baseline_at_this_point_is_no_verdict() -> None:
    assert verdict(RULE, [], flat(31.0, 3)).kind == "none"
    assert verdict(RULE, flat(30.0, 2), flat(31.0, 3)).kind == "none"
    assert verdict(RULE, flat(30.0, 3), []).kind == "none"
    assert verdict(rule(window_tokens=1), [(0, 16000.0)], [(0, 16100.0)]).kind == "none"


@pytest.mark.parametrize("whose", ["baseline", "run"])
def test_a_hole_in_a_curve_ends_the_streak(whose: str) -> None:
    """Nobody knows that the run was worse in a hole, and the rule says "at every check"."""

    def verdict_after(checks: int) -> Verdict:
        baseline, run = flat(30.0, checks), flat(31.0, checks)
        (baseline if whose == "baseline" else run).remove((4 * EVERY, 30.0 + (whose == "run")))
        return verdict(RULE, baseline, run)

    assert verdict_after(8).kind == "keep"
    assert "a hole (1 checks" in verdict_after(8).reason
    assert verdict_after(9).tokens == 9 * EVERY  # 1.25M .. 2.25M


@pytest.mark.parametrize(
    "bad", [[(2, 30.0), (1, 30.0)], [(1, 30.0), (1, 30.0)], [(1, math.nan)], [(-5, 30.0)]]
)
def test_a_broken_curve_is_refused(bad: list[tuple[int, float]]) -> None:
    with pytest.raises(ValueError, match="curve holds"):
        verdict(RULE, flat(30.0, 2), bad)


@pytest.mark.parametrize(
    "grace, total, every, possible",
    [
        (0, 5_000_000, 250_000, True),
        (0, 1_000_000, 250_000, False),  # first check at 250k: only 750k left
        (0, 1_250_000, 250_000, True),
        (4_000_000, 5_000_000, 250_000, True),
        (4_000_001, 5_000_000, 250_000, False),
        (0, 5_000_000, 5_000_000, False),  # a single check
        (0, 5_000_000, 3_000_000, True),  # 3M and the end
        (6_000_000, 5_000_000, 250_000, False),
    ],
)
def test_can_ever_fire(grace: int, total: int, every: int, possible: bool) -> None:
    assert can_ever_fire(rule(grace_tokens=grace), total, every) is possible


perplexities = st.lists(st.floats(10.0, 60.0), min_size=1, max_size=30)
rules = st.builds(
    KillRule,
    margin_ppl=st.floats(0.01, 5.0),
    window_tokens=st.integers(1, 12 * EVERY),
    grace_tokens=st.integers(0, 12 * EVERY),
)


@given(rules, perplexities, perplexities)
def test_prefix_property_a_verdict_never_changes_its_mind(
    rule: KillRule, base: list[float], run: list[float]
) -> None:
    """Asked after each check, the live verdict kills exactly where the replay says."""
    n = min(len(base), len(run))
    full = verdict(rule, curve(base[:n]), curve(run[:n]))
    live = [verdict(rule, curve(base[:n]), curve(run[: i + 1])) for i in range(n)]
    kills = [v.tokens for v in live if v.kind == "kill"]
    assert full.tokens == (kills[0] if kills else None)
    assert len(set(kills)) <= 1


@given(rules, perplexities, perplexities)
def test_grace_only_ever_delays(rule: KillRule, base: list[float], run: list[float]) -> None:
    result = verdict(rule, curve(base), curve(run))
    if result.tokens is not None:
        assert result.literal_tokens is not None
        assert result.tokens >= rule.grace_tokens + rule.window_tokens
        assert result.literal_tokens <= result.tokens
    without = replace(rule, grace_tokens=0)
    assert verdict(without, curve(base), curve(run)).tokens == result.literal_tokens


@given(rules, st.lists(st.floats(10.0, 60.0), min_size=1, max_size=20), st.floats(0.0, 10.0))
def test_an_always_worse_run_dies_exactly_when_the_rule_can_fire(
    rule: KillRule, base: list[float], extra: float
) -> None:
    run = [ppl + rule.margin_ppl + extra + 1e-6 for ppl in base]
    total = len(base) * EVERY
    fired = verdict(rule, curve(base), curve(run)).kind == "kill"
    assert fired == can_ever_fire(rule, total, EVERY)


@given(rules, perplexities)
def test_a_run_equal_to_the_baseline_is_kept(rule: KillRule, base: list[float]) -> None:
    assert verdict(rule, curve(base), curve(base)).kind == "keep"


def test_runs_of_two_sizes_do_not_compare() -> None:
    keys = ("tokens", "batch_size", "seq_len", "eval_every_tokens", "dev_tokens")
    config = {"training": dict.fromkeys(keys, 1), "data_sha256": "d"}
    small, large = (config | {"asked": {"total_params_asked": n}} for n in (5, 10))
    assert comparable(small, small) and comparable(config, config)
    assert not comparable(small, large)
