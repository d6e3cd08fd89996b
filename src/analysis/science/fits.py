"""Curves, optima, surfaces and rules fitted to a study's losses: pure functions over numbers.

Losses are ln of bits per byte (or nats), so a difference of 0.01 is about 1 %. Lower is better.
Intervals are signed by simulation: tests/simulated_studies.py measures how often they cover.
Shapes: n points, p terms, B draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from src.analysis.kill_replay import replay_kills
from src.analysis.repeats import Noise
from src.spec.config import KillRule
from src.spec.kill_rule import Curve

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its interval; None for both ends where the points leave no degree of freedom."""

    value: float
    low: float | None
    high: float | None
    level: float

    def map(self, function: Callable[[float], float]) -> Estimate:
        """The same estimate on an increasing scale, exp of a logarithm say."""
        low, high = (None if end is None else function(end) for end in (self.low, self.high))
        return Estimate(function(self.value), low, high, self.level)


# --- least squares ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Fit:
    """Ordinary least squares of y (n) on a design (n, p) of full rank."""

    coefficients: Floats  # (p)
    spread: Floats  # (p, p): covariance of the coefficients over the errors' variance
    sd: float  # of the errors; nan without degrees of freedom
    df: int
    residuals: Floats  # (n)

    def t(self, level: float) -> float:
        return float(stats.t.ppf(0.5 + level / 2, self.df)) if self.df else math.nan


def _least_squares(design: Floats, y: Floats, noise: Noise | None) -> _Fit:
    q, r = np.linalg.qr(design)
    inverse = np.linalg.inv(r)
    coefficients = inverse @ (q.T @ y)
    residuals = y - design @ coefficients
    df = len(y) - design.shape[1]
    sd = math.sqrt(float(residuals @ residuals) / df) if df else math.nan
    if noise is not None:
        sd, df = noise.sd, noise.df
    return _Fit(coefficients, inverse @ inverse.T, sd, df, residuals)


def _interval(fit: _Fit, direction: Floats, level: float) -> Estimate:
    """The combination direction (p) @ coefficients with its t interval."""
    value = float(direction @ fit.coefficients)
    if not fit.df:
        return Estimate(value, None, None, level)
    half = fit.t(level) * fit.sd * math.sqrt(float(direction @ fit.spread @ direction))
    return Estimate(value, value - half, value + half, level)


# --- a curve with an optimum --------------------------------------------------------------------

Verdict = Literal["interior", "edge", "undecided"]


@dataclass(frozen=True, slots=True)
class CurveFit:
    """y = c0 + c1 u + c2 u^2, u being x or ln x, over the points' range, and where it is lowest.

    verdict: "interior" where the optimum's whole interval lies inside the range, "edge" where it
    is all one end of it (no optimum in the range), else "undecided". An optimum at an end is the
    best that was tried, never an extrapolation.
    band: (x, value, low, high) along the range; low and high None as in `Estimate`.
    lack_of_fit_p: F test of the quadratic against the cells' means (None without repeats).
    """

    optimum: Estimate
    minimum: Estimate
    curvature: Estimate
    verdict: Verdict
    statement: str
    sd: float | None
    df: int
    points: int
    cells: int
    lack_of_fit_p: float | None
    band: tuple[tuple[float, float, float | None, float | None], ...]


