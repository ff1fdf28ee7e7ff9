"""Which observed call a forward belongs to: one a thread, or a task."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cutaway.model.forward.execution import Execution

current: ContextVar[Execution | None] = ContextVar("cutaway_execution", default=None)


def active() -> Execution | None:
    """The execution that the current forward belongs to."""
    return current.get()
