"""Text that fits a terminal: tables are folded between words or columns, sentences between words.

Nothing is cut without a sign: a word that is longer than its place ends in “…”. Paths and addresses alone stay whole,
for they are there to be copied.
"""

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from cutaway.draw.text import shorten

_LEAST = 16  # the narrowest that a column of words is made


def terminal_width() -> int | None:
    """The width that what is printed has to fit: the terminal's, or COLUMNS; None where neither is there (a pipe)."""
    if sys.stdout is None or not ("COLUMNS" in os.environ or sys.stdout.isatty()):
        return None
    return max(shutil.get_terminal_size().columns, 40)


def say(text: str) -> None:
    """Print a text on stdout, in the width of the terminal."""
    width = terminal_width()
    print(text if width is None else fitted(text, width))


def fitted(text: str, width: int) -> str:
    """A text in lines of at most `width` characters.

    Lines in a row that have columns (two spaces or more between them) are a table: its widest column of words is made
    narrower, or, where it has none, the columns that do not fit stand below, each time behind the first one.

    Args:
        text: What is to be printed.
        width: Of the terminal.
    """
    found: list[str] = []
    for is_table, lines in groupby(text.split("\n"), key=lambda line: re.search(r"\S {2,}\S", line) is not None):
        some = list(lines)
        if all(len(line) <= width for line in some):
            found += some
        elif is_table and len(some) > 1:
            found += _table(some, width)
        else:
            found += [piece for line in some for piece in _sentence(line, width)]
    return "\n".join(found)


def _words(text: str, width: int, indent: str = "", later: str = "") -> list[str]:
    lines = textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=later, break_long_words=False, break_on_hyphens=False
    )
    return [line if len(line) <= width or "/" in line else shorten(line, width) for line in lines or [""]]


def _sentence(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    indent = line[: len(line) - len(line.lstrip())][: width // 2]
    return _words(line.strip(), width, indent, f"{indent}  ")


@dataclass(frozen=True)
class _Column:
    """Where a column stands in every line: what is before it up to the one before, and its end."""

    before: int
    start: int
    end: int

    def cell(self, line: str) -> str:
        """With the space before it."""
        return line[self.before : self.end].ljust(self.end - self.before)


def _columns(lines: Sequence[str]) -> list[_Column]:
    """The columns that all lines have in common: what two blank places or more divide in each of them."""
    size = max(map(len, lines))
    used = "".join("x" if any(line[i : i + 1].strip() for line in lines) else " " for i in range(size))
    found: list[_Column] = []
    for match in re.finditer(r"x(?:x| (?=x))*", used):
        found.append(_Column(found[-1].end if found else 0, match.start(), match.end()))
    return found


def _table(lines: Sequence[str], width: int) -> list[str]:
    columns = _columns(lines)
    if len(columns) < 2:
        return [piece for line in lines for piece in _sentence(line, width)]
    over = columns[-1].end - width
    of_words = [one for one in columns if any(" " in one.cell(line).strip() for line in lines)]
    widest = max(of_words, key=lambda one: one.end - one.start, default=None)
    longest = max((len(word) for line in lines for word in widest.cell(line).split()), default=0) if widest else 0
    if widest is not None and widest.end - widest.start - over >= max(_LEAST, min(longest, width // 2)):
        return [piece for line in lines for piece in _narrowed(line, columns, widest, over)]
    return _below(lines, columns, width)


def _narrowed(line: str, columns: Sequence[_Column], narrow: _Column, by: int) -> list[str]:
    """A line whose cell in one column is so much narrower, and goes on below."""
    room = narrow.end - narrow.start - by
    pieces = _words(narrow.cell(line).strip(), room)
    gap = " " * (narrow.start - narrow.before)
    first = "".join(gap + pieces[0].ljust(room) if one is narrow else one.cell(line) for one in columns)
    return [first.rstrip(), *((" " * narrow.start + piece).rstrip() for piece in pieces[1:])]


def _below(lines: Sequence[str], columns: Sequence[_Column], width: int) -> list[str]:
    """All lines with the columns that fit, then with those that come next, each time behind the first column."""
    label, *others = columns
    names = [shorten(line[: label.end].rstrip(), width // 3).ljust(min(label.end, width // 3)) for line in lines]
    found: list[str] = []
    while others:
        room, some = width - len(names[0]), []
        while others and (not some or others[0].end - some[0].before <= room):
            some.append(others.pop(0))
        if found:
            found.append("")
        for name, line in zip(names, lines, strict=True):
            cells = "".join(one.cell(line) for one in some).rstrip()
            found.append(f"{name}{shorten(cells, room)}".rstrip())
    return found
