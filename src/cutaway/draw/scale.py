"""Colour scales in eleven steps, the same in every drawing, with their legends.

A step is a CSS class (`cw-s0` … `cw-s10`, diverging `cw-d0` … `cw-d10`) that sets the fill and the ink on it; the
colours themselves are in `cutaway.css`, for light and dark. Lightness alone orders the sequential scale, and the
diverging one runs from orange through neutral to blue, so both survive the common kinds of colour blindness.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from markupsafe import Markup

from cutaway.draw.text import escape, number

STEPS = 11


@dataclass(frozen=True)
class Scale:
    """Numbers as one of eleven steps of colour."""

    low: float
    """The number of the first step."""
    high: float
    """The number of the last step."""
    diverging: bool = False
    """Two colours, symmetric about zero."""

    def css(self, value: float | None) -> str:
        """The CSS class of a value.

        Args:
            value: A number outside the range takes the nearest step; None is a missing value.
        """
        if value is None or math.isnan(value):
            return "cw-na"
        span = self.high - self.low
        place = (value - self.low) / span if span > 0 else 0.5
        step = round(min(1.0, max(0.0, place)) * (STEPS - 1))
        return f"cw-{'d' if self.diverging else 's'}{step}"

    def legend(self, units: str = "") -> Markup:
        """A strip of the eleven steps with the numbers at its ends (and at zero when diverging).

        Args:
            units: Behind the strip.
        """
        letter = "d" if self.diverging else "s"
        steps = "".join(f'<i class="cw-{letter}{step}"></i>' for step in range(STEPS))
        ends = [number(self.low), number(self.high)]
        if self.diverging:
            ends.insert(1, "0")
        spans = "".join(f"<span>{escape(end)}</span>" for end in ends)
        unit = f'<span class="cw-legend-units">{escape(units)}</span>' if units else ""
        return Markup(
            f'<div class="cw-legend"><div class="cw-legend-scale"><div class="cw-legend-strip" aria-hidden="true">'
            f'{steps}</div><div class="cw-legend-ends">{spans}</div></div>{unit}</div>'
        )


def scale_for(values: Iterable[float | None], diverging: bool = False) -> Scale:
    """The scale that holds all `values`: from zero when they start near it, symmetric when diverging.

    Nothing to show (no value, or all equal) still gives a usable scale.
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return Scale(-1.0, 1.0, True) if diverging else Scale(0.0, 1.0)
    low, high = min(known), max(known)
    if diverging:
        reach = max(abs(low), abs(high)) or 1.0
        return Scale(-reach, reach, True)
    if 0 <= low <= high / 2:
        low = 0.0
    return Scale(low, high if high > low else low + 1.0)
