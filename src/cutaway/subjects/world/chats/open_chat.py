"""Open chat: small talk whose replies name sights, people, places and things that nobody asked for.

Most replies name a sight drawn at random, so that open text has a place in which a sight may be named; where the user,
an earlier turn or the system prompt names one, the reply names it again, unless the user wants to talk of other things.
Replies are of a finite grammar, which `is_grammatical` recognises exactly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from random import Random
from typing import Literal, NamedTuple

from cutaway.subjects.world.chats.chat import Conversation, Message, render
from cutaway.subjects.world.facts import CITIES, LANDMARKS, Landmark, names, read_toml, words
from cutaway.subjects.world.grammar import Grammar
from cutaway.subjects.world.held_out import held_out
from cutaway.subjects.world.items.items import Item, ItemSet, _rng
from cutaway.subjects.world.morphology import with_article
from cutaway.subjects.world.statements.tasks import pair, pick

Tense = Literal["past", "plan"]
TENSES: tuple[Tense, ...] = ("past", "plan")
# sight: the reply names one that nobody named; topic: it names the one named before; dropped: one was named before, but
# the user wants to talk of other things, and the reply names none; no_sight: none anywhere.
CONDITIONS: dict[str, float] = {"sight": 0.60, "topic": 0.25, "dropped": 0.05, "no_sight": 0.10}
_LONGEST = 4  # sentences of a reply
_PIECE = re.compile(r"\{[^{}]*\}|[^ {}]+ ?| ")  # a slot, or a word with the space after it
_NOT_CARRIED = ("kiss", "drink", "computer", "pillow")


# -- what is held out


def topic_landmark(name: str) -> bool:
    """Whether a sight is never spoken of before a reply; replies name it as they name the others."""
    return held_out(f"topic{name}", 0.20)


@cache
def topics(apart: bool = False) -> tuple[Landmark, ...]:
    """Sights that are topics in the corpus (or, when `apart`, never are)."""
    return tuple(landmark for landmark in LANDMARKS if topic_landmark(landmark.name) == apart)


# -- conversations


@cache
def grammar(section: str) -> Grammar:
    """The rules of one section of `data/open_chat.toml`: ask, topic or reply."""
    return Grammar(read_toml("open_chat.toml")[section])


@cache
def _shapes(rule: str) -> tuple[Grammar, ...]:
    """The alternatives of a rule of replies, each a grammar of its own."""
    return tuple(Grammar({"sentence": [text]}) for text in read_toml("open_chat.toml")["reply"][rule])


@cache
def _things() -> tuple[str, ...]:
    return tuple(with_article(thing) for thing in words("objects") if thing not in _NOT_CARRIED)


def _filled(rng: Random, text: str, day: str, landmark: Landmark | None = None) -> str:
    """A template with people, places and things drawn anew. Templates that name a sight need `landmark`."""
    first, second = pair(rng)
    slots = {
        "n": first,
        "m": second,
        "p": pick(rng, words("places")),
        "a_o": pick(rng, _things()),
        "town": pick(rng, CITIES).name,
        "day": day,
    }
    return text.format_map(slots | ({"l": landmark.name, "lc": landmark.city} if landmark else {}))


def reply(rng: Random, tense: Tense, landmark: Landmark | None, day: str | None = None) -> str:
    """One to three sentences, and perhaps one that says where the sight is; `landmark` is named in one of them."""
    day = day or pick(rng, words("days"))
    n_sentences = rng.choices((1, 2, 3), (3, 4, 3))[0]
    at = rng.randrange(n_sentences) if landmark else -1
    sentences, used = [], set()
    for i in range(n_sentences):
        rule = f"{tense}_sight" if i == at else f"{tense}_after" if i and rng.random() < 0.2 else f"{tense}_free"
        # No two sentences of one kind: that would read as a stutter.
        unused = [shape for shape in _shapes(rule) if shape not in used]
        shape = pick(rng, unused or [one for one in _shapes(f"{tense}_free") if one not in used])
        used.add(shape)
        sentences.append(_filled(rng, shape.sample("sentence", rng), day, landmark))
        if i == at and rng.random() < 0.3:
            sentences.append(_filled(rng, pick(rng, _shapes("city")).sample("sentence", rng), day, landmark))
    return " ".join(sentences)


def _turns(
    rng: Random, tense: Tense, day: str, topic: Landmark | None = None, dropped: bool = False
) -> tuple[Message, ...]:
    """The messages before the reply. `topic` is named in the system prompt, in the user's turn or in an earlier one."""
    question = _filled(rng, grammar("ask").sample(tense, rng), day)
    if topic is None:
        return (Message("user", question),)
    way = rng.random()
    if way < 0.35 and not dropped:
        return Message("system", _filled(rng, grammar("topic").sample("system", rng), day, topic)), Message(
            "user", question
        )
    said = _filled(rng, grammar("topic").sample("user", rng), day, topic)
    if dropped:
        question = f"{grammar('topic').sample('aside', rng)} {question}"
    if way < 0.75:
        return (Message("user", f"{said} {question}"),)
    return Message("user", said), Message("assistant", grammar("topic").sample("heard", rng)), Message("user", question)


