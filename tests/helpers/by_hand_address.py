"""What an edit's address and kind mean, cell by cell and number by number: the slow, obvious version.

A `Case` is an edit beside its meaning. `expected` loops over rows, positions, heads and entries of one site's value.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cutaway.model.edits.edits import Edit
from cutaway.model.tokens import Tokens


@dataclass(frozen=True)
class Case:
    """`cells(row)` are the positions of a row that the edit touches, in order; `value(x, row, position, ordinal)` is
    one token's new value, whole, as if everything in it were addressed.
    """

    edit: Edit
    cells: Callable[[int], Sequence[int]]
    value: Callable[[Tensor, int, int, int], Tensor]
    heads: Sequence[int] | None = None
    neurons: Sequence[int] | None = None
    basis: Tensor | None = None


def gram_schmidt(basis: Tensor) -> Tensor:
    """Orthonormal rows, one after another, in float64."""
    rows: list[Tensor] = []
    for vector in basis.double():
        for row in rows:
            vector = vector - (vector * row).sum() * row
        rows.append(vector / (vector * vector).sum().sqrt())
    return torch.stack(rows)


def expected(case: Case, x: Tensor, tokens: Tokens) -> Tensor:
    """The site's value [b, p, ..., width] after the edit, in float64."""
    out = x.double().clone()
    for row in range(len(tokens)):
        real = [c for c in range(tokens.ids.shape[1]) if tokens.mask[row, c]]
        for ordinal, position in enumerate(case.cells(row)):
            column = real[position]
            old = x[row, column].double()
            new = case.value(old, row, position, ordinal).double().expand_as(old)
            if case.basis is not None:
                change = torch.zeros_like(old)
                for direction in gram_schmidt(case.basis):
                    change = change + ((new - old) * direction).sum(-1, keepdim=True) * direction
                new = old + change
            heads = [None] if old.ndim == 1 else list(range(old.shape[0])) if case.heads is None else case.heads
            for head in heads:
                for entry in range(old.shape[-1]) if case.neurons is None else case.neurons:
                    at = (row, column, entry) if head is None else (row, column, head, entry)
                    out[at] = new[entry] if head is None else new[head, entry]
    return out
