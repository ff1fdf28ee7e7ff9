"""k-sparse probing: how well do k latents predict a label? (Gurnee et al. 2023, arXiv 2305.01610)

The k latents are chosen on the training folds alone, by the mean difference of their activations between the label and
the rest in units of their standard deviation, or by an L1-penalised linear classifier; a logistic regression on those k
is fitted there too, and predicts the held-out fold. No group stands on both sides of a fold. With more than two classes
each stands against the rest, and figures are means over classes.

Every figure stands beside the same k latents of a random dictionary of the same size and L0, a logistic regression on
the whole activation (what a linear probe could reach), and what needs no activation: the more frequent class for the
accuracy, "always yes" for F1. The accuracy cuts at a probability of ½, F1 where it is best on the training folds: a
rare label would else never be said at all. A probe is a detector, not a cause.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.progress import Progress
from cutaway.artifacts.results import Control, Effect, interval_text
from cutaway.dictionaries.dictionary import Dictionary, random_dictionary
from cutaway.dictionaries.evaluation.figures import Tables, figure_rows, summary
from cutaway.draw.result import Result

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Selection = Literal["mean-difference", "l1"]
Labels = Sequence[str] | Sequence[int] | Sequence[bool] | np.ndarray
"""A class, or a group, per activation [n]."""

KS = (1, 2, 5, 16)
RANDOM = "as many latents of a random dictionary"
DENSE_PROBE = "logistic regression on the whole activation"
NO_ACTIVATION = {"accuracy": "always the more frequent class", "f1": "always yes"}

_L1_CANDIDATES = 256  # latents with the largest mean difference that the L1 classifier chooses among
_STRENGTHS = (0.01, 0.1, 1.0)  # inverse penalties tried for the dense probe, inside the training folds
_COLUMNS = ("n", "right", "hit", "false alarm", "miss")


@dataclass(frozen=True, repr=False)
class Probing(Result):
    """How well k latents predict a label, for several k."""

    title = "k-sparse probing"

    what: str
    """The label."""
    selection: Selection
    """How latents were chosen."""
    classes: tuple[str, ...]
    """The classes, each against the rest; of two only the one that sorts last."""
    n: int
    """Examples."""
    n_groups: int
    """Groups that folds keep together."""
    effects: dict[int, dict[str, Effect]]
    """By k: "accuracy" and "f1" of k latents."""
    per_seed: dict[int, dict[str, tuple[float, ...]]]
    """By k: the same of each dictionary."""
    latents: dict[str, tuple[int, ...]]
    """By class: for each dictionary the latent that the largest number of folds chose for k = 1."""

    def summary(self) -> str:
        return str(self)

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"label": self.what, "k": k, **row} for k, some in self.effects.items() for row in figure_rows(some.items())
        ]

    def drawing(self) -> Markup:
        from cutaway.draw.charts import Series, line_legend, line_svg

        ks = list(self.effects)
        effects = [self.effects[k]["f1"] for k in ks]
        series: list[Series] = [
            {
                "name": "latents", "x": ks, "y": [one.value for one in effects],
                "low": [one.interval[0] if one.interval else None for one in effects],
                "high": [one.interval[1] if one.interval else None for one in effects],
            }
        ]  # fmt: skip
        for place, control in enumerate(effects[0].controls):
            values = [one.controls[place].value for one in effects]
            series.append({"name": control.name, "x": ks, "y": values, "control": True})
        svg = line_svg(
            series=series, title=f"F1 on {self.what} by the number of latents", x_label="latents (k)",
            y_label="F1, held out", log_x=True,
        )  # fmt: skip
        return svg + line_legend(series) + probing_table([self])

    def to_json(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "selection": self.selection,
            "classes": list(self.classes),
            "n": self.n,
            "groups": self.n_groups,
            "effects": {k: {name: one.to_json() for name, one in some.items()} for k, some in self.effects.items()},
            "per_seed": {k: {name: list(each) for name, each in some.items()} for k, some in self.per_seed.items()},
            "latents": {name: list(latents) for name, latents in self.latents.items()},
        }

    def __str__(self) -> str:
        lines = [f"{self.what}: {self.n:,} examples in {self.n_groups} groups, latents chosen by {self.selection}"]
        for k, effects in self.effects.items():
            parts = []
            for name, one in effects.items():
                floor, random, whole = (control.value for control in one.controls)
                parts.append(
                    f"{name.replace('f1', 'F1')} {one.value:.3f} {interval_text(one.interval)} (random dictionary "
                    f"{random:.3f}, whole activation {whole:.3f}, {NO_ACTIVATION[name]} {floor:.3f})"
                )
            lines.append(f"  k = {k:>2}: {'; '.join(reversed(parts))}")
        return "\n".join(lines)


def sparse_probing(
    dictionaries: Dictionary | Sequence[Dictionary],
    x: Tensor,
    labels: Labels,
    *,
    groups: Labels | None = None,
    what: str = "the label",
    ks: Sequence[int] = KS,
    selection: Selection = "mean-difference",
    folds: int = 5,
    seed: int = 0,
) -> Probing:
    """How well k latents predict a label (Gurnee et al. 2023; https://arxiv.org/abs/2305.01610).

    Latents are chosen and a logistic regression on them is fitted on the training folds alone; every example is
    predicted out of fold.

    Args:
        dictionaries: One, or several that differ in their seed.
        x: Activations that they read [n, d_in].
        labels: A class per activation, [n]. Of two classes the one that sorts last is the positive one.
        groups: What folds keep together and what the interval draws, [n]; each example by itself if None.
        what: The label's name, for titles.
        ks: Numbers of latents.
        selection: By difference of means in units of the standard deviation, or by an L1-penalised classifier.
        folds: Folds of the cross-validation.
        seed: Of the folds and the random dictionary.

    Returns:
        Accuracy and F1 for each k, beside a random dictionary, the whole activation, and no activation at all.

    Raises:
        CutawayError: numbers of labels or groups that differ from x, one class, or a class in fewer groups than there
            are folds.
    """
    some = [dictionaries] if isinstance(dictionaries, Dictionary) else list(dictionaries)
    names, targets = _targets(labels, len(x))
    numbers = np.arange(len(x)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    if len(numbers) != len(x):
        raise CutawayError(f"there are {len(x)} activations but {len(numbers)} groups; give one for each")
    splits = {
        name: fold_splits(target, numbers, folds, name, seed) for name, target in zip(names, targets, strict=True)
    }
    ks = sorted({min(k, some[0].d_sae) for k in ks})
    # what a transcoder should write does not matter here: probing reads activations, whatever their scale
    random = [
        random_dictionary(one, x, seed + i, None if one.writes_what_it_reads else one(x)) for i, one in enumerate(some)
    ]
    guesses: dict[str, dict[int, np.ndarray]] = {"trained": {}, RANDOM: {}}  # bool [S, classes, 2, n] for each k
    chosen: dict[str, list[int]] = {name: [] for name in names}
    with Progress(f"probing {what}", total=2 * len(some) * len(names), unit="probes") as progress:
        for who, members in (("trained", some), (RANDOM, random)):
            for k in ks:
                guesses[who][k] = np.zeros((len(some), len(names), 2, len(x)), dtype=bool)
            for place, one in enumerate(members):
                code = sparse_codes(one, x)
                for row, (name, target) in enumerate(zip(names, targets, strict=True)):
                    predicted, first = _out_of_fold(code, target, splits[name], ks, selection)
                    for k in ks:
                        guesses[who][k][place, row] = predicted[k]
                    if who == "trained":
                        chosen[name].append(first)
                    progress.advance()
    dense = np.stack(
        [_dense_out_of_fold(x, target, splits[name], numbers) for name, target in zip(names, targets, strict=True)]
    )
    effects: dict[int, dict[str, Effect]] = {}
    per_seed: dict[int, dict[str, tuple[float, ...]]] = {}
    for k in ks:
        effects[k], per_seed[k] = {}, {}
        for cut, (name, statistic, floor) in enumerate(
            (("accuracy", _accuracy, _majority(targets)), ("f1", _f1, _always_yes(targets)))
        ):
            table = _tables(guesses["trained"][k][:, :, cut], targets, numbers)
            value, interval, per_seed[k][name] = summary(table, statistic)
            controls = [Control(NO_ACTIVATION[name], floor, None, len(x))]
            for label, found in ((RANDOM, guesses[RANDOM][k]), (DENSE_PROBE, dense[None])):
                other, other_interval, _ = summary(_tables(found[:, :, cut], targets, numbers), statistic)
                controls.append(Control(label, other, other_interval, len(x)))
            effects[k][name] = Effect(
                name=f"{name.replace('f1', 'F1')} of {k} latent{'s' if k > 1 else ''} on {what}",
                value=value,
                n=len(x),
                interval=interval,
                controls=tuple(controls),
                ablation="none",
                units="share" if name == "accuracy" else "F1",
            )
    return Probing(
        what=what,
        selection=selection,
        classes=names,
        n=len(x),
        n_groups=int(numbers.max()) + 1,
        effects=effects,
        per_seed=per_seed,
        latents={name: tuple(found) for name, found in chosen.items()},
    )


def sparse_codes(dictionary: Dictionary, x: Tensor) -> "csr_matrix":
    """Activations of all latents on x [n, d_in] as a sparse matrix [n, F], float32."""
    from scipy.sparse import csr_matrix

    values, latents = dictionary.encode_sparse(x)
    row, place = (values > 0).nonzero(as_tuple=True)
    entries = (values[row, place].float().cpu().numpy(), (row.cpu().numpy(), latents[row, place].cpu().numpy()))
    return csr_matrix(entries, shape=(len(x), dictionary.d_sae))


def best_latents(
    code: "csr_matrix", target: np.ndarray, k: int, selection: Selection = "mean-difference"
) -> np.ndarray:
    """The k latents that predict `target` (bool [n]) best by activations [n, F], best first."""
    ranked = _by_mean_difference(code, target)
    if selection == "mean-difference":
        return ranked[:k]
    return _by_l1(code, target, ranked[:_L1_CANDIDATES], k)


def _by_mean_difference(code: "csr_matrix", target: np.ndarray) -> np.ndarray:
    """All latents, by |mean on the label − mean on the rest| / standard deviation, falling."""
    n = len(target)
    weights = np.where(target, 1 / target.sum(), -1 / (~target).sum())
    difference = np.asarray(code.T @ weights).ravel()
    mean = np.asarray(code.sum(0)).ravel() / n
    square = np.asarray(code.multiply(code).sum(0)).ravel() / n
    deviation = np.sqrt(np.maximum(square - mean**2, 0))
    score = np.divide(np.abs(difference), deviation, out=np.zeros_like(difference), where=deviation > 0)
    return np.argsort(-score, kind="stable")


def _by_l1(code: "csr_matrix", target: np.ndarray, candidates: np.ndarray, k: int) -> np.ndarray:
    """The largest k coefficients of the first L1-penalised classifier, as the penalty falls, that has so many."""
    from sklearn.svm import LinearSVC, l1_min_c

    features = _scaled(code[:, candidates].toarray())[0]
    coefficients = np.zeros(len(candidates))
    strength = l1_min_c(features, target, loss="squared_hinge") * 1.5
    for _ in range(24):
        options: dict[str, Any] = {"penalty": "l1", "dual": False, "class_weight": "balanced"}
        model = LinearSVC(C=strength, max_iter=2000, **options)
        coefficients = np.abs(model.fit(features, target).coef_[0])
        if (coefficients > 0).sum() >= k:
            break
        strength *= 1.6
    # where the penalty never leaves k, the mean difference fills up: `candidates` are in its order
    return candidates[np.argsort(-coefficients, kind="stable")][:k]


def _scaled(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns in units of their standard deviation, not centred (zero stays "silent"); and those units."""
    units = features.std(0)
    units[units == 0] = 1
    return features / units, units


def _out_of_fold(
    code: "csr_matrix",
    target: np.ndarray,
    splits: list[tuple[np.ndarray, np.ndarray]],
    ks: Sequence[int],
    selection: Selection,
) -> tuple[dict[int, np.ndarray], int]:
    """Held-out guesses for each k, cut in two ways (see `LatentProbe.guesses`), and the latent that most folds found
    best.
    """
    predicted = {k: np.zeros((2, len(target)), dtype=bool) for k in ks}
    firsts = []
    for train, test in splits:
        fitted, held_out = code[train], code[test]
        ranked = _by_mean_difference(fitted, target[train])
        for k in ks:
            latents = ranked[:k]
            if selection == "l1":
                latents = _by_l1(fitted, target[train], ranked[:_L1_CANDIDATES], k)
            predicted[k][:, test] = sparse_probe(fitted, target[train], latents).guesses(held_out)
            if k == min(ks):
                firsts.append(int(latents[0]))
    return predicted, max(set(firsts), key=firsts.count)


@dataclass(frozen=True)
class LatentProbe:
    """A fitted classifier: `scores` of features [n], positive where a yes is more likely than not; `cut`: the score
    from which on to say yes for the best F1 on the training examples. `direction` [features] of a linear probe on x.
    """

    scores: Callable[[Any], np.ndarray]
    cut: float
    direction: np.ndarray | None = None

    def guesses(self, features: Any) -> np.ndarray:
        """Yes or no, bool [2, n]: cut at a probability of ½ (for the accuracy), and at `cut` (for F1)."""
        scores = self.scores(features)
        return np.stack([scores > 0, scores > self.cut])


def sparse_probe(code: "csr_matrix", target: np.ndarray, latents: np.ndarray) -> LatentProbe:
    """A logistic regression on a few latents of activations [n, F] for target (bool [n]); its features are such too."""
    features, units = _scaled(code[:, latents].toarray())
    model = _logistic(1.0).fit(features, target)

    def scores(other: "csr_matrix") -> np.ndarray:
        return model.decision_function(other[:, latents].toarray() / units)

    return LatentProbe(scores, best_cut(model.decision_function(features), target))


def dense_probe(x: np.ndarray, target: np.ndarray, groups: np.ndarray) -> LatentProbe:
    """A logistic regression on standardised x [n, d], its penalty chosen by log loss on a third of the groups.

    `direction` is the gradient of its logit in x's own units, of length 1.
    """
    from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model: Any = make_pipeline(StandardScaler(), _logistic(0.1))
    if min(len(np.unique(groups[target])), len(np.unique(groups[~target]))) < 3:
        model.fit(x, target)
    else:
        grid = {"logisticregression__C": list(_STRENGTHS)}
        inner = list(StratifiedGroupKFold(3, shuffle=True, random_state=0).split(x, target, groups))[:1]
        model = GridSearchCV(model, grid, scoring="neg_log_loss", cv=inner).fit(x, target).best_estimator_
    slope = model.named_steps["logisticregression"].coef_[0] / model.named_steps["standardscaler"].scale_
    direction = slope / max(float(np.linalg.norm(slope)), np.finfo(np.float64).tiny)
    return LatentProbe(model.decision_function, best_cut(model.decision_function(x), target), direction)


def best_cut(scores: np.ndarray, target: np.ndarray) -> float:
    """The score above which saying yes has the best F1, halfway between two scores; bool target [n] with a True."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    hits = np.cumsum(target[order])
    f1 = 2 * hits / (np.arange(1, len(scores) + 1) + target.sum())
    f1[:-1][ranked[:-1] == ranked[1:]] = -1  # equal scores cannot be parted
    last = int(np.argmax(f1))
    below = ranked[last + 1] if last + 1 < len(ranked) else ranked[last] - 2
    return float((ranked[last] + below) / 2)


def _dense_out_of_fold(
    x: Tensor, target: np.ndarray, splits: list[tuple[np.ndarray, np.ndarray]], groups: np.ndarray
) -> np.ndarray:
    found = np.zeros((2, len(target)), dtype=bool)
    values = x.float().cpu().numpy()
    for train, test in splits:
        found[:, test] = dense_probe(values[train], target[train], groups[train]).guesses(values[test])
    return found


def _logistic(strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, max_iter=500)


def _targets(labels: Labels, n: int) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the classes that stand against the rest (of two only the last), and bool [classes, n]."""
    given = np.asarray(labels)
    if len(given) != n:
        raise CutawayError(f"there are {n} activations but {len(given)} labels; give one for each")
    classes = np.unique(given)
    if len(classes) < 2:
        raise CutawayError("every label is the same; a probe needs at least two classes")
    chosen = classes[1:] if len(classes) == 2 else classes
    return tuple(str(one) for one in chosen), np.stack([given == one for one in chosen])


def fold_splits(
    target: np.ndarray, groups: np.ndarray, folds: int, name: str, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Train and test examples of each fold; no group on both sides, the share of `target` about the same in all.

    Raises `CutawayError` where the label, or the rest, is in fewer groups than there are folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    for side, mask in (("", target), ("the rest of ", ~target)):
        n_groups = len(np.unique(groups[mask]))
        if n_groups < folds:
            raise CutawayError(
                f"{side}{name!r} is in {n_groups} groups, fewer than the {folds} folds: give more, or fewer folds"
            )
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    found = list(splitter.split(np.zeros(len(target)), target, groups))
    for train, _ in found:
        if target[train].all() or not target[train].any():
            raise CutawayError(f"a fold has no example of {name!r} or of the rest to train on: give fewer folds")
    return found


def _tables(guesses: np.ndarray, targets: np.ndarray, groups: np.ndarray) -> Tables:
    """Guesses [S, classes, n] -> counts by group, [S, groups, classes · columns]."""
    n_seeds, n_classes, _ = guesses.shape
    n_groups = int(groups.max()) + 1
    found = np.zeros((n_seeds, n_groups, n_classes, len(_COLUMNS)))
    for s in range(n_seeds):
        for c in range(n_classes):
            guess, true = guesses[s, c], targets[c]
            columns = (np.ones(len(true)), guess == true, guess & true, guess & ~true, ~guess & true)
            for place, column in enumerate(columns):
                found[s, :, c, place] = np.bincount(groups, weights=column.astype(float), minlength=n_groups)
    return found.reshape(n_seeds, n_groups, -1)


def _by_class(sums: np.ndarray) -> np.ndarray:
    return sums.reshape(*sums.shape[:-1], -1, len(_COLUMNS))


def _accuracy(sums: np.ndarray) -> np.ndarray:
    counts = _by_class(sums)
    return (counts[..., 1] / counts[..., 0]).mean(-1)


def _f1(sums: np.ndarray) -> np.ndarray:
    """2·TP / (2·TP + FP + FN), 0 where nothing is found; mean over classes."""
    counts = _by_class(sums)
    hits = 2 * counts[..., 2]
    whole = hits + counts[..., 3] + counts[..., 4]
    return np.divide(hits, whole, out=np.zeros_like(hits), where=whole > 0).mean(-1)


def _majority(targets: np.ndarray) -> float:
    share = targets.mean(1)
    return float(np.maximum(share, 1 - share).mean())


def _always_yes(targets: np.ndarray) -> float:
    share = targets.mean(1)
    return float((2 * share / (1 + share)).mean())


def probing_table(found: Sequence[Probing]) -> Markup:
    """A row per label and k."""
    from cutaway.draw.panels import table_html

    rows = []
    for some in found:
        for k, effects in some.effects.items():
            one = effects["f1"]
            beside = [control.value for control in one.controls]
            rows.append([some.what, k, one.value, interval_text(one.interval, to=True), *beside, one.n])
    return table_html(
        columns=["label", "k", "F1", "95 % interval", "always yes", "random dictionary", "whole activation", "n"],
        rows=rows,
        title="k-sparse probing",
    )
