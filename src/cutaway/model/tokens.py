"""Token ids in a padded batch, with their mask: the one way in which inputs travel."""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Strings = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, eq=False)
class Tokens:
    """A padded batch of token ids, as `lm.tokens(...)` makes it.

    A *position* counts a row's real tokens from 0, or back from -1; a *column* is an index into `ids`. Rows are padded
    on the right unless the caller made them otherwise.

    Attributes:
        ids: int64 [b, p].
        mask: bool [b, p], True on real tokens, which are contiguous in each row.
        spelling: each row's tokens as text, or a function that makes them when they are first asked for; a byte of a
            character that is split over tokens is a surrogate there, as Python's "surrogateescape" writes it, so that
            the tokens of a row joined are its text.

    Example:
        tokens = lm.tokens("The capital of the state containing Dallas is")
        tokens.strings[0], tokens.find(0, " Dallas")
    """

    ids: Tensor
    mask: Tensor
    spelling: Strings | Callable[[], Strings] = field(repr=False)

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.shape != self.mask.shape:
            raise CutawayError(
                f"Tokens need ids and mask of one shape [batch, position]; got {tuple(self.ids.shape)} and "
                f"{tuple(self.mask.shape)}."
            )
        if not self.padded and self.ids.shape[1] > 0:
            return
        if not bool(self.mask.any(dim=1).all()):
            raise CutawayError(
                "A row has no token at all; every prompt needs at least one (a beginning-of-text will do)."
            )
        starts = torch.nn.functional.pad(self.mask.int(), (1, 0)).diff(dim=1) == 1
        if bool((starts.sum(1) > 1).any()):
            raise CutawayError("The mask has holes inside a row; real tokens must be contiguous.")

    @classmethod
    def whole(cls, ids: Tensor, spelling: Strings | Callable[[], Strings]) -> Tokens:
        """Rows of one length, none of them padded, so that there is nothing to check.

        Args:
            ids: int64 [b, p], neither of them 0.
            spelling: each row's tokens as text, or a function that makes them, as the attribute.
        """
        tokens = object.__new__(cls)
        mask = torch.ones_like(ids, dtype=torch.bool)
        tokens.__dict__.update(ids=ids, mask=mask, spelling=spelling, padded=False)
        return tokens

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copies: what the tokens are, spelled out, since a function cannot go along."""
        return {"ids": self.ids, "mask": self.mask, "spelling": self.spelled}

    @cached_property
    def spelled(self) -> Strings:
        """The real tokens of each row as `spelling` has them: parts of characters as surrogates."""
        return self.spelling() if callable(self.spelling) else self.spelling

    @cached_property
    def strings(self) -> Strings:
        """The real tokens of each row as text to show; a token with a part of a character has "�" for it."""
        return tuple(tuple(printable(string) for string in row) for row in self.spelled)

    @cached_property
    def longest(self) -> int:
        """Real tokens in the longest row."""
        return int(self.lengths.max()) if self.padded else self.ids.shape[1]

    @cached_property
    def lengths(self) -> Tensor:
        """Real tokens in each row, int64 [b]."""
        return self.mask.sum(1)

    @cached_property
    def first(self) -> Tensor:
        """Column of each row's first real token, int64 [b]."""
        return self.mask.int().argmax(1)

    @cached_property
    def last(self) -> Tensor:
        """Column of each row's last real token, int64 [b]."""
        return self.first + self.lengths - 1

    @cached_property
    def position_ids(self) -> Tensor:
        """What a model is given as positions, int64 [b, p]: 0 at each row's first real token."""
        if not self.padded:
            return torch.arange(self.ids.shape[1], device=self.ids.device).expand(len(self), -1)
        return (self.mask.long().cumsum(1) - 1).clamp(min=0)

    @cached_property
    def padded(self) -> bool:
        """Whether a row is shorter than the batch."""
        return not bool(self.mask.all())

    def __len__(self) -> int:
        return self.ids.shape[0]

    def column(self, row: int, position: int) -> int:
        """The column of a row's position.

        Args:
            row: the row.
            position: 0 is its first real token, -1 its last.

        Returns:
            An index into `ids[row]`.

        Raises:
            CutawayError: no such row or position.
        """
        self._check_row(row)
        length = int(self.lengths[row])
        index = position + length if position < 0 else position
        if not 0 <= index < length:
            raise CutawayError(f"Position {position} is outside row {row}, which has {length} tokens.")
        return int(self.first[row]) + index

    def row_ids(self, row: int) -> list[int]:
        """The real token ids of a row, as a list.

        Args:
            row: the row.
        """
        return self.ids[row][self.mask[row]].tolist()

    def text(self, row: int) -> str:
        """A row's real tokens as one text, with "�" for a byte that belongs to no character.

        Args:
            row: the row.

        Raises:
            CutawayError: no such row.
        """
        return "".join("�" if _stray(character) else character for character in self._text(row))

    def _text(self, row: int) -> str:
        self._check_row(row)
        return _rejoined("".join(self.spelled[row]))

    def covering(self, row: int, start: int, stop: int) -> tuple[int, int]:
        """First and last position of the tokens that spell some characters of `text(row)`.

        A character that is split over tokens belongs to all of them.

        Args:
            row: the row.
            start: the first character.
            stop: the character behind the last, above `start`.

        Returns:
            The two positions.
        """
        text = self._text(row)
        ends = list(itertools.accumulate(_size(string) for string in self.spelled[row]))
        first, last = _size(text[:start]), _size(text[:stop])
        return bisect.bisect_right(ends, first), bisect.bisect_left(ends, last)

    def find(self, row: int, text: str, occurrence: int = -1) -> int:
        """Position of the last token of a text in a row.

        Args:
            row: the row.
            text: the text, or one token's id as in "#422".
            occurrence: which appearance, counted from 0, or from -1 for the last.

        Returns:
            The position.

        Raises:
            CutawayError: the row does not have it so often.
        """
        found = self.find_all(row, text)
        if not found or not -len(found) <= occurrence < len(found):
            raise CutawayError(
                f"'{text}' does not occur{f' {occurrence} times' if found else ''} in row {row}: "
                f"{self.text(row)!r}{_said_so(text, self.text(row))}."
            )
        return found[occurrence]

    def find_all(self, row: int, text: str) -> list[int]:
        """Position of the last token of each appearance of a text in a row, overlapping ones included.

        Args:
            row: the row.
            text: sought in the row's characters, so one that is split over several tokens is found, at the last of
                them. One token's id, as in "#422", is that token.

        Returns:
            The positions, in order; none where it does not appear.
        """
        named = named_token(text)
        if isinstance(named, int):
            return [position for position, index in enumerate(self.row_ids(row)) if index == named]
        whole = self._text(row)
        starts = [i for i in range(len(whole)) if whole.startswith(named, i)] if named else []
        return [self.covering(row, start, start + len(named))[1] for start in starts]

    def _check_row(self, row: int) -> None:
        if not -len(self) <= row < len(self):
            raise CutawayError(f"There is no row {row}: these tokens have {len(self)} rows (0 to {len(self) - 1}).")

    def __getitem__(self, rows: int | slice | Sequence[int]) -> Tokens:
        chosen = list(range(len(self)))[rows] if isinstance(rows, slice) else rows
        chosen = [chosen] if isinstance(chosen, int) else list(chosen)
        return Tokens(self.ids[chosen], self.mask[chosen], lambda: tuple(self.spelled[i] for i in chosen))

    def repeat(self, n: int) -> Tokens:
        """Each row several times, one after another (row 0 n times, then row 1).

        Args:
            n: how often.
        """
        rows = [row for row in range(len(self)) for _ in range(n)]
        return self[rows]

    def to(self, device: torch.device | str) -> Tokens:
        """The same tokens on another device.

        Args:
            device: the device, such as "cpu" or "cuda:0".
        """
        if self.ids.device == torch.device(device):
            return self
        return Tokens(self.ids.to(device), self.mask.to(device), self.spelling)

    def __repr__(self) -> str:
        rows = [
            f"  {i}: {len(s)} tokens  " + "|".join(x.replace("\n", "⏎") for x in s)
            for i, s in enumerate(self.strings[:4])
        ]
        more = [f"  … and {len(self) - 4} more rows"] if len(self) > 4 else []
        return "\n".join([f"Tokens(batch {len(self)}, {self.ids.shape[1]} columns)", *rows, *more])


