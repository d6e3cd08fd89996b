"""Is a short ranking worth anything? Short runs against full runs over the same configurations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

EXACT = 8  # configurations up to which all orders are counted: 8! = 40,320


@dataclass(frozen=True, slots=True)
class RankAgreement:
    """Short runs against full runs over the same configurations and the same seeds.

    left_out: seeds of configurations that do not count, because one budget or another
        configuration lacks them.
    spearman: rank correlation (ties share their mean rank), None below 3 configurations or where
        a side is constant. p: its exact one-sided permutation p up to 8 (agreement by luck).
    top1_regret: loss given up by finishing the short runs' best instead of the best (>= 0); of
        several short leaders that tie, the worst.
    """

    names: tuple[str, ...]
    short: tuple[float, ...]  # mean losses in the order of names
    full: tuple[float, ...]
    left_out: int
    spearman: float | None
    p: float | None
    top1_same: bool
    top1_regret: float

    @property
    def n(self) -> int:
        """Configurations ranked."""
        return len(self.names)


def rank_agreement(
    short: Mapping[str, Mapping[int, float]], full: Mapping[str, Mapping[int, float]]
) -> RankAgreement:
    """Compare rankings by loss (lower is better), given by configuration and seed.

    A mean over whichever runs survived would compare one configuration's good seeds with all of
    another's, so only seeds count that all have on both sides.
    Raises ValueError where no seed is left.
    """
    both = {name: set(short[name]) & set(full[name]) for name in short if name in full}
    names = tuple(name for name, seeds in both.items() if seeds)
    common = sorted(set.intersection(*(both[name] for name in names))) if names else []
    if not common:
        raise ValueError(
            "no seed was run by every configuration at both budgets: their rankings cannot be "
            "compared."
        )
    x, y = (
        np.array([np.mean([side[name][seed] for seed in common]) for name in names])
        for side in (short, full)
    )
    rho = p = None
    if len(names) >= 3 and np.ptp(x) > 0 and np.ptp(y) > 0:
        rho = float(stats.spearmanr(x, y).statistic)
        p = _permutation_p(x, y) if len(names) <= EXACT else None
    tried = sum(len({*short.get(n, ()), *full.get(n, ())}) for n in {**short, **full})
    reached, best = float(y[x == x.min()].max()), float(y.min())
    return RankAgreement(
        names=names,
        short=tuple(x.tolist()),
        full=tuple(y.tolist()),
        left_out=tried - len(names) * len(common),
        spearman=rho,
        p=p,
        top1_same=reached == best,
        top1_regret=reached - best,
    )


def _permutation_p(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Share of orderings of y that correlate with x at least as well."""
    ranks = stats.rankdata(y)
    result = stats.permutation_test(
        (stats.rankdata(x),),
        lambda orders, axis: (orders * ranks).sum(axis=axis),
        permutation_type="pairings",
        alternative="greater",
        n_resamples=50_000,  # above 8!, so that it counts all orders
        vectorized=True,
    )
    return float(result.pvalue)


def log_slope(curve: Sequence[tuple[int, float]]) -> float | None:
    """Slope d ln PPL / d ln tokens by least squares over the second half of the curve's tokens.

    The "dev PPL slope" of the ranking runs: -0.1 means that doubling the tokens lowers perplexity
    by about 7 %. None with fewer than two checks there.
    """
    points = [(t, p) for t, p in curve if t > 0 and t >= curve[-1][0] / 2]
    if len(points) < 2:
        return None
    tokens, ppl = np.log(np.array(points, dtype=np.float64)).T
    return float(stats.linregress(tokens, ppl).slope)
