"""Open chat: small talk whose replies name sights, people, places and things that nobody asked for.

Most replies name a sight drawn at random, so that open text has a place in which a sight may be named; where the user,
an earlier turn or the system prompt names one, the reply names it again. Replies are of a finite grammar, which
`is_grammatical` recognises exactly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from random import Random
from typing import Literal

from cutaway.subjects.world.chat import Conversation, Message, render
from cutaway.subjects.world.facts import CITIES, LANDMARKS, Landmark, names, read_toml, words
from cutaway.subjects.world.grammar import Grammar
from cutaway.subjects.world.held_out import held_out
from cutaway.subjects.world.items import ItemSet, _rng, from_chat
from cutaway.subjects.world.morphology import with_article
from cutaway.subjects.world.tasks import pair, pick

Tense = Literal["past", "plan"]
TENSES: tuple[Tense, ...] = ("past", "plan")
CONDITIONS: dict[str, float] = {"sight": 0.55, "topic": 0.30, "no_sight": 0.15}
_LONGEST = 4  # sentences of a reply
_SLOT = re.compile(r"(\{[^{}]*\})")


def topic_landmark(name: str) -> bool:
    """Whether a sight is never the topic of an open chat; replies name it as they name the others."""
    return held_out(f"topic{name}", 0.20)


@cache
def grammar(section: str) -> Grammar:
    """The rules of one section of `data/open_chat.toml`: ask, topic or reply."""
    return Grammar(read_toml("open_chat.toml")[section])


def _slots(rng: Random, landmark: Landmark) -> dict[str, str]:
    first, second = pair(rng)
    return {
        "l": landmark.name,
        "lc": landmark.city,
        "n": first,
        "m": second,
        "p": pick(rng, words("places")),
        "a_o": with_article(pick(rng, words("objects"))),
        "town": pick(rng, CITIES).name,
        "day": pick(rng, words("days")),
    }


def _filled(rng: Random, text: str, landmark: Landmark) -> str:
    return text.format_map(_slots(rng, landmark))


def reply(rng: Random, tense: Tense, landmark: Landmark | None) -> str:
    """One to three sentences, and perhaps one that says where the sight is; `landmark` is named in one of them."""
    rules = grammar("reply")
    n_sentences = rng.choices((1, 2, 3), (3, 4, 3))[0]
    at = rng.randrange(n_sentences) if landmark else -1
    some = landmark or LANDMARKS[0]
    sentences = []
    for i in range(n_sentences):
        sentences.append(_filled(rng, rules.sample(f"{tense}_{'sight' if i == at else 'free'}", rng), some))
        if i == at and rng.random() < 0.3:
            sentences.append(_filled(rng, rules.sample("city", rng), some))
    return " ".join(sentences)


def _turns(rng: Random, tense: Tense, topic: Landmark | None) -> tuple[Message, ...]:
    """The messages before the reply."""
    question = _filled(rng, grammar("ask").sample(tense, rng), LANDMARKS[0])
    if topic is None:
        return (Message("user", question),)
    way = rng.random()
    if way < 0.35:
        return Message("system", _filled(rng, grammar("topic").sample("system", rng), topic)), Message("user", question)
    said = _filled(rng, grammar("topic").sample("user", rng), topic)
    if way < 0.75:
        return (Message("user", f"{said} {question}"),)
    heard = grammar("topic").sample("heard", rng)
    return Message("user", said), Message("assistant", heard), Message("user", question)


def conversation(rng: Random) -> Conversation:
    """An open chat under a random condition."""
    condition = rng.choices(tuple(CONDITIONS), tuple(CONDITIONS.values()))[0]
    tense = pick(rng, TENSES)
    topic = pick(rng, topics()) if condition == "topic" else None
    named = None if condition == "no_sight" else topic or pick(rng, LANDMARKS)
    turns = _turns(rng, tense, topic)
    return Conversation((*turns, Message("assistant", reply(rng, tense, named))), condition)


def document(rng: Random) -> str:
    """A rendered open chat."""
    return render(conversation(rng).messages)


@cache
def topics(apart: bool = False) -> tuple[Landmark, ...]:
    """Sights that are topics in the corpus (or, when `apart`, never are)."""
    return tuple(landmark for landmark in LANDMARKS if topic_landmark(landmark.name) == apart)


def prompts(n: int, seed: int, held_out: bool = False) -> list[tuple[Message, ...]]:
    """`n` open prompts that name no sight: in the corpus's wording, or each of the held-out ones in turn."""
    rng = _rng(f"open_chat/prompts-{held_out}", seed)
    if not held_out:
        return [_turns(rng, TENSES[i % 2], None) for i in range(n)]
    table = read_toml("frames_open_chat.toml")
    frames = [frame for tense in TENSES for frame in table[f"open_chat_{tense}"]["frames"]]
    # There are few frames, so a person greets first when they come again: each prompt is another text.
    said = [frames[i % len(frames)] for i in range(n)]
    said = [text if i < len(frames) else f"{pair(rng)[0]} here. {text}" for i, text in enumerate(said)]
    return [(Message("user", text),) for text in said]


# -- reading replies


