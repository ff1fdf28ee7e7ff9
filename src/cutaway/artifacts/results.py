"""What a method returns: a number beside the evidence that it is one.

An `Effect` is a measured value with its number of examples, its interval, the controls it stands beside and the
ablation that was used. A page or a report calls `require_controls` and so refuses an effect that has none.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from cutaway.artifacts.command import current_command
from cutaway.artifacts.errors import MissingControls

Interval = tuple[float, float]


def interval_text(interval: Interval | None, decimals: int = 3, *, signed: bool = False, to: bool = False) -> str:
    """An interval as tables write it: "[0.79, 0.87]"; "–" where there is none.

    Args:
        interval: Its ends.
        decimals: At the least; with as many as it takes for the ends to differ: "[0.997, 1.001]", never "[1.00, 1.00]".
        signed: Write the sign of positive ends.
        to: "0.79 to 0.87" in place of brackets.

    Returns:
        The text; "[all 1.00]" ("all 1.00") where both ends are the same, since nothing varied.

    Example:
        >>> interval_text((0.9971, 1.0012), 2)
        '[0.997, 1.001]'
    """
    if interval is None or any(math.isnan(end) for end in interval):
        return "–"
    low, high = interval
    sign = "+" if signed else ""
    while low != high and decimals < _MOST_DECIMALS and f"{low:.{decimals}f}" == f"{high:.{decimals}f}":
        decimals += 1
    if f"{low:.{decimals}f}" == f"{high:.{decimals}f}":
        written = f"all {low:{sign}.{decimals}f}"
    else:
        written = f"{low:{sign}.{decimals}f}{' to ' if to else ', '}{high:{sign}.{decimals}f}"
    return written if to else f"[{written}]"


_MOST_DECIMALS = 9


def figure_text(value: float, interval: Interval | None, decimals: int = 3) -> str:
    """A value with its interval, if it has one, as a cell of a table: "0.830 [0.790, 0.871]"."""
    return f"{value:.{decimals}f}" + ("" if interval is None else f" {interval_text(interval, decimals)}")


@dataclass(frozen=True)
class Control:
    """What the same measurement gives where no effect is expected: a random direction, shuffled labels, ..."""

    name: str
    """What stands in the place of what was measured."""
    value: float
    """In the units of the effect."""
    interval: Interval | None = None
    """The 95 % interval of `value`; None where there is none."""
    n: int | None = None
    """Over how many draws or examples."""

    def figure(self, decimals: int = 3) -> str:
        """The value with its interval, as `Effect.figure` writes them.

        Args:
            decimals: Of the value, and at the least of the interval.
        """
        return figure_text(self.value, self.interval, decimals)

    def text(self, decimals: int = 3) -> str:
        """The control in words: "random direction 0.020 [-0.010, 0.050]".

        Args:
            decimals: Of the value, and at the least of the interval.
        """
        return f"{self.name} {self.figure(decimals)}"

    def to_json(self) -> dict[str, Any]:
        """The control as JSON; a value that is not finite is a string, so that nothing is lost."""
        return {
            "name": self.name,
            "value": _number(self.value),
            "interval": _interval(self.interval),
            "n": self.n,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Control":
        """The control that `to_json` wrote.

        Args:
            data: The mapping.
        """
        return cls(data["name"], _float(data["value"]), _interval_from(data["interval"]), data["n"])


@dataclass(frozen=True)
class Choices:
    """The six choices that a causal effect depends on (Miller, Chughtai & Saunders 2024).

    Two effects that differ in one of them are not comparable. https://arxiv.org/abs/2407.08734
    """

    granularity: str
    """What is cut, such as "node", "edge", "neuron", "latent"."""
    component: str
    """Which of them, such as "attn.z of every head"."""
    ablation: str
    """What stands in their place, such as "resample", "mean by position", "zero"."""
    positions: str
    """All of them ("all"), or the roles or tokens touched."""
    direction: str
    """What is put where, such as "denoise", "noise", "complement"."""
    evaluation: str
    """The examples, such as "48 held-out pairs of indirect object, seed 0"."""

    def to_json(self) -> dict[str, str]:
        """The choices as plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, str]) -> "Choices":
        """The choices that `to_json` wrote.

        Args:
            data: The mapping.
        """
        return cls(**data)


@dataclass(frozen=True)
class Effect:
    """A measured effect and its evidence."""

    name: str
    """What was measured."""
    value: float
    """The mean over `n` examples."""
    n: int
    """How many examples."""
    interval: Interval | None
    """The 95 % interval of `value`; None where there is none."""
    controls: tuple[Control, ...]
    """What the same measurement gives where no effect is expected."""
    ablation: str
    """What was done to the model: "mean ablation", "patch from the corrupt run", "none"."""
    units: str
    """Of the value: "nats", "logit difference", "probability"."""
    command: str | None = field(default_factory=current_command)
    """The command line that measures it again: the one that is running, else None."""
    choices: Choices | None = None
    """Where the effect is causal, what it depends on."""

    def figure(self, decimals: int = 3) -> str:
        """The value with its interval, as a cell of a table: "0.830 [0.790, 0.871]".

        Args:
            decimals: Of the value, and at the least of the interval.
        """
        return figure_text(self.value, self.interval, decimals)

    def text(self, decimals: int = 3) -> str:
        """Value, interval, units, n and controls in one line.

        Args:
            decimals: Of the values, and at the least of the intervals.

        Example:
            >>> one = Effect("lead", 0.83, 48, (0.79, 0.87), (Control("random direction", 0.02),), "none", "logits")
            >>> one.text(2)
            '0.83 [0.79, 0.87] logits, n 48; random direction 0.02'
        """
        controls = "".join(f"; {control.text(decimals)}" for control in self.controls)
        return f"{self.figure(decimals)} {self.units}".rstrip() + f", n {self.n}{controls}"

    def __str__(self) -> str:
        return f"{self.name}: {self.text()}"

    def require_controls(self) -> "Effect":
        """The effect itself; raises `MissingControls` when it stands alone."""
        if not self.controls:
            raise MissingControls(f"the effect “{self.name}” has no controls: measure at least one before showing it")
        return self

    def to_json(self) -> dict[str, Any]:
        """The effect as JSON; a value that is not finite is a string, so that nothing is lost."""
        return {
            "name": self.name,
            "value": _number(self.value),
            "n": self.n,
            "interval": _interval(self.interval),
            "controls": [control.to_json() for control in self.controls],
            "ablation": self.ablation,
            "units": self.units,
            "command": self.command,
            "choices": None if self.choices is None else self.choices.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Effect":
        """The effect that `to_json` wrote.

        Args:
            data: The mapping.
        """
        return cls(
            name=data["name"],
            value=_float(data["value"]),
            n=data["n"],
            interval=_interval_from(data["interval"]),
            controls=tuple(Control.from_json(control) for control in data["controls"]),
            ablation=data["ablation"],
            units=data["units"],
            command=data["command"],
            choices=Choices.from_json(data["choices"]) if data.get("choices") else None,
        )


def _number(value: float) -> float | str:
    return float(value) if math.isfinite(value) else str(float(value))


def _float(value: float | str) -> float:
    return float(value)


def _interval(interval: Interval | None) -> list[float | str] | None:
    return None if interval is None else [_number(end) for end in interval]


def _interval_from(ends: list[float | str] | None) -> Interval | None:
    if ends is None:
        return None
    low, high = ends
    return _float(low), _float(high)
