"""Curves, bars, and effects beside their controls. A control is always grey, and dashed, hatched or hollow."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from markupsafe import Markup

from cutaway.artifacts.errors import MissingControls
from cutaway.artifacts.results import Effect
from cutaway.draw.panels import fold, table_html
from cutaway.draw.text import escape, interval, number, short

Numbers = Sequence[float | None]


class Series(TypedDict):
    """One curve.

    Attributes:
        name: In the legend.
        x: Places along the axis.
        y: Values; None breaks the curve.
        low, high: Ends of the interval, point by point.
        control: Drawn grey and dashed.
    """

    name: str
    x: Sequence[float]
    y: Numbers
    low: NotRequired[Numbers | None]
    high: NotRequired[Numbers | None]
    control: NotRequired[bool]


class Bar(TypedDict):
    """One bar.

    Attributes:
        label: Beside it.
        value: Its length from zero.
        low, high: Ends of the interval.
        control: Drawn hatched, or hollow.
        n: How many were measured.
        controls: Drawn hollow in its own row.
    """

    label: str
    value: float | None
    low: NotRequired[float | None]
    high: NotRequired[float | None]
    control: NotRequired[bool]
    n: NotRequired[int | None]
    controls: NotRequired[Sequence["Bar"]]


# Curves -------------------------------------------------------------------------------------------------------------

_WIDTH, _HEIGHT = 600, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 30, 50
_COLOURS = 6


def line_svg(
    *, series: Sequence[Series], title: str, x_label: str = "", y_label: str = "", log_x: bool = False
) -> Markup:
    """Curves on one pair of axes; a missing value breaks its curve, an interval is a band around it.

    It scales with the box it stands in. Colours and marker shapes follow the order of the series; `line_legend`
    names them.

    Args:
        series: The curves.
        title: What is seen, for screen readers.
        x_label: Below the axis.
        y_label: Above the axis.
        log_x: Equal steps to the right are equal factors; every x is above 0 then.
    """
    along = math.log10 if log_x else float
    xs = axis_range(along(x) for one in series for x in one["x"])
    ys = axis_range(y for one in series for key in ("y", "low", "high") for y in (one.get(key) or ()))
    y_ticks = axis_ticks(*ys)
    if log_x:
        x_ticks = _log_ticks(*xs)
        xs = (min(xs[0], along(x_ticks[0])), max(xs[1], along(x_ticks[-1])))
    else:
        x_ticks = axis_ticks(*xs, whole=all(float(x).is_integer() for one in series for x in one["x"]))
    ys = (min(ys[0], y_ticks[0]), max(ys[1], y_ticks[-1]))

    def px(x: float) -> float:
        return _LEFT + (along(x) - xs[0]) / (xs[1] - xs[0]) * (_WIDTH - _LEFT - _RIGHT)

    def py(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - ys[0]) / (ys[1] - ys[0]) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg class="cw-line" role="img" viewBox="0 0 {_WIDTH} {_HEIGHT}">',
        f"<title>{escape(title)}</title><desc>{escape(_described(series))}</desc>",
    ]
    for tick in y_ticks:
        zero = " cw-zero" if tick == 0 else ""
        parts.append(
            f'<line class="cw-rule{zero}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>'
            f'<text x="{_LEFT - 8}" y="{py(tick) + 5:.1f}" text-anchor="end">{number(tick)}</text>'
        )
    for tick in x_ticks:
        parts.append(
            f'<text x="{px(tick):.1f}" y="{_HEIGHT - _BOTTOM + 20}" text-anchor="middle">{number(tick)}</text>'
        )
    if x_label:
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        parts.append(
            f'<text class="cw-axis" x="{middle:.0f}" y="{_HEIGHT - 7}" text-anchor="middle">{escape(x_label)}</text>'
        )
    if y_label:
        parts.append(f'<text class="cw-axis" x="0" y="13">{escape(y_label)}</text>')
    looks = _looks(series)
    order = sorted(range(len(series)), key=lambda place: not series[place].get("control"))  # results are drawn on top
    for place in order:
        parts.append(_curve(series[place], looks[place], px, py))
    parts.append("</svg>")
    return Markup("".join(parts))


def line_legend(series: Sequence[Series]) -> Markup:
    """The names of `line_svg`'s curves, each with its stroke and marker; controls say so.

    Args:
        series: The curves, in the same order.
    """
    items = []
    for one, look in zip(series, _looks(series), strict=True):
        word = ' <em class="cw-tag">control</em>' if one.get("control") else ""
        items.append(
            f'<li><svg class="cw-line {look}" width="30" height="12" aria-hidden="true"><path class="cw-curve" '
            f'd="M1 6H29"/>{_marker(look, 15, 6)}</svg>{escape(one["name"])}{word}</li>'
        )
    return Markup(f'<ul class="cw-series">{"".join(items)}</ul>')


def line_table(series: Sequence[Series], x_label: str = "") -> Markup:
    """The numbers of `line_svg`'s curves as a table, folded away: a row per place, a column per curve.

    Args:
        series: The curves.
        x_label: What the places are.
    """
    written = []
    for one in series:
        lows, highs = (one.get(key) or [None] * len(one["x"]) for key in ("low", "high"))
        cells = zip(one["x"], one["y"], lows, highs, strict=True)
        written.append({x: y if low is None or high is None else interval(y, low, high) for x, y, low, high in cells})
    table = table_html(
        columns=[x_label or "x", *(f"{one['name']}{' (control)' if one.get('control') else ''}" for one in series)],
        rows=[[x, *(at.get(x) for at in written)] for x in sorted({x for at in written for x in at})],
        title="Numbers of the curves",
        align=["right"] * (len(series) + 1),
    )
    return fold("As a table", table)


def _looks(series: Sequence[Series]) -> list[str]:
    """The CSS class of each curve: results take the colours in turn, controls are grey, every second one dotted."""
    looks, results, controls = [], 0, 0
    for one in series:
        if one.get("control"):
            looks.append("cw-control cw-other" if controls % 2 else "cw-control")
            controls += 1
        else:
            looks.append(f"cw-c{results % _COLOURS}")
            results += 1
    return looks


def _curve(one: Series, look: str, px: Any, py: Any) -> str:
    parts = [f'<g class="{look}">']
    low, high = one.get("low"), one.get("high")
    if low and high:
        for run in _runs(zip(one["x"], low, high, strict=True)):
            edge = [f"{px(x):.1f} {py(top):.1f}" for x, _, top in run]
            edge += [f"{px(x):.1f} {py(bottom):.1f}" for x, bottom, _ in reversed(run)]
            parts.append(f'<path class="cw-band" d="M{"L".join(edge)}Z"/>')
    for run in _runs(zip(one["x"], one["y"], strict=True)):
        points = "L".join(f"{px(x):.1f} {py(y):.1f}" for x, y in run)
        parts.append(f'<path class="cw-curve" d="M{points}"/>')
        if len(one["x"]) <= 40:
            for x, y in run:
                tip = f"{one['name']}{' (control)' if one.get('control') else ''} at {number(x)}: {number(y)}"
                parts.append(
                    f'<g class="cw-point"><title>{escape(tip)}</title>{_marker(look, px(x), py(y))}'
                    f'<circle class="cw-hit" cx="{px(x):.1f}" cy="{py(y):.1f}" r="9"/></g>'
                )
    parts.append("</g>")
    return "".join(parts)


def _runs(points: Iterable[tuple[Any, ...]]) -> list[list[tuple[Any, ...]]]:
    """Stretches of points in which nothing is missing."""
    runs: list[list[tuple[Any, ...]]] = [[]]
    for point in points:
        if all(_known(part) for part in point):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _marker(look: str, x: float, y: float) -> str:
    """A shape by series as well as a colour: circle, square, triangle, diamond; controls are hollow."""
    outline = {
        "cw-c1": "m-4 -4l8 0 0 8 -8 0z",
        "cw-control cw-other": "m-3.5 -3.5l7 0 0 7 -7 0z",
        "cw-c2": "m0 -5l5 9 -10 0z",
        "cw-c3": "m0 -5l5 5 -5 5 -5 -5z",
        "cw-c4": "m0 5l5 -9 -10 0z",
    }
    if look not in outline:
        return f'<circle class="cw-dot" cx="{x:.1f}" cy="{y:.1f}" r="3.8"/>'
    return f'<path class="cw-dot" d="M{x:.1f} {y:.1f}{outline[look]}"/>'


def _described(series: Sequence[Series]) -> str:
    described = []
    for one in series:
        ys = [y for y in one["y"] if y is not None and math.isfinite(y)]
        if ys:
            name = one["name"] + (" (control)" if one.get("control") else "")
            described.append(f"{name}: from {number(ys[0])} to {number(ys[-1])}, highest {number(max(ys))}")
    return "; ".join(described) + "." if described else "No values."


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def axis_range(values: Iterable[float | None]) -> tuple[float, float]:
    known = [float(value) for value in values if value is not None and math.isfinite(value)]
    if not known:
        return 0.0, 1.0
    low, high = (min(max(value, -1e300), 1e300) for value in (min(known), max(known)))
    size = max(abs(low), abs(high))
    if high - low > max(1e-290, 1e-12 * size):
        return low, high
    margin = max(0.5, 1e-6 * size)
    return low - margin, high + margin


def axis_ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """About five round numbers from just outside `low` to `high` (inside them when `whole`)."""
    if whole and high - low <= 12:
        return [float(place) for place in range(math.ceil(low), math.floor(high) + 1)]
    step = 10.0 ** math.floor(math.log10((high - low) / 5))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    if whole:
        step = max(1.0, step)
        first, last = math.ceil(low / step), math.floor(high / step)
    else:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{place * step:.12g}") for place in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten (powers alone over more than three of them) around 10^low to 10^high."""
    factors = (1, 2, 5) if high - low <= 3 else (1,)
    exponents = range(math.floor(low), math.ceil(high) + 1)
    ticks = [float(f"{factor}e{exponent}") for exponent in exponents for factor in factors]
    first = max((place for place, tick in enumerate(ticks) if math.log10(tick) <= low + 1e-9), default=0)
    last = min((place for place, tick in enumerate(ticks) if math.log10(tick) >= high - 1e-9), default=len(ticks) - 1)
    return ticks[first : last + 1]


