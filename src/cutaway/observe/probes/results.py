"""What probes give: scores by site beside their controls, and what edits along a probe do to the answers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from markupsafe import Markup

from cutaway.artifacts.errors import NoSuchSite
from cutaway.artifacts.results import Control, Effect, interval_text
from cutaway.artifacts.statistics import false_discovery, wilson_interval
from cutaway.draw.charts import Series, effect_html, effects_html, line_legend, line_svg, line_table
from cutaway.draw.page import Section, sections_html
from cutaway.draw.panels import table_html
from cutaway.draw.result import Result
from cutaway.observe.probes.data import ProbeData
from cutaway.observe.probes.fitting import ProbeKind
from cutaway.observe.probes.probe import Probe, describe
from cutaway.observe.summaries import block, ends, sentence, spread

# controls that differ from site to site, and how the table heads them
_SHORT = {"shuffled labels": "shuffled", "control task": "ctrl task", "untrained model": "untrained"}


@dataclass(frozen=True)
class Reliability:
    """How well probabilities mean what they say, out of fold."""

    bins: tuple[tuple[float, float, int], ...]
    """(mean probability, share that were right, n) of ten equal bins: of the positive class for two classes, of the
    most probable class for more."""
    ece: float
    """Expected calibration error, Σ n_b/n |share − mean|."""
    brier: float
    """Mean squared error of the probabilities, summed over classes for more than two."""
    method: str | None
    """The calibration, None for the probe's own probabilities."""

    def to_json(self) -> dict[str, Any]:
        return {"bins": [list(b) for b in self.bins], "ece": self.ece, "brier": self.brier, "method": self.method}


@dataclass(frozen=True)
class SiteProbe:
    """One site: the score and accuracy beside their controls, and the probe fitted on all examples."""

    site: str
    """The site's name."""
    layer: int | None
    """Its layer."""
    effect: Effect
    """The score (AUROC or R²) out of fold, beside its controls."""
    accuracy: Effect | None
    """The accuracy beside the majority class; None for a regression."""
    reliability: Reliability | None
    """What its probabilities are worth; None for a regression."""
    row_folds: float
    """The score when single examples are dealt into folds, whatever their group: its excess is what leaks between the
    texts of a group."""
    selectivity: float | None
    """`row_folds` minus the control task, None without one (Hewitt & Liang 2019)."""
    probe: Probe
    """The probe fitted on all examples."""
    p: float = float("nan")
    """p of the score against labels dealt out anew; `ProbeSweep.q` counts the sites."""

    def control(self, name: str) -> Control | None:
        """A control of the score, None if there is none of that name.

        Args:
            name: how its name begins, such as "shuffled".
        """
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


