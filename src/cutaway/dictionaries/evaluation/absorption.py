"""Splitting and absorption: a concept whose latent is silent just where a more special one speaks for it.

After Chanin et al. 2024 ("A is for absorption", arXiv 2409.14507), with projections in place of ablations:

    1. A logistic regression on the whole activation gives the concept's direction p (unit length, in x's own units).
    2. k-sparse probes find the concept's latents: the one best latent, and one more as long as it raises the held-out
       F1 by more than 0.03. Two or more is *splitting*.
    3. On a held-out token that has the concept, and that the probe of 1 finds, the concept is *absorbed* when
       all of those latents are silent, and of the active latents i one accounts for most of what is written along p:
       its share a_i⟨d_i, p⟩ / Σ_j max(0, a_j⟨d_j, p⟩) is at least 0.4, is the largest, and cos(d_i, p) ≥ 0.1 (signed).

The paper instead ablates latents and asks for a gap in the effect on the logit of a spelling prompt, which ties it to
one task; the projection is what SAEBench uses for the same reason. Everything chosen (directions, latents, probes) is
chosen on training folds, and counted on the others. A latent that takes over so many of the concept's tokens that it
raises the F1 itself counts as a split: absorption is of the few.

The rate stands beside that of a random dictionary of the same size and L0, and beside that of the same dictionary along
random directions in place of p (a mean of 20): where these are high, "one latent dominates" says nothing.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.results import Control, Effect, interval_text
from cutaway.dictionaries.dictionary import Dictionary, random_dictionary
from cutaway.dictionaries.evaluation.figures import Tables, summary
from cutaway.dictionaries.evaluation.probing import (
    Labels,
    best_latents,
    dense_probe,
    fold_splits,
    sparse_codes,
    sparse_probe,
)
from cutaway.draw.result import Result

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

_SPLIT_GAIN = 0.03  # how much F1 a further latent must add to count as a part of the concept
_MAX_SPLIT = 10
_SHARE = 0.4  # of what is written along the probe, by one latent
_COSINE = 0.1  # of that latent's decoder row with the probe
RANDOM = "a random dictionary"
RANDOM_DIRECTION = "random directions in place of the probe's"
_DRAWS = 20


@dataclass(frozen=True, repr=False)
class Absorption(Result):
    """Splitting and absorption of one concept in S dictionaries that differ in their seed."""

    title = "Absorption of a concept"

    what: str
    """The concept."""
    rate: Effect
    """Of the held-out positives that the dense probe finds, the share that are absorbed."""
    missed: Effect
    """Of the same, the share on which the concept's latents are silent, absorbed or not."""
    per_seed: tuple[float, ...]
    """The rate of each dictionary, [S]."""
    split: tuple[float, ...]
    """How many latents are the concept's, mean over folds, [S]; 1 is no splitting."""
    latents: tuple[tuple[int, ...], ...]
    """The concept's latents in the fold that found the largest number of them, [S]."""
    absorbers: tuple[tuple[tuple[int, int], ...], ...]
    """(latent, how often) of the latents that took over, [S]."""
    probe_f1: float
    """Held-out F1 of the dense probe; where it is low the rest means little."""
    curve: tuple[tuple[float, ...], ...]
    """F1 of the first k = 1, 2, ... latents on examples that they were not chosen on, [S]."""

    def summary(self) -> str:
        return str(self)

    def rows(self) -> list[dict[str, Any]]:
        each = zip(self.latents, self.split, self.per_seed or (math.nan,) * len(self.split), strict=True)
        return [
            {
                "concept": self.what, "dictionary": place, "absorbed": rate, "low": (self.rate.interval or (None,))[0],
                "high": (self.rate.interval or (None,))[-1], "control": self.rate.controls[0].value,
                "silent": self.missed.value, "split": split, "latents": " ".join(map(str, latents)),
                "probe_f1": self.probe_f1, "n": self.rate.n,
            }
            for place, (latents, split, rate) in enumerate(each)
        ]  # fmt: skip

    def drawing(self) -> Markup:
        from cutaway.draw.charts import Series, line_legend, line_svg, line_table

        series: list[Series] = [
            {"name": f"dictionary {place + 1}", "x": list(range(1, len(curve) + 1)), "y": list(curve)}
            for place, curve in enumerate(self.curve)
        ]
        svg = line_svg(
            series=series, title=f"F1 of {self.what} by its first latents", x_label="latents", y_label="F1, held out"
        )
        return svg + line_legend(series) + line_table(series, "latents") + absorption_table([self])

    def to_json(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "rate": self.rate.to_json(),
            "missed": self.missed.to_json(),
            "per_seed": list(self.per_seed),
            "split": list(self.split),
            "latents": [list(some) for some in self.latents],
            "absorbers": [[list(pair) for pair in some] for some in self.absorbers],
            "probe_f1": self.probe_f1,
            "f1_by_k": [list(some) for some in self.curve],
        }

    def __str__(self) -> str:
        beside = ", ".join(f"{control.name} {control.value:.3f}" for control in self.rate.controls)
        return (
            f"{self.what}: absorbed {self.rate.value:.3f} {interval_text(self.rate.interval)} of {self.rate.n} "
            f"tokens; {beside}; latents silent {self.missed.value:.3f}; {np.mean(self.split):.1f} latents "
            f"({', '.join(map(str, self.latents[0]))}); F1 of the dense probe {self.probe_f1:.2f}"
        )


