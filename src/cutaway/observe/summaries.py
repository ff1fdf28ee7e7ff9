"""How the results of this floor write themselves in a few lines."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from cutaway.artifacts.results import Interval
from cutaway.draw.text import shorten

_LINES, _WIDTH = 12, 76


def spread(n: int, k: int) -> list[int]:
    """At most k of the numbers 0 to n - 1, evenly spread, the first and the last among them."""
    if n <= k:
        return list(range(n))
    return [round(i * (n - 1) / (k - 1)) for i in range(k)]


def block(lines: Sequence[str]) -> str:
    """Lines as a summary: each shortened to the width of a terminal, no more of them than a summary has."""
    kept = list(lines) if len(lines) <= _LINES else [*lines[: _LINES - 1], "…"]
    return "\n".join(shorten(line, _WIDTH + 4) for line in kept)


def sentence(text: str, lines: int = 3) -> list[str]:
    """A sentence as at most so many indented lines."""
    return textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="  ", max_lines=lines, placeholder=" …")


def ends(interval: Interval | None, prefix: str = "") -> Mapping[str, float | None]:
    """An interval as two columns of a table, None where there is none."""
    low, high = interval or (None, None)
    return {f"{prefix}low": low, f"{prefix}high": high}
