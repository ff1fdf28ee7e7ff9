"""What a probe's figure stands beside: the same measurement where there is nothing of the model to find.

- shuffled labels: labels dealt out anew among groups; what remains is chance.
- control task (Hewitt & Liang 2019): every type (a token, or a named group) gets a random label of its own. A probe
  that does this well memorises; selectivity is the real task minus it, both with types on both sides of a fold.
- bag of tokens: the counts of the tokens read so far, without the model.
- position and length: where in the text the example stands, and how long the text is.
- embedding: the token embeddings at the same position rule, before any layer.
- untrained model: the same site of the same architecture with new random weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cutaway.artifacts.results import Control
from cutaway.artifacts.statistics import bootstrap_interval, ratio_intervals, wilson_interval
from cutaway.observe.probes.data import ProbeData
from cutaway.observe.probes.fitting import CrossValidated, Fold, ProbeKind, Scorer, cross_validate

_RESAMPLES = 1000


def shuffled_labels(labels: np.ndarray, groups: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Labels dealt out anew. Where each group has one label, whole groups trade theirs, as dependent as before."""
    number, first = np.unique(groups, return_index=True)
    one = labels[first]
    index = np.searchsorted(number, groups)
    if (labels == one[index]).all():
        return generator.permutation(one)[index]
    return generator.permutation(labels)


def control_types(data: ProbeData) -> tuple[np.ndarray, str] | None:
    """The types of the control task, a number per example, and what they are; None where no type comes twice.

    Groups that the caller named, else the token that is read.
    """
    for types, what in ((data.groups if data.named_groups else None, "group"), (data.token_ids(), "token")):
        if types is None or (types < 0).all():
            continue
        numbers, counts = np.unique(types, return_inverse=True, return_counts=True)[1:]
        if len(counts) >= 4 and counts[numbers].mean() >= 2:
            return numbers, what
    return None


