"""What commands print on stdout: JSON, or a table."""

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.files import plain


def print_json(value: Any) -> None:
    """Print `plain(value)` as indented JSON."""
    print(json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print left-aligned columns under their names; the last column is as wide as it likes."""
    lines = [columns, ["-" * len(column) for column in columns], *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns) - 1)]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
        print("  ".join([*cells, line[-1]]).rstrip())


def command_line(*words: str | None, **given: tuple[Any, Any]) -> str:
    """The command line that measures the same again: words, and each option that is not at its default.

    Options are (value, default) by name: a list is given once an entry, True is a switch.
    """
    parts = ["cutaway", *(word for word in words if word is not None)]
    for name, (value, default) in given.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            parts.append(option)
        elif value != default:
            parts += [part for one in (value if isinstance(value, list) else [value]) for part in (option, str(one))]
    return shlex.join(parts)


def deliver(*, text: str, data: Any, page: Callable[[], str], as_json: bool, html: Path | None) -> None:
    """What an instrument's command leaves: its table (or, with `as_json`, its data) on stdout, and `html`, a page, if
    asked for.
    """
    if html is not None:
        from cutaway.draw.page import write_page

        if html.is_dir():
            raise CutawayError(f"{html} is a folder; --html takes the name of a file, such as {html / 'page.html'}.")
        write_page(html, page())
    if as_json:
        print_json(data)
        return
    print(text)
    if html is not None:
        print(f"\npage: {html}")
