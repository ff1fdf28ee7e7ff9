"""What a sweep returns: a number for each cell, what was taken over, what could not be, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from markupsafe import Markup
from torch import Tensor

from cutaway.draw.heatmap import heatmap_html
from cutaway.draw.result import Result
from cutaway.model.edits.edit import Receipt
from cutaway.model.edits.resolve import Resolved
from cutaway.model.forward.execution import receipts_of
from cutaway.model.sweep.flops import Flops
from cutaway.model.sweep.shortcuts import Entry
from cutaway.model.tokens import Tokens


def _part(at: Entry) -> str:
    if at.block == "skip":
        return "its output taken over"
    parts = ["attention taken over" if at.attention == "skip" else "at its heads' outputs"] * (at.attention != "run")
    return ", ".join([*parts, *["MLP taken over"] * (at.mlp == "skip")])


@dataclass(frozen=True)
class Batch:
    """Cells that ran together: where they entered, from which column on, and whether a control ran with them."""

    cells: tuple[int, ...]
    entry: Entry
    start: int
    control: bool

    def __str__(self) -> str:
        where = f"layer {self.entry.layer}" + (f" ({_part(self.entry)})" if self.entry.inner else "")
        return f"{len(self.cells)} cells from {where}, column {self.start}" + (", with control" * self.control)


@dataclass(frozen=True, eq=False, repr=False)
class Sweep(Result):
    """What a sweep found; it prints itself.

    Attributes:
        tokens: the n prompts.
        values: the metric of each cell for each prompt, [cells, n, ...]; NaN for cells that were not run yet.
        base: that of the unedited prompts, [n, ...].
        done: whether a cell was run, [cells].
        batches: what ran together, and how much of it was taken over.
        notes: what could not be taken over and why.
        flops: how much arithmetic that was.
        touched: what each cell's edits touched; see `receipts`.
    """

    title: ClassVar[str] = "Sweep"

    tokens: Tokens
    values: Tensor
    base: Tensor
    done: Tensor
    batches: tuple[Batch, ...] = field(repr=False)
    notes: tuple[str, ...]
    flops: Flops
    touched: tuple[tuple[Resolved, ...], ...] = field(repr=False)

    def receipts(self, cell: int) -> tuple[Receipt, ...]:
        """What each edit of a cell really changed.

        Args:
            cell: the cell's number.
        """
        return receipts_of(self.touched[cell], self.tokens.first)

    @property
    def prefix_reused(self) -> bool:
        """Whether any batch took keys and values before its first edited column from the cache."""
        return any(batch.start > 0 for batch in self.batches)

    def summary(self) -> str:
        """What ran together, what was taken over, and how much arithmetic that was."""
        n, done = len(self.values), int(self.done.sum())
        lines = [f"Sweep of {n} cells over {len(self.tokens)} prompts in {len(self.batches)} batches"]
        lines += [f"  only {done} cells are done"] if done < n else []
        lines += [f"  {batch}" for batch in self.batches[:6]]
        lines += [f"  … and {len(self.batches) - 6} more batches"] if len(self.batches) > 6 else []
        lines += [f"  {note}" for note in self.notes]
        saved = self.flops.plain / self.flops.run if self.flops.run else 1.0
        lines.append(
            f"  {self.flops.run / 1e9:.3g} GFLOP, {saved:.1f} times less than one forward per cell; "
            f"{self.flops.share:.0%} of it needed"
        )
        return "\n".join(lines)

    def rows(self) -> list[dict[str, Any]]:
        """One per cell that was run, prompt and number of the metric: cell, prompt, number, value and base."""
        base = self.base.reshape(len(self.base), -1)
        return [
            {"cell": i, "prompt": j, "number": k, "value": value, "base": base[j, k].item()}
            for i in self.done.nonzero()[:, 0].tolist()
            for j in range(len(base))
            for k, value in enumerate(self.values[i, j].reshape(-1).tolist())
        ]

    def to_json(self) -> dict[str, Any]:
        """`rows`, `notes` and the number of cells."""
        return {"cells": len(self.values), "rows": self.rows(), "notes": list(self.notes)}

    def drawing(self) -> Markup:
        """A heatmap of cells by prompts; of several numbers per prompt, the mean."""
        table = self.values.double().flatten(2).mean(2) if self.values.ndim > 2 else self.values
        return heatmap_html(
            rows=[f"cell {i}" for i in range(len(table))],
            columns=[f"prompt {j}" for j in range(len(self.base))],
            values=table.tolist(),
            title="Metric by cell and prompt",
            scale="diverging",
        )


class SweepInterrupted(KeyboardInterrupt):
    """Raised for a KeyboardInterrupt during a sweep; `sweep` holds what was done, and `lm.sweep(start=...)` goes on."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__(f"the sweep was interrupted after {int(sweep.done.sum())} of {len(sweep.done)} cells")
        self.sweep = sweep
