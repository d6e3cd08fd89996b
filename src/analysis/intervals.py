"""How sure we are of a difference: intervals over documents and seeds, equivalence, Holm.

Losses are nats (per token or per document), so differences are logs of perplexity ratios:
ln(PPL_a / PPL_b) = loss_a - loss_b, and a PPL 5 % lower is a difference of ln 0.95 = -0.0513.
Shapes: S seeds, D documents, B bootstrap draws. Pure functions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from src.analysis.repeats import Noise, mean_sd, need_finite

Floats = NDArray[np.float64]
LEVEL = 0.95  # of every interval
MARGIN = 0.01  # differences of less are of no consequence


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate of ln(a / b) with a confidence interval; p is two-sided, for "no difference".

    seeds: on the side that has fewer. With one seed the interval is about documents alone, the
    models as they are: reseeding moves the estimate by more than that, so p is None and nothing
    is concluded.
    """

    estimate: float
    low: float
    high: float
    p: float | None
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
    noise: Noise | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Interval of ln(PPL_a / PPL_b) or ln(BPB_a / BPB_b), resampling documents and seeds.

    nats_a (S_a, D), nats_b (S_b, D): summed loss of each document under each seed's model.
    weights (D): tokens of each document for "perplexity" (both models must then share the
        tokenizer), UTF-8 bytes for "bits_per_byte".
    paired_seeds: row s of both ran with the same seed and was computed alike, so S_a = S_b.
    noise: of a run, in the unit of the statistic below, where more runs than these tell it:
        `paired_noise` for paired seeds, `pooled_noise` for others. None: from these runs alone.

    With w the resampled documents, the statistic of seed s is
        perplexity:     sum_d w_d (a_sd - b_sd) / sum_d w_d tokens_d
        bits per byte:  ln(sum_d w_d a_sd) - ln(sum_d w_d b_sd)      (the bytes cancel)
    averaged over seeds. Documents are drawn with replacement and the percentiles of the draws
    make the interval (Efron and Tibshirani 1993, ch. 8 and 13; the pairing is Koehn 2004).
    Percentiles of two or three resampled seeds would cover far below their nominal level (the
    spread of n resampled values is (n - 1)/n of the true one, from n - 1 degrees of freedom), so
    the seed level is resampled from its t distribution instead: each draw adds the standard error
    times a Student t variate (unpaired seeds: Welch's standard error and degrees of freedom).
    With a single seed on a side the interval is about documents only, and has no p.

    Raises ValueError for shapes that do not fit or numbers that are not finite.
    """
    a, b = (np.atleast_2d(np.asarray(x, dtype=np.float64)) for x in (nats_a, nats_b))
    w = np.asarray(weights, dtype=np.float64)
    _check_documents(a, b, w, paired_seeds)
    rng, everything = np.random.default_rng(seed), np.ones((1, w.size))
    estimate = float(_contrast(everything, a, b, w, measure)[0])
    samples = np.empty(draws)
    chunk = max(1, 4_000_000 // w.size)  # bounds the count matrix to 32 MB
    for start in range(0, draws, chunk):
        rows = min(chunk, draws - start)
        drawn = rng.integers(w.size, size=(rows, w.size)) + w.size * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * w.size).astype(np.float64)
        samples[start : start + rows] = _contrast(counts.reshape(rows, w.size), a, b, w, measure)
    seeds = min(len(a), len(b))
    if seeds > 1:
        means_a, means_b = (_per_seed(everything, nats, w, measure)[0] for nats in (a, b))
        error, df = _seed_error(means_a, means_b, paired_seeds, noise)
        if error > 0:
            samples += error * rng.standard_t(df, size=draws)
    # The outer of the two neighbouring draws, so that p <= 0.05 exactly where 0 lies outside.
    low = np.quantile(samples, 0.5 - LEVEL / 2, method="lower")
    high = np.quantile(samples, 0.5 + LEVEL / 2, method="higher")
    below, above = int((samples <= 0).sum()), int((samples >= 0).sum())
    p = min(1.0, 2 * (min(below, above) + 1) / (draws + 1))
    return Interval(
        estimate=estimate,
        low=float(low),
        high=float(high),
        p=p if seeds > 1 else None,
        seeds=seeds,
        documents=int(w.size),
    )


def _check_documents(a: Floats, b: Floats, w: Floats, paired_seeds: bool) -> None:
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


def _seed_error(a: Floats, b: Floats, paired: bool, noise: Noise | None) -> tuple[float, float]:
    """Standard error of mean(a) - mean(b) under reseeding, and its degrees of freedom."""
    if noise is not None:
        return noise.sd * math.sqrt(1 / a.size + 1 / b.size), noise.df
    groups = [a - b] if paired else [a, b]
    squares = [float(values.var(ddof=1)) / values.size for values in groups]
    total = sum(squares)
    if total == 0:
        return 0.0, 1.0
    parts = sum(sq**2 / (v.size - 1) for sq, v in zip(squares, groups, strict=True))
    return math.sqrt(total), total**2 / parts


def seed_interval(
    a: Sequence[float],
    b: Sequence[float],
    *,
    paired_seeds: bool = True,
    noise: Noise | None = None,
) -> Interval:
    """t interval of mean(a) - mean(b) over seeds, for losses without their documents.

    Paired t, Welch's t for unpaired seeds, or with `noise` its sd and degrees of freedom
    (`paired_bootstrap` says which). One seed on a side has no interval: low and high are infinite
    and p is None, which no equivalence or difference follows from.
    """
    need_finite("a", a)
    need_finite("b", b)
    if paired_seeds and len(a) != len(b):
        raise ValueError(f"a paired interval needs equal seeds, found {len(a)} and {len(b)}.")
    estimate, seeds = mean_sd(a).mean - mean_sd(b).mean, min(len(a), len(b))
    if seeds == 1:
        return Interval(estimate, -math.inf, math.inf, None, 1, 0)
    error, df = _seed_error(np.asarray(a), np.asarray(b), paired_seeds, noise)
    if error == 0:
        return Interval(estimate, estimate, estimate, float(estimate == 0), seeds, 0)
    low, high = stats.t.interval(LEVEL, df, loc=estimate, scale=error)
    p = float(2 * stats.t.sf(abs(estimate) / error, df))
    return Interval(estimate, float(low), float(high), p, seeds, 0)


# --- equivalence, many comparisons --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Equivalence:
    """What an interval says about `MARGIN`; "no verdict" where it has fewer than two seeds."""

    verdict: Literal["equivalent", "different", "undecided", "no verdict"]
    statement: str

    @property
    def told_apart(self) -> bool:
        """Whether a and b were shown to differ; nothing else breaks a tie."""
        return self.verdict == "different"


def equivalence(interval: Interval) -> Equivalence:
    """Two one-sided tests read off an interval of ln(a / b) (Schuirmann 1987).

    A 95 % interval that lies inside ln(1 - margin) .. ln(1 + margin) rejects both "lower by the
    margin or more" and "higher by the margin or more" at 2.5 % each, stricter than the usual 90 %
    interval's 5 %. Equivalence is asked first, because a difference can be real and still smaller
    than anyone cares about.
    """
    low, estimate, high = ((r - 1) * 100 for r in interval.ratio)
    if interval.seeds < 2:
        observed = f"{estimate:+.2f} %"
        if interval.documents:
            observed += f" ({low:+.2f} to {high:+.2f} %, document noise only)"
        observed += f" from {interval.seeds} seed{'' if interval.seeds else 's'}"
        return Equivalence("no verdict", f"no verdict: {observed} says nothing of other seeds.")
    numbers = f"{estimate:+.2f} % ({LEVEL:.0%} interval {low:+.2f} to {high:+.2f} %)"
    if math.log1p(-MARGIN) <= interval.low and interval.high <= math.log1p(MARGIN):
        text = f"equivalent within +-{MARGIN:.0%}: {numbers}, two one-sided tests at "
        return Equivalence("equivalent", f"{text}{(1 - LEVEL) / 2:.3f}.")
    if interval.low > 0 or interval.high < 0:
        return Equivalence("different", f"different: {numbers} excludes zero.")
    text = f"undecided: {numbers} neither excludes zero nor fits inside +-{MARGIN:.0%}."
    return Equivalence("undecided", text)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p values after Holm (1979): rejecting those of at most alpha keeps the family-wise error at
    alpha, under any dependence.

    Sorted p_(1) <= ... <= p_(m), adjusted p_(i) = max_{j <= i} min(1, (m - j + 1) p_(j)). (scipy
    has Benjamini and Hochberg's false discovery rate, which promises less.)
    """
    order = sorted(p_values, key=lambda name: p_values[name])
    steps = (min(1.0, (len(order) - rank) * p_values[name]) for rank, name in enumerate(order))
    return dict(zip(order, itertools.accumulate(steps, max), strict=True))
