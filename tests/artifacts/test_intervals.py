"""Intervals called 95 % hold the truth as often in simulation; q-values and p of many against their definitions.

Where no method reaches 0.93 the bound is what this one does, with the reason: eight values that are all zero say
nothing of the rare ones that are not.
"""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from scipy import stats

from cutaway.artifacts.results import interval_text
from cutaway.artifacts.statistics import (
    bootstrap_interval,
    bootstrap_weights,
    false_discovery,
    mean_intervals,
    median_interval,
    paired_t_p,
    ratio_intervals,
    resampled_intervals,
    sign_flip_p,
    sign_flip_p_of_each,
    student_intervals,
    wilson_interval,
)

Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
WORLDS = 4000
"""Samples drawn of each kind; the standard error of a share near 0.95 is 0.0035."""

KINDS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda g, size: g.standard_normal(size), 0.0),
    "uniform": (lambda g, size: g.uniform(size=size), 0.5),
    "heavy tails": (lambda g, size: g.standard_t(3, size), 0.0),
    "exponential": (lambda g, size: g.exponential(size=size), 1.0),
    "lognormal 0.5": (lambda g, size: g.lognormal(0, 0.5, size), float(np.exp(0.125))),
    "lognormal 1": (lambda g, size: g.lognormal(0, 1, size), float(np.exp(0.5))),
    "six in ten are zero": (lambda g, size: g.exponential(size=size) * (g.uniform(size=size) < 0.4), 0.4),
    "nine in ten are zero": (lambda g, size: g.exponential(size=size) * (g.uniform(size=size) < 0.1), 0.1),
}


def covered(ends: np.ndarray, truth: float) -> float:
    return float(((ends[0] <= truth) & (truth <= ends[1])).mean())


@pytest.mark.parametrize("n", [4, 8, 48])
@pytest.mark.parametrize("kind", KINDS)
def test_intervals_of_means_cover_as_they_say(kind: str, n: int) -> None:
    draw, truth = KINDS[kind]
    values = draw(np.random.default_rng(11), (WORLDS, n))
    share = covered(mean_intervals(values, 1000), truth)
    # what no method mends: too few values, or none of the rare ones among them (43 % of samples of 8, nine in ten zero)
    least = {
        ("lognormal 1", 4): 0.88, ("six in ten are zero", 4): 0.77, ("nine in ten are zero", 4): 0.30,
        ("lognormal 1", 8): 0.88, ("six in ten are zero", 8): 0.90, ("nine in ten are zero", 8): 0.51,
        ("nine in ten are zero", 48): 0.92,
    }.get((kind, n), 0.93)  # fmt: skip
    assert least <= share <= (0.985 if n == 4 else 0.975)
    student = covered(student_intervals(values), truth)
    if truth and kind != "uniform":
        assert share > student, "skew is what the resamples are for"


@pytest.mark.parametrize(("n", "resamples"), [(8, 1000), (48, 1000), (400, 400), (401, 2000), (1000, 2000)])
def test_intervals_of_many_values_cover_as_they_say(n: int, resamples: int) -> None:
    values = np.random.default_rng(12).lognormal(0, 0.8, (1000, n))
    share = covered(mean_intervals(values, resamples), float(np.exp(0.32)))
    assert (0.9 if n == 8 else 0.93) <= share <= 0.97


@pytest.mark.parametrize("n", [8, 48])
@pytest.mark.parametrize("kind", ["attention", "skewed above", "skewed below", "alike"])
def test_intervals_of_ratios_cover_as_they_say(kind: str, n: int) -> None:
    g, size = np.random.default_rng(13), (WORLDS, n)
    below = {
        "attention": g.gamma(2, 1, size) + 0.2, "skewed above": g.gamma(4, 1, size),
        "skewed below": g.lognormal(0, 0.6, size), "alike": g.uniform(0.8, 1.2, size),
    }[kind]  # fmt: skip
    above, truth = {
        "attention": (below * g.beta(2, 5, size), 2 / 7),
        "skewed above": (g.lognormal(0, 0.8, size), float(np.exp(0.32)) / 4),
        "skewed below": (below / 2 + g.normal(0, 0.3, size), 0.5),
        "alike": (below * g.normal(1, 0.2, size), 1.0),
    }[kind]
    assert 0.93 <= covered(ratio_intervals(above, below, 1000), truth) <= 0.97


