"""Directions in the plane as arrows, and many points over one axis."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from cutaway.draw.charts import Numbers, axis_range, axis_ticks
from cutaway.draw.text import escape, number

_SIDE = 180


def arrows_svg(
    *, vectors: Sequence[tuple[float, float]], names: Sequence[str], title: str, reach: float = 1.25
) -> Markup:
    """Arrows from the origin to `vectors`, with a circle of radius 1; each has a tooltip with its name and length.

    The colours follow the order of the vectors, dark first. `reach` is the half side of the square that is seen;
    longer arrows are cut by its frame.
    """
    middle, scale = _SIDE / 2, (_SIDE / 2 - 4) / reach
    described = "; ".join(f"{name} has length {number(math.hypot(*v))}" for name, v in zip(names, vectors, strict=True))
    parts = [
        f'<svg class="cw-plane" role="img" width="{_SIDE}" height="{_SIDE}" viewBox="0 0 {_SIDE} {_SIDE}">',
        f"<title>{escape(title)}</title><desc>{escape(described)}.</desc>",
        f'<rect x="0.5" y="0.5" width="{_SIDE - 1}" height="{_SIDE - 1}"/>',
        f'<circle class="cw-unit" cx="{middle}" cy="{middle}" r="{scale:.1f}"/>',
    ]
    for place, (name, (x, y)) in reversed(list(enumerate(zip(names, vectors, strict=True)))):
        step = 10 if len(vectors) == 1 else round(10 - 6 * place / (len(vectors) - 1))
        px, py = middle + scale * x, middle - scale * y
        tip = f"{name}: ({number(x)}, {number(y)}), length {number(math.hypot(x, y))}"
        parts.append(
            f'<g class="cw-s{step}"><title>{escape(tip)}</title>'
            f'<line x1="{middle}" y1="{middle}" x2="{px:.1f}" y2="{py:.1f}"/>'
            f'<circle class="cw-tip" cx="{px:.1f}" cy="{py:.1f}" r="4.5"/></g>'
        )
    parts.append("</svg>")
    return Markup("".join(parts))


_WIDTH, _HEIGHT = 600, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 118, 30, 50


def points_svg(
    *,
    columns: Sequence[Numbers],
    names: Sequence[str],
    lines: Sequence[tuple[str, float]] = (),
    title: str,
    x_label: str = "",
    y_label: str = "",
) -> Markup:
    """Points in columns side by side, one a value, under their `names`; `lines` are (name, height) to compare with.

    Values that fall together are drawn side by side, so that a crowd looks like one. It scales with its box.
    """
    low, high = axis_range([*(y for column in columns for y in column), 0.0, *(height for _, height in lines)])
    ticks = axis_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    pitch = (_WIDTH - _LEFT - _RIGHT) / max(1, len(columns))

    def py(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    known = [[y for y in column if y is not None and math.isfinite(y)] for column in columns]
    described = "; ".join(
        f"{name}: {len(ys)} points from {number(min(ys))} to {number(max(ys))}"
        for name, ys in zip(names, known, strict=True)
        if ys
    )
    parts = [
        f'<svg class="cw-line cw-points" role="img" viewBox="0 0 {_WIDTH} {_HEIGHT}">',
        f"<title>{escape(title)}</title><desc>{escape(described or 'No values')}.</desc>",
    ]
    for tick in ticks:
        parts.append(f'<text x="{_LEFT - 8}" y="{py(tick) + 5:.1f}" text-anchor="end">{number(tick)}</text>')
    above = -math.inf
    for name, height in sorted(lines, key=lambda line: -line[1]):
        above = max(py(height), above + 14)  # names that would cover each other move down
        parts.append(
            f'<line class="cw-rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{py(height):.1f}" y2="{py(height):.1f}"/>'
            f'<text x="{_WIDTH - _RIGHT + 6}" y="{above + 4:.1f}">{escape(name)}</text>'
        )
    for place, (name, ys) in enumerate(zip(names, known, strict=True)):
        middle = _LEFT + pitch * (place + 0.5)
        parts.append(f'<text x="{middle:.1f}" y="{_HEIGHT - _BOTTOM + 20}" text-anchor="middle">{escape(name)}</text>')
        dots = "".join(
            f'<circle cx="{middle + shift * pitch:.1f}" cy="{py(y):.1f}" r="1.9"/>'
            for y, shift in _swarm(ys, high - low)
        )
        parts.append(f'<g class="cw-c0"><title>{escape(name)}: {len(ys)} points</title>{dots}</g>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text class="cw-axis" x="{middle:.0f}" y="{_HEIGHT - 7}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text class="cw-axis" x="0" y="13">{escape(y_label)}</text></svg>'
    )
    return Markup("".join(parts))


def _swarm(ys: Sequence[float], span: float) -> list[tuple[float, float]]:
    """(y, shift in column widths): those within a hundredth of the axis of each other are spread over the column."""
    placed: list[tuple[float, float]] = []
    bins: dict[int, list[float]] = {}
    for y in sorted(ys):
        bins.setdefault(round(y / span * 100), []).append(y)
    for together in bins.values():
        width = min(0.84, 0.08 * (len(together) - 1))
        for turn, y in enumerate(together):
            share = turn / (len(together) - 1) - 0.5 if len(together) > 1 else 0.0
            placed.append((y, width * share))
    return placed
