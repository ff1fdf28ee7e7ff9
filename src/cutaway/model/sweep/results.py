"""What a sweep returns: a number for each cell, what was taken over, what could not be, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from cutaway.model.edits.edits import Receipt
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


@dataclass(frozen=True, eq=False)
class Sweep:
    """What a sweep found. `values` [cells, n, ...] are the metric of each cell for each of the n prompts, `base`
    [n, ...] that of the unedited prompts; cells that were not run yet (`done` is False) hold NaN.

    `batches` says what ran together and how much of it was taken over, `notes` what could not be and why, `flops` how
    much arithmetic that was.
    """

    tokens: Tokens
    values: Tensor
    base: Tensor
    done: Tensor
    batches: tuple[Batch, ...] = field(repr=False)
    notes: tuple[str, ...]
    flops: Flops
    touched: tuple[tuple[Resolved, ...], ...] = field(repr=False)

    def receipts(self, cell: int) -> tuple[Receipt, ...]:
        """What each edit of a cell really changed."""
        return receipts_of(self.touched[cell], self.tokens.first)

    @property
    def prefix_reused(self) -> bool:
        """Whether any batch took keys and values before its first edited column from the cache."""
        return any(batch.start > 0 for batch in self.batches)

    def __str__(self) -> str:
        n, done = len(self.values), int(self.done.sum())
        lines = [f"Sweep of {n} cells over {len(self.tokens)} prompts in {len(self.batches)} batches"]
        lines += [f"  only {done} cells are done"] if done < n else []
        lines += [f"  {batch}" for batch in self.batches[:6]]
        lines += [f"  … and {len(self.batches) - 6} more batches"] if len(self.batches) > 6 else []
        lines += [f"  {note}" for note in self.notes]
        saved = self.flops.plain / self.flops.run if self.flops.run else 1.0
        lines.append(
            f"  {self.flops.run / 1e9:.3g} GFLOP, {saved:.1f} times less than one forward a cell; "
            f"{self.flops.share:.0%} of it needed"
        )
        return "\n".join(lines)

    __repr__ = __str__


class SweepInterrupted(KeyboardInterrupt):
    """Raised for a KeyboardInterrupt during a sweep; `sweep` holds what was done, and `lm.sweep(start=...)` goes on."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__(f"the sweep was interrupted after {int(sweep.done.sum())} of {len(sweep.done)} cells")
        self.sweep = sweep
