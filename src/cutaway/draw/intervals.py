"""Numbers with their intervals in one picture: each a point on a track under its name, controls hollow."""

from collections.abc import Sequence

from markupsafe import Markup

from cutaway.draw.charts import Bar, axis_range
from cutaway.draw.text import escape, interval

_WIDTH, _TRACK, _ROW, _GAP = 600, 400, 36, 14


def intervals_svg(*, groups: Sequence[Sequence[Bar]], title: str, units: str = "") -> Markup:
    """One SVG of all numbers, readable without the page around it.

    Args:
        groups: Numbers that stand on one scale, which holds 0: an effect and its controls, or many nodes.
        title: What is seen, for those who cannot see it.
        units: Of all numbers, written below; nothing where they have several.
    """
    parts, y = [], 0
    for group in groups:
        low, high = axis_range([0.0, *(one.get(key) for one in group for key in ("value", "low", "high"))])

        def x(value: float, low: float = low, high: float = high) -> float:
            return 8 + (value - low) / (high - low) * (_TRACK - 16)

        for one in group:
            control, value, ends = bool(one.get("control")), one["value"], (one.get("low"), one.get("high"))
            parts.append(
                f'<g class="{"cw-control" if control else "cw-result"}"><text x="0" y="{y + 13}">'
                f"{escape(one['label'])}{' (control)' if control else ''}</text>"
                f'<line class="cw-rule" x1="0" x2="{_TRACK}" y1="{y + 25}" y2="{y + 25}"/>'
                f'<line class="cw-rule cw-zero" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="{y + 18}" y2="{y + 32}"/>'
            )
            if ends[0] is not None and ends[1] is not None and ends[0] == ends[0]:
                parts.append(f'<path class="cw-curve" d="M{x(ends[0]):.1f} {y + 25}H{x(ends[1]):.1f}"/>')
            if value is not None and value == value:
                parts.append(
                    f'<g class="cw-point"><circle class="cw-dot" cx="{x(value):.1f}" cy="{y + 25}" r="5"/></g>'
                )
            parts.append(f'<text x="{_TRACK + 14}" y="{y + 30}">{escape(interval(value, *ends))}</text></g>')
            y += _ROW
        y += _GAP
    if units:
        parts.append(f'<text class="cw-axis" x="0" y="{y + 6}">In {escape(units)}.</text>')
        y += 20
    head = f'<svg class="cw-line" role="img" viewBox="0 0 {_WIDTH} {max(y, 1)}"><title>{escape(title)}</title>'
    return Markup(head + "".join(parts) + "</svg>")
