"""The kill rule over complete curves: what it would have done."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

from src.spec.kill_rule import Curve, KillRule, verdict


@dataclass(frozen=True, slots=True)
class ReplayedRun:
    """One complete run under a kill rule: where it would have died, and how it ended without."""

    name: str
    killed_at: int | None
    final_gap_ppl: float
    false_kill: bool
    tokens_saved: int


@dataclass(frozen=True, slots=True)
class Replay:
    """A kill rule's record over complete runs."""

    runs: tuple[ReplayedRun, ...]
    kills: int
    false_kills: int
    best_killed: bool
    tokens_saved: int
    tokens_total: int


def replay_kills(
    baseline: Curve, runs: Mapping[str, Curve], rule: KillRule, tolerance_ppl: float = 0.0
) -> Replay:
    """What a kill rule would have done to runs that were allowed to finish.

    A kill is false where the finished run's perplexity is at most the baseline's plus
    `tolerance_ppl`: it stopped a run that was no worse in the end. best_killed: the rule stopped
    the run that ends lowest of all, the baseline included. Curves must be complete, that is, end
    at the same token count.
    """
    ends = {name: curve[-1] for name, curve in {"the baseline": baseline, **runs}.items() if curve}
    if len(ends) != len(runs) + 1 or len({tokens for tokens, _ in ends.values()}) != 1:
        raise ValueError(
            "a replay needs complete curves that end at the same token count, found "
            + ", ".join(f"{name}: {tokens:,}" for name, (tokens, _) in ends.items())
            + f" for {len(runs)} runs and the baseline."
        )
    total, reference = ends["the baseline"]
    rows = []
    for name, curve in runs.items():
        at, gap = verdict(rule, baseline, curve).tokens, curve[-1][1] - reference
        false = at is not None and gap <= tolerance_ppl
        rows.append(ReplayedRun(name, at, gap, false, 0 if at is None else total - at))
    best = min(rows, key=lambda row: row.final_gap_ppl, default=None)
    return Replay(
        runs=tuple(rows),
        kills=sum(row.killed_at is not None for row in rows),
        false_kills=sum(row.false_kill for row in rows),
        best_killed=best is not None and best.final_gap_ppl < 0 and best.killed_at is not None,
        tokens_saved=sum(row.tokens_saved for row in rows),
        tokens_total=total * len(rows),
    )


def kill_grid(
    studies: Sequence[tuple[Curve, Mapping[str, Curve]]],
    graces: Sequence[float],
    margins: Sequence[float],
    window: float,
) -> list[dict[str, float]]:
    """False kills and tokens saved for every grace and margin (PPL).

    studies: (the baseline's complete curve, the runs' by name), one a seed. graces, window: shares
    of the budget. Of each rule: runs, kills; innocent, the runs that end no worse than the
    baseline, false_kills of them with the exact (Clopper-Pearson) interval of that rate;
    best_killed, in how many studies it stopped the run that ends lowest of all; saved, the share of
    the runs' tokens not spent. Raises ValueError as `replay_kills` does.
    """
    grid = []
    for grace, margin in itertools.product(graces, margins):
        found = []
        for baseline, runs in studies:
            budget = baseline[-1][0]
            rule = KillRule(
                margin_ppl=margin,
                window_tokens=int(window * budget),
                grace_tokens=int(grace * budget),
            )
            found.append(replay_kills(baseline, runs, rule))
        rows = [row for replay in found for row in replay.runs]
        innocent = sum(row.final_gap_ppl <= 0 for row in rows)
        false = sum(row.false_kill for row in rows)
        low, high = stats.binomtest(false, innocent).proportion_ci() if innocent else (0.0, 1.0)
        total = sum(replay.tokens_total for replay in found)
        grid.append(
            {
                "grace": grace,
                "margin": margin,
                "runs": len(rows),
                "kills": sum(replay.kills for replay in found),
                "innocent": innocent,
                "false_kills": false,
                "false_rate_low": float(low),
                "false_rate_high": float(high),
                "best_killed": sum(replay.best_killed for replay in found),
                "saved": sum(replay.tokens_saved for replay in found) / total if total else 0.0,
            }
        )
    return grid
