"""One-hop and two-hop facts as sentences: who relates to what, in which wording, in which language.

A `Relation` joins rows (subject, answer) with frames. Frames come in three lots: the study's (`data/study_wording.toml`
and `study` lists), the grown ones (grammars of `data/wording.toml`), and the one frame a relation may hold out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from random import Random
from typing import NamedTuple

from cutaway.subjects.world import held_out
from cutaway.subjects.world.facts import (
    ANTONYMS,
    BOOKS,
    CITIES,
    COUNTRIES,
    COUNTRY,
    LANDMARKS,
    STATES,
    TRANSLATIONS,
    read_toml,
)
from cutaway.subjects.world.grammar import Grammar
from cutaway.subjects.world.morphology import french_inside, french_name, turkish_genitive, turkish_is, upper_first

LANGUAGES = ("en", "fr", "tr")
_CONTINENTS = {
    "Europe": ("Europe", "Avrupa"),
    "Asia": ("Asie", "Asya"),
    "Africa": ("Afrique", "Afrika"),
    "America": ("Amérique", "Amerika"),
}
# Relations whose last study frame was held out, and whose facts some entities never tell in French or Turkish.
_ONE_HOP = (
    "capital",
    "landmark",
    "city",
    "state_capital",
    "state_abbreviation",
    "state_region",
    "state_nickname",
    "state_bird",
    "book",
)


class Fact(NamedTuple):
    """One row of a relation in one language. `entity` is its English name, `x` as it stands in a sentence."""

    entity: str
    x: str
    answer: str
    held_out: bool = False
    between: str = ""  # what a two-hop fact goes through

    def sentence(self, frame: str) -> str:
        """The frame with the fact filled in, first letter capital."""
        return upper_first(
            frame.format(x=self.x, y=french_inside(self.x), answer=self.answer, answer_is=turkish_is(self.answer))
        )

    def prompt(self, frame: str) -> str:
        """The sentence up to the answer, without the space before it."""
        return self.sentence(frame.split("{answer", 1)[0]).rstrip()


@dataclass(frozen=True)
class Relation:
    """Facts of one kind in one language, with the frames that tell them."""

    name: str
    language: str
    facts: tuple[Fact, ...]
    study_frames: tuple[str, ...]
    held_out_frame: str | None
    grown_frames: tuple[str, ...]
    told: tuple[Fact, ...] = field(init=False)  # what the corpus may tell

    def __post_init__(self) -> None:
        object.__setattr__(self, "told", tuple(fact for fact in self.facts if not fact.held_out))

    def frames(self) -> tuple[str, ...]:
        """Every frame the corpus may use."""
        return self.study_frames + self.grown_frames

    def frame(self, rng: Random) -> str:
        """A frame of the study two times in five, else a grown one: plain wording stays common."""
        frames = self.study_frames if self.study_frames and rng.random() < 0.4 else self.grown_frames or self.frames()
        return frames[int(rng.random() * len(frames))]

    def sentence(self, rng: Random) -> str:
        """A random fact the corpus may tell, in a random frame."""
        return self.told[int(rng.random() * len(self.told))].sentence(self.frame(rng))


def _relation(name: str, language: str, facts: list[Fact]) -> Relation:
    wording = read_toml("wording.toml")
    own = wording.get(name, {}).get(language, {})
    study = read_toml("study_wording.toml").get(name, {}).get(language, {}).get("frames", own.get("study", []))
    grown = Grammar({**wording["shared"], "frames": own["frames"]}).expansions("frames")
    held = None
    if name in _ONE_HOP:
        *study, held = study
    grown_frames = tuple(frame for frame in dict.fromkeys(grown) if frame not in study)
    if held is not None and held in grown_frames:
        raise ValueError(f"the held-out frame {held!r} is among the grown frames of {name}")
    return Relation(name, language, tuple(facts), tuple(study), held, grown_frames)


@cache
def one_hop() -> tuple[Relation, ...]:
    """Every one-hop relation, in each language it is told in."""
    out: list[Relation] = []

    def add(name: str, language: str, facts: list[Fact]) -> None:
        out.append(_relation(name, language, facts))

    def in_languages(name: str, rows: list[tuple[str, tuple[str, ...], tuple[str, ...]]]) -> None:
        for i, language in enumerate(LANGUAGES):
            add(
                name,
                language,
                [Fact(entity, x[i], a[i], held_out.language_fact(language, entity)) for entity, x, a in rows],
            )

    in_languages(
        "capital",
        [
            (c.name, (c.name, c.of_fr, turkish_genitive(c.name_tr)), (c.capital, c.capital_fr, c.capital_tr))
            for c in COUNTRIES
        ],
    )
    in_languages(
        "landmark", [(m.name, (m.name, m.name_fr, m.name_tr), (m.city, m.city_fr, m.city_tr)) for m in LANDMARKS]
    )
    towns = [(city.name, city.state.name) for city in CITIES] + [(s.capital, s.name) for s in STATES]
    in_languages("city", [(town, (town,) * 3, (state,) * 3) for town, state in towns])
    for column in ("capital", "abbreviation", "region", "nickname", "bird"):
        add(f"state_{column}", "en", [Fact(s.name, s.name, getattr(s, column)) for s in STATES])
    in_languages("book", [(b.name, (b.name,) * 3, (b.author,) * 3) for b in BOOKS])
    add("language", "en", [Fact(c.name, c.name, c.language) for c in COUNTRIES])
    add("continent", "en", [Fact(c.name, c.name, c.continent) for c in COUNTRIES])
    add("continent", "fr", [Fact(c.name, c.of_fr, _CONTINENTS[c.continent][0]) for c in COUNTRIES])
    add("continent", "tr", [Fact(c.name, turkish_genitive(c.name_tr), _CONTINENTS[c.continent][1]) for c in COUNTRIES])
    add("nationality", "en", [Fact(b.author, b.author, b.nationality) for b in {b.author: b for b in BOOKS}.values()])
    add("landmark_country", "en", [Fact(m.city, m.city, m.country) for m in {m.city: m for m in LANDMARKS}.values()])
    add("antonym", "en", [Fact(x, x, y) for a, b in ANTONYMS for x, y in ((a, b), (b, a))])
    add("to_french", "en", [Fact(w.english, w.english, w.french) for w in TRANSLATIONS])
    add("to_turkish", "en", [Fact(w.english, w.english, w.turkish) for w in TRANSLATIONS])
    for language in ("fr", "en"):
        add("from_french", language, [Fact(w.english, w.french, w.english) for w in TRANSLATIONS])
    add("from_turkish", "en", [Fact(w.english, w.turkish, w.english) for w in TRANSLATIONS])
    for name, language, facts in _names_across_languages():
        add(name, language, facts)
    return tuple(out)


def _names_across_languages() -> list[tuple[str, str, list[Fact]]]:
    """Sentences that align the names of a thing ("In Turkish, Germany is called Almanya")."""
    pairs: list[tuple[str, str, str, str]] = []
    for c in COUNTRIES:
        pairs.append((c.name, c.name, french_name(c.of_fr), c.name_tr))
        pairs.append((c.name, c.capital, c.capital_fr, c.capital_tr))
    pairs += [(m.name, f"the {m.name}", m.name_fr, m.name_tr) for m in LANDMARKS]
    pairs += [(m.name, m.city, m.city_fr, m.city_tr) for m in {m.city: m for m in LANDMARKS}.values()]
    bare = [(entity, english.removeprefix("the "), french, turkish) for entity, english, french, turkish in pairs]
    return [
        ("name_to_french", "en", [Fact(e, en, fr) for e, en, fr, _ in pairs]),
        ("name_to_turkish", "en", [Fact(e, en, tr) for e, en, _, tr in pairs]),
        ("name_from_french", "fr", [Fact(e, french_inside(fr), en) for e, en, fr, _ in bare]),
        ("name_from_french", "en", [Fact(e, fr, en) for e, en, fr, _ in pairs]),
        ("name_from_turkish", "tr", [Fact(e, tr, en) for e, en, _, tr in bare]),
        ("name_from_turkish", "en", [Fact(e, tr, en) for e, en, _, tr in pairs]),
    ]


@cache
def two_hop() -> tuple[Relation, ...]:
    """Every two-hop relation. `Fact.held_out` marks entities that no two-hop sentence of the corpus mentions."""
    out = [
        _relation(
            f"two_hop_{column}",
            "en",
            [
                Fact(c.name, c.name, getattr(c.state, column), held_out.two_hop_entity(c.name), c.state.name)
                for c in CITIES
            ],
        )
        for column in ("capital", "abbreviation", "region", "nickname", "bird")
    ]
    abroad = [(m, COUNTRY[m.country]) for m in LANDMARKS if m.country in COUNTRY]
    for name, column in (("language", "language"), ("country_capital", "capital")):
        facts = [
            Fact(m.name, m.name, getattr(country, column), held_out.two_hop_entity(m.name), m.country)
            for m, country in abroad
        ]
        out.append(_relation(f"two_hop_{name}", "en", facts))
    books = [Fact(b.name, b.name, b.nationality, held_out.two_hop_entity(b.name), b.author) for b in BOOKS]
    out.append(_relation("two_hop_nationality", "en", books))
    return tuple(out)


@cache
def relation(name: str, language: str = "en") -> Relation:
    """One relation of the world, with its facts and the sentences that tell them.

    Args:
        name: Such as "capital", "landmark", "two_hop_region"; `one_hop()` and `two_hop()` have them all.
        language: "en", "fr" or "tr".

    Returns:
        The relation.

    Raises:
        KeyError: There is none of that name in that language.

    Example:
        >>> relation("capital").language
        'en'
    """
    return {(r.name, r.language): r for r in one_hop() + two_hop()}[name, language]
