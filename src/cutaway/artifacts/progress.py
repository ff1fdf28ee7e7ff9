"""How far a long piece of work is, on stderr.

A live bar with rate and time left on a terminal, a plain line now and then elsewhere (a log), nothing at all with
`CUTAWAY_QUIET=1`. Nothing is ever written to stdout, which belongs to results.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def shown(label: str, total: int, unit: str, *, least: int = 2) -> Iterator[Callable[..., None]]:
    """Progress of work of at least so many units; what it gives is `advance`, which does nothing below that."""
    if total < least:
        yield lambda *_args, **_kwargs: None
        return
    with Progress(label, total=total, unit=unit) as progress:
        yield progress.advance


def is_quiet() -> bool:
    """Whether `CUTAWAY_QUIET` asks for silence."""
    return os.environ.get("CUTAWAY_QUIET", "0") not in ("", "0")


class Progress:
    """Work of `total` steps, shown while the `with` block runs.

        with Progress("training", total=2000, unit="steps") as progress:
            for step in range(2000):
                ...
                progress.advance(note=f"loss {loss:.3f}")

    `total=None` counts without an end.
    """

    def __init__(self, label: str, total: int | None = None, *, unit: str = "") -> None:
        self.label = label
        self.total = total
        self.unit = unit
        self.done = 0
        self.note = ""
        self._bar = None

    def __enter__(self) -> Self:
        self._start = self._last_line = time.monotonic()
        if not is_quiet() and sys.stderr.isatty():
            self._bar, self._task = _bar(self.label, self.total)
            self._bar.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif not is_quiet():
            self._print(final=kind is None)

    def advance(self, n: int = 1, *, note: str | None = None) -> None:
        """`n` more steps are done; `note` is shown behind them."""
        self.done += n
        if note is not None:
            self.note = note
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=self.line(short=True))
        elif not is_quiet() and time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._print()

    def line(self, *, short: bool = False) -> str:
        """What a log shows: label, count, rate, time left, note. `short` leaves out what a bar shows already."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = self.done / seconds
        parts = [f"{_rate(rate)} {self.unit}/s".replace(" /s", "/s")]
        if self.total and 0 < self.done < self.total:
            parts.append(f"{duration((self.total - self.done) / rate)} left")
        if self.note:
            parts.append(self.note)
        if short:
            return ", ".join(parts)
        count = f"{self.done:,}" if self.total is None else f"{self.done:,}/{self.total:,}"
        return f"{self.label}: {count}, " + ", ".join(parts)

    def _print(self, *, final: bool = False) -> None:
        self._last_line = time.monotonic()
        took = f", took {duration(self._last_line - self._start)}" if final else ""
        print(self.line() + took, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds as a person says them: "8 s", "3 min 20 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _bar(label: str, total: int | None) -> tuple["RichProgress", "TaskID"]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as RichProgress
    from rich.table import Column

    bar = RichProgress(  # what does not fit is cut with a sign: first the note, then the label, never the bar
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", max_width=28)),
        BarColumn(bar_width=16, table_column=Column(min_width=16)),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        console=Console(stderr=True),
        expand=True,
    )
    return bar, bar.add_task(label, total=total, note="")
