"""Fits against known truths, and against numbers worked out by other means."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from src.analysis.science import fits, surface
from tests import simulated_studies

X = np.array([0.25, 0.30, 0.35, 0.40, 0.45, 0.50])


@pytest.fixture(scope="module")
def simulated():
    return simulated_studies.simulate(studies=150)


def test_intervals_hold_the_truth_at_their_nominal_rate(simulated):
    """Within the binomial error that all rates together show once in a thousand suites."""
    for name, (rate, n) in simulated.items():
        if name not in simulated_studies.NOT_COVERAGE:
            low, high = stats.binom.ppf([0.0005 / 20, 1 - 0.0005 / 20], n, 0.95) / n
            assert low <= rate <= high, (name, rate, n)


def test_a_curve_without_an_optimum_in_its_range_is_called_so(simulated):
    assert simulated["false interior optimum"][0] <= 0.05
    assert simulated["edge found"][0] >= 0.85


def test_an_exact_bowl_is_found_exactly():
    fit = fits.quadratic(X, 0.1 + 2 * (X - 0.37) ** 2)
    assert fit.optimum.value == pytest.approx(0.37) and fit.minimum.value == pytest.approx(0.1)
    assert fit.curvature.value == pytest.approx(2) and fit.verdict == "interior"
    assert fit.optimum.high - fit.optimum.low < 1e-6
    assert fit.band[0][0] == 0.25 and fit.band[-1][0] == pytest.approx(0.5)
    assert all(low <= y <= high for _, y, low, high in fit.band)


def test_the_curvature_s_interval_is_least_squares_own():
    rng = np.random.default_rng(3)
    y = 0.2 + (X - 0.4) ** 2 + 0.004 * rng.standard_normal(6)
    fit = fits.quadratic(X, y)
    beta, covariance = np.polyfit(X, y, 2, cov=True)  # scaled by residuals over n - 3
    half = stats.t.ppf(0.975, 3) * math.sqrt(covariance[0, 0])
    assert fit.curvature.value == pytest.approx(beta[0])
    assert fit.curvature.low == pytest.approx(beta[0] - half)
    assert fit.optimum.value == pytest.approx(-beta[1] / 2 / beta[0])
    assert (fit.df, fit.points) == (3, 6)


def test_a_curve_in_the_logarithm_answers_in_x():
    y = 0.1 + 0.5 * np.log(X / 0.36) ** 2
    fit = fits.quadratic(X, y, log=True)
    assert fit.optimum.value == pytest.approx(0.36) and fit.curvature.value == pytest.approx(0.5)
    assert [fit.band[0][0], fit.band[-1][0]] == pytest.approx([0.25, 0.5])
    assert "lowest inside the range, at 0.36" in fit.statement
    falling = fits.quadratic(X, -np.log(X), log=True)
    assert "at the upper end of the range 0.25 to 0.5" in falling.statement
    with pytest.raises(ValueError, match="above 0 for a logarithm, found -1"):
        fits.quadratic([-1, 1, 2], [1, 2, 3], log=True)


def test_edges_downward_curves_and_points_without_freedom():
    falling = fits.quadratic(X, 0.2 - X)
    assert falling.verdict == "edge" and falling.optimum.value == 0.5
    assert "no optimum inside the range: lowest at the upper end" in falling.statement
    hill = fits.quadratic(X, -((X - 0.36) ** 2))
    assert hill.verdict == "edge" and hill.optimum.value == 0.5  # its lower end
    three = fits.quadratic(X[:3], [1.0, 0.0, 1.0])
    assert three.verdict == "undecided" and three.optimum.low is None and three.df == 0
    assert three.optimum.value == pytest.approx(0.30)
    assert "no degree of freedom" in three.statement


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1, 2], [1, 2], "three different x, found 2"),
        ([1, 2, 3], [1, 2], "equally long"),
        ([1, 2, 3], [1, 2, math.nan], "finite"),
    ],
)
def test_what_cannot_be_fitted_is_refused(x, y, message):
    with pytest.raises(ValueError, match=message):
        fits.quadratic(x, y)


# ------------------------------------------------------------------------------- response surface


def design() -> np.ndarray:
    return simulated_studies.configurations_of(
        "frontier", "factorised", "depth_control", "glu_expansion"
    )


def test_the_surface_finds_known_coefficients():
    share, glu, layers = design().T
    s, g = share - share.mean(), glu - glu.mean()
    y = 0.2 + 0.3 * s + 1.2 * s**2 - 0.02 * g + 0.015 * g**2 + 0.1 * s * g - 0.03 * np.log(layers)
    result = surface.response_surface(share, glu, layers, y)
    truth = {"share": 0.3, "share^2": 1.2, "glu": -0.02, "glu^2": 0.015, "share*glu": 0.1}
    for term, value in {**truth, "ln L": -0.03}.items():
        assert result.coefficients[term].value == pytest.approx(value), term
    assert result.best_share.value == pytest.approx(share.mean() - 0.3 / 2.4)
    assert result.coefficients["mean"].value == pytest.approx(y.mean())
    assert result.sd < 1e-10 and result.points == len(y)


def test_the_best_share_stays_within_the_shares_tried():
    share, glu, layers = design().T
    terms = ("share", "share^2", "ln L")
    rising = surface.response_surface(share, glu, layers, share + share**2, terms=terms)
    assert rising.best_share.value == pytest.approx(share.min())
    bowl = surface.response_surface(share, glu, layers, (share - 0.4) ** 2, terms=terms)
    assert bowl.best_share.value == pytest.approx(0.4)
    assert surface.response_surface(share, glu, layers, share, terms=("share",)).best_share is None


def test_inflation_is_one_over_one_less_r_squared():
    share, glu, layers = design().T
    terms = ("share", "share^2", "ln L")
    result = surface.response_surface(share, glu, layers, share, terms=terms)
    s = share - share.mean()
    others = np.column_stack([np.ones_like(s), s, s**2])
    depth = np.log(layers)
    residual = depth - others @ np.linalg.lstsq(others, depth, rcond=None)[0]
    r_squared = 1 - residual @ residual / ((depth - depth.mean()) ** 2).sum()
    assert result.inflation["ln L"] == pytest.approx(1 / (1 - r_squared))


def test_the_frontier_alone_cannot_tell_share_from_depth_and_is_told_so():
    terms = ("share", "share^2", "ln L")
    alone, both = (
        surface.response_surface(*shapes.T, shapes[:, 0], terms=terms)
        for shapes in (
            simulated_studies.configurations_of("frontier"),
            simulated_studies.configurations_of("frontier", "factorised"),
        )
    )
    assert alone.inflation["ln L"] == pytest.approx(623, abs=0.5)  # as docs/SCIENCE.md has them
    assert both.inflation["ln L"] == pytest.approx(3.0, abs=0.05)
    assert any("ln L" in warning for warning in alone.warnings)
    assert not both.warnings and both.best_share is not None and alone.best_share is None


def test_a_surface_that_the_configurations_do_not_span_is_refused():
    share, layers = X, np.array([26, 17, 11, 8, 6, 4])
    with pytest.raises(ValueError, match="6 configurations tell only . of 6 terms apart"):
        surface.response_surface(share, np.full(6, 2.67), layers, share)
    with pytest.raises(ValueError, match="leave no degree of freedom"):
        surface.response_surface(
            X[:3], np.full(3, 2.67), layers[:3], X[:3], terms=("share", "share^2")
        )
