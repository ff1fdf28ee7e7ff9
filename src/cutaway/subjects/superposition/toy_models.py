"""Toy models of superposition (Elhage et al. 2022, transformer-circuits.pub/2022/toy_model), many trained at once.

    x_i = 0 with probability S, else uniform on [0, 1]
    x̂ = ReLU(Wᵀ W x + b)                    W [m, n]: n features go through m < n dimensions
    L = mean over the batch of Σ_i I_i (x_i − x̂_i)²

Column W_i of W is the direction of feature i. Instances (one a sparsity, say) share one tensor with a leading axis, so
that a whole sweep is one training; `linear=True` leaves the ReLU out (the control: a linear model keeps the m most
important features and no others).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.progress import Progress

Relation = Literal["independent", "correlated", "anticorrelated"]


@dataclass(frozen=True, eq=False)
class ToyModels:
    """k trained instances of a toy model, each with n features in m dimensions."""

    W: Tensor
    """Weights [k, m, n]; a column is a feature's direction."""
    b: Tensor
    """Biases [k, n]."""
    density: Tensor
    """How often a feature is active [k]: 1 − sparsity."""
    importance: Tensor
    """Weight of each feature's error in the loss [k, n]."""
    linear: bool = False
    """Whether the ReLU is left out."""

    def __call__(self, x: Tensor) -> Tensor:
        """The reconstruction x̂ [k, batch, n].

        Args:
            x: Feature values [k, batch, n].
        """
        return reconstruct(self.W, self.b, x, linear=self.linear)


def reconstruct(W: Tensor, b: Tensor, x: Tensor, *, linear: bool = False) -> Tensor:
    """x̂ = ReLU(WᵀW x + b): W [k, m, n], b [k, n], x [k, batch, n] -> [k, batch, n]."""
    pre = torch.baddbmm(b[:, None], x @ W.mT, W)
    return pre if linear else pre.relu()


def loss(W: Tensor, b: Tensor, x: Tensor, importance: Tensor, *, linear: bool = False) -> Tensor:
    """Σ_i I_i (x_i − x̂_i)², mean over the batch: one number an instance, [k]."""
    error = x - reconstruct(W, b, x, linear=linear)
    return torch.einsum("kbn,kn->k", error.square(), importance) / x.shape[1]


