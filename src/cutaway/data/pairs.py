"""Prompt pairs: a clean and a corrupt prompt that differ in one respect, and the two answers this decides between.

A pair is plain data. `aligned` tokenises pairs for one model, checks that clean and corrupt have the same number of
tokens (a patch moves an activation from one position to the same position of the other prompt), finds the token in
which the two answers first differ, and refuses a pair that does not align, with the reason.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.model.language_model import LanguageModel
from cutaway.model.naming import continued, prompt_and
from cutaway.model.tokens import Tokens, named_token

Prompt = str | tuple[int, ...]
Place = int | str | tuple[str, str]


@dataclass(frozen=True)
class PromptPair:
    """`clean` is continued by `answer`, `corrupt` by `wrong`.

    Prompts are texts, or tuples of token ids (then the answers are ids too). Answers are texts that follow the prompt
    directly, so they usually begin with a space, or "#422" for the token of this id ("\\#422" is the text "#422").

    Attributes:
        clean: the prompt that is studied.
        corrupt: the prompt that differs from it in one respect.
        answer: what is right after `clean`.
        wrong: what is wrong after `clean`, and right after `corrupt` where the pair is symmetric.
        positions: places by role: a token position (0 is the first real token, -1 the last), a text that stands in both
            prompts, or (text in clean, text in corrupt). A text means its last token, at its last occurrence, or, where
            it begins with "^", in the beginning of the prompt ("^Tom and Tom" is the second Tom).
        answers: all right continuations of `clean` where there are several (every later year); empty is `answer` alone.
        wrongs: all wrong ones; empty is `wrong` alone.
        template: the wording that pairs share, for means over pairs of one layout; "" where it has no name.
        symmetric: whether `corrupt` is continued by what is wrong after `clean`. If not, it only makes the answer of
            `clean` less likely (after the year 01 nearly every year is right).

    Example:
        PromptPair("The capital of France is", "The capital of Italy is", " Paris", " Rome")
    """

    clean: Prompt
    corrupt: Prompt
    answer: str | int
    wrong: str | int
    positions: Mapping[str, Place] = field(default_factory=dict)
    answers: tuple[str | int, ...] = ()
    wrongs: tuple[str | int, ...] = ()
    template: str = ""
    symmetric: bool = True

    def swapped(self) -> "PromptPair":
        """The same pair with clean and corrupt exchanged, and what is right with what is wrong.

        Raises:
            CutawayError: a pair that is not symmetric: what is right after its corrupt prompt is not known.
        """
        if not self.symmetric:
            raise CutawayError(
                f"the pair {self.clean!r} / {self.corrupt!r} is not symmetric: its corrupt prompt has no answer of its "
                "own, so the two cannot be exchanged"
            )
        places = {
            role: (place[1], place[0]) if isinstance(place, tuple) else place for role, place in self.positions.items()
        }
        return PromptPair(
            self.corrupt,
            self.clean,
            self.wrong,
            self.answer,
            places,
            self.wrongs,
            self.answers,
            template=self.template,
        )

    def to_json(self) -> dict[str, object]:
        """Plain data; what is empty or usual is left out. `cutaway.data.tasks.files.pair_from_json` reads it."""
        said: dict[str, object] = {
            "clean": self.clean,
            "corrupt": self.corrupt,
            "answer": self.answer,
            "wrong": self.wrong,
            "positions": dict(self.positions),
        }
        if self.answers:
            said["answers"] = list(self.answers)
        if self.wrongs:
            said["wrongs"] = list(self.wrongs)
        if not self.symmetric:
            said["symmetric"] = False
        if self.template:
            said["template"] = self.template
        return said


@dataclass(frozen=True)
class AlignedPairs:
    """Pairs as one model reads them; row i of every field belongs to `pairs[i]`. `aligned` makes them.

    Tokens that both answers share at their start are part of the prompts.

    Attributes:
        pairs: the pairs.
        clean: the clean prompts, n rows.
        corrupt: the corrupt prompts, n rows, each as long as its clean one.
        answer: the right answer's first token that differs from the wrong one's, int64 [n].
        wrong: the wrong answer's first token that differs from the right one's, int64 [n].
        places: for each role that all pairs name the positions in clean and in corrupt, int64 [2, n]; "last" is always
            there.
        refused: the pairs left out, with the reason; kept by every selection of rows.
        answers: all right tokens, bool [n, V], where a pair names several (a row of a pair that does not has `answer`
            alone); else None.
        wrongs: all wrong tokens, likewise.
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
            refused=self.refused,
        )

    def refusals(self) -> dict[str, int]:
        """How many pairs were left out for each kind of reason, the commonest first."""
        return _refusal_counts(self.refused)

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


