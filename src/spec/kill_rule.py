"""The kill rule: is a run so much worse than the baseline, for so long, that it should stop?

Pure functions over dev-perplexity curves; training asks after each check, the decisions replay it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from src.spec.strict_yaml import key, one_of


@dataclass(frozen=True, kw_only=True, slots=True)
class KillRule:
    """PRD section 4: stop when dev PPL is >= 0.5 worse than the baseline for 1M consecutive tokens.

    margin_ppl: perplexity points above the baseline's perplexity that count as worse.
    window_tokens: training tokens from the first to the last bad check of an unbroken streak.
    grace_tokens: checks before this many training tokens start no streak. Repeats of one 124M
        configuration differ by 0.5 PPL in the bad direction at a third of the checks in the first
        8 % of training and at under 5 % of them after 30 %, so null means 30 % of the run's
        budget; 0 is the PRD's own rule.
    action: stop ends a run at its verdict; record writes the verdict and lets the run go on, so
        that what the rule saves and costs can be counted.
    """

    action: str = one_of("stop", "stop", "record")
    margin_ppl: float = key(0.5, "a perplexity difference above 0", lambda v: v > 0)
    window_tokens: int = key(1_000_000, "tokens above 0", lambda v: v > 0)
    grace_tokens: int | None = key(None, "tokens of at least 0, or null", lambda v: v >= 0)

    def grace(self, budget: int) -> int:
        """Tokens of grace in a run of `budget` tokens."""
        return int(0.3 * budget) if self.grace_tokens is None else self.grace_tokens

    def in_run(self, budget: int) -> KillRule:
        """The rule for a run of `budget` tokens, its grace a number."""
        return replace(self, grace_tokens=self.grace(budget))


Curve = Sequence[tuple[int, float]]
"""Dev checks of one run in training order: (training tokens seen, dev perplexity)."""

Kind = Literal["kill", "keep", "none"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rule says of a run, with grace (`kind`, `tokens`) and to the PRD's letter.

    kind: "kill", "keep", or "none" (the baseline has no check at this point yet).
    tokens: training tokens at which the rule fired, None unless kind is "kill".
    literal_kind, literal_tokens: the same with grace_tokens = 0.
    reason: one sentence with the numbers; it names both verdicts where they differ.
    """

    kind: Kind
    reason: str
    tokens: int | None
    literal_kind: Kind
    literal_tokens: int | None


@dataclass(frozen=True, slots=True)
class _Streak:
    """An unbroken run of bad checks: its ends in tokens, and the smallest gap in perplexity."""

    first: int
    last: int
    smallest_gap: float


def verdict(rule: KillRule, baseline: Curve, run: Curve) -> Verdict:
    """Apply the rule to a run, given the baseline's curve up to at least the same point.

    rule: with its grace as a number (`KillRule.in_run`).
    Perplexities are compared only where both runs were checked at exactly the same token count:
    runs of one sweep share their batch size and check interval, so interpolating would invent
    numbers where none are needed. A check that only one of the two has breaks a streak: of a hole
    nobody knows that the run was worse there, and the rule says "at every check". A check before
    any training (0 tokens) is skipped: it compares two random initialisations. The first streak
    that reaches the window kills; a later recovery does not undo it, because a live run would not
    have reached that recovery.

    Returns "none" while the run's newest check has no counterpart in the baseline, unless an
    earlier stretch already decided. Raises ValueError for a curve that is out of order, counts
    negative tokens or holds NaN.
    """
    _check_curve("baseline", baseline)
    _check_curve("run", run)
    assert rule.grace_tokens is not None, "a rule without its run's grace: use KillRule.in_run"
    gaps = _gaps(baseline, run)
    covered = bool(gaps) and gaps[-1][1] is not None
    streak = _first_streak(gaps, rule.margin_ppl, rule.window_tokens, rule.grace_tokens)
    literal = _first_streak(gaps, rule.margin_ppl, rule.window_tokens, 0)
    kind = _kind(streak, covered)
    literal_kind = _kind(literal, covered)
    reason = _reason(rule, kind, streak, gaps, run)
    if literal is not None and literal != streak:
        reason += (
            f" Without grace ({rule.grace_tokens:,} tokens) the rule kills at "
            f"{literal.last:,} tokens."
        )
    return Verdict(
        kind=kind,
        reason=reason,
        tokens=None if streak is None else streak.last,
        literal_kind=literal_kind,
        literal_tokens=None if literal is None else literal.last,
    )


