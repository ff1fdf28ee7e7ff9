"""Support chats: a policy in the system prompt, a request for a refund, and a reply that follows the policy by rule.

An order whose value is above the limit is escalated; of the others, those late by the threshold or more are approved
and the rest refused. Nothing else counts: not the tone, the name, the thing or its price. A fifth of the names and of
the things, and a quarter of the pairs of a threshold and a delay, are never met in these chats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from random import Random
from typing import Literal

from cutaway.subjects.world.chats.chat import Conversation, Message, render
from cutaway.subjects.world.facts import names, read_toml, words
from cutaway.subjects.world.grammar import Grammar
from cutaway.subjects.world.held_out import held_out
from cutaway.subjects.world.items.items import Item, ItemSet, _rng
from cutaway.subjects.world.morphology import plural, with_article
from cutaway.subjects.world.statements.tasks import pick

Decision = Literal["approve", "refuse", "escalate"]
# Decision → share of requests. Also the conditions of the chats, named by the first decision.
CONDITIONS: dict[str, float] = {"approve": 1 / 3, "refuse": 1 / 3, "escalate": 1 / 3}
_DECISIONS: tuple[Decision, ...] = ("approve", "refuse", "escalate")
_OPENINGS: dict[Decision, str] = {"approve": "Approved", "refuse": "Denied", "escalate": "Escalated"}
# Days are below 15 and dollars from 15 to 95, so no number of days can be taken for dollars, and all are one token.
THRESHOLDS, DELAYS = (3, 5, 7, 10), tuple(range(1, 15))
_LIMITS, _DOLLARS = (40, 50, 60, 70), tuple(range(15, 100, 5))
_LONGEST = 610  # characters of a chat with two requests


@dataclass(frozen=True)
class Case:
    """A policy and a request. Change one variable with `dataclasses.replace` to get a minimal pair."""

    threshold: int  # days of delay from which an order is refunded
    limit: int  # dollars above which a manager decides
    delay: int
    value: int  # of the whole order; the only amount that counts
    price: int  # of the thing, at most the value
    angry: bool
    name: str | None
    thing: str

    def __post_init__(self) -> None:
        if self.price > self.value:
            raise ValueError(f"a thing for {self.price} dollars does not fit into an order of {self.value}")


@dataclass(frozen=True)
class Wording:
    """Templates that fit every case: with another case in the same wording, only what differs in the case changes."""

    policy: str
    request: str
    named: str
    unnamed: str
    angry: tuple[str, str]  # before and after the request
    calm: tuple[str, str]
    replies: Mapping[Decision, str]


def decide(case: Case) -> Decision:
    """What the policy says."""
    if case.value > case.limit:
        return "escalate"
    return "approve" if case.delay >= case.threshold else "refuse"


# -- what is held out


def held_out_name(name: str) -> bool:
    """A first name that no customer of the corpus has."""
    return held_out(f"support-name{name}", 0.20)


def held_out_thing(thing: str) -> bool:
    """A thing that no customer of the corpus bought."""
    return held_out(f"support-thing{thing}", 0.20)


def held_out_delay(threshold: int, delay: int) -> bool:
    """A pair of a threshold and a delay that no chat of the corpus has."""
    return held_out(f"support-days{threshold}|{delay}", 0.20)


@cache
def _customers(apart: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """First names and things of the corpus or, when `apart`, those never met."""
    return (
        tuple(name for name in names() if held_out_name(name) == apart),
        # Nobody buys a kiss.
        tuple(thing for thing in words("objects") if held_out_thing(thing) == apart and thing != "kiss"),
    )


@cache
def _delays(apart: bool, late: bool, threshold: int | None) -> tuple[tuple[int, int], ...]:
    """Pairs of a threshold (or any) and a delay that is enough for it when `late`, in or out of the corpus."""
    return tuple(
        (t, delay)
        for t in ((threshold,) if threshold else THRESHOLDS)
        for delay in DELAYS
        if (delay >= t) == late and held_out_delay(t, delay) == apart
    )


# -- drawing


def _mostly_near(rng: Random, pairs: Sequence[tuple[int, int]], distance: int) -> tuple[int, int]:
    """A pair of a bound and a number, in three of four draws one of those not far apart.

    Else the request alone would nearly tell the decision, and the policy would not have to be read.
    """
    near = [pair for pair in pairs if abs(pair[0] - pair[1]) <= distance]
    return pick(rng, near if near and rng.random() < 0.75 else pairs)


def case(
    rng: Random,
    decision: Decision | None = None,
    policy: tuple[int, int] | None = None,
    *,
    new_customer: bool = False,
    new_delay: bool = False,
) -> Case:
    """A case with this decision under this policy (threshold and limit), or random ones.

    `new_customer` draws a name and a thing, `new_delay` a threshold and a delay that the corpus never shows.
    """
    decision = decision or pick(rng, _DECISIONS)
    threshold, limit = policy or (pick(rng, THRESHOLDS), pick(rng, _LIMITS))
    late = decision == "approve" or (decision == "escalate" and rng.random() < 0.5)
    any_threshold = new_delay and policy is None
    threshold, delay = _mostly_near(rng, _delays(new_delay, late, None if any_threshold else threshold), 4)
    # The requests speak of other things in the order, so its value is more than the price.
    values = [(limit, v) for v in _DOLLARS[1:] if (v > limit) == (decision == "escalate")]
    _, value = _mostly_near(rng, values, 25)
    price = pick(rng, [v for v in _DOLLARS if v < value])
    people, things = _customers(new_customer)
    name = pick(rng, people) if new_customer or rng.random() < 0.5 else None
    return Case(threshold, limit, delay, value, price, rng.random() < 0.5, name, pick(rng, things))


@cache
def _grammar(section: str) -> Grammar:
    return Grammar(read_toml("support.toml")[section])


def wording(rng: Random) -> Wording:
    """Wording of the corpus."""
    # The tone stands before or after the request, at the same place for angry and calm customers.
    before = rng.random() < 0.5

    def tone(mood: str) -> tuple[str, str]:
        said = _grammar("tone").sample(f"{mood}_{'before' if before else 'after'}", rng)
        return (said, "") if before else ("", said)

    return Wording(
        _grammar("policy").sample("policy", rng),
        _grammar("request").sample("request", rng),
        _grammar("request").sample("named", rng),
        _grammar("request").sample("unnamed", rng),
        tone("angry"),
        tone("calm"),
        {decision: _grammar("reply").sample(decision, rng) for decision in _DECISIONS},
    )


def _slots(case: Case) -> dict[str, str]:
    slots = {key: str(value) for key, value in asdict(case).items()}
    days = f"{case.delay} {'day' if case.delay == 1 else plural('day')}"
    return slots | {"delay": days, "a_thing": with_article(case.thing)}


def messages(case: Case, wording: Wording) -> tuple[Message, Message]:
    """The policy as system prompt, and the request."""
    slots = _slots(case)
    before, after = wording.angry if case.angry else wording.calm
    parts = (wording.named if case.name else wording.unnamed, before, wording.request, after)
    request = " ".join(part for part in parts if part).format(**slots)
    return Message("system", wording.policy.format(**slots)), Message("user", request)


def reply(case: Case, wording: Wording) -> Message:
    """The assistant's decision with its reason."""
    return Message("assistant", wording.replies[decide(case)].format(**_slots(case)))


