"""Who is promoted, who wins and how sure we are: pure functions over numbers, signed by tests.

Losses are nats (per token or per document), so differences are logs of perplexity ratios:
ln(PPL_a / PPL_b) = loss_a - loss_b, and a PPL 5 % lower is a difference of ln 0.95 = -0.0513.
Lower is better everywhere. Shapes: S seeds, D documents, B bootstrap draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]


# --- means over seeds ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Summary:
    """Mean and sample standard deviation (n - 1); sd is None for a single value, never 0.0."""

    n: int
    mean: float
    sd: float | None


def mean_sd(values: Sequence[float]) -> Summary:
    """Summarise one cell's seeds. Raises ValueError without values or with a non-finite one."""
    _need_finite("values", values)
    data = np.asarray(values, dtype=np.float64)
    sd = float(data.std(ddof=1)) if data.size > 1 else None
    return Summary(n=int(data.size), mean=float(data.mean()), sd=sd)


@dataclass(frozen=True, slots=True)
class Noise:
    """Seed-to-seed standard deviation of a loss, and the degrees of freedom behind it."""

    sd: float
    df: int


def pooled_noise(cells: Mapping[str, Sequence[float]]) -> Noise | None:
    """Noise shared by cells, sd^2 = sum (n_i - 1) s_i^2 / sum (n_i - 1); None without repeats."""
    repeated = [mean_sd(values) for values in cells.values() if len(values) > 1]
    if not repeated:
        return None
    df = sum(s.n - 1 for s in repeated)
    variance = sum((s.n - 1) * s.sd**2 for s in repeated if s.sd is not None) / df
    return Noise(sd=math.sqrt(variance), df=df)


# --- promotion ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Promotion:
    """Which cells go on to the next phase. `threshold` and `gap` are in the losses' own unit."""

    promoted: tuple[str, ...]
    ranking: tuple[tuple[str, float], ...]
    gap: float | None
    threshold: float | None
    reason: str


def promote(
    losses: Mapping[str, Sequence[float]],
    noise: Noise | None,
    killed: Collection[str] = (),
    confidence: float = 0.95,
) -> Promotion:
    """Promote the cell with the lowest mean dev loss, and the runner-up when the margin is thin.

    Thin means that the gap of the two means is below t * sd * sqrt(1/n_1 + 1/n_2), with t the
    two-sided quantile of Student's t at `confidence` and the noise's degrees of freedom: a gap
    that two equal cells would show more than one time in twenty. Without a measured noise no
    margin can be called safe, so two are promoted (PRD section 12: top 2 if margins are thin).

    losses: dev losses by cell, one value per seed (nats per token, or nats per byte where the
        cells' tokenizers differ). killed: cells the kill rule stopped; ranked nowhere.
    Raises ValueError when no cell is left.
    """
    alive = {name: mean_sd(values) for name, values in losses.items() if name not in killed}
    if not alive:
        raise ValueError(
            f"no cell is left to promote: {len(losses)} given, all of them killed. Loosen the kill "
            f"rule or rerun the sweep."
        )
    ranking = tuple(sorted(((n, s.mean) for n, s in alive.items()), key=lambda item: item[1]))
    best = ranking[0][0]
    if len(ranking) == 1:
        return Promotion((best,), ranking, None, None, f"{best} is the only cell left.")
    second = ranking[1][0]
    gap = ranking[1][1] - ranking[0][1]
    if noise is None:
        reason = f"{best} leads {second} by {gap:.4f}, but seed noise was not measured: two go on."
        return Promotion((best, second), ranking, gap, None, reason)
    t = float(stats.t.ppf(0.5 + confidence / 2, noise.df))
    threshold = t * noise.sd * math.sqrt(1 / alive[best].n + 1 / alive[second].n)
    rule = (
        f"{threshold:.4f} = t({confidence:g}, {noise.df} df) {t:.2f} x sd {noise.sd:.4f} x "
        f"sqrt(1/{alive[best].n} + 1/{alive[second].n})"
    )
    if gap < threshold:
        reason = f"{best} leads {second} by {gap:.4f}, less than {rule}: two go on."
        return Promotion((best, second), ranking, gap, threshold, reason)
    reason = f"{best} leads {second} by {gap:.4f}, at least {rule}: one goes on."
    return Promotion((best,), ranking, gap, threshold, reason)