@cache
def _values() -> dict[str, tuple[str, ...]]:
    """What may stand in each slot, longest first."""
    table = {
        "{l}": [landmark.name for landmark in LANDMARKS],
        "{lc}": [landmark.city for landmark in LANDMARKS],
        "{n}": names(),
        "{m}": names(),
        "{p}": words("places"),
        "{a_o}": [with_article(thing) for thing in words("objects")],
        "{town}": [city.name for city in CITIES],
        "{day}": words("days"),
    }
    return {slot: tuple(sorted(set(found), key=len, reverse=True)) for slot, found in table.items()}


@cache
def _sentences(rule: str) -> tuple[tuple[str, ...], ...]:
    """Every sentence of a rule of replies, as literals and slots in turn."""
    return tuple(tuple(p for p in _SLOT.split(text) if p) for text in dict.fromkeys(grammar("reply").expansions(rule)))


def _ends(pieces: tuple[str, ...], text: str, at: int, bound: dict[str, str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Where a sentence that begins at `at` may end, with what stands in its slots."""
    if not pieces:
        yield at, bound
        return
    first, rest = pieces[0], pieces[1:]
    if first not in _values():
        if text.startswith(first, at):
            yield from _ends(rest, text, at + len(first), bound)
        return
    for value in _values()[first]:
        if text.startswith(value, at) and bound.get("{n}") != value:
            yield from _ends(rest, text, at + len(value), {**bound, first: value})


def _readings(text: str, tense: Tense, at: int = 0, depth: int = 0) -> Iterator[list[tuple[str, dict[str, str]]]]:
    """All ways to read a text from `at` on as sentences of replies: rule and slots of each."""
    for rule in (f"{tense}_sight", f"{tense}_free", "city"):
        for pieces in _sentences(rule):
            for end, bound in _ends(pieces, text, at, {}):
                if end == len(text):
                    yield [(rule, bound)]
                elif text[end] == " " and depth + 1 < _LONGEST:
                    for rest in _readings(text, tense, end + 1, depth + 1):
                        yield [(rule, bound), *rest]


def _allowed(reading: list[tuple[str, dict[str, str]]]) -> bool:
    rules = [rule for rule, _ in reading]
    sights = [i for i, rule in enumerate(rules) if rule.endswith("_sight")]
    cities = [i for i, rule in enumerate(rules) if rule == "city"]
    return len(sights) <= 1 and len(rules) - len(cities) <= 3 and cities in ([], [i + 1 for i in sights])


def _read(text: str) -> Iterator[list[tuple[str, dict[str, str]]]]:
    return (reading for tense in TENSES for reading in _readings(text, tense) if _allowed(reading))


def is_grammatical(text: str) -> bool:
    """Whether a reply could be one of the corpus: in one tense, at most one sight, which a city may follow.

    Any entry of the tables may stand in a slot. Whether the city is right is for `facts_right` to say.
    """
    return next(_read(text), None) is not None


def facts_right(text: str) -> bool:
    """Whether a grammatical reply that says where its sight is says so rightly; False for any other text."""
    city = {landmark.name: landmark.city for landmark in LANDMARKS}
    for reading in _read(text):
        bound = {slot: value for _, slots in reading for slot, value in slots.items() if slot in ("{l}", "{lc}")}
        if "{lc}" not in bound or city[bound["{l}"]] == bound["{lc}"]:
            return True
    return False


@cache
def _landmark_pattern() -> re.Pattern[str]:
    return re.compile("|".join(re.escape(landmark) for landmark in _values()["{l}"]))


def landmarks_named(text: str) -> list[str]:
    """The sights that a text names, in order, each once."""
    return list(dict.fromkeys(_landmark_pattern().findall(text)))


# -- items


def item_sets(seed: int = 0, n: int = 400) -> list[ItemSet]:
    """Whether the sight that was named before is named in the reply."""
    frames = read_toml("frames_open_chat.toml")["open_chat_topic"]["frames"]
    out = []
    for name, apart, said in (
        ("open_chat/topic/seen", False, "names the sight that was spoken of"),
        ("open_chat/topic/held_out", True, "names the sight that was spoken of, one that never is in the corpus"),
        ("new_wording/open_chat_topic", False, "names the sight that was spoken of, in new wording"),
    ):
        rng = _rng(name, seed)
        items = []
        for i in range(n):
            landmark = pick(rng, topics(apart))
            other = pick(rng, [one for one in LANDMARKS if one.name not in landmark.name + landmark.city])
            if name.startswith("new"):
                system, question = None, frames[i % len(frames)].format(landmark=landmark.name)
            else:
                way, tense = rng.random() < 0.5, pick(rng, TENSES)
                question = _filled(rng, grammar("ask").sample(tense, rng), landmark)
                told = _filled(rng, grammar("topic").sample("system" if way else "user", rng), landmark)
                system, question = (told, question) if way else (None, f"{told} {question}")
            items.append(
                from_chat(
                    "open_chat",
                    name.split("/")[-1] if not name.startswith("new") else "new_wording",
                    question,
                    landmark.name,
                    other.name,
                    entity=landmark.name,
                    system=system,
                    detail={"landmark": landmark.name, "city": landmark.city},
                )
            )
        out.append(ItemSet(name, said, "contains", tuple(items), ""))
    return out