def quadratic(
    x: ArrayLike,
    y: ArrayLike,
    *,
    log: bool = False,
    blocks: Sequence[Hashable] | None = None,
    noise: Noise | None = None,
    level: float = 0.95,
    draws: int = 4000,
    seed: int = 0,
) -> CurveFit:
    """Fit a quadratic and its lowest place within the tried range.

    x, y (n): a share or a rate, and the loss of a run there. log: quadratic in ln x; the optimum
        and the band are in x all the same, the curvature per unit of (ln x)^2.
    blocks (n): what shifts all runs of one kind alike, a data order used at every x say; each
        block gets an offset of its own, so that it does not count as noise.
    noise: known from repeats elsewhere; None: the residuals', which hold the curve's lack of
        fit too.
    The optimum's interval holds the middle `level` of its values over B bootstrap draws of the
    coefficients: normal errors of the fitted size, divided by sqrt(chi2 / df) so that few degrees
    of freedom widen it as they widen a t interval. Plain percentiles of resampled residuals hold
    the truth in 85 % instead of 95 % of six-point curves (1,500 simulated); scaled like this they
    hold it as often. A draw that opens downwards counts at its lower end.

    Raises ValueError for shapes that do not fit, numbers that are not finite, or fewer than three
    different x.
    """
    xs, ys = _points(x, y)
    if log and (xs <= 0).any():
        raise ValueError(f"x must be above 0 for a logarithm, found {xs.min():g}.")
    back: Callable[[float], float] = math.exp if log else float
    xs = np.log(xs) if log else xs
    low, high = float(xs.min()), float(xs.max())
    cells = len(np.unique(xs))
    if cells < 3:
        raise ValueError(f"a quadratic needs three different x, found {cells}.")
    middle, half = (low + high) / 2, (high - low) / 2
    z = (xs - middle) / half
    offsets = _offsets(blocks, len(xs))
    design = np.column_stack([np.ones_like(z), z, z**2, offsets])
    if np.linalg.matrix_rank(design) < design.shape[1]:
        raise ValueError("the blocks leave nothing to fit: some block holds points of one x alone.")
    fit = _least_squares(design, ys, noise)
    best = float(_lowest(fit.coefficients[None, :])[0])
    value = _quadratic_at(fit.coefficients[None, :], np.array([best]))[0]
    ends: tuple[float | None, float | None] = (None, None)
    depth: tuple[float | None, float | None] = (None, None)
    if fit.df:
        sampled = _draws(fit, draws, np.random.default_rng(seed))
        tail = [50 * (1 - level), 50 * (1 + level)]
        places = _lowest(sampled)
        ends = tuple(np.percentile(places, tail))
        depth = tuple(np.percentile(_quadratic_at(sampled, places), tail))
    verdict = _verdict(best, ends)
    optimum = Estimate(best, *ends, level).map(lambda at: back(middle + half * float(at)))
    curvature = _interval(fit, _unit(2, design.shape[1]), level).map(lambda c: c / half**2)
    band = []
    for at in np.linspace(-1, 1, 41):
        direction = np.zeros(design.shape[1])
        direction[:3] = 1.0, at, at**2
        here = _interval(fit, direction, level)
        band.append((back(middle + half * float(at)), here.value, here.low, here.high))
    return CurveFit(
        optimum=optimum,
        minimum=Estimate(float(value), *depth, level),
        curvature=curvature,
        verdict=verdict,
        statement=_curve_statement(verdict, optimum, back(low), back(high), best, fit.df),
        sd=fit.sd if fit.df else None,
        df=fit.df,
        points=len(xs),
        cells=cells,
        lack_of_fit_p=_lack_of_fit(xs, ys, design, offsets),
        band=tuple(band),
    )


def _points(x: ArrayLike, y: ArrayLike) -> tuple[Floats, Floats]:
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if (
        xs.ndim != 1
        or xs.shape != ys.shape
        or not (np.isfinite(xs).all() and np.isfinite(ys).all())
    ):
        raise ValueError(
            f"x and y must be equally long lists of finite numbers, found shapes {xs.shape} and "
            f"{ys.shape}."
        )
    return xs, ys


def _offsets(blocks: Sequence[Hashable] | None, n: int) -> Floats:
    """Columns (n, blocks - 1) that sum to zero over blocks: the intercept is their mean."""
    labels = list(dict.fromkeys(blocks or ()))
    if blocks is not None and len(blocks) != n:
        raise ValueError(f"blocks must name one block a point, found {len(blocks)} for {n}.")
    columns = [[float(b == label) - float(b == labels[0]) for b in blocks or ()]
               for label in labels[1:]]  # fmt: skip
    return np.array(columns, dtype=np.float64).T if columns else np.empty((n, 0))


