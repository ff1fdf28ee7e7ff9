"""Fitting probes: four kinds, cross-validated without letting a group stand on both sides of a fold.

Fits are scikit-learn's. What comes out is plain weights that act on the site's own values: standardisation is folded
back, w = w' / σ and b = b' − w'·μ / σ, so a direction can be used in the model as it is.

    logistic            L2-regularised logistic regression on standardised inputs
    mass-mean           w_c = mean of class c, b_c = −½ |w_c|²: the score difference of two classes is the projection on
                        the difference of their means from the middle between them (Marks & Tegmark 2023)
    mass-mean-whitened  the same in the metric of the covariance within classes, shrunk as Ledoit & Wolf (2004) say,
                        since it has no inverse where examples are fewer than dimensions
    ridge               L2-regularised least squares on standardised inputs; for classes, least squares on ±1
    mlp                 one hidden layer of 32 rectified units on standardised inputs
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.ranking import Ranking

ProbeKind = Literal["logistic", "mass-mean", "mass-mean-whitened", "ridge", "mlp"]
_KINDS: tuple[str, ...] = get_args(ProbeKind)
Fold = tuple[np.ndarray, np.ndarray]

# regularisation strengths to choose from, strongest first: C of logistic, alpha of ridge (a share of n) and of the MLP
_GRID: dict[str, tuple[float, ...]] = {
    "logistic": (1e-4, 1e-3, 1e-2, 1e-1, 1.0),
    "ridge": (10.0, 1.0, 1e-1, 1e-2, 1e-3),
    "mlp": (10.0, 0.1),
}
_SPARSE_GRID = {"logistic": (1e-2, 1e-1, 1.0, 10.0), "ridge": (1e-1, 1e-2, 1e-3, 1e-4)}  # counts, not standardised
_HIDDEN = 32


@dataclass(frozen=True, eq=False)
class Weights:
    """A fitted function: `matrices` [in, out] with `biases` [out], rectified in between; linear when there is one.

    The output has one column for two classes (its sign decides) and for a regression, one per class for more.
    `chosen` is the regularisation that the inner folds chose, None where there is none.
    """

    matrices: tuple[np.ndarray, ...]
    biases: tuple[np.ndarray, ...]
    chosen: float | None = None

    @property
    def linear(self) -> bool:
        return len(self.matrices) == 1

    def __call__(self, features: Any) -> np.ndarray:
        """Scores [n, columns] in float64 of features [n, width]; a sparse matrix will do where linear."""
        value = features
        for i, (matrix, bias) in enumerate(zip(self.matrices, self.biases, strict=True)):
            dense = value if hasattr(value, "tocsr") else np.asarray(value, dtype=np.float64)
            value = np.asarray(dense @ matrix) + bias
            if i + 1 < len(self.matrices):
                value = np.maximum(value, 0.0)
        return value


def check_kind(kind: str, regression: bool) -> None:
    """Raises CutawayError for an unknown kind, or one that does not fit the labels."""
    if kind not in _KINDS:
        raise CutawayError(f"There is no kind of probe {kind!r}; use one of {', '.join(_KINDS)}.")
    if regression and kind not in ("ridge", "mlp"):
        raise CutawayError(f"The labels are numbers, which a {kind} probe does not predict; use ridge or mlp.")


def fold_back(
    matrix: np.ndarray, bias: np.ndarray, mean: np.ndarray, scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weights [in, out] and bias [out] on standardised inputs (x − mean) / scale, as weights and bias on x."""
    own = matrix / scale[:, None]
    return own, bias - mean @ own


def probabilities(scores: np.ndarray) -> np.ndarray:
    """Probabilities [n, classes] from scores: logistic of one column (two classes), softmax of several."""
    from scipy.special import expit, softmax

    if scores.shape[1] == 1:
        positive = expit(scores[:, 0])
        return np.stack([1 - positive, positive], 1)
    return softmax(scores, axis=1)