def absorption(
    dictionaries: Dictionary | Sequence[Dictionary],
    x: Tensor,
    labels: Sequence[bool] | np.ndarray,
    *,
    groups: Labels | None = None,
    what: str = "the concept",
    folds: int = 3,
    seed: int = 0,
) -> Absorption:
    """Whether a concept's latents are silent on tokens where a more special latent speaks for them.

    After Chanin et al. 2024, "A is for absorption" (https://arxiv.org/abs/2409.14507), with projections in place of
    ablations; see the module for the steps.

    Args:
        dictionaries: One, or several that differ in their seed.
        x: Activations that they read [n, d_in].
        labels: Whether each has the concept, bool [n].
        groups: What folds keep together and what the interval draws, [n]: rows or documents, not tokens with the same
            text, for absorption is about particular tokens. Each example by itself if None.
        what: The concept's name, for titles.
        folds: Folds of the cross-validation.
        seed: Of the folds, the random dictionary and the random directions.

    Returns:
        The rate beside that of a random dictionary and of random directions, and the concept's latents.

    Raises:
        CutawayError: a dictionary does not write what it reads (the probe's direction must lie where the decoder
            writes), labels are all the same or of another number than x, or a class is in too few groups.
    """
    some = [dictionaries] if isinstance(dictionaries, Dictionary) else list(dictionaries)
    if not all(one.writes_what_it_reads for one in some):
        raise CutawayError("absorption compares decoder rows with a probe of the input: not for a transcoder")
    target = np.asarray(labels, dtype=bool)
    if len(target) != len(x):
        raise CutawayError(f"there are {len(x)} activations but {len(target)} labels; give one for each")
    if target.all() or not target.any():
        raise CutawayError(f"{what}: every label is the same; a concept needs tokens with and without it")
    numbers = np.arange(len(x)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    splits = fold_splits(target, numbers, folds, what, seed)
    values = x.float().cpu().numpy()
    probes = [dense_probe(values[train], target[train], numbers[train]) for train, _ in splits]
    guessed = np.zeros(len(x), dtype=bool)
    for (_, test), probe in zip(splits, probes, strict=True):
        guessed[test] = probe.guesses(values[test])[1]
    generator = np.random.default_rng(seed)
    directions = [probe.direction for probe in probes if probe.direction is not None]
    chance = [[_unit(generator.standard_normal(x.shape[1])) for _ in probes] for _ in range(_DRAWS)]
    random = [random_dictionary(one, x, seed + i) for i, one in enumerate(some)]
    codes = [sparse_codes(one, x) for one in some]
    asked = guessed & target
    ground = _Ground(target, asked, splits)
    mine = [_judged(one, code, ground, directions) for one, code in zip(some, codes, strict=True)]
    by_chance = [_judged(one, sparse_codes(one, x), ground, directions) for one in random]
    turned = [
        np.mean([_absorbed(one, code, ground, turn, found.latents_by_fold)[1] >= 0 for turn in chance], axis=0)
        for one, code, found in zip(some, codes, mine, strict=True)
    ]
    n_asked = int(asked.sum())

    def figure(name: str, found: _Columns, controls: dict[str, _Columns]) -> tuple[Effect, tuple[float, ...]]:
        def table(columns: _Columns) -> Tables:
            return np.stack([_by_group(column[asked], numbers[asked]) for column in columns])

        if not n_asked:
            nothing = tuple(Control(label, float("nan")) for label in controls)
            return Effect(name, float("nan"), 0, None, nothing, "none", "share"), ()
        value, interval, each = summary(table(found), _mean)
        beside = []
        for label, columns in controls.items():
            other, other_interval, _ = summary(table(columns), _mean)
            beside.append(Control(label, other, other_interval, n_asked))
        return Effect(name, value, n_asked, interval, tuple(beside), "none", "share"), each

    rate, per_seed = figure(
        f"absorption of {what}",
        [one.by >= 0 for one in mine],
        {RANDOM: [one.by >= 0 for one in by_chance], RANDOM_DIRECTION: turned},
    )
    missed, _ = figure(
        f"tokens of {what} on which its latents are silent",
        [one.silent for one in mine],
        {RANDOM: [one.silent for one in by_chance]},
    )
    return Absorption(
        what=what,
        rate=rate,
        missed=missed,
        per_seed=per_seed,
        split=tuple(float(np.mean([len(latents) for latents in found.latents_by_fold])) for found in mine),
        latents=tuple(max(found.latents_by_fold, key=len) for found in mine),
        absorbers=tuple(tuple(Counter(found.by[found.by >= 0].tolist()).most_common(5)) for found in mine),
        probe_f1=_f1(guessed, target),
        curve=tuple(found.curve for found in mine),
    )


_Columns = Sequence[np.ndarray]  # one number per example, for each of several dictionaries


@dataclass(frozen=True, eq=False)
class _Ground:
    """Which examples have the concept, which of them are asked about (the dense probe finds them), and the folds."""

    target: np.ndarray
    asked: np.ndarray
    splits: Sequence[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, eq=False)
class _Found:
    """Of each example, held out: whether the concept's latents are `silent`, and `by` which latent it is absorbed (−1:
    not). The concept's latents of each fold, and F1 by their number.
    """

    silent: np.ndarray
    by: np.ndarray
    latents_by_fold: tuple[tuple[int, ...], ...]
    curve: tuple[float, ...]


def _judged(dictionary: Dictionary, code: "csr_matrix", ground: _Ground, directions: Sequence[np.ndarray]) -> _Found:
    found = [concept_latents(code, ground.target, train) for train, _ in ground.splits]
    latents = tuple(some for some, _ in found)
    curves = [curve for _, curve in found]
    longest = max(map(len, curves))
    mean = tuple(float(np.mean([curve[k] for curve in curves if len(curve) > k])) for k in range(longest))
    silent, by = _absorbed(dictionary, code, ground, directions, latents)
    return _Found(silent, by, latents, mean)


def _absorbed(
    dictionary: Dictionary,
    code: "csr_matrix",
    ground: _Ground,
    directions: Sequence[np.ndarray],
    latents_by_fold: Sequence[tuple[int, ...]],
) -> tuple[np.ndarray, np.ndarray]:
    """`silent` and `by` of `_Found`, with a direction and the concept's latents for each fold."""
    decoder = dictionary.W_dec.detach().double().cpu().numpy()
    lengths = np.linalg.norm(decoder, axis=1)
    silent, by = np.zeros(len(ground.target), dtype=bool), np.full(len(ground.target), -1)
    for (_, test), direction, latents in zip(ground.splits, directions, latents_by_fold, strict=True):
        along = decoder @ direction
        near = along >= _COSINE * lengths
        for example in test[ground.asked[test]]:
            here = slice(code.indptr[example], code.indptr[example + 1])
            active = code.indices[here]
            silent[example] = not np.isin(active, latents).any()
            if not silent[example] or not len(active):
                continue
            written = code.data[here] * along[active]
            top = int(np.argmax(written))
            if written[top] > 0 and written[top] >= _SHARE * np.maximum(written, 0).sum() and near[active[top]]:
                by[example] = active[top]
    return silent, by


def concept_latents(
    code: "csr_matrix", target: np.ndarray, train: np.ndarray
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """A concept's latents, found in the training examples alone; and the F1 of the first 1, 2, ... of them.

    Latents are ranked on two thirds of the examples; each further one is kept while it raises the F1 on the other third
    by more than 0.03.
    """
    fit, check = train[np.arange(len(train)) % 3 != 0], train[np.arange(len(train)) % 3 == 0]
    if not target[fit].any() or not target[check].any():
        fit = check = train
    ranked = best_latents(code[fit], target[fit], _MAX_SPLIT + 1)
    scores = []
    n = 1
    for k in range(1, len(ranked) + 1):
        probe = sparse_probe(code[fit], target[fit], ranked[:k])
        scores.append(_f1(probe.guesses(code[check])[1], target[check]))
        if k > 1:
            if scores[k - 1] - scores[k - 2] <= _SPLIT_GAIN:
                break
            n = k
    return tuple(int(latent) for latent in ranked[:n]), tuple(scores)


def _unit(direction: np.ndarray) -> np.ndarray:
    direction = np.asarray(direction, dtype=np.float64)
    return direction / max(float(np.linalg.norm(direction)), np.finfo(np.float64).tiny)


def _by_group(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Number of examples and number of true ones, group by group: [groups, 2]; groups without examples are left out."""
    numbers = np.unique(groups, return_inverse=True)[1]
    return np.stack([np.bincount(numbers), np.bincount(numbers, weights=values)], axis=1).astype(np.float64)


def _mean(sums: np.ndarray) -> np.ndarray:
    return sums[..., 1] / sums[..., 0]


def _f1(guess: np.ndarray, true: np.ndarray) -> float:
    """2·TP / (2·TP + FP + FN), 0 where nothing is found."""
    hits = 2 * int((guess & true).sum())
    whole = hits + int((guess != true).sum())
    return hits / whole if whole else 0.0


def absorption_table(found: Sequence[Absorption]) -> Markup:
    """A row per concept."""
    from cutaway.draw.panels import table_html

    rows = []
    for some in found:
        beside = [control.value for control in some.rate.controls]
        latents = "; ".join(", ".join(map(str, each)) for each in some.latents)
        ends = interval_text(some.rate.interval, to=True)
        rows.append([some.what, some.rate.value, ends, *beside, some.missed.value, latents, some.probe_f1, some.rate.n])
    return table_html(
        columns=["concept", "absorbed", "95 % interval", "random dictionary", "random directions", "latents silent",
                 "latents", "F1 of the probe", "n"],
        rows=rows,
        title="absorption",
    )  # fmt: skip
