"""Control directions under the same edit that change neutral text as much as the edit itself does.

A random direction of the same norm changes almost nothing, so that it proves little. Here the strength is searched at
which a control has the same side effects.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, log

from cutaway.artifacts.errors import CutawayError
from cutaway.model.edits.edits import Edit
from cutaway.model.language_model import Inputs, LanguageModel
from cutaway.steering.directions import Direction
from cutaway.steering.side_effects import side_effects_of_each

TOLERANCE = 0.1
"""By how much a control's side effects may differ from those of the edit, as a share of them."""
_EVALUATIONS = 8

Apply = Callable[[Direction, float], list[Edit]]
"""Edits from a direction and a strength; 1 is the edit as it is meant."""


def matched_scale(cost: Callable[[float], float], target: float, start: float = 1.0) -> tuple[float, float]:
    """The scale at which `cost` is `target` within `TOLERANCE`, and the cost there; at most eight evaluations.

    Between a scale too low and one too high it interpolates on logarithmic axes, on which side effects are nearly
    straight; before both are known it goes by the slope 2 of a small edit's KL. The nearest scale tried is the answer
    where none is within the tolerance.

    Args:
        cost: From a scale to side effects, in nats per token.
        target: The side effects that are wanted.
        start: The scale that is tried first.
    """
    if not target > 0:
        raise CutawayError("the direction has no side effects at its strength, so controls cannot be matched to them")
    tried: list[tuple[float, float]] = []  # logarithms of scale and of cost over target
    scale = log(start)
    for _ in range(_EVALUATIONS):
        miss = log(max(cost(exp(scale)), 1e-12) / target)
        tried.append((scale, miss))
        if abs(exp(miss) - 1) <= TOLERANCE:
            break
        below = max((one for one in tried if one[1] < 0), default=None)
        above = min((one for one in tried if one[1] > 0), default=None)
        if below is None or above is None:
            scale -= min(max(miss / 2, -2.0), 2.0)
        else:
            stuck = len(tried) > 2 and tried[-1][1] * tried[-2][1] > 0  # twice on one side: halve, as bisection does
            part = 0.5 if stuck else below[1] / (below[1] - above[1])
            scale = below[0] + min(max(part, 0.1), 0.9) * (above[0] - below[0])
    scale, miss = min(tried, key=lambda one: abs(one[1]))
    return exp(scale), exp(miss) * target


@dataclass(frozen=True)
class MatchedControl:
    """A control at the strength at which it has the side effects of the direction it stands for.

    Attributes:
        direction: The control, with the norm of the direction.
        strength: The strength found.
        kl: Its side effects there, nats per token over all tokens.
        wanted: Those of the direction at strength 1.
    """

    direction: Direction
    strength: float
    kl: float
    wanted: float

    @property
    def met(self) -> bool:
        """Whether the side effects agree within `TOLERANCE`."""
        return abs(self.kl / self.wanted - 1) <= TOLERANCE


def matched_controls(
    lm: LanguageModel, direction: Direction, apply: Apply, controls: Sequence[Direction], neutral: Inputs
) -> list[MatchedControl]:
    """Scale control directions until they change neutral text as much as the direction does.

    Args:
        lm: The model.
        direction: The direction that steers.
        apply: From a direction and a strength to the edits, the same for all.
        controls: Directions to stand in its place (`direction.random(seed)`, `direction.along(vector)`).
        neutral: Text on which the edit should do nothing.
    """

    def cost(one: Direction, strength: float) -> float:
        return side_effects_of_each(lm, neutral, [apply(one, strength)], batch_rows=None)[0].kl_per_token

    wanted = cost(direction, 1.0)
    found = []
    for control in controls:
        strength, kl = matched_scale(lambda s, control=control: cost(control, s), wanted)
        found.append(MatchedControl(control, strength, kl, wanted))
    return found
