"""The parts of decoding that are ours: per-row sampling, log-probabilities, ends of texts, and what each step saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from cutaway.artifacts.errors import CutawayError
from cutaway.model.attached import Attached
from cutaway.model.edits.resolve import Resolved, is_grid
from cutaway.model.edits.values import generator, row_key
from cutaway.model.forward.execution import Execution
from cutaway.model.tokens import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Draw(LogitsProcessor):
    """Leaves one token per row, drawn with random numbers of the row's own.

    They derive from the seed, the prompt's tokens and the number of the sequence, so neither the batch around a row nor
    other threads nor the global seed have a part in them. The token is where the cumulated probability passes a uniform
    number: tiny differences of the logits move it only next to a border.
    """

    def __init__(self, seed: int, prompts: Tokens, n: int) -> None:
        keys = [row_key(seed, prompts.row_ids(row)) for row in range(len(prompts))]
        self.generators = [generator(key, "sample", k) for key in keys for k in range(n)]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        wide = torch.float32 if scores.device.type == "mps" else torch.float64  # which has no float64
        cumulated = scores.to(wide).softmax(-1).cumsum(-1)
        total = cumulated[:, -1:]
        uniform = torch.tensor([g.random() for g in self.generators], dtype=wide, device=scores.device)[:, None]
        last = (cumulated < total).sum(-1, keepdim=True)  # the last token that has any probability
        drawn = torch.minimum((cumulated <= uniform * total).sum(-1, keepdim=True), last)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


class LogProbabilities(LogitsProcessor):
    """Notes the log-probability of each chosen token, before temperature and the choice among the likeliest."""

    def __init__(self) -> None:
        self.pending: Tensor | None = None
        self.chosen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        self.settle(input_ids)
        self.pending = scores.float().log_softmax(-1)
        return scores

    def settle(self, sequences: Tensor) -> None:
        """Take the log-probabilities of the newest tokens of `sequences` [b, columns]."""
        if self.pending is not None:
            self.chosen.append(self.pending.gather(1, sequences[:, -1:])[:, 0])
            self.pending = None

    def rows(self, new_ids: Sequence[Sequence[int]]) -> tuple[tuple[float, ...], ...]:
        """One number a new token."""
        table = torch.stack(self.chosen, 1).tolist() if self.chosen else [[] for _ in new_ids]
        return tuple(tuple(row[: len(ids)]) for row, ids in zip(table, new_ids, strict=True))


class Ends(StoppingCriteria):
    """When each row has read enough: at a stop text, or when the caller has had enough of all of them.

    `lengths[row]` is the number of new tokens up to and with the one that completed the stop text. `late` lets the
    model read that token too, for what it sees there.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, stop: Sequence[str], width: int, n_rows: int, late: bool
    ) -> None:
        self.tokenizer, self.stop, self.width, self.late = tokenizer, tuple(stop), width, late
        self.lengths: list[int | None] = [None] * n_rows
        self.cancelled = False

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:  # type: ignore[override]
        before = [length is not None for length in self.lengths]
        if self.stop:
            assert self.tokenizer is not None
            for row, ids in enumerate(input_ids[:, self.width :].tolist()):
                if self.lengths[row] is None:
                    text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
                    if any(stop in text for stop in self.stop):
                        self.lengths[row] = len(ids)
        done = before if self.late else [length is not None for length in self.lengths]
        return torch.tensor([self.cancelled or d for d in done], device=input_ids.device)


def cut(text: str, stop: Sequence[str]) -> str:
    """A text up to the first stop text in it."""
    places = [text.find(s) for s in stop if s in text]
    return text[: min(places)] if places else text


@dataclass(frozen=True)
class GenerationStep:
    """One new token of each row, as it is made.

    Attributes:
        step: its number, from 0.
        ids: the new id of each row, None where the row has ended.
        pieces: the text of each row that became certain with this step (bytes of an unfinished character and the
            beginnings of a stop text wait). A row's pieces joined are its text.
    """

    step: int
    ids: tuple[int | None, ...]
    pieces: tuple[str, ...]


