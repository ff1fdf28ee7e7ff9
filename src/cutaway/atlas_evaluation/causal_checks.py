"""What atlas does inside on the way from a city to the capital of its state: patched and read, layer by layer.

Every rate stands beside a control: the same patch, or the same reading, at a random other position.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import torch

import cutaway.model.edits.edits as edit
from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.statistics import wilson_interval
from cutaway.atlas_evaluation.scoring import ids_of
from cutaway.subjects.world.facts import CITIES
from cutaway.subjects.world.held_out import two_hop_entity

if TYPE_CHECKING:
    from torch import Tensor

    from cutaway.model.forward.run import Run
    from cutaway.model.language_model import LanguageModel

TWO_HOP = "The capital of the state containing {city} is"
NEUTRAL_SOURCE = "The abbreviation of the state containing {city} is"


@dataclass(frozen=True)
class Rate:
    """`successes` of `n`."""

    successes: int
    n: int

    @property
    def value(self) -> float:
        return self.successes / self.n if self.n else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval (Wilson)."""
        return wilson_interval(self.successes, self.n)


def rate(outcomes: Sequence[bool] | np.ndarray) -> Rate:
    """How many of the outcomes are true."""
    return Rate(int(np.sum(outcomes)), len(outcomes))


@dataclass(frozen=True)
class BridgePool:
    """One pool of cities ("seen" in two-hop sentences or "held out" of them); lists are by layer.

    `flips_at_*`: share of pairs whose answer becomes the source city's capital when resid_post is patched there;
    `flips_from_abbreviation`: the same at the last position, from a prompt that asks for the state's abbreviation: what
    is carried over is the state, not the answer. `state_readable`: the state is the top state by logit lens at the last
    position; `capital_readable`: the capital is the top token there. `already_right`: answers before any patch.
    """

    pool: str
    already_right: Rate
    flips_at_city: list[Rate]
    flips_at_last: list[Rate]
    flips_at_random: list[Rate]
    flips_from_abbreviation: list[Rate]
    state_readable: list[Rate]
    state_readable_at_random: list[Rate]
    capital_readable: list[Rate]


@dataclass(frozen=True)
class _City:
    name: str
    state: str
    capital: str


def _cities(lm: "LanguageModel", held_out: bool) -> list[_City]:
    """Cities whose name and state are one token each, so that they have one position."""
    return [
        _City(city.name, city.state.name, city.state.capital)
        for city in CITIES
        if two_hop_entity(city.name) == held_out
        and city.name not in (city.state.name, city.state.capital)
        and _is_whole(lm, city.name)
        and _is_whole(lm, city.state.name)
    ]


def two_hop_bridge(lm: "LanguageModel", *, held_out: bool, n: int = 100, seed: int = 5) -> BridgePool:
    """Patch and read the two-hop prompt layer by layer over `n` random pairs of cities of one pool."""
    rng = Random(seed)
    cities = _cities(lm, held_out)
    if len({city.capital for city in cities}) < 2:
        raise CutawayError("the model's tokenizer splits the cities of the world: the two-hop check needs whole ones")
    pairs: list[tuple[_City, _City]] = []
    while len(pairs) < n:
        to, source = rng.sample(cities, 2)
        if first_token(lm, to.capital) != first_token(lm, source.capital):
            pairs.append((to, source))
    clean = lm.tokens([TWO_HOP.format(city=to.name) for to, _ in pairs])
    city = clean.find(0, pairs[0][0].name)
    last = int(clean.lengths[0]) - 1
    before = lm.run(clean, capture="blocks.*.resid_post", logits="last")
    source = lm.run([TWO_HOP.format(city=other.name) for _, other in pairs], capture="blocks.*.resid_post", logits=None)
    neutral = lm.run(
        [NEUTRAL_SOURCE.format(city=other.name) for _, other in pairs], capture="blocks.*.resid_post", logits=None
    )
    wanted = torch.tensor([first_token(lm, other.capital) for _, other in pairs])
    own = torch.tensor([first_token(lm, to.capital) for to, _ in pairs])
    elsewhere = [rng.choice([p for p in range(1, last) if p != city]) for _ in pairs]

    def flips(layer: int, run: "Run", positions: "int | list[list[int]]", source_positions: int | None = None) -> Rate:
        patch = edit.patch(f"blocks.{layer}.resid_post", run, positions=positions, source_positions=source_positions)
        answers = _top(lm.run(clean, edits=[patch], logits="last"))
        return rate((answers == wanted).numpy())

    states = sorted({city.state for city in _cities(lm, False) + _cities(lm, True)})
    state_ids = torch.tensor([first_token(lm, state) for state in states])
    right_state = torch.tensor([states.index(to.state) for to, _ in pairs])
    rows = torch.arange(len(pairs))
    readable, at_random, capitals = [], [], []
    for layer in range(lm.n_layers):
        stream = before[f"blocks.{layer}.resid_post"]
        logits = lm.unembed(stream[:, last]).cpu()
        readable.append(rate((logits[:, state_ids].argmax(-1) == right_state).numpy()))
        capitals.append(rate((logits.argmax(-1) == own).numpy()))
        other = lm.unembed(stream[rows, torch.tensor(elsewhere)]).cpu()
        at_random.append(rate((other[:, state_ids].argmax(-1) == right_state).numpy()))
    layers = range(lm.n_layers)
    return BridgePool(
        pool="held out" if held_out else "seen",
        already_right=rate((_top(before) == own).numpy()),
        flips_at_city=[flips(layer, source, city) for layer in layers],
        flips_at_last=[flips(layer, source, last) for layer in layers],
        flips_at_random=[flips(layer, source, [[p] for p in elsewhere]) for layer in layers],
        flips_from_abbreviation=[flips(layer, neutral, -1, -1) for layer in layers],
        state_readable=readable,
        state_readable_at_random=at_random,
        capital_readable=capitals,
    )


def first_token(lm: "LanguageModel", word: str) -> int:
    """The first token of a word after a space."""
    alone, followed = ids_of(lm, ["x", f"x {word}"])
    return followed[len(alone)]


def _is_whole(lm: "LanguageModel", word: str) -> bool:
    """Whether a word after a space is one token."""
    alone, followed = ids_of(lm, ["x", f"x {word}"])
    return len(followed) == len(alone) + 1


def _top(run: "Run") -> "Tensor":
    return run.last_logits.argmax(-1).cpu()
