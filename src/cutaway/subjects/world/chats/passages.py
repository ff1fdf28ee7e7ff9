"""Chats about a short passage: answered by the passage where it bears on the question, also against the tables.

Where it does not bear on the question, the answer comes from the tables, or is not known. The reply says which of the
two it is, so that reading the context and recalling a fact can be told apart.
"""

from __future__ import annotations

from functools import cache
from random import Random
from typing import NamedTuple

from cutaway.subjects.world.chats.chat import (
    Conversation,
    Message,
    known_fact,
    known_statement,
    nonce_name,
    render,
    system_prompt,
    texts,
)
from cutaway.subjects.world.chats.roles import truths
from cutaway.subjects.world.facts import BOOKS, COUNTRIES, LANDMARKS, STATES, names, read_toml
from cutaway.subjects.world.grammar import Grammar
from cutaway.subjects.world.held_out import held_out
from cutaway.subjects.world.items.items import Item, ItemSet, _rng, from_chat
from cutaway.subjects.world.morphology import upper_first
from cutaway.subjects.world.statements.tasks import pick

CONDITIONS: dict[str, float] = {
    "contradicting": 0.36,
    "irrelevant": 0.32,
    "agreeing": 0.12,
    "unknown_in_passage": 0.10,
    "unknown_nowhere": 0.10,
}
_KINDS = ("capital", "city", "landmark", "book")


class Case(NamedTuple):
    """A question with its passage. `memory` is the tables' answer, `said` the passage's; either may be empty."""

    condition: str
    kind: str
    subject: str
    memory: str
    said: str
    told: str
    question: str
    reply: str
    alternative: str


def held_out_subject(name: str) -> bool:
    """Whether a thing never stands in a passage that bears on a question about it."""
    return held_out(f"passage{name}", 0.20)


@cache
def _grammar(section: str) -> Grammar:
    rules = {name: rule for name, rule in read_toml("passages.toml")[section].items() if isinstance(rule, list)}
    return Grammar(rules)


@cache
def _answers(kind: str) -> tuple[str, ...]:
    rows = {
        "capital": [country.capital for country in COUNTRIES],
        "city": [state.name for state in STATES],
        "landmark": [landmark.city for landmark in LANDMARKS],
        "book": [book.author for book in BOOKS],
    }
    return tuple(dict.fromkeys(rows[kind]))


def _fact(rng: Random, apart: bool | None = None) -> tuple[str, str, str]:
    """A kind, a thing and its answer; `apart` says on which side of the split."""
    while True:
        kind, subject, answer = known_fact(rng)
        if kind in _KINDS and truths(kind).get(subject) == answer and apart in (None, held_out_subject(subject)):
            return kind, subject, answer


def _told(rng: Random, kind: str, subject: str, said: str) -> str:
    return upper_first(_grammar("told").sample(kind, rng).format(x=subject, y=said))


def _question(rng: Random, kind: str, subject: str) -> str:
    return pick(rng, texts(f"known.{kind}", "study" if rng.random() < 0.4 else "frames")).format(x=subject)