@dataclass(frozen=True, eq=False, repr=False)
class ProbeSweep(Result):
    """A probe at every site asked for. `print` writes the table, `repr` a summary of it."""

    title: ClassVar[str] = "Probes by site"

    sites: tuple[SiteProbe, ...]
    """One probe per site."""
    picked: Effect
    """The score when the site is chosen inside each training fold, which the best site's is not: it was looked at to be
    chosen."""
    data: ProbeData
    """The examples."""
    folds: int
    """How many folds."""
    kind: ProbeKind
    """The kind of probe."""
    seed: int
    """Of folds and draws."""
    notes: tuple[str, ...]
    """What was left out, and why."""

    def summary(self) -> str:
        """The score at seven sites or fewer, and the best one beside its controls."""
        data, best = self.data, self.best.effect
        lines = [
            f"{self.kind} probe, position rule '{data.rule}': {len(data)} examples, {data.n_groups} groups",
            f"  {self.measure} out of fold [95 % over groups], {self.folds} folds",
        ]
        lines += [f"  {self.sites[i].site:<22}{self.sites[i].effect.figure(2)}" for i in spread(len(self.sites), 6)]
        lines.append(f"  site chosen inside each fold: {self.picked.figure(2)}")
        beside = ", ".join(f"{c.name.split(' (')[0]} {c.value:.2f}" for c in best.controls)
        return block([*lines, *sentence(f"{self.best.site} is best; beside it: {beside}", 3)])

    def rows(self) -> list[dict[str, Any]]:
        """One row per site: score and interval, p, q, accuracy, selectivity, and each control's value."""
        return [
            {"site": row.site, "layer": row.layer, "measure": self.measure, "score": row.effect.value}
            | {**ends(row.effect.interval), "n": row.effect.n, "p": row.p, "q": q}
            | {"accuracy": None if row.accuracy is None else row.accuracy.value, "row_folds": row.row_folds}
            | {"selectivity": row.selectivity}
            | {control.name: control.value for control in row.effect.controls}
            for row, q in zip(self.sites, self.q, strict=True)
        ]

    def drawing(self) -> Markup:
        """Scores by site beside the controls, the table, and the reliability of the best probe."""
        return sections_html(sweep_sections(self))

    @property
    def measure(self) -> str:
        """What the score is: AUROC or R²."""
        return self.sites[0].effect.units

    @property
    def best(self) -> SiteProbe:
        """The site with the highest score."""
        return max(self.sites, key=lambda row: np.nan_to_num(row.effect.value, nan=-np.inf))

    @property
    def q(self) -> tuple[float, ...]:
        """For each site: the rate of false discoveries among all sites with a p as small."""
        return tuple(false_discovery([row.p for row in self.sites]).tolist())

    def at(self, site: str) -> SiteProbe:
        """The probe of a site.

        Args:
            site: its name.

        Raises:
            NoSuchSite: the sweep has no such site.
        """
        for row in self.sites:
            if row.site == site:
                return row
        raise NoSuchSite(f"The sweep has no site '{site}'; it has {', '.join(r.site for r in self.sites)}.")

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


@dataclass(frozen=True)
class UseAction:
    """One action along the probe's direction."""

    action: str
    """"ablate", "ablate, mean", "steer +" or "steer −"."""
    effect: Effect
    """The mean change of the metric, beside the mean difference and random directions."""
    random: tuple[float, float]
    """The smallest and the largest mean change of the random directions."""
    size: tuple[float, float, float]
    """Mean |Δ| of a touched value: the probe's, the mean difference's, the random directions'."""


