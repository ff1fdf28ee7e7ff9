"""Paired timing: subjects run in turn, and what is reported is the median of ratios within a turn.

Absolute times drift with the machine; two runs a moment apart drift together.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
from torch import Tensor

from cutaway.artifacts.results import interval_text
from cutaway.artifacts.statistics import median_interval

ROOT = Path(__file__).resolve().parent.parent
Subject = Callable[[int], float]
"""Seconds of one unit of work; the number of the turn is given, so that a subject can change its share of the work."""


def timed(work: Callable[[], object], repeats: int = 1) -> float:
    """Mean seconds of `repeats` calls."""
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) / repeats


def take_turns(subjects: Mapping[str, Subject], pairs: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of every subject in every turn; every second turn runs backwards, so that no one always goes first."""
    taken: dict[str, list[float]] = {name: [] for name in subjects}
    for turn in range(-warm_up, pairs):
        names = list(subjects)[:: 1 if turn % 2 == 0 else -1]
        for name in names:
            seconds = subjects[name](max(turn, 0))
            if turn >= 0:
                taken[name].append(seconds)
    return taken


@dataclass(frozen=True)
class Claim:
    """What a row is to show: the median ratio of two subjects' seconds, `over` / `under`, and its bound."""

    text: str
    over: str
    under: str
    relation: Literal["<=", ">=", ""]
    bound: float = float("nan")


@dataclass(frozen=True)
class Verdict:
    """A claim and what was found: median ratio [low, high] over n pairs. `met` is None where nothing was promised."""

    text: str
    value: float
    low: float
    high: float
    n: int
    target: str
    met: bool | None

    def __str__(self) -> str:
        said = {True: "met", False: "NOT MET", None: ""}[self.met]
        return f"{self.text}: {self.figure}  {self.target}  {said}".rstrip()

    @property
    def figure(self) -> str:
        """The number with its interval and n, where there is more than one."""
        if self.n == 1:
            return f"{self.value:.3g}"
        return f"{self.value:.3f} {interval_text((self.low, self.high))}, n {self.n}"


def verdict(claim: Claim, seconds: Mapping[str, list[float]]) -> Verdict:
    """Judge a claim by the median of the ratios within each turn, with its interval."""
    ratios = [a / b for a, b in zip(seconds[claim.over], seconds[claim.under], strict=True)]
    value = median(ratios)
    low, high = median_interval(ratios)
    return judged(claim.text, value, claim.relation, claim.bound, low, high, len(ratios))


def judged(
    text: str, value: float, relation: str, bound: float, low: float = np.nan, high: float = np.nan, n: int = 1
) -> Verdict:
    """A number beside its bound."""
    met = {"<=": value <= bound, ">=": value >= bound, "": None}[relation]
    return Verdict(text, value, low, high, n, f"{relation} {bound:g}" if relation else "", met)


@dataclass
class Row:
    """One row of the benchmark: seconds and peak memory of every subject, verdicts, equality of the numbers."""

    name: str
    title: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.title}"]
        for subject, times in self.seconds.items():
            memory = f", peak +{self.peak_bytes[subject] / 2**20:.1f} MiB" if subject in self.peak_bytes else ""
            lines.append(f"    {subject:<34}{median(times) * 1e3:12.2f} ms{memory}")
        lines += [f"  {one}" for one in self.verdicts]
        lines += [f"  ({note})" for note in self.notes]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        medians = {name: median(times) for name, times in self.seconds.items()}
        return {**asdict(self), "median_seconds": medians}


def relative(value: Tensor, reference: Tensor) -> float:
    """Largest difference, relative to the largest reference value."""
    return ((value.double() - reference.double()).abs().max() / reference.double().abs().max()).item()


def same(row: Row, who: str, found: float, bound: float = 1e-5) -> None:
    row.verdicts.append(judged(f"{who}: max relative difference", found, "<=", bound))


class PeerAbsent(Exception):
    """The peer's environment has not been built."""


class Peer:
    """A peer library in its own environment, asked over pipes."""

    def __init__(self, name: str) -> None:
        python = ROOT / ".venvs" / name / "bin" / "python"
        if not (ROOT / ".venvs" / name / "requirements.txt").is_file():
            raise PeerAbsent(name)
        self.name = name
        worker = Path(__file__).with_name("peer_worker.py")
        environ = {**os.environ, "PYTHONPATH": "", "OMP_WAIT_POLICY": "passive"}
        self._process = subprocess.Popen(
            [python, worker, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environ,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to one request; RuntimeError with the peer's message where it failed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline() or '{"error": "it ended without an answer"}')
        except BrokenPipeError:
            answer = {"error": "it has ended"}
        if "error" in answer:
            raise RuntimeError(f"{self.name}, asked to {request['do']} {request.get('task', '')}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the worker by closing its input."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
