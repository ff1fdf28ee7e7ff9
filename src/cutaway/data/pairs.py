"""Prompt pairs: a clean and a corrupt prompt that differ in one respect, and the two answers this decides between.

A pair is plain data. `align` tokenises pairs for one model, checks that clean and corrupt have the same number of
tokens (a patch moves an activation from one position to the same position of the other prompt), finds the token in
which the two answers first differ, and refuses a pair that does not align, with the reason.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.model.language_model import LanguageModel
from cutaway.model.tokens import Tokens

Prompt = str | tuple[int, ...]
Place = int | str | tuple[str, str]


@dataclass(frozen=True)
class PromptPair:
    """`clean` is continued by `answer`, `corrupt` by `wrong`.

    Prompts are texts, or tuples of token ids (then the answers are ids too). Answers are texts that follow the prompt
    directly, so they usually begin with a space. `positions` names places by role: a token position (0 is the first
    real token, -1 the last), a text that stands in both prompts, or (text in clean, text in corrupt); a text means its
    last token, at its last occurrence. `answers` and `wrongs` are all right and all wrong continuations of the clean
    prompt where there are several (every later year); empty means `answer` and `wrong` alone. `template` names what
    the pair was made from, so that pairs of one template can be averaged token by token.
    """

    clean: Prompt
    corrupt: Prompt
    answer: str | int
    wrong: str | int
    positions: Mapping[str, Place] = field(default_factory=dict)
    answers: tuple[str | int, ...] = ()
    wrongs: tuple[str | int, ...] = ()
    template: str = ""

    def swapped(self) -> "PromptPair":
        """The same pair with clean and corrupt exchanged."""
        places = {
            role: (place[1], place[0]) if isinstance(place, tuple) else place for role, place in self.positions.items()
        }
        return PromptPair(self.corrupt, self.clean, self.wrong, self.answer, places, template=self.template)

    def to_json(self) -> dict[str, object]:
        return {
            "clean": self.clean,
            "corrupt": self.corrupt,
            "answer": self.answer,
            "wrong": self.wrong,
            "positions": dict(self.positions),
        }


@dataclass(frozen=True)
class AlignedPairs:
    """Pairs as one model reads them; row i of every field belongs to `pairs[i]`.

    `answer` and `wrong` are the ids of the first token in which the answers differ [n]. Tokens that both answers
    share at their start are part of the prompts. `places[role]` are the positions in clean and in corrupt [2, n].
    `refused` holds the pairs left out, with the reason. `answers` and `wrongs` [n, V] bool are all right and all wrong
    tokens where the pairs name several, else None.
    """

    pairs: tuple[PromptPair, ...]
    clean: Tokens
    corrupt: Tokens
    answer: Tensor
    wrong: Tensor
    places: Mapping[str, Tensor]
    refused: tuple[tuple[PromptPair, str], ...] = ()
    answers: Tensor | None = None
    wrongs: Tensor | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, rows: Sequence[int]) -> "AlignedPairs":
        index = torch.as_tensor(list(rows), dtype=torch.long)
        return AlignedPairs(
            pairs=tuple(self.pairs[i] for i in index.tolist()),
            clean=self.clean[index.tolist()],
            corrupt=self.corrupt[index.tolist()],
            answer=self.answer[index],
            wrong=self.wrong[index],
            places={role: places[:, index] for role, places in self.places.items()},
            answers=None if self.answers is None else self.answers[index],
            wrongs=None if self.wrongs is None else self.wrongs[index],
        )

    def first_difference(self) -> Tensor:
        """Position of the first token in which clean and corrupt differ [n]; -1 where they are equal.

        In a causal model nothing before it can carry a difference.
        """
        rows = zip(_rows(self.clean), _rows(self.corrupt), strict=True)
        return torch.tensor(
            [next((i for i, (a, b) in enumerate(zip(c, d, strict=True)) if a != b), -1) for c, d in rows]
        )


def _rows(tokens: Tokens) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(tokens.ids, tokens.mask, strict=True)]


def _read(lm: LanguageModel, texts: Sequence[str], bos: bool | None) -> list[list[int]]:
    return _rows(lm.tokens(list(texts), bos=bos)) if texts else []


def _branch(prompt: list[int], answer: list[int], wrong: list[int]) -> tuple[list[int], int, int] | str:
    """The tokens before the answers part, and the two tokens in which they part; or why there are none."""
    if answer[: len(prompt)] != prompt or wrong[: len(prompt)] != prompt:
        return "the tokenizer merges the end of the prompt with the answer; end the prompt at a word boundary"
    for i, (a, b) in enumerate(zip(answer[len(prompt) :], wrong[len(prompt) :], strict=False)):
        if a != b:
            return answer[: len(prompt) + i], a, b
    return "one answer is the beginning of the other, so no token tells them apart"


def align(
    lm: LanguageModel, pairs: Sequence[PromptPair], *, bos: bool | None = None, strict: bool = False
) -> AlignedPairs:
    """Tokenise pairs and leave out those that do not align (with `strict`, raise at the first).

    Raises `CutawayError` when no pair is left; the message has the commonest reason.
    """
    text = [pair for pair in pairs if isinstance(pair.clean, str)]
    for pair in text:
        if not (isinstance(pair.corrupt, str) and isinstance(pair.answer, str) and isinstance(pair.wrong, str)):
            raise CutawayError(f"a pair mixes texts and token ids: {pair.clean!r} and {pair.corrupt!r}")
    variants: list[Callable[[PromptPair], str]] = [
        lambda p: str(p.clean),
        lambda p: f"{p.clean}{p.answer}",
        lambda p: f"{p.clean}{p.wrong}",
        lambda p: str(p.corrupt),
        lambda p: f"{p.corrupt}{p.answer}",
        lambda p: f"{p.corrupt}{p.wrong}",
    ]
    read = iter(zip(*(_read(lm, [variant(pair) for pair in text], bos) for variant in variants), strict=True))
    kept: list[PromptPair] = []
    refused: list[tuple[PromptPair, str]] = []
    clean_rows: list[list[int]] = []
    corrupt_rows: list[list[int]] = []
    answers: list[tuple[int, int]] = []
    for pair in pairs:
        if isinstance(pair.clean, str):
            clean, clean_answer, clean_wrong, corrupt, corrupt_answer, corrupt_wrong = next(read)
        else:
            if not (isinstance(pair.corrupt, tuple) and isinstance(pair.answer, int) and isinstance(pair.wrong, int)):
                raise CutawayError(f"a pair mixes texts and token ids: {pair.clean!r} and {pair.corrupt!r}")
            clean, corrupt = list(pair.clean), list(pair.corrupt)
            clean_answer, clean_wrong = [*clean, pair.answer], [*clean, pair.wrong]
            corrupt_answer, corrupt_wrong = [*corrupt, pair.answer], [*corrupt, pair.wrong]
        reason = ""
        branch = _branch(clean, clean_answer, clean_wrong)
        other = _branch(corrupt, corrupt_answer, corrupt_wrong)
        if isinstance(branch, str) or isinstance(other, str):
            reason = branch if isinstance(branch, str) else str(other)
        elif branch[1:] != other[1:]:
            reason = "the answers part in different tokens after the clean and after the corrupt prompt"
        elif len(branch[0]) != len(other[0]):
            reason = f"clean has {len(branch[0])} tokens, corrupt {len(other[0])}; they must have the same number"
        elif branch[0] == other[0]:
            reason = "clean and corrupt are the same tokens"
        elif len(branch[0]) > lm.context_length:
            reason = f"the prompt has {len(branch[0])} tokens, the model's context {lm.context_length}"
        if reason or isinstance(branch, str) or isinstance(other, str):
            if strict:
                raise CutawayError(f"the pair {pair.clean!r} / {pair.corrupt!r} does not align: {reason}")
            refused.append((pair, reason))
            continue
        kept.append(pair)
        clean_rows.append(branch[0])
        corrupt_rows.append(other[0])
        answers.append((branch[1], branch[2]))
    if not kept:
        reasons = [reason for _, reason in refused]
        why = f" ({max(set(reasons), key=reasons.count)})" if reasons else ""
        raise CutawayError(f"none of the {len(pairs)} prompt pairs aligns for {lm.name}{why}; give other pairs")
    clean_tokens, corrupt_tokens = lm.tokens(clean_rows), lm.tokens(corrupt_rows)
    both = torch.tensor(answers)
    return AlignedPairs(
        pairs=tuple(kept),
        clean=clean_tokens,
        corrupt=corrupt_tokens,
        answer=both[:, 0],
        wrong=both[:, 1],
        places=_places(kept, clean_tokens, corrupt_tokens),
        refused=tuple(refused),
    )


def _places(pairs: Sequence[PromptPair], clean: Tokens, corrupt: Tokens) -> dict[str, Tensor]:
    """Positions [2, n] (clean, corrupt) of every role that all pairs name; "last" is always there."""
    last = clean.lengths.cpu() - 1
    places = {"last": torch.stack([last, last])}
    roles = [role for role in pairs[0].positions if role != "last" and all(role in pair.positions for pair in pairs)]
    for role in roles:
        columns: list[tuple[int, int]] = []
        for row, pair in enumerate(pairs):
            place = pair.positions[role]
            if isinstance(place, int):
                at = place if place >= 0 else int(clean.lengths[row]) + place
                columns.append((at, at))
            else:
                here, there = place if isinstance(place, tuple) else (place, place)
                columns.append((clean.find(row, here), corrupt.find(row, there)))
        places[role] = torch.tensor(columns).T.contiguous()
    order = [*roles, "last"]
    return {role: places[role] for role in order}
