"""Texts, ids and conversations as tokens of a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cutaway.artifacts.errors import CutawayError
from cutaway.model.tokens import Tokens, ids_in, pad_rows, plain_ids, printable, token_string

Inputs = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor | Tokens | Mapping[str, Any]
"""What can be given as prompts: a text or several, ids, `Tokens`, or what a tokenizer returned."""

Message = Mapping[str, str]
"""One turn of a conversation: {"role": ..., "content": ...}."""


_ENCODING = frozenset(
    ("input_ids", "attention_mask", "token_type_ids", "special_tokens_mask", "offset_mapping", "length")
)
"""What a tokenizer returns; only the first two say anything about a causal model's input."""


class Reads:
    """What of a `LanguageModel` makes tokens of texts and texts of tokens."""

    name: str
    tokenizer: PreTrainedTokenizerBase | None
    d_vocab: int
    d_vocab_in: int
    context_length: int

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        raise NotImplementedError

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning-of-text token, or None."""
        return _single(None if self.tokenizer is None else self.tokenizer.bos_token_id)

    @property
    def pad_id(self) -> int | None:
        """Id of the padding token, or None."""
        return _single(None if self.tokenizer is None else self.tokenizer.pad_token_id)

    def tokens(self, inputs: Inputs, *, bos: bool | None = None) -> Tokens:
        """Prompts as a padded batch on the model's device.

        Args:
            inputs: text(s), tokenised exactly as the model's tokenizer does it; ids, or rows of ids; `Tokens`; or a
                `BatchEncoding` or dict with `input_ids` and `attention_mask`, which is taken with its padding. Ids
                alone have no mask, so those that end in the padding token are taken as they stand, with a warning.
            bos: True makes sure that each row starts with one beginning-of-text token, False that none does, None
                leaves it to the tokenizer.

        Returns:
            The batch, padded on the right.

        Raises:
            CutawayError: a doubled beginning-of-text, ids outside the vocabulary, rows longer than the context.

        Example:
            lm.tokens(["The capital of France is", "Rome is in"])
        """
        if bos is not None and not isinstance(bos, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise CutawayError(f"bos= is True, False or None; got {bos!r}.")
        if isinstance(inputs, Tensor) and (inputs.layout is not torch.strided or inputs.device.type == "meta"):
            raise CutawayError("Token ids are a plain tensor of numbers, neither sparse nor on the meta device.")
        if isinstance(inputs, Mapping):
            inputs = self._encoded(inputs, bos)
        if isinstance(inputs, Tokens):
            tokens = inputs.to(self.device)
        elif isinstance(inputs, Tensor) and bos is None and self._plain_ids(inputs):
            ids = (inputs[None] if inputs.ndim == 1 else inputs).detach().to(self.device, torch.long, copy=True)
            self._warn_of_padding(ids)
            tokens = Tokens.whole(ids, lambda: self.spelled(ids.tolist()))
        else:
            given = self._rows(inputs)
            text = isinstance(inputs, str) or any(isinstance(item, str) for item in inputs)
            rows = [self._with_bos(row, bos, text) for row in given]
            if not rows or any(not row for row in rows):
                raise CutawayError("There is an empty prompt; every prompt needs at least one token.")
            if any(not 0 <= i < self.d_vocab_in for row in rows for i in row):
                raise self._no_such_id()
            if not text:
                self._warn_of_padding(rows)
            ids, mask = pad_rows(rows, self._padding())
            tokens = Tokens(ids.to(self.device), mask.to(self.device), lambda: self.spelled(rows))
        low, high = (tokens.ids[tokens.mask] if tokens.padded else tokens.ids).aminmax()
        if int(low) < 0 or int(high) >= self.d_vocab_in:
            raise self._no_such_id()
        if tokens.longest > self.context_length:
            raise CutawayError(
                f"A prompt has {tokens.longest} tokens, but {self.name} reads at most {self.context_length}; shorten "
                "it."
            )
        return tokens

    def _encoded(self, inputs: Mapping[str, Any], bos: bool | None) -> Tokens | list[list[int]]:
        """What a tokenizer returned, as Tokens padded as it is; as rows of ids where `bos` may change them."""
        if "input_ids" not in inputs:
            raise CutawayError(f"A dict of inputs has input_ids (and attention_mask); this one has {[*inputs]}.")
        strange = [key for key in inputs if key not in _ENCODING]
        if strange:
            raise CutawayError(
                f"Inputs are taken from input_ids and attention_mask alone; leave {strange[0]!r} out of the dict."
            )
        rows = self._rows(inputs["input_ids"])
        marks = _plain(inputs.get("attention_mask"))
        if marks is None:
            return rows
        marks = [_plain(row) for row in marks] if isinstance(marks, list) else [marks]
        marks = [marks] if marks and not isinstance(marks[0], list) else marks
        if [len(row) if isinstance(row, list) else -1 for row in marks] != [len(row) for row in rows]:
            raise CutawayError("input_ids and attention_mask have different shapes; give them as the tokenizer does.")
        if any(mark not in (0, 1) for row in marks for mark in row):
            raise CutawayError("An attention_mask has 1 at real tokens and 0 at padding; this one has other values.")
        if any(0 in row[row.index(1) : len(row) - row[::-1].index(1)] for row in marks if 1 in row):
            raise CutawayError("The mask has holes inside a row; real tokens must be contiguous.")
        real = [[i for i, mark in zip(row, m, strict=True) if mark] for row, m in zip(rows, marks, strict=True)]
        if bos is not None or len({len(row) for row in rows}) != 1 or not all(real):
            return real
        for row in real:
            self._with_bos(row, None, False)
        mask = torch.tensor(marks).bool()
        return Tokens(torch.tensor(rows).where(mask, self._padding()), mask, lambda: self.spelled(real))

    def _warn_of_padding(self, given: Tensor | list[list[int]]) -> None:
        """Warn of ids that end in the padding token, unless it also stands inside rows (as between packed texts)."""
        pad = self.pad_id
        if pad is None:
            return
        if isinstance(given, Tensor):
            if not bool((given[:, -1] == pad).any()):
                return
            given = given.tolist()
        counts = []
        for row in given:
            trailing = next((k for k, i in enumerate(reversed(row)) if i != pad), len(row))
            counts.append(trailing if trailing < len(row) else 0)
            if pad in row[1 : len(row) - trailing]:
                return
        found = next((row for row, count in enumerate(counts) if count), None)
        if found is not None:
            warnings.warn(
                f"Row {found} ends in the padding token (id {pad}), {counts[found]} of it, and is read with it as it "
                "stands; if that is padding, give what the tokenizer returned, which has the attention_mask.",
                stacklevel=4,
            )

    def _plain_ids(self, inputs: Tensor) -> bool:
        """Whether a tensor is a batch of token ids, of one length, that needs nothing but a mask."""
        if inputs.ndim not in (1, 2) or inputs.numel() == 0 or inputs.dtype not in (torch.int64, torch.int32):
            return False
        start = self.bos_id
        if start is None or inputs.shape[-1] < 2:
            return True
        return not bool((inputs[..., :2] == start).all(-1).any())

    def spelled(self, rows: list[list[int]]) -> tuple[tuple[str, ...], ...]:
        """What `Tokens.spelling` is of rows of ids.

        Args:
            rows: the rows, without padding.
        """
        return tuple(tuple(token_string(self.tokenizer, i) for i in row) for row in rows)

    def _no_such_id(self) -> CutawayError:
        return CutawayError(f"Token ids must be between 0 and {self.d_vocab_in - 1}, the vocabulary of {self.name}.")

    def token_strings(self, ids: Iterable[int] | Tensor) -> list[str]:
        """One printable string per token, spaces kept.

        Args:
            ids: token ids [n].

        Returns:
            Their texts.

        Raises:
            CutawayError: what are no ids of the vocabulary.

        Example:
            lm.token_strings(lm.run(prompt, logits="last").logits[0, 0].topk(5).indices)
        """
        values = self._ids(ids)
        if values.ndim != 1:
            raise CutawayError(f"Tokens are named by a list of ids; got ids of the shape {list(values.shape)}.")
        return [printable(token_string(self.tokenizer, i)) for i in values.tolist()]

    def _ids(self, ids: Any, *, answers: bool = False) -> Tensor:
        """Ids that the model reads, or those it answers with, as a tensor on the CPU in the shape that they came in."""
        found = plain_ids(ids)
        size = self.d_vocab if answers else max(self.d_vocab, self.d_vocab_in)
        if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < size:
            said = f"those that {self.name} answers with" if answers else f"the vocabulary of {self.name}"
            raise CutawayError(f"Token ids must be between 0 and {size - 1}, {said}.")
        return found

    def _rows(self, inputs: Any) -> list[list[int]]:
        given: Any = [inputs] if isinstance(inputs, str) else _plain(inputs)
        if isinstance(given, list):
            given = [_plain(item) for item in given]
            if given and all(isinstance(item, str) for item in given):
                if self.tokenizer is None:
                    return [ids_in(text) for text in given]
                return [self._encode(text) for text in given]
            if given and all(type(item) is int for item in given):
                return [given]
            if all(isinstance(row, list) and all(type(item) is int for item in row) for row in given):
                return given
        raise CutawayError(
            "Inputs are a text, a list of texts, token ids, or a list of rows of token ids, not a mixture or anything "
            "else."
        )

    def _encode(self, text: str) -> list[int]:
        assert self.tokenizer is not None
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise CutawayError(
                f"The prompt is not valid Unicode text ({error.reason} at character {error.start})."
            ) from error
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        assert isinstance(ids, list)
        return [int(i) for i in ids]

    def _with_bos(self, row: list[int], bos: bool | None, text: bool) -> list[int]:
        start = self.bos_id
        if bos is True and start is None:
            raise CutawayError(f"{self.name} has no beginning-of-text token; leave bos out.")
        if start is not None and len(row) > 1 and row[0] == row[1] == start:
            raise CutawayError(f"The prompt starts with two beginning-of-text tokens: {self._why_doubled(row, text)}.")
        has = start is not None and bool(row) and row[0] == start
        if bos is True and not has:
            assert start is not None
            return [start, *row]
        return row[1:] if bos is False and has else row

    def _why_doubled(self, row: list[int], text: bool) -> str:
        """What put two beginning-of-text tokens before a prompt, and the way out."""
        start = self.bos_id
        if text and self._encode("a")[:1] == [start]:
            return "the tokenizer adds one, so leave it out"
        if text:
            return "the text itself has both, and the tokenizer adds none, so leave one out"
        n = next((k for k, i in enumerate(row) if i != start), len(row))
        if start == self.pad_id:
            return (
                f"the ids begin with {n} of {start}, which is the padding token too; if that is padding, give what the "
                "tokenizer returned, which has the attention_mask, and otherwise leave one out"
            )
        return f"the ids begin with {n} of {start}, so leave one out"

    def _padding(self) -> int:
        return next((i for i in (self.pad_id, self.bos_id) if i is not None and i < self.d_vocab_in), 0)

    def chat_tokens(self, messages: Sequence[Message] | Sequence[Sequence[Message]], *, answer: bool = True) -> Tokens:
        """Conversations through the model's chat template.

        Args:
            messages: a list of {"role": ..., "content": ...}, or a list of such lists.
            answer: leave the assistant's turn open, to be answered.

        Returns:
            One row per conversation.

        Raises:
            CutawayError: a model without a chat template, or messages that it refuses.

        Example:
            lm.chat_tokens([{"role": "user", "content": "What is the capital of France?"}])
        """
        if self.tokenizer is None or getattr(self.tokenizer, "chat_template", None) is None:
            raise CutawayError(f"{self.name} has no chat template; give it plain text with lm.generate.")
        conversations = _conversations(messages)
        rows = []
        for conversation in conversations:
            try:
                ids = self.tokenizer.apply_chat_template(
                    [dict(m) for m in conversation],  # type: ignore[arg-type]
                    tokenize=True,
                    add_generation_prompt=answer,
                    return_dict=False,
                )
            except Exception as error:  # the template is the model's own program and may raise anything
                raise CutawayError(f"The chat template of {self.name} refuses these messages: {error}") from error
            rows.append([int(i) for i in ids])  # type: ignore[union-attr]
        return self.tokens(rows)


def _conversations(messages: Any) -> list[list[Message]]:
    """One conversation or several, as a list of lists of messages."""
    given = list(messages) if isinstance(messages, Sequence) and not isinstance(messages, str) else []
    if given and all(isinstance(message, Mapping) for message in given):
        return [given]
    if given and all(isinstance(c, Sequence) and c and all(isinstance(m, Mapping) for m in c) for c in given):
        return [list(conversation) for conversation in given]
    raise CutawayError(
        'A chat is a list of messages such as [{"role": "user", "content": "Hello"}], or a list of such lists; got '
        f"{messages!r}."
    )


def _plain(values: Any) -> Any:
    """A tensor, an array or a tuple as a list; anything else as it is."""
    if isinstance(values, tuple):
        return list(values)
    return values.tolist() if hasattr(values, "tolist") else values


def _single(index: Any) -> int | None:
    return index if isinstance(index, int) else None
