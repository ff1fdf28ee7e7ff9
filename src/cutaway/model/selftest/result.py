"""What a self-test found: its checks with their bounds, and whether they hold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.draw.result import Result

# Largest allowed |left - right| relative to the scale of the values compared. Norms, rotary angles and softmaxes of
# transformers are computed in fp32 even in a float64 model.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}


@dataclass(frozen=True)
class Check:
    """One identity at one layer.

    Attributes:
        check: the identity, "left = right".
        layer: the layer; None for those outside the layers.
        residual: max |left - right| over the scale of the values.
        tolerance: the largest residual that is allowed.
    """

    check: str
    layer: int | None
    residual: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the residual is within the tolerance."""
        return self.residual <= self.tolerance


@dataclass(frozen=True, repr=False)
class SelfTest(Result):
    """The result of a self-test; it prints itself, and `print(test)` prints every check.

    Attributes:
        model: the model's name.
        dtype: the type of its weights.
        checks: one `Check` per identity and layer.
        notes: what is not wrong but sets limits to what can be asked of the model.
    """

    title: ClassVar[str] = "Self-test"

    model: str
    dtype: str
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every check is within its tolerance."""
        return all(row.ok for row in self.checks)

    def failures(self) -> list[Check]:
        """The checks that are not."""
        return [row for row in self.checks if not row.ok]

    def require(self) -> None:
        """Nothing, if it passed.

        Raises:
            CutawayError: the first failed check and its layer.
        """
        for row in self.failures():
            where = "" if row.layer is None else f" at layer {row.layer}"
            raise CutawayError(
                f"{self.model} fails its self-test{where}: {row.check} (residual {row.residual:.2g}, allowed "
                f"{row.tolerance:.2g}), so results on it would be wrong."
            )

    def __str__(self) -> str:
        names = list(dict.fromkeys(row.check for row in self.checks))
        lines = [f"{'check':<66} {'layers':>6} {'worst':>9} {'allowed':>9}"]
        for name in names:
            rows = [row for row in self.checks if row.check == name]
            worst = max(rows, key=lambda row: row.residual)
            mark = "" if all(row.ok for row in rows) else f"  FAILS at layer {worst.layer}"
            lines.append(f"{name:<66} {len(rows):>6} {worst.residual:>9.1e} {worst.tolerance:>9.1e}{mark}")
        lines += [f"note: {note}" for note in self.notes]
        verdict = "passed" if self.passed else f"FAILED ({len(self.failures())} of {len(self.checks)})"
        lines.append(f"self-test of {self.model} in {self.dtype}: {verdict}")
        return "\n".join(lines)

    @property
    def verdict(self) -> str:
        """How many checks pass."""
        failed = len(self.failures())
        return f"{failed} of {len(self.checks)} checks FAIL" if failed else f"all {len(self.checks)} checks pass"

    def worst(self) -> list[Check]:
        """Each check at the layer with its largest residual."""
        names = dict.fromkeys(row.check for row in self.checks)
        return [max((row for row in self.checks if row.check == name), key=lambda row: row.residual) for name in names]

    def summary(self) -> str:
        """The verdict, the first checks that fail, and the notes."""
        nearest = max(self.checks, key=lambda row: row.residual / row.tolerance)
        lines = [
            f"Self-test of {self.model} in {self.dtype}: {self.verdict}",
            f"  nearest to its bound: {nearest.check} ({nearest.residual:.1e} of {nearest.tolerance:.0e})",
        ]
        lines += [f"  FAILS at layer {row.layer}: {row.check} ({row.residual:.1e})" for row in self.failures()[:5]]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes[:5])])

    def rows(self) -> list[dict[str, Any]]:
        """One per check and layer: check, layer, residual, tolerance, ok."""
        return [
            {"check": r.check, "layer": r.layer, "residual": r.residual, "tolerance": r.tolerance, "ok": r.ok}
            for r in self.checks
        ]

    def to_json(self) -> dict[str, Any]:
        """`passed`, `rows` and `notes`."""
        return {"passed": self.passed, "rows": self.rows(), "notes": list(self.notes)}

    def table(self) -> Markup:
        """Each check at its worst layer."""
        from cutaway.draw.panels import table_html

        return table_html(
            columns=["no.", "check", "worst residual", "allowed", "at layer", "passed"],
            rows=[
                [i + 1, r.check, f"{r.residual:.1e}", f"{r.tolerance:.0e}", "–" if r.layer is None else r.layer, r.ok]
                for i, r in enumerate(self.worst())
            ],
            title="Checks",
            align=["right", "left", "right", "right", "right", "left"],
        )

    def by_layer(self) -> Markup:
        """How many digits each residual lies within its tolerance, by check and layer; below 0 it is beyond."""
        from cutaway.draw.heatmap import heatmap_html

        found = {(row.check, row.layer): row for row in self.checks}
        layers = sorted({row.layer for row in self.checks if row.layer is not None})
        names = [(i + 1, row.check) for i, row in enumerate(self.worst()) if row.layer is not None]

        def digits(name: str, layer: int) -> float | None:
            row = found.get((name, layer))
            return None if row is None else math.log10(row.tolerance / max(row.residual, row.tolerance * 1e-4))

        return heatmap_html(
            rows=[f"no. {number}" for number, _ in names],
            columns=[str(layer) for layer in layers],
            values=[[digits(name, layer) for layer in layers] for _, name in names],
            title="Digits within the tolerance, by check and layer",
            units="digits",
            column_axis="layer",
        )

    def drawing(self) -> Markup:
        """The checks by layer, and their table."""
        return self.by_layer() + self.table()


class Checks:
    """The checks of one model as they are made."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.tolerance = TOLERANCE.get(dtype, 6e-3)
        self.rows: list[Check] = []

    def equal(self, check: str, layer: int | None, left: Tensor, right: Tensor, scale: Tensor | None = None) -> None:
        """Compare; the scale is the largest value compared, or the given one where a difference of large values is
        taken.
        """
        left, right = left.double(), right.double()
        if not left.numel():  # nothing is left to compare, as where all scores are NaN
            self.rows.append(Check(check, layer, float("inf"), self.tolerance))
            return
        size = max(float(t.abs().max()) for t in ((left, right) if scale is None else (left, right, scale.double())))
        residual = float((left - right).abs().max()) / max(size, 1e-12)
        self.rows.append(Check(check, layer, residual if residual == residual else float("inf"), self.tolerance))
