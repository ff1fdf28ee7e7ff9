"""The model as a stack of blocks with a quarter cut away, so that the residual stream inside can be seen."""

import math

from markupsafe import Markup

_SIDE = 84.0  # of a block, in pixels along its edge
_MOST = 16  # blocks that are drawn; a deeper model is drawn with this many


def stack_svg(blocks: int) -> Markup:
    """An isometric drawing of `blocks` blocks (2 to 16 are drawn) and the stream that runs up through them.

    It is decoration: hidden from screen readers, since the card says the same in words.
    """
    drawn = min(max(blocks, 2), _MOST)
    step = min(14.0, 110.0 / drawn)
    thick = step * 0.62
    width, height = 2 * _SIDE * math.cos(math.pi / 6) + 4, _SIDE + step * drawn + 34
    base = height - _SIDE - 12

    def at(x: float, y: float, z: float) -> str:
        across = width / 2 + (x - y) * _SIDE * math.cos(math.pi / 6)
        return f"{across:.1f} {base + (x + y) * _SIDE / 2 - z:.1f}"

    def face(css: str, *corners: tuple[float, float, float]) -> str:
        return f'<path class="{css}" d="M{"L".join(at(*corner) for corner in corners)}z"/>'

    parts = [f'<svg class="cw-stack" aria-hidden="true" width="{width:.0f}" height="{height:.0f}">']
    for block in range(drawn):
        low, high = block * step, block * step + thick
        for css, (x0, y0), (x1, y1) in (
            ("cw-inside cw-left", (0.5, 0.5), (1, 0.5)),
            ("cw-inside cw-right", (0.5, 0.5), (0.5, 1)),
            ("cw-left", (0, 1), (0.5, 1)),
            ("cw-right", (1, 0), (1, 0.5)),
        ):
            parts.append(face(css, (x0, y0, low), (x1, y1, low), (x1, y1, high), (x0, y0, high)))
        outline = ((0, 0), (1, 0), (1, 0.5), (0.5, 0.5), (0.5, 1), (0, 1))
        parts.append(face("cw-top", *((x, y, high) for x, y in outline)))
    top = drawn * step + 16
    parts.append(f'<path class="cw-stream" d="M{at(0.5, 0.5, -10)}L{at(0.5, 0.5, top)}"/>')
    tip = at(0.5, 0.5, top)
    parts.append(f'<path class="cw-stream" d="M{tip}m-4.5 6l4.5 -6.5 4.5 6.5"/></svg>')
    return Markup("".join(parts))