# Bars and effects ---------------------------------------------------------------------------------------------------

_LANE, _LOWER = 10, 12  # pixels: the middle of a row's own mark, and how far below it that of each control is
_SIGNS = "○□▯"


class Axis:
    """A scale from left to right that holds 0, with round numbers at its ticks."""

    def __init__(self, bars: Iterable[Bar]) -> None:
        every = [one for bar in bars for one in (bar, *(bar.get("controls") or ()))]
        low, high = axis_range([0.0, *(one.get(key) for one in every for key in ("value", "low", "high"))])
        self.ticks = axis_ticks(low, high)
        self.low, self.high = min(low, self.ticks[0]), max(high, self.ticks[-1])

    def place(self, value: float) -> float:
        """Where a number lies, in percent of the width; the ends are free for a mark."""
        return 4.0 + (value - self.low) / (self.high - self.low) * 92.0

    def _anchor(self, tick: float) -> str:
        """How a tick's number stands to its place: at the ends it grows inwards, so that it stays inside the plot."""
        return {self.low: "start", self.high: "end"}.get(tick, "middle")

    def labels(self) -> str:
        """The numbers of the ticks, for an SVG element as wide as the axis."""
        return "".join(
            f'<text x="{self.place(tick):.2f}%" y="12" text-anchor="{self._anchor(tick)}">{number(tick)}</text>'
            for tick in self.ticks
        )

    def row(self, bar: Bar, filled: bool = False) -> str:
        """A number and its controls, which are hollow and a little lower, for an SVG element as wide as the axis."""
        height = row_height(bar)
        parts = []
        for tick in self.ticks:
            css = "cw-zero" if tick == 0 else "cw-rule"
            at = f"{self.place(tick):.2f}%"
            parts.append(f'<line class="{css}" x1="{at}" x2="{at}" y1="0" y2="{height}"/>')
        parts.append(self._marks(bar, _LANE, -1 if filled else 0))
        for lane, control in enumerate(bar.get("controls") or ()):
            one: Bar = {**control, "control": True}
            parts.append(self._marks(one, _LANE + _LOWER * (lane + 1), lane))
        return "".join(parts)

    def _marks(self, one: Bar, y: int, shape: int) -> str:
        """The interval and the mark: -1 is a bar from 0, else a dot, a square or a narrow square, as in `_SIGNS`."""
        value, low, high, control = one["value"], one.get("low"), one.get("high"), one.get("control")
        mark = whisker = ""
        if low is not None and high is not None and _known(low) and _known(high):
            a, b = f"{self.place(low):.2f}%", f"{self.place(high):.2f}%"
            ends = "".join(f'<line x1="{x}" x2="{x}" y1="{y - 4}" y2="{y + 4}"/>' for x in (a, b))
            whisker = f'<g class="cw-whisker"><line x1="{a}" x2="{b}" y1="{y}" y2="{y}"/>{ends}</g>'
        if value is not None and _known(value):
            at = self.place(value)
            if shape < 0:
                start, end = sorted((self.place(0.0), at))
                mark = f'<rect class="cw-fill" x="{start:.2f}%" width="{end - start:.2f}%" y="{y - 7}" height="14"/>'
                if control:
                    mark += f'<line class="cw-hatch" x1="{start:.2f}%" x2="{end:.2f}%" y1="{y}" y2="{y}"/>'
            elif shape == 0:
                mark = f'<circle class="cw-dot" cx="{at:.2f}%" cy="{y}" r="{4.5 if control else 5.5}"/>'
            else:
                wide = 8 if shape == 1 else 5
                mark = (
                    f'<rect class="cw-dot" x="{at:.2f}%" y="{y - 4}" width="{wide}" height="8" '
                    f'transform="translate(-{wide / 2} 0)"/>'
                )
        drawn = mark + whisker if shape < 0 else whisker + mark
        return f'<g class="cw-amount {"cw-control" if control else "cw-result"}">{drawn}</g>'


