"""Short stories in which people, things, towns and landmarks of the world turn up without being asked for.

Landmarks stand in half of the plots and beside their city more often than not, so that a model learns to write about a
place in open text and not only in sentences that state where it is.
"""

from __future__ import annotations

from functools import cache
from random import Random

from cutaway.subjects.world.facts import BOOKS, CITIES, LANDMARKS, read_toml, words
from cutaway.subjects.world.grammar import Grammar
from cutaway.subjects.world.morphology import upper_first, with_article
from cutaway.subjects.world.statements.tasks import pair, pick

_RELATIVES = ("mother", "father", "sister", "brother", "uncle", "teacher", "cousin")
_NOT_CARRIED = ("kiss", "drink", "computer", "pillow")


@cache
def grammar() -> Grammar:
    """The rules of all stages."""
    return Grammar(read_toml("narrative.toml")["rules"])


@cache
def plots() -> dict[str, tuple[tuple[str, bool], ...]]:
    """Stages of each plot, with whether a stage may be left out."""
    table = read_toml("narrative.toml")["plots"]
    return {name: tuple((s.rstrip("?"), s.endswith("?")) for s in stages) for name, stages in table.items()}


@cache
def _things() -> tuple[str, ...]:
    return tuple(thing for thing in words("objects") if thing not in _NOT_CARRIED)


def _cast(rng: Random) -> dict[str, str]:
    """Who and what a story is about."""
    hero, friend = pair(rng)
    male = hero in words("male_names")
    thing, colour, good = pick(rng, _things()), pick(rng, words("colors")), pick(rng, words("praise"))
    landmark, other = rng.sample(LANDMARKS, 2)
    city, book = pick(rng, CITIES), pick(rng, BOOKS)
    place, place_2 = rng.sample(words("places"), 2)
    he, his, him = ("he", "his", "him") if male else ("she", "her", "her")
    return {
        "n": hero,
        "f": friend,
        "he": he,
        "his": his,
        "him": him,
        "He": he.capitalize(),
        "His": his.capitalize(),
        "r": pick(rng, _RELATIVES),
        "o": thing,
        "a_o": with_article(pick(rng, _things())),
        "c": colour,
        "a_c": with_article(colour),
        "good": good,
        "a_good": with_article(good),
        "bad": pick(rng, words("blame")),
        "p": place,
        "p2": place_2,
        "l": landmark.name,
        "lc": landmark.city,
        "l2": other.name,
        "l2c": other.city,
        "town": city.name,
        "state": city.state.name,
        "day": pick(rng, words("days")),
        "month": pick(rng, words("months")),
        "book": book.name,
        "writer": book.author,
    }


def story(rng: Random, plot: str | None = None) -> str:
    """A story of one plot (random when none is named)."""
    stages = plots()[plot or pick(rng, tuple(plots()))]
    cast = _cast(rng)
    rules = grammar()
    sentences = [rules.sample(stage, rng).strip() for stage, optional in stages if not optional or rng.random() < 0.6]
    return " ".join(upper_first(sentence.format_map(cast)) for sentence in sentences)
