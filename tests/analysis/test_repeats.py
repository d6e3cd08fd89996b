"""Means and noise over seeds on hand-made cases, and which runs pair."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from src.analysis.repeats import mean_sd, pair, paired_noise, pooled_noise

# --- summaries ----------------------------------------------------------------------------------


def test_mean_sd_uses_n_minus_one_and_has_no_sd_for_one_seed() -> None:
    three = mean_sd([1.0, 2.0, 3.0])
    assert (three.n, three.mean, three.sd) == (3, 2.0, 1.0)
    assert mean_sd([5.0]).sd is None


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_mean_sd_refuses_what_it_cannot_average(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        mean_sd(values)


def test_pooled_noise_weights_configurations_by_degrees_of_freedom() -> None:
    noise = pooled_noise({"a": [1.0, 2.0, 3.0], "b": [0.0, 4.0], "c": [9.0]})
    assert noise is not None
    assert noise.df == 3
    assert noise.sd == pytest.approx(math.sqrt((2 * 1.0 + 1 * 8.0) / 3))
    assert pooled_noise({"a": [1.0], "b": [2.0]}) is None


# --- which runs pair ----------------------------------------------------------------------------


def test_only_runs_that_differ_in_nothing_but_the_configuration_pair() -> None:
    """Two of the baseline's three seeds were computed at another commit: one pair is left."""
    ours = {(0, "old"): 6.02, (1, "new"): 6.01, (2, "new"): 6.08}
    theirs = {(0, "old"): 6.11, (1, "old"): 6.10, (2, "old"): 6.18}
    result = pair(ours, theirs)
    assert result.labels == ((0, "old"),) and result.pairs == ((6.02, 6.11),)
    assert len(result.left_out) == 4
    assert all("computed otherwise" in reason for reason in result.left_out)


def test_what_has_no_partner_is_named_and_unknown_compute_equals_nothing() -> None:
    result = pair({(0, "a"): 1.0, (3, "a"): 1.0}, {(0, "a"): 2.0})
    assert result.labels == ((0, "a"),)
    assert result.left_out == ("ours seed 3 (compute a): the other side has no run of this seed",)
    unknown = pair({(0, None): 1.0}, {(0, None): 2.0})
    assert unknown.labels == () and len(unknown.left_out) == 2
    assert "not recorded" in unknown.left_out[0]


def test_one_seed_computed_twice_is_one_pair() -> None:
    """Seed 0 at two micro-batches on both sides is no second seed."""
    side = {(0, "mb8"): 1.0, (0, "mb16"): 1.1, (1, "mb16"): 1.2}
    result = pair(side, {label: loss + 1 for label, loss in side.items()})
    assert result.labels == ((0, "mb16"), (1, "mb16"))
    assert len(result.left_out) == 2 and "paired as computed by mb16" in result.left_out[0]


# --- their noise --------------------------------------------------------------------------------


def labelled(*losses: float) -> dict[tuple[int, str | None], float]:
    return {(seed, "a"): loss for seed, loss in enumerate(losses)}


def test_the_noise_of_two_configurations_is_that_of_their_differences() -> None:
    a, b = (3.0, 3.2, 3.1), (2.9, 3.0, 3.0)
    noise = paired_noise({"a": labelled(*a), "b": labelled(*b)})
    assert noise is not None and noise.df == 2
    assert noise.sd * math.sqrt(2) == pytest.approx(np.std(np.subtract(a, b), ddof=1))


def test_pairs_of_other_configurations_add_degrees_of_freedom() -> None:
    """Residuals of a two-way table, against its textbook sum of squares."""
    table = np.random.default_rng(0).normal(3, 0.01, (4, 3))
    noise = paired_noise({str(i): labelled(*row) for i, row in enumerate(table)})
    left = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    assert noise is not None and noise.df == 6
    assert noise.sd == pytest.approx(math.sqrt((left**2).sum() / 6))


def test_a_seed_that_is_bad_for_all_is_no_noise_between_pairs() -> None:
    a, b = np.array([3.0, 3.2, 3.1]), np.array([2.9, 3.0, 3.0])
    shift = np.array([0.0, 1.0, -1.0])
    plain = paired_noise({"a": labelled(*a), "b": labelled(*b)})
    moved = paired_noise({"a": labelled(*a + shift), "b": labelled(*b + shift)})
    assert plain is not None and moved is not None
    assert moved.sd == pytest.approx(plain.sd)


def test_runs_without_a_partner_tell_no_paired_noise() -> None:
    assert paired_noise({"a": labelled(1.0, 2.0, 3.0)}) is None
    assert paired_noise({"a": {(0, "x"): 1.0, (1, "x"): 2.0}, "b": {(0, "y"): 1.0}}) is None
    assert paired_noise({"a": {(0, None): 1.0, (1, None): 2.0}, "b": {(0, None): 1.0}}) is None
    alone = {"a": labelled(1.0, 2.0), "b": labelled(1.5, 2.6)}
    more = {**alone, "c": {(7, "other"): 9.0}}
    few, with_another = paired_noise(alone), paired_noise(more)
    assert few is not None and with_another is not None
    assert (with_another.df, with_another.sd) == (few.df, pytest.approx(few.sd))


def test_the_same_seed_computed_twice_adds_no_degree_of_freedom() -> None:
    a, b, c = labelled(3.0, 3.2, 3.1), labelled(2.9, 3.0, 3.0), labelled(2.8, 3.1, 3.0)
    plain = paired_noise({"a": a, "b": b, "c": c})
    again = paired_noise({"a": {**a, (0, "b"): 3.001}, "b": {**b, (0, "b"): 2.901}, "c": c})
    assert plain is not None and plain.df == 4 and again == plain


def test_the_noise_is_unbiased_and_its_degrees_of_freedom_are_right() -> None:
    """1,000 tables of 3 configurations and 3 seeds: squares over sigma^2 are chi2 with 4 df."""
    rng = np.random.default_rng(1)
    squares = []
    for _ in range(1000):
        table = rng.normal(0, 0.02, (3, 3)) + rng.normal(0, 0.1, 3)
        noise = paired_noise({str(i): labelled(*row) for i, row in enumerate(table)})
        assert noise is not None and noise.df == 4
        squares.append(4 * noise.sd**2 / 0.02**2)
    assert stats.kstest(squares, stats.chi2(4).cdf).pvalue > 0.01