@dataclass(frozen=True, eq=False, repr=False)
class ProbeUse(Result):
    """What editing along a probe's direction does to the answers.

    Ablations: mean change of each text's own answer metric, so negative means that the model needed the direction.
    Steering: mean change towards the positive class's answer.
    """

    title: ClassVar[str] = "Does the model use what a probe reads?"

    site: str
    """Where it was edited."""
    actions: tuple[UseAction, ...]
    """Two ablations and two steps."""
    before: float
    """The unedited mean of the own-answer metric."""
    gap: float
    """Norm of a steering step."""
    cosine: float
    """Cosine between the probe's direction and the mean difference."""
    n: int
    """How many texts."""
    towards: str | None
    """The positive class; None for a regression."""
    verdict: str
    """Which actions do more than any random direction, in a sentence."""

    def summary(self) -> str:
        """The change by action, beside random directions, and the verdict."""
        lines = [
            f"edits along the probe at {self.site}, towards {self.towards or 'high values'}: {self.n} texts",
            f"  {self.actions[0].effect.units} {self.before:.3g} before [95 % over groups]",
        ]
        for row in self.actions:
            change = row.effect.figure(2)
            lines.append(f"  {row.action:<13}{change:<23} random {row.effect.controls[1].value:.2f}")
        return block([*lines, *sentence(self.verdict, 4)])

    def rows(self) -> list[dict[str, Any]]:
        """One row per action: change and interval, the mean difference, and random directions."""
        return [
            {"site": self.site, "action": row.action, "change": row.effect.value, **ends(row.effect.interval)}
            | {"mean_difference": row.effect.controls[0].value, "random": row.effect.controls[1].value}
            | {"random_low": row.random[0], "random_high": row.random[1], "n": row.effect.n}
            | {"units": row.effect.units}
            for row in self.actions
        ]

    def drawing(self) -> Markup:
        """Each action's effect beside its controls."""
        return sections_html([use_section(self)])

    def to_json(self) -> dict[str, Any]:
        return {
            "site": self.site,
            "before": self.before,
            "gap": self.gap,
            "cosine_with_mean_difference": self.cosine,
            "n": self.n,
            "towards": self.towards,
            "verdict": self.verdict,
            "rows": [
                {
                    "action": r.action,
                    "effect": r.effect.to_json(),
                    "random_range": list(r.random),
                    "size": list(r.size),
                }
                for r in self.actions
            ],
        }

    def __str__(self) -> str:
        units = self.actions[0].effect.units
        lines = [
            f"use at {self.site}, towards {self.towards or 'high values'}: {self.n} texts, {units} before "
            f"{self.before:.3g}; a step is {self.gap:.3g} long; "
            f"cosine with the mean difference {self.cosine:.2f}",
            f"{'action':<13}  {'change':>7}  {'95 % interval':<18}  {'mean diff.':>10}  {'random':>7}  "
            f"{'|Δ| probe/mean diff./random'}",
        ]
        for row in self.actions:
            mass, chance = row.effect.controls[:2]
            sizes = " / ".join(f"{s:.2g}" for s in row.size)
            lines.append(
                f"{row.action:<13}  {row.effect.value:>7.3f}  {interval_text(row.effect.interval):<18}  "
                f"{mass.value:>10.3f}  {chance.value:>7.3f}  {sizes}"
            )
        return "\n".join([*lines, self.verdict])


def sweep_sections(sweep: ProbeSweep) -> list[Section]:
    """Scores by layer beside the controls, the table, and the reliability of the best probe."""
    best = sweep.best
    note = (
        f"Out of fold, {sweep.folds} folds, no group on both sides; intervals are over groups. With the site chosen "
        f"inside each fold: {sweep.picked.value:.3f} {interval_text(sweep.picked.interval)}. "
    )
    sections: list[Section] = []
    if len(sweep.sites) > 1:
        series = _layer_series(sweep)
        drawing = line_svg(series=series, title=f"{sweep.measure} by site", x_label="layer", y_label=sweep.measure)
        sections.append(
            (f"{sweep.measure} by site", note, Markup(drawing) + line_legend(series) + line_table(series, "layer"))
        )
        note = "It was chosen by this score, so it flatters itself a little. "
    sections += [
        (f"{best.site} beside its controls", note, effect_html(best.effect.to_json())),
        ("Every figure", _table_note(sweep), table_html(**_sweep_table(sweep), title="probes by site")),
    ]
    if best.reliability is not None:
        sections.append(_reliability(best.reliability, best.site))
    return sections


def _reliability(found: Reliability, site: str) -> Section:
    bins = found.bins
    drawn: list[Series] = [
        {"name": "stated and true alike", "x": [0.0, 1.0], "y": [0.0, 1.0], "control": True},
        {
            "name": site,
            "x": [b[0] for b in bins],
            "y": [b[1] for b in bins],
            "low": [wilson_interval(round(share * n), n)[0] for _, share, n in bins],
            "high": [wilson_interval(round(share * n), n)[1] for _, share, n in bins],
        },
    ]
    x, y = "probability that the probe states", "share that was so"
    drawing = line_svg(series=drawn, title="reliability", x_label=x, y_label=y)
    text = (
        f"The best probe, out of fold. Expected calibration error {found.ece:.3f}, Brier score {found.brier:.3f}; "
        f"examples in the bins: {', '.join(str(b[2]) for b in bins)}. The band is a 95 % interval."
    )
    return "Do its probabilities mean what they say?", text, Markup(drawing) + line_legend(drawn) + line_table(drawn, x)


