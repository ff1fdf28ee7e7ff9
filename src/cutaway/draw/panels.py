"""Stat tiles, tables, folds, and texts side by side."""

import re
from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict

from markupsafe import Markup

from cutaway.draw.text import escape, number


class Figure(TypedDict):
    """One number with its name."""

    label: str
    value: float | int | str | None
    units: NotRequired[str]
    detail: NotRequired[str]
    control: NotRequired[bool]


class Continuation(TypedDict):
    """One text of a comparison; every occurrence of a `highlight` string in it is marked."""

    label: str
    text: str
    note: NotRequired[str]
    control: NotRequired[bool]
    highlight: NotRequired[Sequence[str]]


def figures_html(*, items: Sequence[Figure]) -> Markup:
    """Stat tiles: a number, what it is, and a line about it."""
    tiles = []
    for item in items:
        detail = f'<span class="cw-small">{escape(item.get("detail"))}</span>' if item.get("detail") else ""
        tag = ' <em class="cw-tag">control</em>' if item.get("control") else ""
        tiles.append(
            f'<div class="cw-tile {"cw-control" if tag else "cw-result"}"><dt>{escape(item["label"])}{tag}</dt>'
            f"<dd>{figure_html(item['value'], item.get('units', ''))}{detail}</dd></div>"
        )
    return Markup(f'<dl class="cw-tiles">{"".join(tiles)}</dl>')


def fold(summary: str, content: Markup, opened: bool = False) -> Markup:
    """What is seen once its summary is opened."""
    return Markup('<details class="cw-fold"{}><summary>{}</summary>{}</details>').format(
        Markup(' open=""') if opened else "", Markup(escape(summary)), content
    )


def wide(drawn: Markup) -> Markup:
    """A box that scrolls sideways by itself, so that the page never does."""
    return Markup('<div class="cw-wide">{}</div>').format(drawn)


def alarm_html(text: str) -> Markup:
    """A sentence in red: what is shown is not what it seems."""
    return Markup(f'<p class="cw-alarm">{escape(text)}</p>')


def figure_html(value: float | int | str | None, units: str = "") -> Markup:
    """A number set large, its units set small."""
    small = f"<small>{'' if units in {'%', '×'} else ' '}{escape(units)}</small>" if units and value is not None else ""
    return Markup(f'<span class="cw-figure">{escape(number(value))}{small}</span>')


def table_html(
    *, columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str, align: Sequence[str] | None = None
) -> Markup:
    """A table.

    Args:
        columns: Their names.
        rows: Cells, row by row: numbers or text.
        title: What is seen, for screen readers.
        align: "left" or "right" per column; if None, columns of numbers are right-aligned.
    """
    sides = align or [_side([row[c] for row in rows]) for c in range(len(columns))]
    css = ["cw-right" if side == "right" else "cw-left" for side in sides]
    heads = "".join(f'<th scope="col" class="{css[c]}">{escape(name)}</th>' for c, name in enumerate(columns))
    most = (
        max(dict.fromkeys(sides), key=sides.count) if sides else "left"
    )  # said once: a table may have thousands of cells
    sided = ["" if side == most else f' class="cw-{side}"' for side in sides]
    body = "".join(
        "<tr>" + "".join(f"<td{sided[c]}>{escape(number(cell))}</td>" for c, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    head = (
        f'<table class="cw-table{" cw-numbers" if most == "right" else ""}"><caption class="cw-hidden">{escape(title)}'
        f"</caption><thead><tr>{heads}</tr></thead>"
    )
    return wide(Markup(f"{head}<tbody>{body}</tbody></table>"))


def _side(cells: Sequence[Any]) -> str:
    numeric = [isinstance(cell, int | float) and not isinstance(cell, bool) for cell in cells if cell is not None]
    return "right" if numeric and all(numeric) else "left"


def compare_html(*, items: Sequence[Continuation], prompt: str = "") -> Markup:
    """Texts side by side under the prompt they continue; controls are hatched and say so."""
    asked = (
        f'<div class="cw-prompt"><span class="cw-over">Prompt</span><pre>{escape(prompt)}</pre></div>' if prompt else ""
    )
    cards = []
    for item in items:
        control = bool(item.get("control"))
        tag = ' <em class="cw-tag">control</em>' if control else ""
        note = f'<p class="cw-small">{escape(item.get("note"))}</p>' if item.get("note") else ""
        text = _marked(item["text"], item.get("highlight") or ())
        cards.append(
            f'<div class="cw-text {"cw-control" if control else "cw-result"}"><div class="cw-over">'
            f"{escape(item['label'])}{tag}</div><pre>{text}</pre>{note}</div>"
        )
    return Markup(f'{asked}<div class="cw-texts">{"".join(cards)}</div>')


def _marked(text: str, highlight: Sequence[str]) -> str:
    """`text` escaped, with every occurrence of a highlight string inside <mark>; the longest string wins."""
    wanted = sorted((word for word in set(highlight) if word), key=lambda word: (-len(word), word))
    if not text:
        return "<i>(no text)</i>"
    if not wanted:
        return escape(text)
    pieces = re.split("(" + "|".join(map(re.escape, wanted)) + ")", text)
    return "".join(
        f"<mark>{escape(piece)}</mark>" if place % 2 else escape(piece) for place, piece in enumerate(pieces)
    )
