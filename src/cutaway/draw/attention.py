"""Attention patterns over tokens: an interactive fragment that is also legible without its script, and static SVG.

A pattern is given as bytes, one a cell (255 is all of a token's attention), row by row: row i is where token i looks.
In HTML each pattern is one small PNG whose opacity is the attention. It is drawn as a mask, so that it takes the
page's colours, and the script reads the numbers from the same bytes: nothing is embedded twice.
"""

import base64
import struct
import zlib
from collections.abc import Sequence
from typing import TypedDict

from markupsafe import Markup

from cutaway.artifacts.errors import CutawayError
from cutaway.draw.style import asset
from cutaway.draw.text import escape, number, shorten, token_html, visible

_THUMBNAIL = 72  # least pixels of a pattern's image: small ones are enlarged by whole factors, so that cells stay sharp
_RAMPS = {  # colours of attention 0, 0.5 and 1
    False: ((0xFF, 0xFF, 0xFF), (0x44, 0x9D, 0xBA), (0x00, 0x36, 0x71)),
    True: ((0x18, 0x1E, 0x23), (0x30, 0x8B, 0xA5), (0xAB, 0xF6, 0xEB)),
}
_INKS = {False: ("#ffffff", "#17212b", "#52606c", "#e2e1da"), True: ("#181e23", "#e4e9ed", "#a3b0ba", "#2c353d")}


class Pattern(TypedDict):
    """One head's attention.

    Attributes:
        layer: Its layer.
        head: Its number there.
        values: p × p bytes, row by row: where token i looks, 255 is all of its attention.
    """

    layer: int
    head: int
    values: bytes


def attention_html(
    *, tokens: Sequence[str], patterns: Sequence[Pattern], title: str, start: tuple[int, int] | None = None
) -> Markup:
    """Small multiples of all patterns; with its script, a head to choose and a text whose tokens show where they look
    and who looks at them, by pointer or keyboard.

    It needs the style sheet of `draw.style`.

    Args:
        tokens: The text.
        patterns: One or more heads.
        title: What is seen, for screen readers.
        start: The (layer, head) that is shown first; the first pattern if None.

    Raises:
        CutawayError: No pattern, or one that does not have a byte for each pair of tokens.
    """
    _check(tokens, patterns)
    first = start if start is not None else (patterns[0]["layer"], patterns[0]["head"])
    large = " cw-att-few" if len(patterns) <= 4 else ""
    rows = []
    for layer in dict.fromkeys(pattern["layer"] for pattern in patterns):
        cells = "".join(
            _thumbnail(pattern, tokens, (layer, pattern["head"]) == first)
            for pattern in patterns
            if pattern["layer"] == layer
        )
        rows.append(f'<div class="cw-att-row"><span class="cw-att-layer">layer {layer}</span>{cells}</div>')
    words = []
    for place, token in enumerate(tokens):
        if place and token[:1].isspace():
            words.append("<wbr/>")
        words.append(f'<span class="cw-att-token" data-i="{place}">{token_html(token)}</span>')
        if "\n" in token:
            words.append("<br/>")
    return Markup(
        f'<div class="cw-att{large}" data-p="{len(tokens)}"><style>{asset("attention.css")}</style>'
        f'<div class="cw-att-main"><p class="cw-att-head-name" hidden></p>'
        f'<div class="cw-att-text" aria-label="{escape(title)}">{"".join(words)}</div>'
        '<p class="cw-att-key" hidden><span><i class="cw-s7"></i> where the marked token looks</span> '
        '<span><i class="cw-d1"></i> who looks at it</span></p>'
        '<p class="cw-att-say" aria-live="polite"></p><div class="cw-att-big" hidden><canvas></canvas>'
        '<i class="cw-att-q"></i><i class="cw-att-k"></i></div></div>'
        f'<div class="cw-att-grid" aria-label="heads">{"".join(rows)}</div>'
        '<p class="cw-small">Each square is one head: a row is a token that looks, a column one that is looked at, the '
        "first token on top and on the left; strong colour is much attention.</p>"
        f"<script>{asset('attention.js')}</script></div>"
    )