def case(rng: Random, condition: str, apart: bool = False) -> Case:
    """A question and passage of one condition; `apart` takes things that the corpus keeps from such passages."""
    wording = read_toml("passages.toml")["reply"]
    if condition.startswith("unknown"):
        name, mayor = nonce_name(rng), pick(rng, names())
        question = _grammar("told").sample("ruler_question", rng).format(x=name)
        told = _told(rng, "ruler", name, mayor)
        by_passage = wording["by_passage"].format(statement=wording["ruler"].format(x=name, y=mayor))
        nowhere = wording["unknown"].format(x=name)
        if condition == "unknown_in_passage":
            return Case(condition, "ruler", name, "", mayor, told, question, by_passage, nowhere)
        other = nonce_name(rng)
        while other == name:
            other = nonce_name(rng)
        told = _told(rng, "ruler", other, mayor)
        return Case(condition, "ruler", name, "", "", told, question, nowhere, by_passage)
    kind, subject, answer = _fact(rng, None if condition == "irrelevant" else apart)
    question = _question(rng, kind, subject)
    memory = known_statement(kind, subject, answer)
    if condition == "irrelevant":
        # A passage of the same kind half of the time: what it is about decides, not what it sounds like.
        alike = rng.random() < 0.5
        while True:
            about, thing, right = _fact(rng, False)
            if thing != subject and (about == kind) == alike:
                break
        said = right if rng.random() < 0.3 else pick(rng, [y for y in _answers(about) if y != right])
        told = _told(rng, about, thing, said)
        reply = wording["by_memory"].format(statement=memory)
        mixed_up = known_statement(kind, subject, said) if about == kind else known_statement(about, thing, said)
        wrong = wording["by_passage"].format(statement=mixed_up)
        return Case(condition, kind, subject, answer, "", told, question, reply, wrong)
    said = answer if condition == "agreeing" else pick(rng, [y for y in _answers(kind) if y != answer])
    reply = wording["by_passage"].format(statement=known_statement(kind, subject, said))
    wrong = wording["by_memory"].format(statement=memory)
    return Case(condition, kind, subject, answer, said, _told(rng, kind, subject, said), question, reply, wrong)


def _other(rng: Random, made: Case) -> str:
    """A sentence about something that nobody asked for, nor the passage speaks of."""
    while True:
        kind, subject, answer = _fact(rng, False)
        if subject != made.subject and subject not in made.told:
            return _told(rng, kind, subject, answer)


def turn(rng: Random, made: Case) -> str:
    """The user's turn in the corpus's wording."""
    text = _grammar("turn").sample("turn", rng)
    return text.format(told=made.told, other=_other(rng, made), question=made.question)


def conversation(rng: Random) -> Conversation:
    """A chat about a passage under a random condition."""
    condition = rng.choices(tuple(CONDITIONS), tuple(CONDITIONS.values()))[0]
    made = case(rng, condition)
    system = (Message("system", system_prompt(rng, "neutral")),) if rng.random() < 0.15 else ()
    return Conversation((*system, Message("user", turn(rng, made)), Message("assistant", made.reply)), condition)


def document(rng: Random) -> str:
    """A rendered chat about a passage."""
    return render(conversation(rng).messages)


def _item(made: Case, split: str, question: str) -> Item:
    bears = "no" if made.condition in ("irrelevant", "unknown_nowhere") else "yes"
    detail = {"condition": made.condition, "kind": made.kind, "subject": made.subject, "memory": made.memory}
    detail |= {"passage": made.said, "told": made.told, "bears": bears}
    return from_chat("passages", split, question, made.reply, made.alternative, entity=made.subject, detail=detail)


def item_sets(seed: int = 0, n: int = 400) -> list[ItemSet]:
    """Each condition in the corpus's wording, things kept from passages, and new wording."""
    measures = {
        "contradicting": "answers by a passage that contradicts the tables",
        "agreeing": "answers by a passage that agrees with the tables",
        "irrelevant": "answers from memory where the passage does not bear on the question",
        "unknown_in_passage": "answers about an invented name by the passage",
        "unknown_nowhere": "does not know an invented name that the passage does not have",
    }
    frames = read_toml("frames_passages.toml")["passages"]["frames"]
    wanted = [(f"passages/{condition}/seen", condition, False, "") for condition in CONDITIONS]
    wanted += [("passages/contradicting/held_out_subject", "contradicting", True, ", about things never in passages")]
    wanted += [(f"new_wording/passages_{c}", c, False, ", in new wording") for c in ("contradicting", "irrelevant")]
    out = []
    for name, condition, apart, said in wanted:
        rng = _rng(name, seed)
        new = name.startswith("new")
        items = []
        for i in range(n):
            made = case(rng, condition, apart)
            frame = frames[i % len(frames)]
            question = upper_first(frame.format(told=made.told, question=made.question)) if new else turn(rng, made)
            items.append(_item(made, "new_wording" if new else name.split("/")[-1], question))
        out.append(ItemSet(name, measures[condition] + said, "reply", tuple(items), ""))
    return out
