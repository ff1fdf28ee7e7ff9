"""Heads as sections of a page: labelled heads, maps of scores and effects, the prompt's attention, composition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.results import interval_text
from cutaway.draw.charts import effect_html
from cutaway.draw.heatmap import heatmap_svg
from cutaway.draw.page import Section
from cutaway.draw.panels import table_html
from cutaway.draw.scale import Scale
from cutaway.observe.heads.ablation import HeadEffects
from cutaway.observe.heads.attention_view import AttentionView
from cutaway.observe.heads.circuit_results import COMPOSITIONS, Composition, CopyingScores
from cutaway.observe.heads.kinds import ON_TEXT, KindScores, meaning
from cutaway.observe.heads.report import KINDS, Head, HeadReport, HeadScores, name
from cutaway.observe.heads.table import LABEL_RULE, HeadTable, q_text
from cutaway.observe.summaries import with_interval

_SHARE, _BALANCE = Scale(0.0, 1.0), Scale(-1.0, 1.0, True)


def table_sections(
    table: HeadTable,
    kinds: Sequence[str] | None = None,
    top: int = 5,
    view: AttentionView | None = None,
    composed: Composition | None = None,
) -> list[Section]:
    """The labelled heads as a table, a map for each kind and each ablation, and what else was looked at."""
    kinds = list(table.kinds) if kinds is None else kinds
    sections = [
        (
            "Labelled heads",
            f"{' '.join(table.verdicts())} {LABEL_RULE} Δ is the rise of the loss in nats without that head alone: on "
            "the second copy for kinds of repetition, else on the prompt where there is one. Other heads: the same "
            "ablation of each head without the label. A pattern is not a cause, and heads that stand in for each other "
            "cost little alone.",
            _labelled(table, kinds, top),
        )
    ]
    if view is not None:
        strongest = (found[0].head for kind in ("induction", "previous") if (found := table.of_kind(kind, 1)))
        first = next(strongest, view.start)
        shown = replace(view, start=first if first in view.heads else view.start)
        sections.append(("Attention", "Choose a head below; point at a token.", shown.html()))
    sections += [kind_section(table.kinds[kind]) for kind in kinds]
    changes = [effects for by in table.effects.values() for effects in by.values()]
    for behaviour, by in table.effects.items():
        for effects in by.values():
            same = [other for other in changes if other.units == effects.units]
            sections.append(effects_section(effects, behaviour, same))
    if composed is not None:
        sections.append(composition_section(composed))
    return sections


def kind_section(scores: KindScores) -> Section:
    """A map of one kind of score."""
    what = f"{meaning(scores.kind)}. Control: {scores.control_name}. Labelled heads are outlined."
    scale = _BALANCE if scores.kind == "copying" else _SHARE
    drawing = head_map(scores.score, scores.units, scores.kind, scale, scores.heads())
    return f"{scores.kind} heads", what, drawing


def effects_section(effects: HeadEffects, behaviour: str = "", same: Sequence[HeadEffects] = ()) -> Section:
    """A map of what each head's ablation changes, on one scale with `same`, others in the same units."""
    heading = f"{effects.ablation.capitalize()} ablation" + (f": {behaviour}" if behaviour else "")
    what = f"Change in {effects.units} when that head alone is ablated, mean over {len(effects.base)} rows."
    means = [one.mean for one in same or [effects]]
    reach = max(float(mean[~mean.isnan()].abs().max()) for mean in means) or 1.0
    units = "nats" if effects.units.startswith("nats") else effects.units
    return heading, what, head_map(effects.mean, units, heading, Scale(-reach, reach, True))


def scores_sections(scores: HeadScores) -> list[Section]:
    """A map per kind."""
    return [
        (f"{kind} heads", f"Mean attention: {meaning(kind)}.", head_map(getattr(scores, kind), "", kind, _SHARE))
        for kind in KINDS
    ]


