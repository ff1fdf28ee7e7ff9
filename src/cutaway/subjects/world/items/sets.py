"""Items of evaluation for every behaviour of atlas, on what the corpus never shows.

`item_sets` gives them by name. Sets whose items use the study's wording and held-out lists say what the shipped weights
were trained for; the sets of `new_wording.py` ask the same of sentences nobody trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from cutaway.subjects.world.chats import cutoff, jailbreak, open_chat, passages, roles, support
from cutaway.subjects.world.chats.items import chat_sets
from cutaway.subjects.world.facts import read_toml, words
from cutaway.subjects.world.items.items import Item, ItemSet, Scoring, _rng, from_sentence, take
from cutaway.subjects.world.items.new_wording import new_wording_sets
from cutaway.subjects.world.morphology import upper_first
from cutaway.subjects.world.statements import couplets, orders, tasks
from cutaway.subjects.world.statements.relations import Fact, Relation, one_hop, two_hop
from cutaway.subjects.world.statements.tasks import Sentence

_PARTS = (orders, couplets, open_chat, support, jailbreak, roles, passages, cutoff)


def item_sets(seed: int = 0, n: int = 400) -> dict[str, ItemSet]:
    """Every set of items by name, the same for the same seed.

    Args:
        seed: Of the draw.
        n: Items per set at most.

    Example:
        >>> item_sets(n=4)["two_hop/capital/held_out"].scored
        'exact'
    """
    sets = [
        *_one_hop_sets(seed, n),
        *_two_hop_sets(seed, n),
        *_task_sets(seed, n),
        *_in_context_sets(seed, n),
        *chat_sets(seed, n),
        *new_wording_sets(seed, n),
        *(one for module in _PARTS for one in module.item_sets(seed, n)),
    ]
    return {one.name: one for one in sets}


# -- facts


def fact_item(behaviour: str, split: str, relation: Relation, fact: Fact, frame: str) -> Item:
    """A fact asked in one frame."""
    detail = {"language": relation.language, "frame": frame, "between": fact.between}
    return Item(behaviour, fact.prompt(frame), fact.answer, None, fact.entity, split, None, detail)


def _one_hop_sets(seed: int, n: int) -> list[ItemSet]:
    """Facts in the study's frames: seen ones, the held-out frame, facts never told in a language, and both."""
    said = {
        "seen": "in frames that the corpus uses",
        "held_out_frame": "in the one frame that the corpus never uses",
        "held_out_language": "in a language in which the corpus never tells of these things",
        "held_out_both": "in a language in which the corpus never tells of these things, in a frame never used",
    }
    out = []
    for relation in one_hop():
        if not relation.study_frames:
            continue
        behaviour = f"one_hop/{relation.name}/{relation.language}"
        items: dict[str, list[Item]] = {split: [] for split in said}
        for fact in relation.facts:
            for frame in relation.study_frames:
                split = "held_out_language" if fact.held_out else "seen"
                items[split].append(fact_item(behaviour, split, relation, fact, frame))
            if relation.held_out_frame:
                split = "held_out_both" if fact.held_out else "held_out_frame"
                items[split].append(fact_item(behaviour, split, relation, fact, relation.held_out_frame))
        for split, found in items.items():
            if found:
                name = f"{behaviour}/{split}"
                measures = f"knows the fact '{relation.name}' {said[split]}"
                out.append(ItemSet(name, measures, "exact", tuple(take(found, n, _rng(name, seed)))))
    return out


def _two_hop_sets(seed: int, n: int) -> list[ItemSet]:
    """Facts through another fact, for entities the corpus does and does not use in such sentences."""
    out = []
    for relation in two_hop():
        for split in ("seen", "held_out"):
            name = f"{relation.name.replace('two_hop_', 'two_hop/')}/{split}"
            found = [
                fact_item(name.rsplit("/", 1)[0], split, relation, fact, frame)
                for fact in relation.facts
                if fact.held_out == (split == "held_out")
                for frame in relation.study_frames
            ]
            known = "used in such sentences" if split == "seen" else "never met in such sentences"
            measures = f"combines two facts ({relation.name.removeprefix('two_hop_')}) about things {known}"
            out.append(ItemSet(name, measures, "exact", tuple(take(found, n, _rng(name, seed)))))
    return out


# -- tasks


def _made(
    name: str,
    measures: str,
    scored: Scoring,
    seed: int,
    n: int,
    make: Callable[[Random], Sentence],
    split: str = "seen",
    separator: str = " ",
) -> ItemSet:
    rng = _rng(name, seed)
    behaviour = name.split("/")[0]
    return ItemSet(
        name, measures, scored, tuple(from_sentence(behaviour, split, make(rng)) for _ in range(n)), separator
    )


