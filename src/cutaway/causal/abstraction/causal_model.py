"""A causal model said as plain functions, and prompts that it speaks about (Geiger et al. 2021)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cutaway.artifacts.errors import CutawayError


@dataclass(frozen=True)
class Variable:
    """A variable of a causal model: a function of its parents (inputs, or variables named before it)."""

    parents: tuple[str, ...]
    """Inputs, or variables named before it."""
    function: Callable[..., Any]
    """Its value from those of its parents, in their order."""


@dataclass(frozen=True)
class CausalModel:
    """A causal model said as plain functions.

    Raises `CutawayError` for a parent that is neither an input nor a variable before it.
    """

    inputs: tuple[str, ...]
    """Names of the inputs."""
    variables: Mapping[str, Variable]
    """Each variable by name, after its parents."""
    answer: str
    """The variable whose value is the text that the prompt goes on with."""

    def __post_init__(self) -> None:
        known = [*self.inputs]
        for name, variable in self.variables.items():
            for parent in variable.parents:
                if parent not in known:
                    raise CutawayError(
                        f"the variable {name!r} depends on {parent!r}, which is no input and no variable before it"
                    )
            known.append(name)
        if self.answer not in self.variables:
            raise CutawayError(f"the answer {self.answer!r} is no variable of the causal model")

    def run(self, inputs: Mapping[str, Any], setting: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The value of every input and variable; those in `setting` are what it says, whatever their parents are.

        Args:
            inputs: The value of every input.
            setting: Variables that are set to a value, whatever their parents are.
        """
        values = dict(inputs)
        for name in self.inputs:
            if name not in values:
                raise CutawayError(f"the causal model needs the input {name!r}; the example has {', '.join(inputs)}")
        for name, variable in self.variables.items():
            if setting is not None and name in setting:
                values[name] = setting[name]
            else:
                values[name] = variable.function(*(values[parent] for parent in variable.parents))
        return values


@dataclass(frozen=True)
class Example:
    """A prompt, the causal model's inputs for it, and where things stand in it."""

    prompt: str
    """The text that the model reads."""
    inputs: Mapping[str, Any]
    """The causal model's inputs for it."""
    positions: Mapping[str, int | str] = field(default_factory=dict)
    """Where things stand in it, by name: a position (0 is the first real token, -1 the last) or a text (its last token,
    at its last occurrence). "last" is always there."""


Swap = tuple[Example, Example]
"""A base and a source."""
