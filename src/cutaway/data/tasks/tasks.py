"""Small tasks that any English language model may be able to do, as clean/corrupt prompt pairs.

A task is data with a generator: wording (`tasks.toml`), fillers, a seed, and two splits that share no prompt: "search",
for looking for a circuit or a direction, and "held_out", for judging it. Nothing here knows one model's world: which of
a task's pairs a model can read at all is decided by `cutaway.data.pairs.aligned`, and whether it can do the task by
`cutaway.causal.accuracy`. The tasks of the shipped model's world are in `cutaway.subjects.world.items.pairs`.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cutaway.artifacts.errors import CutawayError
from cutaway.data.pairs import AlignedPairs, PromptPair, aligned
from cutaway.data.tasks import grammar as tasks_grammar
from cutaway.data.tasks import knowledge as tasks_knowledge
from cutaway.data.tasks import names as tasks_names
from cutaway.data.tasks.knowledge import ordinary_tokens
from cutaway.data.tasks.wording import Split

if TYPE_CHECKING:
    from cutaway.model.language_model import LanguageModel

__all__ = ["TASKS", "Split", "Task", "find_task", "generate", "ordinary_tokens", "readable_pairs", "task"]


@dataclass(frozen=True)
class Task:
    """What a model is asked, as pairs of a clean and a corrupt prompt."""

    name: str
    """What it is called, such as "indirect object"."""
    question: str
    """What is asked, in a sentence."""
    criterion: Literal["preferred", "top1"]
    """What counts as right: the answer above the wrong one, or above all tokens."""
    draw: Callable[[random.Random, LanguageModel, Split], Iterator[PromptPair]]
    """`draw(rng, lm, split)` yields pairs of one split, without end or to the last; only a task made of token ids or of
    chats looks at the model."""
    aliases: tuple[str, ...] = ()
    """Other names that it is found by."""
    note: str = ""
    """What users should know of its pairs."""


TASKS: tuple[Task, ...] = (
    Task(
        "repeated tokens",
        "Does a repeated random sequence go on as before?",
        "preferred",
        tasks_knowledge.repeated_tokens,
        ("induction",),
    ),
    Task(
        "indirect object",
        "Who receives it: the name that has not just acted?",
        "preferred",
        tasks_names.indirect_object,
        ("ioi",),
    ),
    Task("name copying", "Which name comes back?", "preferred", tasks_names.name_copy),
    Task("pronoun", "he or she?", "preferred", tasks_grammar.pronoun, ("gendered pronoun",)),
    Task(
        "subject–verb agreement", "is or are?", "preferred", tasks_grammar.subject_verb, ("agreement", "subject verb")
    ),
    Task(
        "determiner–noun agreement",
        "this book or these books?",
        "preferred",
        tasks_grammar.determiner_noun,
        ("determiner noun",),
    ),
    Task("reflexive agreement", "himself or themselves?", "preferred", tasks_grammar.reflexive, ("reflexive",)),
    Task("question mark", "Does the question end as one?", "preferred", tasks_grammar.question_mark),
    Task("closing quote", "Is opened speech closed?", "preferred", tasks_grammar.closing_quote),
    Task(
        "agreement across a noun",
        "is or are, when the noun between has the other number?",
        "preferred",
        tasks_grammar.agreement_across,
        ("agreement across", "distractor agreement"),
    ),
    Task(
        "indirect object, other names",
        "Who receives it? (against a prompt with three other names)",
        "preferred",
        tasks_names.indirect_object_abc,
        ("ioi abc",),
    ),
    Task(
        "greater than",
        "Does the span end after it began?",
        "preferred",
        tasks_knowledge.greater_than,
    ),
    Task("docstring", "Which argument is described next?", "preferred", tasks_knowledge.docstring),
    Task(
        "country capitals", "What is the capital of the country?", "preferred", tasks_knowledge.capitals, ("capitals",)
    ),
    Task("refusal", "Is the harmful request refused?", "preferred", tasks_knowledge.refusal),
)
"""The tasks for any model; `all_tasks` adds those of subjects."""


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", name.lower()).strip()


def find_task(name: str, tasks: Sequence[Task] = TASKS) -> Task:
    """The task of that name or alias among some, however it is hyphenated and written.

    Args:
        name: "IOI", "subject-verb agreement".
        tasks: The tasks; the general ones if not given.

    Raises:
        CutawayError: With the names there are.
    """
    for known in tasks:
        if _key(name) in {_key(known.name), *map(_key, known.aliases)}:
            return known
    raise CutawayError(f"no task is called {name!r}; there are {'; '.join(known.name for known in tasks)}")


def task(name: str) -> Task:
    """The general task of that name.

    Args:
        name: "indirect object", "IOI"; `TASKS` has all.

    Raises:
        CutawayError: With the names there are.
    """
    return find_task(name)


def _distinct(lm: LanguageModel, task: Task, seed: int, split: Split) -> Iterator[PromptPair]:
    """Different pairs of a task, until fifty draws in a row bring nothing new."""
    rng = random.Random(f"{task.name} {seed} {split}")
    seen: set[tuple[object, ...]] = set()
    in_vain = 0
    for pair in task.draw(rng, lm, split):
        key = (pair.clean, pair.corrupt, pair.answer)
        in_vain = in_vain + 1 if key in seen else 0
        if in_vain == 50:
            return
        if key not in seen:
            seen.add(key)
            yield pair


def generate(lm: LanguageModel, task: Task, n: int = 48, seed: int = 0, split: Split = "search") -> list[PromptPair]:
    """Different pairs of a task; the same seed gives the same pairs.

    Args:
        lm: The model; only a task made of token ids or of chats looks at it.
        task: The task.
        n: How many pairs; fewer when the task has no more.
        seed: Of the draws.
        split: "search" for finding something, "held_out" for judging it; no prompt of one split is in the other.

    Returns:
        The pairs, not yet aligned.

    Raises:
        CutawayError: The task cannot be asked of the model at all.
    """
    return list(itertools.islice(_distinct(lm, task, seed, split), n))


def readable_pairs(lm: LanguageModel, task: Task, n: int = 48, seed: int = 0, split: Split = "search") -> AlignedPairs:
    """Pairs of a task that align for this model's tokenizer, drawn from at most eight times as many.

    Args:
        lm: The model.
        task: The task.
        n: How many pairs; fewer where fewer align.
        seed: Of the draws.
        split: "search" for finding something, "held_out" for judging it.

    Returns:
        Aligned pairs; `refused` holds those drawn on the way that do not align.

    Raises:
        CutawayError: None of the pairs aligns.

    Example:
        >>> lm = cutaway.load("atlas")
        >>> len(readable_pairs(lm, task("indirect object"), n=8))
        8
    """
    drawn = generate(lm, task, 8 * n, seed, split)
    if not drawn:
        raise CutawayError(f"the tokenizer of {lm.name} can read none of its prompts")
    at = n
    while True:  # as many as are needed, since most models read most pairs
        try:
            ready = aligned(lm, drawn[:at])
        except CutawayError:
            if at >= len(drawn):
                raise
            ready = None
        if ready is not None and (len(ready) >= n or at >= len(drawn)):
            return ready[range(min(n, len(ready)))]
        at *= 2
