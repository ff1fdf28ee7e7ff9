"""Which observed call a forward belongs to, one per thread or task, and what that call edits and captures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor, nn

from cutaway.model.sites import layer_of

Replacement = Callable[..., Any]


class Stop(BaseException):
    """Raised inside a forward once the last wanted value is in hand."""


class Change(Protocol):
    """An edit whose address is known (`edits.resolve.Resolved`)."""

    def apply(self, x: Tensor, offset: int) -> Tensor: ...


class Observation:
    """The state of one observed call; every value is edited and captured through `touch`."""

    def __init__(self, capture: Sequence[str], edits: Mapping[str, Sequence[Change]], mask: Tensor) -> None:
        self.capture = frozenset(capture)
        self.edits = edits
        self.touched = frozenset((*self.capture, *self.edits))
        self.asked = Counter(layer_of(name) for name in self.touched)  # sites in each layer
        self.mask = mask
        self.stop = self.gradients = self.last_only = False
        self.first_layer = 0
        self.resumed: Tensor | None = None
        self.ungrouped = False  # its owner gives keys and values to every query head by itself
        self.replace: dict[nn.Module, Replacement] = {}  # what a module does instead of its forward, in this call alone
        self.end = mask.shape[1]  # columns read so far, those of this forward included
        self.values: dict[str, Tensor] = {}
        self.attention_layers: dict[int, int] = {}
        self.wrapped: dict[int, Callable[[Tensor], Tensor]] = {}  # what to do inside a module's forward, by its id
        self.rows_of: Mapping[str, slice] = {}  # the rows to capture of a site, where they are not all

    def wants(self, *names: str) -> bool:
        """Whether any of these sites is captured or edited."""
        return not self.touched.isdisjoint(names)

    def editing(self, name: str) -> bool:
        return name in self.edits

    def live(self, *names: str) -> bool:
        """Whether a derived value must be put back into the forward: it is edited, or its gradient is asked for."""
        return any(name in self.edits or (self.gradients and name in self.capture) for name in names)

    def edit(self, name: str, value: Tensor) -> Tensor:
        """The value after the edits at a site. Positions are in dimension 1, or 2 for scores and pattern.

        A value may hold more columns than this forward reads (cached keys) or fewer (logits in generation); either
        way it ends with the newest.
        """
        resolved = self.edits.get(name)
        if not resolved:
            return value
        grid = name.endswith((".scores", ".pattern"))
        x = value.transpose(1, 2) if grid else value
        for edit in resolved:
            x = edit.apply(x, self.end - x.shape[1])
        return x.transpose(1, 2) if grid else x

    def record(self, name: str, value: Tensor, *, own: bool = False) -> Tensor:
        """Capture a value if it is asked for, and stop the forward once it was the last one wanted.

        `own`: nobody else will write into the value, so it need not be copied.
        """
        if name in self.capture:
            rows = self.rows_of.get(name)
            kept = value if rows is None else value[rows]
            if not self.gradients:
                kept = kept.detach() if own and rows is None and kept.is_contiguous() else kept.detach().clone()
            self.values[name] = kept
            if self.stop and len(self.values) == len(self.capture):
                raise Stop
        return value

    def touch(self, name: str, value: Tensor, *, own: bool = False) -> Tensor:
        """Apply the edits at a site, then capture it."""
        return self.record(name, self.edit(name, value), own=own)

    def by_row(self, value: Tensor) -> Tensor:
        """[b p d], also where a model has all tokens in one dimension."""
        return value.view(self.mask.shape[0], -1, value.shape[-1]) if value.ndim == 2 else value


current: ContextVar[Observation | None] = ContextVar("cutaway_execution", default=None)


def active() -> Observation | None:
    """The observed call that the current forward belongs to."""
    return current.get()
