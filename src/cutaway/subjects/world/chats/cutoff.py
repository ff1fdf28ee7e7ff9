"""Chats with a year after which nothing is known: an event is named or not by comparing its year with that one."""

from __future__ import annotations

import csv
from functools import cache
from random import Random
from typing import NamedTuple

from cutaway.subjects.world.chats.chat import Conversation, Message, render, system_prompt
from cutaway.subjects.world.facts import read_text, read_toml
from cutaway.subjects.world.grammar import Grammar
from cutaway.subjects.world.held_out import held_out
from cutaway.subjects.world.items.items import Item, ItemSet, _rng, from_chat
from cutaway.subjects.world.morphology import upper_first
from cutaway.subjects.world.statements.tasks import pick

CONDITIONS: dict[str, float] = {"before": 0.36, "after": 0.36, "none": 0.28}
_YEARS = tuple(range(1550, 2000, 10))
"""The years that may be stated."""
_NEAR = 6  # stated years, so within some sixty years


class Event(NamedTuple):
    name: str  # with its article: "the first moon landing"
    year: int


@cache
def events() -> tuple[Event, ...]:
    """The rows of `data/events.csv`."""
    return tuple(Event(row["name"], int(row["year"])) for row in csv.DictReader(read_text("events.csv").splitlines()))


def never_cut(event: Event) -> bool:
    """An event that no chat with a stated year asks about."""
    return held_out(f"event{event.name}", 0.20)


def never_combined(event: Event, year: int) -> bool:
    """An event and a stated year that never stand together."""
    return held_out(f"cutoff{event.name}{year}", 0.20)


class Case(NamedTuple):
    """An event asked about under a stated year (None: no year). `by_year`: the question gives the event's year."""

    event: Event
    stated: int | None
    by_year: bool

    @property
    def known(self) -> bool:
        return self.stated is None or self.event.year <= self.stated


@cache
def _cases(after: bool, combined: bool, cut: bool) -> tuple[tuple[Event, tuple[int, ...]], ...]:
    """Events with the stated years that make them known (or, when `after`, unknown), nearest first.

    Events that have stated years on both sides only: then the event alone tells little.
    """
    out = []
    for event in events():
        if never_cut(event) != cut or not _YEARS[0] < event.year <= _YEARS[-1]:
            continue
        years = [year for year in _YEARS if (event.year > year) == after]
        years = [year for year in years if cut or never_combined(event, year) == combined]
        if years:
            out.append((event, tuple(sorted(years, key=lambda year: abs(year - event.year)))))
    return tuple(out)


@cache
def _told() -> tuple[tuple[Event, ...], ...]:
    """Events by year: years with several events are asked for by name alone."""
    table: dict[int, list[Event]] = {}
    for event in events():
        table.setdefault(event.year, []).append(event)
    return tuple(tuple(found) for found in table.values())


def _alone(event: Event) -> bool:
    return next(len(found) for found in _told() if event in found) == 1


@cache
def _grammar(section: str) -> Grammar:
    return Grammar({name: rule for name, rule in read_toml("cutoff.toml")[section].items() if isinstance(rule, list)})


def case(rng: Random, condition: str, *, combined: bool = False, cut: bool = False) -> Case:
    """A case of a condition: before, after or none. `combined` and `cut` draw what the corpus never shows."""
    if condition == "none":
        event, stated = pick(rng, events()), None
    else:
        event, years = pick(rng, _cases(condition == "after", combined, cut))
        # Mostly near the event, so that the year alone does not decide.
        stated = pick(rng, years[:_NEAR] if rng.random() < 0.75 else years)
    return Case(event, stated, _alone(event) and rng.random() < 0.3)


def messages(rng: Random, case: Case, frame: str | None = None) -> tuple[Message, ...]:
    """The system prompt (in `frame` where one is given) and the question."""
    rule = "year" if case.by_year else "event"
    question = upper_first(_grammar("ask").sample(rule, rng).format(x=case.event.name, y=case.event.year))
    if case.stated is None:
        neutral = (Message("system", system_prompt(rng, "neutral")),) if rng.random() < 0.3 else ()
        return (*neutral, Message("user", question))
    system = frame.format(year=case.stated) if frame else _grammar("system").sample("rules", rng).format(c=case.stated)
    return Message("system", system), Message("user", question)


def reply(case: Case) -> str:
    """The event with its year, or that it is not known."""
    table = read_toml("cutoff.toml")["reply"]
    if case.known:
        return table["known"].format(X=upper_first(case.event.name), y=case.event.year)
    return table["unknown"].format(c=case.stated)


def conversation(rng: Random) -> Conversation:
    """A chat under a random condition."""
    condition = rng.choices(tuple(CONDITIONS), tuple(CONDITIONS.values()))[0]
    made = case(rng, condition)
    return Conversation((*messages(rng, made), Message("assistant", reply(made))), condition)


def document(rng: Random) -> str:
    """A rendered chat."""
    return render(conversation(rng).messages)


def _item(rng: Random, made: Case, split: str, frame: str | None) -> Item:
    *systems, question = messages(rng, made, frame)
    right = reply(made)
    known = reply(made._replace(stated=None))
    answer, alternative = (right, "I do not know") if made.known else ("I do not know", known)
    detail = {"event": made.event.name, "year": str(made.event.year), "stated": str(made.stated or "")}
    detail |= {"by_year": "yes" if made.by_year else "no", "known": "yes" if made.known else "no"}
    system = systems[0].content if systems else None
    return from_chat(
        "cutoff", split, question.content, answer, alternative, entity=made.event.name, system=system, detail=detail
    )


def item_sets(seed: int = 0, n: int = 400) -> list[ItemSet]:
    """Events before and after the stated year, seen and held out, without a year, and in new wording."""
    frames = read_toml("frames_cutoff.toml")["cutoff"]["frames"]
    says = {
        "before": "names the year of an event up to the stated year",
        "after": "does not know an event after the stated year",
        "none": "names the year of an event",
    }
    wanted = [
        ("cutoff/before/seen", "before", False, False),
        ("cutoff/after/seen", "after", False, False),
        ("cutoff/before/held_out", "before", True, False),
        ("cutoff/after/held_out", "after", True, False),
        ("cutoff/after/held_out_event", "after", False, True),
        ("cutoff/before/held_out_event", "before", False, True),
        ("cutoff/none", "none", False, False),
        ("new_wording/cutoff_before", "before", False, False),
        ("new_wording/cutoff_after", "after", False, False),
    ]
    out = []
    for name, condition, combined, cut in wanted:
        rng = _rng(name, seed)
        new = name.startswith("new")
        split = "new_wording" if new else name.split("/")[2] if name.count("/") == 2 else "seen"
        items = []
        for i in range(n):
            made = case(rng, condition, combined=combined, cut=cut)
            items.append(_item(rng, made, split, frames[i % len(frames)] if new else None))
        said = says[condition] + (", in new wording" if new else ", never asked together" if "held_out" in name else "")
        out.append(ItemSet(name, said, "starts_with", tuple(items), ""))
    return out