def _unit(place: int, size: int) -> Floats:
    return np.eye(size)[place]


def _draws(fit: _Fit, draws: int, rng: np.random.Generator) -> Floats:
    """Coefficients (B, p) of the parametric bootstrap: a multivariate t around the estimate."""
    root = np.linalg.cholesky(fit.spread)
    normal = rng.standard_normal((draws, len(fit.coefficients))) @ root.T
    scale = np.sqrt(fit.df / rng.chisquare(fit.df, (draws, 1)))
    return fit.coefficients + fit.sd * scale * normal


def _quadratic_at(coefficients: Floats, z: Floats) -> Floats:
    return coefficients[:, 0] + coefficients[:, 1] * z + coefficients[:, 2] * z**2


def _lowest(coefficients: Floats) -> Floats:
    """Where each quadratic (B, p) is lowest on -1..1."""
    _, b, c = coefficients[:, :3].T
    ends = np.where(b > 0, -1.0, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        vertex = -b / (2 * c)
    return np.where((c > 0) & (np.abs(vertex) < 1), vertex, ends)


def _verdict(best: float, ends: tuple[float | None, float | None]) -> Verdict:
    low, high = ends
    if low is None or high is None:
        return "undecided"
    if low > -1 and high < 1:
        return "interior"
    return "edge" if low == high and abs(best) == 1 else "undecided"


def _curve_statement(
    verdict: Verdict, at: Estimate, low: float, high: float, best: float, df: int
) -> str:
    where = f"of the range {low:.4g} to {high:.4g}"
    if verdict == "interior":
        return f"lowest inside the range, at {at.value:.4g} ({at.low:.4g} to {at.high:.4g})."
    if verdict == "edge":
        end = "lower" if best < 0 else "upper"
        return f"no optimum inside the range: lowest at the {end} end {where}."
    if not df:
        return f"lowest at {at.value:.4g} {where}, without an interval: no degree of freedom."
    return (
        f"undecided: lowest at {at.value:.4g}, but the interval ({at.low:.4g} to {at.high:.4g}) "
        f"reaches an end {where}."
    )


def _lack_of_fit(xs: Floats, ys: Floats, design: Floats, offsets: Floats) -> float | None:
    """p of the F test of the quadratic against one mean a cell; None without repeats to judge."""
    cells = (xs[:, None] == np.unique(xs)).astype(np.float64)
    full = np.column_stack([cells, offsets])
    df_pure = len(xs) - int(np.linalg.matrix_rank(full))
    df_lack = len(xs) - design.shape[1] - df_pure
    if df_pure < 1 or df_lack < 1:
        return None
    pure = _rss(full, ys)
    lack = max(0.0, _rss(design, ys) - pure)
    if pure <= 0:
        return 0.0 if lack > 0 else None
    return float(stats.f.sf(lack / df_lack / (pure / df_pure), df_lack, df_pure))


def _rss(design: Floats, y: Floats) -> float:
    found = np.linalg.lstsq(design, y, rcond=None)[0]
    return float(((y - design @ found) ** 2).sum())


# --- learning rates, cell by cell ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RateFit:
    """One cell over its learning rates.

    best_rate, loss_at_best: of the quadratic in ln rate within the tried range; where no curve
    could be fitted (fewer than three rates) the lowest tried, without intervals.
    lowest_rate, lowest_loss: the lowest tried, means over seeds: biased low, as any minimum is.
    """

    best_rate: Estimate
    loss_at_best: Estimate
    lowest_rate: float
    lowest_loss: float
    verdict: Verdict
    statement: str
    curve: CurveFit | None


Rates = Mapping[float, Sequence[float]]


def best_rates(
    cells: Mapping[str, Rates], noise: Noise | None = None, level: float = 0.95
) -> dict[str, RateFit]:
    """Each cell's own best learning rate: a quadratic in ln rate (three to five rates).

    cells: losses (one a seed) by rate, by cell. noise: see `quadratic`; None pools the residuals
    of all cells' curves: one cell of four rates and one seed has a single degree of freedom.
    Raises ValueError as `quadratic` does, or for a cell without a loss.
    """
    curves = {name: _rate_points(rates) for name, rates in cells.items()}
    if noise is None:
        noise = _pooled([points for points in curves.values() if len(set(points[0])) >= 3])
    return {name: _rate_fit(cells[name], *curves[name], noise, level) for name in cells}


def _rate_points(rates: Rates) -> tuple[list[float], list[float]]:
    points = [(rate, loss) for rate, losses in rates.items() for loss in losses]
    if not points:
        raise ValueError("a cell without a finished run has no best learning rate.")
    return [x for x, _ in points], [y for _, y in points]


def _pooled(curves: Sequence[tuple[list[float], list[float]]]) -> Noise | None:
    """Residual sd around every curve's own quadratic, with the sum of their degrees of freedom."""
    df = sum(len(x) - 3 for x, _ in curves)
    if not df:
        return None
    rss = 0.0
    for x, y in curves:
        z = np.log(x) - np.log(x).mean()
        rss += _rss(np.column_stack([np.ones_like(z), z, z**2]), np.asarray(y))
    return Noise(sd=math.sqrt(rss / df), df=df)


def _rate_fit(
    rates: Rates, x: list[float], y: list[float], noise: Noise | None, level: float
) -> RateFit:
    means = {rate: sum(losses) / len(losses) for rate, losses in rates.items() if losses}
    lowest = min(means, key=lambda rate: means[rate])
    if len(means) < 3:
        return RateFit(
            Estimate(lowest, None, None, level), Estimate(means[lowest], None, None, level),
            lowest, means[lowest], "undecided",
            f"{len(means)} rates tried, too few for a curve: {lowest:g} is the lowest.", None,
        )  # fmt: skip
    curve = quadratic(x, y, log=True, noise=noise, level=level)
    best = curve.optimum
    inside = f"best rate {best.value:.2g}"
    ends = "" if best.low is None else f" ({best.low:.2g} to {best.high:.2g})"
    statement = {
        "interior": f"{inside}{ends}, inside the tried range.",
        "edge": f"best at the edge of the tried rates ({best.value:.2g}): try further.",
        "undecided": f"undecided: {inside}{ends}; the interval reaches an end of the tried range.",
    }[curve.verdict]
    return RateFit(
        best, curve.minimum, lowest, means[lowest], curve.verdict, statement, curve
    )  # fmt: skip


def shared_rate(cells: Mapping[str, Rates]) -> float | None:
    """The rate, among those that every cell has a loss at, with the lowest mean over cells."""
    tried = [{rate for rate, losses in rates.items() if losses} for rates in cells.values()]
    common = set.intersection(*tried) if tried else set()

    def over_cells(rate: float) -> float:
        return sum(sum(c[rate]) / len(c[rate]) for c in cells.values()) / len(cells)

    return min(sorted(common), key=over_cells, default=None)


# --- the response surface -----------------------------------------------------------------------

TERMS = ("share", "share^2", "glu", "glu^2", "share*glu", "ln L")
MOST_CONDITION = 30.0  # Belsley, Kuh and Welsch 1980: from here on coefficients trade places
MOST_INFLATION = 10.0  # the usual alarm for a variance inflation factor


@dataclass(frozen=True, slots=True)
class Surface:
    """ln BPB on share, GLU expansion, their squares and product, and ln of depth.

    coefficients: by term, of predictors centred at `centre`; "share" is thus the slope there, per
    unit of share. standardised: coefficient times the predictor's sd, to compare terms.
    best_share: where the share's part is lowest within the shares tried, at the centre's expansion
    and one depth for all; None without both of its terms, or with a warning.
    condition: of the centred, scaled predictors. inflation: variance inflation factor by term, how
    many times wider than alone a term's variance is for the company of the others.
    """

    coefficients: dict[str, Estimate]
    standardised: dict[str, float]
    centre: dict[str, float]
    best_share: Estimate | None
    condition: float
    inflation: dict[str, float]
    warnings: tuple[str, ...]
    sd: float
    df: int
    points: int
    r_squared: float


def response_surface(
    share: ArrayLike,
    glu: ArrayLike,
    layers: ArrayLike,
    loss: ArrayLike,
    *,
    terms: Sequence[str] = TERMS,
    noise: Noise | None = None,
    level: float = 0.95,
) -> Surface:
    """Least squares with t intervals over all cells (n) at once.

    layers: depth, counted; loss: ln bits per byte. terms: those to fit, of `TERMS`.
    Raises ValueError where the cells cannot tell the terms apart (rank), or leave no degree of
    freedom, or for shapes and numbers that do not fit.
    """
    s, y = _points(share, loss)
    g, depth = _points(glu, layers)
    if not s.shape == g.shape or (depth <= 0).any():
        raise ValueError("share, glu, layers and loss must be equally long, layers above 0.")
    centre = {"share": float(s.mean()), "glu": float(g.mean())}
    if unknown := [term for term in terms if term not in TERMS]:
        raise ValueError(f"terms: found {', '.join(unknown)}, expected some of {', '.join(TERMS)}.")
    a, b = s - centre["share"], g - centre["glu"]
    columns = dict(zip(TERMS, (a, a**2, b, b**2, a * b, np.log(depth)), strict=True))
    x = np.column_stack([columns[term] for term in terms])
    x = x - x.mean(axis=0)
    spread = x.std(axis=0)
    design = np.column_stack([np.ones(len(y)), x])
    _check_rank(design, spread, len(y), terms)
    fit = _least_squares(design, y, noise)
    scaled = x / spread
    singular = np.linalg.svd(scaled, compute_uv=False)
    condition = float(singular[0] / singular[-1])
    inflation = np.diag(np.linalg.inv(np.corrcoef(scaled, rowvar=False).reshape(len(terms), -1)))
    factors = {term: float(v) for term, v in zip(terms, inflation, strict=True)}
    warnings = _collinear(condition, factors)
    total = float(((y - y.mean()) ** 2).sum())
    return Surface(
        coefficients={
            "mean": _interval(fit, _unit(0, design.shape[1]), level),
            **{
                term: _interval(fit, _unit(i + 1, design.shape[1]), level)
                for i, term in enumerate(terms)
            },
        },
        standardised={t: float(fit.coefficients[i + 1] * spread[i]) for i, t in enumerate(terms)},
        centre=centre,
        best_share=(None if warnings else _best_share(fit, terms, s, centre["share"], level)),
        condition=condition,
        inflation=factors,
        warnings=warnings,
        sd=fit.sd,
        df=fit.df,
        points=len(y),
        r_squared=1 - float(fit.residuals @ fit.residuals) / total if total else 1.0,
    )


def _best_share(
    fit: _Fit, terms: Sequence[str], shares: Floats, centre: float, level: float
) -> Estimate | None:
    if not {"share", "share^2"} <= set(terms):
        return None
    low, high = float(shares.min()), float(shares.max())
    middle, half = (low + high) / 2, (high - low) / 2
    slope, bowl = terms.index("share") + 1, terms.index("share^2") + 1

    def lowest(coefficients: Floats) -> Floats:
        b, c = coefficients[:, slope] / half, coefficients[:, bowl]
        # b a + c a^2 of a = share - centre, written over -1..1 of the range.
        offset = (middle - centre) / half
        return middle + half * _lowest(np.column_stack([0 * b, b + 2 * c * offset, c]))

    value = float(lowest(fit.coefficients[None, :])[0])
    places = lowest(_draws(fit, 4000, np.random.default_rng(0)))
    ends = np.percentile(places, [50 * (1 - level), 50 * (1 + level)])
    return Estimate(value, float(ends[0]), float(ends[1]), level)


def _check_rank(design: Floats, spread: Floats, n: int, terms: Sequence[str]) -> None:
    scaled = design / np.concatenate([[1.0], np.where(spread > 0, spread, 1.0)])
    rank = int(np.linalg.matrix_rank(scaled))
    if rank < design.shape[1]:
        raise ValueError(
            f"{n} cells tell only {rank - 1} of {len(terms)} terms apart ({', '.join(terms)}); "
            "ask for fewer terms, or add cells where the others move alone."
        )
    if n == design.shape[1]:
        raise ValueError(f"{n} cells leave no degree of freedom for {len(terms)} terms and a mean.")


def _collinear(condition: float, inflation: Mapping[str, float]) -> tuple[str, ...]:
    told = []
    if condition > MOST_CONDITION:
        told.append(
            f"condition number {condition:.0f} (above {MOST_CONDITION:.0f}): the cells hardly tell "
            "the terms apart."
        )
    for term, factor in inflation.items():
        if factor > MOST_INFLATION:
            told.append(f"{term}: variance inflated {factor:.0f} times by the other terms.")
    return tuple(told)


# --- the kill rule over grace and margin --------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KillCell:
    """One rule replayed over complete runs.

    false_kills of `innocent` runs (those that end no worse than the baseline), with the exact
    (Clopper-Pearson) interval of that rate; saved: share of the runs' tokens not spent.
    """

    grace: float
    margin: float
    runs: int
    kills: int
    innocent: int
    false_kills: int
    false_rate_low: float
    false_rate_high: float
    best_killed: int
    saved: float


def kill_grid(
    studies: Sequence[tuple[Curve, Mapping[str, Curve]]],
    rule: Callable[[float, float], KillRule],
    graces: Sequence[float],
    margins: Sequence[float],
    *,
    tolerance_ppl: float = 0.0,
    level: float = 0.95,
) -> tuple[KillCell, ...]:
    """False kills and tokens saved for every grace and margin.

    studies: (the baseline's complete curve, the runs' by name), one a seed or sweep.
    rule(grace, margin): the rule to replay. best_killed: in how many
    studies the rule stopped the run that would have ended lowest of all.
    Raises ValueError as `replay_kills` does.
    """
    cells = []
    for grace in graces:
        for margin in margins:
            found = [
                replay_kills(baseline, runs, rule(grace, margin), tolerance_ppl)
                for baseline, runs in studies
            ]
            rows = [row for replay in found for row in replay.runs]
            innocent = sum(row.final_gap_ppl <= tolerance_ppl for row in rows)
            false = sum(row.false_kill for row in rows)
            low, high = exact_rate(false, innocent, level)
            total = sum(replay.tokens_total for replay in found)
            cells.append(
                KillCell(
                    grace,
                    margin,
                    len(rows),
                    sum(r.kills for r in found),
                    innocent,
                    false,
                    low,
                    high,
                    sum(r.best_killed for r in found),
                    sum(r.tokens_saved for r in found) / total if total else 0.0,
                )  # fmt: skip
            )
    return tuple(cells)


def exact_rate(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's (1934) interval of a rate; 0 to 1 where nothing was counted."""
    if n == 0:
        return 0.0, 1.0
    found = stats.binomtest(hits, n).proportion_ci(level, method="exact")
    return float(found.low), float(found.high)


# --- does a prediction hold? --------------------------------------------------------------------


def calibration(predicted: ArrayLike, observed: ArrayLike, level: float = 0.95) -> Estimate:
    """Slope of observed (n) on predicted (n) differences with its t interval; an offset is free.

    1: the prediction holds in size; 0: it says nothing; below 0: the order is the other way round.
    Raises ValueError for fewer than three points or predictions that do not differ.
    """
    x, y = _points(predicted, observed)
    if len(x) < 3:
        raise ValueError(f"a slope with an interval needs three predictions, found {len(x)}.")
    if np.ptp(x) == 0:
        raise ValueError("the predictions must differ to be held against anything.")
    fit = _least_squares(np.column_stack([np.ones_like(x), x - x.mean()]), y, None)
    return _interval(fit, _unit(1, 2), level)
