"""An attribution as sections of a page."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from cutaway.artifacts.results import interval_text
from cutaway.draw.charts import Bar, bars_html
from cutaway.draw.heatmap import heatmap_scale, heatmap_svg
from cutaway.draw.page import Section
from cutaway.draw.panels import figures_html, table_html
from cutaway.draw.tokens import TokenRow, tokens_html, tokens_scale
from cutaway.observe.attribution.ablation import AblatedPart
from cutaway.observe.attribution.attribution import NOT_A_CAUSE, Attribution

_SHOWN = 20


def attribution_sections(
    result: Attribution, ablated: Sequence[AblatedPart] = (), shown: int = _SHOWN
) -> list[Section]:
    """Totals, the largest parts with their controls, layer by layer drawings, and measured ablations."""
    sections = [_totals(result), _parts(result, shown)]
    sections += _layers(result)
    if result.by == "source":
        sections.append(_sources(result))
    if ablated:
        sections.append(ablations_section(ablated))
    return sections


def compared(result: Attribution) -> str:
    """What was attributed, as a phrase."""
    n = len(result.total)
    words = f"the logit of {result.answers[0]!r}"
    if result.wrong[0]:
        words += f" minus {result.wrong[0]}" if result.wrong_ids[0] == "mean" else f" minus that of {result.wrong[0]}"
    return words if n == 1 else f"{words} (prompt 1 of {n})"


def _totals(result: Attribution) -> Section:
    mean = float(result.total.mean())
    detail = "mean over the prompts" if len(result.total) > 1 else "at the attributed position"
    what = "the model's difference" if result.wrong[0] else "the model's logit"
    items = [
        {"label": what, "value": mean, "detail": detail},
        {"label": "sum of the parts", "value": float(result.values.sum(1).mean()), "detail": "frozen norms"},
        {"label": "largest error", "value": float(result.error.abs().max()), "detail": "of the sum"},
    ]
    if result.softcap is not None:
        capped = float(result.total_capped.mean())
        items.append({"label": "after the softcap", "value": capped, "detail": f"tanh, {result.softcap:g}"})
    notes = " ".join([*(f"Note: {note}." for note in result.notes), NOT_A_CAUSE])
    return ("The parts add up", notes, figures_html(items=items))  # type: ignore[arg-type]


def _parts(result: Attribution, shown: int) -> Section:
    parts = result.top(shown)
    bars: list[Bar] = []
    for part in parts:
        low, high = part.interval or (None, None)
        bars.append({"label": part.name, "value": part.value, "low": low, "high": high})
        bars.append({"label": "random pairs", "value": part.control, "control": True})
    controls = [[part.name, part.value, part.control, _span(part.control_range)] for part in parts]
    rest = float(result.values.mean(0).sum()) - sum(part.value for part in parts)
    left = result.values.shape[1] - len(parts)
    text = (
        f"Each part's share of {compared(result)}. The control is the same part's mean |share| for "
        f"{result.n_controls} random token pairs whose direction is as long: a part near its control writes much in "
        "every direction."
    )
    text += f" What is not shown ({left:,} {'part' if left == 1 else 'parts'}) adds {rest:+.3f}." if left else ""
    text += f" Intervals are over {len(result.total)} prompts." if len(result.total) > 1 else ""
    table = table_html(
        columns=("part", "share", "control: random pairs", "middle 95 %"), rows=controls, title="shares and controls"
    )
    fold = f"<details><summary>The same as a table</summary>{table}</details>"
    return ("The largest shares", text, Markup(f"{bars_html(items=bars, units='logits')}{fold}"))


def _span(ends: tuple[float, float]) -> str:
    return interval_text(ends, to=True)


def _layers(result: Attribution) -> list[Section]:
    """A heatmap of layer by head, or of layer by attention and MLP."""
    kinds = {group.kind for group in result.groups}
    layers = sorted({group.layer for group in result.groups if group.layer is not None})
    values: list[list[float | None]] = []
    columns: list[str] = []
    if result.by == "head" and not result.notes:
        values = [row.tolist() for row in result.by_layer("head")]
        columns = [f"H{i}" for i in range(len(values[0]))]
    else:
        values = [[] for _ in layers]
    splits = {"head": ["head"], "source": ["source"], "neuron": ["attention", "neuron"], "component": []}[result.by]
    extra = [] if columns else splits
    extra = [*extra, *(k for k in ("attention", "attention bias", "MLP", "MLP bias") if k in kinds and k not in extra)]
    for row, layer in zip(values, layers, strict=True):
        row += [_of(result, kind, layer) for kind in extra]
    names = {"head": "heads", "source": "sources", "neuron": "neurons", "attention bias": "attn bias"}
    drawing = heatmap_svg(
        rows=[f"L{layer}" for layer in layers],
        columns=[*columns, *(names.get(kind) or kind for kind in extra)],
        values=values,
        title="direct shares by layer",
        units="logits",
        scale="diverging",
    )
    legend = heatmap_scale(values, diverging=True).legend("logits")
    about = "Direct shares by layer" + (": every head, and what else writes." if columns else ".")
    return [("Layer by layer", about, Markup(f"{drawing}{legend}"))]


def _of(result: Attribution, kind: str, layer: int) -> float | None:
    found = [float(g.values[:, 0].mean(0).sum()) for g in result.groups if g.kind == kind and g.layer == layer]
    return sum(found) if found else None


def _sources(result: Attribution) -> Section:
    """The prompt, each token tinted by what attention brings from it."""
    rows: list[TokenRow] = []
    shares = result.by_source()
    for row in range(min(len(shares), 8)):
        first, words = int(result.tokens.first[row]), result.tokens.strings[row]
        values = shares[row, first : first + len(words)].tolist()
        shown: list[float | None] = [v if i <= result.position[row] else None for i, v in enumerate(values)]
        rows.append({"tokens": list(words), "values": shown, "label": f"prompt {row + 1}"})
    text = "What attention, in all heads and layers, writes directly into the difference from each token it reads."
    drawing = tokens_html(rows=rows, units="logits") + tokens_scale(rows).legend("logits")
    if len(shares) == 1:
        text += " Below, layer by layer."
        drawing += _by_layer_and_source(result)
    return ("Where attention brings it from", text, drawing)


def _by_layer_and_source(result: Attribution) -> Markup:
    """Layer by source position of the first prompt, heads together, up to the attributed position."""
    words = result.tokens.strings[0][: result.position[0] + 1]
    first, width = int(result.tokens.first[0]), result.tokens.ids.shape[1]
    groups = [group for group in result.groups if group.kind == "source"]
    values = [
        group.values[0, 0].unflatten(0, (-1, width)).sum(0)[first : first + len(words)].tolist() for group in groups
    ]
    return heatmap_svg(
        rows=[f"L{group.layer}" for group in groups],
        columns=list(words),
        values=values,
        title="direct share by layer and source token",
        units="logits",
        scale="diverging",
    )


def ablations_section(ablated: Sequence[AblatedPart]) -> Section:
    """Shares beside the measured falls, as a table."""
    rows = []
    for one in ablated:
        effect = one.effect
        control = effect.controls[0] if effect.controls else None
        span = "–" if effect.interval is None else _span(effect.interval)
        beside = None if control is None else control.value
        rows.append([one.part.name, one.part.value, effect.value, span, beside])
    text = (
        f"The fall of the logit difference when a part alone is replaced by its mean ({ablated[0].effect.ablation}). "
        "Where it is larger than the share, later layers read the part; where it is smaller, they make up for it. The "
        "control is the mean |fall| without parts of the same kind with smaller shares, drawn at random."
    )
    columns = ("part", "direct share", "fall when ablated", "95 % interval", "control")
    return ("What the answer loses without them", text, table_html(columns=columns, rows=rows, title="ablations"))
