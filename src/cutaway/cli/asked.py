"""What was asked of the command line: the words that measure the same again, and every option as it was taken."""

import inspect
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from cyclopts import App

from cutaway.artifacts.command import recording

_ABOUT_OUTPUT = ("json", "html", "overwrite")  # they change no figure, and a page should not be replaced unasked
_choices: ContextVar[dict[str, Any] | None] = ContextVar("choices", default=None)


def current_choices() -> dict[str, Any]:
    """Every option of the running command by its name, defaults too; empty outside of a command."""
    return _choices.get() or {}


@contextmanager
def asked(path: tuple[str, ...], app: App, bound: inspect.BoundArguments) -> Iterator[None]:
    """Inside, figures name this command line as their source, and JSON lists its choices.

    Args:
        path: The words that lead to the command.
        app: The command itself.
        bound: Its arguments, as they were parsed.
    """
    names = {one.field_info.name: one.name for one in app.assemble_argument_collection()}
    line = command_line(path, bound, names)
    bound.apply_defaults()
    token = _choices.set(
        {names[name].lstrip("-").lower(): value for name, value in bound.arguments.items() if name not in _ABOUT_OUTPUT}
    )
    try:
        with recording(line):
            yield
    finally:
        _choices.reset(token)


def command_line(path: tuple[str, ...], bound: inspect.BoundArguments, names: dict[str, str]) -> str:
    """The line that measures the same again: each argument, and each option that is not at its default."""
    words: list[str] = []
    options: list[str] = []
    for name, value in bound.arguments.items():
        parameter = bound.signature.parameters[name]
        if parameter.kind is not parameter.KEYWORD_ONLY:
            words += map(str, value) if parameter.kind is parameter.VAR_POSITIONAL else [str(value)]
        elif name not in _ABOUT_OUTPUT and value != parameter.default:
            for one in value if isinstance(value, list | tuple) else [value]:
                options += _option(names[name], one)
    if any(word.startswith("-") for word in words):  # what follows -- is no option
        return shlex.join(["cutaway", *path, *options, "--", *words])
    return shlex.join(["cutaway", *path, *words, *options])


def _option(name: str, value: Any) -> list[str]:
    if value is True:
        return [name]
    text = str(value)
    taken_for_an_option = isinstance(value, str) and text.startswith("-")
    return [f"{name}={text}"] if taken_for_an_option else [name, text]