# --- intervals ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate of ln(a / b) with a confidence interval; p is two-sided, for "no difference"."""

    estimate: float
    low: float
    high: float
    level: float
    p: float
    seeds: int
    documents: int

    @property
    def ratio(self) -> tuple[float, float, float]:
        """(low, estimate, high) of a / b itself."""
        return math.exp(self.low), math.exp(self.estimate), math.exp(self.high)


def paired_bootstrap(
    nats_a: ArrayLike,
    nats_b: ArrayLike,
    weights: ArrayLike,
    *,
    measure: Literal["perplexity", "bits_per_byte"] = "perplexity",
    paired_seeds: bool = True,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Interval of ln(PPL_a / PPL_b) or ln(BPB_a / BPB_b), resampling documents and seeds.

    nats_a (S_a, D), nats_b (S_b, D): summed loss of each document under each seed's model.
    weights (D): tokens of each document for "perplexity" (both models must then share the
        tokenizer), UTF-8 bytes for "bits_per_byte".
    paired_seeds: row s of both used the same seeds (data order, initialisation), so S_a = S_b.

    With w the resampled documents, the statistic of seed s is
        perplexity:     sum_d w_d (a_sd - b_sd) / sum_d w_d tokens_d
        bits per byte:  ln(sum_d w_d a_sd) - ln(sum_d w_d b_sd)      (the bytes cancel)
    averaged over seeds. Documents are drawn with replacement and the percentiles of the draws
    make the interval (Efron and Tibshirani 1993, ch. 8 and 13; the pairing is Koehn 2004).
    Percentiles of two or three resampled seeds would cover far below their nominal level (the
    spread of n resampled values is (n - 1)/n of the true one, from n - 1 degrees of freedom), so
    the seed level is resampled from its t distribution instead: each draw adds sd / sqrt(S) times
    a Student t variate with S - 1 degrees of freedom (unpaired seeds: Welch's standard error and
    degrees of freedom). With a single seed the interval is about documents only, and says nothing
    about reseeding.

    Raises ValueError for shapes that do not fit or numbers that are not finite.
    """
    a, b, w = _document_losses(nats_a, nats_b, weights, paired_seeds)
    rng = np.random.default_rng(seed)
    everything = np.ones((1, w.size))
    estimate = float(_contrast(everything, a, b, w, measure)[0])
    samples = np.empty(draws)
    chunk = max(1, 4_000_000 // w.size)  # bounds the count matrix to 32 MB
    for start in range(0, draws, chunk):
        rows = min(chunk, draws - start)
        uniform = np.full(w.size, 1 / w.size)
        counts = rng.multinomial(w.size, uniform, size=rows).astype(np.float64)
        samples[start : start + rows] = _contrast(counts, a, b, w, measure)
    if w.size == 1:
        samples[:] = estimate
    samples += _seed_noise(a, b, w, measure, paired_seeds, rng, draws)
    low, high = np.quantile(samples, [0.5 - level / 2, 0.5 + level / 2])
    below, above = int((samples <= 0).sum()), int((samples >= 0).sum())
    return Interval(
        estimate=estimate,
        low=float(low),
        high=float(high),
        level=level,
        p=min(1.0, 2 * (min(below, above) + 1) / (draws + 1)),
        seeds=min(a.shape[0], b.shape[0]),
        documents=int(w.size),
    )


def _document_losses(
    nats_a: ArrayLike, nats_b: ArrayLike, weights: ArrayLike, paired_seeds: bool
) -> tuple[Floats, Floats, Floats]:
    a, b = (np.atleast_2d(np.asarray(x, dtype=np.float64)) for x in (nats_a, nats_b))
    w = np.asarray(weights, dtype=np.float64)
    if w.ndim != 1 or w.size == 0 or a.shape[1:] != w.shape or b.shape[1:] != w.shape:
        raise ValueError(
            f"document losses have shapes {a.shape} and {b.shape} for {w.size} documents; expected "
            f"(seeds, documents) twice, over the same documents in the same order."
        )
    if paired_seeds and a.shape[0] != b.shape[0]:
        raise ValueError(
            f"paired seeds need as many seeds on both sides, found {a.shape[0]} and {b.shape[0]}; "
            f"keep the common seeds or pass paired_seeds=False."
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all() and (w > 0).all()):
        raise ValueError("document losses must be finite and their weights positive.")
    return a, b, w


def _per_seed(counts: Floats, nats: Floats, w: Floats, measure: str) -> Floats:
    """(B, D) document counts, (S, D) nats -> (B, S): nats per token, or ln of nats."""
    total = counts @ nats.T  # (B, S)
    if measure == "bits_per_byte":
        return np.log(total)
    return np.asarray(total / (counts @ w)[:, None])


def _contrast(counts: Floats, a: Floats, b: Floats, w: Floats, measure: str) -> Floats:
    """Mean over seeds of a minus mean over seeds of b, for each row of counts: (B,)."""
    means = [_per_seed(counts, nats, w, measure).mean(axis=1) for nats in (a, b)]
    return np.asarray(means[0] - means[1])


def _seed_noise(
    a: Floats,
    b: Floats,
    w: Floats,
    measure: str,
    paired: bool,
    rng: np.random.Generator,
    draws: int,
) -> Floats:
    """(B,) deviations that reseeding adds: t sd / sqrt(S) of the pairs, or Welch's for two arms."""
    everything = np.ones((1, w.size))
    rows = [_per_seed(everything, nats, w, measure)[0] for nats in (a, b)]
    arms = [rows[0] - rows[1]] if paired else rows
    squares = [values.var(ddof=1) / values.size for values in arms if values.size > 1]
    total = sum(squares)
    if total == 0:
        return np.zeros(draws)
    dfs = [values.size - 1 for values in arms if values.size > 1]
    df = total**2 / sum(square**2 / n for square, n in zip(squares, dfs, strict=True))
    return np.asarray(math.sqrt(total) * rng.standard_t(df, size=draws))


def seed_interval(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Interval:
    """Paired t interval of mean(a - b) over seeds, for losses without their documents.

    estimate +- t_{S-1} sd(a - b) / sqrt(S). A single pair has no interval: low and high are
    infinite and p is 1, which no equivalence or difference can follow from.
    """
    _need_finite("a", a)
    _need_finite("b", b)
    if len(a) != len(b):
        raise ValueError(f"a paired interval needs equal seeds, found {len(a)} and {len(b)}.")
    diff = mean_sd([x - y for x, y in zip(a, b, strict=True)])
    if diff.sd is None:
        return Interval(diff.mean, -math.inf, math.inf, level, 1.0, 1, 0)
    error = diff.sd / math.sqrt(diff.n)
    half = float(stats.t.ppf(0.5 + level / 2, diff.n - 1)) * error
    if error > 0:
        p = float(2 * stats.t.sf(abs(diff.mean) / error, diff.n - 1))
    else:
        p = 1.0 if diff.mean == 0 else 0.0
    return Interval(diff.mean, diff.mean - half, diff.mean + half, level, p, diff.n, 0)


# --- equivalence, ties, many comparisons --------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Equivalence:
    """What an interval says about a margin: "equivalent", "different" or "undecided"."""

    verdict: Literal["equivalent", "different", "undecided"]
    margin: float
    alpha: float
    statement: str


def equivalence(interval: Interval, margin: float = 0.01) -> Equivalence:
    """Two one-sided tests read off an interval of ln(a / b) (Schuirmann 1987).

    An interval at level 1 - 2 alpha that lies inside ln(1 - margin) .. ln(1 + margin) rejects
    both "lower by the margin or more" and "higher by the margin or more" at alpha each: a 95 %
    interval tests at 2.5 %, stricter than the usual 90 % interval's 5 %. Equivalence is asked
    first, because a difference can be real and still smaller than anyone cares about.
    """
    alpha = (1 - interval.level) / 2
    low, estimate, high = ((r - 1) * 100 for r in interval.ratio)
    numbers = f"{estimate:+.2f} % ({interval.level:.0%} interval {low:+.2f} to {high:+.2f} %)"
    inside = math.log1p(-margin) <= interval.low and interval.high <= math.log1p(margin)
    if inside:
        text = f"equivalent within +-{margin:.0%}: {numbers}, two one-sided tests at {alpha:.3f}."
        return Equivalence("equivalent", margin, alpha, text)
    if interval.low > 0 or interval.high < 0:
        text = f"different: {numbers} excludes zero."
        return Equivalence("different", margin, alpha, text)
    text = f"undecided: {numbers} neither excludes zero nor fits inside +-{margin:.0%}."
    return Equivalence("undecided", margin, alpha, text)


@dataclass(frozen=True, slots=True)
class HolmResult:
    """One hypothesis after Holm's step-down: adjusted p, and whether it is rejected at alpha."""

    p: float
    adjusted_p: float
    rejected: bool


def holm(p_values: Mapping[str, float], alpha: float = 0.05) -> dict[str, HolmResult]:
    """Holm (1979): family-wise error at most alpha over all cells, under any dependence.

    Sorted p_(1) <= ... <= p_(m), adjusted p_(i) = max_{j <= i} min(1, (m - j + 1) p_(j)).
    """
    for name, p in p_values.items():
        if not 0 <= p <= 1:
            raise ValueError(f"the p value of {name} is {p}; expected a number from 0 to 1.")
    order = sorted(p_values, key=lambda name: p_values[name])
    adjusted: dict[str, HolmResult] = {}
    running = 0.0
    for rank, name in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p_values[name]))
        adjusted[name] = HolmResult(p_values[name], running, running <= alpha)
    return {name: adjusted[name] for name in p_values}


