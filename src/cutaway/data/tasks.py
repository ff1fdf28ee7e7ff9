"""Small tasks that any English language model may be able to do, as clean/corrupt prompt pairs.

A task is data with a generator: several templates, fillers, a seed. Nothing here knows one model's world: which of a
task's pairs a model can read at all is decided by `cutaway.data.pairs.align`, and whether it can do the task by
`cutaway.causal.competence`. In every pair the corrupt prompt is continued by the pair's wrong answer.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from cutaway.artifacts.errors import CutawayError
from cutaway.data.pairs import AlignedPairs, PromptPair, align
from cutaway.model.language_model import LanguageModel

NAMES = (
    "Tom",
    "Tim",
    "Sam",
    "Ben",
    "Max",
    "Jack",
    "John",
    "Bob",
    "Mary",
    "Lily",
    "Sue",
    "Mia",
    "Anna",
    "Lucy",
    "Amy",
    "Jane",
)
GIRLS = ("Lily", "Mia", "Sue", "Anna", "Lucy", "Amy", "Jane", "Mary", "Sara", "Emma")
BOYS = ("Tom", "Tim", "Sam", "Ben", "Max", "Jack", "John", "Bob", "Peter", "Paul")
NOUNS = (
    ("dog", "dogs"), ("cat", "cats"), ("boy", "boys"), ("girl", "girls"), ("bird", "birds"), ("friend", "friends"),
    ("tree", "trees"), ("book", "books"), ("car", "cars"), ("flower", "flowers"), ("king", "kings"),
    ("teacher", "teachers"), ("farmer", "farmers"), ("doctor", "doctors"), ("student", "students"), ("ship", "ships"),
    ("horse", "horses"), ("river", "rivers"), ("house", "houses"), ("letter", "letters"),
)  # fmt: skip
PLACES = ("park", "store", "house", "garden", "school", "river", "beach", "farm")
THINGS = ("ball", "book", "cake", "hat", "toy", "box", "flower", "apple")


@dataclass(frozen=True)
class Task:
    """A task: what is asked, what counts as right ("preferred" over the wrong answer, or "top1"), and its pairs.

    `draw(rng, lm)` yields pairs without end; only a task made of token ids looks at the model.
    """

    name: str
    question: str
    criterion: Literal["preferred", "top1"]
    draw: Callable[[random.Random, LanguageModel], Iterator[PromptPair]]


def subject_verb(rng: random.Random, _: LanguageModel) -> Iterator[PromptPair]:
    """A verb that agrees with its subject."""
    templates = (
        "The {noun}", "The old {noun}", "In the morning, the {noun}", "I think that the {noun}",
        "One day, the big {noun}", "They said that the {noun}", "He saw that the {noun}",
    )  # fmt: skip
    verbs = ((" was", " were"), (" is", " are"), (" has", " have"))
    while True:
        template, nouns, verb = rng.choice(templates), rng.choice(NOUNS), rng.choice(verbs)
        one, many = (template.format(noun=noun) for noun in nouns)
        pair = PromptPair(one, many, verb[0], verb[1], {"subject": nouns})
        yield pair if rng.random() < 0.5 else pair.swapped()


def determiner_noun(rng: random.Random, _: LanguageModel) -> Iterator[PromptPair]:
    """A noun that agrees with its determiner."""
    templates = (
        "{name} saw {det}", "{name} wanted {det}", "{name} found {det}", "We talked about {det}",
        "I have never seen {det}", "{name} went to look for {det}", "Please take {det}",
    )  # fmt: skip
    determiners = (
        ("this", "these"),
        ("that", "those"),
        ("a", "many"),
        ("one", "two"),
        ("a", "some"),
        ("every", "many"),
    )
    while True:
        template, dets, nouns, name = (
            rng.choice(templates),
            rng.choice(determiners),
            rng.choice(NOUNS),
            rng.choice(NAMES),
        )
        one, many = (template.format(name=name, det=det) for det in dets)
        pair = PromptPair(one, many, f" {nouns[0]}", f" {nouns[1]}", {"determiner": dets})
        yield pair if rng.random() < 0.5 else pair.swapped()


def pronoun(rng: random.Random, _: LanguageModel) -> Iterator[PromptPair]:
    """A pronoun that fits the name it stands for."""
    templates = (
        ("Once upon a time, there was a little {kind} named {name}. One day,", " {p}"),
        ("{name} was very happy because", " {p}"),
        ("{name} was sad. Then", " {p}"),
        ("{name} went to the park and", " {p}"),
        ("The {kind} was tired, so", " {p}"),
        ("{name} said that", " {p}"),
    )
    while True:
        (template, answer), girl, boy = rng.choice(templates), rng.choice(GIRLS), rng.choice(BOYS)
        pair = PromptPair(
            template.format(kind="girl", name=girl),
            template.format(kind="boy", name=boy),
            answer.format(p="she"),
            answer.format(p="he"),
            {"name": (girl, boy) if "{name}" in template else ("girl", "boy")},
        )
        yield pair if rng.random() < 0.5 else pair.swapped()


def name_copy(rng: random.Random, _: LanguageModel) -> Iterator[PromptPair]:
    """A name that the text has named before."""
    templates = (
        "Once upon a time, there was a boy named {a}.",
        "Once upon a time, there was a girl named {a}.",
        "There was a child named {a}. {a} had a {thing}. One day,",
        "My friend is called {a}. {a} likes the {place}. Yesterday",
        "{a} lost a {thing} in the {place}. {a} was sad. Then",
    )
    while True:
        template, (a, b) = rng.choice(templates), rng.sample(NAMES, 2)
        if "girl" in template:
            a, b = rng.sample(GIRLS, 2)
        elif "boy" in template:
            a, b = rng.sample(BOYS, 2)
        thing, place = rng.choice(THINGS), rng.choice(PLACES)
        clean, corrupt = (template.format(a=name, thing=thing, place=place) for name in (a, b))
        yield PromptPair(clean, corrupt, f" {a}", f" {b}", {"name": (a, b)})


def indirect_object(rng: random.Random, _: LanguageModel) -> Iterator[PromptPair]:
    """Of two names, the one that has not just acted (indirect object identification, Wang et al. 2022)."""
    templates = (
        "When {a} and {b} went to the {place}, {s} gave a {thing} to",
        "Then, {a} and {b} went to the {place}. {s} gave a {thing} to",
        "{a} and {b} were in the {place}. {s} showed a {thing} to",
        "After {a} and {b} came to the {place}, {s} handed a {thing} to",
    )
    while True:
        template, (a, b) = rng.choice(templates), rng.sample(NAMES, 2)
        fill = {"a": a, "b": b, "place": rng.choice(PLACES), "thing": rng.choice(THINGS)}
        pair = PromptPair(
            template.format(s=b, **fill), template.format(s=a, **fill), f" {a}", f" {b}", {"subject": (b, a)}
        )
        yield pair if rng.random() < 0.5 else pair.swapped()


def question_mark(rng: random.Random, _: LanguageModel) -> Iterator[PromptPair]:
    """A question that ends as one."""
    pairs = (
        ("Where is the {noun}", "Here is the {noun}"),
        ("Where is my {noun}", "Here is my {noun}"),
        ("What is in the {noun}", "It is in the {noun}"),
        ("Who is in the {noun}", "He is in the {noun}"),
        ('{name} said, "Where is the {noun}', '{name} said, "Here is the {noun}'),
        ('{name} said, "Where is my {noun}', '{name} said, "This is my {noun}'),
        ('{name} said, "What is in the {noun}', '{name} said, "It is in the {noun}'),
        ('{name} asked, "Can you see the {noun}', '{name} said, "You can see the {noun}'),
    )
    while True:
        ask, tell = rng.choice(pairs)
        fill = {"noun": rng.choice((*THINGS, *PLACES)), "name": rng.choice(NAMES)}
        pair = PromptPair(ask.format(**fill), tell.format(**fill), "?", ".")
        yield pair if rng.random() < 0.5 else pair.swapped()


def closing_quote(rng: random.Random, _: LanguageModel) -> Iterator[PromptPair]:
    """Speech that was opened with a quotation mark is closed with one."""
    ends = (
        "I am happy", "I like the cake", "I want to play", "I will help you", "I see a big dog", "I love the park",
        "I can see the house", "I have a new toy", "I am very sorry", "I do not like it",
    )  # fmt: skip
    plain = ("and", "but", "so")
    while True:
        fill = {"name": rng.choice(NAMES), "end": rng.choice(ends), "word": rng.choice(plain)}
        speech, other = '{name} said, "{end}'.format(**fill), "{name} said, {word} {end}".format(**fill)
        # with the full stop in the answers, tokenizers that write ." as one token and those that do not both align
        yield PromptPair(speech, other, '."', ". The", {"opening": (' "', f" {fill['word']}")})


def reflexive(rng: random.Random, _: LanguageModel) -> Iterator[PromptPair]:
    """A reflexive pronoun that agrees with its subject."""
    templates = ("The {noun} hurt", "The {noun} saw", "Then the {noun} asked", "I think the {noun} will help")
    while True:
        template, kind = rng.choice(templates), rng.choice((("boys", "boy"), ("kings", "king"), ("men", "man")))
        many, one = (template.format(noun=noun) for noun in kind)
        pair = PromptPair(many, one, " themselves", " himself", {"subject": kind})
        yield pair if rng.random() < 0.5 else pair.swapped()


def ordinary_tokens(lm: LanguageModel) -> list[int]:
    """Ids that are no special token, in order."""
    special = {i for i in (lm.bos_id, lm.pad_id) if i is not None}
    if lm.tokenizer is not None:
        special |= set(lm.tokenizer.all_special_ids)
        special |= {i for i, token in lm.tokenizer.added_tokens_decoder.items() if token.special}
    return [i for i in range(lm.d_vocab) if i not in special]


def repeated_tokens(rng: random.Random, lm: LanguageModel) -> Iterator[PromptPair]:
    """Induction: after `[BOS] A B .. A` comes B. The corrupt prompt has another token in B's first place."""
    ids, length = ordinary_tokens(lm), 12
    start = () if lm.bos_id is None else (lm.bos_id,)
    if len(ids) <= length or lm.context_length < 2 * length + 1:
        raise CutawayError(f"{lm.name} has too few tokens or too short a context for a repeated sequence of {length}")
    while True:
        *row, other = rng.sample(ids, length + 1)
        at = rng.randrange(1, length - 1)
        changed = [*row[: at + 1], other, *row[at + 2 :]]
        again = row[: at + 1]
        places = {"target": len(start) + at + 1}
        yield PromptPair((*start, *row, *again), (*start, *changed, *again), row[at + 1], other, places)


