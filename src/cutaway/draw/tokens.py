"""Drawings whose parts are tokens: tinted texts and the logit-lens grid."""

from collections.abc import Sequence
from typing import NotRequired, TypedDict

from markupsafe import Markup

from cutaway.draw.panels import fold, table_html, wide
from cutaway.draw.scale import Scale, scale_for
from cutaway.draw.text import escape, number, shorten, token_html, visible


class TokenRow(TypedDict):
    """A text as tokens, each tinted by its value (`None`: no tint)."""

    tokens: Sequence[str]
    values: Sequence[float | None]
    label: NotRequired[str]
    detail: NotRequired[str]


def tokens_scale(rows: Sequence[TokenRow]) -> Scale:
    """The scale of `tokens_html`, over all rows: diverging when any value is negative.

    Args:
        rows: The texts.
    """
    values = [value for row in rows for value in row["values"]]
    return scale_for(values, diverging=any(value is not None and value < 0 for value in values))


def tokens_html(*, rows: Sequence[TokenRow], units: str = "", scale: Scale | None = None) -> Markup:
    """Texts token by token, whitespace and invisible characters shown, each token tinted by its value, with the legend
    and the values as a table.

    Args:
        rows: The texts: `tokens` and `values`, perhaps `label` above and `detail` below.
        units: Of the values, in the tooltips.
        scale: What the tokens are tinted by; one over all rows if None.
    """
    scale = scale or tokens_scale(rows)
    parts = []
    for row in rows:
        label = f'<div class="cw-token-label">{escape(row.get("label"))}</div>' if row.get("label") else ""
        detail = f'<div class="cw-small">{escape(row.get("detail"))}</div>' if row.get("detail") else ""
        parts.append(f'<div class="cw-token-row">{label}{token_run(row, scale, units)}{detail}</div>')
    values = [value for row in rows for value in row["values"]]
    cells = [
        [row.get("label") or number(place), at, visible(token), value]
        for place, row in enumerate(rows, start=1)
        for at, (token, value) in enumerate(zip(row["tokens"], row["values"], strict=True))
    ]
    columns = ("text", "position", "token", units or "value")
    several = len(rows) > 1
    table = table_html(
        columns=columns if several else columns[1:],
        rows=cells if several else [cell[1:] for cell in cells],
        title="Values of the tokens",
        align=("left", "right", "left", "right")[0 if several else 1 :],
    )
    drawn = Markup('<div class="cw-tokens">{}</div>').format(Markup("".join(parts)))
    return drawn + scale.legend(units, values) + fold("As a table", table)


def token_run(row: TokenRow, scale: Scale, units: str = "", breaks: bool = True) -> Markup:
    """One text of `tokens_html`, without its label: a paragraph of tinted tokens, broken where the text is."""
    spans = []
    for token, value in zip(row["tokens"], row["values"], strict=True):
        tint = "" if value is None else f' class="{scale.css(value)}" title="{escape(number(value, units))}"'
        if spans and token[:1].isspace():
            spans.append("<wbr/>")  # its space is drawn as a sign, so say that the line may break here
        spans.append(f"<span{tint}>{token_html(token)}</span>")
        if breaks and "\n" in token:
            spans.append("<br/>")
    return Markup(f'<p class="cw-token-run">{"".join(spans)}</p>')


LENS_SCALE = Scale(0.0, 1.0)


def lens_html(
    *,
    layers: Sequence[str],
    tokens: Sequence[str],
    top: Sequence[Sequence[str]],
    probability: Sequence[Sequence[float | None]],
    title: str,
) -> Markup:
    """A logit-lens grid as a table: each cell has the top token at that layer and position, and its probability.

    The colour is the probability on a scale from 0 to 1.

    Args:
        layers: Labels of the rows.
        tokens: The prompt's tokens, one per column.
        top: The most probable token, `top[layer][position]`.
        probability: Its probability.
        title: What is seen, for screen readers.
    """
    heads = "".join(f'<th scope="col" title="{escape(visible(token))}">{_short(token)}</th>' for token in tokens)
    body = []
    for layer, words, chances in zip(layers, top, probability, strict=True):
        cells = []
        for token, word, chance in zip(tokens, words, chances, strict=True):
            tip = escape(f"{layer} at {visible(token)}: {visible(word)}, probability {number(chance)}")
            tint = LENS_SCALE.css(chance)
            cells.append(f'<td class="{tint}" title="{tip}">{_short(word)}<small>{_chance(chance)}</small></td>')
        body.append(f'<tr><th scope="row">{escape(layer)}</th>{"".join(cells)}</tr>')
    grid = Markup(
        f'<table class="cw-lens"><caption class="cw-hidden">{escape(title)}</caption><thead><tr><th scope="col">'
        f'<span class="cw-hidden">layer</span></th>{heads}</tr></thead><tbody>{"".join(body)}</tbody></table>'
    )
    return wide(grid) + LENS_SCALE.legend("probability of the token shown")


def _short(token: str) -> str:
    """A token of at most ten characters, whitespace shown."""
    return token_html(shorten(token, 10)) if len(visible(token)) <= 40 else escape(shorten(visible(token), 10))


def _chance(value: float | None) -> str:
    return number(value) if value is None else f"{value:.2f}".removeprefix("0")