def use_section(used: ProbeUse) -> Section:
    """Each action's effect beside its controls."""
    drawings = effects_html(replace(row.effect, name=_action_title(row.action, used.towards)) for row in used.actions)
    text = (
        f"{used.verdict} Each text was edited along a direction fitted without it. Ablations: change of each text's "
        f"own {used.actions[0].effect.units} ({used.before:.3g} before). Steering by one gap between the classes' "
        f"means: change towards the answer of {used.towards or 'high values'}. "
        f"Cosine between the probe and the mean difference: {used.cosine:.2f}."
    )
    return f"Does the model use it? Edits along the probe at {used.site}", text, drawings


def _action_title(action: str, towards: str | None) -> str:
    """An action as a heading."""
    goal = towards or "high values"
    return {
        "ablate": "ablate: no component along it",
        "ablate, mean": "ablate: its component set to the mean",
        "steer +": f"steer towards {goal}",
        "steer −": f"steer away from {goal}",
    }[action]


def _layer_series(sweep: ProbeSweep) -> list[Series]:
    """The curves of the page: the probe, what differs by site beside it, and flat lines for the rest."""
    layers = [row.layer for row in sweep.sites]
    known = [layer for layer in layers if layer is not None]
    x = [float(v) for v in known] if len(set(known)) == len(layers) else [float(i) for i in range(len(layers))]
    ends = [row.effect.interval or (None, None) for row in sweep.sites]
    series: list[Series] = [
        {
            "name": f"{sweep.kind} probe",
            "x": x,
            "y": [row.effect.value for row in sweep.sites],
            "low": [end[0] for end in ends],
            "high": [end[1] for end in ends],
        }
    ]
    for i, control in enumerate(sweep.sites[0].effect.controls):
        values = [row.effect.controls[i].value for row in sweep.sites]
        series.append({"name": control.name, "x": x, "y": values, "control": True})
    return series


def _sweep_table(sweep: ProbeSweep) -> dict[str, Any]:
    """Columns and rows of every figure, as `table_html` takes them."""
    columns = ["site", sweep.measure, "95 % interval", "q"]
    first = sweep.sites[0]
    columns += ["accuracy"] if first.accuracy else []
    # those that are the same for every site stand beside the best one
    varying = [
        i
        for i, control in enumerate(first.effect.controls)
        if len(sweep.sites) == 1 or any(row.effect.controls[i] != control for row in sweep.sites)
    ]
    columns += [first.effect.controls[i].name.split(" (")[0] for i in varying]
    columns += ["folds by row"] + (["selectivity"] if first.selectivity is not None else [])
    columns += ["ECE", "Brier"] if first.reliability else []
    rows = []
    for row, q in zip(sweep.sites, sweep.q, strict=True):
        cells = [row.site, f"{row.effect.value:.3f}", interval_text(row.effect.interval, to=True)]
        cells.append("–" if q != q else f"{q:.3f}")
        cells += [f"{row.accuracy.value:.3f}"] if row.accuracy else []
        cells += [f"{row.effect.controls[i].value:.3f}" for i in varying]
        cells += [f"{row.row_folds:.3f}"] + ([f"{row.selectivity:.3f}"] if row.selectivity is not None else [])
        cells += [f"{row.reliability.ece:.3f}", f"{row.reliability.brier:.3f}"] if row.reliability else []
        rows.append(cells)
    return {"columns": columns, "rows": rows}


def _table_note(sweep: ProbeSweep) -> str:
    """What stands over the table."""
    parts = [
        "“folds by row” deals single rows into folds, so that a group stands on both sides: its excess is what leaks. "
        "Selectivity is that minus the control task. q: of all sites above shuffled labels as surely, the share that "
        "is expected to be chance."
    ]
    if sweep.sites[0].accuracy:
        parts.append(f"The majority class has accuracy {sweep.sites[0].accuracy.controls[0].value:.3f}.")
    return " ".join([*parts, *(f"Note: {note}." for note in sweep.notes)])
