"""A lens as sections of a page: what each layer would say, and how it comes to the answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from cutaway.draw.charts import Series, line_legend, line_svg, line_table
from cutaway.draw.heatmap import heatmap_html, heatmap_scale
from cutaway.draw.page import Section
from cutaway.draw.panels import table_html
from cutaway.draw.text import visible
from cutaway.draw.tokens import lens_html

_WIDEST = 40


def lens_sections(data: dict[str, Any], other: dict[str, Any] | None = None) -> list[Section]:
    """Grid of top tokens, trajectory at the last position read, and the other positions, of a row's `to_json`.

    With `other`, of a tuned lens and the same prompt, its grid and its curves stand beside the logit lens's.
    """
    sections: list[Section] = []
    for one in [data] if other is None else [other, data]:
        about = (
            "Each layer's stream through the final norm and the unembedding: its most probable next token and its "
            "probability. The last layer is the model's own output."
        )
        if one is other:
            about = (
                "Each layer's stream through its trained translator first. The translator may find what the model "
                "itself takes from elsewhere: this is predictable here, not yet used."
            )
        sections.append((f"What each layer would say: {one['lens']}", about, _grid(one)))
    sections.append(_trajectory(data, other))
    if len(data["positions"]) > 1:
        sections.append(_distance(data, other))
    return sections


def _grid(data: dict[str, Any]) -> Markup:
    left = max(0, len(data["positions"]) - _WIDEST)
    tokens = data["tokens"][left:]
    grid = lens_html(
        layers=[short_site(layer) for layer in data["layers"]],
        tokens=tokens,
        top=[row[left:] for row in data["top"]],
        probability=[row[left:] for row in data["probability"]],
        title=f"{data['lens']} of {data['model']}: top token by layer and position",
    )
    more = (
        Markup(f'<p class="cw-small">The last {_WIDEST} positions; {left} before them are left out.</p>')
        if left
        else ""
    )
    return grid + more


def _trajectory(data: dict[str, Any], other: dict[str, Any] | None) -> Section:
    """Curves over layers at the last position read, and a table of the top tokens there."""
    at, layers = len(data["positions"]) - 1, list(range(len(data["layers"])))

    def curve(source: dict[str, Any], key: str, name: str, control: bool = False) -> Series:
        return {"name": name, "x": layers, "y": _column(source[key], at), "control": control}

    drawings = []
    for key, label in (("kl", "KL(final ‖ layer), nats"), ("entropy", "entropy, nats")):
        series = [curve(data, key, data["lens"], control=other is not None)]
        series += [curve(other, key, other["lens"])] if other is not None else []
        if key == "kl" and data["layers"][0] == "embed" and len(layers) > 2:
            series = [without_first(one) for one in series]  # so far off that the rest would lie on the axis
            label += ", from layer 0 on"
        drawings.append(_plot(series, label))
    followed = _followed(other or data)
    if followed:
        chances: list[Series] = [
            {"name": visible(word), "x": layers, "y": _column(chance, at)} for word, chance, _ in followed
        ]
        ranks: list[Series] = [
            {"name": visible(word), "x": layers, "y": [math.log10(rank + 1) for rank in _column(places, at)]}
            for word, _, places in followed
        ]
        which = (other or data)["lens"]
        drawings.append(_plot(chances, f"probability ({which})"))
        drawings.append(_plot(ranks, f"rank, log₁₀(1 + rank) ({which}); 0 is on top"))
    shown = other or data
    rows = []
    for i, layer in enumerate(shown["layers"]):
        best = zip(shown["top_words"][i][at], shown["top_probability"][i][at], strict=True)
        rows.append([short_site(layer), *(f"{visible(word)} {_chance(chance)}" for word, chance in best)])
    n = len(rows[0]) - 1
    table = table_html(columns=("", *map(str, range(1, n + 1))), rows=rows, title="top tokens by layer")
    caption = Markup(f'<p class="cw-small">The {n} most probable tokens and their probabilities, {shown["lens"]}.</p>')
    place = f"position {data['positions'][at]}, after “{visible(data['tokens'][at])}”"
    text = "What the layers say where the answer is due. 0 on the axis is the embedding, l + 1 is after layer l."
    plots = Markup(f'<div style="display:flex;flex-wrap:wrap;gap:14px 28px">{"".join(drawings)}</div>')
    return (f"Layer by layer at {place}", text, plots + caption + table)


def short_site(name: str) -> str:
    """A site of the stream as a row's name: "after L3" for blocks.3.resid_post."""
    parts = name.split(".")
    if len(parts) != 3:
        return name
    says = {"resid_pre": "before", "resid_mid": "inside", "resid_post": "after"}
    return f"{says[parts[2]]} L{parts[1]}" if parts[2] in says else name


def _chance(value: float) -> str:
    return f"{value:.2f}" if value >= 0.005 else "<.01"


def _followed(data: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Tokens followed, the target first where it is one token everywhere: (text, probability, rank)."""
    return [(one["token"], one["probability"], one["rank"]) for one in data["followed"]]


def _column(rows: Sequence[Sequence[float]], at: int) -> list[float]:
    return [row[at] for row in rows]


def without_first(one: Series) -> Series:
    """A curve without its first point."""
    short: Series = {**one, "x": one["x"][1:], "y": one["y"][1:]}
    for end in ("low", "high"):
        if (values := one.get(end)) is not None:
            short[end] = values[1:]
    return short


def _plot(series: list[Series], label: str) -> Markup:
    legend = line_legend(series) if len(series) > 1 or series[0]["name"] not in ("logit lens", "tuned lens") else ""
    drawing = line_svg(series=series, title=label, x_label="layers passed", y_label=label)
    return Markup(
        f'<div style="flex:1 1 420px;max-width:520px">{drawing}{legend}{line_table(series, "layers passed")}</div>'
    )


def _distance(data: dict[str, Any], other: dict[str, Any] | None) -> Section:
    """KL to the final answer by layer and position."""
    shown = other or data
    left = max(0, len(shown["positions"]) - _WIDEST)
    values = [row[left:] for row in shown["kl"]]
    rest = values[1:] if shown["layers"][0] == "embed" and len(values) > 2 else values  # which it would wash out
    drawing = heatmap_html(
        rows=[short_site(layer) for layer in shown["layers"]],
        columns=shown["tokens"][left:],
        values=values,
        title=f"KL(final ‖ layer) by layer and position, {shown['lens']}",
        units="nats",
        scale=heatmap_scale(rest),
    )
    text = f"KL(final ‖ layer) in nats, {shown['lens']}: how much each layer still has to change at each token."
    return ("How far each layer is from the answer", text, drawing)