def control_labels(types: np.ndarray, labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """One random label per type, drawn as often as it occurs among the examples; every class is drawn."""
    wanted = np.unique(labels)
    n_types = int(types.max()) + 1
    for _ in range(1000):
        drawn = generator.choice(labels, size=n_types)[types]
        if len(np.unique(drawn)) == len(wanted) or labels.dtype.kind == "f":
            return drawn
    return drawn  # pyright: ignore[reportPossiblyUnboundVariable]


def bag_of_tokens(data: ProbeData) -> Any:
    """Counts of the tokens up to each example's position (all of them for a mean), CSR [n, tokens seen].

    Where every token (or word) is an example, the token itself has columns of its own besides.
    """
    from scipy.sparse import csr_matrix, hstack

    ids = [np.array(data.tokens.row_ids(row)) for row in range(len(data.tokens))]
    seen, numbers = np.unique(np.concatenate(ids), return_inverse=True)
    bounds = np.cumsum([0, *map(len, ids)])
    rows = [numbers[bounds[i] : bounds[i + 1]] for i in range(len(ids))]
    columns = [rows[r] if p < 0 else rows[r][: p + 1] for r, p in zip(data.row, data.at, strict=True)]
    pointers = np.cumsum([0, *map(len, columns)])
    counts = csr_matrix(
        (np.ones(pointers[-1]), np.concatenate(columns), pointers), shape=(len(data), len(seen)), dtype=np.float64
    )
    counts.sum_duplicates()
    if data.rule not in ("every", "words"):
        return counts
    own = np.array([rows[r][p] for r, p in zip(data.row, data.at, strict=True)])
    one = csr_matrix((np.ones(len(data)), own, np.arange(len(data) + 1)), shape=counts.shape)
    return hstack([counts, one]).tocsr()


def _position_features(data: ProbeData) -> np.ndarray:
    """Position (the middle for a mean), length, and their ratio, [n, 3]."""
    length = data.tokens.lengths.cpu().numpy()[data.row].astype(float)
    at = np.where(data.at < 0, (length - 1) / 2, data.at)
    return np.stack([at, length, at / length], 1)


@dataclass(frozen=True)
class ScoredFolds:
    """A cross-validated score with its interval over groups."""

    value: float
    interval: tuple[float, float]
    cv: CrossValidated


def group_interval(scorer: Scorer, groups: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Interval of an out-of-fold score: whole groups are drawn, since their examples are not independent.

    The fits stay as they are, so it says how sure the score of these probes is, not how much another training set
    would change them. A resample that has one class only has no score and is left out.
    """
    numbers = np.unique(groups, return_inverse=True)[1]
    size = int(numbers.max()) + 1

    def statistic(drawn: np.ndarray) -> float:
        return scorer(np.bincount(drawn.astype(int), minlength=size)[numbers].astype(float))

    bounds = (-np.inf, 1.0)
    low, high = bootstrap_interval(np.arange(size), statistic, n_resamples=_RESAMPLES, seed=seed, bounds=bounds)
    # no resample of a perfect score varies, but among more groups there may be one that is not
    return (wilson_interval(size, size)[0], 1.0) if low == high == 1 else (low, high)


def chance_p(cv: CrossValidated, labels: np.ndarray, groups: np.ndarray, *, draws: int = 999, seed: int = 0) -> float:
    """p that an out-of-fold score is as high by chance: one-sided, labels dealt out anew (as `shuffled_labels` does).

    The scores stay as they are, each fold's made by a fit that has not seen its labels. One is added to both counts.
    """
    generator = np.random.default_rng(seed + 3)
    drawn = np.stack([labels, *(shuffled_labels(labels, groups, generator) for _ in range(draws))])
    scorer = Scorer(labels, cv.scores, cv.fold, cv.baseline, cv.n_classes)
    some = np.array_split(drawn, drawn.size // 2**22 + 1)  # of which several copies are made
    found = np.concatenate([scorer.of(part) for part in some])
    if np.isnan(found[0]):
        return float("nan")
    return float(1 + (found[1:] >= found[0] - 1e-12).sum()) / (draws + 1)


def mean_interval(values: np.ndarray, groups: np.ndarray, seed: int, *, share: bool = False) -> tuple[float, float]:
    """Interval of a mean whose examples depend on each other within a group; of a `share`, values are 0 or 1."""
    numbers = np.unique(groups, return_inverse=True)[1]
    sums, sizes = np.bincount(numbers, values), np.bincount(numbers)
    low, high = map(float, ratio_intervals(sums, sizes, seed=seed))
    if not share:
        return low, high
    if low == high:  # all right or all wrong
        return wilson_interval(len(sizes) * int(low), len(sizes))
    return max(0.0, low), min(1.0, high)


def measure(
    kind: ProbeKind,
    features: Any,
    labels: np.ndarray,
    groups: np.ndarray,
    n_classes: int | None,
    splits: list[Fold],
    *,
    strength: float | None = None,
    seed: int = 0,
    interval: bool = True,
) -> ScoredFolds:
    """Cross-validate, score, and put an interval around it."""
    cv = cross_validate(kind, features, labels, groups, n_classes, splits, strength=strength, seed=seed)
    scorer = Scorer(labels, cv.scores, cv.fold, cv.baseline, n_classes)
    nothing = (float("nan"), float("nan"))
    return ScoredFolds(scorer(), group_interval(scorer, groups, seed) if interval else nothing, cv)


def _baseline_kind(n_classes: int | None) -> ProbeKind:
    """The probe that baselines without the model are fitted with."""
    return "ridge" if n_classes is None else "logistic"


def text_baselines(data: ProbeData, splits: list[Fold], seed: int = 0) -> tuple[Control, ...]:
    """Bag of tokens, and position and length: what the texts give away without a model."""
    n_classes = None if data.classes is None else len(data.classes)
    found = []
    for name, features in (("bag of tokens", bag_of_tokens(data)), ("position and length", _position_features(data))):
        done = measure(_baseline_kind(n_classes), features, data.labels, data.groups, n_classes, splits, seed=seed)
        found.append(Control(name, done.value, done.interval, len(data)))
    return tuple(found)


def shuffled_control(
    kind: ProbeKind,
    features: np.ndarray,
    data: ProbeData,
    splits: list[Fold],
    strength: float | None,
    draws: int,
    seed: int,
) -> Control:
    """The score after the labels are shuffled, over several draws, with the real labels' regularisation."""
    n_classes = None if data.classes is None else len(data.classes)
    generator = np.random.default_rng(seed + 1)
    values = []
    for _ in range(draws):
        labels = shuffled_labels(data.labels, data.groups, generator)
        if n_classes is not None and any(len(np.unique(labels[train])) < n_classes for train, _ in splits):
            continue
        values.append(measure(kind, features, labels, data.groups, n_classes, splits, seed=seed, interval=False).value)
    return _drawn("shuffled labels", values)


def control_task(
    kind: ProbeKind,
    features: np.ndarray,
    data: ProbeData,
    types: np.ndarray,
    what: str,
    row_splits: list[Fold],
    strength: float | None,
    draws: int,
    seed: int,
) -> Control:
    """The score on random labels per type, with types on both sides of a fold and the real labels' regularisation."""
    n_classes = None if data.classes is None else len(data.classes)
    generator = np.random.default_rng(seed + 2)
    alone = np.arange(len(data))
    values = []
    for _ in range(draws):
        labels = control_labels(types, data.labels, generator)
        if n_classes is not None and any(len(np.unique(labels[train])) < n_classes for train, _ in row_splits):
            continue
        done = measure(
            kind, features, labels, alone, n_classes, row_splits, strength=strength, seed=seed, interval=False
        )
        values.append(done.value)
    return _drawn(f"control task (random label a {what})", values)


def _drawn(name: str, values: list[float]) -> Control:
    interval = bootstrap_interval(values) if len(values) > 1 else None
    return Control(name, float(np.mean(values)) if values else float("nan"), interval, len(values))