@pytest.mark.parametrize(("n", "least"), [(8, 0.88), (48, 0.92)])
def test_intervals_of_any_statistic_cover_as_they_say(n: int, least: float) -> None:
    """Of a statistic given as a function: how much an example moves it is only fitted, which costs some coverage."""
    g = np.random.default_rng(14)
    inside = []
    for world in range(400):
        below = g.gamma(4, 1, n)
        rows = np.stack([below * g.beta(2, 5, n), below], 1)
        low, high = bootstrap_interval(rows, lambda r: r[:, 0].sum() / r[:, 1].sum(), n_resamples=600, seed=world)
        inside.append(low <= 2 / 7 <= high)
    assert least <= np.mean(inside) <= 0.98


@pytest.mark.parametrize("n", [8, 48])
def test_wilsons_interval_covers_as_it_says_over_all_shares(n: int) -> None:
    """Exactly, by counting: a share of yes and no takes n + 1 values, so that no interval covers 0.95 of each share."""
    ends = np.array([wilson_interval(k, n) for k in range(n + 1)])
    shares = np.linspace(0.005, 0.995, 199)
    chance = stats.binom.pmf(np.arange(n + 1), n, shares[:, None])
    inside = (ends[:, 0] <= shares[:, None]) & (shares[:, None] <= ends[:, 1])
    covers = (chance * inside).sum(1)
    assert 0.94 <= covers.mean() <= 0.965
    assert covers.min() >= 0.83  # near 0 and 1, where one more or fewer decides
    middle = (shares > 0.2) & (shares < 0.8)
    assert covers[middle].min() >= 0.91


def test_a_mean_of_one_and_the_same_value_has_no_width_and_nan_stays_where_it_is() -> None:
    table = np.array([[2.5] * 10, [np.nan, *range(9)], list(range(10))], dtype=float)
    low, high = mean_intervals(table)
    assert (low[0], high[0]) == (2.5, 2.5)
    assert np.isnan([low[1], high[1]]).all()
    alone = mean_intervals(table[2:])[:, 0]
    assert (low[2], high[2]) == pytest.approx(alone, rel=1e-12), "a row does not hang on the others"
    assert np.isnan(ratio_intervals(table[2], np.zeros(10))).all()
    assert np.isnan(mean_intervals(table[:, :1])).all()


@pytest.mark.parametrize("n", [2, 3, 401])
def test_few_and_very_many_values_have_students_interval(n: int) -> None:
    values = np.random.default_rng(n).exponential(size=n)
    expected = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
    assert bootstrap_interval(values) == pytest.approx(expected, rel=1e-9)
    assert tuple(student_intervals(values)) == pytest.approx(expected, rel=1e-9)


def test_the_studentised_interval_by_a_loop() -> None:
    """The definition, one resample at a time; each side between 0.9 and 2.5 times Student's."""
    g = np.random.default_rng(15)
    above, below = g.lognormal(0, 1, 12), g.gamma(4, 1, 12)

    def error(a: np.ndarray, b: np.ndarray, counts: np.ndarray) -> float:
        a, b = np.repeat(a, counts), np.repeat(b, counts)
        return float(np.sqrt(((a - a.sum() / b.sum() * b) ** 2).sum() / (12 * 11)) / b.mean())

    counts = np.rint(bootstrap_weights(12, 500, 3) * 12).astype(int)
    ratio = above.sum() / below.sum()
    far = [((k * above).sum() / (k * below).sum() - ratio) / error(above, below, k) for k in counts]
    own, usual = error(above, below, np.ones(12, dtype=int)), stats.t.ppf(0.975, 11)
    low, high = (np.clip(end, 0.9 * usual, 2.5 * usual) for end in (np.quantile(far, 0.975), -np.quantile(far, 0.025)))
    assert tuple(ratio_intervals(above, below, 500, 3)) == pytest.approx((ratio - low * own, ratio + high * own))


def test_a_mean_as_any_statistic_has_the_interval_of_a_mean() -> None:
    values = np.random.default_rng(16).exponential(size=30)
    weights = bootstrap_weights(30)
    found = resampled_intervals(values.mean(), weights @ values, weights)
    # there an example's share in a resample's own mean is taken out of its spread as well
    assert found == pytest.approx(mean_intervals(values), rel=1e-6)


