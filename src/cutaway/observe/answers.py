"""Answers and wrong answers as tokens: what a logit difference is between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.model.language_model import LanguageModel

Wrong = list[int] | Literal["mean"] | None
"""Tokens whose mean logit is subtracted, the mean over the vocabulary, or nothing."""


def single_token(lm: LanguageModel, text: str | int, what: str = "answer") -> int:
    """The id of a text that is one token of the model, or the id itself.

    Raises CutawayError: a text that is no token, several tokens (it says which), unknown to the tokenizer, or an id
    outside the vocabulary.
    """
    if not isinstance(text, str):
        if not 0 <= int(text) < lm.d_vocab:
            raise CutawayError(f"The {what} {text} is no token id: they go from 0 to {lm.d_vocab - 1}.")
        return int(text)
    if lm.tokenizer is None:
        raise CutawayError(f"{lm.name} has no tokenizer: give the {what} as a token id.")
    if not text:
        raise CutawayError(f"The {what} is empty; give a text that is one token, with its leading space if it has one.")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise CutawayError(f"The {what} {text!r} is not valid Unicode text; give it again.")
    ids = lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids = [int(i) for i in cast("list[int]", ids)]
    unknown = getattr(lm.tokenizer, "unk_token_id", None)
    if unknown is not None and unknown in ids and text != lm.tokenizer.unk_token:
        raise CutawayError(f"The {what} {text!r} is unknown to the tokenizer of {lm.name}; give a text that it knows.")
    if len(ids) != 1:
        pieces = ", ".join(f"{piece!r} ({i})" for piece, i in zip(lm.token_strings(ids), ids, strict=True))
        spaced = lm.tokenizer(f" {text}", add_special_tokens=False, verbose=False)["input_ids"]
        way_out = (
            f"with a space before it, as inside a sentence, it is one: {f' {text}'!r}"
            if len(cast("list[int]", spaced)) == 1
            else "give one of them, or a text that is one token (words inside a sentence begin with a space)"
        )
        raise CutawayError(f"The {what} {text!r} is {len(ids)} tokens of {lm.name}: {pieces}; {way_out}.")
    return ids[0]


def model_answers(lm: LanguageModel, inputs: Any, position: int = -1) -> list[int]:
    """The token that the model itself finds most probable after a position of each prompt."""
    run = lm.run(inputs, logits="last" if position == -1 else "all")
    assert run.logits is not None
    columns = [0 if position == -1 else run.tokens.column(row, position) for row in range(len(run.tokens))]
    return [int(run.logits[row, column].argmax()) for row, column in enumerate(columns)]


def answer_ids(lm: LanguageModel, answer: Any, n: int) -> list[int]:
    """One token a row, from one answer or one a row."""
    given = [answer] * n if isinstance(answer, str | int) else list(answer)
    if len(given) != n:
        raise CutawayError(f"{len(given)} answers for {n} prompts; give one, or one a prompt.")
    return [single_token(lm, one) for one in given]


def wrong_ids(lm: LanguageModel, wrong: Any, n: int) -> list[Wrong]:
    """What each row's answer is compared with, from one rule for all rows or one a row."""

    def one(value: Any) -> Wrong:
        if value is None or (isinstance(value, str) and value == "mean"):
            return value
        tokens = [value] if isinstance(value, str | int) else list(value)
        if not tokens:
            raise CutawayError("The list of wrong answers is empty; leave wrong out to attribute the answer's logit.")
        return [single_token(lm, token, "wrong answer") for token in tokens]

    if wrong is None or isinstance(wrong, str | int):
        return [one(wrong)] * n
    given = list(wrong)
    if n == 1 and not any(isinstance(value, list | tuple) for value in given):
        return [one(given)]
    if len(given) != n:
        raise CutawayError(
            f"{len(given)} wrong answers for {n} prompts; give one, or one (or a list of them) a prompt."
        )
    return [one(value) for value in given]


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
