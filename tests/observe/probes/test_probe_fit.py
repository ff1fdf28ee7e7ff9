"""Fits against closed forms, folds without leaks, scores against their definitions."""

from typing import Any, cast

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import r2_score, roc_auc_score
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler

from cutaway.artifacts.errors import CutawayError
from cutaway.observe.probes.fitting import (
    Scorer,
    Weights,
    accuracy_hits,
    check_folds,
    check_kind,
    choose,
    cross_validate,
    fit,
    fold_back,
    folds,
    probabilities,
)


def cloud(n: int = 80, d: int = 12, classes: int = 2, seed: int = 0, gap: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Classes with their own means, a stretched and turned covariance, and a large common offset."""
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    mix = generator.normal(size=(d, d)) * np.linspace(0.2, 3.0, d)
    means = gap * generator.normal(size=(classes, d))
    return 5.0 + means[labels] + generator.normal(size=(n, d)) @ mix, labels


def test_standardisation_is_folded_back_exactly() -> None:
    generator = np.random.default_rng(0)
    x, w, b = generator.normal(2.0, 3.0, (50, 7)), generator.normal(size=(7, 3)), generator.normal(size=3)
    mean, scale = x.mean(0), x.std(0)
    own, bias = fold_back(w, b, mean, scale)
    np.testing.assert_allclose(x @ own + bias, (x - mean) / scale @ w + b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_logistic_probe_is_scikit_learns_on_the_sites_own_values(classes: int) -> None:
    x, y = cloud(classes=classes)
    found = fit("logistic", x, y, classes, 0.1)
    scaler = StandardScaler().fit(x)
    oracle = LogisticRegression(C=0.1, max_iter=500).fit(scaler.transform(x), y)
    np.testing.assert_allclose(probabilities(found(x)), oracle.predict_proba(scaler.transform(x)), atol=1e-9)
    # the score's gradient with respect to the site's value, by finite differences of scikit-learn's own pipeline
    step = 1e-4 * np.eye(x.shape[1])
    slope = [
        (oracle.decision_function(scaler.transform(x[:1] + s)) - oracle.decision_function(scaler.transform(x[:1] - s)))
        / 2e-4
        for s in step
    ]
    np.testing.assert_allclose(found.matrices[0], np.array(slope).reshape(x.shape[1], -1), rtol=1e-5, atol=1e-8)


def test_a_ridge_probe_is_scikit_learns() -> None:
    x, _ = cloud()
    y = x @ np.linspace(-1, 1, 12) + np.random.default_rng(1).normal(size=len(x))
    found = fit("ridge", x, y, None, 0.01)
    scaler = StandardScaler().fit(x)
    oracle = Ridge(alpha=0.01 * len(x)).fit(scaler.transform(x), y)
    np.testing.assert_allclose(found(x)[:, 0], oracle.predict(scaler.transform(x)), rtol=1e-9)


def test_an_mlp_is_scikit_learns_with_the_scaling_in_its_first_layer() -> None:
    x, y = cloud(classes=3)
    found = fit("mlp", x, y, 3, 1.0, seed=3)
    scaler = StandardScaler().fit(x)
    oracle = MLPClassifier((32,), solver="lbfgs", alpha=1.0, max_iter=200, random_state=3).fit(scaler.transform(x), y)
    np.testing.assert_allclose(probabilities(found(x)), cast(Any, oracle.predict_proba(scaler.transform(x))), atol=1e-8)
    assert not found.linear


def test_mass_mean_is_the_difference_of_means_from_their_middle() -> None:
    x, y = cloud()
    found = fit("mass-mean", x, y, 2, None)
    up, down = x[y == 1].mean(0), x[y == 0].mean(0)
    np.testing.assert_allclose(found.matrices[0][:, 0], up - down, rtol=1e-12)
    np.testing.assert_allclose(found((up + down)[None] / 2), 0.0, atol=1e-9)
    # both sides are equally far from the middle
    np.testing.assert_allclose(found(up[None]), -found(down[None]), rtol=1e-9)


def test_whitened_mass_mean_is_the_closed_form_with_the_shrunk_covariance() -> None:
    """Linear discriminant analysis with equal priors, written out; Ledoit and Wolf's shrinkage by their formula."""
    x, y = cloud()
    means = np.stack([x[y == c].mean(0) for c in (0, 1)])
    centred = x - means[y]
    n, d = x.shape
    sample = centred.T @ centred / n
    mu = np.trace(sample) / d
    distance = ((sample - mu * np.eye(d)) ** 2).sum() / d
    spread = sum(((np.outer(row, row) - sample) ** 2).sum() for row in centred) / (d * n**2)
    share = min(spread, distance) / distance
    covariance = (1 - share) * sample + share * mu * np.eye(d)
    inverse = np.linalg.inv(covariance)
    direction = inverse @ (means[1] - means[0])
    found = fit("mass-mean-whitened", x, y, 2, None)
    np.testing.assert_allclose(found.matrices[0][:, 0], direction, rtol=1e-8)
    log_odds = [
        -0.5 * (row - means[1]) @ inverse @ (row - means[1]) + 0.5 * (row - means[0]) @ inverse @ (row - means[0])
        for row in x
    ]
    np.testing.assert_allclose(found(x)[:, 0], log_odds, rtol=1e-7, atol=1e-8)


def test_mass_mean_of_more_classes_is_the_nearest_mean() -> None:
    x, y = cloud(classes=4, gap=3.0)
    means = np.stack([x[y == c].mean(0) for c in range(4)])
    nearest = ((x[:, None] - means[None]) ** 2).sum(-1).argmin(1)
    np.testing.assert_array_equal(fit("mass-mean", x, y, 4, None)(x).argmax(1), nearest)


def test_a_constant_input_and_more_dimensions_than_examples_are_no_trouble() -> None:
    x, y = cloud(n=20, d=12)
    wide = np.concatenate([x, np.full((20, 1), 1e6), x[:, :8] * 0 + 3.0, x @ np.ones((12, 30))], 1)
    for kind in ("logistic", "mass-mean-whitened"):
        found = fit(kind, wide, y, 2, 0.1)
        assert np.isfinite(found.matrices[0]).all()
        assert abs(found.matrices[0][12]).max() < 1e-6  # nothing hangs on what never changes


# Folds


def test_no_group_is_on_both_sides() -> None:
    generator = np.random.default_rng(0)
    groups = generator.integers(0, 20, 100)
    labels = groups % 2
    seen = []
    for train, test in folds(labels, groups, 5, regression=False):
        assert not set(groups[train]) & set(groups[test])
        assert set(labels[train]) == {0, 1}
        seen += test.tolist()
    assert sorted(seen) == list(range(100))


def test_a_leak_between_the_texts_of_a_group_inflates_and_grouped_folds_do_not() -> None:
    """Each group has a random vector of its own and a random label: nothing can be learned for a new group."""
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 4)
    labels = generator.permutation(np.arange(60) % 2)[groups]
    x = generator.normal(size=(60, 40))[groups] + 0.1 * generator.normal(size=(240, 40))

    def auroc(by: np.ndarray) -> float:
        splits = folds(labels, by, 5, regression=False)
        cv = cross_validate("logistic", x, labels, by, 2, splits)
        return Scorer(labels, cv.scores, cv.fold, cv.baseline, 2)()

    assert auroc(np.arange(240)) > 0.95
    assert 0.3 < auroc(groups) < 0.7


