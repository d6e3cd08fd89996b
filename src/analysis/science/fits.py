"""Curves and their optima fitted to a study's losses: pure functions over numbers.

Losses are ln of bits per byte (or nats), so a difference of 0.01 is about 1 %. Lower is better.
tests/simulated_studies.py measures how often the intervals hold the truth.
Shapes: n points, p terms, B draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from src.analysis.intervals import LEVEL, Floats


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its interval; None for both ends where the points leave no degree of freedom."""

    value: float
    low: float | None = None
    high: float | None = None
    level: float = LEVEL

    def map(self, function: Callable[[float], float]) -> Estimate:
        """The same estimate on an increasing scale, exp of a logarithm say."""
        low, high = (None if end is None else function(end) for end in (self.low, self.high))
        return Estimate(function(self.value), low, high)


# --- least squares ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fit:
    """Ordinary least squares of y (n) on a design (n, p) of full rank."""

    coefficients: Floats  # (p)
    spread: Floats  # (p, p): covariance of the coefficients over the errors' variance
    sd: float  # of the errors; nan without degrees of freedom
    df: int

    def combined(self, *weights: float) -> Estimate:
        """The sum of the first coefficients times these weights, with its t interval."""
        direction = np.zeros(len(self.coefficients))
        direction[: len(weights)] = weights
        value = float(direction @ self.coefficients)
        if not self.df:
            return Estimate(value)
        t = float(stats.t.ppf(0.5 + LEVEL / 2, self.df))
        half = t * self.sd * math.sqrt(float(direction @ self.spread @ direction))
        return Estimate(value, value - half, value + half)

    def sampled(self, draws: int, rng: np.random.Generator) -> Floats:
        """Coefficients (B, p) of the parametric bootstrap: a multivariate t around the estimate."""
        root = np.linalg.cholesky(self.spread)
        normal = rng.standard_normal((draws, len(self.coefficients))) @ root.T
        scale = np.sqrt(self.df / rng.chisquare(self.df, (draws, 1)))
        return self.coefficients + self.sd * scale * normal


def least_squares(design: Floats, y: Floats) -> Fit:
    q, r = np.linalg.qr(design)
    inverse = np.linalg.inv(r)
    coefficients = inverse @ (q.T @ y)
    residuals = y - design @ coefficients
    df = len(y) - design.shape[1]
    sd = math.sqrt(float(residuals @ residuals) / df) if df else math.nan
    return Fit(coefficients, inverse @ inverse.T, sd, df)


# --- a curve with an optimum --------------------------------------------------------------------

Verdict = Literal["interior", "edge", "undecided"]


@dataclass(frozen=True, slots=True)
class CurveFit:
    """y = c0 + c1 u + c2 u^2, u being x or ln x, over the points' range, and where it is lowest.

    verdict: "interior" where the optimum's whole interval lies inside the range, "edge" where it
    is all one end of it (no optimum in the range), else "undecided". An optimum at an end is the
    best that was tried, never an extrapolation.
    band: (x, value, low, high) along the range; low and high None as in `Estimate`.
    """

    optimum: Estimate
    minimum: Estimate
    curvature: Estimate
    verdict: Verdict
    statement: str
    sd: float | None
    df: int
    points: int
    band: tuple[tuple[float, float, float | None, float | None], ...]


