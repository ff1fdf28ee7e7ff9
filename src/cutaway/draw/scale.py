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
        return self._css(self._step(value))

    def _css(self, step: int) -> str:
        return f"cw-{'d' if self.diverging else 's'}{step}"

    def _step(self, value: float) -> int:
        span = self.high - self.low
        place = (value - self.low) / span if span > 0 else 0.5
        return round(min(1.0, max(0.0, place)) * (STEPS - 1))

    def key(self, values: Iterable[float | None] = ()) -> tuple[list[str], list[tuple[float, str]]]:
        """What a legend shows: the CSS class of each step that `values` take, and (place from 0 to 1, number) labels.

        Its ends are the smallest and the largest of the values, so that it says what is there. Where the scale stops
        short of them, the last step says so: "≥ 1 (to 4.2)".

        Args:
            values: The numbers that are drawn; None and what is not finite count for nothing. Without values it is the
                whole scale.
        """
        known = [value for value in values if value is not None and math.isfinite(value)] or [self.low, self.high]
        least, most = min(known), max(known)
        first, last = self._step(least), self._step(most)
        low, high = number(least), number(most)
        if least < self.low - 1e-9 * abs(self.low):
            low = f"≤ {number(self.low)} (to {low})"
        if most > self.high + 1e-9 * abs(self.high):
            high = f"≥ {number(self.high)} (to {high})"
        labels = [(0.0, low), (1.0, high)] if last > first else [(0.0, low if low == high else f"{low} to {high}")]
        middle = STEPS // 2
        if self.diverging and first + 1 < middle < last - 1:
            labels.insert(1, ((middle - first + 0.5) / (last - first + 1), "0"))
        return [self._css(step) for step in range(first, last + 1)], labels

    def legend(self, units: str = "", values: Iterable[float | None] = ()) -> Markup:
        """A strip of the steps with the numbers at its ends (and at zero when diverging).

        Args:
            units: Behind the strip.
            values: What is drawn: the strip shows the steps that they take. All steps if there are none.
        """
        css, labels = self.key(values)
        steps = "".join(f'<i class="{one}"></i>' for one in css)
        spans = "".join(f'<span style="--at:{place:.3f}">{escape(text)}</span>' for place, text in labels)
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
