"""A small model seen by cutaway and by hand-written hooks, and how their values are compared."""

from collections.abc import Callable
from typing import Any

import torch
from hand_hooks import ByHand, positions_of
from tiny import LENGTHS, random_rows, tiny_model
from torch import Tensor, nn

from cutaway.model.language_model import attach
from cutaway.model.tokens import Tokens, pad_rows


class Subject:
    """One small model, seen by cutaway (`lm`) and by hand-written hooks on a copy of it (`by_hand`)."""

    def __init__(self, family: str) -> None:
        self.family = family
        self.hf = tiny_model(family)
        self.lm = attach(self.hf, name=f"tiny {family}")
        self.by_hand = ByHand(family, self.hf)
        self.rows = random_rows(LENGTHS)

    def tokens(self, side: str = "right", rows: list[list[int]] | None = None) -> Tokens:
        """The subject's rows as a batch, padded on the given side."""
        rows = self.rows if rows is None else rows
        ids, mask = pad_rows(rows, 1, side)
        return Tokens(ids, mask, tuple(tuple(str(i) for i in row) for row in rows))


Subjects = Callable[[str], Subject]


def plain(model: nn.Module, tokens: Tokens, **options: Any) -> Any:
    """The Hugging Face call that cutaway makes."""
    with torch.no_grad():
        return model(
            input_ids=tokens.ids,
            attention_mask=tokens.mask.long(),
            position_ids=positions_of(tokens.mask),
            use_cache=False,
            **options,
        )


def close(left: Tensor, right: Tensor, tolerance: float = 1e-5) -> None:
    """Equal where finite, relative to the largest value; minus infinity in the same places."""
    assert left.shape == right.shape
    hidden = right == -torch.inf
    assert torch.equal(left == -torch.inf, hidden)
    left, right = left.masked_fill(hidden, 0), right.masked_fill(hidden, 0)
    assert float((left - right).abs().max()) <= tolerance * max(float(right.abs().max()), 1e-6)