def mcnemar(right_a: ArrayLike, right_b: ArrayLike) -> float:
    """Exact two-sided p that two models are equally often right on the same items (McNemar 1947).

    Only items on which they differ count: under the null the a-only wins are Binomial(n, 1/2).
    """
    a, b = np.asarray(right_a, dtype=bool), np.asarray(right_b, dtype=bool)
    if a.shape != b.shape:
        raise ValueError(f"McNemar needs the same items, found {a.shape} and {b.shape}.")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    if only_a + only_b == 0:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)


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
    """The winner under the PRD's letter, and with the speed and memory margin; None is a result."""

    winner_strict: str | None
    winner_margin: str | None
    candidates: tuple[CandidateVerdict, ...]
    reason: str


def winner(
    baseline: Measured,
    candidates: Sequence[Measured],
    *,
    improvement: float = 0.05,
    cost_margin: float = 0.03,
    ties: Collection[frozenset[str]] = (),
) -> WinnerDecision:
    """PRD section 8: PPL at least 5 % below the baseline's, latency and memory not worse.

    PPL is the geometric mean over seeds (the exponential of the mean loss), so that the rule is
    mean loss difference <= ln 0.95. Strict: latency at L = 128, at L = 512 and memory each at or
    below the baseline's. Margin: each at most 3 % above, the reading that allows for timer noise;
    the margin was set before any measurement. What was not measured cannot qualify.
    Among those that qualify the lowest PPL wins; `ties` holds pairs {a, b} found equivalent
    (`equivalence`), and the faster of those tied with the best wins instead.
    """
    verdicts = [_judge(baseline, c, improvement, cost_margin) for c in candidates]
    by_name = {c.name: c for c in candidates}
    if len(by_name) != len(candidates) or baseline.name in by_name:
        raise ValueError("candidates must have distinct names, and none the baseline's.")
    strict = _best([by_name[v.name] for v in verdicts if v.qualifies_strict], ties)
    margin = _best([by_name[v.name] for v in verdicts if v.qualifies_margin], ties)
    reason = (
        f"strict reading: {_name(strict)}; with a {cost_margin:.0%} margin on latency and memory: "
        f"{_name(margin)}; {len(candidates)} candidates against {baseline.name}."
    )
    return WinnerDecision(strict, margin, tuple(verdicts), reason)


