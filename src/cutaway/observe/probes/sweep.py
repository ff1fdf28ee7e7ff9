"""Probes: can this be read off the model, where, and how much of it would show without the model?

`probe_sweep` reads every named site in one pass, cross-validates a probe at each, and puts every figure beside its
controls (`controls.py`). A probe is a detector, not a cause: `usage.use_probe` edits along its direction and
says what the model's answers do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.progress import Progress
from cutaway.artifacts.results import Control, Effect, interval_text
from cutaway.artifacts.statistics import false_discovery
from cutaway.model.language_model import LanguageModel
from cutaway.model.sites import layer_of
from cutaway.observe.probes.controls import (
    ScoredFolds,
    chance_p,
    control_task,
    control_types,
    group_interval,
    mean_interval,
    measure,
    shuffled_control,
    text_baselines,
)
from cutaway.observe.probes.data import Position, ProbeData, collect, probe_data
from cutaway.observe.probes.fitting import (
    CrossValidated,
    ProbeKind,
    Scorer,
    accuracy_hits,
    check_folds,
    check_kind,
    choose,
    folds,
    probabilities,
)
from cutaway.observe.probes.probe import Calibration, Probe, describe, fit_calibrator
from cutaway.observe.random_weights import untrained

_UNTRAINED_LIMIT = 2_000_000_000


@dataclass(frozen=True)
class Reliability:
    """How well probabilities mean what they say, out of fold.

    `bins` are (mean probability, share that were right, n) of ten equal bins: of the positive class for two classes,
    of the most probable class for more. `ece` is Σ n_b/n |share − mean|, `brier` the mean squared error of the
    probabilities (summed over classes for more than two). `method` is the calibration, None for the probe's own.
    """

    bins: tuple[tuple[float, float, int], ...]
    ece: float
    brier: float
    method: str | None

    def to_json(self) -> dict[str, Any]:
        return {"bins": [list(b) for b in self.bins], "ece": self.ece, "brier": self.brier, "method": self.method}


def reliability(chances: np.ndarray, labels: np.ndarray, method: str | None = None, n_bins: int = 10) -> Reliability:
    """`Reliability` of probabilities [n, classes] against class numbers [n]."""
    n, classes = chances.shape
    right = np.eye(classes)[labels]
    if classes == 2:
        stated, true = chances[:, 1], right[:, 1]
        brier = float(((stated - true) ** 2).mean())
    else:
        top = chances.argmax(1)
        stated, true = chances[np.arange(n), top], (top == labels).astype(float)
        brier = float(((chances - right) ** 2).sum(1).mean())
    place = np.minimum((stated * n_bins).astype(int), n_bins - 1)
    bins = [
        (float(stated[place == b].mean()), float(true[place == b].mean()), int((place == b).sum()))
        for b in range(n_bins)
        if (place == b).any()
    ]
    return Reliability(tuple(bins), sum(k / n * abs(a - b) for a, b, k in bins), brier, method)


def calibrated(cv: CrossValidated, method: Calibration | None) -> np.ndarray:
    """Out-of-fold probabilities [n, classes]; a calibration is fitted on each fold's training side alone."""
    if method is None:
        return probabilities(cv.scores)
    found = np.full((len(cv.scores), 2), np.nan)
    for fold, (scores, labels) in zip(np.unique(cv.fold[cv.fold >= 0]), cv.held, strict=True):
        here = cv.fold == fold
        positive = fit_calibrator(method, scores[:, 0], labels)(cv.scores[here, 0])
        found[here] = np.stack([1 - positive, positive], 1)
    return found


@dataclass(frozen=True)
class SiteProbe:
    """One site: the score (AUROC or R²) and accuracy beside their controls, and the probe fitted on all examples.

    `row_folds` is the same score when single examples are dealt into folds, whatever their group: what leaks between
    the texts of a group is its excess. `selectivity` is `row_folds` minus the control task, None without one. `p` is
    that of the score against labels dealt out anew; `ProbeSweep.q` counts the sites.
    """

    site: str
    layer: int | None
    effect: Effect
    accuracy: Effect | None
    reliability: Reliability | None
    row_folds: float
    selectivity: float | None
    probe: Probe
    p: float = float("nan")

    def control(self, name: str) -> Control | None:
        """The control whose name begins so."""
        return next((c for c in self.effect.controls if c.name.startswith(name)), None)

    def to_json(self) -> dict[str, Any]:
        return {
            "site": self.site,
            "layer": self.layer,
            "effect": self.effect.to_json(),
            "accuracy": None if self.accuracy is None else self.accuracy.to_json(),
            "reliability": None if self.reliability is None else self.reliability.to_json(),
            "row_folds": self.row_folds,
            "selectivity": self.selectivity,
            "p": None if self.p != self.p else self.p,
            "probe": describe(self.probe),
        }


