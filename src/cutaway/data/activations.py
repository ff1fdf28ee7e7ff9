"""Activations of a model on rows of tokens, shuffled, as an endless stream of batches that can be entered anywhere."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.data.hardware import keep_freed_memory
from cutaway.model.tokens import Tokens

_ROWS_A_FORWARD = 16


class Running(Protocol):
    """What is needed of a language model here; `cutaway.model.LanguageModel` has it."""

    @property
    def bos_id(self) -> int | None: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def run(self) -> Callable[..., Any]: ...


def counted(rows: Tensor, bos_id: int | None) -> Tensor:
    """Which positions of rows [n, p] count: bool [n, p]. Not the first of a row, and no BOS anywhere.

    Models park attention on the first position; its activation is often a hundred times longer than any other, and
    one direction would explain most of the variance.
    """
    keep = torch.ones_like(rows, dtype=torch.bool)
    keep[:, 0] = False
    return keep if bos_id is None else keep & (rows != bos_id)


def as_tokens(rows: Tensor) -> Tokens:
    """Rows [n, p] without padding as a model's input. Strings are left out: making them costs more than a forward."""
    return Tokens(rows, torch.ones_like(rows, dtype=torch.bool), ((),) * len(rows))


def harvest(lm: Running, rows: Tensor, site: str, *, low_precision: bool = False) -> Tensor:
    """Activations at `site` of the positions of rows [n, p] that count, in their order: float32 [m, d].

    The forward stops after the site. `low_precision` lets the forward's matrix products run in bfloat16.
    """
    keep_freed_memory()
    mask = counted(rows, lm.bos_id)
    found: Tensor = torch.empty(0)
    end = 0
    for start in range(0, len(rows), _ROWS_A_FORWARD):
        part = slice(start, start + _ROWS_A_FORWARD)
        with torch.autocast(lm.device.type, dtype=torch.bfloat16, enabled=low_precision):
            captured = lm.run(as_tokens(rows[part]), capture=site, logits=None)[site]
        if captured.ndim != 3:
            raise CutawayError(
                f"{site} has shape {list(captured.shape)}: a dictionary needs one vector a position, [batch, pos, d]"
            )
        kept = captured[mask[part].to(captured.device)]
        if not end:  # one allocation, filled in place: concatenating would take twice the memory
            found = kept.new_empty((int(mask.sum()), kept.shape[-1]), dtype=torch.float32)
        found[end : end + len(kept)] = kept
        end += len(kept)
    return found


def activation_batches(
    lm: Running,
    rows: Tensor,
    site: str,
    *,
    batch_tokens: int,
    seed: int = 0,
    start: int = 0,
    passes: int = 1,
    buffer_tokens: int = 1 << 18,
    low_precision: bool = False,
) -> Iterator[Tensor]:
    """Endless shuffled batches [batch_tokens, d] of the activations at `site` of rows [n, p], from batch `start` on.

    Rows are shuffled and taken in buffers of about `buffer_tokens` tokens, so memory is that of one buffer however long
    the corpus. Each buffer is used `passes` times in a new order before the next one replaces it: on a small model the
    forward costs more than a training step, and a token bears being seen a few times. When all rows have been used they
    are shuffled anew. Batch t depends on t and the arguments alone, so a stream entered at `start` is the one that an
    interrupted run would have gone on with. Raises `CutawayError` when the rows hold less than one batch.
    """
    lengths = counted(rows, lm.bos_id).sum(1)
    if int(lengths.sum()) < batch_tokens:
        raise CutawayError(
            f"the corpus has {int(lengths.sum())} tokens, less than one batch of {batch_tokens}: give a longer corpus "
            "or a smaller batch"
        )
    number, turn = 0, 0
    while True:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(_seed(seed, turn)))
        for place, piece in enumerate(_pieces(lengths[order].tolist(), buffer_tokens, batch_tokens)):
            chosen = order[piece]
            per_pass = int(lengths[chosen].sum()) // batch_tokens
            if number + per_pass * passes > start:
                buffer = harvest(lm, rows[chosen], site, low_precision=low_precision)
                for again in range(passes):
                    mixed = torch.randperm(
                        len(buffer), generator=torch.Generator().manual_seed(_seed(seed, turn, place, again))
                    )
                    first = max(0, start - number)
                    for batch in range(first, per_pass):
                        yield buffer[mixed[batch * batch_tokens : (batch + 1) * batch_tokens].to(buffer.device)]
                    number += per_pass
                del buffer
            else:
                number += per_pass * passes
        turn += 1


def _pieces(lengths: Sequence[int], buffer_tokens: int, batch_tokens: int) -> Iterator[slice]:
    """Slices of rows that hold `buffer_tokens` tokens or just more; the last one takes a short remainder too."""
    size = max(buffer_tokens, batch_tokens)
    begin = held = 0
    left = sum(lengths)
    for row, length in enumerate(lengths):
        held += length
        left -= length
        if held >= size and left >= size:
            yield slice(begin, row + 1)
            begin, held = row + 1, 0
    yield slice(begin, len(lengths))


def _seed(*parts: int) -> int:
    """One seed of several numbers; distinct numbers give distinct seeds in practice."""
    mixed = 0
    for part in parts:
        mixed = (mixed * 6364136223846793005 + part + 1442695040888963407) % (1 << 62)
    return mixed
