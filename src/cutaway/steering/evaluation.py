"""Does steering work? Reply rates on held-out prompts, beside unsteered replies and random directions; side effects."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cutaway.artifacts.results import Control, Effect, interval_text
from cutaway.artifacts.statistics import wilson_interval
from cutaway.model.edits.edits import Edit
from cutaway.model.language_model import LanguageModel
from cutaway.model.tokens import Tokens
from cutaway.steering.directions import Direction
from cutaway.steering.replies import Judge, refusal
from cutaway.steering.side_effects import SideEffects, side_effects_of_each


@dataclass(frozen=True)
class Replies:
    """Replies to n prompts, judged: `counts[label]`, and the texts in the prompts' order."""

    counts: Mapping[str, int]
    texts: tuple[str, ...]
    labels: tuple[str, ...]

    @property
    def n(self) -> int:
        return len(self.labels)

    def rate(self, label: str) -> float:
        """Share of replies judged so."""
        return self.counts.get(label, 0) / self.n

    def interval(self, label: str) -> tuple[float, float]:
        """95 % Wilson interval of the rate."""
        return wilson_interval(self.counts.get(label, 0), self.n)

    def to_json(self) -> dict[str, Any]:
        return {"n": self.n, "counts": dict(self.counts), "texts": list(self.texts), "labels": list(self.labels)}


def judged(
    lm: LanguageModel,
    prompts: Tokens,
    edits: Sequence[Edit] = (),
    judge: Judge = refusal,
    *,
    max_new_tokens: int = 16,
    batch_rows: int = 64,
) -> Replies:
    """Generate greedy replies under edits and judge them."""
    texts: list[str] = []
    for first in range(0, len(prompts.ids), batch_rows):
        part = prompts[list(range(first, min(first + batch_rows, len(prompts.ids))))]
        texts += lm.generate(part, max_new_tokens=max_new_tokens, edits=edits).texts
    labels = tuple(judge(text) for text in texts)
    return Replies({label: labels.count(label) for label in sorted(set(labels))}, tuple(texts), labels)


@dataclass(frozen=True)
class SteeringResult:
    """One way of steering on n held-out prompts: replies steered, unsteered, and under random directions.

    `random` has one `Replies` a seed. `side_effects` and `random_side_effects` are on neutral text (None
    without any).
    `effects[label]` is the rate of a label with its Wilson interval, beside the unsteered and the random rate.
    """

    method: str
    direction: Direction
    steered: Replies
    unsteered: Replies
    random: tuple[Replies, ...]
    side_effects: SideEffects | None
    random_side_effects: tuple[SideEffects, ...]
    effects: Mapping[str, Effect]

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "direction": self.direction.to_json(),
            "steered": self.steered.to_json(),
            "unsteered": self.unsteered.to_json(),
            "random": [replies.to_json() for replies in self.random],
            "side_effects": None if self.side_effects is None else self.side_effects.to_json(),
            "random_side_effects": [p.to_json() for p in self.random_side_effects],
            "effects": {label: effect.to_json() for label, effect in self.effects.items()},
        }

    def __str__(self) -> str:
        lines = [f"{self.method}, {self.direction}"]
        for label, effect in self.effects.items():
            controls = ", ".join(f"{c.name} {c.value:.2f}" for c in effect.controls)
            lines.append(
                f"  {label}: {effect.value:.2f} {interval_text(effect.interval, 2)} of {effect.n} ({controls})"
            )
        if self.side_effects is not None:
            kl = sum(p.kl for p in self.random_side_effects) / max(1, len(self.random_side_effects))
            lines.append(f"  side effects on neutral text: {self.side_effects}; random directions {kl:.3f}")
        return "\n".join(lines)


def evaluate_steering(
    lm: LanguageModel,
    prompts: Any,
    direction: Direction,
    apply: Callable[[Direction], Sequence[Edit]],
    *,
    method: str,
    judge: Judge = refusal,
    labels: Sequence[str] = ("refused", "answered"),
    neutral: Any = None,
    seeds: Sequence[int] = (0, 1, 2),
    max_new_tokens: int = 16,
    unsteered: Replies | None = None,
    command: str | None = None,
) -> SteeringResult:
    """Steer held-out prompts with `apply(direction)`, and with random directions of the same norm in its place.

    `neutral` is text (or token rows) on which the edit should do nothing: side effects are measured there.
    Pass `unsteered` to use replies that were generated before. Rates have Wilson intervals; the random directions' replies are pooled,
    so their interval does not know that one direction's replies resemble each other.
    """
    tokens = lm.tokens(prompts)
    plain = judged(lm, tokens, (), judge, max_new_tokens=max_new_tokens) if unsteered is None else unsteered
    steered = judged(lm, tokens, apply(direction), judge, max_new_tokens=max_new_tokens)
    drawn = [direction.random(seed) for seed in seeds]
    random = tuple(judged(lm, tokens, apply(other), judge, max_new_tokens=max_new_tokens) for other in drawn)
    costs = [] if neutral is None else side_effects_of_each(lm, neutral, [apply(each) for each in (direction, *drawn)])
    effects = {}
    for label in labels:
        pooled, total = sum(replies.counts.get(label, 0) for replies in random), sum(replies.n for replies in random)
        effects[label] = Effect(
            name=f"{method}: {label}",
            value=steered.rate(label),
            n=steered.n,
            interval=steered.interval(label),
            controls=(
                Control("unsteered", plain.rate(label), plain.interval(label), plain.n),
                Control(
                    f"{len(seeds)} random directions of the same norm",
                    pooled / max(1, total),
                    wilson_interval(pooled, total),
                    total,
                ),
            ),
            ablation=method,
            units="share of replies",
            command=command,
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