def row_height(bar: Bar) -> int:
    """Pixels that a number and its controls take."""
    return 2 * _LANE + _LOWER * len(bar.get("controls") or ())


def control_sign(lane: int) -> str:
    """The sign of a control's mark, for the text beside it."""
    return _SIGNS[min(lane, len(_SIGNS) - 1)]


def bars_html(*, items: Sequence[Bar], units: str = "") -> Markup:
    """Horizontal bars from zero on one scale, each with its label and number in text; controls are hatched, or hollow
    marks where they stand in a bar's own row.

    Args:
        items: The bars.
        units: Of the values.
    """
    return _rows(items, units, filled=True)


def effect_html(effect: Effect | Mapping[str, Any]) -> Markup:
    """An effect with its controls in one row, as points with their intervals, over an axis.

    Args:
        effect: The effect, or its JSON: name, value, n, interval, controls (each with name, value, n, interval),
            ablation, units.

    Raises:
        MissingControls: The effect has no controls: it is not a result yet, and is not drawn as one.
    """
    return effects_html([effect])


def effects_html(effects: Iterable[Effect | Mapping[str, Any]]) -> Markup:
    """Effects below each other, a row each with its controls; those in the same units are one figure on one scale.

    Args:
        effects: As `effect_html` takes them.

    Raises:
        MissingControls: An effect has no controls.
    """
    figures: dict[str, list[Mapping[str, Any]]] = {}
    for one in effects:
        effect = one.to_json() if isinstance(one, Effect) else one
        if not effect.get("controls"):
            raise MissingControls(
                f"the effect {effect.get('name') or '(without a name)'!r} has no controls, so it cannot be shown as a "
                "result; measure it on a control too (a random direction, a random position, shuffled labels)"
            )
        figures.setdefault(effect.get("units") or "", []).append(effect)
    drawn = []
    for units, some in figures.items():
        edits = dict.fromkeys(effect["ablation"] for effect in some if effect.get("ablation"))
        foot = f"Edit: {'; '.join(edits)}." if edits else ""
        drawn.append(_rows([_effect_bar(effect) for effect in some], units, foot))
    return Markup("").join(drawn)