def _ioi_in(frames: str) -> Callable[[Random], Sentence]:
    """A maker of sentences in one of the study's lists of whole frames, with held-out pairs of names."""

    def make(rng: Random) -> Sentence:
        a, b = tasks.pair(rng, held_out=True)
        subject, other = (a, b) if rng.random() < 0.5 else (b, a)
        thing, place = tasks.pick(rng, words("objects")), tasks.pick(rng, words("places"))
        frame = tasks.pick(rng, read_toml("tasks.toml")["ioi"][frames])
        prompt = frame.format(a=a, b=b, s=subject, p=place, o=thing, a_o=tasks.with_article(thing))
        order = "BABA" if subject == a else "ABBA"
        return Sentence(prompt, other, subject, detail={"order": order, "first": a, "second": b, "frame": frame})

    return make


def _task_sets(seed: int, n: int) -> list[ItemSet]:
    def attractor(rng: Random) -> Sentence:
        while True:
            sentence = tasks.agreement(rng, study=True)
            if sentence.detail["attractor"] == "differs":
                return sentence

    def addition(rng: Random) -> Sentence:
        x, y = rng.randint(0, 49), rng.randint(0, 49)
        return Sentence(f"{x} + {y} =", str(x + y), detail={"x": str(x), "y": str(y)})

    days = words("days")
    weekdays = [
        Item(
            "weekday",
            f"{upper_first(tasks.counted(words('numbers')[k - 1], 'day'))} after {days[i]} is",
            days[(i + k) % 7],
            None,
            days[i],
            "seen",
        )
        for i in range(7)
        for k in range(1, 7)
    ]
    study_binding = read_toml("tasks.toml")["binding"]["study"][0]
    return [
        _made(
            "ioi/seen",
            "names the person not named twice, with pairs of names and clauses like the corpus's",
            "exact",
            seed,
            n,
            lambda r: tasks.ioi(r, study=True),
        ),
        _made(
            "ioi/held_out",
            "names the person not named twice, with pairs of names and combinations of clauses never used",
            "exact",
            seed,
            n,
            lambda r: tasks.ioi(r, held_out=True, study=True),
            "held_out",
        ),
        _made(
            "ioi/study_new_wording",
            "names the person not named twice, in the study's four sentences of another kind",
            "exact",
            seed,
            n,
            _ioi_in("study_new_wording"),
            "new_wording",
        ),
        _made(
            "ioi/plain",
            "names the person not named twice, in nine plain sentences with pairs of names never used",
            "exact",
            seed,
            n,
            _ioi_in("study_plain"),
            "held_out",
        ),
        _made(
            "greater_than/seen",
            "completes a span with a later year",
            "greater_than",
            seed,
            n,
            lambda r: tasks.greater_than(r, study=True),
            separator="",
        ),
        _made(
            "greater_than/held_out",
            "completes a span with a later year, for events and first years never used together",
            "greater_than",
            seed,
            n,
            lambda r: tasks.greater_than(r, held_out=True, study=True),
            "held_out",
            "",
        ),
        _made(
            "agreement",
            "verb agrees with its subject across another noun",
            "logit_difference",
            seed,
            n,
            lambda r: tasks.agreement(r, study=True),
        ),
        _made(
            "agreement/attractor",
            "verb agrees with its subject when the noun between has the other number",
            "logit_difference",
            seed,
            n,
            attractor,
        ),
        _made(
            "pronoun",
            "pronoun fits the first name",
            "logit_difference",
            seed,
            n,
            lambda r: tasks.pronoun(r, study=True),
        ),
        _made(
            "sentiment",
            "conclusion fits the opinion",
            "logit_difference",
            seed,
            n,
            lambda r: tasks.sentiment(r, study=True),
        ),
        _made(
            "truth/held_out",
            "says true or false of statements never judged",
            "logit_difference",
            seed,
            n,
            lambda r: tasks.truth(r, held_out=True, study=True),
            "held_out",
        ),
        _made(
            "binding",
            "keeps apart which of two things has which colour",
            "exact",
            seed,
            n,
            lambda r: tasks.binding(r, study_binding),
        ),
        _made("addition", "adds two numbers below 50", "exact", seed, n, addition),
        ItemSet("weekday", "counts days on from a weekday", "exact", tuple(take(weekdays, n, _rng("weekday", seed)))),
    ]


def _in_context_sets(seed: int, n: int) -> list[ItemSet]:
    return [
        _made(
            f"in_context/{task}",
            f"follows six examples of '{task}' on a word that never stands in such examples",
            "exact",
            seed,
            min(n, 100),
            lambda r, task=task: tasks.in_context(r, held_out=True, task=task, examples=6, study=True),
            "held_out",
        )
        for task in tasks.in_context_tasks()
    ]
