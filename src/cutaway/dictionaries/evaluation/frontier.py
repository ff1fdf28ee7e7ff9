"""The sparsity–fidelity frontier: what each preset keeps of the model at each number of active latents.

Points of one preset (or one dictionary) at several settings make a line; a better method's line lies above. L0 is on a
logarithmic axis; every point has the interval of its own figure, and the controls' points are drawn too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

from markupsafe import Markup

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.results import Effect
from cutaway.dictionaries.evaluation.figures import figure_rows
from cutaway.draw.charts import Series, line_legend, line_svg
from cutaway.draw.panels import table_html
from cutaway.draw.result import Result

_RANDOM = "random directions, same size and L0"
FIDELITIES = ("ce_recovered_mean", "fvu")
_COLUMNS = ("l0", "fvu", "variance_explained", "ce_recovered_zero", "ce_recovered_mean", "ce_increase")
_HEADS = ("L0", "FVU", "variance explained", "CE recovered (zero)", "CE recovered (mean)", "CE increase, nats")
_AXES = {
    "ce_recovered_mean": "cross-entropy recovered (mean ablation)",
    "ce_recovered_zero": "cross-entropy recovered (zero ablation)",
    "fvu": "fraction of variance unexplained",
    "variance_explained": "variance explained",
    "ce_increase": "rise of the cross-entropy, nats",
    "kl": "KL divergence, nats",
}


@dataclass(frozen=True)
class Point:
    """A judged dictionary on a frontier."""

    line: str
    """The line that it belongs to: "topk"."""
    label: str
    """What distinguishes it from others there: "k = 32"."""
    effects: Mapping[str, Effect]
    """Its figures by name, "l0" among them."""

    def to_json(self) -> dict[str, Any]:
        """The point as plain data."""
        return {
            "line": self.line,
            "label": self.label,
            "effects": {name: one.to_json() for name, one in self.effects.items()},
        }


@dataclass(frozen=True, repr=False)
class Frontier(Result):
    """Sparsity against fidelity, line by line."""

    title = "Sparsity and fidelity"

    points: tuple[Point, ...]
    """Line by line, each by rising L0."""

    def summary(self) -> str:
        lines = str(self).split("\n")
        more = len(lines) - 11
        return "\n".join([*lines[:11], *([f"and {more} more points"] if more > 0 else [])])

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"preset": point.line, "setting": point.label, **row}
            for point in self.points
            for row in figure_rows(point.effects.items())
        ]

    def drawing(self) -> Markup:
        return Markup("").join(drawing for _, _, drawing in self.sections())

    def cells(self) -> list[list[str | float]]:
        """One row per point: line, label, and the figures that are there."""
        return [
            [point.line, point.label, *(one.value if (one := point.effects.get(name)) else nan for name in _COLUMNS)]
            for point in self.points
        ]

    def series(self, fidelity: str) -> list[Series]:
        """One curve per line, and a grey one of the controls, unless it would flatten the others (see `aside`).

        Args:
            fidelity: Name of the figure on the y axis, such as "ce_recovered_mean" or "fvu".
        """
        found: list[Series] = []
        for line in dict.fromkeys(point.line for point in self.points):
            own = [point for point in self.points if point.line == line and fidelity in point.effects]
            effects = [point.effects[fidelity] for point in own]
            if own:
                found.append(
                    {
                        "name": line,
                        "x": [_l0(point.effects["l0"].value) for point in own],
                        "y": [one.value for one in effects],
                        "low": [one.interval[0] if one.interval else None for one in effects],
                        "high": [one.interval[1] if one.interval else None for one in effects],
                    }
                )
        controls = self._controls(fidelity)
        if controls and not self.aside(fidelity):
            x, y = zip(*controls, strict=True)
            found.append({"name": _RANDOM, "x": list(x), "y": list(y), "control": True})
        return found

    def _controls(self, fidelity: str) -> list[tuple[float, float]]:
        """L0 and figure of each point's random directions, by rising L0."""
        own = [point.effects for point in self.points if fidelity in point.effects]
        return sorted((_l0(some["l0"].controls[0].value), some[fidelity].controls[0].value) for some in own)

    def aside(self, fidelity: str) -> str:
        """A sentence with the controls where they lie so far from the rest that drawing them would flatten it.

        Args:
            fidelity: Name of the figure on the y axis, such as "ce_recovered_mean" or "fvu".
        """
        values = [point.effects[fidelity].value for point in self.points if fidelity in point.effects]
        controls = [y for _, y in self._controls(fidelity)]
        if not values:
            return ""
        low, high = min(values), max(values)
        reach = 4 * max(high - low, 0.05)
        if min(controls) >= low - reach and max(controls) <= high + reach:
            return ""
        return (
            f"{_RANDOM[0].upper()}{_RANDOM[1:]}: {min(controls):.3g} to {max(controls):.3g}, too far away to be drawn."
        )

    def svg(self, fidelity: str = FIDELITIES[0]) -> Markup:
        """L0 on a logarithmic axis against one figure, intervals as bands. With it goes `legend`.

        Args:
            fidelity: Name of the figure on the y axis, such as "ce_recovered_mean" or "fvu"; by default the first of
                `FIDELITIES`.
        """
        label = _AXES.get(fidelity, fidelity)
        return line_svg(
            series=self.series(fidelity),
            title=f"{label} by L0",
            x_label="active latents per token (L0)",
            y_label=label,
            log_x=True,
        )

    def legend(self, fidelity: str = FIDELITIES[0]) -> Markup:
        """The names of the curves.

        Args:
            fidelity: Name of the figure on the y axis, such as "ce_recovered_mean" or "fvu"; by default the first of
                `FIDELITIES`.
        """
        return line_legend(self.series(fidelity))

    def table(self) -> Markup:
        """The rows as an HTML table."""
        return table_html(columns=("preset", "setting", *_HEADS), rows=self.cells(), title="sparsity and fidelity")

    def sections(self, note: str = "") -> list[tuple[str, str, Markup]]:
        """Sections for `draw.page.page_html`: both plots and the table.

        Args:
            note: A sentence to stand above the first section; empty for none.
        """
        found = []
        for fidelity, heading in (
            ("ce_recovered_mean", "L0 against cross-entropy recovered"),
            ("fvu", "L0 against FVU"),
        ):
            if any(fidelity in point.effects for point in self.points):
                text = " ".join(part for part in (note, self.aside(fidelity)) if part)
                found.append((heading, text, Markup(self.svg(fidelity)) + self.legend(fidelity)))
                note = ""
        return [*found, ("Every point", note, self.table())]

    def to_json(self) -> list[dict[str, Any]]:
        return [point.to_json() for point in self.points]

    def __str__(self) -> str:
        heads = ["preset", "setting", *_HEADS]
        cells = [heads] + [[c if isinstance(c, str) else f"{c:.4g}" for c in row] for row in self.cells()]
        widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def _l0(value: float) -> float:
    """L0 as a place on a logarithmic axis: a dictionary that is silent throughout is drawn at its left end."""
    return max(value, 1e-3)


def frontier(judged: Sequence[Point]) -> Frontier:
    """The sparsity–fidelity frontier of judged dictionaries.

    Args:
        judged: Points, such as `Judgement.point` makes.

    Returns:
        Points in the order of their lines' first mention, each line by rising L0.

    Raises:
        CutawayError: there are no points, or one was judged without L0.
        MissingControls: a figure has no controls.

    Example:
        >>> frontier([judge(lm, one, rows).point() for one in found]).save("frontier.svg")  # doctest: +SKIP
        PosixPath('frontier.svg')
    """
    if not judged:
        raise CutawayError("a frontier needs at least one judged dictionary")
    for point in judged:
        if "l0" not in point.effects:
            raise CutawayError(f"{point.line} {point.label} has no L0; judge it with `judge` or `evaluate` first")
        for one in point.effects.values():
            one.require_controls()
    lines = list(dict.fromkeys(point.line for point in judged))
    return Frontier(tuple(sorted(judged, key=lambda point: (lines.index(point.line), point.effects["l0"].value))))
