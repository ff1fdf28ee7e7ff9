"""A circuit as sections of a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from markupsafe import Markup

from cutaway.artifacts.results import Effect
from cutaway.causal.circuits.circuit import Circuit
from cutaway.causal.circuits.completeness import Removal
from cutaway.causal.circuits.evidence import Evidence
from cutaway.causal.competence import ABLE
from cutaway.draw.charts import Bar, Series, bars_html, effect_html, line_legend, line_svg
from cutaway.draw.circuit import CircuitEdge, circuit_svg
from cutaway.draw.panels import alarm_html, figures_html, table_html
from cutaway.draw.text import interval

Section = tuple[str, str, Markup]
_SHOWN = 16


def circuit_sections(circuit: Circuit) -> list[Section]:
    """The verdict, the drawing, f by size, what is missing, what is idle, stability, self-repair, and the choices."""
    sections = []
    evidence = circuit.evidence
    if evidence is not None:
        sections.append(_verdict(circuit, evidence))
    sections.append(_drawing(circuit))
    if evidence is not None:
        sections += _sizes(evidence)
        sections += _several(evidence)
        sections += _parts(evidence)
        sections += _repair(evidence)
    sections.append(_choices(circuit))
    sections.append(_edges(circuit))
    return sections


def lead(circuit: Circuit) -> str:
    """What the page is about, in a sentence."""
    model = circuit.manifest.model.id if circuit.manifest.model else "a model"
    return (
        f"{model}, {circuit.task}: {circuit.n_edges:,} of {circuit.graph.n_edges:,} edges "
        f"({100 * circuit.share:.2g} %) between {len(circuit.nodes)} parts of the model and the logits."
    )


def _effects(effects: Iterable[Effect]) -> Markup:
    drawn = (effect_html(effect.to_json()) for effect in effects)
    return Markup("").join(Markup('<div style="margin-bottom: 1rem">{}</div>').format(one) for one in drawn)


def _verdict(circuit: Circuit, evidence: Evidence) -> Section:
    found = evidence.faithfulness
    low, high = found.interval or (None, None)
    tiles = figures_html(
        items=[
            {"label": "faithfulness", "value": found.value, "detail": interval(found.value, low, high)},
            {"label": "edges", "value": circuit.n_edges, "detail": f"{100 * circuit.share:.2g} % of the graph's"},
            {"label": "pairs", "value": found.n, "detail": "held out"},
        ]
    )
    above = (
        "It lies above the intervals of random circuits and of the strongest edges."
        if evidence.above_controls()
        else "It does NOT lie above the intervals of all its controls: this is no evidence for the circuit."
    )
    text = (
        f"How much of the metric's fall (from the whole model to the model with every edge ablated) is kept when only "
        f"the circuit's edges carry the clean prompt: 1 is all of it. Measured on {evidence.pairs}. {above}"
    )
    drawing = Markup('<div style="margin-bottom: 1.5rem">{}</div>{}').format(tiles, _effects(evidence.effects[:2]))
    able = circuit.method.get("competence")
    if able is not None and able["value"] < ABLE:
        cannot = f"The model cannot do the task: it is right on {able['right']} of {able['n']} pairs of the search. "
        drawing = alarm_html(f"{cannot}A circuit for what it does not do means nothing.") + drawing
    return ("Does the circuit do it?", text, drawing)


def _drawing(circuit: Circuit) -> Section:
    group = circuit.graph.n_heads // circuit.graph.kv
    edges: list[CircuitEdge] = [
        {"source": source, "destination": destination, "score": score, "group": group}
        for source, destination, score in circuit.edges
    ]
    drawing = circuit_svg(
        edges=edges, title=f"Circuit of {circuit.task}", units=circuit.metric.replace("_", " "),
        parallel=circuit.graph.parallel,
    )  # fmt: skip
    text = (
        "The embedding is below, the logits above; a head reads at q, k and v. The width of an edge grows with the "
        "square root of its score. Point at an edge for its score, at a node to see its edges alone."
    )
    return ("The circuit", text, drawing)


def _sizes(evidence: Evidence) -> list[Section]:
    if not evidence.curve:
        return []
    series: list[Series] = []
    for one in evidence.curve:
        series.append(
            {
                "name": one.name, "x": [max(1.0, edges) for edges in one.edges], "y": one.value, "low": one.low,
                "high": one.high, "control": one.control,
            }
        )  # fmt: skip
    chart = line_svg(
        series=series, title="Faithfulness by size", x_label="edges after pruning", y_label="faithfulness", log_x=True
    )
    rows = [
        [f"{100 * fraction:g} %"]
        + [f"{interval(one.value[i], one.low[i], one.high[i])} ({int(one.edges[i]):,})" for one in evidence.curve]
        for i, fraction in enumerate(evidence.fractions)
    ]
    table = table_html(
        columns=["of the edges", *(f"{one.name} (edges)" for one in evidence.curve)], rows=rows, title="By size"
    )
    fold = Markup("<details><summary>The same as a table</summary>{}</details>").format(table)
    areas = _effects(effect for effect in evidence.effects if effect.name in ("CPR", "CMD"))
    text = (
        "Bands are 95 % over pairs; for random circuits the spread of single ones. CPR is the area under the curve of "
        "the edges with the highest signed scores, CMD the area between 1 and that of the largest scores: by "
        "trapezoids over the ten sizes, linear in the share of edges, without what lies below the first (as the MIB "
        "benchmark has it)."
    )
    return [("Faithfulness by size", text, Markup("{}{}{}{}").format(chart, line_legend(series), fold, areas))]


def _several(evidence: Evidence) -> list[Section]:
    sections: list[Section] = []
    missing = [e for e in evidence.effects if e.name.startswith(("faithfulness of the complement", "incompleteness"))]
    if missing:
        rows = [
            [one.how, ", ".join(one.nodes), one.circuit, one.model, one.gap, abs(one.random - one.model)]
            for one in evidence.knockouts
        ]
        table = table_html(
            columns=["chosen", "nodes taken out", "circuit", "model", "gap", "control: random circuit's gap"],
            rows=rows,
            title="Knock-outs",
        )
        fold = Markup("<details><summary>Every set of nodes</summary>{}</details>").format(table)
        text = (
            "A complete circuit leaves nothing behind: its complement does nothing, and when the same nodes are taken "
            "out of circuit and model, both lose the same. Incompleteness is the gap between the two."
        )
        sections.append(("Is anything missing?", text, Markup("{}{}").format(_effects(missing), fold)))
    stable = [effect for effect in evidence.effects if effect.name.startswith("overlap")]
    if stable:
        text = (
            "The pairs were drawn again with replacement and the circuit selected anew each time. A Jaccard index of 1 "
            "means the same edges (nodes), 0 none in common."
        )
        sections.append(("Would other pairs give the same circuit?", text, _effects(stable)))
    return sections


def _bars(rows: Sequence[Removal]) -> Markup:
    items: list[Bar] = [
        {"label": one.part, "value": one.fall, "low": one.low, "high": one.high}
        for one in sorted(rows, key=lambda row: -abs(row.fall))[:_SHOWN]
    ]
    return bars_html(items=items, units="of the whole model's fall")


def _parts(evidence: Evidence) -> list[Section]:
    if not evidence.edges:
        return []
    idle = [effect for effect in evidence.effects if effect.name.startswith("idle")]
    text = (
        "What the circuit loses when one of its nodes, or one of its edges, is taken out, alone. An edge without which "
        "the faithfulness moves by less than 0.01 is idle."
    )
    over = Markup('<div class="cw-over">{}</div>')
    return [
        (
            "Is anything idle?",
            text,
            Markup("{}{}{}{}{}").format(
                _effects(idle), over.format(f"without one node (the {_SHOWN} largest)"), _bars(evidence.nodes),
                over.format(f"without one edge (the {_SHOWN} largest of those tried)"), _bars(evidence.edges),
            ),
        )
    ]  # fmt: skip


def _repair(evidence: Evidence) -> list[Section]:
    if not evidence.repaired:
        return []
    growth = [effect for effect in evidence.effects if effect.name.startswith("self-repair")]
    text = (
        f"How much more the whole model loses without a node once {evidence.repaired}, which costs most, is gone. "
        "Above 0 the node makes up for it."
    )
    return [("Does the model repair itself?", text, Markup("{}{}").format(_effects(growth), _bars(evidence.repair)))]


def _choices(circuit: Circuit) -> Section:
    rows = [[name, value] for name, value in circuit.choices.to_json().items()]
    rows += [[name.replace("_", " "), str(value)] for name, value in circuit.method.items() if name != "competence"]
    able = circuit.method.get("competence")
    if able:
        rows.append(["competence", f"right on {able['right']} of {able['n']} search pairs"])
    rows.append(["metric", circuit.metric])
    table = table_html(columns=["", ""], rows=rows, title="Choices")
    return ("The choices made", "Two circuits that differ in one of these are not comparable.", table)


def _edges(circuit: Circuit) -> Section:
    rows = [[source, destination, score] for source, destination, score in circuit.edges]
    table = table_html(columns=["from", "to", "score"], rows=rows, title="Edges")
    drawing = Markup("<details><summary>All {} edges</summary>{}</details>").format(circuit.n_edges, table)
    text = f"Scores are in {circuit.metric.replace('_', ' ')}; above 0 the answer loses it when the edge is cut."
    return ("Every edge", text, drawing)