@pytest.mark.parametrize("n", [3, 6, 7, 20, 51])
def test_the_interval_of_a_median_lies_between_two_values(n: int) -> None:
    values = np.random.default_rng(n).standard_normal(n)
    low, high = median_interval(values)
    assert low in values
    assert high in values
    rank = int((values < low).sum())
    assert (values > high).sum() == rank
    assert n < 6 or 2 * stats.binom.cdf(rank, n, 0.5) <= 0.05 < 2 * stats.binom.cdf(rank + 1, n, 0.5)


def q_by_definition(p: list[float]) -> list[float]:
    """The least rate at which each is still rejected: by trying every p as the threshold."""
    return [min(1.0, *(len(p) * t / sum(x <= t for x in p) for t in p if t >= one)) for one in p]


def test_q_is_the_least_rate_at_which_a_test_is_still_a_discovery() -> None:
    g = np.random.default_rng(17)
    for size in (1, 2, 7, 60):
        p = np.round(g.uniform(size=size) ** 3, 2) + 0.001  # with ties
        p = np.minimum(p, 1.0)
        q = false_discovery(p)
        assert q == pytest.approx(q_by_definition(p.tolist()))
        assert q == pytest.approx(stats.false_discovery_control(p))
    table = np.array([[0.01, np.nan], [0.04, 0.03]])
    assert false_discovery(table) == pytest.approx(np.array([[0.03, np.nan], [0.04, 0.04]]), nan_ok=True)
    assert false_discovery([]).shape == (0,)


def test_of_what_q_calls_a_discovery_one_in_twenty_is_false() -> None:
    g, false, true = np.random.default_rng(18), [], []
    for _ in range(2000):
        z = g.standard_normal(60)
        z[:10] += 4
        found = false_discovery(2 * stats.norm.sf(np.abs(z))) <= 0.05
        false.append(found[10:].sum() / max(1, found.sum()))
        true.append(found[:10].mean())
    assert 0.035 <= np.mean(false) <= 0.05  # 0.05 · 50 / 60
    assert np.mean(true) > 0.8


@pytest.mark.parametrize("n", [5, 14, 20])
def test_p_of_each_is_that_of_each_alone(n: int) -> None:
    table = np.random.default_rng(n).normal(0.3, 1, (6, n))
    table[1, :2] = np.nan
    table[2] = np.nan
    table[3] = 0
    found = sign_flip_p_of_each(table)
    for row, p in zip(table, found, strict=True):
        alone = row[~np.isnan(row)]
        assert p == pytest.approx(sign_flip_p(alone), nan_ok=True)
    if n == 5:
        patterns = np.array(list(product((1, -1), repeat=n)))
        assert found[0] == (np.abs(patterns @ table[0]) >= abs(table[0].sum()) - 1e-12).mean()


def test_p_of_paired_values_equals_scipy() -> None:
    table = np.random.default_rng(19).normal(0.5, 1, (5, 2, 8))
    assert paired_t_p(table) == pytest.approx(stats.ttest_1samp(table, 0, axis=-1)[1])
    assert paired_t_p([0.0, 0.0, 0.0]) == 1
    assert paired_t_p([1.0, 1.0, 1.0]) == 0
    assert np.isnan(paired_t_p([1.0]))


@pytest.mark.parametrize(
    ("interval", "decimals", "words", "written"),
    [
        ((0.79, 0.871), 3, {}, "[0.790, 0.871]"),
        ((0.997, 1.001), 2, {}, "[0.997, 1.001]"),
        ((0.99968, 0.99971), 3, {"to": True}, "0.99968 to 0.99971"),
        ((-0.25, 0.125), 2, {"signed": True}, "[-0.25, +0.12]"),
        ((0.5, 0.5), 2, {}, "[all 0.50]"),
        ((float("nan"), float("nan")), 2, {}, "–"),
        (None, 2, {"to": True}, "–"),
    ],
)
def test_the_ends_of_an_interval_are_written_apart(
    interval: tuple[float, float] | None, decimals: int, words: dict[str, bool], written: str
) -> None:
    assert interval_text(interval, decimals, **words) == written
