"""Progress goes to stderr: a bar on a terminal, lines in a log, nothing when asked to be quiet."""

import io
import os
import pty
import re
import subprocess
import sys
import textwrap

import pytest
from rich.console import Console

from cutaway.artifacts import progress as module
from cutaway.artifacts.progress import (
    Progress,
    _bar,  # pyright: ignore[reportPrivateUsage]
    duration,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.delenv("CUTAWAY_QUIET", raising=False)
    return clock


def test_a_log_gets_a_line_now_and_then_with_rate_and_time_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("training", total=100, unit="steps") as progress:
        for _ in range(100):
            clock.now += 0.5
            progress.advance(note="loss 2.5")
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) <= 7
    assert lines[0] == "training: 20/100, 2 steps/s, 40 s left, loss 2.5"
    assert lines[-1] == "training: 100/100, 2 steps/s, loss 2.5, took 50 s"


def test_work_without_a_known_end_counts(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("reading") as progress:
        clock.now += 11
        progress.advance(22_000)
    assert capsys.readouterr().err.splitlines() == [
        "reading: 22,000, 2,000/s",
        "reading: 22,000, 2,000/s, took 11 s",
    ]


def test_interrupted_work_does_not_claim_to_be_done(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), Progress("training", total=10) as progress:  # noqa: PT012
        clock.now += 1
        progress.advance(4)
        raise KeyboardInterrupt
    assert "took" not in capsys.readouterr().err


def test_quiet_is_silent(clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTAWAY_QUIET", "1")
    with Progress("training", total=2) as progress:
        clock.now += 60
        progress.advance()
    assert capsys.readouterr() == ("", "")


def test_the_bar_stays_at_80_columns() -> None:
    """Of a long label and a long note the ends go, with a sign."""
    bar, task = _bar("training a dictionary at blocks.3.mlp.in → blocks.3.mlp.out", 4_000_000)
    note = "123,456 tokens/s, 2 h 5 min left, loss 0.1234, L0 31.9, variance explained 0.812, dead 0.1%"
    bar.update(task, completed=1_500_000, note=note)
    for width in (80, 120):
        console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
        console.print(bar.get_renderable())
        assert isinstance(console.file, io.StringIO)
        (line,) = console.file.getvalue().splitlines()
        assert len(line) <= width
        assert len(re.findall("[━╸╺]", line)) == 6  # of 16: without colours what is left to do is blank
        assert "1500000/4000000" in line
        assert "…" in line


def test_a_terminal_gets_a_bar_on_stderr_alone() -> None:
    code = """
        from cutaway.artifacts.progress import Progress
        with Progress("training", total=3, unit="steps") as progress:
            for _ in range(3):
                progress.advance(note="loss 2.5")
        print("result")
    """
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    environment.pop("CUTAWAY_QUIET", None)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=theirs, env=environment, text=True
    )
    os.close(theirs)
    drawn = b""
    try:
        while chunk := os.read(ours, 65536):
            drawn += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert done.stdout == "result\n"
    assert b"3/3" in drawn
    assert b"loss 2.5" in drawn


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text
