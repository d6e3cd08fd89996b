"""The kill rule: is a run so much worse than the baseline, for so long, that it should stop?

Pure functions over dev-perplexity curves; training asks after each check, the decisions replay it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from src.spec.strict_yaml import key, one_of
from src.spec.training_config import TrainingConfig


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

Gaps = Sequence[tuple[int, float | None]]
Kind = Literal["kill", "keep", "none"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rule says of a run, with grace (`kind`, `tokens`) and read literally, without.

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


def verdict(rule: KillRule, baseline: Curve, run: Curve) -> Verdict:
    """Apply the rule to a run, given the baseline's curve up to at least the same point.

    rule: with its grace as a number (`KillRule.in_run`).
    Perplexities are compared only at equal token counts: runs of one sweep share their batch size
    and check interval. A check that only one of the two has breaks a streak, because the rule says
    "at every check". A check before any training (0 tokens) is skipped: it compares two random
    initialisations. The first streak that reaches the window kills; a later recovery does not undo
    it, because a live run would not have reached it.

    Returns "none" while the run's newest check has no counterpart in the baseline, unless an
    earlier stretch already decided. Raises ValueError for a curve that is out of order, counts
    negative tokens or holds NaN.
    """
    _check_curve("baseline", baseline)
    _check_curve("run", run)
    grace = rule.grace_tokens
    assert grace is not None, "a rule without its run's grace: use KillRule.in_run"
    gaps = _gaps(baseline, run)
    undecided: Kind = "keep" if gaps and gaps[-1][1] is not None else "none"
    streak, literal = _first_streak(rule, gaps, grace), _first_streak(rule, gaps, 0)
    if streak:
        reason = _killed(rule, streak)
    elif undecided == "keep":
        reason = _kept(rule, gaps)
    else:
        where = f"at {run[-1][0]:,} tokens" if run else "yet"
        reason = f"the baseline has no dev check to compare with {where}."
    if literal and literal != streak:
        reason += f" Without grace ({grace:,} tokens) the rule kills at {literal[-1][0]:,} tokens."
    return Verdict(
        kind="kill" if streak else undecided,
        reason=reason,
        tokens=streak[-1][0] if streak else None,
        literal_kind="kill" if literal else undecided,
        literal_tokens=literal[-1][0] if literal else None,
    )


def row(result: Verdict, baseline: Curve, tokens: int) -> dict[str, Any]:
    """One check at `tokens` for the log, and the part of the baseline's curve that was there."""
    return {
        "verdict": result.kind,
        "verdict_literal": result.literal_kind,
        "baseline_check": any(seen == tokens for seen, _ in baseline),
        "baseline_checks": len(baseline),
        "baseline_tokens": baseline[-1][0] if baseline else None,
    }


def comparable(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Of two runs' config.yaml: same size, schedule, batches, dev windows and data, so that equal
    tokens mean equal conditions."""
    keys = ("tokens", "batch_size", "seq_len", "eval_every_tokens", "dev_tokens")
    same = all(ours["training"][key] == theirs["training"][key] for key in keys)
    sizes = [(config.get("asked") or {}).get("total_params_asked") for config in (ours, theirs)]
    return same and sizes[0] == sizes[1] and bool(ours["data_sha256"] == theirs["data_sha256"])


def can_ever_fire(rule: KillRule, total_tokens: int, eval_every_tokens: int) -> bool:
    """Whether a run of this length, checked this often, can be killed at all.

    Checks happen after every `eval_every_tokens` and at the end; both counts are training tokens.
    A configuration that states a rule for which this is False is refused.
    """
    assert total_tokens > 0 and eval_every_tokens > 0
    grace = rule.grace(total_tokens)
    first = min(math.ceil(max(grace, 1) / eval_every_tokens) * eval_every_tokens, total_tokens)
    return first >= grace and total_tokens - first >= rule.window_tokens


def check_fits(rule: KillRule | None, training: TrainingConfig, file: str, stated: bool) -> None:
    """Refuse (ValueError, naming `file`) a rule that a run's checks and budget leave no meaning.

    stated: by the user; a default rule that cannot fire in a short run is left alone.
    """
    if rule is None:
        return
    every = training.eval_every_steps * training.step_tokens
    if rule.window_tokens < every:
        raise ValueError(
            f"{file}: kill_rule.window_tokens: found {rule.window_tokens:,} with dev "
            f"evaluations every {every:,} tokens, expected at least that: a shorter window would "
            "kill at two checks in a row, however far apart; lower training.eval_every_tokens"
        )
    in_run = rule.in_run(training.tokens)
    if stated and not can_ever_fire(in_run, training.total_tokens, every):
        raise ValueError(
            f"{file}: kill_rule: found a rule that can never fire in {training.tokens:,} tokens "
            f"with dev evaluations every {every:,}; expected window_tokens and grace_tokens that "
            "fit, or no kill_rule"
        )


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


def _gaps(baseline: Curve, run: Curve) -> Gaps:
    """Run minus baseline at every check of either up to the run's last; None where one has none."""
    ours, theirs = ({t: ppl for t, ppl in curve if t > 0} for curve in (run, baseline))
    checks = sorted({*ours, *(t for t in theirs if t <= max(ours, default=0))})
    return [(t, ours[t] - theirs[t] if t in ours and t in theirs else None) for t in checks]


def _first_streak(rule: KillRule, gaps: Gaps, grace: int) -> list[tuple[int, float]]:
    """The checks of the first streak of gaps >= margin that spans the window, up to the one that
    reaches it; none without one. inf - inf counts as not worse."""
    streak: list[tuple[int, float]] = []
    for tokens, gap in gaps:
        if gap is None or tokens < grace or not gap >= rule.margin_ppl:
            streak = []
            continue
        streak.append((tokens, gap))
        if tokens - streak[0][0] >= rule.window_tokens:
            return streak
    return []


def _killed(rule: KillRule, streak: Sequence[tuple[int, float]]) -> str:
    first, last = streak[0][0], streak[-1][0]
    return (
        f"dev perplexity was at least {min(gap for _, gap in streak):.3f} above the baseline "
        f"(limit {rule.margin_ppl:g}) at every check from {first:,} to {last:,} tokens, "
        f"{last - first:,} of them (limit {rule.window_tokens:,})."
    )


def _kept(rule: KillRule, gaps: Gaps) -> str:
    tokens, gap = gaps[-1]
    holes = sum(difference is None for _, difference in gaps)
    note = f", and a streak ends at a hole ({holes} checks are in one curve only)" if holes else ""
    return (
        f"at {tokens:,} tokens dev perplexity is {gap:+.3f} against the baseline; no streak of "
        f">= {rule.margin_ppl:g} has lasted {rule.window_tokens:,} tokens{note}."
    )
