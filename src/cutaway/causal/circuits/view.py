"""A circuit as sections of a page."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup

from cutaway.causal.accuracy import ABLE
from cutaway.causal.circuits.circuit import Circuit
from cutaway.causal.circuits.evidence import Evidence
from cutaway.causal.effects import effects_drawing
from cutaway.draw.circuit import CircuitEdge, circuit_svg
from cutaway.draw.panels import alarm_html, figures_html, table_html
from cutaway.draw.text import interval

Section = tuple[str, str, Markup]
"""Heading, text under it, drawing: what `page_html` takes."""


def circuit_sections(circuit: Circuit) -> list[Section]:
    """The verdict, the drawing, f by size, what is missing, what is idle, stability, self-repair, and the choices."""
    sections = []
    evidence = circuit.evidence
    if evidence is not None:
        sections.append(_verdict(circuit, evidence))
    sections.append(_drawing(circuit))
    if evidence is not None:
        sections += _parts(evidence)
    sections.append(_choices(circuit))
    sections.append(_edges(circuit))
    return sections


def circuit_drawing(circuit: Circuit) -> Markup:
    """All sections as one drawing, the circuit itself first."""
    return sections_html(sorted(circuit_sections(circuit), key=lambda section: section[0] != "The circuit"))


def lead(circuit: Circuit) -> str:
    """What the page is about, in a sentence."""
    model = circuit.manifest.model.id if circuit.manifest.model else "a model"
    return (
        f"{model}, {circuit.task}: {circuit.n_edges:,} of {circuit.graph.n_edges:,} edges "
        f"({100 * circuit.share:.2g} %) between {len(circuit.nodes)} parts of the model and the logits."
    )


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
    drawing = Markup('<div style="margin-bottom: 1.5rem">{}</div>{}').format(tiles, _faithfulness(evidence))
    able = circuit.method.get("task_accuracy")
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


def evidence_sections(evidence: Evidence) -> list[Section]:
    """Faithfulness, f by size, what is missing, stability, what is idle, self-repair."""
    return [("Faithfulness", f"Measured on {evidence.pairs}.", _faithfulness(evidence)), *_parts(evidence)]


def sections_html(sections: Iterable[Section]) -> Markup:
    """Sections below one another, each under its heading, as one drawing."""
    one = Markup("<section><h2>{}</h2><p>{}</p>{}</section>")
    return Markup("").join(one.format(*section) for section in sections)


def _faithfulness(evidence: Evidence) -> Markup:
    return effects_drawing(evidence.effects[:2], "Faithfulness")


def _parts(evidence: Evidence) -> list[Section]:
    parts = (
        (evidence.size_curve, _SIZES),
        (evidence.completeness, _MISSING),
        (evidence.stability, _STABLE),
        (evidence.minimality, _IDLE),
        (
            evidence.self_repair,
            f"How much more the whole model loses without a node once {evidence.repaired}, which costs most, is gone. "
            "Above 0 the node makes up for it.",
        ),
    )
    return [(part.title, text, part.drawing()) for part, text in parts if part is not None]


_SIZES = (
    "Bands are 95 % over pairs; for random circuits the spread of single ones. CPR is the area under the curve of "
    "the edges with the highest signed scores, CMD the area between 1 and that of the largest scores: by "
    "trapezoids over the ten sizes, linear in the share of edges, without what lies below the first (as the MIB "
    "benchmark has it)."
)
_MISSING = (
    "A complete circuit leaves nothing behind: its complement does nothing, and when the same nodes are taken "
    "out of circuit and model, both lose the same. Incompleteness is the gap between the two."
)
_STABLE = (
    "The pairs were drawn again with replacement and the circuit selected anew each time. A Jaccard index of 1 "
    "means the same edges (nodes), 0 none in common."
)
_IDLE = (
    "What the circuit loses when one of its nodes, or one of its edges, is taken out, alone. An edge without which "
    "the faithfulness moves by less than 0.01 is idle."
)


def _choices(circuit: Circuit) -> Section:
    rows = [[name, value] for name, value in circuit.choices.to_json().items()]
    rows += [[name.replace("_", " "), str(value)] for name, value in circuit.method.items() if name != "task_accuracy"]
    able = circuit.method.get("task_accuracy")
    if able:
        rows.append(["task accuracy", f"right on {able['right']} of {able['n']} search pairs"])
    rows.append(["metric", circuit.metric])
    table = table_html(columns=["", ""], rows=rows, title="Choices")
    return ("The choices made", "Two circuits that differ in one of these are not comparable.", table)


def _edges(circuit: Circuit) -> Section:
    rows = [[source, destination, score] for source, destination, score in circuit.edges]
    table = table_html(columns=["from", "to", "score"], rows=rows, title="Edges")
    drawing = Markup("<details><summary>All {} edges</summary>{}</details>").format(circuit.n_edges, table)
    text = f"Scores are in {circuit.metric.replace('_', ' ')}; above 0 the answer loses it when the edge is cut."
    return ("Every edge", text, drawing)
