"""Probes: can this be read off the model, where, and how much of it would show without the model?

`probe_sweep` reads every named site in one pass, cross-validates a probe at each, and puts every figure beside its
controls (`controls.py`). A probe is a detector, not a cause: `usage.use_probe` edits along its direction and
says what the model's answers do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.progress import Progress
from cutaway.artifacts.results import Control, Effect
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
from cutaway.observe.probes.data import ProbeData, collect
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
from cutaway.observe.probes.probe import Calibration, Probe, fit_calibrator
from cutaway.observe.probes.results import ProbeSweep, Reliability, SiteProbe
from cutaway.observe.random_weights import untrained

_UNTRAINED_LIMIT = 2_000_000_000


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


def _calibrated(cv: CrossValidated, method: Calibration | None) -> np.ndarray:
    """Out-of-fold probabilities [n, classes]; a calibration is fitted on each fold's training side alone."""
    if method is None:
        return probabilities(cv.scores)
    found = np.full((len(cv.scores), 2), np.nan)
    for fold, (scores, labels) in zip(np.unique(cv.fold[cv.fold >= 0]), cv.held, strict=True):
        here = cv.fold == fold
        positive = fit_calibrator(method, scores[:, 0], labels)(cv.scores[here, 0])
        found[here] = np.stack([1 - positive, positive], 1)
    return found


def probe_sweep(
    lm: LanguageModel,
    data: ProbeData,
    *,
    sites: str | Sequence[str] = "blocks.*.resid_post",
    head: int | None = None,
    kind: ProbeKind = "logistic",
    n_folds: int = 5,
    draws: int = 10,
    with_untrained: bool = True,
    calibration: Calibration | None = None,
    seed: int = 0,
) -> ProbeSweep:
    """Fit and judge a probe at every site, from one pass over the texts.

    The score is AUROC (macro, one class against the rest, for more than two classes) or R², always out of fold, with a
    95 % interval over groups. Beside it stand shuffled labels, a control task (Hewitt & Liang 2019,
    https://arxiv.org/abs/1909.03368), the bag of tokens, positions, the embedding, and an untrained model.

    Args:
        lm: the model.
        data: texts with their labels and groups, as `probe_data` makes them.
        sites: where to read; a wildcard names several.
        head: one head of sites that have heads; all of them side by side if None.
        kind: "logistic", "mass-mean", "mass-mean-whitened", "ridge" or "mlp"; the last two predict numbers too.
        n_folds: parts that the groups are dealt into, three or more.
        draws: how often labels are shuffled and control tasks drawn.
        with_untrained: also fit on the same architecture with new random weights.
        calibration: "platt" or "isotonic", fitted inside each training fold, for two classes; None leaves the probe's
            own probabilities.
        seed: of folds, draws and untrained weights.

    Returns:
        The probes, beside their controls.

    Raises:
        NoSuchSite: a site that the model has not.
        TooLarge: activations of more than 4 GiB.
        CutawayError: too few examples for the folds, a kind that does not fit the labels.

    Example:
        >>> lm = cutaway.load("atlas")
        >>> south, north = ["Dallas", "Houston", "Miami", "Austin"], ["Boston", "Chicago", "Detroit", "Seattle"]
        >>> data = probe_data(lm, [f"{city} is in" for city in south + north], ["South"] * 4 + ["North"] * 4)
        >>> probe_sweep(lm, data, sites="blocks.3.resid_post", n_folds=3, draws=1, with_untrained=False).best.site
        'blocks.3.resid_post'
    """
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
    picked = _picked(data, measured, rows, n_classes, seed)
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
        quality = reliability(_calibrated(done.cv, calibration)[judged], data.labels[judged], calibration)
    p = chance_p(done.cv, data.labels, data.groups, seed=seed)
    return SiteProbe(name, layer_of(name), effect, accuracy, quality, leaky, selectivity, probe, p)


def _picked(
    data: ProbeData,
    measured: dict[str, ScoredFolds],
    rows: list[SiteProbe],
    n_classes: int | None,
    seed: int,
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
    )
