"""Rules for promotion and for the winner: pure functions over numbers.

Losses are nats per token, so differences are logs of perplexity ratios; lower is better.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

from src.analysis.repeats import Noise, mean_sd

IMPROVEMENT = 0.05  # PRD section 8: how far below the baseline's a winner's perplexity is at least
# Above the baseline's latency and memory the second reading allows this much for timer noise; set
# before any measurement.
COST_MARGIN = 0.03

# --- promotion ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Promotion:
    """Who goes on to the next phase. `threshold`: of a thin margin, in the losses' own unit."""

    promoted: tuple[str, ...]
    ranking: tuple[tuple[str, float], ...]
    threshold: float | None
    reason: str


def by_chance(noise: Noise, n_1: int, n_2: int) -> float:
    """The difference of two means of so many runs that two equal configurations exceed one time in
    twenty: t * sd * sqrt(1/n_1 + 1/n_2), t the two-sided 95 % quantile of Student's t at the
    noise's degrees of freedom."""
    t = float(stats.t.ppf(0.975, noise.df))
    return t * noise.sd * math.sqrt(1 / n_1 + 1 / n_2)


def promote(losses: Mapping[str, Sequence[float]], noise: Noise | None) -> Promotion:
    """Promote the lowest mean dev loss, and the runner-up when the margin is thin.

    Thin means that the gap of the two means is less than `by_chance`. Without a measured noise no
    margin can be called safe, so two are promoted (PRD section 12: top 2 if margins are thin).

    losses: dev losses by configuration, one value per seed (nats per token, or nats per byte where
        the tokenizers differ); one without a value was stopped and is ranked nowhere.
    Raises ValueError when none is left.
    """
    alive = {name: mean_sd(values) for name, values in losses.items() if len(values)}
    if not alive:
        raise ValueError(
            f"no configuration is left to promote: {len(losses)} given, all of them killed. Loosen "
            f"the kill rule or rerun the sweep."
        )
    ranking = tuple(sorted(((n, s.mean) for n, s in alive.items()), key=lambda item: item[1]))
    best = ranking[0][0]
    if len(ranking) == 1:
        return Promotion((best,), ranking, None, f"{best} is the only configuration left.")
    second, gap = ranking[1][0], ranking[1][1] - ranking[0][1]
    leads = f"{best} leads {second} by {gap:.4f}"
    if noise is None:
        reason = f"{leads}, but seed noise was not measured: two go on."
        return Promotion((best, second), ranking, None, reason)
    n = alive[best].n, alive[second].n
    threshold = by_chance(noise, *n)
    rule = f"{threshold:.4f} = t(0.95, {noise.df} df) x sd {noise.sd:.4f} x "
    rule += f"sqrt(1/{n[0]} + 1/{n[1]})"
    if gap < threshold:
        reason = f"{leads}, less than {rule}: two go on."
        return Promotion((best, second), ranking, threshold, reason)
    return Promotion((best,), ranking, threshold, f"{leads}, at least {rule}: one goes on.")


