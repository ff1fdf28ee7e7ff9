"""Probes as sections of a page: scores by site beside the controls, every figure, and the use of the best probe."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from cutaway.artifacts.results import interval_text
from cutaway.artifacts.statistics import wilson_interval
from cutaway.draw.charts import Series, effect_html, line_legend, line_svg
from cutaway.draw.page import Section
from cutaway.draw.panels import table_html
from cutaway.observe.probes.results import ProbeSweep, ProbeUse, Reliability


def sweep_sections(sweep: ProbeSweep) -> list[Section]:
    """Scores by layer beside the controls, the table, and the reliability of the best probe."""
    best = sweep.best
    note = (
        f"Out of fold, {sweep.folds} folds, no group on both sides; intervals are over groups. With the site chosen "
        f"inside each fold: {sweep.picked.value:.3f} {interval_text(sweep.picked.interval)}. "
    )
    sections: list[Section] = []
    if len(sweep.sites) > 1:
        series = layer_series(sweep)
        drawing = line_svg(series=series, title=f"{sweep.measure} by site", x_label="layer", y_label=sweep.measure)
        sections.append((f"{sweep.measure} by site", note, Markup(drawing) + line_legend(series)))
        note = "It was chosen by this score, so it flatters itself a little. "
    sections += [
        (f"{best.site} beside its controls", note, effect_html(best.effect.to_json())),
        ("Every figure", table_note(sweep), table_html(**sweep_table(sweep), title="probes by site")),
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
    return "Do its probabilities mean what they say?", text, Markup(drawing) + line_legend(drawn)


def use_section(used: ProbeUse) -> Section:
    """Each action's effect beside its controls."""
    drawings = Markup("").join(
        Markup("<h3>{}</h3>").format(action_title(row.action, used.towards)) + effect_html(row.effect.to_json())
        for row in used.actions
    )
    text = (
        f"{used.verdict} Each text was edited along a direction fitted without it. Ablations: change of each text's "
        f"own {used.actions[0].effect.units} ({used.before:.3g} before). Steering by one gap between the classes' "
        f"means: change towards the answer of {used.towards or 'high values'}. "
        f"Cosine between the probe and the mean difference: {used.cosine:.2f}."
    )
    return f"Does the model use it? Edits along the probe at {used.site}", text, drawings


def action_title(action: str, towards: str | None) -> str:
    """An action as a heading."""
    goal = towards or "high values"
    return {
        "ablate": "ablate: no component along it",
        "ablate, mean": "ablate: its component set to the mean",
        "steer +": f"steer towards {goal}",
        "steer −": f"steer away from {goal}",
    }[action]


def layer_series(sweep: ProbeSweep) -> list[Series]:
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


def sweep_table(sweep: ProbeSweep) -> dict[str, Any]:
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


def table_note(sweep: ProbeSweep) -> str:
    """What stands over the table."""
    parts = [
        "“folds by row” deals single rows into folds, so that a group stands on both sides: its excess is what leaks. "
        "Selectivity is that minus the control task. q: of all sites above shuffled labels as surely, the share that "
        "is expected to be chance."
    ]
    if sweep.sites[0].accuracy:
        parts.append(f"The majority class has accuracy {sweep.sites[0].accuracy.controls[0].value:.3f}.")
    return " ".join([*parts, *(f"Note: {note}." for note in sweep.notes)])