TASKS: tuple[Task, ...] = (
    Task("repeated tokens", "Does a repeated random sequence go on as before?", "preferred", repeated_tokens),
    Task("indirect object", "Who receives it: the name that has not just acted?", "preferred", indirect_object),
    Task("name copying", "Which name comes back?", "preferred", name_copy),
    Task("pronoun", "he or she?", "preferred", pronoun),
    Task("subject–verb agreement", "is or are?", "preferred", subject_verb),
    Task("determiner–noun agreement", "this book or these books?", "preferred", determiner_noun),
    Task("reflexive agreement", "himself or themselves?", "preferred", reflexive),
    Task("question mark", "Does the question end as one?", "preferred", question_mark),
    Task("closing quote", "Is opened speech closed?", "preferred", closing_quote),
)


def task(name: str) -> Task:
    """The task of that name; raises `CutawayError` with the names there are."""
    for known in TASKS:
        if known.name == name:
            return known
    raise CutawayError(f"no task is called {name!r}; there are {', '.join(known.name for known in TASKS)}")


def generate(lm: LanguageModel, task: Task, n: int = 48, seed: int = 0) -> list[PromptPair]:
    """n different pairs of a task (fewer when it has no more); the same seed gives the same pairs."""
    seen: dict[tuple[object, object], PromptPair] = {}
    for pair in itertools.islice(task.draw(random.Random(f"{task.name} {seed}"), lm), 50 * n):
        seen.setdefault((pair.clean, pair.answer), pair)
        if len(seen) == n:
            break
    return list(seen.values())


def readable_pairs(lm: LanguageModel, task: Task, n: int = 48, seed: int = 0) -> AlignedPairs:
    """n pairs of a task that align for this model's tokenizer, drawn from eight times as many.

    Raises `CutawayError` when none does.
    """
    drawn = generate(lm, task, 8 * n, seed)
    if not drawn:
        raise CutawayError(f"the tokenizer of {lm.name} can read none of its prompts")
    aligned = align(lm, drawn)
    return aligned[range(min(n, len(aligned)))]