def report_sections(report: HeadReport) -> list[Section]:
    """The maps of the scores, the heads ablated alone, and together beside random heads."""
    rows = [[r.kind, name(r.head), *(f"{x:.3f}" for x in (r.score, r.zero, r.mean))] for r in report.heads]
    columns = ("kind", "head", "score", "Δ loss at zero", "Δ loss at its mean")
    alone = table_html(columns=columns, rows=rows, title="Heads ablated alone")
    together = Markup("").join(
        Markup("<p>{} ({})</p>").format(effect.name, effect.ablation) + effect_html(effect.to_json())
        for effect in report.effects
    )
    return [
        *scores_sections(report.scores),
        ("Ablated alone", "Rise of the loss on the second copy, in nats.", alone),
        ("Ablated together", "Beside as many random heads.", together),
    ]


def composition_section(composed: Composition) -> Section:
    """The pairs of heads with the largest composition scores."""
    rows = [
        [kind.upper(), name(writer), name(reader), round(value, 3), round(value - composed.baseline, 3)]
        for kind in COMPOSITIONS
        if kind not in composed.left_out
        for writer, reader, value in composed.top(kind)
    ]
    left_out = "".join(f" {kind.upper()} is not measured: {why}." for kind, why in composed.left_out.items())
    text = (
        "How much of what a later head reads (as query, key or value) an earlier one writes, by their weights alone. "
        f"Random heads of these shapes score {composed.baseline:.3f} "
        f"{interval_text(composed.baseline_interval)}.{left_out}"
    )
    columns = ("input", "writer", "reader", "score", "above random")
    return "Composition", text, table_html(columns=columns, rows=rows, title="Composition scores")


def copying_section(scores: CopyingScores) -> Section:
    """A map of the copying scores."""
    what = (
        f"{meaning('copying')}. {scores.draws} random heads score {scores.chance:.3f} "
        f"{interval_text(scores.chance_interval)}."
    )
    return "copying heads", what, head_map(scores.score, "balance of eigenvalues", "copying", _BALANCE)


def head_map(values: Tensor, units: str, title: str, scale: Scale, marks: Sequence[Head] = ()) -> Markup:
    """Layer × head, one cell per head, with its scale."""
    layers, heads = values.shape
    drawn = heatmap_svg(
        rows=[f"layer {i}" for i in range(layers)],
        columns=[f"head {i}" for i in range(heads)],
        values=values.tolist(),
        title=title,
        units=units,
        marks=marks,
        scale=scale,
    )
    return drawn + scale.legend(units)


def lead(table: HeadTable) -> str:
    """What was read on what, in a sentence."""
    sequences = next((scores.n for kind, scores in table.kinds.items() if kind.endswith(ON_TEXT)), None)
    on_text = "" if sequences is None else f", and on {sequences} sequence{'s' if sequences > 1 else ''} of text"
    return (
        f"{table.model}: {table.n_layers} layers of {table.n_heads} heads, read on {table.repetition.n} random "
        f"sequences that come twice{on_text}."
    )


def _labelled(table: HeadTable, kinds: Sequence[str], top: int) -> Markup:
    """Scores beside their controls, and ablations beside theirs."""
    found = [row for kind in kinds for row in table.of_kind(kind, top)]
    if not found:
        return Markup("<p>No head is above its control.</p>")
    columns = ["kind", "head", "score", "its control", "q"]
    for effect in found[0].effects:
        columns += [f"Δ {effect.ablation.removesuffix(' ablation')}", "other heads"]
    cells = []
    for row in found:
        control = row.score.controls[0]
        line = [row.kind, name(row.head)]
        line += [with_interval(row.score.value, row.score.interval), with_interval(control.value, control.interval)]
        line += [q_text(row.q)]
        for effect in row.effects:
            others = effect.require_controls().controls[0]
            line += [with_interval(effect.value, effect.interval, 3), with_interval(others.value, None, 3)]
        cells.append(line)
    return table_html(columns=columns, rows=cells, title="Labelled heads", align=["left"] * len(columns))
