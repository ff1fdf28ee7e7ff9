"""The command line that is running: what a figure names as the way to measure it again."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_command: ContextVar[str | None] = ContextVar("command", default=None)


@contextmanager
def recording(command: str | None) -> Iterator[None]:
    """Inside, every figure that is made names a command line as its source.

    Args:
        command: The command line; None for none.
    """
    token = _command.set(command)
    try:
        yield
    finally:
        _command.reset(token)


def current_command() -> str | None:
    """The command line that is running, None in a program of the user's own."""
    return _command.get()
