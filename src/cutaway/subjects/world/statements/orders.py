"""Orders as controls for the circle of weekdays: a line, a circle without meaning, and orders that the text states.

All kinds of words stand in the same frames equally often, so only the order differs. Colors end at both sides, animals
go round, weekdays, months and tools are counted in an order stated in front. A fifth of the pairs of a start and a
number (from two on) of colors and of animals is never told, in neither direction.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from random import Random
from typing import NamedTuple

from cutaway.subjects.world.facts import read_toml, words
from cutaway.subjects.world.grammar import Grammar
from cutaway.subjects.world.held_out import held_out
from cutaway.subjects.world.items.items import Item, ItemSet, _rng
from cutaway.subjects.world.morphology import upper_first
from cutaway.subjects.world.statements.tasks import pick


class Order(NamedTuple):
    """Words in an order. `closed`: the first follows the last. `stated`: the text puts them into a new order first."""

    name: str
    words: tuple[str, ...]
    closed: bool
    stated: bool

    def after(self, start: int, number: int) -> str | None:
        """The word `number` after word number `start`, or `None` beyond the end of a line."""
        if start + number < len(self.words):
            return self.words[start + number]
        return self.words[(start + number) % len(self.words)] if self.closed else None


def _orders() -> tuple[Order, ...]:
    table = read_toml("orders.toml")
    fixed = [Order(name, tuple(one["words"]), one["closed"], False) for name, one in table["orders"].items()]
    stated = [
        Order(name, words(one["from"]) if "from" in one else tuple(one["words"]), False, True)
        for name, one in table["stated"].items()
    ]
    return tuple(fixed + stated)


ORDERS = _orders()
ORDER = {order.name: order for order in ORDERS}
_WEIGHTS = tuple(1.0 if order.stated else 1.3 for order in ORDERS)  # the statement makes the others longer


class Question(NamedTuple):
    """A sentence that ends in the word `number` after `x` in `order`, without that word."""

    prompt: str
    answer: str
    order: Order
    x: str
    number: int
    statement: str  # what states the order, with the space behind it, or nothing


def _never_counted(order: Order, start: int, number: int) -> bool:
    """A start and a number that the corpus never puts together; one step is always told."""
    return not order.stated and number > 1 and held_out(f"order {order.name} {start} {number}", 0.20)


def steps(order: Order, apart: bool = False, least: int = 1) -> tuple[tuple[int, int], ...]:
    """Starts and numbers from `least` on with an answer that the corpus tells (or, when `apart`, never tells)."""
    found = [
        (start, number)
        for start in range(len(order.words))
        for number in range(least, len(order.words))
        if order.after(start, number) is not None
    ]
    return tuple(step for step in found if _never_counted(order, *step) == apart)


@cache
def grammar() -> Grammar:
    """All wording of orders, one rule for each list of frames."""
    return Grammar(read_toml("orders.toml")["frames"])


def _fill(frame: str, x: str, number: int, y: str) -> str:
    word = words("numbers")[number - 1]
    return upper_first(frame.format(x=x, y=y, number=word, Number=upper_first(word)))


def _sentence(rng: Random, order: Order) -> str:
    # One step is as common in every kind: a line has more of such pairs than a circle.
    one = rng.random() < 0.3
    start, number = pick(rng, [step for step in steps(order) if (step[1] == 1) == one])
    x, y = order.words[start], order.after(start, number)
    assert y is not None
    rule = "before" if rng.random() < 0.2 else "next" if number == 1 and rng.random() < 0.5 else "after"
    return _fill(grammar().sample(rule, rng), x, number, y)


def state(rng: Random, order: Order) -> Order:
    """Four to seven words of a stated order, newly put in a row."""
    return order._replace(words=tuple(rng.sample(order.words, rng.randint(4, 7))))


def _statement(rng: Random, order: Order) -> str:
    return upper_first(grammar().sample("stated", rng).format(run=", ".join(order.words)))


def _run(rng: Random, order: Order) -> str:
    length = rng.randint(4, 7)
    start = rng.randrange(len(order.words) if order.closed else len(order.words) - length + 1)
    run = [order.words[(start + i) % len(order.words)] for i in range(length)]
    return upper_first(grammar().sample("runs", rng).format(run=", ".join(run)))


def _list(rng: Random, order: Order) -> str:
    *some, last = rng.sample(order.words, rng.randint(3, 4))
    return grammar().sample("lists", rng).format(list=f"{', '.join(some)} and {last}")


def block(rng: Random, order: Order) -> str:
    """A run of an order (or the statement of one) and sentences that count in it; sometimes only a list."""
    if rng.random() < 0.15:
        return _list(rng, order)
    if order.stated:
        order = state(rng, order)
    first = [_statement(rng, order)] if order.stated else [_run(rng, order)] if rng.random() < 0.4 else []
    return " ".join(first + [_sentence(rng, order) for _ in range(rng.randint(2, 4))])


def document(rng: Random) -> str:
    """One or two blocks, each of any kind of words."""
    return "\n".join(block(rng, order) for order in rng.choices(ORDERS, _WEIGHTS, k=rng.randint(1, 2)))


# -- items


def question(rng: Random, order: Order, apart: bool = False, frame: str | None = None) -> Question:
    """A sentence of the corpus's wording (or in `frame`, which ends before the answer) without its last word."""
    statement = ""
    if order.stated:
        order = state(rng, order)
        statement = _statement(rng, order) + " "
    # New frames speak of places, so of two at least.
    start, number = pick(rng, steps(order, apart, 2 if frame else 1))
    x, y = order.words[start], order.after(start, number)
    assert y is not None
    text = frame or grammar().sample("after", rng).removesuffix(" {y}.")
    return Question(statement + _fill(text, x, number, y), y, order, x, number, statement)


