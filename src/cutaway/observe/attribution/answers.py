"""Answers and wrong answers as tokens: what a logit difference is between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.model.language_model import Inputs, LanguageModel
from cutaway.model.naming import single_token
from cutaway.model.tokens import Tokens

Wrong = list[int] | Literal["mean"] | None
"""Tokens whose mean logit is subtracted, the mean over the vocabulary, or nothing."""
Answer = str | int | Sequence[str | int]
"""A token (an id, "#422", or the text by which one token continues the prompt), or one per prompt."""
WrongAnswer = str | int | Sequence[str | int | Sequence[str | int] | None] | None
"""What an answer is compared with: None, a token, several (their mean), "mean" (over the vocabulary), or one of these
per prompt."""


def model_answers(lm: LanguageModel, inputs: Inputs, position: int = -1) -> list[int]:
    """The token that the model itself finds most probable after a position of each prompt.

    Args:
        lm: the model.
        inputs: one prompt or several.
        position: counted from each prompt's first real token, -1 is the last.

    Returns:
        One id per prompt.
    """
    if position == -1:
        return lm.run(inputs, logits="last").last_logits.argmax(-1).tolist()
    run = lm.run(inputs, logits="all")
    columns = [run.tokens.column(row, position) for row in range(len(run.tokens))]
    return [int(run.all_logits[row, column].argmax()) for row, column in enumerate(columns)]


def prompt_ids(tokens: Tokens, positions: Sequence[int]) -> list[list[int]]:
    """What an answer continues: each row's real tokens up to its position."""
    return [
        tokens.row_ids(row)[: tokens.column(row, p) - int(tokens.first[row]) + 1] for row, p in enumerate(positions)
    ]


def answer_ids(lm: LanguageModel, answer: Answer, prompts: Sequence[Sequence[int]]) -> list[int]:
    """One token per prompt (its ids), from one answer or one per prompt, each as the prompt's continuation."""
    given = [answer] * len(prompts) if isinstance(answer, str | int) else list(answer)
    if len(given) != len(prompts):
        raise CutawayError(f"{len(given)} answers for {len(prompts)} prompts; give one, or one per prompt.")
    return [single_token(lm, one, after=prompt) for one, prompt in zip(given, prompts, strict=True)]


def wrong_ids(lm: LanguageModel, wrong: WrongAnswer, prompts: Sequence[Sequence[int]]) -> list[Wrong]:
    """What each prompt's answer is compared with, from one rule for all prompts (their ids) or one per prompt."""

    def one(value: str | int | Sequence[str | int] | None, prompt: Sequence[int]) -> Wrong:
        if value is None:
            return None
        if isinstance(value, str) and value == "mean":
            return "mean"
        tokens = [value] if isinstance(value, str | int) else list(value)
        if not tokens:
            raise CutawayError("The list of wrong answers is empty; leave wrong out to attribute the answer's logit.")
        return [single_token(lm, token, "wrong answer", prompt) for token in tokens]

    if wrong is None or isinstance(wrong, str | int):
        return [one(wrong, prompt) for prompt in prompts]
    given = list(wrong)
    if len(prompts) == 1 and not any(isinstance(value, list | tuple) for value in given):
        return [one(given, prompts[0])]  # type: ignore[arg-type]
    if len(given) != len(prompts):
        raise CutawayError(
            f"{len(given)} wrong answers for {len(prompts)} prompts; give one, or one (or a list of them) per prompt."
        )
    return [one(value, prompt) for value, prompt in zip(given, prompts, strict=True)]


def in_words(lm: LanguageModel, wrong: Wrong) -> str:
    """What an answer is compared with, as a phrase; empty for nothing."""
    if wrong is None:
        return ""
    if wrong == "mean":
        return "the mean logit"
    names = ", ".join(repr(name) for name in lm.token_strings(wrong))
    return names if len(wrong) == 1 else f"the mean of {names}"


def differences(logits: Tensor, answers: Sequence[int], wrongs: Sequence[Wrong]) -> Tensor:
    """Answer minus what it is compared with, in each row of logits [b, V]: [b]."""
    found = []
    for row, answer, wrong in zip(logits, answers, wrongs, strict=True):
        if wrong is None:
            found.append(row[answer])
        else:
            found.append(row[answer] - (row.mean() if wrong == "mean" else row[wrong].mean()))
    return torch.stack(found)