def fit(
    kind: ProbeKind, features: Any, labels: np.ndarray, n_classes: int | None, strength: float | None, seed: int = 0
) -> Weights:
    """One fit with a given regularisation. `n_classes` is None for a regression; `features` [n, width] may be sparse
    for logistic and ridge (then nothing is standardised)."""
    if kind == "mass-mean" or kind == "mass-mean-whitened":
        assert n_classes is not None
        return _mass_mean(features, labels, n_classes, whiten=kind == "mass-mean-whitened")
    assert strength is not None
    sparse = hasattr(features, "tocsr")
    if sparse:
        inputs, mean, scale = features, np.zeros(features.shape[1]), np.ones(features.shape[1])
    else:
        inputs = np.asarray(features, dtype=np.float64)
        mean, scale = inputs.mean(0), inputs.std(0)
        scale[scale <= 1e-12 * np.abs(inputs).max(initial=1.0)] = 1.0  # a constant says nothing; do not blow it up
        inputs = (inputs - mean) / scale
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a strength that does not converge loses in the inner folds
        matrices, biases = _ESTIMATORS[kind](inputs, labels, n_classes, strength, seed)
    matrices[0], biases[0] = fold_back(matrices[0], biases[0], mean, scale)
    return Weights(tuple(matrices), tuple(biases), strength)


def _logistic(x: Any, y: np.ndarray, n_classes: int | None, strength: float, seed: int) -> tuple[list, list]:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength, max_iter=500).fit(x, y)
    return [model.coef_.T], [model.intercept_]


def _ridge(x: Any, y: np.ndarray, n_classes: int | None, strength: float, seed: int) -> tuple[list, list]:
    from sklearn.linear_model import Ridge

    target = y if n_classes is None else np.where(np.arange(n_classes) == y[:, None], 1.0, -1.0)
    if n_classes == 2:
        target = target[:, 1]
    model = Ridge(alpha=strength * x.shape[0]).fit(x, target)
    return [np.atleast_2d(model.coef_).T], [np.atleast_1d(model.intercept_)]


def _mlp(x: Any, y: np.ndarray, n_classes: int | None, strength: float, seed: int) -> tuple[list, list]:
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    make: Any = MLPRegressor if n_classes is None else MLPClassifier
    # L-BFGS: exact gradients of few examples, no learning rate, and the same weights for the same seed
    model = make((_HIDDEN,), solver="lbfgs", alpha=strength, max_iter=200, random_state=seed).fit(x, y)
    return list(model.coefs_), list(model.intercepts_)


_ESTIMATORS: dict[str, Callable[..., tuple[list, list]]] = {"logistic": _logistic, "ridge": _ridge, "mlp": _mlp}


def _mass_mean(features: Any, labels: np.ndarray, n_classes: int, whiten: bool) -> Weights:
    x = np.asarray(features, dtype=np.float64)
    means = np.stack([x[labels == c].mean(0) for c in range(n_classes)])  # [classes, width]
    directions = means
    if whiten:
        from sklearn.covariance import ledoit_wolf

        covariance, _ = ledoit_wolf(x - means[labels], assume_centered=True)
        directions = np.linalg.solve(covariance, means.T).T
    biases = -0.5 * (directions * means).sum(1)
    if n_classes == 2:
        directions, biases = directions[1:] - directions[:1], biases[1:] - biases[:1]
    return Weights((directions.T,), (biases,))


# Folds --------------------------------------------------------------------------------------------------------------