def _branch(prompt: list[int], answer: list[int], wrong: list[int]) -> tuple[list[int], int, int] | str:
    """The tokens before the answers part, and the two tokens in which they part; or why there are none."""
    if answer[: len(prompt)] != prompt or wrong[: len(prompt)] != prompt:
        return "the tokenizer merges the end of the prompt with the answer; end the prompt at a word boundary"
    for i, (a, b) in enumerate(zip(answer[len(prompt) :], wrong[len(prompt) :], strict=False)):
        if a != b:
            return answer[: len(prompt) + i], a, b
    return "one answer is the beginning of the other, so no token tells them apart"


def _refusal_counts(refused: Sequence[tuple[PromptPair, str]]) -> dict[str, int]:
    """Kinds of reasons (what stands before the colon) with their counts, the commonest first."""
    return dict(Counter(reason.split(": ")[0] for _, reason in refused).most_common())


@dataclass(frozen=True)
class _Read:
    """A pair as token ids: both prompts, and where its answers part."""

    clean: list[int]
    corrupt: list[int]
    answer: int
    wrong: int
    answers: tuple[int, ...] = ()
    wrongs: tuple[int, ...] = ()


def require_aligned(pairs: object) -> None:
    """Raise `CutawayError`, with the way out, for pairs that are not aligned yet."""
    if not isinstance(pairs, AlignedPairs):
        raise CutawayError(f"the pairs are a {type(pairs).__name__}; give aligned ones: aligned(lm, pairs)")


def aligned(
    lm: LanguageModel, pairs: Sequence[PromptPair] | AlignedPairs, *, bos: bool | None = None, strict: bool = False
) -> AlignedPairs:
    """Tokenise pairs and leave out those that do not align.

    Pairs that are aligned already are returned as they are, so that whatever takes pairs takes both.

    A pair aligns when both prompts have the same number of tokens, its answers part in the same two tokens after
    either, and, where it names several right and wrong answers, the first token of each tells on which side it is. (One
    of several that the tokenizer would merge with the end of the prompt, as in " 17" and "76", counts as the token that
    it is by itself; Hanna et al. 2023 read years so.)

    Args:
        lm: the model whose tokenizer reads the pairs.
        pairs: pairs of texts or of token ids, or pairs that are aligned already.
        bos: True makes sure that each text starts with one beginning-of-text token, False that none does, None leaves
            it to the tokenizer.
        strict: whether the first pair that does not align is an error, instead of being left out.

    Returns:
        The pairs that align, with those left out in `refused`.

    Raises:
        CutawayError: no pair is left (the message has the commonest reason), a pair mixes texts and ids, or, with
            `strict`, one does not align.

    Example:
        >>> lm = cutaway.load("atlas")
        >>> pair = PromptPair("The capital of France is", "The capital of Italy is", " Paris", " Rome")
        >>> len(aligned(lm, [pair]))
        1
    """
    if isinstance(pairs, AlignedPairs):
        return pairs
    for number, pair in enumerate(pairs):
        if not isinstance(pair, PromptPair):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise CutawayError(f"pair {number} is a {type(pair).__name__}, not a PromptPair; make one of it")
        kind = str if isinstance(pair.clean, str) else int
        prompts = (pair.clean, pair.corrupt)
        if any(isinstance(prompt, str) != (kind is str) for prompt in prompts) or not all(
            isinstance(answer, kind) for answer in (pair.answer, pair.wrong, *pair.answers, *pair.wrongs)
        ):
            raise CutawayError(f"a pair mixes texts and token ids: {pair.clean!r} and {pair.corrupt!r}")

    single = _single_tokens(lm)
    outcomes = [
        _with_sets(lm, pair, _read_pair(*rows), bos, single) if not isinstance(rows, str) else rows
        for pair, rows in zip(pairs, _continued(lm, pairs, bos), strict=True)
    ]
    reads = [read for read in outcomes if isinstance(read, _Read)]
    clean = corrupt = None
    spots: list[dict[str, tuple[int, int]]] = []
    if reads:
        clean, corrupt = lm.tokens([read.clean for read in reads]), lm.tokens([read.corrupt for read in reads])
    rows = iter(range(len(reads)))
    kept: list[tuple[int, PromptPair]] = []
    refused: list[tuple[PromptPair, str]] = []
    for pair, outcome in zip(pairs, outcomes, strict=True):
        reason = outcome
        if isinstance(outcome, _Read):
            assert clean is not None
            assert corrupt is not None
            row = next(rows)
            found = _spots(pair, clean, corrupt, row)
            if not isinstance(found, str):
                kept.append((row, pair))
                spots.append(found)
                continue
            reason = found
        if strict:
            raise CutawayError(f"the pair {pair.clean!r} / {pair.corrupt!r} does not align: {reason}")
        refused.append((pair, str(reason)))
    if not kept:
        counts = _refusal_counts(refused)
        first = next(iter(counts), "")
        example = next((reason for _, reason in refused if reason.startswith(first)), "")
        why = f" ({example})" if example else ""
        raise CutawayError(f"none of the {len(pairs)} prompt pairs aligns for {lm.name}{why}; give other pairs")
    assert clean is not None
    assert corrupt is not None
    reads = [reads[row] for row, _ in kept]
    several = any(read.answers for read in reads)
    return AlignedPairs(
        pairs=tuple(pair for _, pair in kept),
        clean=clean[[row for row, _ in kept]],
        corrupt=corrupt[[row for row, _ in kept]],
        answer=torch.tensor([read.answer for read in reads]),
        wrong=torch.tensor([read.wrong for read in reads]),
        places=_places(spots),
        refused=tuple(refused),
        answers=_sets(lm, [read.answers or (read.answer,) for read in reads]) if several else None,
        wrongs=_sets(lm, [read.wrongs or (read.wrong,) for read in reads]) if several else None,
    )


