"""Intervals that cover on simulated data, and what is read off them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from src.analysis.intervals import Interval, equivalence, holm, paired_bootstrap, seed_interval
from src.analysis.repeats import Noise, paired_noise

# --- bootstrap intervals ------------------------------------------------------------------------


def simulate(
    rng: np.random.Generator,
    effect: float,
    seeds: int,
    documents: int,
    seed_sd: float = 0.005,
    document_sd: float = 0.03,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two configurations whose true ln PPL ratio is `effect`, over documents of unequal length."""
    tokens = np.round(np.exp(rng.normal(6.0, 0.7, documents)))
    level = rng.normal(3.5, 0.4, documents)  # documents differ a lot; pairing removes it
    own = rng.normal(0.0, document_sd, documents)  # and differ in what each model gains on them
    noise = rng.normal(0.0, seed_sd, (2, seeds, 1)) + rng.normal(0, 0.01, (2, seeds, documents))
    b = (level + noise[1]) * tokens
    a = (level + effect + own + noise[0]) * tokens
    return a, b, tokens


def test_bootstrap_estimate_is_the_pooled_log_ratio() -> None:
    a, b, tokens = simulate(np.random.default_rng(0), 0.05, 3, 40)
    interval = paired_bootstrap(a, b, tokens, draws=200)
    expected = (a.sum(axis=1) - b.sum(axis=1)).mean() / tokens.sum()
    assert interval.estimate == pytest.approx(expected)
    assert interval.low < interval.estimate < interval.high
    assert (interval.seeds, interval.documents) == (3, 40)
    in_bytes = paired_bootstrap(a, b, tokens * 4, measure="bits_per_byte", draws=200)
    assert in_bytes.estimate == pytest.approx(np.log(a.sum(1)).mean() - np.log(b.sum(1)).mean())


def test_p_and_the_interval_say_the_same() -> None:
    """Effects at the edge of significance: p is at most 0.05 exactly where zero lies outside."""
    rng, close = np.random.default_rng(10), 0
    for study in range(60):
        a, b, tokens = simulate(rng, 0.0165, 3, 40, seed_sd=0.004)
        result = paired_bootstrap(a, b, tokens, seed=study)
        assert result.p is not None
        assert (result.p <= 0.05) == (result.low > 0 or result.high < 0)
        close += 0.03 < result.p < 0.07
    assert close > 5


def test_bootstrap_is_deterministic_and_antisymmetric() -> None:
    a, b, tokens = simulate(np.random.default_rng(1), 0.0, 2, 30)
    first, again = (paired_bootstrap(a, b, tokens, draws=300) for _ in range(2))
    assert first == again
    swapped = paired_bootstrap(b, a, tokens, draws=300)
    assert swapped.estimate == pytest.approx(-first.estimate)


def test_identical_models_give_a_zero_interval_with_p_one() -> None:
    a, _, tokens = simulate(np.random.default_rng(2), 0.0, 3, 30)
    interval = paired_bootstrap(a, a, tokens, draws=100)
    assert (interval.estimate, interval.low, interval.high, interval.p) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("others", [1, 3])
def test_one_seed_has_document_noise_and_no_verdict(others: int) -> None:
    """A difference far outside the document noise, as between two micro-batches of one model."""
    a, b, tokens = simulate(np.random.default_rng(3), 0.05, others, 200)
    interval = paired_bootstrap(a[0], b, tokens, paired_seeds=others == 1, draws=500)
    assert interval.seeds == 1 and interval.p is None
    assert 0 < interval.low < interval.high < 0.1
    result = equivalence(interval)
    assert result.verdict == "no verdict" and not result.told_apart
    assert "document noise only" in result.statement


def test_one_seed_has_no_verdict_even_where_other_pairs_tell_the_noise() -> None:
    a, b, tokens = simulate(np.random.default_rng(3), 0.05, 1, 200)
    noise = Noise(sd=0.001, df=10)
    alone, pooled = (paired_bootstrap(a, b, tokens, draws=100, noise=n) for n in (None, noise))
    assert alone == pooled and pooled.p is None
    assert seed_interval([3.0], [2.0], noise=noise).p is None


def test_why_one_seed_has_no_verdict() -> None:
    """The "95 %" interval over documents of one seed holds the truth about half of the time."""
    rng, hits, studies = np.random.default_rng(8), 0, 300
    for study in range(studies):
        a, b, tokens = simulate(rng, 0.03, 1, 80, seed_sd=0.006)
        interval = paired_bootstrap(a, b, tokens, draws=200, seed=study)
        hits += interval.low <= 0.03 <= interval.high
    assert 0.4 < hits / studies < 0.7


def test_bootstrap_refuses_shapes_that_do_not_pair() -> None:
    with pytest.raises(ValueError, match="same order"):
        paired_bootstrap(np.ones((2, 3)), np.ones((2, 4)), np.ones(3))
    with pytest.raises(ValueError, match="paired_seeds=False"):
        paired_bootstrap(np.ones((2, 3)), np.ones((3, 3)), np.ones(3))
    with pytest.raises(ValueError, match="finite"):
        paired_bootstrap(np.full((1, 3), np.nan), np.ones((1, 3)), np.ones(3))
    paired_bootstrap(np.ones((2, 3)), np.ones((3, 3)), np.ones(3), paired_seeds=False, draws=10)