def _name(name: str | None) -> str:
    return "no winner" if name is None else f"{name} wins"


def _judge(
    baseline: Measured, candidate: Measured, improvement: float, cost_margin: float
) -> CandidateVerdict:
    gap = mean_sd(candidate.log_perplexities).mean - mean_sd(baseline.log_perplexities).mean
    good = gap <= math.log1p(-improvement) + 1e-12  # a ratio of exactly 0.95 passes
    word = "at least" if good else "not"
    reasons = [f"perplexity {math.expm1(gap):+.2%} ({word} {improvement:.0%} below the baseline)"]
    strict, lenient = good, good
    for label, field in (
        ("latency at L=128", "latency_ms_l128"),
        ("latency at L=512", "latency_ms_l512"),
        ("peak memory", "peak_memory_mib"),
    ):
        ours, theirs = getattr(candidate, field), getattr(baseline, field)
        if ours is None or theirs is None:
            strict = lenient = False
            reasons.append(f"{label} was not measured on both")
            continue
        strict = strict and ours <= theirs
        lenient = lenient and ours <= theirs * (1 + cost_margin)
        verdict = "not above" if ours <= theirs else "above"
        reasons.append(f"{label} {ours / theirs - 1:+.2%} ({verdict} the baseline)")
    return CandidateVerdict(candidate.name, math.exp(gap), strict, lenient, tuple(reasons))