def test_too_few_groups_says_how_many_are_needed() -> None:
    labels, groups = np.array([0] * 10 + [1] * 3), np.arange(13)
    with pytest.raises(CutawayError, match="'b' is in 3; give 2 more rows of it, or ask for 3 folds"):
        check_folds(labels, groups, ("a", "b"), 5)
    check_folds(labels, groups, ("a", "b"), 3)
    with pytest.raises(CutawayError, match="use 3 or more"):
        check_folds(labels, groups, ("a", "b"), 2)
    with pytest.raises(CutawayError, match="need at least 5 groups of texts; there are 4"):
        check_folds(np.linspace(0, 1, 12), np.arange(12) % 4, None, 5)


def test_kinds_that_do_not_fit_the_labels_are_refused() -> None:
    with pytest.raises(CutawayError, match="no kind of probe 'svm'"):
        check_kind("svm", False)
    with pytest.raises(CutawayError, match="use ridge or mlp"):
        check_kind("mass-mean", True)
    check_kind("ridge", True)


def test_the_strength_is_chosen_by_the_inner_folds_alone() -> None:
    """What the test fold holds must not move a thing that is fitted: its scores change, the weights behind do not."""
    x, y = cloud(n=60, gap=0.3)
    groups = np.arange(60)
    splits = folds(y, groups, 3, regression=False)
    before = cross_validate("logistic", x, y, groups, 2, splits)
    _, test = splits[0]
    changed = x.copy()
    changed[test] = 100.0
    after = cross_validate("logistic", changed, y, groups, 2, splits)
    assert after.inner[0] == before.inner[0]
    np.testing.assert_array_equal(after.held[0][0], before.held[0][0])
    assert np.ptp(after.scores[test]) == 0


