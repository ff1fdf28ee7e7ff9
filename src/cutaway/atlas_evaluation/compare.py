"""Which of two models is better on what neither was trained on: retrained weights ship only if they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.statistics import bootstrap_interval
from cutaway.atlas_evaluation.criterion import CAUSAL_LOSS, HEADLINE_LOSS
from cutaway.atlas_evaluation.evaluate import Evaluation


@dataclass(frozen=True)
class Comparison:
    """Candidate minus other: mean difference over sets of items, and each headline and causal check of both.

    `held_out` is over held-out, new-wording and outside sets, `all_sets` over all; the intervals are over
    sets. `rows` are the held-out ones, `headlines` and `causal` (candidate, other). New weights are `better` when both
    intervals lie above zero, no headline falls by more than `HEADLINE_LOSS` and no causal check by more than
    `CAUSAL_LOSS`.
    """

    held_out: float
    interval: tuple[float, float]
    all_sets: float
    all_interval: tuple[float, float]
    n_sets: int
    causal: dict[str, tuple[float, float]]
    rows: dict[str, tuple[float, float]]
    headlines: dict[str, tuple[float, float]]

    @property
    def fallen(self) -> list[str]:
        """Headlines and causal checks that fell by more than they may."""
        lost = [name for name, (mine, theirs) in self.headlines.items() if mine < theirs - HEADLINE_LOSS]
        return lost + [name for name, (mine, theirs) in self.causal.items() if mine < theirs - CAUSAL_LOSS]

    @property
    def better(self) -> bool:
        return self.interval[0] > 0 and self.all_interval[0] > 0 and bool(self.causal) and not self.fallen


def compare(candidate: Evaluation, other: Evaluation, headlines: Sequence[str] = ()) -> Comparison:
    """Judge weights against others on the same items; `headlines` are names of sets that may not fall.

    Raises `CutawayError` when the evaluations differ in world, seed or n.
    """
    for key in ("world", "seed", "n"):
        if getattr(candidate, key) != getattr(other, key):
            raise CutawayError(f"the two evaluations differ in {key}: run both again with the same")
    both = {
        name: (candidate.sets[name].effect.value, other.sets[name].effect.value)
        for name in candidate.sets
        if name in other.sets
    }
    untrained_on = ("held_out", "new_wording", "outside")
    rows = {name: pair for name, pair in both.items() if any(mark in name for mark in untrained_on)}
    causal = {}
    if candidate.bridge and other.bridge and candidate.refusal and other.refusal:
        mine, theirs = _causal_figures(candidate), _causal_figures(other)
        causal = {name: (mine[name], theirs[name]) for name in mine}
    held_out, everything = _differences(rows), _differences(both)
    return Comparison(
        float(held_out.mean()),
        bootstrap_interval(held_out),
        float(everything.mean()),
        bootstrap_interval(everything),
        len(both),
        causal,
        rows,
        {name: both[name] for name in headlines if name in both},
    )


def _differences(pairs: dict[str, tuple[float, float]]) -> np.ndarray:
    return np.array([mine - theirs for mine, theirs in pairs.values()])


def _causal_figures(found: Evaluation) -> dict[str, float]:
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