def row(found: Verdict, baseline: Curve, tokens: int) -> dict[str, Any]:
    """One check at `tokens` for the log, and the part of the baseline's curve that was there."""
    return {
        "verdict": found.kind,
        "verdict_literal": found.literal_kind,
        "baseline_check": any(seen == tokens for seen, _ in baseline),
        "baseline_checks": len(baseline),
        "baseline_tokens": baseline[-1][0] if baseline else None,
    }


def comparable(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Of two runs' config.yaml: same schedule, batches, dev windows and data, so that equal tokens
    mean equal conditions."""
    keys = ("tokens", "batch_size", "seq_len", "eval_every_tokens", "dev_tokens")
    same = all(ours["training"][key] == theirs["training"][key] for key in keys)
    return same and bool(ours["data_sha256"] == theirs["data_sha256"])


def can_ever_fire(rule: KillRule, total_tokens: int, eval_every_tokens: int) -> bool:
    """Whether a run of this length, checked this often, can be killed at all.

    Checks happen after every `eval_every_tokens` and at the end; both counts are training tokens.
    A configuration that states a rule for which this is False is refused.
    """
    if total_tokens <= 0 or eval_every_tokens <= 0:
        raise ValueError(
            f"total_tokens is {total_tokens} and eval_every_tokens is {eval_every_tokens}; "
            f"expected both > 0."
        )
    grace = rule.grace(total_tokens)
    first = -(-max(grace, 1) // eval_every_tokens) * eval_every_tokens
    if first > total_tokens:
        first = total_tokens
    return first >= grace and total_tokens - first >= rule.window_tokens


def _check_curve(name: str, curve: Curve) -> None:
    previous = -1
    for tokens, perplexity in curve:
        if tokens <= previous or math.isnan(perplexity):
            raise ValueError(
                f"the {name} curve holds ({tokens}, {perplexity}) after {previous} tokens; expected"
                f" rising token counts >= 0 and perplexities that are numbers. Was it read while "
                f"a resumed run rewrote it?"
            )
        previous = tokens


def _gaps(baseline: Curve, run: Curve) -> list[tuple[int, float | None]]:
    """Run minus baseline at every check of either up to the run's last; None where one has none."""
    ours, theirs = ({t: ppl for t, ppl in curve if t > 0} for curve in (run, baseline))
    checks = sorted({*ours, *(t for t in theirs if t <= max(ours, default=0))})
    return [(t, ours[t] - theirs[t] if t in ours and t in theirs else None) for t in checks]


def _first_streak(
    gaps: Sequence[tuple[int, float | None]], margin: float, window: int, grace: int
) -> _Streak | None:
    """The first streak of gaps >= margin that spans the window; inf - inf counts as not worse."""
    streak: _Streak | None = None
    for tokens, gap in gaps:
        if gap is None or tokens < grace or not gap >= margin:
            streak = None
            continue
        first = tokens if streak is None else streak.first
        smallest = gap if streak is None else min(gap, streak.smallest_gap)
        streak = _Streak(first, tokens, smallest)
        if streak.last - streak.first >= window:
            return streak
    return None


def _kind(streak: _Streak | None, covered: bool) -> Kind:
    if streak is not None:
        return "kill"
    return "keep" if covered else "none"


def _reason(
    rule: KillRule,
    kind: Kind,
    streak: _Streak | None,
    gaps: Sequence[tuple[int, float | None]],
    run: Curve,
) -> str:
    if streak is not None:
        return (
            f"dev perplexity was at least {streak.smallest_gap:.3f} above the baseline "
            f"(limit {rule.margin_ppl:g}) at every check from {streak.first:,} to "
            f"{streak.last:,} tokens, {streak.last - streak.first:,} of them "
            f"(limit {rule.window_tokens:,})."
        )
    if kind == "keep":
        tokens, gap = gaps[-1]
        holes = [at for at, found in gaps if found is None]
        told = f", and a streak ends at a hole ({len(holes)} checks are in one curve only)"
        return (
            f"at {tokens:,} tokens dev perplexity is {gap:+.3f} against the baseline; no streak of "
            f">= {rule.margin_ppl:g} has lasted {rule.window_tokens:,} tokens"
            f"{told if holes else ''}."
        )
    where = f"at {run[-1][0]:,} tokens" if run else "yet"
    return f"the baseline has no dev check to compare with {where}."
