"""Which of two models is better on what neither was trained on: retrained weights ship only if they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.statistics import bootstrap_interval
from cutaway.subjects.atlas.evaluate import Evaluation


@dataclass(frozen=True)
class Comparison:
    """Candidate minus other: mean difference over held-out and new-wording sets, and over the causal checks.

    `interval` is a bootstrap over sets; `better` needs it above zero, and causal checks without a loss.
    """

    held_out: float
    interval: tuple[float, float]
    causal: dict[str, tuple[float, float]]
    rows: dict[str, tuple[float, float]]

    @property
    def better(self) -> bool:
        unharmed = all(candidate >= other for candidate, other in self.causal.values())
        return self.interval[0] > 0 and bool(self.causal) and unharmed


def compare(candidate: Evaluation, other: Evaluation) -> Comparison:
    """Judge retrained weights against others on what neither was trained on. Both need the same items.

    Raises `CutawayError` when the evaluations differ in world, seed or n.
    """
    for key in ("world", "seed", "n"):
        if getattr(candidate, key) != getattr(other, key):
            raise CutawayError(f"the two evaluations differ in {key}: run both again with the same")
    rows = {
        name: (candidate.sets[name].effect.value, other.sets[name].effect.value)
        for name in candidate.sets
        if name in other.sets and any(mark in name for mark in ("held_out", "new_wording", "outside"))
    }
    differences = np.array([mine - theirs for mine, theirs in rows.values()])
    causal = {}
    if candidate.bridge and other.bridge and candidate.refusal and other.refusal:
        mine, theirs = causal_figures(candidate), causal_figures(other)
        causal = {name: (mine[name], theirs[name]) for name in mine}
    return Comparison(float(differences.mean()), bootstrap_interval(differences), causal, rows)


def causal_figures(found: Evaluation) -> dict[str, float]:
    """The causal checks in one number each: the best layer's rate, over that of the control."""
    assert found.refusal is not None
    held_out = found.bridge[-1]

    def best(rates: Sequence[Any], control: Sequence[Any]) -> float:
        return max(rate.value - other.value for rate, other in zip(rates, control, strict=True))

    out = {
        "bridge: state readable at the last position": best(held_out.state_readable, held_out.state_readable_at_random),
        "bridge: carried over from an abbreviation prompt": best(
            held_out.flips_from_abbreviation, held_out.flips_at_random
        ),
    }
    for way in found.refusal.interventions:
        out[f"refusal: {way.name}"] = getattr(way.result, way.wanted).value - getattr(way.random, way.wanted).value
    return out