# --- the winner ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One configuration's numbers for the winner rule; None where something was not measured.

    log_perplexities: ln test PPL by seed (nats per token). latency_ms_*: median prefill latency
    at batch 1. peak_memory_mib: peak memory of the same measurement.
    """

    name: str
    log_perplexities: tuple[float, ...]
    latency_ms_l128: float | None
    latency_ms_l512: float | None
    peak_memory_mib: float | None

    @property
    def latency_ms(self) -> float | None:
        """Geometric mean of the medians at L = 128 and 512, the speed that breaks ties."""
        if self.latency_ms_l128 is None or self.latency_ms_l512 is None:
            return None
        return math.sqrt(self.latency_ms_l128 * self.latency_ms_l512)


@dataclass(frozen=True, slots=True)
class CandidateVerdict:
    """One candidate against the baseline; the reasons list every bar, passed or failed."""

    name: str
    perplexity_ratio: float
    qualifies_strict: bool
    qualifies_margin: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WinnerDecision:
    """The winner under the PRD's literal rule, and with the margin on speed and memory.

    None is a result. The two readings can name two models, so `readings` always states both.
    """

    winner_strict: str | None
    winner_margin: str | None
    readings: str
    candidates: tuple[CandidateVerdict, ...]
    reason: str


def winner(
    baseline: Measured,
    candidates: Sequence[Measured],
    *,
    ties: Collection[frozenset[str]] = (),
    least_seeds: int = 2,
) -> WinnerDecision:
    """PRD section 8: PPL at least 5 % below the baseline's, latency and memory not worse.

    PPL is the geometric mean over seeds (the exponential of the mean loss), so that the rule is
    mean loss difference <= ln 0.95. Strict: latency at L = 128, at L = 512 and memory each at or
    below the baseline's. Margin: each at most 3 % above. What was not measured cannot qualify, and
    neither can what rests on fewer than `least_seeds` seeds on either side: 5 % is a few times what
    reseeding one run does.
    Among those that qualify the lowest PPL wins, but "if two configs tie on PPL, pick the faster"
    (PRD section 8): `ties` holds pairs {a, b} that were not told apart (`Equivalence.told_apart`),
    and of the best and those tied with it the fastest wins. A tie by proof, an interval inside
    +-1 %, would hardly ever be declared at the noise of three seeds (docs/SCIENCE.md).
    """
    verdicts = [_judge(baseline, candidate, least_seeds) for candidate in candidates]
    by_name = {c.name: c for c in candidates}
    if len(by_name) != len(candidates) or baseline.name in by_name:
        raise ValueError("candidates must have distinct names, and none the baseline's.")
    strict, strict_why = _best([by_name[v.name] for v in verdicts if v.qualifies_strict], ties)
    margin, margin_why = _best([by_name[v.name] for v in verdicts if v.qualifies_margin], ties)
    readings = (
        f"strict: {strict or 'no winner'}; with the {100 * COST_MARGIN:g} % margin: "
        f"{margin or 'no winner'}"
    )
    reason = f"{len(candidates)} candidates against {baseline.name}"
    for why in dict.fromkeys((strict_why, margin_why)):
        reason += f"; {why}" if why else ""
    return WinnerDecision(strict, margin, readings, tuple(verdicts), f"{reason}.")


def _judge(baseline: Measured, candidate: Measured, least_seeds: int) -> CandidateVerdict:
    gap = mean_sd(candidate.log_perplexities).mean - mean_sd(baseline.log_perplexities).mean
    qualifies = gap <= math.log1p(-IMPROVEMENT) + 1e-12  # a ratio of exactly 0.95 passes
    word = "at least" if qualifies else "not"
    reasons = [f"perplexity {math.expm1(gap):+.2%} ({word} {IMPROVEMENT:.0%} below the baseline)"]
    seeds = min(len(candidate.log_perplexities), len(baseline.log_perplexities))
    if seeds < least_seeds:
        qualifies = False
        reasons[0] += f", no verdict: {seeds} seed of {least_seeds} at least"
    strict, lenient = qualifies, qualifies
    for label, field in (
        ("latency at L=128", "latency_ms_l128"),
        ("latency at L=512", "latency_ms_l512"),
        ("peak memory", "peak_memory_mib"),
    ):
        ours, reference = getattr(candidate, field), getattr(baseline, field)
        if ours is None or reference is None:
            strict = lenient = False
            reasons.append(f"{label} was not measured on both")
            continue
        strict = strict and ours <= reference
        lenient = lenient and ours <= reference * (1 + COST_MARGIN)
        verdict = "not above" if ours <= reference else "above"
        reasons.append(f"{label} {ours / reference - 1:+.2%} ({verdict} the baseline)")
    return CandidateVerdict(candidate.name, math.exp(gap), strict, lenient, tuple(reasons))


def _best(
    qualified: Sequence[Measured], ties: Collection[frozenset[str]]
) -> tuple[str | None, str | None]:
    """Who wins among those that qualify, and the sentence on the tie where it decided."""
    if not qualified:
        return None, None
    best = min(qualified, key=lambda c: mean_sd(c.log_perplexities).mean)
    tied = [c for c in qualified if frozenset((c.name, best.name)) in ties]
    if not tied:
        return best.name, None
    chosen, names = faster([best, *tied]), ", ".join(c.name for c in (best, *tied))
    return chosen, f"{names} qualify and are not told apart: {chosen} is the fastest"


def faster(configurations: Sequence[Measured]) -> str:
    """Name of the configuration with the lowest `latency_ms`; the first one where none is known."""
    return min(configurations, key=lambda c: c.latency_ms or math.inf).name
