"""The kill rule over complete curves, and against what was said live."""

from __future__ import annotations

import pytest

from src.analysis.kill_replay import Live, live_differences, replay_kills
from src.spec.config import KillRule


def above(margin: float, window: int = 1) -> KillRule:
    return KillRule(margin_ppl=margin, window_tokens=window, grace_tokens=0)


def test_replay_counts_false_kills_and_tokens_saved() -> None:
    base = [(1, 50.0), (2, 40.0), (3, 30.0), (4, 25.0)]
    runs = {
        "bad": [(1, 60.0), (2, 50.0), (3, 40.0), (4, 35.0)],
        "late": [(1, 60.0), (2, 46.0), (3, 29.0), (4, 24.0)],  # starts badly, ends best
        "good": [(1, 50.0), (2, 40.0), (3, 30.0), (4, 24.5)],
    }
    replay = replay_kills(base, runs, above(5.0))
    assert (replay.kills, replay.false_kills, replay.best_killed) == (2, 1, True)
    assert (replay.tokens_saved, replay.tokens_total) == (4, 12)
    gentle = replay_kills(base, runs, above(100.0))
    assert (gentle.kills, gentle.false_kills, gentle.best_killed, gentle.tokens_saved) == (
        0,
        0,
        False,
        0,
    )


def test_replay_of_an_incomplete_curve_is_refused() -> None:
    with pytest.raises(ValueError, match="complete curves"):
        replay_kills([(1, 5.0), (2, 4.0)], {"cut": [(1, 5.0)]}, above(1.0))


BASE = [(1, 50.0), (2, 40.0), (3, 30.0), (4, 25.0)]
BAD = [(1, 60.0), (2, 50.0), (3, 40.0), (4, 35.0)]


def test_a_run_that_was_ahead_of_its_baseline_is_judged_by_the_whole_curve() -> None:
    """Live it never found a counterpart, or an early part of one; the replay kills at 2."""
    live = {"early": Live("none", None, BAD), "same": Live("kill", 2, BAD[:2]),
            "fine": Live("keep", None, BASE)}  # fmt: skip
    (found,) = live_differences(BASE, live, above(5.0))
    assert (found.name, found.live, found.live_tokens) == ("early", "none", None)
    assert (found.replayed, found.replayed_tokens) == ("kill", 2)
    assert "at every check from 1 to 2 tokens" in found.reason


def test_a_kill_that_came_late_or_unfounded_is_a_difference() -> None:
    late = live_differences(BASE, {"late": Live("kill", 4, BAD)}, above(5.0))
    assert [(d.live_tokens, d.replayed_tokens) for d in late] == [(4, 2)]
    wrong = live_differences(BASE, {"wrong": Live("kill", 2, BASE[:2])}, above(5.0))
    assert [(d.live, d.replayed) for d in wrong] == [("kill", "keep")]