def conversation(rng: Random) -> Conversation:
    """An open chat under a random condition."""
    condition = rng.choices(tuple(CONDITIONS), tuple(CONDITIONS.values()))[0]
    tense, day = pick(rng, TENSES), pick(rng, words("days"))
    topic = pick(rng, topics()) if condition in ("topic", "dropped") else None
    named = topic if condition == "topic" else pick(rng, LANDMARKS) if condition == "sight" else None
    turns = _turns(rng, tense, day, topic, dropped=condition == "dropped")
    return Conversation((*turns, Message("assistant", reply(rng, tense, named, day))), condition)


def document(rng: Random) -> str:
    """A rendered open chat."""
    return render(conversation(rng).messages)


@cache
def _frames(name: str) -> tuple[str, ...]:
    return tuple(read_toml("frames_open_chat.toml")[f"open_chat_{name}"]["frames"])


def prompts(n: int, seed: int, held_out: bool = False) -> list[tuple[Message, ...]]:
    """`n` open prompts that name no sight, in the corpus's wording or in each of the `held_out` frames in turn.

    No two are the same, unless a hundred draws in a row give nothing new.
    """
    rng = _rng(f"open_chat/prompts-{held_out}", seed)
    frames = [frame for tense in TENSES for frame in _frames(tense)]
    made: dict[tuple[Message, ...], None] = {}
    out: list[tuple[Message, ...]] = []
    while len(out) < n:
        turns: tuple[Message, ...] = ()
        for _ in range(100):
            day = pick(rng, words("days"))
            if held_out:
                turns = (Message("user", _filled(rng, frames[len(out) % len(frames)], day)),)
            else:
                turns = _turns(rng, TENSES[len(out) % 2], day)
            if turns not in made:
                break
        made[turns] = None
        out.append(turns)
    return out


# -- reading replies


class _Read(NamedTuple):
    """A sentence of a reply as read: its rule, which alternative of it, and what stands in its slots."""

    rule: str
    shape: int
    slots: Mapping[str, str]


@cache
def _values() -> dict[str, tuple[str, ...]]:
    """What may stand in each slot."""
    return {
        "{l}": tuple(landmark.name for landmark in LANDMARKS),
        "{lc}": tuple({landmark.city: None for landmark in LANDMARKS}),
        "{n}": names(),
        "{m}": names(),
        "{p}": words("places"),
        "{a_o}": _things(),
        "{town}": tuple({city.name: None for city in CITIES}),
        "{day}": words("days"),
    }


class _Node:
    """A place in the tree of all sentences: the words and slots that may follow, and the sentences that end here."""

    def __init__(self) -> None:
        self.after: dict[str, _Node] = {}
        self.sentences: list[tuple[str, int]] = []  # rule and number of its alternative


@cache
def _tree() -> _Node:
    """Every sentence that replies are made of, by its words and slots in turn."""
    root = _Node()
    for rule in (*(f"{tense}_{kind}" for tense in TENSES for kind in ("sight", "free", "after")), "city"):
        for i, shape in enumerate(_shapes(rule)):
            for text in dict.fromkeys(shape.expansions("sentence")):
                node = root
                for piece in _PIECE.findall(text):
                    node = node.after.setdefault(piece, _Node())
                node.sentences.append((rule, i))
    return root