def _sets(lm: LanguageModel, rows: Sequence[tuple[int, ...]]) -> Tensor:
    """Sets of tokens as a mask [n, V]."""
    mask = torch.zeros(len(rows), lm.d_vocab, dtype=torch.bool)
    for row, ids in enumerate(rows):
        mask[row, list(ids)] = True
    return mask


def _continued(
    lm: LanguageModel, pairs: Sequence[PromptPair], bos: bool | None
) -> Iterator[tuple[list[list[int]], list[list[int]]] | str]:
    """For each pair, the tokens of its clean and of its corrupt prompt: alone, with `answer` and with `wrong`; or why
    they cannot be read.
    """
    groups = [
        [
            prompt if ending is None else prompt_and(prompt, str(ending))
            for prompt in (str(pair.clean), str(pair.corrupt))
            for ending in (None, pair.answer, pair.wrong)
        ]
        if isinstance(pair.clean, str)
        else []
        for pair in pairs
    ]
    texts = [text for group in groups for text in group]
    try:
        read = iter(_rows(lm.tokens(texts, bos=bos))) if texts else iter(())
        alone = False
    except CutawayError:  # one of them is empty or too long: find out which
        read, alone = iter(()), True
    for pair, group in zip(pairs, groups, strict=True):
        if group:
            try:
                rows = _rows(lm.tokens(group, bos=bos)) if alone else list(itertools.islice(read, len(group)))
            except CutawayError as error:
                yield f"the prompt cannot be read: {error}"
                continue
            ends = [named_token(str(ending)) for ending in (pair.answer, pair.wrong)]
            strange = [end for end in ends if isinstance(end, int) and end >= lm.d_vocab]
            if strange:
                yield f"the prompt cannot be read: {lm.name} has no token {strange[0]} (its vocabulary: {lm.d_vocab})"
                continue
            for k, end in enumerate(ends):
                if isinstance(end, int):
                    rows[1 + k], rows[4 + k] = [*rows[1 + k], end], [*rows[4 + k], end]
            yield rows[:3], rows[3:]
        else:
            clean, corrupt = ([int(i) for i in prompt] for prompt in (pair.clean, pair.corrupt))
            if max(len(clean), len(corrupt)) > lm.context_length:
                yield f"the prompt cannot be read: {len(clean)} tokens, but {lm.name} reads at most {lm.context_length}"
                continue
            ends = (int(pair.answer), int(pair.wrong))
            several = [int(ending) for ending in (*pair.answers, *pair.wrongs)]
            for ids, size in (((*clean, *corrupt), lm.d_vocab_in), ((*ends, *several), lm.d_vocab)):
                if strange := [i for i in ids if not 0 <= i < size]:
                    break
            if strange:
                yield f"the prompt cannot be read: {lm.name} has no token {strange[0]} (its vocabulary: {size})"
                continue
            yield [clean, *([*clean, end] for end in ends)], [corrupt, *([*corrupt, end] for end in ends)]


def _read_pair(clean: list[list[int]], corrupt: list[list[int]]) -> _Read | str:
    """A pair as token ids, from the rows of `_continued`, or why it does not align."""
    branch, other = _branch(*clean), _branch(*corrupt)
    if isinstance(branch, str) or isinstance(other, str):
        return branch if isinstance(branch, str) else str(other)
    if branch[1:] != other[1:]:
        return "the answers part in different tokens after the clean and after the corrupt prompt"
    if len(branch[0]) != len(other[0]):
        return f"clean and corrupt must have the same number of tokens: {len(branch[0])} and {len(other[0])}"
    if branch[0] == other[0]:
        return "clean and corrupt are the same tokens"
    return _Read(branch[0], other[0], branch[1], branch[2])