@pytest.mark.parametrize("seeds, paired", [(3, True), (3, False), (5, True), (1, True)])
def test_bootstrap_covers_near_its_nominal_level(seeds: int, paired: bool) -> None:
    """400 simulated studies: a 95 % interval holds the truth in 92 to 99 % of them.

    The standard error of such a rate is 1.1 points. With one seed the truth it can cover is that
    of these two models, so seed noise is switched off there.
    """
    rng = np.random.default_rng(4)
    hits, studies = 0, 400
    for study in range(studies):
        a, b, tokens = simulate(rng, 0.03, seeds, 80, seed_sd=0.0 if seeds == 1 else 0.006)
        interval = paired_bootstrap(a, b, tokens, paired_seeds=paired, draws=400, seed=study)
        hits += interval.low <= 0.03 <= interval.high
    assert 0.92 <= hits / studies <= 0.99


def test_noise_pooled_over_a_study_covers_and_is_narrower() -> None:
    """Two seeds of four configurations: 3 degrees of freedom in place of 1."""
    rng, studies = np.random.default_rng(9), 400
    hits, widths = 0, []
    for study in range(studies):
        a, b, tokens = simulate(rng, 0.03, 2, 80, seed_sd=0.006)
        table = {"a": a.sum(1) / tokens.sum(), "b": b.sum(1) / tokens.sum()}
        table |= {name: rng.normal(0, 0.006, 2) for name in "cd"}
        noise = paired_noise(
            {k: {(s, "x"): float(v) for s, v in enumerate(row)} for k, row in table.items()}
        )
        assert noise is not None and noise.df == 3
        own, pooled = (
            paired_bootstrap(a, b, tokens, draws=400, seed=study, noise=n) for n in (None, noise)
        )
        hits += pooled.low <= 0.03 <= pooled.high
        widths.append((pooled.high - pooled.low) / (own.high - own.low))
    assert 0.92 <= hits / studies <= 0.99
    assert np.median(widths) < 0.7


def test_percentiles_of_three_resampled_seeds_would_not_cover() -> None:
    """Why the seed level is drawn from t: the textbook hierarchical bootstrap fails with S = 3."""
    rng = np.random.default_rng(5)
    hits, studies = 0, 400
    for _ in range(studies):
        diffs = rng.normal(0.03, 0.006, 3)
        draws = diffs[rng.integers(0, 3, (400, 3))].mean(axis=1)
        low, high = np.quantile(draws, [0.025, 0.975])
        hits += low <= 0.03 <= high
    assert hits / studies < 0.85


def test_seed_interval_matches_the_textbook_paired_t() -> None:
    interval = seed_interval([3.0, 3.2, 3.1], [2.9, 3.0, 3.0])
    # differences 0.1, 0.2, 0.1: mean 0.13333, sd 0.057735, t(0.975, 2) = 4.302653
    half = 4.302653 * 0.057735 / math.sqrt(3)
    assert interval.estimate == pytest.approx(0.133333, abs=1e-6)
    assert interval.low == pytest.approx(0.133333 - half, abs=1e-5)
    assert interval.p == pytest.approx(0.05719, abs=1e-4)


def test_seed_intervals_are_those_of_scipy() -> None:
    rng = np.random.default_rng(7)
    a, b, more = (rng.normal(3, 0.1, n).tolist() for n in (5, 5, 3))
    for result, test in (
        (seed_interval(a, b), stats.ttest_rel(a, b)),
        (seed_interval(a, more, paired_seeds=False), stats.ttest_ind(a, more, equal_var=False)),
        (seed_interval(a, b, noise=paired_noise({
            name: {(seed, "x"): loss for seed, loss in enumerate(side)}
            for name, side in (("a", a), ("b", b))
        })), stats.ttest_rel(a, b)),
    ):  # fmt: skip
        bounds = test.confidence_interval()
        assert (result.low, result.high) == pytest.approx((bounds.low, bounds.high))
        assert result.p == pytest.approx(test.pvalue)
    same = seed_interval([3.0, 3.1], [3.0, 3.1])
    assert (same.estimate, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)


def test_one_pair_of_seeds_decides_nothing() -> None:
    interval = seed_interval([3.0], [2.0])
    assert interval.p is None
    assert equivalence(interval).verdict == "no verdict"


# --- equivalence and Holm -----------------------------------------------------------------------


def interval(low: float, high: float) -> Interval:
    return Interval((low + high) / 2, low, high, 0.5, 3, 100)


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (-0.005, 0.005, "equivalent"),
        (0.001, 0.005, "equivalent"),  # real, and too small to matter
        (math.log1p(-0.01), math.log1p(0.01), "equivalent"),
        (math.log(0.99) - 1e-6, 0.0, "undecided"),
        (-0.02, 0.02, "undecided"),
        (0.005, 0.02, "different"),
        (-0.09, -0.03, "different"),
    ],
)
def test_equivalence_within_one_percent(low: float, high: float, expected: str) -> None:
    assert equivalence(interval(low, high)).verdict == expected


def test_holm_on_a_textbook_case() -> None:
    result = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert result == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=12))
def test_holm_lies_between_bare_and_bonferroni_and_keeps_the_order(ps: list[float]) -> None:
    bare = {str(i): p for i, p in enumerate(ps)}
    result = holm(bare)
    assert all(bare[name] <= p <= 1.0 for name, p in result.items())
    adjusted = [result[name] for name in sorted(bare, key=lambda name: bare[name])]
    assert adjusted == sorted(adjusted)
    assert adjusted[0] == min(1.0, len(ps) * min(ps))


def test_holm_keeps_the_family_error_under_the_null() -> None:
    rng = np.random.default_rng(6)
    wrong = sum(
        any(p <= 0.05 for p in holm({str(i): p for i, p in enumerate(row)}).values())
        for row in rng.uniform(size=(1000, 7))
    )
    assert wrong / 1000 < 0.07  # 0.05 and two standard errors
