"""Pairs about who is who: names that come back, and the one who has not just acted."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cutaway.data.pairs import PromptPair
from cutaway.data.tasks.wording import Split, pair_from, task_wording

if TYPE_CHECKING:
    from cutaway.model.language_model import LanguageModel

_IOI_ROLES = {"IO": ("io", 0), "S1": ("subject", 0), "S2": ("s", -1)}


def name_copy(rng: random.Random, _: LanguageModel, split: Split) -> Iterator[PromptPair]:
    """A name that the text has named before."""
    wording, words = task_wording("name_copy"), task_wording("words")
    while True:
        template = rng.choice(wording[split])
        kind = "girls" if " girl " in template else "boys" if " boy " in template else "names"
        a, b = rng.sample(words[kind], 2)
        fillers = {"thing": rng.choice(words["things"]), "place": rng.choice(words["places"])}
        yield pair_from(template, {"a": a, **fillers}, {"a": b, **fillers}, f" {a}", f" {b}", {"name": "a"})


def ioi_pair(
    template: str, names: tuple[str, str], subject_first: bool, fillers: dict[str, str], others: tuple[str, ...] = ()
) -> PromptPair:
    """A pair of indirect object identification (Wang et al. 2022) from a template with {a}, {b} and {s}.

    `names` are the first and the second name; with `subject_first` the first acts (BABA), else the second (ABBA).
    Without `others` the corrupt prompt has the other name act, so that its answer is the clean prompt's wrong one.
    With three `others` all its names are these, in the places of IO, S1 and S2 (the paper's ABC): it has no answer.
    """
    subject, io = names if subject_first else (names[1], names[0])
    # the slots say which name is which, so that roles can be read off them
    first, second = ("subject", "io") if subject_first else ("io", "subject")
    marked = template.replace("{a}", f"{{{first}}}").replace("{b}", f"{{{second}}}")
    clean = {"io": io, "subject": subject, "s": subject, **fillers}
    corrupt = {"io": io, "subject": subject, "s": io, **fillers}
    if others:
        corrupt = dict(zip(("io", "subject", "s"), others, strict=True)) | fillers
    order = "BABA" if subject_first else "ABBA"
    return pair_from(
        marked, clean, corrupt, f" {io}", f" {subject}", _IOI_ROLES, symmetric=not others, name=f"{template} [{order}]"
    )


def _indirect_object(rng: random.Random, split: Split, with_others: bool) -> Iterator[PromptPair]:
    wording, words = task_wording("indirect_object"), task_wording("words")
    while True:
        template, names = rng.choice(wording[split]), rng.sample(words["names"], 5)
        fillers = {"place": rng.choice(words["places"]), "thing": rng.choice(words["things"])}
        others = tuple(names[2:]) if with_others else ()
        yield ioi_pair(template, (names[0], names[1]), rng.random() < 0.5, fillers, others)


def indirect_object(rng: random.Random, _: LanguageModel, split: Split) -> Iterator[PromptPair]:
    """Of two names, the one that has not just acted; the corrupt prompt has the other one act."""
    return _indirect_object(rng, split, with_others=False)


def indirect_object_abc(rng: random.Random, _: LanguageModel, split: Split) -> Iterator[PromptPair]:
    """Of two names, the one that has not just acted; the corrupt prompt has three other names."""
    return _indirect_object(rng, split, with_others=True)
