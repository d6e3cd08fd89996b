"""The kill rule over complete curves."""

from __future__ import annotations

import pytest

from src.analysis.kill_replay import replay_kills
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
