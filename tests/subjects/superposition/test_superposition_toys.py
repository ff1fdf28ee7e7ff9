"""Toy models of superposition: the loss as a sum, gradients by hand, geometry by known polytopes, phases by force."""

import math
import runpy
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.subjects.superposition.geometry import (
    dimensionality,
    dimensions_per_feature,
    feature_norms,
    interference,
    nearest_polytope,
)
from cutaway.subjects.superposition.phase import expected_loss, optimal_diagram, phases, trained_diagram
from cutaway.subjects.superposition.toy_models import (
    Relation,
    ToyModels,
    ToyTraining,
    batches,
    initial,
    loss,
    sample,
    train_toys,
)

TWIN = runpy.run_path(str(Path(__file__).resolve().parents[3] / "examples" / "superposition_numpy.py"))


@pytest.mark.parametrize("linear", [False, True])
def test_the_loss_is_the_sum_it_says(linear: bool) -> None:
    W, b = initial(2, 5, 3, 0, torch.float64)
    b += torch.linspace(-0.2, 0.2, 5, dtype=torch.float64)
    x = sample(torch.tensor([0.3, 1.0], dtype=torch.float64), 5, 7, torch.Generator().manual_seed(0))
    importance = torch.rand(2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for k in range(2):
        total = 0.0
        for row in range(7):
            for i in range(5):
                pre = b[k, i].item()
                for j in range(5):
                    pre += sum(W[k, a, i].item() * W[k, a, j].item() for a in range(3)) * x[k, row, j].item()
                written = pre if linear else max(pre, 0.0)
                total += importance[k, i].item() * (x[k, row, i].item() - written) ** 2
        assert loss(W, b, x, importance, linear=linear)[k].item() == pytest.approx(total / 7, rel=1e-12)


def test_the_numpy_twin_has_the_same_gradients_and_ends_at_the_same_weights() -> None:
    W, b = initial(1, 6, 2, 3, torch.float64)
    importance = 0.8 ** torch.arange(6, dtype=torch.float64)
    density = torch.tensor([0.3], dtype=torch.float64)
    x = next(batches(density, 6, 64, 5))
    free = [tensor.clone().requires_grad_() for tensor in (W, b + 0.01)]
    found = loss(free[0], free[1], x, importance[None])
    found.sum().backward()
    value, d_W, d_b = TWIN["loss_and_gradients"](W[0].numpy(), b[0].numpy() + 0.01, x[0].numpy(), importance.numpy())
    assert value == pytest.approx(found.item(), rel=1e-12)
    for tensor, gradient in zip(free, (d_W, d_b), strict=True):
        assert tensor.grad is not None
        np.testing.assert_allclose(gradient, tensor.grad[0].numpy(), rtol=1e-10, atol=1e-14)

    ours = train_toys(
        density, importance, 2, steps=300, training=ToyTraining(64, start=(W, b), data=batches(density, 6, 64, 9))
    )
    stream = (one[0].numpy() for one in batches(density, 6, 64, 9))
    theirs = TWIN["train"](W[0].numpy(), b[0].numpy(), stream, importance.numpy(), 300)
    np.testing.assert_allclose(ours.W[0].numpy(), theirs[0], atol=1e-6)
    np.testing.assert_allclose(ours.b[0].numpy(), theirs[1], atol=1e-6)
    assert np.abs(ours.W[0].numpy() - W[0].numpy()).max() > 0.1  # it has moved


def test_instances_do_not_touch_each_other() -> None:
    density = torch.tensor([0.2, 0.6])
    W, b = initial(2, 4, 2, 0)
    importance = torch.ones(4)
    x = [next(batches(density, 4, 32, seed)) for seed in range(20)]
    both = train_toys(density, importance, 2, steps=20, training=ToyTraining(start=(W, b), data=iter(x)))
    for k in range(2):
        pick = slice(k, k + 1)
        one = train_toys(
            density[pick],
            importance,
            2,
            steps=20,
            training=ToyTraining(start=(W[pick], b[pick]), data=iter([y[pick] for y in x])),
        )
        torch.testing.assert_close(one.W[0], both.W[k])


def test_what_the_paper_found_with_five_features_in_two_dimensions() -> None:
    """Dense: the two most important, orthogonal. Sparse: all five, a pentagon. Linear: two, however sparse."""
    density, importance = torch.tensor([1.0, 0.03]), 0.9 ** torch.arange(5.0)
    dense, sparse = train_toys(density, importance, 2, steps=1500).W
    norms = feature_norms(dense)
    assert (norms[:2] > 0.95).all()
    assert (norms[2:] < 0.3).all()
    assert nearest_polytope(dimensionality(sparse)) == ["pentagon"] * 5
    linear = feature_norms(train_toys(density, importance, 2, steps=1500, linear=True).W)
    assert ((linear > 0.5).sum(1) == 2).all()
    assert (linear[:, :2] > 0.9).all()


def test_pairs_lie_as_the_paper_says() -> None:
    """4 features in 2 dimensions, the best of 8 instances. Correlated ones become orthogonal, or where they are less
    sparse share a direction (the first principal component); anticorrelated ones become antipodal, at no loss."""
    cosine = {}
    cases: list[tuple[Relation, float]] = [("correlated", 0.1), ("correlated", 0.4), ("anticorrelated", 0.1)]
    for relation, p in cases:
        density, importance = torch.full((8,), p), torch.ones(4)
        models = train_toys(density, importance, 2, steps=1000, relation=relation, training=ToyTraining(256))
        x = sample(density[:1], 4, 8192, torch.Generator().manual_seed(99), relation).expand(8, -1, -1)
        found = loss(models.W, models.b, x, models.importance)
        unit = torch.nn.functional.normalize(models.W[found.argmin()], dim=0)
        cosine[relation, p] = [(unit[:, i] @ unit[:, i + 1]).item() for i in (0, 2)]
        assert relation == "correlated" or found.min() < 1e-6
    assert max(abs(c) for c in cosine["correlated", 0.1]) < 0.15
    assert min(cosine["correlated", 0.4]) > 0.98
    assert max(cosine["anticorrelated", 0.1]) < -0.99


def _polygon(n: int) -> Tensor:
    angles = torch.arange(n, dtype=torch.float64) * 2 * math.pi / n
    return torch.stack((angles.cos(), angles.sin()))


def test_dimensionality_of_known_polytopes() -> None:
    tetrahedron = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64).T
    for W, expected in (
        (torch.eye(3, dtype=torch.float64), 1.0),
        (_polygon(3), 2 / 3),
        (_polygon(5), 2 / 5),
        (tetrahedron, 3 / 4),
        (torch.tensor([[1.0, -1.0]], dtype=torch.float64), 1 / 2),
    ):
        D = dimensionality(W * 1.3)  # it does not depend on the scale
        torch.testing.assert_close(D, torch.full_like(D, expected))
        assert D.sum().item() == pytest.approx(len(W))  # a tight frame uses all dimensions
    both = torch.zeros(5, 6, dtype=torch.float64)  # a digon and a triangle beside a feature that is not there
    both[0, :2] = torch.tensor([1.0, -1.0])
    both[1:3, 2:5] = _polygon(3)
    assert nearest_polytope(dimensionality(both)) == ["digon"] * 2 + ["triangle"] * 3 + ["none"]
    assert interference(both)[5] == 0
    assert interference(both)[0].item() == pytest.approx(1)
    assert dimensions_per_feature(both).item() == pytest.approx(1)