def _single_tokens(lm: LanguageModel) -> Callable[[str | int], int | None]:
    """A function from a text to the token that it is by itself, or None."""

    @cache
    def single(text: str | int) -> int | None:
        ids = continued(lm, str(text))
        return ids[0] if ids is not None and len(ids) == 1 and lm.token_strings(ids)[0] == text else None

    return single


def _with_sets(
    lm: LanguageModel,
    pair: PromptPair,
    read: _Read | str,
    bos: bool | None,
    single: Callable[[str | int], int | None],
) -> _Read | str:
    """The same with the first token of each of the pair's several answers, or why they cannot be told apart."""
    several = (*pair.answers, *pair.wrongs)
    if isinstance(read, str) or not several:
        return read
    if not pair.answers or not pair.wrongs:
        return "a pair that lists several answers must list what is right and what is wrong"
    if isinstance(pair.clean, str):
        firsts = _firsts(lm, pair.clean, read.clean, several, bos, single)
    else:
        firsts = [int(ending) for ending in several]
    if isinstance(firsts, str):
        return firsts
    answers, wrongs = firsts[: len(pair.answers)], firsts[len(pair.answers) :]
    both = set(answers) & set(wrongs)
    if both:
        texts = dict(zip(firsts, several, strict=True))
        return f"a right and a wrong answer begin with the same token: {texts[min(both)]!r}"
    if read.answer not in answers or read.wrong not in wrongs:
        return "the pair's answer must be one of its answers, and its wrong one of its wrongs"
    if isinstance(pair.corrupt, str) and _firsts(lm, pair.corrupt, read.corrupt, several, bos, single) != firsts:
        return "the answers begin with different tokens after the clean and after the corrupt prompt"
    return replace(read, answers=tuple(answers), wrongs=tuple(wrongs))


def _firsts(
    lm: LanguageModel,
    prompt: str,
    tokens: list[int],
    several: Sequence[str | int],
    bos: bool | None,
    single: Callable[[str | int], int | None],
) -> list[int] | str:
    """The first token of each text after a prompt, which is read as `tokens`."""
    try:
        rows = _rows(lm.tokens([prompt_and(prompt, str(text)) for text in several], bos=bos))
    except CutawayError as error:
        return f"the prompt cannot be read: {error}"
    firsts: list[int] = []
    for text, row in zip(several, rows, strict=True):
        named = named_token(str(text))
        if isinstance(named, int):
            if named >= lm.d_vocab:
                return f"the prompt cannot be read: {lm.name} has no token {named} (its vocabulary: {lm.d_vocab})"
            firsts.append(named)
            continue
        follows = len(row) > len(tokens) and row[: len(tokens)] == tokens
        first = row[len(tokens)] if follows else single(text)
        if first is None:
            return f"an answer does not follow the prompt as a token of its own: {text!r}"
        firsts.append(first)
    return firsts


def _spots(pair: PromptPair, clean: Tokens, corrupt: Tokens, row: int) -> dict[str, tuple[int, int]] | str:
    """Where a pair's places are in both prompts, or why one is not there."""
    spots: dict[str, tuple[int, int]] = {}
    for role, place in pair.positions.items():
        length = int(clean.lengths[row])
        if isinstance(place, int):
            at = place if place >= 0 else length + place
            if not 0 <= at < length:
                return f"a place is outside the prompt: {role!r} is {place}, of {length} tokens"
            spots[role] = (at, at)
            continue
        here, there = place if isinstance(place, tuple) else (place, place)
        try:
            spots[role] = (_spot(clean, row, pair.clean, here), _spot(corrupt, row, pair.corrupt, there))
        except CutawayError as error:
            return f"a place is not in the prompt: {role!r}: {error}"
    last = int(clean.lengths[row]) - 1
    spots["last"] = (last, last)
    return spots


def _spot(tokens: Tokens, row: int, prompt: Prompt, text: str) -> int:
    """Position of the token in which a text ends; raises `CutawayError` where the prompt does not have it."""
    if not text.startswith("^"):
        return tokens.find(row, text)
    start = text[1:]
    if not start or not str(prompt).startswith(start):
        raise CutawayError(f"the prompt does not begin with {start!r}")
    whole = tokens.text(row)
    before = max(whole.find(str(prompt)), 0)  # a beginning-of-text, a space of the tokenizer's
    return tokens.covering(row, before, min(before + len(start), len(whole)))[1]


def _places(spots: Sequence[Mapping[str, tuple[int, int]]]) -> dict[str, Tensor]:
    """Positions [2, n] (clean, corrupt) of every role that all pairs name; "last" is always there, and the last."""
    roles = [role for role in spots[0] if role != "last" and all(role in spot for spot in spots)]
    return {role: torch.tensor([spot[role] for spot in spots]).T.contiguous() for role in (*roles, "last")}
