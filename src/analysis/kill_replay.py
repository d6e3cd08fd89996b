"""The kill rule over complete curves: what it would have done, and where it differed live."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from src.spec.kill_rule import Curve, KillRule, Kind, verdict


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


@dataclass(frozen=True, slots=True)
class Live:
    """What the rule said while a run trained: its last verdict, and where it killed."""

    kind: Kind
    tokens: int | None
    curve: Curve


@dataclass(frozen=True, slots=True)
class Difference:
    """A run that the rule judges otherwise over complete curves than it did live."""

    name: str
    live: Kind
    live_tokens: int | None
    replayed: Kind
    replayed_tokens: int | None
    reason: str


def live_differences(
    baseline: Curve, runs: Mapping[str, Live], rule: KillRule
) -> tuple[Difference, ...]:
    """Where the live verdict is not that of the baseline's complete curve.

    Live, the rule waits for nothing: a run that starts before its baseline, or beside it, is asked
    at checks whose counterpart does not exist yet. `baseline` is the whole curve, each run's own
    ends where the run ended, killed or not.
    """
    found = []
    for name, live in runs.items():
        replayed = verdict(rule, baseline, live.curve)
        if (live.kind, live.tokens) != (replayed.kind, replayed.tokens):
            found.append(
                Difference(
                    name, live.kind, live.tokens, replayed.kind, replayed.tokens, replayed.reason
                )
            )
    return tuple(found)