@dataclass(frozen=True)
class ProbeSweep:
    """A probe at every site asked for. `picked` is the score when the site is chosen inside each training fold, which
    the best row's is not: it was looked at to be chosen. `notes` say what was left out, and why.
    """

    sites: tuple[SiteProbe, ...]
    picked: Effect
    data: ProbeData
    folds: int
    kind: ProbeKind
    seed: int
    notes: tuple[str, ...]

    @property
    def measure(self) -> str:
        return self.sites[0].effect.units

    @property
    def best(self) -> SiteProbe:
        """The row with the highest score."""
        return max(self.sites, key=lambda row: np.nan_to_num(row.effect.value, nan=-np.inf))

    @property
    def q(self) -> tuple[float, ...]:
        """For each row: the rate of false discoveries among all sites with a p as small."""
        return tuple(false_discovery([row.p for row in self.sites]).tolist())

    def at(self, site: str) -> SiteProbe:
        """The row of a site."""
        for row in self.sites:
            if row.site == site:
                return row
        raise CutawayError(f"The sweep has no site '{site}'; it has {', '.join(r.site for r in self.sites)}.")

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "measure": self.measure,
            "position": self.data.rule,
            "n": len(self.data),
            "groups": self.data.n_groups,
            "folds": self.folds,
            "classes": self.data.balance(),
            "rows": [{**row.to_json(), "q": None if q != q else q} for row, q in zip(self.sites, self.q, strict=True)],
            "picked": self.picked.to_json(),
            "best": self.best.site,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        balance = ", ".join(f"{name} {n}" for name, n in self.data.balance().items())
        groups = self.data.n_groups
        lines = [
            f"{self.kind} probe at the position rule '{self.data.rule}': {len(self.data)} examples in {groups} groups"
            + (f" ({balance})" if balance else "")
            + f", {self.folds} folds without a group on both sides"
        ]
        width = max(len(row.site) for row in self.sites)
        heads = [f"{'site':<{width}}", f"{self.measure:>6}  {'95 % interval':<15}", f"{'q':>6}"]
        heads += [f"{'accuracy':>8}"] if self.sites[0].accuracy else []
        names = [c.name for c in self.sites[0].effect.controls]
        short = [n for n in _SHORT if any(name.startswith(n) for name in names)]
        heads += [f"{_SHORT[n]:>9}" for n in short]
        heads += [f"{'selective':>9}"] if self.sites[0].selectivity is not None else []
        heads += [f"{'ECE':>5}  {'Brier':>5}"] if self.sites[0].reliability else []
        lines.append("  ".join(heads))
        for row, q in zip(self.sites, self.q, strict=True):
            cells = [f"{row.site:<{width}}", f"{row.effect.value:>6.3f}  {interval_text(row.effect.interval):<15}"]
            cells.append(f"{'–' if q != q else f'{q:.3f}':>6}")
            cells += [f"{row.accuracy.value:>8.3f}"] if row.accuracy else []
            for n in short:
                found = row.control(n)
                cells.append(f"{found.value:>9.3f}" if found else " " * 9)
            cells += [f"{row.selectivity:>9.3f}"] if row.selectivity is not None else []
            cells += [f"{row.reliability.ece:>5.3f}  {row.reliability.brier:>5.3f}"] if row.reliability else []
            lines.append("  ".join(cells))
        lines.append(f"site chosen inside each fold: {self.picked.value:.3f} {interval_text(self.picked.interval)}")
        for control in self.sites[0].effect.controls:
            if not any(control.name.startswith(n) for n in short):
                lines.append(f"{control.name}: {control.value:.3f} {interval_text(control.interval)}")
        if self.sites[0].accuracy:
            lines.append(f"majority class: accuracy {self.sites[0].accuracy.controls[0].value:.3f}")
        lines.append("q: of all sites above shuffled labels as surely, the share that is expected to be chance")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


