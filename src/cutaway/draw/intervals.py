"""Numbers with their intervals in one picture: each a point on a track under its name, controls hollow."""

from collections.abc import Sequence

from markupsafe import Markup

from cutaway.draw.charts import Axis, Bar, control_sign, row_height
from cutaway.draw.text import escape, interval

_WIDTH, _TRACK, _NAME, _LINE, _GAP = 600, 400, 18, 17, 14


def intervals_svg(*, groups: Sequence[Sequence[Bar]], title: str, units: str = "") -> Markup:
    """One SVG of all numbers, readable without the page around it.

    Args:
        groups: Numbers that stand on one scale, which holds 0 and has its ticks below them: effects with their
            controls, or many nodes.
        title: What is seen, for those who cannot see it.
        units: Of all numbers, written below; nothing where they have several.
    """
    parts, y = [], 0
    for group in groups:
        axis = Axis(group)
        for one in group:
            control = bool(one.get("control"))
            value = interval(one["value"], one.get("low"), one.get("high"))
            parts.append(
                f'<g class="{"cw-control" if control else "cw-result"}"><text x="0" y="{y + 13}">'
                f"{escape(one['label'])}{' (control)' if control else ''}</text>"
                f'<text x="{_TRACK + 14}" y="{y + _NAME + 15}">{escape(value)}</text>'
                f'<svg y="{y + _NAME}" width="{_TRACK}" height="{row_height(one)}">{axis.row(one)}</svg>'
            )
            y += _NAME + row_height(one)
            for lane, beside in enumerate(one.get("controls") or ()):
                written = interval(beside["value"], beside.get("low"), beside.get("high"))
                y += _LINE
                parts.append(
                    f'<text x="8" y="{y - 4}">{control_sign(lane)} {escape(beside["label"])} (control): '
                    f"{escape(written)}</text>"
                )
            parts.append("</g>")
        parts.append(f'<svg y="{y}" width="{_TRACK}" height="16">{axis.labels()}</svg>')
        y += 16 + _GAP
    if units:
        parts.append(f'<text class="cw-axis" x="0" y="{y + 6}">In {escape(units)}.</text>')
        y += 20
    head = f'<svg class="cw-line" role="img" viewBox="0 0 {_WIDTH} {max(y, 1)}"><title>{escape(title)}</title>'
    return Markup(head + "".join(parts) + "</svg>")