def named_token(text: str) -> int | str:
    """A token named by its id, "#422", as the id; any other text as it is, and "\\#422" as the text "#422"."""
    if _ID.fullmatch(text):
        return int(text[1:])
    return text[1:] if text.startswith("\\") and _ID.fullmatch(text[1:]) else text


def next_tokens(ids: Tensor, mask: Tensor, n_answers: int) -> tuple[Tensor, Tensor]:
    """The token behind each but the last of ids [b, p], and whether it counts: both [b, p - 1].

    Those count that follow a real token, are one, and are among the `n_answers` ids that a model answers with; another
    has id 0 here.
    """
    counts = mask[:, 1:] & mask[:, :-1] & (ids[:, 1:] < n_answers)
    return ids[:, 1:].where(counts, 0), counts


def ids_in(text: str) -> list[int]:
    """The ids that a text such as "#3 #5 #1" names, one behind the other, for a model without a tokenizer."""
    parts = text.split()
    if strange := [part for part in parts if not _ID.fullmatch(part)]:
        raise CutawayError(
            f"{strange[0][:40]!r} is no token id, and this model has no tokenizer, so it takes token ids such as "
            "'#3 #5 #1', not text; attach a tokenizer to use text."
        )
    return [int(part[1:]) for part in parts]


def _said_so(text: str, whole: str) -> str:
    """The way out for a text that was taken as an id."""
    return f" (the text itself is written '\\{text}')" if isinstance(named_token(text), int) and text in whole else ""


