"""The picture of benchmarks/circuits.py: cost against prompt length and depth, in the drawing's own light colours."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cutaway.draw.charts import Series, line_svg
from cutaway.draw.text import escape

_STYLE = """
text { font-family: -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: #52606c; font-size: 12.5px; }
.head { fill: #17212b; font-size: 14px; font-weight: 600; }
.cw-c0 { --line: #005f94; } .cw-c1 { --line: #b4530a; }
.cw-rule { stroke: #e2e1da; } .cw-zero { stroke: #b9bbb6; } .cw-hit { fill: transparent; }
.cw-dot { fill: var(--line); }
.cw-curve { fill: none; stroke: var(--line); stroke-width: 2.2; stroke-linejoin: round; }
.ours { fill: #005f94; font-weight: 600; } .theirs { fill: #b4530a; font-weight: 600; }
"""
_WIDTH, _HEIGHT, _HEAD = 600, 300, 34
_MARGIN, _GAP, _TOP = 10, 30, 40


@dataclass(frozen=True)
class Point:
    """Cost of one setting, by method: median seconds, and peak MiB above the loaded model."""

    length: int
    n_layers: int
    seconds: Mapping[str, float]
    mebibytes: Mapping[str, float]


def cost_svg(by_length: Sequence[Point], by_depth: Sequence[Point], titles: tuple[str, str], about: str) -> str:
    """Four panels, time and memory against prompt length and depth; heads say the ratio at the first and last point.

    `titles` are how ours and the peer's curves are called; methods are "cutaway" and "eap_ig".
    """
    panels = [
        _panel(points, x, label, log, measure, unit)
        for measure, unit in ((lambda p: p.seconds, "seconds"), (lambda p: p.mebibytes, "MiB above the loaded model"))
        for points, x, label, log in (
            (by_length, lambda p: p.length, "tokens of a prompt", True),
            (by_depth, lambda p: p.n_layers, "layers", False),
        )
    ]
    width, height = 2 * (_WIDTH + _MARGIN) + _GAP, _TOP + 2 * (_HEIGHT + _HEAD)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f'<style>{_STYLE}</style><rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_MARGIN}" y="22"><tspan class="ours">{escape(titles[0])}</tspan><tspan dx="14" class="theirs">'
        f'{escape(titles[1])}</tspan><tspan dx="14">{escape(about)}</tspan></text>',
    ]
    for place, (head, drawing) in enumerate(panels):
        x, y = _MARGIN + (place % 2) * (_WIDTH + _GAP), _TOP + (place // 2) * (_HEIGHT + _HEAD)
        parts.append(f'<text class="head" x="{x}" y="{y + 16}">{escape(head)}</text>')
        box = f'<svg x="{x}" y="{y + _HEAD - 8}" width="{_WIDTH}" height="{_HEIGHT}" '
        parts.append(drawing.replace("<svg ", box, 1))
    return "".join([*parts, "</svg>\n"])


def _panel(
    points: Sequence[Point],
    x: Callable[[Point], int],
    x_label: str,
    log_x: bool,
    measure: Callable[[Point], Mapping[str, float]],
    unit: str,
) -> tuple[str, str]:
    """A head that gives the ratios, and the drawing."""
    places = [float(x(point)) for point in points]
    series: list[Series] = [
        {"name": name, "x": places, "y": [measure(point)[name] for point in points]} for name in ("cutaway", "eap_ig")
    ]
    ratios = [measure(point)["eap_ig"] / max(measure(point)["cutaway"], 1e-9) for point in points]
    first, last = (f"{ratios[i]:.1f} at {places[i]:.0f}" for i in (0, -1))
    head = f"theirs / ours: {first} {x_label.split()[0]}, {last}"
    return head, str(line_svg(series=series, title=head, x_label=x_label, y_label=unit, log_x=log_x))