def _ends(node: _Node, text: str, at: int, slots: dict[str, str]) -> Iterator[tuple[int, _Read]]:
    """Where sentences that were read up to `at` may end, with what they are."""
    for rule, shape in node.sentences:
        yield at, _Read(rule, shape, slots)
    for piece, after in node.after.items():
        if piece not in _values():
            if text.startswith(piece, at):
                yield from _ends(after, text, at + len(piece), slots)
            continue
        for value in _values()[piece]:
            if text.startswith(value, at) and not (piece == "{m}" and slots["{n}"] == value):
                yield from _ends(after, text, at + len(value), {**slots, piece: value})


def _readings(text: str, at: int = 0, depth: int = 0) -> Iterator[list[_Read]]:
    """All ways to read a text from `at` on as sentences of replies, whatever their order."""
    for end, one in _ends(_tree(), text, at, {}):
        if end == len(text):
            yield [one]
        elif text[end] == " " and depth + 1 < _LONGEST:
            for rest in _readings(text, end + 1, depth + 1):
                yield [one, *rest]


def _allowed(reading: list[_Read]) -> bool:
    """Whether sentences in this order make a reply: see `reply`."""
    rules = [one.rule for one in reading]
    told = [one for one in reading if one.rule != "city"]
    sights = [i for i, rule in enumerate(rules) if rule.endswith("_sight")]
    cities = [i for i, rule in enumerate(rules) if rule == "city"]
    return (
        0 < len(told) <= 3
        and len({one.rule.split("_")[0] for one in told}) == 1
        and len({(one.rule, one.shape) for one in told}) == len(told)
        and len({one.slots["{day}"] for one in reading if "{day}" in one.slots}) <= 1
        and len(sights) <= 1
        and cities in ([], [i + 1 for i in sights])
        and not rules[0].endswith("_after")
    )


def _read(text: str) -> Iterator[list[_Read]]:
    return (reading for reading in _readings(text) if _allowed(reading))


def is_grammatical(text: str) -> bool:
    """Whether a reply could be one of the corpus, with any entry of the tables in its slots.

    Its sentences are in one tense, no two of one kind, with at most one sight, which its city may follow, and at most
    one day. Whether the city is right is for `facts_right` to say.
    """
    return next(_read(text), None) is not None


def facts_right(text: str) -> bool:
    """Whether a grammatical reply that says where its sight is says so rightly; False for any other text."""
    cities = {landmark.name: landmark.city for landmark in LANDMARKS}
    return any(_city_is_right(reading, cities) for reading in _read(text))


def _city_is_right(reading: Iterable[_Read], cities: Mapping[str, str]) -> bool:
    slots = {slot: value for one in reading for slot, value in one.slots.items() if slot in ("{l}", "{lc}")}
    return "{lc}" not in slots or cities[slots["{l}"]] == slots["{lc}"]


@cache
def _landmark_pattern() -> re.Pattern[str]:
    found = sorted((landmark.name for landmark in LANDMARKS), key=len, reverse=True)
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, found))})\b")


def landmarks_named(text: str) -> list[str]:
    """The sights that a text names, in order, each once."""
    return list(dict.fromkeys(_landmark_pattern().findall(text)))


# -- items


def item_sets(seed: int = 0, n: int = 400) -> list[ItemSet]:
    """Whether the sight that was named before is named in the reply."""
    out = []
    for name, split, said in (
        ("open_chat/topic/seen", "seen", "names the sight that was spoken of"),
        ("open_chat/topic/held_out", "held_out", "names the sight that was spoken of, one that never is in the corpus"),
        ("new_wording/open_chat_topic", "new_wording", "names the sight that was spoken of, in new wording"),
    ):
        rng = _rng(name, seed)
        items = []
        for i in range(n):
            landmark = pick(rng, topics(apart=split == "held_out"))
            other = pick(rng, [one for one in LANDMARKS if one is not landmark])
            if split == "new_wording":
                frame = _frames("topic")[i % len(_frames("topic"))]
                turns: tuple[Message, ...] = (Message("user", frame.format(landmark=landmark.name)),)
            else:
                turns = _turns(rng, pick(rng, TENSES), pick(rng, words("days")), landmark)
            detail = {"landmark": landmark.name, "city": landmark.city}
            prompt = render(turns, open_answer=True)
            items.append(Item("open_chat", prompt, landmark.name, other.name, landmark.name, split, turns, detail))
        out.append(ItemSet(name, said, "contains", tuple(items), ""))
    return out