def _stray(character: str) -> bool:
    return "\udc80" <= character <= "\udcff"


def plain_ids(ids: Any) -> Tensor:
    """Token ids in a list (or a list of lists), an array, a tensor or any iterable, as int64 on the CPU.

    Raises `CutawayError` for what are no whole numbers.
    """
    given = ids if isinstance(ids, (Tensor, list, tuple)) or hasattr(ids, "tolist") else None
    if given is None and isinstance(ids, Iterable) and not isinstance(ids, (str, bytes)):
        given = list(ids)
    try:
        found = torch.as_tensor(given)
        whole = not found.numel() or not (found.is_floating_point() or found.is_complex() or found.dtype is torch.bool)
        found = found.detach().to("cpu", torch.long)
    except (TypeError, ValueError, RuntimeError, NotImplementedError, OverflowError) as error:
        raise CutawayError(f"Token ids are whole numbers; got {brief(ids)}.") from error
    if not whole or found.layout is not torch.strided:
        raise CutawayError(f"Token ids are whole numbers in a list or a plain tensor; got {brief(ids)}.")
    return found


def brief(value: Any) -> str:
    """A value in a few words."""
    text = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else repr(value)
    return text if len(text) < 60 else text[:57] + "…"


def printable(text: str) -> str:
    """A text with "�" for every part of a character, and for half of a surrogate pair."""
    if text.isascii():
        return text
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:  # of a damaged file: no token's bytes
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def token_string(tokenizer: PreTrainedTokenizerBase | None, index: int) -> str:
    """One token as text, with the space in front of it that a plain decode of sentencepiece tokens drops.

    A token that is a part of a character has its bytes as surrogates (Python's "surrogateescape"); `printable` shows
    it.
    """
    if tokenizer is None:
        return f"#{index}"
    token = tokenizer.convert_ids_to_tokens(index)
    if token is None:
        return f"⟨{index}⟩"
    if isinstance(token, str) and "▁" in token:
        return token.replace("▁", " ")
    if isinstance(token, str) and is_byte(token):
        return bytes([int(token[3:5], 16)]).decode("utf-8", "surrogateescape")
    text = str(tokenizer.decode([index], clean_up_tokenization_spaces=False))
    if "�" in text and isinstance(token, str) and all(character in _BYTE_OF for character in token):
        return bytes(_BYTE_OF[character] for character in token).decode("utf-8", "surrogateescape")
    return text


def is_byte(token: str) -> bool:
    """Whether a token of a sentencepiece vocabulary is one byte, as in "<0x0A>"."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _rejoined(text: str) -> str:
    """Bytes that were apart as surrogates, together as the characters that they spell."""
    return text if text.isascii() else text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")


def _size(text: str) -> int:
    """Bytes of a text."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))


def _byte_names() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2's), and the byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ID = re.compile(r"#[0-9]+")
_BYTE_OF = _byte_names()


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """Rows of ids -> ids and mask [b, p], padded on the given side."""
    width = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, where] = torch.as_tensor(row, dtype=torch.long)
        mask[i, where] = True
    return ids, mask
