"""What commands print on stdout: JSON, or a table."""

import json
from collections.abc import Sequence
from typing import Any

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
