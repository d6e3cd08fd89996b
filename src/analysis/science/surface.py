"""The response surface: ln bits per byte on share, expansion and depth at once. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from src.analysis.intervals import LEVEL, Floats
from src.analysis.science.fits import Estimate, Fit, argmin, least_squares, points_of

TERMS = ("share", "share^2", "glu", "glu^2", "share*glu", "ln L")
MOST_INFLATION = 10.0  # the usual alarm for a variance inflation factor


@dataclass(frozen=True, slots=True)
class Surface:
    """ln BPB on share, GLU expansion, their squares and product, and ln of depth.

    coefficients: by term, of predictors centred at their means; "share" is thus the slope there,
    per unit of share. inflation: how many times wider than alone a term's variance is for the
    company of the others. best_share: where the share's part is lowest within the shares tried, at
    the mean expansion and one depth for all; None without both of its terms, or with a warning.
    """

    coefficients: dict[str, Estimate]
    best_share: Estimate | None
    inflation: dict[str, float]
    warnings: tuple[str, ...]
    sd: float
    df: int
    points: int


def response_surface(
    share: ArrayLike,
    glu: ArrayLike,
    layers: ArrayLike,
    loss: ArrayLike,
    terms: Sequence[str] = TERMS,
) -> Surface:
    """Least squares of `terms` with t intervals over all configurations (n) at once.

    layers: depth, counted; loss: ln bits per byte. Raises ValueError where the runs cannot tell the
    terms apart (rank), or leave no degree of freedom, or for shapes and numbers that do not fit.
    """
    s, y = points_of(share, loss)
    g, depth = points_of(glu, layers)
    a, b = s - s.mean(), g - g.mean()
    columns = dict(zip(TERMS, (a, a**2, b, b**2, a * b, np.log(depth)), strict=True))
    x = np.column_stack([columns[term] - columns[term].mean() for term in terms])
    design = np.column_stack([np.ones(len(y)), x])
    spread = design.std(axis=0)
    rank = int(np.linalg.matrix_rank(design / np.where(spread > 0, spread, 1.0)))
    if rank < design.shape[1]:
        raise ValueError(
            f"{len(y)} configurations tell only {rank - 1} of {len(terms)} terms apart "
            f"({', '.join(terms)}); ask for fewer terms, or add configurations where the others "
            "move alone."
        )
    if len(y) == design.shape[1]:
        raise ValueError(
            f"{len(y)} configurations leave no degree of freedom for {len(terms)} terms and a mean."
        )
    fit = least_squares(design, y)
    correlation = np.corrcoef(x, rowvar=False).reshape(len(terms), -1)
    inflation = dict(zip(terms, np.diag(np.linalg.inv(correlation)).tolist(), strict=True))
    warnings = tuple(
        f"{term}: variance inflated {factor:.0f} times by the other terms."
        for term, factor in inflation.items()
        if factor > MOST_INFLATION
    )
    known = {"share", "share^2"} <= set(terms) and not warnings
    return Surface(
        coefficients={
            term: fit.combined(*np.eye(design.shape[1])[index])
            for index, term in enumerate(("mean", *terms))
        },
        best_share=_best_share(fit, terms, s) if known else None,
        inflation=inflation,
        warnings=warnings,
        sd=fit.sd,
        df=fit.df,
        points=len(y),
    )


def _best_share(fit: Fit, terms: Sequence[str], shares: Floats) -> Estimate:
    low, high = float(shares.min()), float(shares.max())
    middle, half = (low + high) / 2, (high - low) / 2
    slope, bowl = terms.index("share") + 1, terms.index("share^2") + 1

    def lowest(coefficients: Floats) -> Floats:
        b, c = coefficients[:, slope] / half, coefficients[:, bowl]
        # b a + c a^2 of a = share - mean, written over -1..1 of the range.
        offset = (middle - float(shares.mean())) / half
        return middle + half * argmin(np.column_stack([0 * b, b + 2 * c * offset, c]))

    positions = lowest(fit.sampled(4000, np.random.default_rng(0)))
    ends = np.percentile(positions, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Estimate(float(lowest(fit.coefficients[None, :])[0]), float(ends[0]), float(ends[1]))
