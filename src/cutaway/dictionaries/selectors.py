"""Selectors: which pre-activations of a token become activations, and at what value.

    ReLU        a = relu(h)
    TopK        a = relu(h) on the k largest h of the token, else 0
    BatchTopK   trained by keeping the k·n largest of a batch of n tokens; then a = relu(h)·1[h > θ], one θ for all
    JumpReLU    a = h·1[h > θ_i], θ_i ≥ 0
    Gated       a = 1[h > 0]·relu((h − b_gate)·exp(r_i) + b_mag,i), where h = x·W_enc + b_gate

These are what a finished dictionary does; how each is trained is in `training/rules.py`.
"""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.dictionaries import sparse


@dataclass(frozen=True)
class ReLU:
    """Every positive pre-activation is an activation."""

    name: ClassVar[str] = "relu"

    def dense(self, pre: Tensor, bias: Tensor) -> Tensor:
        """Pre-activations [n, F] -> activations [n, F]; differentiable.

        Args:
            pre: Pre-activations [n, F].
            bias: The encoder's bias [F], which this selector does not use.
        """
        return pre.relu()


@dataclass(frozen=True)
class TopK:
    """Keep the k largest pre-activations of a token; of those, the positive ones are active (arXiv 2406.04093)."""

    k: int
    """Latents per token, at most."""
    name: ClassVar[str] = "topk"

    def select(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-activations [n, F] -> values [n, k] (≥ 0), indices [n, k].

        Args:
            pre: Pre-activations [n, F].
        """
        values, indices = sparse.largest(pre, self.k)
        return values.relu(), indices

    def dense(self, pre: Tensor, bias: Tensor) -> Tensor:
        """Pre-activations [n, F] -> activations [n, F]; differentiable.

        Args:
            pre: Pre-activations [n, F].
            bias: The encoder's bias [F], which this selector does not use.
        """
        values, indices = self.select(pre)
        return torch.zeros_like(pre).scatter(-1, indices, values)


@dataclass(frozen=True)
class BatchTopK:
    """Trained with k active latents per token on average; read with one threshold for all (arXiv 2412.06410)."""

    k: int
    """Active latents per token that it was trained with."""
    threshold: float
    """θ: pre-activations above it are active."""
    name: ClassVar[str] = "batchtopk"

    def dense(self, pre: Tensor, bias: Tensor) -> Tensor:
        """Pre-activations [n, F] -> activations [n, F]; differentiable.

        Args:
            pre: Pre-activations [n, F].
            bias: The encoder's bias [F], which this selector does not use.
        """
        return pre.relu() * (pre > self.threshold)


@dataclass(frozen=True, eq=False)
class JumpReLU:
    """A threshold per latent (arXiv 2407.14435)."""

    threshold: Tensor
    """θ [F], 0 or more."""
    name: ClassVar[str] = "jumprelu"

    def dense(self, pre: Tensor, bias: Tensor) -> Tensor:
        """Pre-activations [n, F] -> activations [n, F]; differentiable in them.

        Args:
            pre: Pre-activations [n, F].
            bias: The encoder's bias [F], which this selector does not use.
        """
        return pre.relu() * (pre > self.threshold)


@dataclass(frozen=True, eq=False)
class Gated:
    """A gate and a magnitude that share directions (arXiv 2404.16014). The dictionary's `b_enc` is the gate's bias."""

    r_mag: Tensor
    """Logarithm of the magnitude's scale, [F]."""
    b_mag: Tensor
    """Bias of the magnitude, [F]."""
    name: ClassVar[str] = "gated"

    def dense(self, pre: Tensor, bias: Tensor) -> Tensor:
        """Pre-activations and bias of the gate -> activations [n, F]; differentiable in them.

        Args:
            pre: Of the gate [n, F].
            bias: The gate's [F].
        """
        return ((pre - bias) * self.r_mag.exp() + self.b_mag).relu() * (pre > 0)


Selector = ReLU | TopK | BatchTopK | JumpReLU | Gated


def check(selector: Selector, n_latents: int) -> None:
    """Raise `CutawayError` for a selector that does not fit so many latents."""
    if isinstance(selector, TopK | BatchTopK) and not 1 <= selector.k <= n_latents:
        raise CutawayError(f"k = {selector.k} latents cannot be active out of {n_latents}")
    if isinstance(selector, BatchTopK) and not selector.threshold >= 0:
        raise CutawayError(f"the threshold is {selector.threshold}; a threshold is a number of 0 or more")
    for name, tensor in tensors_of(selector).items():
        if tuple(tensor.shape) != (n_latents,):
            raise CutawayError(f"{name} has shape {list(tensor.shape)} where {[n_latents]} is needed")
        if not torch.isfinite(tensor).all():
            raise CutawayError(f"{name} holds NaN or infinite values: the dictionary cannot be used")


def tensors_of(selector: Selector) -> dict[str, Tensor]:
    """The selector's own weights by name, each [F]."""
    return {f.name: value for f in fields(selector) if isinstance(value := getattr(selector, f.name), Tensor)}


def describe(selector: Selector) -> str:
    """In a few characters: "topk 32", "jumprelu"."""
    numbers: dict[str, Any] = {
        f.name: value for f in fields(selector) if not isinstance(value := getattr(selector, f.name), Tensor)
    }
    return " ".join([selector.name, *(f"{name}={value:.4g}" for name, value in numbers.items())])


def active(activations: Tensor) -> tuple[Tensor, Tensor]:
    """Dense activations [n, F] -> values [n, m], indices [n, m], by falling value, zeros at the end.

    m is the greatest number of active latents of a token.
    """
    m = int((activations > 0).sum(1).max()) if len(activations) else 0
    values, indices = activations.topk(max(m, 1), dim=1)
    return values, indices
