"""Two-line verses: the first line's last word decides the second line's, and with it the words before that.

`data/rhymes.csv` gives every word exactly one partner of the same sound. The second line's verb (and adjective) belong
to the class of the partner, so a model that writes them well has planned the rhyme. Never in any verse: a fifth of the
combinations of a pair and a family of second lines, and a tenth of the pairs from the second word to the first.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import cache
from random import Random
from typing import NamedTuple

from cutaway.subjects.world.facts import read_text, read_toml, words
from cutaway.subjects.world.grammar import Grammar
from cutaway.subjects.world.held_out import held_out
from cutaway.subjects.world.items.items import Item, ItemSet, Scoring, _rng
from cutaway.subjects.world.morphology import upper_first
from cutaway.subjects.world.statements.tasks import pick


class Rhyme(NamedTuple):
    """A word and its partner, in the direction in which a verse tells them."""

    family: str
    word: str
    word_class: str
    rhyme: str
    rhyme_class: str
    pair: str  # the table's first word of the two, the same in both directions


class Couplet(NamedTuple):
    """A verse without its last word, `prompt` + " " + `rhymes.rhyme` + ".", and the part of it before the verb."""

    rhymes: Rhyme
    second: str  # family of the second line
    verb: str
    before_verb: str
    prompt: str

    def __str__(self) -> str:
        return f"{self.prompt} {self.rhymes.rhyme}."


@cache
def rhymes() -> tuple[Rhyme, ...]:
    """Every pair of the table in both directions."""
    out = []
    for row in csv.DictReader(read_text("rhymes.csv").splitlines()):
        one = Rhyme(**row, pair=row["word"])
        out += [one, Rhyme(one.family, one.rhyme, one.rhyme_class, one.word, one.word_class, one.pair)]
    return tuple(out)


def _never_told(rhyme: Rhyme) -> bool:
    """A direction that no verse of the corpus has: the partner is met last only, its word first only."""
    return rhyme.word != rhyme.pair and held_out(f"rhyme_direction{rhyme.pair}", 0.10)


def never_combined(rhyme: Rhyme, second: str) -> bool:
    """A pair that the corpus never ends in this family of second lines, in neither direction."""
    return held_out(f"couplet{rhyme.pair}|{second}", 0.20)


@cache
def told(held_out_direction: bool = False) -> tuple[Rhyme, ...]:
    """The directed pairs that the corpus tells, or those that it never tells."""
    return tuple(rhyme for rhyme in rhymes() if _never_told(rhyme) == held_out_direction)


@cache
def families() -> tuple[str, ...]:
    """Families of second lines."""
    return tuple(read_toml("couplets.toml")["second"])


@cache
def grammar() -> Grammar:
    """All wording: the rule ``line`` makes first lines, ``second_NAME`` the second lines of a family."""
    table = read_toml("couplets.toml")
    seconds = {f"second_{name}": one["lines"] for name, one in table["second"].items()}
    return Grammar({**table["first"], **seconds, **table["shared"]})


@cache
def _people() -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]:
    named = [(name, "he") for name in words("male_names")] + [(name, "she") for name in words("female_names")]
    return tuple((who, they) for who, they in read_toml("couplets.toml")["people"]), tuple(named)


def couplet(rng: Random, rhyme: Rhyme, apart: bool = False) -> Couplet:
    """A verse that ends in the rhyme; its second line is of a family that is (or, when `apart`, never is) told with it.

    Raises `ValueError` where the rhyme has no family of that kind.
    """
    allowed = [name for name in families() if never_combined(rhyme, name) == apart]
    if not allowed:
        raise ValueError(f"{rhyme.word!r} has no second line that is {'held out' if apart else 'told'}")
    second = pick(rng, allowed)
    who, they = pick(rng, _people()[rng.random() < 0.4])
    first = upper_first(grammar().sample("line", rng).format(who=who, word=rhyme.word))
    before, after = grammar().sample(f"second_{second}", rng).split("{verb}")
    of_class = read_toml("couplets.toml")["classes"][rhyme.rhyme_class]
    verb, adjective = pick(rng, of_class["verbs"]), pick(rng, of_class["adjectives"])
    before_verb = f"{first},\n{upper_first(before.format(they=they)).rstrip()}"
    ending = after.replace("{adjective}", adjective).replace(" {rhyme}", "")
    return Couplet(rhyme, second, verb, before_verb, f"{before_verb} {verb}{ending}")


def document(rng: Random) -> str:
    """One to three verses about different pairs, with an empty line between them."""
    chosen: list[Rhyme] = []
    n = rng.randint(1, 3)
    while len(chosen) < n:
        rhyme = pick(rng, told())
        if rhyme.pair not in {other.pair for other in chosen}:
            chosen.append(rhyme)
    return "\n\n".join(str(couplet(rng, rhyme)) for rhyme in chosen)


# -- items


def _other_noun(rng: Random, rhyme: Rhyme) -> str:
    """A noun of the partner's class that does not rhyme."""
    return pick(rng, [r.rhyme for r in rhymes() if r.rhyme_class == rhyme.rhyme_class and r.family != rhyme.family])


