"""The shuffled order: one-to-one for every size, uniform, and the same wherever it is entered."""

from itertools import permutations

import numpy as np
import pytest
from scipy.stats import chisquare

from cutaway.data.harvesting import permutation
from cutaway.data.harvesting.permutation import Permutation


@pytest.fixture(params=["table", "network"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "network":
        monkeypatch.setattr(permutation, "_TABLE", 1)
    return request.param


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 10, 97, 1000, 4096, 65537])
def test_it_is_one_to_one(kind: str, n: int) -> None:
    order = Permutation(n, seed=3, epoch=1)
    whole = order[np.arange(n)]
    assert sorted(whole.tolist()) == list(range(n))
    assert len(order) == n


def test_it_is_the_same_wherever_it_is_entered(kind: str) -> None:
    order = Permutation(1000, seed=3)
    whole = order[np.arange(1000)]
    assert np.array_equal(Permutation(1000, seed=3)[np.arange(400, 420)], whole[400:420])
    assert not np.array_equal(Permutation(1000, seed=4)[np.arange(1000)], whole)
    assert not np.array_equal(Permutation(1000, seed=3, epoch=1)[np.arange(1000)], whole)


def test_every_thing_is_as_likely_at_every_place(kind: str) -> None:
    """Chi-square of where a thing comes to lie, and of which follows which, over many seeds."""
    n, draws = 12, 4000
    where = np.zeros((n, n))
    follows = np.zeros((n, n))
    for seed in range(draws):
        order = Permutation(n, seed)[np.arange(n)]
        where[np.arange(n), order] += 1
        follows[order[:-1], order[1:]] += 1
    assert chisquare(where.ravel()).pvalue > 1e-3
    pairs = follows[~np.eye(n, dtype=bool)]
    assert chisquare(pairs).pvalue > 1e-3


def test_every_order_of_few_things_is_as_likely() -> None:
    """A table is exactly uniform; a network is used for a million things and more."""
    names = {order: number for number, order in enumerate(permutations(range(4)))}
    counts = np.zeros(24)
    for seed in range(4800):
        counts[names[tuple(Permutation(4, seed)[np.arange(4)].tolist())]] += 1
    assert chisquare(counts).pvalue > 1e-3


def test_a_large_order_spreads_neighbours() -> None:
    """2e9 things, of which a stretch is spread evenly over the whole; without a table."""
    n = 2_000_000_011
    found = Permutation(n, seed=1)[np.arange(10**9, 10**9 + 200_000)]
    assert found.min() >= 0
    assert found.max() < n
    assert len(np.unique(found)) == len(found)
    assert chisquare(np.histogram(found, bins=100, range=(0, n))[0]).pvalue > 1e-3
    steps = np.diff(found)
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.02
    assert (np.abs(steps) > n / 100).mean() > 0.97


def test_no_negative_size() -> None:
    with pytest.raises(ValueError, match="-1"):
        Permutation(-1)
