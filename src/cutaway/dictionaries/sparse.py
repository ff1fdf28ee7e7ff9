"""Products with codes that are zero almost everywhere, touching only what is active.

A code of n tokens over F latents has values at a few places, in order of tokens. With rows R [F, d] of a decoder the
dense products would cost n·F·d; these cost (number of places)·d. Sums run in a fixed order, so results repeat bit for
bit on the same machine with the same number of threads.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of scores [n, F]: values [n, k] and indices [n, k], in no particular order.

    Exact. `torch.topk` visits every score with a costly selection; the maxima of T interleaved scores do it for F/T
    groups, since the k largest scores lie in the k groups with the largest maxima. T balances the two selections.
    """
    n, width = scores.shape
    group = 1
    while 4 * group * group * k <= width and width % (2 * group) == 0:
        group *= 2
    if group < 4 or not scores.is_contiguous():
        return scores.topk(k, dim=-1, sorted=False)
    folded = scores.view(n, group, width // group)
    groups = folded.amax(1).topk(k, dim=-1, sorted=False).indices
    candidates = folded.gather(2, groups[:, None, :].expand(-1, group, -1)).view(n, group * k)
    values, chosen = candidates.topk(k, dim=-1, sorted=False)
    member = torch.div(chosen, k, rounding_mode="floor")
    return values, groups.gather(1, chosen - member * k) + member * (width // group)


_SAMPLE = 1 << 15


def largest_of_all(scores: Tensor, count: int, minimum: float = 0.0) -> Tensor:
    """Places of the `count` largest scores above `minimum` of a whole table [n, F], flat and ascending; fewer if need
    be.

    Exact, ties broken by place. A sample of the scores gives a bound that about 1.5 times as many exceed, so only these
    are compared in earnest; sorting the table would take ten times as long as the product that made it.
    """
    flat = scores.reshape(-1)
    count = min(count, len(flat))
    if count == 0:
        return flat.new_zeros(0, dtype=torch.int64)
    sample = flat[:: max(1, len(flat) // _SAMPLE)].float()
    share = 1.5 * count / len(flat)
    while True:
        rank = int(share * len(sample)) + 8  # of the largest, from 0
        bound = max(minimum, float(sample.kthvalue(len(sample) - rank).values)) if rank < len(sample) / 2 else minimum
        places = (flat > bound).nonzero().flatten()
        if len(places) >= count or bound <= minimum:
            break
        share *= 2
    if len(places) <= count:
        return places
    values = flat[places]
    last = values.kthvalue(len(values) - count + 1).values
    keep = values > last
    ties = (values == last).nonzero().flatten()[: count - int(keep.sum())]
    keep[ties] = True
    return places[keep]


def decode(values: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """Σ_j values[b, j] · rows[indices[b, j]]: [n, k], [n, k], [F, d] -> [n, d]. Differentiable."""
    return F.embedding_bag(indices, rows, per_sample_weights=values, mode="sum")


@dataclass(frozen=True)
class Places:
    """Where a code has values: the latent and the token of each of P places, in order of tokens."""

    latents: Tensor  # [P]
    tokens: Tensor  # [P], ascending
    offsets: Tensor  # [n] where each token begins
    n_latents: int

    @classmethod
    def of_rows(cls, indices: Tensor, n_latents: int) -> "Places":
        """As many latents for each token: indices [n, k]."""
        n, k = indices.shape
        device = indices.device
        tokens = torch.arange(n, device=device)
        return cls(indices.reshape(-1), tokens.repeat_interleave(k), tokens * k, n_latents)

    @classmethod
    def of_flat(cls, flat: Tensor, n: int, n_latents: int) -> "Places":
        """From ascending places in a table [n, F] read row by row."""
        tokens = torch.div(flat, n_latents, rounding_mode="floor")
        counts = torch.bincount(tokens, minlength=n)
        return cls(flat - tokens * n_latents, tokens, counts.cumsum(0) - counts, n_latents)

    @property
    def n(self) -> int:
        """Number of tokens."""
        return len(self.offsets)

    def __len__(self) -> int:
        return len(self.latents)

    def where(self, keep: Tensor) -> "Places":
        """Only some of the places: keep [P], bool, or their numbers in order of tokens."""
        tokens = self.tokens[keep]
        counts = torch.bincount(tokens, minlength=self.n)
        return Places(self.latents[keep], tokens, counts.cumsum(0) - counts, self.n_latents)

    def among(self, first: int, last: int) -> tuple["Places", Tensor]:
        """The places of the latents first ≤ i < last, counted from `first`, and which places those are."""
        keep = (self.latents >= first) & (self.latents < last)
        part = self.where(keep)
        return Places(part.latents - first, part.tokens, part.offsets, last - first), keep

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """Turned round: places sorted by latent (stably), their tokens, and where each latent begins [F]."""
        order = torch.argsort(self.latents.to(torch.int32), stable=True)
        counts = torch.bincount(self.latents, minlength=self.n_latents)
        return order, self.tokens[order], counts.cumsum(0) - counts

    def combine(self, values: Tensor, rows: Tensor) -> Tensor:
        """code · R: values [P], rows [F, d] -> [n, d]."""
        return F.embedding_bag(self.latents, rows, self.offsets, per_sample_weights=values, mode="sum")

    def products(self, rows: Tensor, x: Tensor) -> Tensor:
        """⟨rows[latent], x[token]⟩ of each place: [F, d], [n, d] -> [P], without gathering P rows into memory.

        It is the derivative of `combine` with respect to its values, which PyTorch has a kernel for.
        """
        if not len(self):
            return x.new_zeros(0)
        with torch.enable_grad():
            weights = torch.zeros(len(self), dtype=x.dtype, device=x.device, requires_grad=True)
            (products,) = torch.autograd.grad(self.combine(weights, rows.detach()), weights, x)
        return products

    def outer(self, values: Tensor, x: Tensor) -> Tensor:
        """codeᵀ · x: values [P], x [n, d] -> [F, d]; row i is the sum over its tokens b of values · x[b]."""
        order, tokens, offsets = self.by_latent
        return F.embedding_bag(tokens, x, offsets, per_sample_weights=values[order], mode="sum")

    def latent_sums(self, values: Tensor) -> Tensor:
        """Sum of each latent's values over the tokens: [P] -> [F]."""
        return torch.bincount(self.latents, weights=values, minlength=self.n_latents).to(values.dtype)

    def token_sums(self, values: Tensor) -> Tensor:
        """Sum of each token's values over its places: [P] -> [n]. Differentiable."""
        return torch.zeros(self.n, dtype=values.dtype, device=values.device).index_add(0, self.tokens, values)


class Combine(torch.autograd.Function):
    """`Places.combine` with gradients of values and rows that touch only the places."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: Tensor, places: Places) -> Tensor:
        ctx.save_for_backward(values, rows)
        ctx.places = places
        return places.combine(values, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        values, rows = ctx.saved_tensors
        (gradient,) = gradients
        gradient = gradient.contiguous()
        to_values = ctx.places.products(rows, gradient) if ctx.needs_input_grad[0] else None
        to_rows = ctx.places.outer(values, gradient) if ctx.needs_input_grad[1] else None
        return to_values, to_rows, None


class Encode(torch.autograd.Function):
    """h = (x − b_dec) Eᵀ + b, given as computed: at some places [P], or the whole table [n, F] if `places` is None.

    Every h depends on b_dec as −E does, so its gradient needs only the bias's, not the tokens again.
    """

    @staticmethod
    def forward(
        ctx: Any, encoder: Tensor, bias: Tensor, b_dec: Tensor | None, centred: Tensor, pre: Tensor, places: Any
    ) -> Tensor:
        ctx.save_for_backward(encoder, centred)
        ctx.places, ctx.subtracts = places, b_dec is not None
        return pre.view_as(pre)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        encoder, centred = ctx.saved_tensors
        (gradient,) = gradients
        if ctx.places is None:
            to_encoder, to_bias = gradient.T @ centred, gradient.sum(0)
        else:
            to_encoder, to_bias = ctx.places.outer(gradient, centred), ctx.places.latent_sums(gradient)
        return to_encoder, to_bias, -(to_bias @ encoder) if ctx.subtracts else None, None, None, None