def sample(
    density: Tensor, n: int, batch: int, generator: torch.Generator, relation: Relation = "independent"
) -> Tensor:
    """Feature values [k, batch, n], each active (uniform on [0, 1]) with probability `density` [k].

    “correlated”: features 2j and 2j+1 are active together, with values of their own; “anticorrelated”: one of the two
    at most, each still with probability `density`. Raises `CutawayError` for an odd n, or a density above ½ where two
    features exclude each other.
    """
    k = len(density)
    values = torch.rand(k, batch, n, generator=generator, dtype=density.dtype)
    chance = density[:, None, None]
    if relation == "independent":
        return values * (torch.rand(k, batch, n, generator=generator, dtype=density.dtype) < chance)
    if n % 2:
        raise CutawayError(f"{relation} features come in pairs: {n} is odd")
    drawn = torch.rand(k, batch, n // 2, generator=generator, dtype=density.dtype)
    if relation == "correlated":
        return values * (drawn < chance).repeat_interleave(2, dim=2)
    if (density > 0.5).any():
        raise CutawayError("two features that exclude each other cannot each have a density above ½")
    first, second = drawn < chance, (drawn >= chance) & (drawn < 2 * chance)
    return values * torch.stack((first, second), dim=3).flatten(2)


def batches(density: Tensor, n: int, batch: int, seed: int, relation: Relation = "independent") -> Iterator[Tensor]:
    """Endless batches of `sample`, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield sample(density, n, batch, generator, relation)


def initial(k: int, n: int, m: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """W [k, m, n] with columns of length about 1 (normal, Xavier's scale), b [k, n] zero."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(k, m, n, generator=generator, dtype=dtype) * (2 / (n + m)) ** 0.5
    return W, torch.zeros(k, n, dtype=dtype)


@dataclass(frozen=True)
class ToyTraining:
    """How toy models are trained.

    Attributes:
        batch: Samples per step and instance.
        learning_rate: Of the first step; it falls linearly to 0.
        start: Initial W [k, m, n] and b [k, n]; drawn from the seed by default.
        data: Batches [k, batch, n]; drawn from the seed by default.
        label: What the progress line says.
    """

    batch: int = 512
    learning_rate: float = 1e-2
    start: tuple[Tensor, Tensor] | None = None
    data: Iterator[Tensor] | None = None
    label: str = "toy models"


_TRAINING = ToyTraining()


def train_toys(
    density: Tensor,
    importance: Tensor,
    m: int,
    *,
    steps: int = 3000,
    relation: Relation = "independent",
    linear: bool = False,
    seed: int = 0,
    training: ToyTraining = _TRAINING,
) -> ToyModels:
    """Train toy models of superposition, many instances at once (Elhage et al. 2022, https://arxiv.org/abs/2209.10652).

    Adam (β 0.9, 0.999, ε 1e-8) on `loss`, summed over the instances, which do not touch each other.

    Args:
        density: For each of k instances how often a feature is active [k], in (0, 1].
        importance: Weight of each feature's error [k, n], or [n], the same for all.
        m: Dimensions that the n features go through.
        steps: Steps of training.
        relation: "independent", "correlated" or "anticorrelated" features (`sample`).
        linear: Without the ReLU: the control.
        seed: Of initial weights and samples.
        training: Batch, learning rate, given weights or data.

    Raises:
        CutawayError: Shapes that do not fit, or densities outside (0, 1].

    Example:
        >>> import torch
        >>> train_toys(torch.tensor([1.0, 0.05]), 0.9 ** torch.arange(5.0), m=2, steps=10).W.shape
        torch.Size([2, 2, 5])
    """
    batch, learning_rate, data = training.batch, training.learning_rate, training.data
    importance = importance.expand(len(density), -1) if importance.ndim == 1 else importance
    k, n = importance.shape
    if density.shape != (k,) or not ((density > 0) & (density <= 1)).all():
        raise CutawayError(f"density needs {k} numbers in (0, 1], one for each instance; it is {density.tolist()}")
    if m < 1 or steps < 1:
        raise CutawayError(f"m = {m} dimensions and {steps} steps: both must be at least 1")
    W, b = (tensor.clone().requires_grad_() for tensor in (training.start or initial(k, n, m, seed, density.dtype)))
    data = batches(density, n, batch, seed + 1, relation) if data is None else data
    adam = torch.optim.Adam([W, b], lr=learning_rate, fused=True)
    with Progress(training.label, total=steps, unit="steps") as progress:
        for step in range(steps):
            adam.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
            total = loss(W, b, next(data), importance, linear=linear).sum()
            adam.zero_grad()
            total.backward()
            adam.step()
            if step % 50 == 49:
                progress.advance(50)
    return ToyModels(W.detach(), b.detach(), density, importance, linear)


def best_of(
    restarts: int, train: Callable[[int], ToyModels], judge: Callable[[ToyModels], Tensor]
) -> tuple[ToyModels, Tensor]:
    """Of several trainings (`train(seed)`) the instance with the lowest `judge` [k], instance by instance, and that."""
    kept = train(0)
    lowest = judge(kept)
    for seed in range(1, restarts):
        other = train(seed)
        found = judge(other)
        better = found < lowest
        kept = ToyModels(
            torch.where(better[:, None, None], other.W, kept.W),
            torch.where(better[:, None], other.b, kept.b),
            kept.density,
            kept.importance,
            kept.linear,
        )
        lowest = torch.where(better, found, lowest)
    return kept, lowest
