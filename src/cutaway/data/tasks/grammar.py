"""Pairs about English grammar: agreement, pronouns, and how a sentence that was begun must end."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cutaway.data.pairs import PromptPair
from cutaway.data.tasks.wording import Split, pair_from, task_wording

if TYPE_CHECKING:
    from cutaway.model.language_model import LanguageModel


def _either_way(rng: random.Random, pair: PromptPair) -> PromptPair:
    return pair if rng.random() < 0.5 else pair.swapped()


def subject_verb(rng: random.Random, _: LanguageModel, split: Split) -> Iterator[PromptPair]:
    """A verb that agrees with its subject."""
    wording, nouns = task_wording("subject_verb"), task_wording("words")["nouns"]
    while True:
        template, (one, many), verb = rng.choice(wording[split]), rng.choice(nouns), rng.choice(wording["verbs"])
        forms = (f" {verb[0]}", f" {verb[1]}")
        yield _either_way(rng, pair_from(template, {"noun": one}, {"noun": many}, *forms, {"subject": "noun"}))


def agreement_across(rng: random.Random, _: LanguageModel, split: Split) -> Iterator[PromptPair]:
    """A verb that agrees with its subject, and not with the noun of the other number between them."""
    wording, nouns = task_wording("agreement_across"), task_wording("words")["nouns"]
    while True:
        template, verb = rng.choice(wording[split]), rng.choice(wording["verbs"])
        (one, many), others = rng.sample(nouns, 2)
        clean_is_one = rng.random() < 0.5
        other = others[clean_is_one]
        pair = pair_from(
            template,
            {"noun": one if clean_is_one else many, "other": other},
            {"noun": many if clean_is_one else one, "other": other},
            f" {verb[not clean_is_one]}",
            f" {verb[clean_is_one]}",
            {"subject": "noun", "distractor": "other"},
        )
        yield pair


def determiner_noun(rng: random.Random, _: LanguageModel, split: Split) -> Iterator[PromptPair]:
    """A noun that agrees with its determiner."""
    wording, words = task_wording("determiner_noun"), task_wording("words")
    while True:
        template, (one, many) = rng.choice(wording[split]), rng.choice(wording["determiners"])
        nouns, name = rng.choice(words["nouns"]), rng.choice(words["names"])
        pair = pair_from(
            template,
            {"name": name, "det": one},
            {"name": name, "det": many},
            f" {nouns[0]}",
            f" {nouns[1]}",
            {"determiner": "det"},
        )
        yield _either_way(rng, pair)


def pronoun(rng: random.Random, _: LanguageModel, split: Split) -> Iterator[PromptPair]:
    """A pronoun that fits the name it stands for."""
    wording, words = task_wording("pronoun"), task_wording("words")
    while True:
        template, girl, boy = rng.choice(wording[split]), rng.choice(words["girls"]), rng.choice(words["boys"])
        pair = pair_from(
            template,
            {"kind": "girl", "name": girl},
            {"kind": "boy", "name": boy},
            " she",
            " he",
            {"name": "name" if "{name}" in template else "kind"},
        )
        yield _either_way(rng, pair)


def reflexive(rng: random.Random, _: LanguageModel, split: Split) -> Iterator[PromptPair]:
    """A reflexive pronoun that agrees with its subject."""
    wording = task_wording("reflexive")
    while True:
        template, (many, one) = rng.choice(wording[split]), rng.choice(wording["subjects"])
        forms = (" themselves", " himself")
        yield _either_way(rng, pair_from(template, {"noun": many}, {"noun": one}, *forms, {"subject": "noun"}))


def question_mark(rng: random.Random, _: LanguageModel, split: Split) -> Iterator[PromptPair]:
    """A question that ends as one."""
    wording, words = task_wording("question_mark"), task_wording("words")
    nouns = (*words["things"], *words["places"])
    while True:
        ask, tell = rng.choice(wording[split])
        fillers = {"noun": rng.choice(nouns), "name": rng.choice(words["names"])}
        roles = {"noun": "noun"}
        yield _either_way(rng, pair_from((ask, tell), fillers, fillers, "?", ".", roles))


def closing_quote(rng: random.Random, _: LanguageModel, split: Split) -> Iterator[PromptPair]:
    """Speech that was opened with a quotation mark is closed with one."""
    wording, names = task_wording("closing_quote"), task_wording("words")["names"]
    while True:
        template, plain = rng.choice(wording[split]), f" {rng.choice(wording['plain'])}"
        name, end = rng.choice(names), rng.choice(wording["ends"])
        speech = {"name": name, "open": ' "', "end": end}
        other = {"name": name, "open": plain, "end": f" {end}"}
        # with the full stop in the answers, tokenizers that write ." as one token and those that do not both align
        yield pair_from(template, speech, other, '."', ". The", {"opening": "open"})
