"""Heatmaps: a number in every cell, coloured by its size, with a legend of the range that is there."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from markupsafe import Markup

from cutaway.draw.panels import fold, table_html, wide
from cutaway.draw.scale import Scale, scale_for
from cutaway.draw.text import NOTHING, escape, label, number, same_decimals, shorten

_ROW = 26
_CHARACTER = 7.0  # an upper estimate of a label's width per character, at 12 px
_LABEL = 16  # characters of a label that are written; the tooltip has the whole of it
_WIDTH = 780
_KEY = 220  # pixels of the legend's strip


def heatmap_scale(values: Sequence[Sequence[float | None]], diverging: bool = False) -> Scale:
    """The scale that `heatmap_svg` colours by, for its legend.

    Args:
        values: `values[row][column]`.
        diverging: Two colours with 0 between them.
    """
    return scale_for((value for row in values for value in row), diverging)


def heatmap_svg(
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    title: str,
    units: str = "",
    cell_text: Sequence[Sequence[str]] | None = None,
    row_axis: str = "",
    column_axis: str = "",
    marks: Sequence[tuple[int, int]] = (),
    scale: Scale | Literal["diverging"] | None = None,
) -> Markup:
    """An SVG grid of numbers, each cell printed and tinted, with a tooltip of its row, column and value.

    At most 780 px wide where the columns allow it; the cells never get narrower than their text, so a wide grid belongs
    in a box that scrolls. The description names the extremes.

    Args:
        rows: Labels of the rows.
        columns: Labels of the columns.
        values: `values[row][column]`; None, or a number that is not finite, is an empty cell with "–".
        title: What is seen, for screen readers.
        units: Of the values, in the tooltips.
        cell_text: What is printed in the cells; the values if None.
        row_axis: What the rows are, written along the left side.
        column_axis: What the columns are, written on top.
        marks: Cells to outline, (row, column) each.
        scale: What the cells are coloured by, such as one scale for several heatmaps; "diverging" is two colours with
            0 between them, None one colour from the smallest to the largest value.
    """
    values = [[None if value is None or not math.isfinite(value) else value for value in row] for row in values]
    if not isinstance(scale, Scale):
        scale = heatmap_scale(values, diverging=scale == "diverging")
    printed = cell_text if cell_text is not None else _cells(values)
    row_names, column_names = [label(row) for row in rows], [label(column) for column in columns]
    short_names = [shorten(name, _LABEL) for name in column_names]
    longest = max((len(text) for row in printed for text in row), default=1)
    left = 12 + _CHARACTER * max(len(shorten(name, _LABEL)) for name in row_names) + (18 if row_axis else 0)
    slanted = max(len(name) for name in short_names)
    narrowest = max(30.0, 6.8 * longest + 8)
    width = min(max((_WIDTH - left) / len(columns), narrowest), max(72.0, narrowest))
    level = slanted * _CHARACTER <= width
    top = (18 if column_axis else 0) + (22 if level else 14 + slanted * _CHARACTER * 0.64)
    right = 6 if level else max(6.0, slanted * _CHARACTER * 0.77 - width / 2)
    bottom = top + _ROW * len(rows)
    total_width = round(max(left + width * len(columns) + right, left + _KEY + 10 + 6.6 * len(units)))
    total_height = round(bottom + 38)

    parts = [
        f'<svg class="cw-heatmap" role="img" width="{total_width}" height="{total_height}" '
        f'viewBox="0 0 {total_width} {total_height}" data-columns="{len(columns)}">',
        f"<title>{escape(title)}</title>",
        f"<desc>{escape(_description(values, row_names, column_names, row_axis, column_axis, units))}</desc>",
    ]
    if column_axis:
        parts.append(f'<text class="cw-axis" x="{_p(left)}" y="12">{escape(column_axis)} →</text>')
    if row_axis:
        middle = top + _ROW * len(rows) / 2
        parts.append(
            f'<text class="cw-axis" text-anchor="middle" transform="translate(11 {_p(middle)}) rotate(-90)">'
            f"{escape(row_axis)}</text>"
        )
    for place, name in enumerate(short_names):
        x = left + width * (place + 0.5)
        where = f'x="{_p(x)}" y="{_p(top - 7)}" text-anchor="middle"'
        if not level:
            where = f'transform="translate({_p(x + 4)} {_p(top - 7)}) rotate(-40)"'
        parts.append(f'<text class="cw-mono" {where}>{escape(name)}</text>')
    for r, name in enumerate(row_names):
        y = top + _ROW * r
        parts.append(
            f'<text class="cw-mono" x="{_p(left - 7)}" y="{_p(y + 17)}" text-anchor="end">'
            f"{escape(shorten(name, _LABEL))}</text>"
        )
        for c, value in enumerate(values[r]):
            x = left + width * c
            parts.append(
                f'<g class="cw-cell {scale.css(value)}"><title>{escape(name)} · {escape(column_names[c])}: '
                f'{escape(number(value, units, 4))}</title><rect x="{_p(x)}" y="{_p(y)}" width="{_p(width - 1.5)}" '
                f'height="{_ROW - 1.5}"/><text x="{_p(x + width / 2 - 0.75)}" y="{_p(y + 16.5)}">'
                f"{escape(printed[r][c])}</text></g>"
            )
    for r, c in marks:
        parts.append(
            f'<rect class="cw-mark" x="{_p(left + width * c)}" y="{_p(top + _ROW * r)}" width="{_p(width - 1.5)}" '
            f'height="{_ROW - 1.5}"/>'
        )
    parts.append(f"{_legend(scale, values, units, left, bottom + 8)}</svg>")
    return Markup("".join(parts))


def heatmap_html(**what: Any) -> Markup:
    """`heatmap_svg` in a box that scrolls by itself, and under it the same numbers as a table, folded away.

    Args:
        what: The arguments of `heatmap_svg`.
    """
    units = f" ({what['units']})" if what.get("units") else ""
    table = table_html(
        columns=[what.get("row_axis", ""), *map(label, what["columns"])],
        rows=[[label(name), *row] for name, row in zip(what["rows"], what["values"], strict=True)],
        title=what["title"],
        align=["left", *["right"] * len(what["columns"])],
    )
    return wide(heatmap_svg(**what)) + fold(f"As a table{units}", table)


def _legend(scale: Scale, values: Sequence[Sequence[float | None]], units: str, x: float, y: float) -> str:
    css, labels = scale.key(value for row in values for value in row)
    step = _KEY / len(css)
    strip = "".join(
        f'<rect class="{one}" x="{_p(x + step * place)}" y="{_p(y)}" width="{_p(step)}" height="9"/>'
        for place, one in enumerate(css)
    )
    ends = {0.0: "start", 1.0: "end"}
    texts = "".join(
        f'<text x="{_p(x + _KEY * at)}" y="{_p(y + 23)}" text-anchor="{ends.get(at, "middle")}">{escape(text)}</text>'
        for at, text in labels
    )
    unit = f'<text x="{_p(x + _KEY + 10)}" y="{_p(y + 9)}">{escape(units)}</text>' if units else ""
    return f'<g class="cw-scale">{strip}{texts}{unit}</g>'


def _p(pixels: float) -> str:
    """Pixels with at most one decimal."""
    return f"{pixels:.1f}".removesuffix(".0")


def _cells(values: Sequence[Sequence[float | None]]) -> list[list[str]]:
    """Every value with the same decimals, as few as tell them apart at a glance."""
    known = [value for row in values for value in row if value is not None]
    largest = max((abs(value) for value in known), default=1.0) or 1.0
    if largest >= 1e4 or largest < 1e-3:
        return [[number(value, digits=2) for value in row] for row in values]
    decimals = 2 if largest >= 0.1 else 1 - math.floor(math.log10(largest))
    decimals = decimals if largest < 10 else 1 if largest < 100 else 0
    written = iter(same_decimals(known, decimals))
    return [[NOTHING if value is None else next(written) for value in row] for row in values]


def _description(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    row_axis: str,
    column_axis: str,
    units: str,
) -> str:
    cells = [(value, r, c) for r, row in enumerate(values) for c, value in enumerate(row) if value is not None]
    size = f"{len(rows)} rows{f' ({row_axis})' if row_axis else ''} by {len(columns)} columns"
    size += f" ({column_axis})" if column_axis else ""
    if not cells:
        return f"{size}; no values."
    most, least = max(cells), min(cells)
    return (
        f"{size}. Highest {number(most[0], units)} at {rows[most[1]]}, {columns[most[2]]}; lowest "
        f"{number(least[0], units)} at {rows[least[1]]}, {columns[least[2]]}."
    )
