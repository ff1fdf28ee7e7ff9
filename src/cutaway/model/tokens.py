"""Token ids in a padded batch, with their mask: the one way in which inputs travel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Strings = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, eq=False)
class Tokens:
    """A padded batch of token ids.

    `ids` is int64 [b, p]; `mask` is bool [b, p], True on real tokens, which are contiguous in each row. Rows are
    padded on the right unless the caller made them otherwise. A *position* counts a row's real tokens from 0, or back
    from -1; a *column* is an index into `ids`. `spelling` is what `strings` returns, or a function that makes it when
    it is first asked for.
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
        """Rows of one length [b, p], neither of them 0: nothing is padded, so there is nothing to check."""
        tokens = object.__new__(cls)
        mask = torch.ones_like(ids, dtype=torch.bool)
        tokens.__dict__.update(ids=ids, mask=mask, spelling=spelling, padded=False)
        return tokens

    @cached_property
    def strings(self) -> Strings:
        """The real tokens of each row as text."""
        return self.spelling() if callable(self.spelling) else self.spelling

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
        """The column of a row's position (0 is its first real token, -1 its last)."""
        self._check_row(row)
        length = int(self.lengths[row])
        index = position + length if position < 0 else position
        if not 0 <= index < length:
            raise CutawayError(f"Position {position} is outside row {row}, which has {length} tokens.")
        return int(self.first[row]) + index

    def row_ids(self, row: int) -> list[int]:
        """The real token ids of a row."""
        return self.ids[row][self.mask[row]].tolist()

    def find(self, row: int, text: str, occurrence: int = -1) -> int:
        """Position of the last token of `text` in a row: its `occurrence`-th appearance (-1 is the last one)."""
        found = self.find_all(row, text)
        if not found or not -len(found) <= occurrence < len(found):
            raise CutawayError(
                f"'{text}' does not occur{f' {occurrence} times' if found else ''} in row {row}: "
                f"{''.join(self.strings[row])!r}."
            )
        return found[occurrence]

    def find_all(self, row: int, text: str) -> list[int]:
        """Position of the last token of each appearance of `text` in a row, overlapping ones included."""
        self._check_row(row)
        joined, ends = "", []
        for string in self.strings[row]:
            joined += string
            ends.append(len(joined))
        starts = [i for i in range(len(joined)) if joined.startswith(text, i)] if text else []
        return [next(i for i, e in enumerate(ends) if e >= start + len(text)) for start in starts]

    def _check_row(self, row: int) -> None:
        if not -len(self) <= row < len(self):
            raise CutawayError(f"There is no row {row}: these tokens have {len(self)} rows (0 to {len(self) - 1}).")

    def __getitem__(self, rows: int | slice | Sequence[int]) -> Tokens:
        chosen = list(range(len(self)))[rows] if isinstance(rows, slice) else rows
        chosen = [chosen] if isinstance(chosen, int) else list(chosen)
        return Tokens(self.ids[chosen], self.mask[chosen], lambda: tuple(self.strings[i] for i in chosen))

    def repeat(self, n: int) -> Tokens:
        """Each row n times, one after another (row 0 n times, then row 1)."""
        rows = [row for row in range(len(self)) for _ in range(n)]
        return self[rows]

    def to(self, device: torch.device | str) -> Tokens:
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


def token_string(tokenizer: PreTrainedTokenizerBase | None, index: int) -> str:
    """One token as text, with the space in front of it that a plain decode of sentencepiece tokens drops."""
    if tokenizer is None:
        return f"⟨{index}⟩"
    token = tokenizer.convert_ids_to_tokens(index)
    if token is None:
        return f"⟨{index}⟩"
    if isinstance(token, str) and "▁" in token:
        return token.replace("▁", " ")
    if isinstance(token, str) and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        byte = int(token[3:5], 16)
        return chr(byte) if byte < 128 else "�"
    return str(tokenizer.decode([index], clean_up_tokenization_spaces=False))


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
