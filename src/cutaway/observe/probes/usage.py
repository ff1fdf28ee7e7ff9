"""Does the model use what a probe reads? Edit along the probe's direction and look at the answers.

A probe is a detector: that something can be read does not say that anything reads it. `use_probe` removes the probe's
direction at the site and tokens where the probe reads, and steers along it, and reports what the answers do, beside
random directions and the difference of the class means, in edits of the same size.

    ablate        x − (x·u)u: no component along the unit direction u
    ablate, mean  the component set to its mean over the examples, so that nothing unusual is put there
    steer ±       x ± g u, where g is the gap between the classes' mean components (regressions: their standard
                  deviation), so one step takes the average example of one class to the other

The mean difference gets the same treatment: its own component is removed, and it steers by the same norm g. A random
direction holds next to nothing of the stream, so removing its own component would be no control: it displaces each
token by as much as the probe's ablation does, along itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError, NotSupported
from cutaway.artifacts.progress import Progress
from cutaway.artifacts.results import Control, Effect
from cutaway.artifacts.statistics import bootstrap_interval
from cutaway.model import naming
from cutaway.model.edits.edits import add
from cutaway.model.forward.run import Run
from cutaway.model.language_model import LanguageModel
from cutaway.model.sites import layer_of
from cutaway.observe.probes.controls import mean_interval
from cutaway.observe.probes.data import ProbeData, collect
from cutaway.observe.probes.fitting import choose, folds
from cutaway.observe.probes.probe import Probe
from cutaway.observe.probes.results import ProbeSweep, ProbeUse, UseAction

AnswerMetric = Callable[[Tensor, Sequence[int]], Tensor]
"""(logits [b, V] at the last token, which texts these are) -> one number per text [b]."""

ACTIONS = ("ablate", "ablate, mean", "steer +", "steer −")
_ROWS_A_FORWARD = 64


@dataclass(frozen=True)
class Answers:
    """What is measured of a text: the logit of its answer minus that of a wrong one, or the answer's probability."""

    answer: tuple[int, ...]
    """The token id of each text's answer."""
    wrong: tuple[int, ...] | None
    """The token id of each text's wrong answer; None: the answer's probability is measured."""

    @property
    def units(self) -> str:
        return "probability of the answer" if self.wrong is None else "logit difference"

    def __call__(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """The measure of each of b texts [b], in `units`.

        Args:
            logits: At the texts' last tokens [b, V].
            rows: Which of the texts these are, b numbers.
        """
        wide = logits.float()
        answer = torch.tensor([self.answer[r] for r in rows], device=wide.device)[:, None]
        if self.wrong is None:
            return wide.softmax(-1).gather(-1, answer)[:, 0]
        wrong = torch.tensor([self.wrong[r] for r in rows], device=wide.device)[:, None]
        return (wide.gather(-1, answer) - wide.gather(-1, wrong))[:, 0]


def answer_tokens(
    lm: LanguageModel, texts: Sequence[str], answers: Sequence[str], wrong: Sequence[str] | None = None
) -> Answers:
    """Answers as they follow each text, as the model's tokenizer reads them: the first token of each.

    Args:
        lm: the model.
        texts: the n texts.
        answers: one per text, with its leading space; "#422" is an id.
        wrong: one per text; without them the answer's probability is measured instead of a logit difference.

    Returns:
        A metric for `use_probe` and `use_in_folds`.

    Raises:
        CutawayError: a text and its answer merge at the seam and no token continues it so, or an answer and its wrong
            one begin with the same token.
    """
    whole = _ids(lm, texts)

    def first(words: Sequence[str]) -> tuple[int, ...]:
        if len(words) != len(texts):
            raise CutawayError(f"There are {len(texts)} texts but {len(words)} answers; give one for each text.")
        both = _ids(lm, [naming.prompt_and(text, word) for text, word in zip(texts, words, strict=True)])
        rows = zip(texts, whole, words, both, strict=True)
        return tuple(naming.answer_tokens(lm, text, ids, word, read)[0] for text, ids, word, read in rows)

    right, other = first(answers), None if wrong is None else first(wrong)
    if other is not None:
        for i, (a, b) in enumerate(zip(right, other, strict=True)):
            if a == b:
                raise CutawayError(
                    f"{answers[i]!r} and {wrong[i] if wrong else ''!r} begin with the same token after {texts[i]!r}; "
                    "choose answers whose first tokens differ."
                )
    return Answers(right, other)


def _ids(lm: LanguageModel, texts: Sequence[str]) -> list[list[int]]:
    tokens = lm.tokens(list(texts))
    return [tokens.row_ids(i) for i in range(len(tokens))]


def use_probe(
    lm: LanguageModel,
    probe: Probe,
    data: ProbeData,
    metric: AnswerMetric,
    *,
    fitted_on: ProbeData | None = None,
    label: str | None = None,
    own: bool = True,
    units: str | None = None,
    draws: int = 5,
    seed: int = 0,
) -> ProbeUse:
    """Edit along the probe's direction where it reads, and measure the answers.

    Edit other texts than those that the probe was fitted on where you can, as `use_in_folds` does.

    Args:
        lm: the model that the probe was fitted on.
        probe: a linear probe.
        data: the texts that are edited.
        metric: (logits [b, V] at the last token, which texts these are) to one number per text [b], such as
            `answer_tokens` makes.
        fitted_on: the examples that the probe was fitted on, from which class means are taken; `data` if None.
        label: the positive class; the second of two if None, needed for more.
        own: the metric is high when the model gives the text's *own* answer; False: for the positive class's answer,
            whatever the text.
        units: of the metric; its attribute `units` if None.
        draws: how many random directions of the same size stand beside.
        seed: of these.

    Returns:
        The effects of two ablations and two steps.

    Raises:
        NotSupported: an MLP probe, which has no one direction, or heads side by side at a site where an edit takes one
            vector per head.
        CutawayError: another model, or a metric that is not one number per text.
    """
    reference = data if fitted_on is None else fitted_on
    features = collect(lm, reference, probe.site, head=probe.head)[probe.site]
    part = _changes(lm, probe, data, metric, features, reference.labels, label, own, draws, seed)
    return _use([part], metric, units, probe.site, _towards(probe, label), seed)


def use_in_folds(
    lm: LanguageModel,
    sweep: ProbeSweep,
    site: str,
    metric: AnswerMetric,
    *,
    label: str | None = None,
    own: bool = True,
    units: str | None = None,
    draws: int = 5,
    seed: int = 0,
) -> ProbeUse:
    """`use_probe` of a sweep's probe at a site, each text edited along a direction fitted without its fold.

    So no text, and no group, helped to find the direction that it is edited along.

    Args:
        lm: the model.
        sweep: of this model.
        site: one of the sweep's sites.
        metric: as `use_probe` takes it.
        label: the positive class; the second of two if None, needed for more.
        own: the metric is high when the model gives the text's own answer; False: for the positive class's.
        units: of the metric; its attribute `units` if None.
        draws: how many random directions of the same size stand beside.
        seed: of these.

    Returns:
        The effects of two ablations and two steps.

    Raises:
        NoSuchSite: the sweep has no such site.
        NotSupported: MLP probes, which have no one direction.
    """
    data, probe = sweep.data, sweep.at(site).probe
    features = collect(lm, data, site, head=probe.head)[site]
    n_classes = None if data.classes is None else len(data.classes)
    parts = []
    for train, test in folds(data.labels, data.groups, sweep.folds, regression=data.regression, seed=sweep.seed):
        if n_classes is not None and len(np.unique(data.labels[train])) < n_classes:
            continue
        weights, *_ = choose(
            sweep.kind, features[train], data.labels[train], data.groups[train], n_classes, seed=sweep.seed
        )
        fitted = replace(probe, weights=weights, calibrator=None, n=len(train))
        parts.append(
            _changes(lm, fitted, data.only(test), metric, features[train], data.labels[train], label, own, draws, seed)
        )
    return _use(parts, metric, units, site, _towards(probe, label), seed)


@dataclass(frozen=True)
class _Part:
    """What the edits of one probe do to some texts: changes [texts] and mean |Δ| by (action, direction)."""

    change: dict[tuple[str, str], np.ndarray]
    size: dict[tuple[str, str], float]
    before: np.ndarray
    groups: np.ndarray
    gap: float
    cosine: float


def _changes(
    lm: LanguageModel,
    probe: Probe,
    data: ProbeData,
    metric: AnswerMetric,
    features: np.ndarray,
    labels: np.ndarray,
    label: str | None,
    own: bool,
    draws: int,
    seed: int,
) -> _Part:
    probe.require_model(lm)
    direction = probe.direction(label).double()
    if float(direction.norm()) == 0:
        raise CutawayError(f"The probe at '{probe.site}' has no direction: all its weights are zero.")
    unit = direction / direction.norm()
    wide = features.astype(np.float64)
    mass = _mean_difference(wide, labels, _positive(probe, labels, label))
    positive = _positive(probe, labels, label)
    along = wide @ unit.numpy()
    gap = float(along.std()) if positive is None else abs(float(along[positive].mean() - along[~positive].mean()))
    if gap == 0 or float(mass.norm()) == 0:
        raise CutawayError(f"The classes have the same mean at '{probe.site}', so there is no step to steer by.")
    generator = torch.Generator().manual_seed(seed)
    if draws < 1:
        raise CutawayError(f"draws is {draws}; at least one random direction stands beside the probe's")
    random = [torch.randn(len(unit), generator=generator, dtype=torch.float64) for _ in range(draws)]
    directions = {"probe": unit, "mass": mass / mass.norm()}
    directions |= {f"random {i}": r / r.norm() for i, r in enumerate(random)}

    editor = Editor(lm, probe, data)
    sign = np.ones(len(editor.rows))
    wanted = _positive(probe, data.labels, label)
    if wanted is not None:
        by_row = {int(r): bool(p) for r, p in zip(data.row, wanted, strict=True)}
        sign = np.array([1.0 if by_row[r] else -1.0 for r in editor.rows])
    before = editor.measure(metric)
    change: dict[tuple[str, str], np.ndarray] = {}
    size: dict[tuple[str, str], float] = {}
    with Progress("editing along the probe", len(ACTIONS) * len(directions), unit="edits") as progress:
        for action in ACTIONS:
            for name, vector in directions.items():
                # a random direction's own component is small; it gets the displacement that the probe's edit makes
                source = unit if name.startswith("random") else vector
                centre = float((wide @ source.numpy()).mean())
                after, size[action, name] = editor.edited(metric, action, source, vector, gap, centre)
                towards = sign if own != action.startswith("ablate") else 1.0
                change[action, name] = (after - before) * towards
                progress.advance()
    group = dict(zip(data.row.tolist(), data.groups.tolist(), strict=True))
    return _Part(
        change,
        size,
        before * (1.0 if own else sign),
        np.array([group[r] for r in editor.rows]),
        gap,
        float(unit @ directions["mass"]),
    )


def _towards(probe: Probe, label: str | None) -> str | None:
    return None if probe.classes is None else label or probe.classes[-1]


def _positive(probe: Probe, labels: np.ndarray, label: str | None) -> np.ndarray | None:
    """Which examples are of the positive class; None for a regression."""
    if probe.classes is None:
        return None
    return labels == probe.classes.index(probe.classes[-1] if label is None else label)


def _mean_difference(features: np.ndarray, labels: np.ndarray, positive: np.ndarray | None) -> Tensor:
    """Mean of the positive examples minus that of the others; for a regression, of the upper half and the lower."""
    up = labels > np.median(labels) if positive is None else positive
    return torch.from_numpy(features[up].mean(0) - features[~up].mean(0))


class Editor:
    """Runs the texts of some examples with an edit at the tokens the probe reads, and measures the last token.

    The stream below the site's layer is run once and taken over by every edit.
    """

    def __init__(self, lm: LanguageModel, probe: Probe, data: ProbeData) -> None:
        self.lm, self.probe = lm, probe
        self.rows = sorted(set(data.row.tolist()))
        if len(lm.sites()[probe.site].dims.split()) > 3 and probe.head is None:
            raise NotSupported(
                f"An edit of '{probe.site}' takes one vector per head; name a head to use the probe, or probe a site "
                "without heads."
            )
        self._at: dict[int, list[int]] = {}
        for row, place in zip(data.row.tolist(), data.at.tolist(), strict=True):
            self._at.setdefault(row, []).append(place)
        layer = layer_of(probe.site)
        below = [] if layer is None else [f"blocks.{layer}.resid_pre"]
        lengths = data.tokens.lengths.tolist()
        order = sorted(self.rows, key=lambda r: lengths[r])
        self._batches = []
        for start in range(0, len(order), _ROWS_A_FORWARD):
            chosen = order[start : start + _ROWS_A_FORWARD]
            tokens = lm.tokens([data.tokens.row_ids(r) for r in chosen])
            self._batches.append((chosen, lm.run(tokens, capture=[*below, probe.site], logits="last")))

    def measure(self, metric: AnswerMetric) -> np.ndarray:
        """The metric of every text without an edit, in the order of `rows`."""
        return self._collect(metric, [base for _, base in self._batches])

    def edited(
        self, metric: AnswerMetric, action: str, source: Tensor, vector: Tensor, gap: float, centre: float
    ) -> tuple[np.ndarray, float]:
        """The metric under an action along the unit `vector`, and the mean |Δ| of the values at the probe's tokens.

        An ablation removes the component along the unit `source` (down to `centre`, for the mean); where `source` is
        another direction than `vector`, a displacement of that size is made along `vector` instead.
        """
        runs, total, count = [], 0.0, 0
        for chosen, base in self._batches:
            value = base[self.probe.site]
            delta = torch.zeros(value.shape, dtype=torch.float64, device=value.device)
            for i, row in enumerate(chosen):
                columns = self._columns(base, i, self._at[row])
                here = (i, columns) if self.probe.head is None else (i, columns, self.probe.head)
                if action.startswith("ablate"):
                    kept = 0.0 if action == "ablate" else centre
                    amount = kept - value[here].double() @ source.to(value.device)
                else:
                    step = gap if action == "steer +" else -gap
                    amount = torch.full((len(columns),), step, dtype=torch.float64, device=value.device)
                delta[here] = amount[:, None] * vector.to(value.device)
                total += float(delta[here].abs().sum())
                count += len(columns) * len(vector)
            edit = add(self.probe.site, delta.to(torch.promote_types(value.dtype, torch.float32)))
            resumed = base if layer_of(self.probe.site) is not None else None
            runs.append(self.lm.run(base.tokens, edits=edit, resume=resumed, logits="last"))
        return self._collect(metric, runs), total / count

    @staticmethod
    def _columns(base: Run, row: int, at: list[int]) -> list[int]:
        first, length = int(base.tokens.first[row]), int(base.tokens.lengths[row])
        return [first + p for p in (range(length) if min(at) < 0 else at)]

    def _collect(self, metric: AnswerMetric, runs: list[Run]) -> np.ndarray:
        found: dict[int, float] = {}
        for (chosen, _), run in zip(self._batches, runs, strict=True):
            values = torch.as_tensor(metric(run.last_logits, chosen)).detach().double().cpu().numpy()
            if values.shape != (len(chosen),):
                raise CutawayError(
                    f"The metric gave {list(values.shape)} for {len(chosen)} texts; it should give one number per text."
                )
            found |= dict(zip(chosen, values.tolist(), strict=True))
        return np.array([found[r] for r in self.rows])


def _use(
    parts: list[_Part],
    metric: AnswerMetric,
    units: str | None,
    site: str,
    towards: str | None,
    seed: int,
) -> ProbeUse:
    groups = np.unique(np.concatenate([part.groups for part in parts]), return_inverse=True)[1]
    before = np.concatenate([part.before for part in parts])
    sizes = np.array([len(part.before) for part in parts], dtype=float)
    names = sorted({name for _, name in parts[0].change if name.startswith("random")})
    rows = []
    for action in ACTIONS:
        change = {
            name: np.concatenate([part.change[action, name] for part in parts]) for name in ("probe", "mass", *names)
        }
        drawn = [float(change[name].mean()) for name in names]
        effect = Effect(
            name=f"{action} along the probe at {site}",
            value=float(change["probe"].mean()),
            n=len(before),
            interval=mean_interval(change["probe"], groups, seed),
            controls=(
                Control(
                    "mean difference", float(change["mass"].mean()), mean_interval(change["mass"], groups, seed),
                    len(before),
                ),
                Control(
                    f"{len(names)} random directions of the same size",
                    float(np.mean(drawn)),
                    bootstrap_interval(drawn) if len(drawn) > 1 else None,
                    len(names),
                ),
            ),
            ablation={"ablate": "projected out", "ablate, mean": "component set to its mean"}.get(action, "added"),
            units=units or getattr(metric, "units", "metric"),
        ).require_controls()  # fmt: skip
        moved = [
            float(np.average([np.mean([p.size[action, n] for n in which]) for p in parts], weights=sizes))
            for which in (["probe"], ["mass"], names)
        ]
        rows.append(UseAction(action, effect, (min(drawn), max(drawn)), (moved[0], moved[1], moved[2])))
    return ProbeUse(
        site,
        tuple(rows),
        float(before.mean()),
        float(np.average([part.gap for part in parts], weights=sizes)),
        float(np.average([part.cosine for part in parts], weights=sizes)),
        len(before),
        towards,
        _verdict(rows, float(np.abs(before).mean())),
    )


def _verdict(rows: list[UseAction], usual: float) -> str:
    """One sentence: which actions do more than any random direction, in the direction that a used one would.

    A change below a fiftieth of the metric's usual size counts as none, however narrow its interval.
    """
    moved = []
    for row in rows:
        low, high = row.effect.interval or (float("nan"), float("nan"))
        gain = (low, row.random[1]) if row.action == "steer +" else (-high, -row.random[0])
        if gain[0] > max(gain[1], 0.02 * usual):
            moved.append(row.action)
    if not moved:
        return (
            "No edit along the probe moves the answers as a used direction would, and more than random directions do: "
            "these answers do not hang on what it reads here."
        )
    other = [row.action for row in rows if row.action not in moved]
    quoted = [", ".join(f"“{action}”" for action in actions) for actions in (moved, other)]
    return f"Edits that move the answers as a used direction would, and more than every random one: {quoted[0]}" + (
        f". Edits that do not: {quoted[1]}." if other else "."
    )
