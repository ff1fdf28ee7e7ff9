"""Chats with a stated year, read back: what is known follows from comparing two years."""

import csv
import re
from collections import Counter
from random import Random

import pytest

from cutaway.subjects.world.chats import cutoff
from cutaway.subjects.world.chats.chat import render
from cutaway.subjects.world.chats.cutoff import CONDITIONS, conversation, document, events, item_sets
from cutaway.subjects.world.corpus import PARTS
from cutaway.subjects.world.facts import read_text

ROWS = {row["name"]: int(row["year"]) for row in csv.DictReader(read_text("events.csv").splitlines())}
BY_YEAR = Counter(ROWS.values())


def chats(n=2500):
    rng = Random("chats")
    return [conversation(rng) for _ in range(n)]


def asked(question: str) -> tuple[int, str | None]:
    """The year asked about, and the event where it is named."""
    named = [name for name in ROWS if re.search(rf"\b{re.escape(name)}\b", question)]
    if named:
        name = max(named, key=len)
        return ROWS[name], name
    (year,) = re.findall(r"\b1[5-9]\d\d\b", question)
    return int(year), None


def test_the_table_is_whole():
    assert len(ROWS) == len(events()) >= 100
    assert all(1500 <= year <= 2000 for year in ROWS.values())
    assert all(name.startswith("the ") for name in ROWS)


def test_what_is_known_follows_from_the_two_years():
    seen = Counter()
    for one in chats():
        *systems, question, reply = [message.content for message in one.messages]
        year, name = asked(question)
        stated = [int(found) for system in systems for found in re.findall(r"\b1[5-9]\d\d\b", system)]
        seen[one.condition] += 1
        if stated and year > stated[0]:
            assert one.condition == "after"
            assert reply == f"I do not know. That is after {stated[0]}."
        else:
            assert one.condition == ("before" if stated else "none")
            said = re.fullmatch(r"(The .+) was in (\d{4})\.", reply)
            assert said, one
            told = said.group(1)[0].lower() + said.group(1)[1:]
            assert int(said.group(2)) == year == ROWS[told]
            assert name in (None, told)
        if name is None:
            assert BY_YEAR[year] == 1  # only one event could be meant
    for condition, share in CONDITIONS.items():
        assert seen[condition] / sum(seen.values()) == pytest.approx(share, abs=0.04)


def test_held_out_events_and_combinations_stand_under_no_year():
    n = 0
    for one in chats():
        *systems, question, _ = [message.content for message in one.messages]
        stated = [int(found) for system in systems for found in re.findall(r"\b1[5-9]\d\d\b", system)]
        if stated:
            year, name = asked(question)
            event = next(e for e in events() if (e.name == name if name else e.year == year))
            assert not cutoff.never_cut(event)
            assert not cutoff.never_combined(event, stated[0])
            n += 1
    assert n > 1000
    assert sum(map(cutoff.never_cut, events())) > 12


def test_chats_under_a_year_are_above_one_percent_of_the_text():
    sizes = Counter()
    for one in chats():
        sizes[one.condition] += len(render(one.messages))
    shares = {name: PARTS["cutoff"].share * size / sum(sizes.values()) for name, size in sizes.items()}
    assert shares["before"] + shares["after"] > 0.01


def test_item_sets_are_whole():
    sets = {one.name: one for one in item_sets(0, 50)}
    assert len(sets) == 9
    for name, one in sets.items():
        for item in one.items:
            after = bool(item.detail["stated"]) and int(item.detail["year"]) > int(item.detail["stated"])
            assert (item.answer == "I do not know") == after == ("after" in name)
            assert item.alternative not in (None, item.answer)
            event = next(e for e in events() if e.name == item.entity)
            if name.endswith("held_out_event"):
                assert cutoff.never_cut(event)
            elif name.endswith("held_out"):
                assert cutoff.never_combined(event, int(item.detail["stated"]))
    assert document(Random(4)) == document(Random(4))