def _best(qualified: Sequence[Measured], ties: Collection[frozenset[str]]) -> str | None:
    if not qualified:
        return None
    best = min(qualified, key=lambda c: mean_sd(c.log_perplexities).mean)
    tied = [c for c in qualified if frozenset((c.name, best.name)) in ties]
    return faster([best, *tied])


def faster(configurations: Sequence[Measured]) -> str:
    """Name of the configuration with the lowest `latency_ms`; the first one where none is known."""
    known = [c for c in configurations if c.latency_ms is not None]
    if not known:
        return configurations[0].name
    return min(known, key=lambda c: c.latency_ms or math.inf).name


# --- is a short ranking worth anything? ----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RankAgreement:
    """Short runs against full runs over the same cells.

    spearman: rank correlation, None below 3 cells or where a side is constant.
    p: its exact one-sided permutation p up to 8 cells (agreement by luck), else None.
    top1_regret: ln PPL lost by finishing the short runs' best instead of the best (>= 0).
    """

    n: int
    spearman: float | None
    p: float | None
    top1_same: bool
    top1_regret: float


def rank_agreement(short: Mapping[str, float], full: Mapping[str, float]) -> RankAgreement:
    """Compare rankings by loss (nats, lower is better) of the cells that both phases hold."""
    names = [name for name in short if name in full]
    if not names:
        raise ValueError("no cell was run in both phases, so their rankings cannot be compared.")
    x, y = [short[n] for n in names], [full[n] for n in names]
    _need_finite("short losses", x)
    _need_finite("full losses", y)
    pick = min(names, key=lambda n: short[n])
    best = min(names, key=lambda n: full[n])
    rho = p = None
    if len(names) >= 3 and len(set(x)) > 1 and len(set(y)) > 1:
        rho = float(stats.spearmanr(x, y).statistic)
        if len(names) <= 8:
            p = _permutation_p(np.asarray(x), np.asarray(y))
    return RankAgreement(len(names), rho, p, full[pick] == full[best], full[pick] - full[best])


def _permutation_p(x: Floats, y: Floats) -> float:
    """Share of orderings of y that correlate with x at least as well: at most 8! = 40,320."""
    rx = stats.rankdata(x) - (x.size + 1) / 2
    ry = stats.rankdata(y) - (y.size + 1) / 2
    orders = np.array(list(permutations(range(x.size))))
    scores = ry[orders] @ rx
    return float((scores >= ry @ rx - 1e-9).mean())


def log_slope(curve: Sequence[tuple[int, float]], fraction: float = 0.5) -> float | None:
    """Slope d ln PPL / d ln tokens by least squares over the curve's last `fraction` of tokens.

    The "dev PPL slope" of the ranking runs: -0.1 means that doubling the tokens lowers perplexity
    by about 7 %. None with fewer than two checks there.
    """
    points = [(t, p) for t, p in curve if t > 0]
    if points:
        points = [(t, p) for t, p in points if t >= points[-1][0] * (1 - fraction)]
    if len(points) < 2:
        return None
    tokens, ppl = np.log(np.array(points, dtype=np.float64)).T
    return float(np.polyfit(tokens, ppl, 1)[0])


# --- the kill rule, replayed on complete curves --------------------------------------------------

Curve = Sequence[tuple[int, float]]


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
    baseline: Curve,
    runs: Mapping[str, Curve],
    kill_at: Callable[[Curve, Curve], int | None],
    tolerance_ppl: float = 0.0,
) -> Replay:
    """What a kill rule would have done to runs that were allowed to finish.

    kill_at(baseline, run) gives the training tokens at which the rule fires, or None.
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
        at, gap = kill_at(baseline, curve), curve[-1][1] - reference
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


def _need_finite(name: str, values: Sequence[float]) -> None:
    if len(values) == 0 or not all(math.isfinite(v) for v in values):
        raise ValueError(f"{name} must be one or more finite numbers, found {list(values)}.")