def _detail(rhyme: Rhyme, **more: str) -> dict[str, str]:
    return {"word": rhyme.word, "rhyme": rhyme.rhyme, "class": rhyme.rhyme_class, "family": rhyme.family, **more}


def _rhyme_set(name: str, measures: str, split: str, pairs: Sequence[Rhyme], apart: bool, seed: int, n: int) -> ItemSet:
    rng = _rng(name, seed)
    pairs = [r for r in pairs if any(never_combined(r, second) == apart for second in families())]
    items = []
    for _ in range(n):
        rhyme = pick(rng, pairs)
        made = couplet(rng, rhyme, apart)
        detail = _detail(rhyme, second=made.second, verb=made.verb)
        answer, other = rhyme.rhyme, _other_noun(rng, rhyme)
        items.append(Item("couplets", made.prompt, answer, other, rhyme.word, split, None, detail))
    return ItemSet(name, measures, "exact", tuple(items))


def _verb_set(seed: int, n: int) -> ItemSet:
    """Only the planned partner tells which verb fits: first lines are the same for every class.

    Right and wrong class are drawn evenly, so that a model with a liking for one class gets half of them.
    """
    name = "couplets/verb"
    rng = _rng(name, seed)
    classes = read_toml("couplets.toml")["classes"]
    items = []
    for _ in range(n):
        right, wrong = rng.sample(tuple(classes), 2)
        rhyme = pick(rng, [one for one in told() if one.rhyme_class == right])
        made = couplet(rng, rhyme)
        # The first words are compared; "to" after them is the same for any verb of motion.
        answer, other = made.verb.split()[0], pick(rng, classes[wrong]["verbs"]).split()[0]
        detail = _detail(rhyme, second=made.second, verb=made.verb, other_class=wrong)
        items.append(Item("couplets", made.before_verb, answer, other, rhyme.word, "seen", None, detail))
    scored: Scoring = "logit_difference"
    return ItemSet(name, "chooses a verb that fits the rhyme to come", scored, tuple(items))


def _new_wording_set(seed: int, n: int) -> ItemSet:
    name = "new_wording/couplets"
    rng = _rng(name, seed)
    frames = read_toml("frames_couplets.toml")["couplets"]["frames"]
    items = []
    for i in range(n):
        rhyme, frame = pick(rng, told()), frames[i % len(frames)]
        verb = pick(rng, read_toml("couplets.toml")["classes"][rhyme.rhyme_class]["verbs"])
        detail = _detail(rhyme, frame=frame, verb=verb)
        prompt = frame.format(word=rhyme.word, verb=verb)
        answer, other = rhyme.rhyme, _other_noun(rng, rhyme)
        items.append(Item("couplets", prompt, answer, other, rhyme.word, "new_wording", None, detail))
    return ItemSet(name, "ends a verse in the right rhyme, in new wording", "exact", tuple(items))


def item_sets(seed: int = 0, n: int = 400) -> list[ItemSet]:
    """Verses to be ended: usual ones, held-out combinations, held-out directions, new wording; and the verb before."""
    ends = "ends a verse in the right rhyme"
    backwards = f"{ends}, for pairs that the corpus tells in the other direction only"
    return [
        _rhyme_set("couplets/seen", ends, "seen", told(), False, seed, n),
        _rhyme_set(
            "couplets/held_out",
            f"{ends}, for pairs and second lines never met together",
            "held_out",
            told(),
            True,
            seed,
            n,
        ),
        _rhyme_set("couplets/held_out_direction", backwards, "held_out_direction", told(True), False, seed, n),
        _verb_set(seed, n),
        _new_wording_set(seed, n),
    ]