def conversation(rng: Random) -> Conversation:
    """A chat with one request, or with two under the same policy where they are short enough."""
    first, said = case(rng), wording(rng)
    turns = (*messages(first, said), reply(first, said))
    second, said = case(rng, policy=(first.threshold, first.limit)), wording(rng)
    longer = (*turns, messages(second, said)[1], reply(second, said))
    short_enough = len(render(longer)) <= _LONGEST
    return Conversation(longer if short_enough else turns, decide(first))


def document(rng: Random) -> str:
    return render(conversation(rng).messages)


# -- items


def _item(case: Case, wording: Wording, split: str, detail: Mapping[str, str] | None = None) -> Item:
    decision, chat = decide(case), messages(case, wording)
    facts = {key: str(value) for key, value in asdict(case).items() if key not in ("angry", "name")}
    facts |= {"anger": "angry" if case.angry else "calm", "name": case.name or "", "decision": decision}
    return Item(
        "support",
        render(chat, open_answer=True),
        _OPENINGS[decision],
        "|".join(opening for other, opening in _OPENINGS.items() if other != decision),
        case.name or case.thing,
        split,
        chat,
        facts | dict(detail or {}),
    )


def _new_request(rng: Random, case: Case, wording: Wording, frame: str) -> tuple[Case, Wording]:
    """The case in a request and a tone of new wording, without the usual beginning."""
    frames = read_toml("frames_support.toml")
    # A frame that names the customer needs one.
    name = (case.name or pick(rng, _customers(False)[0])) if "{name}" in frame else None
    angry, calm = ((pick(rng, frames[f"support_{mood}"]["frames"]), "") for mood in ("angry", "calm"))
    return replace(case, name=name), replace(wording, request=frame, named="", unnamed="", angry=angry, calm=calm)


def item_sets(seed: int = 0, n: int = 400) -> list[ItemSet]:
    """Every set about support, `n` items each, with the decisions in turn."""
    sets: list[tuple[str, str, list[Item]]] = []
    for name, measures in (
        ("support/seen", "decides on a refund by the written policy"),
        ("support/held_out", "decides on a refund for names and things that no such chat has"),
        ("support/held_out_delay", "approves or refuses by pairs of a threshold and a delay that no such chat has"),
    ):
        rng, split = _rng(name, seed), name.split("/")[1]
        new_customer, new_delay = split == "held_out", split == "held_out_delay"
        asked = _DECISIONS[:2] if new_delay else _DECISIONS
        cases = [case(rng, asked[i % len(asked)], new_customer=new_customer, new_delay=new_delay) for i in range(n)]
        sets.append((name, measures, [_item(one, wording(rng), split) for one in cases]))

    # The same orders in the same words in both sets, item by item: only the tone differs.
    rng = _rng("support/tone", seed)
    pairs = [(case(rng, _DECISIONS[i % 3]), wording(rng)) for i in range(n)]
    for mood in ("angry", "calm"):
        items = [
            _item(replace(one, angry=mood == "angry"), said, "seen", {"pair": str(i)})
            for i, (one, said) in enumerate(pairs)
        ]
        sets.append((f"support/{mood}", f"decides by the policy for {mood} customers, the same orders", items))

    for name, measures in (
        ("support", "decides on a refund by the written policy, for requests in new wording"),
        ("support_policy", "decides on a refund by a policy in new wording"),
    ):
        rng, frames = _rng(f"new_wording/{name}", seed), read_toml("frames_support.toml")[name]["frames"]
        items = []
        for i in range(n):
            # Decisions change with every item, so no frame always has the same one.
            frame, one, said = frames[i % len(frames)], case(rng, _DECISIONS[i % 3]), wording(rng)
            if name == "support":
                one, said = _new_request(rng, one, said, frame)
            else:
                said = replace(said, policy=frame)
            items.append(_item(one, said, "new_wording", {"frame": frame}))
        sets.append((f"new_wording/{name}", measures, items))
    return [ItemSet(name, measures, "starts_with", tuple(items), "") for name, measures, items in sets]
