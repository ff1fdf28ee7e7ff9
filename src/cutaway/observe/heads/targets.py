"""How much attention goes to a target: the cells that a kind of head looks for, and the score of a needle.

Only rows (destinations) that *have* a target count: a row without one would pull a perfect head's score down. A cell
counts only where it is in sight: a sliding window hides far targets, and a hidden one says nothing about a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.model.language_model import Inputs, LanguageModel
from cutaway.model.tokens import Tokens
from cutaway.observe.heads.kinds import KindScores, Sums, attention_layers


@dataclass(frozen=True, eq=False)
class TargetAttention:
    """Sums over the rows of each sequence that have a target in sight: [b, H], or [b] where heads share it."""

    mass: Tensor
    elsewhere: Tensor
    rows: Tensor
    elsewhere_rows: Tensor
    even: Tensor


def attention_to(pattern: Tensor, target: Tensor, seen: Tensor, first: Tensor) -> TargetAttention:
    """How much attention goes to the target cells, in the rows that have one.

    `pattern` [b, H, q, k]; `target` and `seen` bool [b, q, k]; `first` [b] is each row's first real column. `elsewhere`
    is what targets moved to other cells of their rows would get (the exact mean over all ways to move them; the first
    token, where heads rest, is no such place), `even` what attention spread over everything in sight would give.
    """
    target = target & seen
    has = target.any(-1)
    size = target.sum(-1).double()
    mass = torch.einsum("bhqk,bqk->bhq", pattern.double(), target.double())
    others = seen & ~target
    others &= torch.arange(seen.shape[-1])[None, None] != first[:, None, None]
    n_others = others.sum(-1)
    movable = has & (n_others > 0)
    moved = torch.einsum("bhqk,bqk->bhq", pattern.double(), others.double()) * (size / n_others.clamp(min=1))[:, None]
    return TargetAttention(
        mass=(mass * has[:, None]).sum(-1),
        elsewhere=(moved * movable[:, None]).sum(-1),
        rows=has.sum(-1).double(),
        elsewhere_rows=movable.sum(-1).double(),
        even=(size / seen.sum(-1).clamp(min=1) * has).sum(-1),
    )


def in_sight(scores: Tensor, real: Tensor) -> Tensor:
    """Cells that a layer's mask leaves open, bool [b, q, k]: `scores` [b, H, q, k] are not -inf, both tokens `real`.

    The pattern would not do: in half precision what is far below the largest score rounds to 0.
    """
    return (scores > torch.finfo(scores.dtype).min).any(1).cpu() & real


def _previous_targets(tokens: Tokens) -> Tensor:
    """[b, q, k]: the token before."""
    return _offset(tokens, 1)


def _current_targets(tokens: Tokens) -> Tensor:
    """[b, q, k]: the token itself."""
    return _offset(tokens, 0)


def _first_targets(tokens: Tokens) -> Tensor:
    """[b, q, k]: the first token, from the third on (to the second it is the token before)."""
    columns = torch.arange(tokens.ids.shape[1])
    start = tokens.first.cpu()[:, None, None]
    return real_cells(tokens) & (columns[None, None] == start) & (columns[None, :, None] >= start + 2)


def _duplicate_targets(tokens: Tokens) -> Tensor:
    """[b, q, k]: every earlier place of the same token."""
    ids = tokens.ids.cpu()
    return real_cells(tokens) & (ids[:, :, None] == ids[:, None, :]) & _below(tokens)


def _induction_targets(tokens: Tokens) -> Tensor:
    """[b, q, k]: every earlier token that follows an earlier place of the same token (never the token itself)."""
    after = torch.nn.functional.pad(_duplicate_targets(tokens)[:, :, :-1], (1, 0))
    return after & _below(tokens) & real_cells(tokens)


def real_cells(tokens: Tokens) -> Tensor:
    """[b, q, k]: both tokens are real, no padding."""
    mask = tokens.mask.cpu()
    return mask[:, :, None] & mask[:, None, :]


def _below(tokens: Tokens) -> Tensor:
    p = tokens.ids.shape[1]
    return torch.ones(p, p, dtype=torch.bool).tril(-1)


def _offset(tokens: Tokens, back: int) -> Tensor:
    p = tokens.ids.shape[1]
    return real_cells(tokens) & torch.ones(p, p, dtype=torch.bool).tril(-back).triu(-back)


TARGETS: dict[str, Callable[[Tokens], Tensor]] = {
    "previous": _previous_targets,
    "duplicate": _duplicate_targets,
    "induction": _induction_targets,
    "current": _current_targets,
    "first": _first_targets,
}


def retrieval_scores(
    lm: LanguageModel,
    inputs: Inputs,
    needle: str | Tensor | Sequence[Sequence[int]],
    *,
    queries: Tensor | None = None,
) -> KindScores:
    """Attention of every head from each row's last token to the needle.

    Rows without a needle before them do not count.

    Args:
        lm: the model.
        inputs: prompts that hold the needle.
        needle: a text (every token of its every appearance, by character), a bool mask [b, p], or a list of positions
            for each row.
        queries: bool [b, p]: other destinations than the last token.

    Returns:
        The scores of every head.

    Raises:
        CutawayError: a needle that stands in no prompt before a destination.
    """
    tokens = lm.tokens(inputs)
    mask = needle_mask(tokens, needle)
    if queries is None:
        asked = torch.zeros_like(tokens.mask.cpu())
        asked[torch.arange(len(tokens)), tokens.last.cpu()] = True
    else:
        asked = _as_mask(queries, tokens, "queries")
    target = real_cells(tokens) & asked[:, :, None] & mask[:, None, :] & _below(tokens)
    return _targeted(lm, tokens, {"retrieval": target})["retrieval"]


def needle_mask(tokens: Tokens, needle: str | Tensor | Sequence[Sequence[int]]) -> Tensor:
    """Bool [b, p] of the needle's tokens: of a text, a mask, or positions row by row (see `retrieval_scores`)."""
    if isinstance(needle, Tensor):
        return _as_mask(needle, tokens, "needle")
    mask = torch.zeros(tuple(tokens.ids.shape), dtype=torch.bool)
    if isinstance(needle, str):
        for row in range(len(tokens)):
            text = tokens.text(row)
            for hit in (i for i in range(len(text)) if needle and text.startswith(needle, i)):
                first, last = tokens.covering(row, hit, hit + len(needle))
                start = tokens.column(row, first)
                mask[row, start : start + last - first + 1] = True
        if not bool(mask.any()):
            raise CutawayError(f"The needle {needle!r} stands in none of the prompts; give it as it is written there.")
        return mask
    if len(needle) != len(tokens):
        raise CutawayError(f"The needle has positions for {len(needle)} rows, but there are {len(tokens)} prompts.")
    for row, positions in enumerate(needle):
        for position in positions:
            mask[row, tokens.column(row, int(position))] = True
    return mask


