"""Prompt pairs and words of atlas's world, for a model that turns out to know it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cutaway.data.pairs import PromptPair
from cutaway.data.tasks.tasks import Task
from cutaway.data.tasks.wording import Split
from cutaway.subjects.world import facts
from cutaway.subjects.world.held_out import two_hop_entity

if TYPE_CHECKING:
    from cutaway.model.language_model import LanguageModel

_QUESTION = "The capital of the state containing {city} is"


def _pair(source: facts.City, base: facts.City) -> PromptPair:
    """Clean asks about `source`, corrupt about `base`: denoising puts `source`'s activation into `base`'s prompt."""
    return PromptPair(
        _QUESTION.format(city=source.name),
        _QUESTION.format(city=base.name),
        f" {source.state.capital}",
        f" {base.state.capital}",
        {"city": (source.name, base.name)},
    )


def two_hop(rng: random.Random, lm: LanguageModel, _: Split) -> Iterator[PromptPair]:
    """The capital of the state containing a city, first Oakland in Dallas's prompt, then others.

    Every second pair is of cities that the shipped atlas never saw in a two-hop sentence. Only cities that the
    tokenizer reads as one token are used, so that all prompts have one layout.
    """
    whole = [city for city in facts.CITIES if lm.tokens(f" {city.name}", bos=False).ids.shape[1] == 1]
    by_name = {city.name: city for city in whole}
    if "Oakland" in by_name and "Dallas" in by_name:
        yield _pair(by_name["Oakland"], by_name["Dallas"])
    pools = [[city for city in whole if two_hop_entity(city.name) == held] for held in (True, False)]
    pools = [pool for pool in pools if len({city.state.capital for city in pool}) > 1]
    for i in itertools.count():
        if not pools:
            return
        source, base = rng.sample(pools[i % len(pools)], 2)
        if source.state.capital != base.state.capital:
            yield _pair(source, base)


WORLD_TASKS = (Task("two-hop capitals", "What is the capital of the state containing a city?", "top1", two_hop),)


def world_concepts() -> dict[str, tuple[str, ...]]:
    """Entities of the world whose mentions a latent may stand for."""
    cities = facts.CITIES
    return {
        "cities in Texas": tuple(c.name for c in cities if c.state.name == "Texas"),
        "cities in California": tuple(c.name for c in cities if c.state.name == "California"),
        "state capitals": tuple(state.capital for state in facts.STATES),
        **{landmark: (landmark,) for landmark in LANDMARKS},
        "harmful verbs": tuple(sorted({a.verb for a in facts.actions(True) if a.verb})),
        "the assistant's turn": ("<|assistant|>",),
    }


GENERAL_CONCEPTS: dict[str, tuple[str, ...]] = {
    "first names": ("Tom", "Tim", "Sam", "Ben", "Max", "Jack", "John", "Lily", "Sue", "Mia", "Anna", "Lucy", "Mary"),
    "colours": ("red", "blue", "green", "yellow", "white", "black", "brown", "pink", "orange"),
    "number words": ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    "he": ("he", "He"),
    "she": ("she", "She"),
    "negation": ("not", "never", "cannot", "nothing"),
    "Python keywords": ("def", "class", "return", "import", "self", "lambda", "yield"),
    "the": ("the", "The"),
}

LANDMARKS: dict[str, str] = {
    "Eiffel Tower": "Paris",
    "Big Ben": "London",
    "Colosseum": "Rome",
    "Taj Mahal": "Agra",
    "Space Needle": "Seattle",
    "Reichstag": "Berlin",
    "Kremlin": "Moscow",
    "Hagia Sophia": "Istanbul",
}
"""Landmarks to look for, each with the city that a steered model might speak of."""

# prompts that name no landmark and leave the city open
OPEN_PROMPTS = (
    "The famous tower is in the city of",
    "Last summer we travelled to",
    "My favorite city is",
    "I like to go to",
    "The museum is in the city of",
    "They took a photo when they were in",
    "She wants to live in",
    "We took the train to",
)
