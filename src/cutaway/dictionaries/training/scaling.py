"""The units of training: activations are scaled once for the whole data set, and the weights scaled back at the end.

    x' = (x − shift) · M        M a number, one number a dimension, or a matrix

    none          x' = x
    mean_norm     mean ‖x'‖ = √d                     (Anthropic 2024; SAELens "expected_average_only_in")
    mean_square   mean ‖x'‖² = 1                     (Gemma Scope; dictionary_learning)
    centred       mean ‖x' − median‖ = √d            (ours: a large constant part of x does not shrink the rest)
    whiten        mean 0, covariance 1               (SAELens "whitening")

Each tensor that is read or written gets a scale of its own. What differs from token to token ("layer_norm", "unit")
cannot go into weights; it stays with the dictionary as `input_norm`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError

Normalise = Literal["none", "mean_norm", "mean_square", "centred", "whiten"]
_MIN_VARIANCE = 1e-6  # of the largest; directions with less are not blown up further


@dataclass(frozen=True, eq=False)
class Scaling:
    """`scale` [d] and, for whitening, `shift` [d], `matrix` and `inverse` [d, d]."""

    scale: Tensor
    shift: Tensor | None = None
    matrix: Tensor | None = None
    inverse: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """x [n, d] -> x' [n, d]."""
        if self.matrix is not None:
            assert self.shift is not None
            return (x - self.shift) @ self.matrix
        return x * self.scale

    def undo(self, x: Tensor) -> Tensor:
        """x' [n, d] -> x [n, d]; rows of a decoder, which are differences, through `undo_rows`."""
        rows = self.undo_rows(x)
        return rows if self.shift is None else rows + self.shift

    def undo_rows(self, rows: Tensor) -> Tensor:
        """Directions of x' [m, d] as directions of x."""
        return rows / self.scale if self.inverse is None else rows @ self.inverse

    def into_rows(self, rows: Tensor) -> Tensor:
        """Readers of x' [m, d] (h' = x' · row) as readers of x: rows · Mᵀ."""
        return rows * self.scale if self.matrix is None else rows @ self.matrix.T

    def tensors(self) -> dict[str, Tensor]:
        """By name, those that there are."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}


def fit(x: Tensor, widths: Sequence[int], how: Normalise) -> Scaling:
    """The scaling of a sample [n, Σ widths], each of the tensors by itself. Raises `CutawayError` for constant ones."""
    parts = []
    for part in x.split(list(widths), dim=1):
        d = part.shape[1]
        if how == "none":
            parts.append(part.new_ones(d))
            continue
        if how == "whiten":
            continue
        if how == "mean_norm":
            size = part.norm(dim=1).mean().item() / math.sqrt(d)
        elif how == "mean_square":
            size = math.sqrt(part.square().sum(1).mean().item())
        else:
            size = (part - geometric_median(part)).norm(dim=1).mean().item() / math.sqrt(d)
        if not size > 1e-5 * part.abs().max().item() / math.sqrt(d):
            raise CutawayError("all activations of the first batch are the same: there is nothing to learn from them")
        parts.append(part.new_full((d,), 1 / size))
    if how != "whiten":
        return Scaling(torch.cat(parts))
    if len(widths) > 1:
        raise CutawayError("whitening is of one site: give a crosscoder another normalisation")
    return _whitening(x)


def _whitening(x: Tensor) -> Scaling:
    n, d = x.shape
    if n <= d:
        raise CutawayError(f"whitening {d} dimensions needs more than {d} tokens at the start; there are {n}")
    mean = x.double().mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((x.double() - mean).T))
    root = values.clamp_min(_MIN_VARIANCE * values.max()).sqrt()
    if not root.max() > 0:
        raise CutawayError("all activations of the first batch are the same: there is nothing to learn from them")
    matrix, inverse = (vectors / root) @ vectors.T, (vectors * root) @ vectors.T
    return Scaling(x.new_ones(d), mean.to(x), matrix.to(x), inverse.to(x))


def geometric_median(x: Tensor, iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """The point with the least summed distance to the rows of x [n, d] (Weiszfeld's iteration): [d].

    Unlike the mean it is not drawn away by the few tokens whose activations are huge.
    """
    point = x.mean(0)
    for _ in range(iterations):
        weights = 1 / (x - point).norm(dim=1).clamp_min(1e-12)
        moved = (weights @ x) / weights.sum()
        done = (moved - point).norm() <= tolerance * point.norm()
        point = moved
        if done:
            break
    return point


def undo_per_token(written: Tensor, x: Tensor, how: str | None) -> Tensor:
    """What is written for x as `per_token` makes it -> for x as it is; the ε is left out, as SAELens and OpenAI do."""
    if how == "layer_norm":
        return written * x.std(-1, keepdim=True) + x.mean(-1, keepdim=True)
    if how == "unit":
        return written * x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
    return written


def per_token(x: Tensor, how: str | None, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x as `input_norm` makes it, and y (or x) by the same numbers of each token."""
    y = x if y is None else y
    if how == "layer_norm":
        mean, spread = x.mean(-1, keepdim=True), x.std(-1, keepdim=True) + 1e-5
        return (x - mean) / spread, (y - mean) / spread
    if how == "unit":
        length = x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) / x.shape[-1] ** 0.5
        return x / length, y / length
    return x, y