def test_a_strong_regularisation_is_chosen_where_nothing_can_be_learned() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(60, 30)), np.arange(60) % 2
    weights, inner, (scores, labels) = choose("logistic", x, y, np.arange(60), 2)
    assert weights.chosen is not None
    assert weights.chosen <= 1e-3
    assert inner < 0.75
    assert len(scores) == len(labels) == 60


# Scores


def test_auroc_ranks_only_within_folds() -> None:
    """The second fold's fit has another zero; pooling would rank its negatives above the first fold's positives."""
    labels = np.array([1, 0, 1, 0])
    scores = np.array([[1.0], [0.0], [11.0], [10.0]])
    fold = np.array([0, 0, 1, 1])
    assert Scorer(labels, scores, fold, np.zeros(4), 2)() == 1.0
    assert roc_auc_score(labels, scores[:, 0]) == 0.75


@pytest.mark.parametrize("classes", [2, 4])
def test_auroc_of_one_fold_is_scikit_learns_with_weights(classes: int) -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, classes, 90)
    scores = generator.normal(size=(90, 1 if classes == 2 else classes)).round(1)  # with ties
    fold = np.zeros(90, dtype=int)
    counts = generator.integers(0, 3, 90).astype(float)
    if classes == 2:
        oracle = roc_auc_score(labels, scores[:, 0], sample_weight=counts)
    else:
        oracle = np.mean([roc_auc_score(labels == c, scores[:, c], sample_weight=counts) for c in range(classes)])
    assert Scorer(labels, scores, fold, np.zeros(90), classes)(counts) == pytest.approx(oracle, abs=1e-6)


def test_r2_is_zero_for_the_training_mean() -> None:
    generator = np.random.default_rng(0)
    y, fold = generator.normal(size=40), np.arange(40) % 2
    baseline = np.where(fold == 0, y[fold == 1].mean(), y[fold == 0].mean())
    assert Scorer(y, baseline[:, None], fold, baseline, None)() == pytest.approx(0.0)
    assert Scorer(y, y[:, None], fold, baseline, None)() == 1.0
    near = y + 0.1 * generator.normal(size=40)
    whole = np.full(40, y.mean())
    assert Scorer(y, near[:, None], fold * 0, whole, None)() == pytest.approx(r2_score(y, near))


def test_accuracy_and_weights_of_one_column() -> None:
    weights = Weights((np.array([[1.0], [-1.0]]),), (np.array([0.5]),))
    scores = weights(np.array([[1.0, 0.0], [0.0, 2.0]]))
    np.testing.assert_allclose(scores[:, 0], [1.5, -1.5])
    np.testing.assert_array_equal(accuracy_hits(np.array([1, 1]), scores), [True, False])