@pytest.mark.parametrize("relation", ["independent", "correlated", "anticorrelated"])
def test_samples_are_as_frequent_and_related_as_said(relation) -> None:
    density = torch.tensor([0.1, 0.4])
    on = (sample(density, 4, 40_000, torch.Generator().manual_seed(0), relation) > 0).double()
    torch.testing.assert_close(on.mean(1), density.double()[:, None].expand(2, 4), atol=0.01, rtol=0)
    together = (on[:, :, 0] * on[:, :, 1]).mean(1)
    expected = {"independent": density**2, "correlated": density, "anticorrelated": 0 * density}[relation]
    torch.testing.assert_close(together, expected.double(), atol=0.01, rtol=0)
    torch.testing.assert_close((on[:, :, 1] * on[:, :, 2]).mean(1), density.double() ** 2, atol=0.01, rtol=0)


def test_the_expected_loss_is_that_of_many_samples() -> None:
    density, importance = torch.tensor([0.2, 0.8]), torch.tensor([[1.0, 0.5], [1.0, 2.0]])
    W, b = torch.tensor([[[1.1, -0.9]], [[0.8, 0.4]]]), torch.tensor([[0.05, -0.1], [0.1, 0.2]])
    x = sample(density, 2, 400_000, torch.Generator().manual_seed(0))
    sampled = loss(W.double(), b.double(), x.double(), importance.double())
    exact = expected_loss(W, b, density, importance)
    torch.testing.assert_close(exact, sampled, rtol=0.01, atol=0)
    torch.testing.assert_close(expected_loss(W, b, density, importance, nodes=6), exact, rtol=1e-4, atol=0)


