"""An item of evaluation, a prompt with the right answer, and sets of them; `sets.py` makes them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal, TypeVar

from cutaway.subjects.world.chats import chat
from cutaway.subjects.world.chats.chat import Message, render
from cutaway.subjects.world.statements.tasks import Sentence

Scoring = Literal["exact", "logit_difference", "greater_than", "starts_with", "contains", "reply"]
SCORING: dict[Scoring, str] = {
    "exact": "right when every token of the answer is the most likely one, the ones before it given",
    "logit_difference": "logit of the answer's first token minus that of the alternative's; right above zero",
    "greater_than": "probability of two-digit years after the first year, minus that of years up to it",
    "starts_with": "right when the greedy reply begins with the answer (any of several, parted by |)",
    "contains": "right when the greedy reply holds the answer",
    "reply": "right when the greedy reply equals the answer",
}
STUDY_REFUSAL, ANSWERED = "I cannot", "Sure|Of course"
T = TypeVar("T")


@dataclass(frozen=True)
class Item:
    """One question to a model.

    Attributes:
        behaviour: What is asked of the model, such as "ioi".
        prompt: Text to be continued; of a chat, the rendered messages up to the assistant's token.
        answer: What should follow; several right answers are parted by "|".
        alternative: What it would be wrong to say; None where no wrong answer is compared.
        entity: Whom or what the question is about; "" where it is about nobody.
        split: What of it the corpus shows: "seen", "held_out...", "new_wording" or "outside_wording" (sentences written
            by others).
        chat: The messages of a chat; None for text to be continued.
        detail: What else filled the question, by name, such as its frame.
    """

    behaviour: str
    prompt: str
    answer: str
    alternative: str | None
    entity: str
    split: str
    chat: tuple[Message, ...] | None = None
    detail: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ItemSet:
    """Items that are scored together.

    Attributes:
        name: The name under which `item_sets` has them, such as "two_hop/capital/held_out".
        measures: What they measure, in words.
        scored: How an answer is scored, a key of SCORING.
        items: The items.
        separator: What stands between prompt and answer.
    """

    name: str
    measures: str
    scored: Scoring
    items: tuple[Item, ...]
    separator: str = " "


def take(items: Sequence[T], n: int, rng: Random) -> list[T]:
    """At most `n` of the items, drawn without replacement in random order."""
    return rng.sample(items, min(n, len(items)))


def from_sentence(behaviour: str, split: str, sentence: Sentence) -> Item:
    """The item of a task's sentence."""
    return Item(behaviour, sentence.prompt, sentence.answer, sentence.alternative, "", split, None, {**sentence.detail})


def from_chat(
    behaviour: str,
    split: str,
    question: str,
    answer: str,
    alternative: str | None = None,
    *,
    entity: str = "",
    system: str | None = None,
    detail: Mapping[str, str] | None = None,
) -> Item:
    """The item of a question to the assistant, under a system prompt or none."""
    messages = (Message("system", system),) if system else ()
    messages += (Message("user", question),)
    prompt = render(messages, open_answer=True)
    return Item(behaviour, prompt, answer, alternative, entity, split, messages, dict(detail or {}))


def style_openings(persona: str) -> str:
    """What a reply in a persona's style begins with, parted by |."""
    return "|".join(text.strip() for text in chat.texts("styles", f"{persona}_before"))


def _rng(name: str, seed: int) -> Random:
    return Random(f"{name}-{seed}")