def folds(labels: np.ndarray, groups: np.ndarray, n: int, *, regression: bool, seed: int = 0) -> list[Fold]:
    """n (train, test) pairs of example numbers; no group stands in both, classes are spread evenly (for classes)."""
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    splitter: Any = (GroupKFold if regression else StratifiedGroupKFold)(n, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class with fewer groups than folds is refused before
        return list(splitter.split(np.zeros((len(labels), 1)), labels, groups))


def _groups_a_class(labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """In how many groups each class occurs, [classes]."""
    return np.array([len(np.unique(groups[labels == c])) for c in range(int(labels.max()) + 1)])


def check_folds(labels: np.ndarray, groups: np.ndarray, classes: tuple[str, ...] | None, n: int) -> None:
    """Raises CutawayError when the examples do not suffice for n folds, saying how many are needed."""
    if n < 3:
        raise CutawayError(f"{n} folds leave too little to fit on; use 3 or more.")
    if classes is None:
        have = len(np.unique(groups))
        if have < n:
            raise CutawayError(f"{n} folds need at least {n} groups of texts; there are {have}. Give more rows.")
        return
    counts = _groups_a_class(labels, groups)
    least = int(counts.argmin())
    if counts[least] < n:
        raise CutawayError(
            f"{n} folds need each class in at least {n} different texts or groups, but {classes[least]!r} is in "
            f"{counts[least]}; give {n - counts[least]} more rows of it"
            + (f", or ask for {max(3, counts[least])} folds." if counts[least] >= 3 else ".")
        )


@dataclass(frozen=True, eq=False)
class CrossValidated:
    """Out-of-fold results: `scores` [n, columns] and `fold` [n] of each example (−1: in no test fold).

    `baseline` [n] is the training folds' mean target (regressions). `inner` [folds] is the score that the inner folds
    gave the chosen strength, by which layers can be compared without looking at a test fold. `held` are, fold by fold,
    the inner out-of-fold (scores, labels) of the training examples: what a calibration may be fitted on.
    """

    scores: np.ndarray
    fold: np.ndarray
    baseline: np.ndarray
    inner: np.ndarray
    held: tuple[tuple[np.ndarray, np.ndarray], ...]
    n_classes: int | None

    @property
    def probabilities(self) -> np.ndarray:
        return probabilities(self.scores)


def choose(
    kind: ProbeKind,
    features: Any,
    labels: np.ndarray,
    groups: np.ndarray,
    n_classes: int | None,
    *,
    seed: int = 0,
    inner: int = 3,
) -> tuple[Weights, float, tuple[np.ndarray, np.ndarray]]:
    """Fit with the regularisation that `inner` grouped folds of these examples prefer.

    The strength is the one with the smallest loss in the inner folds: squared error, or the labels' negative
    log-likelihood. Returns the fit on all examples, that strength's inner score (AUROC or R²), and its out-of-fold
    (scores, labels).
    """
    most = len(np.unique(groups)) if n_classes is None else int(_groups_a_class(labels, groups).min())
    splits = folds(labels, groups, max(2, min(inner, most)), regression=n_classes is None, seed=seed)
    # every training side must know every class
    splits = [s for s in splits if n_classes is None or len(np.unique(labels[s[0]])) == n_classes]
    table = _SPARSE_GRID if hasattr(features, "tocsr") else _GRID
    grid: Sequence[float | None] = table.get(kind, (None,))
    best: tuple[float, float | None, np.ndarray, np.ndarray, np.ndarray] | None = None
    for candidate in grid:
        columns = 1 if n_classes is None or n_classes == 2 else n_classes
        scores, fold = np.full((len(labels), columns), np.nan), np.full(len(labels), -1)
        baseline = np.zeros(len(labels))
        for i, (train, test) in enumerate(splits):
            weights = fit(kind, features[train], labels[train], n_classes, candidate, seed)
            scores[test], fold[test], baseline[test] = weights(features[test]), i, labels[train].mean()
        known = fold >= 0
        # by a loss, not by ranks: where many strengths rank perfectly, the strongest would be chosen and be timid
        fits = -_loss(kind, scores[known], labels[known], n_classes) if known.any() else float("nan")
        if best is None or fits > best[0] + 1e-12:
            best = (fits, candidate, scores, fold, baseline)
    assert best is not None
    _, chosen, scores, fold, baseline = best
    known = fold >= 0
    value = score(labels, scores, fold, baseline, n_classes)
    return fit(kind, features, labels, n_classes, chosen, seed), value, (scores[known], labels[known])


def _loss(kind: str, scores: np.ndarray, labels: np.ndarray, n_classes: int | None) -> float:
    """What a kind of probe is fitted to make small: squared error, or the labels' negative log-likelihood."""
    if n_classes is None:
        return float(((scores[:, 0] - labels) ** 2).mean())
    if kind == "ridge":
        target = np.where(np.arange(n_classes) == labels[:, None], 1.0, -1.0)
        return float(((scores - (target[:, 1:] if n_classes == 2 else target)) ** 2).mean())
    chances = probabilities(scores)[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(chances, 1e-12)).mean())


def cross_validate(
    kind: ProbeKind,
    features: Any,
    labels: np.ndarray,
    groups: np.ndarray,
    n_classes: int | None,
    splits: Sequence[Fold],
    *,
    strength: float | None = None,
    seed: int = 0,
) -> CrossValidated:
    """Out-of-fold scores; each fold's regularisation is chosen within its training side alone.

    With a `strength` nothing is chosen, and `inner` is NaN and `held` empty.
    """
    n = len(labels)
    columns = 1 if n_classes is None or n_classes == 2 else n_classes
    scores, fold, baseline = np.full((n, columns), np.nan), np.full(n, -1), np.zeros(n)
    inner, held = [], []
    for i, (train, test) in enumerate(splits):
        if n_classes is not None and len(np.unique(labels[train])) < n_classes:
            continue  # a fold whose training side lacks a class cannot judge; its test examples count nowhere
        if strength is not None:
            weights = fit(kind, features[train], labels[train], n_classes, strength, seed)
            value, out = float("nan"), (np.empty((0, columns)), np.empty(0))
        else:
            weights, value, out = choose(kind, features[train], labels[train], groups[train], n_classes, seed=seed)
        scores[test], fold[test], baseline[test] = weights(features[test]), i, labels[train].mean()
        inner.append(value)
        held.append(out)
    if not inner:
        raise CutawayError("No fold has every class on its training side; give more groups of each class.")
    return CrossValidated(scores, fold, baseline, np.array(inner), tuple(held), n_classes)


# Scores -------------------------------------------------------------------------------------------------------------


def score(
    labels: np.ndarray,
    scores: np.ndarray,
    fold: np.ndarray,
    baseline: np.ndarray,
    n_classes: int | None,
    weights: np.ndarray | None = None,
) -> float:
    """AUROC (macro, one class against the rest, for more than two) or R², out of fold.

    Only examples of one fold are ranked against each other: scores of different fits do not share a zero. R² is
    1 − Σ(y − ŷ)² / Σ(y − training mean)², so that predicting the training mean gives exactly 0. `weights` [n] counts
    each example (a bootstrap draw).
    """
    return Scorer(labels, scores, fold, baseline, n_classes)(weights)


class Scorer:
    """`score` for many weightings, or other labels, of the same examples: they are ranked once."""

    def __init__(
        self, labels: np.ndarray, scores: np.ndarray, fold: np.ndarray, baseline: np.ndarray, n_classes: int | None
    ) -> None:
        self._labels, self._scores, self._baseline = labels, scores, baseline
        self._known = fold >= 0
        self._rankings: dict[int, Ranking] | None = None
        if n_classes is not None:
            folds, part = np.unique(fold[self._known], return_inverse=True)
            self._rankings = {
                c: Ranking(scores[self._known, 0 if scores.shape[1] == 1 else c], part, len(folds))
                for c in (range(1, 2) if n_classes == 2 else range(n_classes))
            }

    def __call__(self, weights: np.ndarray | None = None) -> float:
        return float(self.of(self._labels, weights))

    def of(self, labels: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """The score of many labellings [..., n] of the same scores [...]."""
        w = np.ones(len(self._known)) if weights is None else weights
        if self._rankings is None:
            error, spread = labels - self._scores[:, 0], labels - self._baseline
            total = (w * spread**2)[..., self._known].sum(-1)
            return 1 - (w * error**2)[..., self._known].sum(-1) / np.where(total > 0, total, np.nan)
        values = []
        for c, ranking in self._rankings.items():
            positive, negative = ((w * side)[..., self._known] for side in (labels == c, labels != c))
            pairs = (ranking.sums(positive) * ranking.sums(negative)).sum(-1)
            values.append(ranking.won(positive, negative).sum(-1) / np.where(pairs > 0, pairs, np.nan))
        return np.mean(values, axis=0)


def accuracy_hits(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Which examples the scores put into their class, bool [n]."""
    predicted = (scores[:, 0] > 0).astype(int) if scores.shape[1] == 1 else scores.argmax(1)
    return predicted == labels
