"""Intervals and AUROC against their definitions."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cutaway.artifacts.statistics import (
    bootstrap_interval,
    bootstrap_weights,
    mean_intervals,
    sign_flip_p,
    sign_flip_p_of_many,
    wilson_interval,
)


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_equals_scipy(counts: tuple[int, int]) -> None:
    successes, n = counts
    expected = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    low, high = wilson_interval(successes, n)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0.0 <= low <= successes / n <= high <= 1.0


def test_wilson_at_its_edges() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(20, 20)[1] == 1.0
    assert wilson_interval(0, 20)[0] == 0.0
    low, high = wilson_interval(5, 20, level=0.5)
    assert high - low < wilson_interval(5, 20)[1] - wilson_interval(5, 20)[0]
    with pytest.raises(ValueError, match="21 successes of 20"):
        wilson_interval(21, 20)


def test_bootstrap_of_a_mean_agrees_with_scipy_and_with_theory() -> None:
    values = np.random.default_rng(1).standard_normal(400) * 3 + 5
    low, high = bootstrap_interval(values, n_resamples=4000)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    standard_error = values.std(ddof=1) / 20
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.15 * standard_error)
    assert (low, high) == pytest.approx(
        (values.mean() - 1.96 * standard_error, values.mean() + 1.96 * standard_error), abs=0.2 * standard_error
    )


def test_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    hits = 0
    for seed in range(200):
        low, high = bootstrap_interval(generator.exponential(1.0, 100), n_resamples=300, seed=seed)
        hits += low <= 1.0 <= high
    assert 0.86 <= hits / 200 <= 0.99


def test_bootstrap_draws_whole_rows_for_any_statistic() -> None:
    generator = np.random.default_rng(4)
    x = generator.standard_normal(300)
    rows = np.stack([x, 2 * x + generator.standard_normal(300)], axis=1)
    low, high = bootstrap_interval(rows, lambda r: np.polyfit(r[:, 0], r[:, 1], 1)[0], n_resamples=400)
    assert 1.7 < low < 2.0 < high < 2.3


def test_bootstrap_is_the_same_for_a_seed_and_absent_for_one_value() -> None:
    values = np.random.default_rng(5).standard_normal(50)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)
    assert bootstrap_interval([3.0] * 10) == (3.0, 3.0)
    assert all(math.isnan(end) for end in bootstrap_interval([3.0]))
    assert all(math.isnan(end) for end in bootstrap_interval([]))


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_sign_flip_p_counts_every_pattern(n: int) -> None:
    values = np.random.default_rng(n).normal(0.4, 1, n)
    patterns = list(product((1, -1), repeat=n))
    extreme = sum(abs(np.dot(signs, values)) >= abs(values.sum()) - 1e-12 for signs in patterns)
    assert sign_flip_p(values) == extreme / len(patterns)
    assert sign_flip_p(np.abs(values) + 0.01) == 2 / 2**n  # all of one sign: only its mirror is as far out


@pytest.mark.parametrize("n", [2, 4, 9])
def test_sign_flip_p_equals_scipy(n: int) -> None:
    values = np.random.default_rng(n).normal(0.3, 1.0, n)
    expected = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=10**6)
    assert sign_flip_p(values) == pytest.approx(expected.pvalue)


def test_sign_flip_p_by_drawing_is_near_the_exact_one() -> None:
    values = np.random.default_rng(3).normal(0.35, 1, 16)
    patterns = np.array(list(product((1, -1), repeat=16)))
    exact = float(np.mean(np.abs(patterns @ values) >= abs(values.sum()) - 1e-12))
    drawn = sign_flip_p(values)
    assert abs(drawn - exact) < 4 * math.sqrt(exact * (1 - exact) / 9999)
    assert drawn == sign_flip_p(values)
    assert sign_flip_p(np.ones(40), n_draws=99) == 1 / 100  # never 0
    assert math.isnan(sign_flip_p([]))
    assert sign_flip_p(np.zeros(20)) == 1.0


def test_sign_flip_p_of_many_is_held_against_the_largest_of_all() -> None:
    rng = np.random.default_rng(5)
    table = np.stack([rng.normal(mean, scale, 7) for mean, scale in ((0.0, 1.0), (1.2, 1.0), (9.0, 8.0))])
    sizes = [math.sqrt(sum(x * x for x in row)) for row in table]
    largest = [
        max(
            abs(sum(s * x for s, x in zip(signs, row, strict=True))) / size
            for row, size in zip(table, sizes, strict=True)
        )
        for signs in product((1, -1), repeat=7)
    ]
    expected = [
        sum(one >= abs(row.sum()) / size - 1e-12 for one in largest) / 2**7
        for row, size in zip(table, sizes, strict=True)
    ]
    found = sign_flip_p_of_many(table)
    assert found.tolist() == pytest.approx(expected)
    assert all(many >= sign_flip_p(row) for many, row in zip(found, table, strict=True))
    assert sign_flip_p_of_many(table[1:2])[0] == sign_flip_p(table[1])  # one alone needs no correction
    holed = np.concatenate([table, np.full((1, 7), np.nan), np.zeros((1, 7))])
    assert sign_flip_p_of_many(holed)[:3].tolist() == found.tolist()
    assert math.isnan(sign_flip_p_of_many(holed)[3])
    assert sign_flip_p_of_many(holed)[4] == 1.0


def test_the_corrected_p_is_rarely_small_where_there_is_nothing() -> None:
    rng = np.random.default_rng(6)
    small = [sign_flip_p_of_many(rng.normal(0, 1, (30, 20)), n_draws=199, seed=i).min() <= 0.05 for i in range(200)]
    assert 0.01 <= np.mean(small) <= 0.10  # 0.05 is meant; uncorrected it is 0.79


def test_many_means_are_resampled_together() -> None:
    """Against drawing the examples one by one: the same spread, and each mean's own interval."""
    generator = np.random.default_rng(0)
    values = np.stack([generator.normal(0, 1, 200), generator.normal(5, 3, 200)])
    low, high = mean_intervals(values, 4000)
    for row, a, b in zip(values, low, high, strict=True):
        one, other = bootstrap_interval(row, n_resamples=4000)
        assert abs(a - one) < 0.1 * (other - one)
        assert abs(b - other) < 0.1 * (other - one)
    weights = bootstrap_weights(7, 50)
    assert weights.shape == (50, 7)
    assert np.allclose(weights.sum(1), 1)
    assert np.allclose(weights * 7, np.round(weights * 7))  # whole draws
    assert np.isnan(mean_intervals(values[:, :1])).all()
    assert mean_intervals(values[None]).shape == (2, 1, 2)
