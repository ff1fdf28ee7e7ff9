"""Where each latent of a dictionary is active in a corpus: one pass over the rows, in memory that does not grow."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.data.harvesting.activations import counted
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.model.language_model import LanguageModel

Rows = Tensor | Sequence[Sequence[int]]


@dataclass(frozen=True, eq=False)
class LatentActivations:
    """The active latents of some tokens, as a sparse table of e entries in no particular order."""

    latent: Tensor
    """Which latent each entry is of, int64 [e]."""
    value: Tensor
    """Its activation, float32 [e], above 0."""
    at: Tensor
    """Its place, row · width + column, int64 [e]."""
    kept: Tensor
    """The places of all tokens that were looked at, int64 [tokens]."""


def width_of(rows: Rows) -> int:
    """Columns of the padded rows."""
    return rows.shape[1] if isinstance(rows, Tensor) else max(len(row) for row in rows)


def latent_activations(
    lm: LanguageModel,
    dictionary: Dictionary,
    rows: Rows,
    index: Sequence[int] | None = None,
    batch_rows: int = 16,
) -> Iterator[LatentActivations]:
    """The active latents of a corpus, a few rows at a time.

    A row's first token, BOS and padding are left out, as they are in training.

    Args:
        lm: The model that the dictionary belongs to.
        dictionary: Reads one site of it.
        rows: Token ids [n, p], or lists of ids of any length.
        index: The rows to read; all of them if None.
        batch_rows: Rows per forward.

    Yields:
        The active latents of the next rows.

    Raises:
        CutawayError: there are no rows.
    """
    width = width_of(rows)
    chosen = list(range(len(rows))) if index is None else list(index)
    if not chosen:
        raise CutawayError("the corpus has no rows to look for latents in")
    for first in range(0, len(chosen), batch_rows):
        part = chosen[first : first + batch_rows]
        ids = [list(map(int, rows[i])) for i in part]
        tokens = lm.tokens(ids)
        run = lm.run(tokens, capture=dictionary.site, logits=None)
        keep = tokens.mask & counted(tokens.ids, lm.bos_id)
        if lm.pad_id is not None:
            keep &= tokens.ids != lm.pad_id
        r, c = keep.nonzero(as_tuple=True)
        values, latents = dictionary.encode_sparse(run[dictionary.site][keep])
        at = (torch.tensor(part)[r.cpu()] * width + c.cpu())[:, None].expand(-1, values.shape[1])
        values, latents = values.detach().float().cpu(), latents.cpu()
        active = values > 0
        yield LatentActivations(latents[active], values[active], at[active], at[:, 0])


def of_rows(activations: Sequence[LatentActivations], width: int, parity: int) -> list[LatentActivations]:
    """What lies in even rows (`parity` 0) or in odd ones (1)."""
    parts = []
    for part in activations:
        entries, kept = (part.at // width) % 2 == parity, (part.kept // width) % 2 == parity
        parts.append(LatentActivations(part.latent[entries], part.value[entries], part.at[entries], part.kept[kept]))
    return parts


@dataclass
class Keeper:
    """For each of F latents the m entries of largest score so far: `score`, `value` [F, m], `at` [F, m] (or -1)."""

    n_latents: int
    m: int
    score: Tensor = field(init=False)
    value: Tensor = field(init=False)
    at: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.score = torch.full((self.n_latents, self.m), -torch.inf)
        self.value = torch.zeros(self.n_latents, self.m)
        self.at = torch.full((self.n_latents, self.m), -1)

    def add(self, latent: Tensor, score: Tensor, value: Tensor, at: Tensor) -> None:
        """Merge entries [e]; each latent keeps its best m of what it had and of these."""
        order = score.argsort(descending=True, stable=True)
        order = order[latent[order].argsort(stable=True)]
        latent, score, value, at = latent[order], score[order], value[order], at[order]
        rank = _rank_in_group(latent)
        best = rank < self.m
        latent, rank = latent[best], rank[best]
        news, newv, newa = (
            torch.full_like(self.score, -torch.inf),
            torch.zeros_like(self.value),
            torch.full_like(self.at, -1),
        )
        news[latent, rank], newv[latent, rank], newa[latent, rank] = score[best], value[best], at[best]
        touched = latent.unique()
        both = torch.cat([self.score[touched], news[touched]], 1)
        top, take = both.topk(self.m, dim=1)
        self.score[touched] = top
        self.value[touched] = torch.cat([self.value[touched], newv[touched]], 1).gather(1, take)
        self.at[touched] = torch.cat([self.at[touched], newa[touched]], 1).gather(1, take)


def _rank_in_group(group: Tensor) -> Tensor:
    """For a sorted vector, each entry's place among its equals: [3, 3, 5, 5, 5] gives [0, 1, 0, 1, 2]."""
    index = torch.arange(len(group))
    starts = torch.ones(len(group), dtype=torch.bool)
    starts[1:] = group[1:] != group[:-1]
    return index - torch.where(starts, index, 0).cummax(0).values if len(group) else index


def strongest_per_row(latent: Tensor, value: Tensor, at: Tensor, width: int) -> Tensor:
    """Indices of the entries that are their latent's largest in their row: examples should not be one text twice."""
    row = at // width
    order = value.argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]
    order = order[latent[order].argsort(stable=True)]
    latent, row = latent[order], row[order]
    first = torch.ones(len(order), dtype=torch.bool)
    first[1:] = (latent[1:] != latent[:-1]) | (row[1:] != row[:-1])
    return order[first]
