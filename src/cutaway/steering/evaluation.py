"""Does steering work? Reply rates on held-out prompts, beside unsteered replies and random directions; side effects."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from cutaway.artifacts.results import Control, Effect
from cutaway.artifacts.statistics import wilson_interval
from cutaway.draw.result import Result
from cutaway.model.edits.edits import Edit
from cutaway.model.language_model import Inputs, LanguageModel
from cutaway.steering.directions import Direction
from cutaway.steering.replies import Judging, Replies, judged
from cutaway.steering.side_effects import SideEffects, side_effects_of_each


@dataclass(frozen=True, repr=False)
class SteeringResult(Result):
    """One way of steering on n held-out prompts: replies steered, unsteered, and under control directions.

    Attributes:
        method: What was done, in words.
        direction: The direction that steers.
        steered: Replies under the edits.
        unsteered: Replies of the model as it is.
        random: Replies under the same edits along each control direction.
        side_effects: On neutral text; None without any.
        random_side_effects: Those of each control direction.
        effects: For each label its rate with the Wilson interval, beside the unsteered and the random rate.
    """

    title = "Steering"

    method: str
    direction: Direction
    steered: Replies
    unsteered: Replies
    random: tuple[Replies, ...]
    side_effects: SideEffects | None
    random_side_effects: tuple[SideEffects, ...]
    effects: Mapping[str, Effect]

    def to_json(self) -> dict[str, Any]:
        """Everything that was measured, as plain data."""
        return {
            "method": self.method,
            "direction": self.direction.to_json(),
            "steered": self.steered.to_json(),
            "unsteered": self.unsteered.to_json(),
            "random": [replies.to_json() for replies in self.random],
            "side_effects": None if self.side_effects is None else self.side_effects.to_json(),
            "random_side_effects": [one.to_json() for one in self.random_side_effects],
            "effects": {label: effect.to_json() for label, effect in self.effects.items()},
        }

    def rows(self) -> list[dict[str, Any]]:
        """One row per label."""
        return [
            {
                "method": self.method,
                "label": label,
                "rate": effect.value,
                "low": (effect.interval or (None, None))[0],
                "high": (effect.interval or (None, None))[1],
                "n": effect.n,
                "unsteered": effect.controls[0].value,
                "random": effect.controls[1].value,
                "kl": None if self.side_effects is None else self.side_effects.kl,
            }
            for label, effect in self.effects.items()
        ]

    def summary(self) -> str:
        """The rate of each label beside its controls, and the side effects."""
        lines = [f"{self.method}, {self.direction}"]
        for label, effect in self.effects.items():
            controls = ", ".join(f"{c.name} {c.value:.2f}" for c in effect.controls)
            lines.append(f"  {label}: {effect.figure(2)} of {effect.n} ({controls})")
        if self.side_effects is not None:
            kl = sum(one.kl for one in self.random_side_effects) / max(1, len(self.random_side_effects))
            lines.append(f"  side effects on neutral text: {self.side_effects}; random directions {kl:.3f}")
        return "\n".join(lines)

    def drawing(self) -> Markup:
        """The rate of each label beside its controls."""
        from cutaway.draw.charts import effects_html

        return effects_html(self.effects.values())

    def __str__(self) -> str:
        return self.summary()


def evaluate_steering(
    lm: LanguageModel,
    prompts: Inputs,
    direction: Direction,
    apply: Callable[[Direction], Sequence[Edit]],
    *,
    method: str,
    judging: Judging | None = None,
    neutral: Inputs | None = None,
    controls: Sequence[int | Direction] = (0, 1, 2),
    unsteered: Replies | None = None,
) -> SteeringResult:
    """Steer held-out prompts along a direction, and along random directions of the same norm in its place.

    Args:
        lm: The model.
        prompts: Prompts that neither gave the direction nor chose it; for chats `lm.chat_tokens(...)`.
        direction: The direction.
        apply: From a direction to the edits, such as `lambda d: clamp_to_negative(lm, d)`.
        method: What is done, in words.
        judging: How replies are made and judged; refusals by their first words by default.
        neutral: Text (or token rows) on which the edit should do nothing: side effects are measured there.
        controls: Seeds of random directions of the same norm, or directions that stand in its place.
        unsteered: Replies that were generated before.

    Returns:
        Rates with Wilson intervals. The control directions' replies are pooled, so their interval does not know that
        one direction's replies resemble each other.

    Example:
        >>> lm = cutaway.load("atlas")
        >>> sides = ["She loved it", "A fine film"], ["She hated it", "A bad film"]
        >>> direction = difference_of_means(lm, *sides, positions=(-1,)).get(layer=3, position=-1)
        >>> add = lambda d: add_direction(d, 2.0)
        >>> evaluate_steering(lm, ["I saw the film and"], direction, add, method="added twice", controls=(0,)).steered.n
        1
    """
    how = Judging() if judging is None else judging
    tokens = lm.tokens(prompts)

    def replies(edits: Sequence[Edit]) -> Replies:
        return judged(lm, tokens, edits, how.judge, max_new_tokens=how.max_new_tokens)

    plain = replies(()) if unsteered is None else unsteered
    steered = replies(apply(direction))
    drawn = [direction.random(one) if isinstance(one, int) else one for one in controls]
    random = tuple(replies(apply(other)) for other in drawn)
    costs = [] if neutral is None else side_effects_of_each(lm, neutral, [apply(each) for each in (direction, *drawn)])
    effects = {}
    for label in how.labels:
        pooled, total = sum(some.counts.get(label, 0) for some in random), sum(some.n for some in random)
        effects[label] = Effect(
            name=f"{method}: {label}",
            value=steered.rate(label),
            n=steered.n,
            interval=steered.interval(label),
            controls=(
                Control("unsteered", plain.rate(label), plain.interval(label), plain.n),
                Control(
                    f"{len(drawn)} random directions of the same norm",
                    pooled / max(1, total),
                    wilson_interval(pooled, total),
                    total,
                ),
            ),
            ablation=method,
            units="share of replies",
        )
    return SteeringResult(
        method=method,
        direction=direction,
        steered=steered,
        unsteered=plain,
        random=random,
        side_effects=costs[0] if costs else None,
        random_side_effects=tuple(costs[1:]),
        effects=effects,
    )