def attention_svg(*, tokens: Sequence[str], patterns: Sequence[Pattern], title: str, dark: bool = False) -> str:
    """A whole SVG document: one pattern with its tokens, or a grid of all, layer by layer. Colours are in it.

    Args:
        tokens: The text.
        patterns: One or more heads.
        title: Written above.
        dark: For a dark page.

    Raises:
        CutawayError: As `attention_html`.
    """
    _check(tokens, patterns)
    draw = _one_svg if len(patterns) == 1 else _grid_svg
    return draw(tokens, patterns, title, dark)


def _check(tokens: Sequence[str], patterns: Sequence[Pattern]) -> None:
    if not patterns:
        raise CutawayError("There is no attention pattern to draw; name at least one layer and head.")
    for pattern in patterns:
        if len(pattern["values"]) != len(tokens) ** 2:
            raise CutawayError(
                f"The pattern of L{pattern['layer']}H{pattern['head']} has {len(pattern['values'])} cells; "
                f"{len(tokens)} tokens need {len(tokens) ** 2}."
            )


def _thumbnail(pattern: Pattern, tokens: Sequence[str], chosen: bool) -> str:
    name = f"L{pattern['layer']}H{pattern['head']}"
    p = len(tokens)
    last = pattern["values"][-p:]
    most = max(range(p), key=last.__getitem__)
    about = f"{name}; the last token looks most at {visible(tokens[most])} ({number(last[most] / 255, digits=2)})"
    image = base64.b64encode(_opacity_png(pattern["values"], p)).decode()
    return (
        f'<div class="cw-att-head" role="img" data-name="{name}"{" data-start" if chosen else ""} '
        f'aria-label="{escape(about)}" title="{escape(about)}">'
        f'<div class="cw-att-map" style="--m:url(data:image/png;base64,{image})"></div>'
        f'<span aria-hidden="true">{pattern["head"]}</span></div>'
    )


# Images -------------------------------------------------------------------------------------------------------------