# controls that differ from site to site, and how the table heads them
_SHORT = {"shuffled labels": "shuffled", "control task": "ctrl task", "untrained model": "untrained"}


def probe_sweep(
    lm: LanguageModel,
    texts: Any,
    labels: Sequence[Any],
    *,
    sites: str | Sequence[str] = "blocks.*.resid_post",
    head: int | None = None,
    kind: ProbeKind = "logistic",
    position: Position = "last",
    groups: Sequence[Any] | None = None,
    regression: bool | None = None,
    n_folds: int = 5,
    draws: int = 10,
    with_untrained: bool = True,
    calibration: Calibration | None = None,
    bos: bool | None = None,
    seed: int = 0,
    command: str | None = None,
) -> ProbeSweep:
    """Fit and judge a probe at every site, from one pass over the texts.

    `texts`, `labels`, `position`, `groups`, `regression` are those of `probe_data`; `kind` is one of `fitting.KINDS`;
    `head` picks one head of sites that have heads. The score is AUROC (macro, one class against the rest, for more
    than two classes) or R², always out of fold, with a 95 % interval over groups. `draws` is how often labels
    are shuffled and control tasks drawn. `calibration` is fitted inside each training fold.

    Raises CutawayError: what `probe_data` and `collect` raise, too few examples for the folds, a kind that does not fit
    the labels.
    """
    data = probe_data(lm, texts, labels, position=position, groups=groups, regression=regression, bos=bos)
    check_kind(kind, data.regression)
    check_folds(data.labels, data.groups, data.classes, n_folds)
    n_classes = None if data.classes is None else len(data.classes)
    if calibration is not None and n_classes != 2:
        raise CutawayError("Platt and isotonic calibration are for two classes; leave the calibration out.")
    if draws < 1:
        raise CutawayError(f"draws is {draws}; the controls need 1 or more.")
    splits = folds(data.labels, data.groups, n_folds, regression=data.regression, seed=seed)
    alone = np.arange(len(data))
    row_splits = folds(data.labels, alone, n_folds, regression=data.regression, seed=seed)
    names = lm.sites().expand_all(sites)
    features = collect(lm, data, names, head=head)
    notes: list[str] = []
    fixed = list(text_baselines(data, splits, seed))
    embedding = _other(collect(lm, data, "embed"), kind, data, splits, seed)["embed"]
    fixed.append(Control("embedding", embedding.value, embedding.interval, len(data)))
    random = _untrained(lm, data, names, head, with_untrained, seed, notes)
    types = control_types(data)
    if types is None:
        notes.append("no control task: no token or group comes twice, so it would be the shuffled labels")
    measured: dict[str, ScoredFolds] = {}
    rows = []
    with Progress("fitting probes", len(names), unit="sites") as progress:
        for name in names:
            x = features[name]
            done = measure(kind, x, data.labels, data.groups, n_classes, splits, seed=seed)
            measured[name] = done
            probe = _probe(lm, data, name, head, kind, x, calibration, seed)
            strength = probe.weights.chosen
            controls = [shuffled_control(kind, x, data, splits, strength, draws, seed)]
            leaky = measure(
                kind, x, data.labels, alone, n_classes, row_splits, strength=strength, seed=seed, interval=False
            ).value
            selectivity = None
            if types is not None:
                controls.append(control_task(kind, x, data, *types, row_splits, strength, draws, seed))
                selectivity = leaky - controls[-1].value
            if name in random:
                other = measure(kind, random[name], data.labels, data.groups, n_classes, splits, seed=seed)
                controls.append(Control("untrained model", other.value, other.interval, len(data)))
            rows.append(_row(data, probe, done, (*controls, *fixed), leaky, selectivity, calibration, seed))
            progress.advance(note=f"{name} {rows[-1].effect.units} {done.value:.3f}")
    if command is not None:
        rows = [_with_command(row, command) for row in rows]
    picked = _picked(data, measured, rows, n_classes, seed, command)
    return ProbeSweep(tuple(rows), picked, data, n_folds, kind, seed, tuple(notes))


def _other(
    found: dict[str, np.ndarray], kind: ProbeKind, data: ProbeData, splits: list[Any], seed: int
) -> dict[str, ScoredFolds]:
    n_classes = None if data.classes is None else len(data.classes)
    return {name: measure(kind, x, data.labels, data.groups, n_classes, splits, seed=seed) for name, x in found.items()}