def test_the_brute_forced_optimum_is_the_lowest_of_a_fine_grid() -> None:
    """Nothing on a grid over (w1, w2, b1, b2) is below the optimum by more than the kinds of solution leave out."""
    density, importance = (0.3,), (0.5,)
    found = optimal_diagram(density, importance)
    w = torch.linspace(-1.4, 1.4, 15)
    bias = torch.linspace(-0.3, 0.3, 7)
    grid = torch.cartesian_prod(w, w, bias, bias)
    p, weights = torch.full((len(grid),), 0.3), torch.tensor([1.0, 0.5]).expand(len(grid), 2)
    losses = expected_loss(grid[:, None, :2], grid[:, 2:], p, weights, nodes=1)
    lowest = losses.min().item()
    assert found.loss.item() <= lowest * 1.001
    assert lowest < found.loss.item() * 1.1  # the grid comes close, so the bound says something
    w1, w2 = grid[losses.argmin()][:2].tolist()
    assert PHASE_OF[int(found.phase.item())](w1, w2)


PHASE_OF = {
    0: lambda w1, w2: w2**2 < 0.5,
    1: lambda w1, w2: w1**2 < 0.5 <= w2**2,
    2: lambda w1, w2: w1 * w2 < 0 and min(w1**2, w2**2) >= 0.5,
}


def test_trained_phases_are_the_optimal_ones() -> None:
    density, importance = (1.0, 0.3, 0.03), (0.1, 0.6, 8.0)
    trained, optimal = trained_diagram(density, importance, steps=600, restarts=4), optimal_diagram(density, importance)
    assert trained.agreement(optimal) == 1, (trained.phase, optimal.phase)
    assert trained.phase[0].tolist() == [0, 0, 1]
    assert trained.phase[2].tolist() == [2, 2, 2]
    ratio = trained.loss / optimal.loss
    assert (ratio > 0.99).all(), ratio
    assert (ratio < 1.1).all(), ratio


def test_a_feature_alone_in_its_direction_is_no_superposition() -> None:
    W = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[1.0, -1.0]]])
    models = ToyModels(W, torch.zeros(3, 2), torch.ones(3), torch.ones(3, 2))
    assert phases(models).tolist() == [0, 1, 2]


def test_the_sweep_over_sparsity_falls_and_sticks_at_one_half() -> None:
    """D* = m / ‖W‖² falls with sparsity, and features in pairs have half a dimension each."""
    density = torch.tensor([1.0, 0.6, 0.4, 0.05])
    models = train_toys(density, torch.ones(40), 8, steps=1200, training=ToyTraining(256))
    shares = dimensions_per_feature(models.W).tolist()
    assert all(a > b for a, b in pairwise(shares))
    named = [nearest_polytope(D) for D in dimensionality(models.W)]
    assert named[2].count("digon") >= 12


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"density": torch.tensor([0.0])}, "(0, 1]"),
        ({"density": torch.tensor([0.5, 0.5]), "importance": torch.ones(1, 4)}, "one for each instance"),
        ({"m": 0}, "at least 1"),
        ({"relation": "correlated", "importance": torch.ones(3)}, "pairs"),
        ({"relation": "anticorrelated", "density": torch.tensor([0.7])}, "½"),
    ],
)
def test_bad_input_is_refused_by_name(arguments, said: str) -> None:
    given = {"density": torch.tensor([0.5]), "importance": torch.ones(4), "m": 2, "steps": 2, **arguments}
    with pytest.raises(CutawayError) as error:
        train_toys(given.pop("density"), given.pop("importance"), given.pop("m"), **given)
    assert said in str(error.value)
