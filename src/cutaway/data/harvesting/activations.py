"""Activations of models on rows of tokens, shuffled, as an endless stream of batches that can be entered anywhere."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.data.harvesting.hardware import keep_freed_memory
from cutaway.data.harvesting.settings import Rules
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


def counted(rows: Tensor, bos_id: int | None, rules: Rules | None = None) -> Tensor:
    """Which positions of rows [n, p] count: bool [n, p]. Not the first of a row, and no BOS anywhere, unless `rules`
    keep them.

    Models park attention on the first position; its activation is often a hundred times longer than any other, and
    one direction would explain most of the variance.
    """
    rules = rules or Rules()
    keep = torch.ones_like(rows, dtype=torch.bool)
    if rules.first_position == "drop":
        keep[:, 0] = False
    return keep & (rows != bos_id) if bos_id is not None and rules.bos == "drop" else keep


def as_tokens(rows: Tensor) -> Tokens:
    """Rows [n, p] without padding as a model's input. Strings are left out: making them costs more than a forward."""
    return Tokens(rows, torch.ones_like(rows, dtype=torch.bool), ((),) * len(rows))


def read_activations(lm: Running, rows: Tensor, site: str, *, low_precision: bool = False) -> Tensor:
    """Activations at one site, in memory: of every token but the first of each row and beginning-of-text tokens.

    Args:
        lm: The model.
        rows: Token ids without padding [n, p].
        site: A site with one vector per token; one by head is flattened.
        low_precision: Let the forward's matrix products run in bfloat16.

    Returns:
        float32 [m, width], in the order of the tokens.

    Raises:
        CutawayError: The site has no vector per token, or values that are not finite.
    """
    return harvest_sites(lm, rows, [site], counted(rows, lm.bos_id), low_precision=low_precision)[site]


def harvest_sites(
    lm: Running, rows: Tensor, sites: Sequence[str], keep: Tensor, *, low_precision: bool = False
) -> dict[str, Tensor]:
    """Activations at several sites of the positions `keep` (bool [n, p]) of rows [n, p]: by site float32 [m, width].

    One forward, which stops after the last of them, gives all; sites by head are flattened. `low_precision` lets the
    forward's matrix products run in bfloat16. Raises `CutawayError` for a site without one vector per position, and for
    values that are not finite.
    """
    keep_freed_memory()
    found: dict[str, Tensor] = {}
    end = 0
    for start in range(0, len(rows), _ROWS_A_FORWARD):
        part = slice(start, start + _ROWS_A_FORWARD)
        tokens = as_tokens(rows[part].long()).to(lm.device)
        with torch.autocast(lm.device.type, dtype=torch.bfloat16, enabled=low_precision):
            run = lm.run(tokens, capture=list(sites), logits=None)
        n = 0
        for site in sites:
            captured: Tensor = run[site]
            if captured.ndim < 3 or captured.shape[:2] != tokens.ids.shape:
                raise CutawayError(
                    f"{site} has shape {list(captured.shape)}: a dictionary needs one vector per position, [b, p, d]"
                )
            kept = captured[keep[part].to(captured.device)].flatten(1)
            n = len(kept)
            if site not in found:  # one allocation, filled in place: concatenating would take twice the memory
                found[site] = kept.new_empty((int(keep.sum()), kept.shape[1]), dtype=torch.float32)
            found[site][end : end + n] = kept
        end += n
    for site, values in found.items():
        # a sum is many times faster, and finite only if all is; where it is not, it may have been too large itself
        if not torch.isfinite(values.sum()) and not torch.isfinite(values).all():
            raise CutawayError(
                f"the activations at {site} hold NaN or infinite values: load the model in float32, or look for the "
                "first site that holds them"
            )
    return found


def shuffled_batches(
    lengths: Tensor,
    fill: Callable[[Tensor], Mapping[str, Tensor]],
    *,
    batch_tokens: int,
    seed: int = 0,
    start: int = 0,
    passes: int = 1,
    buffer_tokens: int = 1 << 18,
) -> Iterator[dict[str, Tensor]]:
    """Endless shuffled batches of the activations of rows, by site [batch_tokens, width], from batch `start` on.

    `lengths` [n] says how many positions of each row count, and `fill(chosen)` gives their activations for some rows,
    by site [m, width]. All rows are shuffled and taken in buffers of about `buffer_tokens` tokens, and the tokens of a
    buffer are shuffled: so tokens of one row meet only tokens of the rows that fell into the same buffer, and memory is
    that of one buffer however long the corpus. Each buffer is used `passes` times in a new order before the next one
    replaces it: on a small model the forward costs more than a training step, and a token bears being seen a few times.
    When all rows have been used they are shuffled anew.

    Batch t depends on t and the arguments alone, so a stream entered at `start` is the one that an interrupted run
    would have gone on with; nothing is run for what lies before. Where `fill` leaves tokens out, others of the buffer
    take their places. Raises `CutawayError` when the rows hold less than one batch.
    """
    if int(lengths.sum()) < batch_tokens:
        raise CutawayError(
            f"the corpus has {int(lengths.sum())} tokens, less than one batch of {batch_tokens}: give a longer corpus "
            "or a smaller batch"
        )
    return _shuffled(lengths, fill, batch_tokens, seed, start, passes, buffer_tokens)


def _shuffled(
    lengths: Tensor,
    fill: Callable[[Tensor], Mapping[str, Tensor]],
    batch_tokens: int,
    seed: int,
    start: int,
    passes: int,
    buffer_tokens: int,
) -> Iterator[dict[str, Tensor]]:
    number, turn = 0, 0
    while True:
        order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(_seed(seed, turn)))
        for place, piece in enumerate(_pieces(lengths[order].tolist(), buffer_tokens, batch_tokens)):
            chosen = order[piece]
            per_pass = int(lengths[chosen].sum()) // batch_tokens
            if number + per_pass * passes > start:
                buffer = fill(chosen)
                for again in range(passes):
                    generator = torch.Generator().manual_seed(_seed(seed, turn, place, again))
                    mixed = _order(buffer, per_pass * batch_tokens, generator)
                    first = max(0, start - number)
                    for batch in range(first, per_pass):
                        some = mixed[batch * batch_tokens : (batch + 1) * batch_tokens]
                        yield {site: values[some.to(values.device)] for site, values in buffer.items()}
                    number += per_pass
                del buffer
            else:
                number += per_pass * passes
        turn += 1


def _order(buffer: Mapping[str, Tensor], wanted: int, generator: torch.Generator) -> Tensor:
    """A random order of the buffer's tokens, gone through again where it holds fewer than `wanted`."""
    n = len(next(iter(buffer.values())))
    if not n:
        raise CutawayError("the rules leave out every token of the corpus: there is nothing to train on")
    orders = [torch.randperm(n, generator=generator) for _ in range(max(1, -(-wanted // n)))]
    return torch.cat(orders)


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
