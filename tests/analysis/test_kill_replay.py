"""The kill rule over complete curves."""

from __future__ import annotations

import pytest

from src.analysis.kill_replay import replay
from src.spec.config import KillRule

BASE = [(1, 50.0), (2, 40.0), (3, 30.0), (4, 25.0)]


def above(margin: float, window: int = 1) -> KillRule:
    return KillRule(margin_ppl=margin, window_tokens=window, grace_tokens=0)


@pytest.mark.parametrize(
    ("perplexities", "margin", "killed_at", "false", "saved"),
    [
        ((60.0, 50.0, 40.0, 35.0), 5.0, 2, False, 2),
        ((60.0, 46.0, 29.0, 24.0), 5.0, 2, True, 2),  # starts badly, ends best
        ((50.0, 40.0, 30.0, 24.5), 5.0, None, False, 0),
        ((60.0, 50.0, 40.0, 35.0), 100.0, None, False, 0),
    ],
)
def test_a_replay_tells_false_kills_and_tokens_saved(
    perplexities: tuple[float, ...], margin: float, killed_at: int | None, false: bool, saved: int
) -> None:
    run = list(zip((1, 2, 3, 4), perplexities, strict=True))
    result = replay(BASE, run, above(margin))
    assert (result.killed_at, result.false_kill, result.tokens_saved) == (killed_at, false, saved)
    assert (result.final_gap_ppl, result.budget) == (perplexities[-1] - 25.0, 4)


@pytest.mark.parametrize("cut", [[(1, 5.0)], []])
def test_a_replay_of_an_incomplete_curve_is_refused(cut: list[tuple[int, float]]) -> None:
    with pytest.raises(ValueError, match="complete curves"):
        replay([(1, 5.0), (2, 4.0)], cut, above(1.0))