def enlargement(p: int) -> int:
    """Pixels a cell in the image of a p × p pattern."""
    return max(1, -(-_THUMBNAIL // p))


def _opacity_png(values: bytes, p: int) -> bytes:
    """Black with the attention as opacity (PNG colour type 4)."""
    f = enlargement(p)
    lines = []
    for row in range(p):
        line = bytearray(1 + 2 * p * f)  # filter 0, then black and opacity in turn
        for place in range(f):
            line[2 + 2 * place :: 2 * f] = values[row * p : (row + 1) * p]
        lines.append(bytes(line) * f)
    return _png(p * f, 4, b"".join(lines))


def _colour_png(values: bytes, p: int, dark: bool) -> bytes:
    """In literal colours (PNG colour type 3: a palette)."""
    f = enlargement(p)
    lines = []
    for row in range(p):
        cells = values[row * p : (row + 1) * p]
        lines.append((b"\0" + b"".join(cells[i : i + 1] * f for i in range(p))) * f)
    palette = b"".join(bytes(_colour(value, dark)) for value in range(256))
    return _png(p * f, 3, b"".join(lines), palette)


def _png(side: int, colour_type: int, lines: bytes, palette: bytes = b"") -> bytes:
    """A square PNG of 8-bit samples; every line begins with filter 0, which the script relies on."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, colour_type, 0, 0, 0)
    parts = [
        chunk(b"IHDR", header),
        chunk(b"PLTE", palette) if palette else b"",
        chunk(b"IDAT", zlib.compress(lines, 9)),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def _colour(value: int, dark: bool) -> tuple[int, int, int]:
    low, middle, high = _RAMPS[dark]
    share = value / 255 * 2
    a, b, t = (low, middle, share) if share < 1 else (middle, high, share - 1)
    red, green, blue = (round(x + (y - x) * t) for x, y in zip(a, b, strict=True))
    return red, green, blue


# Static SVG ---------------------------------------------------------------------------------------------------------

_FONT = "DejaVu Sans, Liberation Sans, Arial, sans-serif"
_MONO = "DejaVu Sans Mono, Liberation Mono, Consolas, monospace"
_RECTANGLES = 64  # up to so many tokens the cells are rectangles with tooltips, beyond an image


def _document(width: float, height: float, title: str, description: str, dark: bool, parts: Sequence[str]) -> str:
    ground, ink, _, _ = _INKS[dark]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="{_FONT}" font-size="12" fill="{ink}">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
        f'<rect width="100%" height="100%" fill="{ground}"/>{"".join(parts)}</svg>'
    )


def _image(pattern: Pattern, p: int, x: float, y: float, side: float, dark: bool) -> str:
    data = base64.b64encode(_colour_png(pattern["values"], p, dark)).decode()
    return (
        f'<image x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" height="{side:.1f}" image-rendering="optimizeSpeed" '
        f'href="data:image/png;base64,{data}"/>'
    )


def _one_svg(tokens: Sequence[str], patterns: Sequence[Pattern], title: str, dark: bool) -> str:
    (pattern,) = patterns
    p = len(tokens)
    _, _, soft, rule = _INKS[dark]
    cell = max(5.0, min(22.0, 640 / p))
    size = max(5.0, min(12.0, cell - 2))
    names = [shorten(visible(token), 16) for token in tokens]
    longest = max(map(len, names)) * size * 0.62
    left, top = longest + 14, longest * 0.72 + 46
    side = cell * p
    name = f"L{pattern['layer']}H{pattern['head']}"
    parts = [f'<text x="12" y="20" font-size="14">{escape(shorten(f"{name} · {title}", 90))}</text>']
    for place, token in enumerate(names):
        y, x = top + cell * (place + 0.5) + size * 0.35, left + cell * (place + 0.5)
        parts.append(
            f'<text x="{left - 5:.1f}" y="{y:.1f}" font-size="{size:.1f}" font-family="{_MONO}" text-anchor="end">'
            f'{escape(token)}</text><text transform="translate({x + size * 0.3:.1f} {top - 5:.1f}) rotate(-45)" '
            f'font-size="{size:.1f}" font-family="{_MONO}">{escape(token)}</text>'
        )
    if p <= _RECTANGLES:
        for i in range(p):
            for j, value in enumerate(pattern["values"][i * p : (i + 1) * p]):
                if value:
                    red, green, blue = _colour(value, dark)
                    tip = escape(f"{names[i]} → {names[j]}: {number(value / 255, digits=2)}")
                    parts.append(
                        f'<rect x="{left + cell * j:.1f}" y="{top + cell * i:.1f}" width="{cell:.1f}" '
                        f'height="{cell:.1f}" fill="#{red:02x}{green:02x}{blue:02x}"><title>{tip}</title></rect>'
                    )
    else:
        parts.append(_image(pattern, p, left, top, side, dark))
    parts.append(
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{side:.1f}" height="{side:.1f}" fill="none" stroke="{rule}"/>'
    )
    note = "a row is a token that looks, a column one that is looked at"
    parts.append(f'<text x="{left:.1f}" y="{top + side + 18:.1f}" fill="{soft}">{note}</text>')
    width = max(left + side + longest * 0.72 + 12, left + 380)
    return _document(width, top + side + 30, f"{name} of {title}", note, dark, parts)


def _grid_svg(tokens: Sequence[str], patterns: Sequence[Pattern], title: str, dark: bool) -> str:
    p = len(tokens)
    _, _, soft, rule = _INKS[dark]
    side, gap, left, top = 84.0, 10.0, 66.0, 34.0
    layers = list(dict.fromkeys(pattern["layer"] for pattern in patterns))
    parts = [f'<text x="12" y="20" font-size="14">{escape(shorten(title, 90))}</text>']
    widest = 0
    for row, layer in enumerate(layers):
        y = top + row * (side + gap + 14)
        parts.append(f'<text x="12" y="{y + side / 2:.1f}" fill="{soft}">layer {layer}</text>')
        inside = [pattern for pattern in patterns if pattern["layer"] == layer]
        widest = max(widest, len(inside))
        for column, pattern in enumerate(inside):
            x = left + column * (side + gap)
            parts.append(_image(pattern, p, x, y, side, dark))
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{side}" height="{side}" fill="none" stroke="{rule}"/>'
                f'<text x="{x + side / 2:.1f}" y="{y + side + 12:.1f}" font-size="10" text-anchor="middle" '
                f'fill="{soft}">L{layer}H{pattern["head"]}</text>'
            )
    width = max(left + widest * (side + gap) + 6, 420.0)
    height = top + len(layers) * (side + gap + 14) + 4
    return _document(width, height, title, f"{len(patterns)} heads, {p} tokens", dark, parts)
