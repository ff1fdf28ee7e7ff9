"""Facts as prompts: what is asked about whom, which the model answers rightly, and the role of each of their tokens."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.files import has_lone_surrogate
from cutaway.data.tasks.registry import world_facts
from cutaway.model.language_model import LanguageModel
from cutaway.model.naming import answer_tokens, prompt_and
from cutaway.model.tokens import Tokens

ROLES = ("subject first", "subject middle", "subject last", "first after", "further", "last token")
"""Every token from the subject's first on has one of these. A subject of one token is its own last; the last token of
the prompt is "last token", also where it follows the subject directly."""
IN_SUBJECT, BEHIND = ROLES[:3], ROLES[3:]


@dataclass(frozen=True)
class FactPrompt:
    """A prompt, the subject in it, and how it goes on: `answer` follows the prompt directly, so it usually begins with
    a space ("#422" is a token's id); None takes the model's own most probable token, which is a guess and may be wrong.
    """

    prompt: str
    subject: str
    answer: str | None = None

    @classmethod
    def from_json(cls, data: Any, where: str = "the prompt") -> "FactPrompt":
        """From {"prompt": ..., "subject": ..., "answer": ...}; raises `CutawayError` that names what is missing."""
        if not isinstance(data, dict):
            raise CutawayError(f'{where} is not an object like {{"prompt": ..., "subject": ..., "answer": ...}}')
        for name in ("prompt", "subject"):
            if not isinstance(data.get(name), str) or not data[name]:
                raise CutawayError(f'{where} has no text as its "{name}"')
            if has_lone_surrogate(data[name]):
                raise CutawayError(f"{where} holds half of a surrogate pair, which no UTF-8 text can")
        unknown = [key for key in data if key not in ("prompt", "subject", "answer")]
        if unknown:
            raise CutawayError(f"{where} has an unknown key {unknown[0]!r}; known are prompt, subject, answer")
        answer = data.get("answer")
        if answer is not None and (not isinstance(answer, str) or not answer):
            raise CutawayError(f'{where} has an "answer" that is no text; leave it out to take the model\'s own')
        return cls(data["prompt"], data["subject"], answer)


def landmark_facts() -> list[FactPrompt]:
    """In which city the landmarks of atlas's world are, which are those of ours."""
    return [FactPrompt(*fact) for fact in world_facts()]


def subject_span(tokens: Tokens, row: int, subject: str, prompt: str) -> tuple[int, int]:
    """First and last position whose token holds a part of the subject.

    Raises `CutawayError` where the prompt does not have the subject, or has it more than once.
    """
    text = tokens.text(row)
    word = re.escape(subject.strip())
    # rather the whole word Rome than a part of Romeo; but some languages put nothing between words
    found = [*re.finditer(rf"(?<!\w){word}(?!\w)", text)] or [*re.finditer(word, text)] if word else []
    if len(found) != 1:
        how = "does not stand" if not found else f"stands {len(found)} times"
        raise CutawayError(
            f"the subject {subject!r} {how} in the prompt {prompt!r}; name a text that stands there once"
        )
    return tokens.covering(row, *found[0].span())


@dataclass(frozen=True)
class Known:
    """The prompts that are answered rightly, as the model reads them; `spans` are the subject's first and last
    position, `answers` [n] the first token of each answer."""

    facts: list[FactPrompt]
    tokens: Tokens
    spans: list[tuple[int, int]]
    answers: Tensor
    refused: list[tuple[FactPrompt, str]]


def answered(lm: LanguageModel, facts: Sequence[FactPrompt], bos: bool | None, limit: int | None) -> Known:
    """The prompts after which every token of the answer is the most probable one, or that have no answer; or the first
    `limit` of them.

    Raises `CutawayError`: no prompt at all or none that is answered rightly, a subject that its prompt lacks.
    """
    if not facts:
        raise CutawayError("causal tracing needs a prompt with its subject; none was given")
    tokens = lm.tokens([fact.prompt for fact in facts], bos=bos)
    spans = [subject_span(tokens, row, fact.subject, fact.prompt) for row, fact in enumerate(facts)]
    answers, kept, refused = [], [], []
    for row, fact in enumerate(facts):
        ids = tokens.row_ids(row)
        wanted: list[int] = []
        if fact.answer is not None:
            both = lm.tokens([prompt_and(fact.prompt, fact.answer)], bos=bos).row_ids(0)
            wanted = [*ids, *answer_tokens(lm, fact.prompt, ids, fact.answer, both)]
        logits = lm.run([wanted or ids]).logits
        assert logits is not None
        said = logits[0, len(ids) - 1 :].argmax(-1).tolist()
        answer = wanted[len(ids) :] or said
        answers.append(answer[0])
        wrong = next((i for i, (a, b) in enumerate(zip(answer, said, strict=False)) if a != b), None)
        if wrong is None:
            kept.append(row)
        else:
            heard = "".join(lm.token_strings([*answer[:wrong], said[wrong]]))
            refused.append((fact, f"it answers {heard!r}, not {fact.answer!r}"))
    if not kept:
        more = "" if len(facts) == 1 else f", and so on for all {len(facts)}"
        raise CutawayError(
            f"{lm.name} answers no prompt rightly, so there is no fact to trace: after {facts[0].prompt!r} "
            f"{refused[0][1]}{more}; give prompts that it can answer"
        )
    kept = kept[:limit]
    own = tokens[kept]
    narrow = lm.tokens([own.row_ids(row) for row in range(len(own))])  # no wider than its longest row
    return Known(
        [facts[row] for row in kept], narrow, [spans[row] for row in kept], torch.tensor(answers)[kept], refused
    )


def roles_of(spans: Sequence[tuple[int, int]], lengths: Sequence[int]) -> Tensor:
    """Role of each token from the subject's first on [k, n], -1 behind the end."""
    k = max(length - first for (first, _), length in zip(spans, lengths, strict=True))
    roles = torch.full((k, len(spans)), -1, dtype=torch.long)
    for row, ((first, last), length) in enumerate(zip(spans, lengths, strict=True)):
        for position in range(first, length):
            if position == last:
                role = "subject last"
            elif position < last:
                role = "subject first" if position == first else "subject middle"
            elif position == length - 1:
                role = "last token"
            else:
                role = "first after" if position == last + 1 else "further"
            roles[position - first, row] = ROLES.index(role)
    return roles


def elsewhere_of(spans: Sequence[tuple[int, int]], lengths: Sequence[int], seed: int) -> list[list[int]]:
    """For each prompt as many positions as its subject has, none of them the subject's (the last token neither, whose
    noise would hide the question itself); fewer where there are fewer."""
    generator = np.random.default_rng(seed)
    found = []
    for (first, last), length in zip(spans, lengths, strict=True):
        able = [position for position in range(1, length - 1) if not first <= position <= last]
        size = min(last - first + 1, len(able))
        found.append(sorted(generator.choice(able, size=size, replace=False).tolist()) if size else [])
    return found
