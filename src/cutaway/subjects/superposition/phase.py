"""The phase diagram of two features in one dimension, trained and by brute force (Elhage et al. 2022).

Feature 1 has importance 1; feature 2's importance and the density of both vary. A model may leave feature 2 out, give
it the dimension, or put both on it in opposite directions. With so few numbers the expected loss is an integral that
can be computed, and its minimum found by trying: the oracle for what training finds.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.subjects.superposition.geometry import feature_norms, interference
from cutaway.subjects.superposition.toy_models import ToyModels, ToyTraining, best_of, reconstruct, train_toys

PHASES = ("not represented", "dedicated dimension", "superposition")
_NODES = 24  # of the quadrature, in each piece of [0, 1]


@dataclass(frozen=True)
class PhaseDiagram:
    """What models do with feature 2 at each density and importance."""

    density: tuple[float, ...]
    """How often a feature is active, one for each row."""
    importance: tuple[float, ...]
    """Weight of feature 2's error as a multiple of feature 1's, one for each column."""
    phase: Tensor
    """int64 [rows, columns]: 0 not represented, 1 a dedicated dimension, 2 superposition."""
    loss: Tensor
    """The expected loss there [rows, columns]."""

    def agreement(self, other: "PhaseDiagram") -> float:
        """Share of cells with the same phase.

        Args:
            other: A diagram of the same densities and importances.
        """
        return (self.phase == other.phase).double().mean().item()


def expected_loss(W: Tensor, b: Tensor, density: Tensor, importance: Tensor, *, nodes: int = _NODES) -> Tensor:
    """E[L] for two features in any number of dimensions, by quadrature.

    Both features off, one on, or both on, weighted (1−p)², p(1−p), p². Along each axis [0, 1] is split into 8 pieces
    of `nodes` Gauss–Legendre points; the kink of the ReLU costs about 1e-6 of the loss.

    Args:
        W: Weights of k models [k, m, 2].
        b: Their biases [k, 2].
        density: How often a feature is active [k].
        importance: Weight of each feature's error [k, 2].
        nodes: Points per piece.

    Returns:
        The expected loss of each model, float64 [k].

    Raises:
        CutawayError: Other than two features.
    """
    W, b, density, importance = (tensor.double() for tensor in (W, b, density, importance))
    if W.shape[-1] != 2:
        raise CutawayError(f"the phase diagram is of two features; W has {W.shape[-1]}")
    x, weight = _quadrature(nodes)
    zero = torch.zeros_like(x)
    grid = torch.cartesian_prod(x, x)
    p = density
    cases = (
        (torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, dtype=torch.float64), (1 - p) ** 2),
        (torch.stack((x, zero), 1), weight, p * (1 - p)),
        (torch.stack((zero, x), 1), weight, p * (1 - p)),
        (grid, torch.outer(weight, weight).flatten(), p * p),
    )
    total = torch.zeros(len(W), dtype=torch.float64)
    for points, weights, probability in cases:
        values = points.expand(len(W), -1, -1)
        error = (values - reconstruct(W, b, values)).square()
        total = total + probability * torch.einsum("kbn,kn,b->k", error, importance, weights)
    return total


def trained_diagram(
    density: tuple[float, ...], importance: tuple[float, ...], *, steps: int = 1500, restarts: int = 3, seed: int = 0
) -> PhaseDiagram:
    """The phase diagram of trained models: at every cell the one of several trainings with the lowest expected loss.

    Args:
        density: How often a feature is active, for each row, in (0, 1].
        importance: Weight of feature 2's error as a multiple of feature 1's, for each column.
        steps: Steps of a training.
        restarts: Trainings per cell.
        seed: Of initial weights and samples.
    """
    p, weights = _grid(density, importance)
    models, found = best_of(
        restarts,
        lambda turn: train_toys(
            p, weights, 1, steps=steps, seed=seed + 1000 * turn, training=ToyTraining(256, 3e-2, label="phase diagram")
        ),
        lambda trained: expected_loss(trained.W, trained.b, p, weights, nodes=6),
    )
    return _diagram(density, importance, phases(models), found)


def optimal_diagram(density: tuple[float, ...], importance: tuple[float, ...], *, steps: int = 250) -> PhaseDiagram:
    """The optimum by brute force: at every cell the lowest expected loss among solutions of each kind.

    Kinds: only feature 1, only feature 2 (the other's output is its mean, so both losses have a closed form up to the
    represented feature's), both antipodal (w, −v). Of the last the scales and biases are searched by descent on the
    quadrature from a grid of starts.

    Args:
        density: How often a feature is active, for each row, in (0, 1].
        importance: Weight of feature 2's error as a multiple of feature 1's, for each column.
        steps: Steps of descent from each start.
    """
    p, weights = _grid(density, importance)
    alone = _alone(p, weights)
    both = _antipodal(p, weights, steps)
    losses = torch.stack((alone[0], alone[1], both))
    lowest, kind = losses.min(0)
    return _diagram(density, importance, kind, lowest)


def phases(models: ToyModels) -> Tensor:
    """The phase of feature 2 of each instance [k]: norm² below ½ is none; interference² below ½ is a dimension of its
    own (the paper's colours)."""
    norms, shared = feature_norms(models.W)[:, 1], interference(models.W)[:, 1]
    return torch.where(norms.square() < 0.5, 0, torch.where(shared < 0.5, 1, 2))


def _alone(p: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of representing one feature exactly (w = 1, b = 0) and the other by its mean.

    Var(x) = p/3 − (p/2)² is what the feature left out costs.
    """
    p, importance = p.double(), importance.double()
    variance = p / 3 - (p / 2).square()
    return importance[:, 1] * variance, importance[:, 0] * variance


def _antipodal(p: Tensor, importance: Tensor, steps: int) -> Tensor:
    """The lowest loss with both features on the dimension, in opposite directions."""
    starts = torch.cartesian_prod(
        torch.tensor([0.8, 1.1], dtype=torch.float64),
        torch.tensor([0.8, 1.1], dtype=torch.float64),
        torch.zeros(1, dtype=torch.float64),
    )
    best = torch.full((len(p),), torch.inf, dtype=torch.float64)
    for w, v, bias in starts.tolist():
        free = torch.tensor([w, v, bias, bias], dtype=torch.float64).repeat(len(p), 1).requires_grad_()
        adam = torch.optim.Adam([free], lr=0.03)
        for step in range(steps):
            adam.param_groups[0]["lr"] = 0.03 * (1 - step / steps)
            # both scales stay above ½^½: below it the feature counts as not represented
            found = expected_loss(*_two(free), p, importance, nodes=3)
            adam.zero_grad()
            found.sum().backward()
            adam.step()
        with torch.no_grad():
            found = expected_loss(*_two(free), p, importance)
            best = torch.minimum(best, found)
    return best


def _two(free: Tensor) -> tuple[Tensor, Tensor]:
    """(w, v, b1, b2) [k, 4] -> W [k, 1, 2], b [k, 2]."""
    scales = free[:, :2].clamp_min(0.5**0.5)
    return torch.stack((scales[:, 0], -scales[:, 1]), 1)[:, None], free[:, 2:]


def _grid(density: tuple[float, ...], importance: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    pairs = [(p, relative) for p in density for relative in importance]
    p = torch.tensor([pair[0] for pair in pairs])
    return p, torch.tensor([[1.0, pair[1]] for pair in pairs])


def _diagram(density: tuple[float, ...], importance: tuple[float, ...], phase: Tensor, found: Tensor) -> PhaseDiagram:
    shape = (len(density), len(importance))
    return PhaseDiagram(tuple(density), tuple(importance), phase.view(shape), found.view(shape))


def _quadrature(nodes: int, pieces: int = 8) -> tuple[Tensor, Tensor]:
    """Composite Gauss–Legendre on [0, 1]: points and weights [pieces · nodes], float64."""
    points, weights = np.polynomial.legendre.leggauss(nodes)
    starts = np.arange(pieces)[:, None] / pieces
    x = (starts + (points + 1) / 2 / pieces).ravel()
    return torch.from_numpy(x), torch.from_numpy(np.tile(weights / 2 / pieces, pieces))