class Steps(BaseStreamer):
    """Turns what `generate` of transformers streams, whole batches included, into steps for a callback."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        ends: Sequence[int],
        until: Ends,
        max_new_tokens: int,
        on_step: Callable[[GenerationStep], object],
    ) -> None:
        self.tokenizer, self.ends, self.until = tokenizer, frozenset(ends), until
        self.max_new_tokens, self.on_step = max_new_tokens, on_step
        n = len(until.lengths)
        self.ids: list[list[int]] = [[] for _ in range(n)]
        self.shown = [""] * n
        self.open = [True] * n
        self.made = -1  # the prompt comes first

    def put(self, value: Tensor) -> None:
        if self.until.cancelled:
            return
        step, self.made = self.made, self.made + 1
        if not 0 <= step < self.max_new_tokens or not any(self.open):
            return
        now: list[int | None] = []
        pieces = []
        for row, token in enumerate(value.tolist()):
            was_open = self.open[row]
            if was_open and token not in self.ends:
                self.ids[row].append(token)
                now.append(token)
            else:
                self.open[row] = False
                now.append(None)
            if self.until.lengths[row] is not None or step == self.max_new_tokens - 1:
                self.open[row] = False
            pieces.append(self._piece(row) if was_open else "")
        self.on_step(GenerationStep(step, tuple(now), tuple(pieces)))

    def _piece(self, row: int) -> str:
        if self.tokenizer is None:
            return ""
        text = cut(str(self.tokenizer.decode(self.ids[row], skip_special_tokens=True)), self.until.stop)
        if self.open[row]:
            held = max((k for s in self.until.stop for k in range(1, len(s)) if text.endswith(s[:k])), default=0)
            text = text[: len(text) - held].rstrip("\ufffd")
        if not text.startswith(self.shown[row]):
            return ""  # a tokenizer that takes back what it said; the rest comes with the row's end
        piece, self.shown[row] = text[len(self.shown[row]) :], text
        return piece

    def end(self) -> None:
        pass


class Recorder(Execution):
    """The execution of a whole generation, which captures what each forward reads anew."""

    def __init__(
        self, lm: Attached, capture: Sequence[str], edits: Sequence[Resolved], mask: Tensor, use_cache: bool
    ) -> None:
        super().__init__(lm, capture, edits, mask)
        self.use_cache = use_cache
        self.end = 0
        self.fresh = 0  # columns that the current forward reads anew
        self.pieces: dict[str, list[tuple[int, Tensor]]] = {}

    def begin(self, ids: Tensor) -> None:
        """A forward reads `ids` [rows, columns], which follow those of the forwards before it where they are cached.

        A model that drops its cache (where its rotary angles change) reads all of them anew.
        """
        known, read = self.end, ids.shape[1]
        self.end, self.fresh = read if read == known + 1 or not self.use_cache else known + read, read
        if self.end == read:
            self.pieces.clear()
        if known:
            for edit in (edit for edits in self.resolved.values() for edit in edits):
                edit.read(ids[:, read - (self.end - known) :])

    def record(self, name: str, value: Tensor, *, own: bool = False) -> Tensor:
        """Keep the columns that are new."""
        if name in self.capture:
            dim = 2 if is_grid(name) else 1
            if value.shape[dim] < self.fresh:
                raise CutawayError(f"'{name}' is computed at the last token only in a generation of {self.lm.name}.")
            newest = value.detach().narrow(dim, value.shape[dim] - self.fresh, self.fresh).clone()
            self.pieces.setdefault(name, []).append((self.end, newest))
        return value

    def aligned(self, names: Sequence[str], tokens: Tokens, first: Sequence[int]) -> dict[str, Tensor]:
        """The captures in the columns of `tokens` (right padded) instead of those of the generation, whose rows begin
        at the columns `first`. Padding is 0, and -inf in scores.
        """
        return {name: self._aligned(name, tokens, first) for name in names}

    def _aligned(self, name: str, tokens: Tokens, first: Sequence[int]) -> Tensor:
        pieces, grid = self.pieces[name], is_grid(name)
        fill = -torch.inf if name.endswith(".scores") else 0.0
        if grid:  # keys are as many as there were, and end with the newest column
            total = pieces[-1][0]
            parts = [
                torch.nn.functional.pad(part, (end - part.shape[-1], total - end), value=fill) for end, part in pieces
            ]
            whole = torch.cat(parts, 2).transpose(1, 2)
        else:
            whole = torch.cat([part for _, part in pieces], 1)
        n, width = tokens.ids.shape
        shape = (n, width, whole.shape[2], width) if grid else (n, width, *whole.shape[2:])
        out = whole.new_full(shape, fill)
        for row, (start, length) in enumerate(zip(first, tokens.lengths.tolist(), strict=True)):
            here = whole[row, start : start + length]
            if grid:
                out[row, :length, :, :length] = here[..., start : start + length]
            else:
                out[row, :length] = here
        return out.transpose(1, 2) if grid else out