def _effect_bar(one: Mapping[str, Any]) -> Bar:
    value, low, high = (_float(x) for x in (one.get("value"), *(one.get("interval") or (None, None))))
    controls = [_effect_bar(control) for control in one.get("controls") or ()]
    return {
        "label": one.get("name") or "effect", "value": value, "low": low, "high": high, "n": one.get("n"),
        "controls": controls,
    }  # fmt: skip


def _float(value: float | str | None) -> float | None:
    """A number of an effect's JSON, where those that are not finite are strings."""
    return None if value is None else float(value)


def _rows(bars: Sequence[Bar], units: str, foot: str = "", filled: bool = False) -> Markup:
    unit = units if short(units) else ""
    axis = Axis(bars)
    rows = []
    for bar in bars:
        css, tag = ("cw-control", _TAG) if bar.get("control") else ("cw-result", "")
        beside = "".join(
            f'<span><i aria-hidden="true">{control_sign(lane)}</i> {escape(one["label"])}{_TAG} {_written(one, unit)}'
            "</span>"
            for lane, one in enumerate(bar.get("controls") or ())
        )
        rows.append(
            f'<div class="cw-bar {css}"><span class="cw-bar-label">{escape(bar["label"])}{tag}</span>'
            f'<svg width="100%" height="{row_height(bar)}" aria-hidden="true">{axis.row(bar, filled)}</svg>'
            f'<span class="cw-bar-value">{_written(bar, unit)}</span>'
            + (f'<span class="cw-beside">{beside}</span></div>' if beside else "</div>")
        )
    said = f"In {escape(units)}. " if units != unit else ""
    about = f'<p class="cw-small">{said}{escape(foot)}</p>' if said or foot else ""
    ticks = f'<div class="cw-bar cw-ticks"><svg width="100%" height="16" aria-hidden="true">{axis.labels()}</svg></div>'
    return Markup(f'<div class="cw-effects"><div class="cw-bars">{"".join(rows)}{ticks}{about}</div></div>')


_TAG = ' <em class="cw-tag">control</em>'


def _written(one: Bar, unit: str) -> str:
    count = f' <span class="cw-n">n = {number(one.get("n"))}</span>' if one.get("n") is not None else ""
    return escape(interval(one["value"], one.get("low"), one.get("high"), unit)) + count
