"""The area under the ROC curve, against its definition and scikit-learn: ties, weights, columns, parts."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from cutaway.artifacts.ranking import Ranking, auroc, auroc_columns


def auroc_by_counting(scores: list[float], labels: list[bool]) -> float:
    """The definition: pairs of a positive and a negative that are in order, ties for a half."""
    positive = [score for score, label in zip(scores, labels, strict=True) if label]
    negative = [score for score, label in zip(scores, labels, strict=True) if not label]
    wins = sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in product(positive, negative))
    return wins / (len(positive) * len(negative))


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=30))
def test_auroc_equals_counting_pairs_ties_included(items: list[tuple[int, bool]]) -> None:
    scores, labels = [float(s) for s, _ in items], [label for _, label in items]
    if all(labels) or not any(labels):
        assert math.isnan(auroc(scores, labels))
        return
    assert auroc(scores, labels) == pytest.approx(auroc_by_counting(scores, labels), abs=1e-12)
    assert auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_auroc_of_columns_is_that_of_each() -> None:
    generator = np.random.default_rng(0)
    labels = generator.random(500) < 0.1
    # mostly zero, as a sparse latent's activations are
    scores = np.maximum(generator.standard_normal((500, 7)) + labels[:, None] * np.arange(7), 0.0).astype(np.float32)
    columns = auroc_columns(scores, labels)
    assert columns.shape == (7,)
    for k in range(7):
        assert columns[k] == pytest.approx(roc_auc_score(labels, scores[:, k]), abs=1e-12)
    with pytest.raises(ValueError, match="500 scores"):
        auroc_columns(scores, labels[:-1])


@pytest.mark.parametrize("whole", [True, False])
def test_with_ties_and_weights_it_is_scikit_learns(whole: bool) -> None:
    generator = np.random.default_rng(1)
    scores = generator.integers(0, 6, (80, 4)).astype(float)
    labels = generator.random((3, 80)) < 0.4
    weights = generator.integers(0, 4, (3, 80)).astype(float) if whole else generator.random((3, 80))
    found = auroc_columns(scores, labels, weights)
    assert found.shape == (3, 4)
    for row, column in product(range(3), range(4)):
        expected = roc_auc_score(labels[row], scores[:, column], sample_weight=weights[row])
        assert found[row, column] == pytest.approx(expected, abs=1e-12)
        assert auroc(scores[:, column], labels[row], weights[row]) == pytest.approx(expected, abs=1e-12)


def test_what_cannot_be_ranked_has_none() -> None:
    scores = np.array([[1.0, math.nan], [2.0, 1.0], [3.0, 2.0]])
    found = auroc_columns(scores, [[False, True, True], [True, True, True]], [1.0, 2.0, 1.0])
    np.testing.assert_equal(found, [[1.0, math.nan], [math.nan, math.nan]])


def test_pairs_of_different_parts_are_not_compared() -> None:
    generator = np.random.default_rng(2)
    scores, part = generator.integers(0, 5, 60), generator.choice([0, 1, 3], 60)
    up, down = generator.integers(0, 3, (2, 7, 60)).astype(float)
    ranking = Ranking(scores, part, 4)
    above = (part[:, None] == part) * ((scores[:, None] > scores) + (scores[:, None] == scores) / 2)
    one = np.eye(4)[part]  # [n, parts]
    np.testing.assert_array_equal(ranking.won(up, down), np.einsum("ri,ij,rj,ip->rp", up, above, down, one))
    np.testing.assert_array_equal(ranking.sums(up), up @ one)
    nothing = Ranking(scores[:0], part[:0], 4)
    assert not nothing.won(up[:, :0], down[:, :0]).any()
    assert not nothing.sums(up[:, :0]).any()