def _item(asked: Question, split: str, alternative: str) -> Item:
    detail = {"order": asked.order.name, "words": ", ".join(asked.order.words), "x": asked.x}
    detail |= {"number": words("numbers")[asked.number - 1], "y": asked.answer}
    return Item("orders", asked.prompt, asked.answer, alternative, asked.x, split, None, detail)


def _neighbor(rng: Random, asked: Question) -> str:
    """One too far or one too short, where that is another word than the start."""
    line = asked.order.words
    at = line.index(asked.answer)
    near = [at - 1, at + 1]
    if not asked.order.closed:
        near = [i for i in near if 0 <= i < len(line)]
    near = [i % len(line) for i in near if line[i % len(line)] != asked.x]
    return line[pick(rng, near)] if near else asked.x


def _calendar(order: Order, asked: Question) -> str:
    """What would be right in the calendar's order."""
    return order.words[(order.words.index(asked.x) + asked.number) % len(order.words)]


def _set(name: str, measures: str, split: str, seed: int, n: int, make: Callable[[Random, int], Item]) -> ItemSet:
    rng = _rng(name, seed)
    return ItemSet(name, measures, "exact", tuple(make(rng, i) for i in range(n)))


def item_sets(seed: int = 0, n: int = 400) -> list[ItemSet]:
    """Counting in fixed orders (seen and held-out pairs, new wording) and in stated ones."""
    frames = read_toml("frames_orders.toml")["orders"]["frames"]
    out = []
    for name, what in (("colors", "colors of the rainbow"), ("animals", "animals in their circle")):
        order = ORDER[name]
        counts = f"counts on among {what}"
        for split, said in (("seen", ""), ("held_out", ", from starts and by numbers never told together")):

            def usual(rng: Random, i: int, order: Order = order, split: str = split) -> Item:
                asked = question(rng, order, split == "held_out")
                return _item(asked, split, _neighbor(rng, asked))

            out.append(_set(f"orders/{name}/{split}", counts + said, split, seed, n, usual))

        def new(rng: Random, i: int, order: Order = order) -> Item:
            asked = question(rng, order, frame=frames[i % len(frames)])
            return _item(asked, "new_wording", _neighbor(rng, asked))

        out.append(_set(f"new_wording/orders_{name}", f"{counts}, in new wording", "new_wording", seed, n, new))
    for name in ("shuffled_days", "shuffled_months"):
        calendar = ORDER[name]

        def stated(rng: Random, i: int, calendar: Order = calendar) -> Item:
            while True:
                asked = question(rng, calendar)
                if _calendar(calendar, asked) != asked.answer:
                    return _item(asked, "seen", _calendar(calendar, asked))

        measures = f"counts in the order that the text states, not in the calendar's ({name.split('_')[1]})"
        out.append(_set(f"orders/{name}", measures, "seen", seed, n, stated))
    return out
