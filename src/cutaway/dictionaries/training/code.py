"""A batch of codes while training: the same few operations on a table of all activations or on the active places only.

Loss terms are written once against these operations. `DenseCode` is the plain one; `SparseCode` gives the same numbers
and the same gradients where everything off its places is zero and has no gradient.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cutaway.dictionaries.sparse import Combine, Places


@dataclass(frozen=True)
class DenseCode:
    """`pre` (h) and `values` (a) are tables [n, F]."""

    pre: Tensor
    values: Tensor

    @property
    def n(self) -> int:
        """Number of tokens."""
        return len(self.pre)

    def at(self, of_latents: Tensor) -> Tensor:
        """One number per latent [F], as it meets the code's values."""
        return of_latents

    def total(self, values: Tensor) -> Tensor:
        """mean_b Σ_i of numbers that are laid out as the code's values are."""
        return values.sum() / self.n

    def per_token(self, values: Tensor) -> Tensor:
        """Σ_i: [n]."""
        return values.sum(1)

    def per_latent(self, values: Tensor) -> Tensor:
        """Σ_b: [F]."""
        return values.sum(0)

    def decode(self, values: Tensor, rows: Tensor) -> Tensor:
        """Σ_i values · rows[i]: rows [F, d] -> [n, d]."""
        return values @ rows

    def decode_among(self, values: Tensor, rows: Tensor, first: int, last: int) -> Tensor:
        """The same over the latents first ≤ i < last only."""
        return values[:, first:last] @ rows[first:last]

    def with_values(self, values: Tensor) -> "DenseCode":
        """The same places with other activations."""
        return replace(self, values=values)


@dataclass(frozen=True)
class SparseCode:
    """`pre` (h) and `values` (a) are [P], at `places`."""

    pre: Tensor
    values: Tensor
    places: Places

    @property
    def n(self) -> int:
        """Number of tokens."""
        return self.places.n

    def at(self, of_latents: Tensor) -> Tensor:
        """One number per latent [F], as it meets the code's values."""
        return Gather.apply(of_latents, self.places)

    def total(self, values: Tensor) -> Tensor:
        """mean_b Σ_i of numbers that are laid out as the code's values are."""
        return values.sum() / self.n

    def per_token(self, values: Tensor) -> Tensor:
        """Σ_i: [n]."""
        return self.places.token_sums(values)

    def per_latent(self, values: Tensor) -> Tensor:
        """Σ_b: [F]."""
        return self.places.latent_sums(values)

    def decode(self, values: Tensor, rows: Tensor) -> Tensor:
        """Σ_i values · rows[i]: rows [F, d] -> [n, d]."""
        return Combine.apply(values, rows, self.places)

    def decode_among(self, values: Tensor, rows: Tensor, first: int, last: int) -> Tensor:
        """The same over the latents first ≤ i < last only."""
        part, keep = self.places.among(first, last)
        return Combine.apply(values[keep], rows[first:last], part)

    def with_values(self, values: Tensor) -> "SparseCode":
        """The same places with other activations."""
        return replace(self, values=values)


Code = DenseCode | SparseCode


class Gather(torch.autograd.Function):
    """of_latents [F] at the places [P]; the gradient is summed by latent in a fixed order."""

    @staticmethod
    def forward(ctx: Any, of_latents: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return of_latents[places.latents]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.places.latent_sums(gradients[0]), None


class StraightThroughJump(torch.autograd.Function):
    """a = h·1[h > θ] with the straight-through gradient of θ (Rajamanoharan et al. 2024, arXiv 2407.14435).

        ∂a/∂θ = −(θ/ε)·K((h − θ)/ε),  K(u) = 1[|u| < ½],   ∂a/∂h = 1[h > θ]

    With `through_pre` the rectangle reaches h as well, with the opposite sign (Anthropic, January 2025).
    """

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float, through_pre: bool) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.through_pre = bandwidth, through_pre
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        pre, threshold = ctx.saved_tensors
        (gradient,) = gradients
        window = gradient * (threshold / ctx.bandwidth) * ((pre - threshold).abs() < ctx.bandwidth / 2)
        to_pre = gradient * (pre > threshold) + (window if ctx.through_pre else 0)
        return to_pre, _like(-window, threshold), None, None


class StraightThroughStep(torch.autograd.Function):
    """1[h > θ], with the straight-through gradient −(1/ε)·K((h − θ)/ε) of θ, and its opposite of h if `through_pre`."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float, through_pre: bool) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.through_pre = bandwidth, through_pre
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        pre, threshold = ctx.saved_tensors
        window = gradients[0] / ctx.bandwidth * ((pre - threshold).abs() < ctx.bandwidth / 2)
        return window if ctx.through_pre else None, _like(-window, threshold), None, None


def _like(gradient: Tensor, threshold: Tensor) -> Tensor:
    """Summed over the batch where one threshold [F] met a table [n, F]."""
    return gradient.sum(0) if gradient.ndim > threshold.ndim else gradient
