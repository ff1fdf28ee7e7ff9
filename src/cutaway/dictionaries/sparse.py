"""Products with k-sparse codes that touch only what is active.

A code of n tokens is a pair (values [n, k], indices [n, k]): row b stands for Σ_j values[b, j] · e_indices[b, j]. With
rows R [F, d] of a decoder the dense products would cost n·F·d; these cost n·k·d. Sums run in a fixed order, so results
repeat bit for bit on the same machine with the same number of threads.
"""

from dataclasses import dataclass

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


def decode(values: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """Σ_j values[b, j] · rows[indices[b, j]]: [n, k], [n, k], [F, d] -> [n, d]. Differentiable."""
    return F.embedding_bag(indices, rows, per_sample_weights=values, mode="sum")


def row_products(indices: Tensor, rows: Tensor, x: Tensor) -> Tensor:
    """⟨rows[indices[b, j]], x[b]⟩: [n, k], [F, d], [n, d] -> [n, k], without gathering n·k rows into memory.

    It is the derivative of `decode` with respect to its values, which PyTorch has a kernel for.
    """
    with torch.enable_grad():
        weights = torch.zeros(indices.shape, dtype=x.dtype, device=x.device, requires_grad=True)
        (products,) = torch.autograd.grad(decode(weights, indices, rows.detach()), weights, x)
    return products


@dataclass(frozen=True)
class ByLatent:
    """A code turned round: for each latent the tokens in which it is active."""

    order: Tensor  # [n·k] places in the flattened code, sorted by latent
    tokens: Tensor  # [n·k] token of each place
    offsets: Tensor  # [F] where each latent begins

    def outer(self, values: Tensor, x: Tensor) -> Tensor:
        """codeᵀ · x: values [n, k], x [n, d] -> [F, d]; row i is the sum over its tokens b of values · x[b]."""
        weights = values.reshape(-1)[self.order]
        return F.embedding_bag(self.tokens, x, self.offsets, per_sample_weights=weights, mode="sum")


def by_latent(indices: Tensor, n_latents: int) -> ByLatent:
    """Sort a code's places by latent (a stable counting sort in effect, so sums keep the order of tokens)."""
    flat = indices.reshape(-1)
    order = torch.argsort(flat.to(torch.int32), stable=True)
    counts = torch.bincount(flat, minlength=n_latents)
    tokens = torch.div(order, indices.shape[1], rounding_mode="floor")
    return ByLatent(order, tokens, counts.cumsum(0) - counts)


def latent_sums(values: Tensor, indices: Tensor, n_latents: int) -> Tensor:
    """Sum of each latent's values over the tokens: [n, k], [n, k] -> [F]."""
    return torch.bincount(indices.reshape(-1), weights=values.reshape(-1), minlength=n_latents).to(values.dtype)