def _untrained(
    lm: LanguageModel, data: ProbeData, names: list[str], head: int | None, wanted: bool, seed: int, notes: list[str]
) -> dict[str, np.ndarray]:
    """The examples in a model with new random weights, where one can be had."""
    if not wanted:
        notes.append("no untrained model: it was not asked for")
        return {}
    if lm.n_parameters > _UNTRAINED_LIMIT:
        notes.append(
            f"no untrained model: {lm.n_parameters / 1e9:.1f} billion parameters are too many for a second one"
        )
        return {}
    try:
        return collect(untrained(lm, seed), data, names, head=head)
    except CutawayError as error:
        notes.append(f"no untrained model: {error}")
        return {}


def _probe(
    lm: LanguageModel,
    data: ProbeData,
    name: str,
    head: int | None,
    kind: ProbeKind,
    x: np.ndarray,
    calibration: Calibration | None,
    seed: int,
) -> Probe:
    """The probe of all examples, which is what gets saved and used."""
    n_classes = None if data.classes is None else len(data.classes)
    weights, _, (scores, labels) = choose(kind, x, data.labels, data.groups, n_classes, seed=seed)
    calibrator = None if calibration is None else fit_calibrator(calibration, scores[:, 0], labels)
    return Probe(name, head, data.rule, kind, data.classes, weights, lm.identity(), len(data), calibrator)


def _row(
    data: ProbeData,
    probe: Probe,
    done: ScoredFolds,
    controls: tuple[Control, ...],
    leaky: float,
    selectivity: float | None,
    calibration: Calibration | None,
    seed: int,
) -> SiteProbe:
    kind, name = probe.kind, probe.site
    n_classes = None if data.classes is None else len(data.classes)
    judged = done.cv.fold >= 0
    units = "R²" if n_classes is None else "AUROC"
    effect = Effect(
        f"{kind} probe at {name}", done.value, int(judged.sum()), done.interval, controls, "none", units
    ).require_controls()
    accuracy = quality = None
    if n_classes is not None:
        hits = accuracy_hits(data.labels, done.cv.scores)[judged].astype(float)
        interval = mean_interval(hits, data.groups[judged], seed, share=True)
        majority = np.bincount(data.labels[judged]).max() / judged.sum()
        accuracy = Effect(
            f"{kind} probe at {name}",
            float(hits.mean()),
            int(judged.sum()),
            interval,
            (Control("majority class", float(majority), None, int(judged.sum())),),
            "none",
            "accuracy",
        )
        quality = reliability(calibrated(done.cv, calibration)[judged], data.labels[judged], calibration)
    p = chance_p(done.cv, data.labels, data.groups, seed=seed)
    return SiteProbe(name, layer_of(name), effect, accuracy, quality, leaky, selectivity, probe, p)


def _picked(
    data: ProbeData,
    measured: dict[str, ScoredFolds],
    rows: list[SiteProbe],
    n_classes: int | None,
    seed: int,
    command: str | None,
) -> Effect:
    """The score when each fold uses the site that its inner folds like best."""
    sites = list(measured)
    cvs = [measured[site].cv for site in sites]
    choice = np.argmax(np.nan_to_num(np.stack([cv.inner for cv in cvs]), nan=-np.inf), axis=0)  # [folds]
    scores, baseline = np.full_like(cvs[0].scores, np.nan), cvs[0].baseline
    fold = cvs[0].fold
    for place, number in enumerate(np.unique(fold[fold >= 0])):
        here = fold == number
        scores[here] = cvs[choice[place]].scores[here]
    scorer = Scorer(data.labels, scores, fold, baseline, n_classes)
    best = max(rows, key=lambda row: row.effect.value)
    return Effect(
        "site chosen inside each fold (" + ", ".join(sites[c] for c in choice) + ")",
        scorer(),
        int((fold >= 0).sum()),
        group_interval(scorer, data.groups, seed),
        best.effect.controls,
        "none",
        best.effect.units,
        command,
    )


def _with_command(row: SiteProbe, command: str) -> SiteProbe:
    from dataclasses import replace

    accuracy = None if row.accuracy is None else replace(row.accuracy, command=command)
    return replace(row, effect=replace(row.effect, command=command), accuracy=accuracy)