def quadratic(
    x: ArrayLike,
    y: ArrayLike,
    *,
    log: bool = False,
    draws: int = 4000,
    seed: int = 0,
) -> CurveFit:
    """Fit a quadratic and its lowest place within the tried range.

    x, y (n): a share or an expansion, and the mean loss of the seeds there: one point a
        configuration, because its seeds share what the curve does not fit and are no evidence of
        their own about it. log: quadratic in ln x; the optimum and the band are in x all the same,
        the curvature per unit of (ln x)^2.
    The noise is the residuals', which hold the curve's lack of fit too. The optimum's interval
    holds the middle 95 % of its values over B bootstrap draws of the coefficients: normal errors of
    the fitted size, divided by sqrt(chi2 / df) so that few degrees of freedom widen it as they
    widen a t interval. Plain percentiles of resampled residuals hold the truth in 85 % instead of
    95 % of six-point curves (1,500 simulated); scaled like this they hold it as often. A draw that
    opens downwards counts at its lower end.

    Raises ValueError for shapes that do not fit, numbers that are not finite, or fewer than three
    different x.
    """
    xs, ys = points_of(x, y)
    if log and (xs <= 0).any():
        raise ValueError(f"x must be above 0 for a logarithm, found {xs.min():g}.")
    to_x: Callable[[float], float] = math.exp if log else float
    xs = np.log(xs) if log else xs
    low, high = float(xs.min()), float(xs.max())
    distinct = len(np.unique(xs))
    if distinct < 3:
        raise ValueError(f"a quadratic needs three different x, found {distinct}.")
    middle, half = (low + high) / 2, (high - low) / 2
    z = (xs - middle) / half
    fit = least_squares(np.column_stack([np.ones_like(z), z, z**2]), ys)
    best = argmin(fit.coefficients[None, :])
    optimum_ends: tuple[float, ...] = ()  # of its interval
    minimum_ends: tuple[float, ...] = ()
    if fit.df:
        samples = fit.sampled(draws, np.random.default_rng(seed))
        tail = [50 * (1 - LEVEL), 50 * (1 + LEVEL)]
        positions = argmin(samples)
        optimum_ends = tuple(np.percentile(positions, tail))
        minimum_ends = tuple(np.percentile(_quadratic_at(samples, positions), tail))
    position = Estimate(float(best[0]), *optimum_ends)
    verdict = _verdict(position)
    optimum = position.map(lambda at: to_x(middle + half * float(at)))
    band = []
    for at in np.linspace(-1, 1, 41):
        here = fit.combined(1.0, at, at**2)
        band.append((to_x(middle + half * float(at)), here.value, here.low, here.high))
    return CurveFit(
        optimum=optimum,
        minimum=Estimate(float(_quadratic_at(fit.coefficients[None, :], best)[0]), *minimum_ends),
        curvature=fit.combined(0.0, 0.0, 1.0).map(lambda c: c / half**2),
        verdict=verdict,
        statement=_statement(verdict, optimum, to_x(low), to_x(high), position.value < 0),
        sd=fit.sd if fit.df else None,
        df=fit.df,
        points=len(xs),
        band=tuple(band),
    )


def points_of(x: ArrayLike, y: ArrayLike) -> tuple[Floats, Floats]:
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if xs.ndim != 1 or xs.shape != ys.shape or not np.isfinite([xs, ys]).all():
        raise ValueError(
            f"x and y must be equally long lists of finite numbers, found shapes {xs.shape} and "
            f"{ys.shape}."
        )
    return xs, ys


def _quadratic_at(coefficients: Floats, z: Floats) -> Floats:
    return coefficients[:, 0] + coefficients[:, 1] * z + coefficients[:, 2] * z**2


def argmin(coefficients: Floats) -> Floats:
    """Where each quadratic (B, p) is lowest on -1..1."""
    _, b, c = coefficients[:, :3].T
    ends = np.where(b > 0, -1.0, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        vertex = -b / (2 * c)
    return np.where((c > 0) & (np.abs(vertex) < 1), vertex, ends)


def _verdict(position: Estimate) -> Verdict:
    """place: of the optimum on -1..1."""
    if position.low is None or position.high is None:
        return "undecided"
    if position.low > -1 and position.high < 1:
        return "interior"
    return "edge" if position.low == position.high and abs(position.value) == 1 else "undecided"


def _statement(verdict: Verdict, at: Estimate, low: float, high: float, lower: bool) -> str:
    where = f"of the range {low:.4g} to {high:.4g}"
    if verdict == "interior":
        return f"lowest inside the range, at {at.value:.4g} ({at.low:.4g} to {at.high:.4g})."
    if verdict == "edge":
        end = "lower" if lower else "upper"
        return f"no optimum inside the range: lowest at the {end} end {where}."
    if at.low is None:
        return f"lowest at {at.value:.4g} {where}, without an interval: no degree of freedom."
    return (
        f"undecided: lowest at {at.value:.4g}, but the interval ({at.low:.4g} to {at.high:.4g}) "
        f"reaches an end {where}."
    )
