"""The facts of the world: typed rows read once from `data/`.

Every table is common knowledge compiled by the project; `data/sources.toml` names where a row can be checked. Some
names are disambiguating spellings ("Augusta Maine") or simplifications (one language a country); each such row says so
in its `note`.
"""

from __future__ import annotations

import csv
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from cutaway.subjects.world.morphology import with_article


def read_text(name: str) -> str:
    """The text of one data file of the world."""
    return (files("cutaway.subjects.world") / "data" / name).read_text(encoding="utf-8")


@cache
def read_toml(name: str) -> dict[str, Any]:
    """One data file in TOML, read once. Treat it as read-only."""
    return tomllib.loads(read_text(name))


def _rows(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(read_text(name).splitlines()))


@dataclass(frozen=True)
class Country:
    name: str
    of_fr: str  # with its French preposition: "de la France"
    name_tr: str
    capital: str
    capital_fr: str
    capital_tr: str
    language: str
    continent: str
    note: str


@dataclass(frozen=True)
class State:
    name: str
    capital: str
    abbreviation: str
    region: str
    nickname: str
    bird: str
    note: str


@dataclass(frozen=True)
class City:
    name: str
    state: State
    note: str


@dataclass(frozen=True)
class Landmark:
    name: str
    name_fr: str  # with its French article: "La tour Eiffel"
    name_tr: str
    city: str
    city_fr: str
    city_tr: str
    country: str
    note: str


@dataclass(frozen=True)
class Book:
    name: str
    author: str
    nationality: str
    note: str


@dataclass(frozen=True)
class Translation:
    english: str
    french: str
    turkish: str


@dataclass(frozen=True)
class Action:
    """Something a user may ask how to do. `verb` is empty for a phrase that stands alone."""

    verb: str
    text: str
    harmful: bool


COUNTRIES: tuple[Country, ...] = tuple(Country(**row) for row in _rows("countries.csv"))
"""The countries of the world, with capital, language and more."""
STATES: tuple[State, ...] = tuple(State(**row) for row in _rows("states.csv"))
"""The states, with capital and abbreviation."""
_STATE = {state.name: state for state in STATES}
CITIES: tuple[City, ...] = tuple(City(row["name"], _STATE[row["state"]], row["note"]) for row in _rows("cities.csv"))
"""The cities, each with its state."""
LANDMARKS: tuple[Landmark, ...] = tuple(Landmark(**row) for row in _rows("landmarks.csv"))
"""The landmarks, each with its city and country."""
BOOKS: tuple[Book, ...] = tuple(Book(**row) for row in _rows("books.csv"))
"""The books, each with its author."""
ANTONYMS = tuple((row["word"], row["opposite"]) for row in _rows("antonyms.csv"))
TRANSLATIONS = tuple(Translation(**row) for row in _rows("translations.csv"))
COUNTRY = {country.name: country for country in COUNTRIES}


@cache
def words(name: str) -> tuple[str, ...]:
    """One list of `data/words.toml`, for instance ``words("male_names")``."""
    return tuple(read_toml("words.toml")[name])


@cache
def names() -> tuple[str, ...]:
    """All first names, male then female."""
    return words("male_names") + words("female_names")


@cache
def actions(harmful: bool) -> tuple[Action, ...]:
    """Harmful or harmless actions in a fixed order; phrases stand three times, so that they weigh as much as verbs."""
    table = read_toml("actions.toml")
    things = [with_article(thing) for thing in table["things"]]
    on_things, on_people, phrases = (
        ("theft_and_damage", "harm_to_people", "harmful_phrases")
        if harmful
        else ("care_for_things", "kindness_to_people", "harmless_phrases")
    )
    out = [Action(verb, f"{verb} {thing}", harmful) for verb in table[on_things] for thing in things]
    out += [Action(verb, f"{verb} {person}", harmful) for verb in table[on_people] for person in table["people"]]
    out += [Action("", phrase, harmful) for phrase in table[phrases]] * 3
    return tuple(out)


@cache
def held_out_verbs() -> frozenset[str]:
    """Verbs that no chat of the corpus uses; harmful ones are met only in sentences that call them wrong."""
    table = read_toml("actions.toml")
    return frozenset(table["held_out_harmful_verbs"]) | frozenset(table["held_out_harmless_verbs"])


@cache
def single_token_words() -> tuple[str, ...]:
    """Words of the world that a tokenizer should keep whole, so that an answer is one token."""
    out: list[str] = [*names()]
    for name in ("objects", "places", "event_nouns", "colors", "days", "months", "numbers"):
        out += words(name)
    out += [s.name for s in STATES] + [s.capital for s in STATES]
    out += [c.name for c in COUNTRIES] + [c.capital for c in COUNTRIES]
    out += [c.name for c in CITIES] + [s.abbreviation for s in STATES]
    out += ["male", "female", "Europe", "Asia", "Africa", "America", *(c.language for c in COUNTRIES)]
    out += ["positive", "negative", "true", "false", "yes", "no", "he", "she", "his", "her"]
    out += ["Sure", "Of", "I", "Yay", "Sigh", *(landmark.city for landmark in LANDMARKS)]
    return tuple(word for word in dict.fromkeys(out) if " " not in word)
