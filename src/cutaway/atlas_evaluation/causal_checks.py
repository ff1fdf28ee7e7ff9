"""What atlas does inside on the way from a city to the capital of its state: patched and read, layer by layer.

Every rate stands beside a control: the same patch, or the same reading, at a random other position.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import torch

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.statistics import wilson_interval
from cutaway.atlas_evaluation.scoring import ids_of
from cutaway.causal.patching.patch import PatchOptions, patch_grid
from cutaway.data.pairs import PromptPair, aligned
from cutaway.observe.lens.logit_lens import LogitLens, logit_lens
from cutaway.subjects.world.facts import CITIES
from cutaway.subjects.world.held_out import two_hop_entity

if TYPE_CHECKING:
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
    """Patch and read the two-hop prompt layer by layer over `n` random pairs of cities of one pool.

    In a pair the clean prompt is the source's: its activations are put into the prompt about the other city.
    """
    rng = Random(seed)
    cities = _cities(lm, held_out)
    if len({city.capital for city in cities}) < 2:
        raise CutawayError("the model's tokenizer splits the cities of the world: the two-hop check needs whole ones")
    chosen: list[tuple[_City, _City]] = []
    while len(chosen) < n:
        to, source = rng.sample(cities, 2)
        if first_token(lm, to.capital) != first_token(lm, source.capital):
            chosen.append((to, source))
    prompts = lm.tokens([TWO_HOP.format(city=to.name) for to, _ in chosen])
    city = prompts.find(0, chosen[0][0].name)
    last = int(prompts.lengths[0]) - 1
    elsewhere = [rng.choice([p for p in range(1, last) if p != city]) for _ in chosen]

    def flips(template: str, *roles: str) -> list[list[Rate]]:
        """By role and layer: how often the answer becomes the source city's capital."""
        pairs = [
            PromptPair(
                template.format(city=source.name),
                TWO_HOP.format(city=to.name),
                f" {source.capital}",
                f" {to.capital}",
                {"city": city, "elsewhere": place},
            )
            for (to, source), place in zip(chosen, elsewhere, strict=True)
        ]
        # forced: the prompt that asks for the abbreviation is no prompt that the capital answers
        options = PatchOptions(draws=1, force=True)
        found = patch_grid(lm, aligned(lm, pairs, strict=True), roles=roles, options=options).flips
        return [[rate(layer[column].numpy()) for layer in found] for column in range(len(roles))]

    states = sorted({city.state for city in _cities(lm, False) + _cities(lm, True)})
    right_state = torch.tensor([states.index(to.state) for to, _ in chosen])
    own = torch.tensor([first_token(lm, to.capital) for to, _ in chosen])
    follow = [first_token(lm, state) for state in states]
    lens = logit_lens(lm, prompts, k=1, positions=-1, follow=follow)
    # attention looks back alone: a prompt cut off after a position shows what that position holds
    cut = [prompts.row_ids(row)[: place + 1] for row, place in enumerate(elsewhere)]
    lens_elsewhere = logit_lens(lm, cut, k=1, positions=-1, follow=follow)
    capital_is_top = lens.top_ids[1:, :, 0, 0] == own  # [layers, n]; not the embedding

    def state_is_top(of: LogitLens) -> list[Rate]:
        return [rate((layer[:, 0].argmax(-1) == right_state).numpy()) for layer in of.followed_probability[1:]]

    at_city, at_last, at_random = flips(TWO_HOP, "city", "last", "elsewhere")
    (from_abbreviation,) = flips(NEUTRAL_SOURCE, "last")
    return BridgePool(
        pool="held out" if held_out else "seen",
        already_right=rate(capital_is_top[-1].numpy()),
        flips_at_city=at_city,
        flips_at_last=at_last,
        flips_at_random=at_random,
        flips_from_abbreviation=from_abbreviation,
        state_readable=state_is_top(lens),
        state_readable_at_random=state_is_top(lens_elsewhere),
        capital_readable=[rate(layer.numpy()) for layer in capital_is_top],
    )


def first_token(lm: "LanguageModel", word: str) -> int:
    """The first token of a word after a space."""
    alone, followed = ids_of(lm, ["x", f"x {word}"])
    return followed[len(alone)]


def _is_whole(lm: "LanguageModel", word: str) -> bool:
    """Whether a word after a space is one token."""
    alone, followed = ids_of(lm, ["x", f"x {word}"])
    return len(followed) == len(alone) + 1
