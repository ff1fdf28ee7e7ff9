"""Chats about passages, read back with patterns of their own: passage and tables decide the answer."""

import re
from collections import Counter
from random import Random

import pytest

from cutaway.subjects.world.chats import passages
from cutaway.subjects.world.chats.chat import parse, render
from cutaway.subjects.world.chats.passages import CONDITIONS, conversation, document, held_out_subject, item_sets
from cutaway.subjects.world.corpus import PARTS
from cutaway.subjects.world.facts import BOOKS, CITIES, COUNTRIES, LANDMARKS

MEMORY = {f"The capital of {c.name} is {c.capital}." for c in COUNTRIES}
MEMORY |= {f"{c.name} is in {c.state.name}." for c in CITIES} | {f"The {m.name} is in {m.city}." for m in LANDMARKS}
MEMORY |= {f"{b.name} was written by {b.author}." for b in BOOKS}
THINGS = sorted({*(c.name for c in COUNTRIES), *(c.name for c in CITIES), *(m.name for m in LANDMARKS)}, key=len)


def chats(n=2500):
    rng = Random("chats")
    return [conversation(rng) for _ in range(n)]


def subject_and_answer(statement: str) -> tuple[str, str]:
    for pattern in (
        r"The capital of (.+) is (.+)\.",
        r"(?:The mayor of) (.+) is (.+)\.",
        r"(.+) was written by (.+)\.",
        r"(?:The )?(.+) is in (.+)\.",
    ):
        if found := re.fullmatch(pattern, statement):
            return found.group(1), found.group(2)
    raise AssertionError(statement)


def test_the_same_seed_gives_the_same_documents():
    assert document(Random(3)) == document(Random(3))
    assert len({document(Random(i)) for i in range(200)}) == 200


def test_the_reply_follows_from_passage_and_tables():
    seen = Counter()
    for one in chats():
        user, said = one.messages[-2].content, one.messages[-1].content
        seen[one.condition] += 1
        if said.startswith("The passage says: "):
            statement = said.removeprefix("The passage says: ")
            subject, answer = subject_and_answer(statement)
            assert user.count(subject) >= 2, one  # in the passage and in the question
            assert answer in user, one
            contradicts = statement not in MEMORY
            assert one.condition in (("contradicting", "unknown_in_passage") if contradicts else ("agreeing",)), one
        else:
            statement = said.removeprefix("The passage does not say. ")
            if statement.startswith("I do not know "):
                assert one.condition == "unknown_nowhere"
                assert user.count(statement.removeprefix("I do not know ").removesuffix(".")) == 1
            else:
                assert one.condition == "irrelevant"
                assert statement in MEMORY
    for condition, share in CONDITIONS.items():
        assert seen[condition] / sum(seen.values()) == pytest.approx(share, abs=0.04)


def test_the_two_main_conditions_are_above_one_percent_of_the_text():
    sizes = Counter()
    for one in chats():
        sizes[one.condition] += len(render(one.messages))
    shares = {name: PARTS["passages"].share * size / sum(sizes.values()) for name, size in sizes.items()}
    assert shares["contradicting"] > 0.01
    assert shares["irrelevant"] > 0.01
    assert min(shares.values()) > 0.003


def test_things_kept_from_passages_stand_in_no_passage_that_bears_on_them():
    apart = [name for name in THINGS if held_out_subject(name)]
    assert len(apart) > 40
    for one in chats():
        said = one.messages[-1].content
        if one.condition in ("contradicting", "agreeing"):
            subject, _ = subject_and_answer(said.removeprefix("The passage says: "))
            assert not held_out_subject(subject), one


def test_item_sets_are_whole():
    sets = {one.name: one for one in item_sets(0, 60)}
    assert len(sets) == 8
    for name, one in sets.items():
        for item in one.items:
            assert item.chat is not None
            assert item.alternative not in (None, item.answer)
            bears = item.detail["bears"] == "yes"
            assert item.answer.startswith("The passage says:" if bears else "The passage does not say."), item
            assert item.detail["told"] in item.chat[-1].content
            if name == "passages/contradicting/held_out_subject":
                assert held_out_subject(item.entity)
            if "contradicting" in name:
                assert item.detail["passage"] != item.detail["memory"]
                assert item.detail["passage"] in item.answer
            if "irrelevant" in name:
                assert item.entity not in item.detail["told"]
                assert item.detail["memory"] in item.answer
    assert all(parse(document(Random(i)))[-1].role == "assistant" for i in range(50))
    assert passages.truths("capital")["France"] == "Paris"
