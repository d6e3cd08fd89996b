"""Fits against known truths, and against numbers worked out by other means."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from src.analysis.science import fits
from src.spec import allocation, config
from tests import ROOT, simulated_studies

X = np.array([0.25, 0.30, 0.35, 0.40, 0.45, 0.50])


@pytest.fixture(scope="module")
def simulated():
    return simulated_studies.simulate(studies=150)


def test_intervals_hold_the_truth_at_their_nominal_rate(simulated):
    """Within the binomial error that 11 rates together show once in a thousand suites."""
    for name, (rate, n) in simulated.items():
        if name not in simulated_studies.NOT_COVERAGE:
            low, high = stats.binom.ppf([0.0005 / 11, 1 - 0.0005 / 11], n, 0.95) / n
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
    assert (fit.df, fit.points, fit.cells) == (3, 6, 6)


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


def test_a_shift_of_a_whole_seed_is_not_noise():
    bowl = (X - 0.37) ** 2
    x, y = np.tile(X, 2), np.concatenate([bowl, bowl + 0.1])
    blind = fits.quadratic(x, y)
    told = fits.quadratic(x, y, blocks=[0] * 6 + [1] * 6)
    assert blind.sd > 0.05 and told.sd < 1e-10
    assert told.minimum.value == pytest.approx(0.05)  # at the seeds' mean
    assert told.optimum.value == pytest.approx(0.37)


@pytest.mark.parametrize(
    ("x", "y", "blocks", "told"),
    [
        ([1, 2], [1, 2], None, "three different x, found 2"),
        ([1, 2, 3], [1, 2], None, "equally long"),
        ([1, 2, 3], [1, 2, math.nan], None, "finite"),
        ([1, 2, 3], [1, 2, 3], [0, 0], "one block a point"),
        ([1, 2, 3, 4], [1, 2, 3, 3], [0, 1, 2, 3], "the blocks leave nothing"),
    ],
)
def test_what_cannot_be_fitted_is_refused(x, y, blocks, told):
    with pytest.raises(ValueError, match=told):
        fits.quadratic(x, y, blocks=blocks)


# --------------------------------------------------------------------------- what can be told apart


def inflation_of_depth(*files: str) -> float:
    """How many times share and its square inflate the variance of the coefficient of ln depth, in
    a regression on the three over every configuration that these sweeps would build."""
    rows = []
    for name in files:
        sweep = config.load_sweep(ROOT / "configs" / f"{name}.yaml")
        requests = {run.experiment: run.model for run in sweep.runs}
        built = allocation.allocate(requests, sweep.baseline).values()
        rows += [(one.params.share, one.model.n_layers) for one in built]
    share, layers = np.array(rows).T
    alike = np.corrcoef([share, (share - share.mean()) ** 2, np.log(layers)])
    return float(np.linalg.inv(alike)[2, 2])


def test_the_frontier_alone_cannot_tell_share_from_depth_and_both_sweeps_can():
    """docs/SCIENCE.md has the two numbers."""
    assert inflation_of_depth("frontier") == pytest.approx(623, abs=0.5)
    assert inflation_of_depth("frontier", "factorised") == pytest.approx(3.0, abs=0.05)
