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
    """An interval as tables write it: "[0.79, 0.87]", or with `to` "0.79 to 0.87"; "–" where there is none.

    With as many decimals as it takes for the ends to differ, `decimals` at the least: "[0.997, 1.001]", never
    "[1.00, 1.00]". Where nothing varied, both ends are the same and it is "[all 1.00]" ("all 1.00").
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


@dataclass(frozen=True)
class Control:
    """What the same measurement gives where no effect is expected: a random direction, shuffled labels, ...

    `interval` is the 95 % interval of `value` over `n` draws or examples, None where there is none.
    """

    name: str
    value: float
    interval: Interval | None = None
    n: int | None = None

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
        """The control that `to_json` wrote."""
        return cls(data["name"], _float(data["value"]), _interval_from(data["interval"]), data["n"])


@dataclass(frozen=True)
class Choices:
    """The six choices that a causal effect depends on (Miller, Chughtai & Saunders 2024).

    Two effects that differ in one of them are not comparable.

    `granularity`: what is cut, such as "node", "edge", "neuron", "latent"; `component`: which of them, such as
    "attn.z of every head"; `ablation`: what stands in their place, such as "resample", "mean by position", "zero";
    `positions`: "all", or the roles or tokens touched; `direction`: what is put where, such as "denoise", "noise",
    "complement"; `evaluation`: the examples, such as "48 held-out pairs of indirect object, seed 0".
    """

    granularity: str
    component: str
    ablation: str
    positions: str
    direction: str
    evaluation: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, str]) -> "Choices":
        """The choices that `to_json` wrote."""
        return cls(**data)


@dataclass(frozen=True)
class Effect:
    """A measured effect and its evidence.

    `value` is in `units` (such as "nats", "logit difference", "probability"), the mean over `n` examples, with its 95 %
    `interval`; `ablation` names what was done to the model ("mean ablation", "patch from the corrupt run", "none");
    `command` is the command line that measures it again (the one that is running, else
    None); `choices` are there where the effect is causal.
    """

    name: str
    value: float
    n: int
    interval: Interval | None
    controls: tuple[Control, ...]
    ablation: str
    units: str
    command: str | None = field(default_factory=current_command)
    choices: Choices | None = None

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
        """The effect that `to_json` wrote."""
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