def _as_mask(mask: Tensor, tokens: Tokens, what: str) -> Tensor:
    if mask.shape != tokens.mask.shape or mask.dtype != torch.bool:
        raise CutawayError(
            f"The mask of {what} is a bool tensor of the tokens' shape {tuple(tokens.mask.shape)}; got {mask.dtype} "
            f"{tuple(mask.shape)}."
        )
    return mask.cpu()


def _targeted(lm: LanguageModel, tokens: Tokens, targets: dict[str, Tensor]) -> dict[str, KindScores]:
    layers, _ = attention_layers(lm, "pattern", "scores")
    real = real_cells(tokens)
    for kind, target in targets.items():
        if not bool(target.any()):
            raise CutawayError(
                f"No row of these prompts has a target for the {kind} score, so there is nothing to read."
            )
    sums = {kind: Sums(len(tokens), lm) for kind in targets}
    first = tokens.first.cpu()
    for row in range(len(tokens)):  # one prompt's patterns at a time: they are [L, H, p, p]
        part = slice(row, row + 1)
        sites = [f"blocks.{layer}.attn.{site}" for layer in layers for site in ("pattern", "scores")]
        run = lm.run(tokens[[row]], capture=sites, logits=None)
        for layer in layers:
            pattern = run[f"blocks.{layer}.attn.pattern"].float().cpu()
            seen = in_sight(run[f"blocks.{layer}.attn.scores"], real[part])
            for kind, target in targets.items():
                add(sums[kind], part, layer, attention_to(pattern, target[part], seen, first[part]))
    return {kind: s.scores(kind, "targets moved within their rows") for kind, s in sums.items()}


def add(sums: Sums, rows: slice, layer: int, found: TargetAttention) -> None:
    sums.above[rows, layer] = found.mass
    sums.below[rows, layer] = found.rows[:, None].expand_as(found.mass)
    sums.control_above[rows, layer] = found.elsewhere
    sums.control_below[rows, layer] = found.elsewhere_rows[:, None].expand_as(found.mass)
    sums.uniform[rows, layer] = found.even
