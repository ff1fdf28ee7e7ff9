"""What commands print on stdout: JSON, or a table."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cutaway.artifacts.command import current_command
from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.files import plain
from cutaway.cli.asked import current_choices
from cutaway.cli.fit import say


def print_result(figures: Any, model: str | Sequence[str] | None = None) -> None:
    """Print figures as JSON in the shape that every command has (`result.schema.json`).

    Args:
        figures: What was measured, or an object that has `to_json`.
        model: The name of the model, or of several; None where there is none.
    """
    result = {"command": current_command(), "model": model, "figures": figures, "choices": current_choices()}
    print(json.dumps(plain(result), indent=2, ensure_ascii=False, allow_nan=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print left-aligned columns under their names."""
    lines = [columns, ["-" * len(column) for column in columns], *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    say("\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines))


def deliver(
    *,
    text: str,
    model: str | Sequence[str] | None,
    figures: Any,
    page: Callable[[], str],
    as_json: bool,
    html: Path | None,
) -> None:
    """What an instrument's command leaves: its table (or, with `as_json`, its figures) on stdout, and `html`, a page,
    if asked for.
    """
    if html is not None:
        from cutaway.draw.page import write_page

        if html.is_dir():
            raise CutawayError(f"{html} is a folder; --html takes the name of a file, such as {html / 'page.html'}.")
        write_page(html, page())
    if as_json:
        print_result(figures, model)
        return
    say(text)
    if html is not None:
        print(f"\npage: {html}")
