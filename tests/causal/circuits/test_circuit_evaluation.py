"""Faithfulness and its areas by hand, sizes and smallest circuits on a toy."""

import math

import pytest
import torch
from toy_graph import Toy, ToyRuns

from cutaway.artifacts.command import recording
from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.results import Choices
from cutaway.artifacts.statistics import ratio_intervals
from cutaway.causal.circuits.baselines import select_edges
from cutaway.causal.circuits.faithfulness import (
    FRACTIONS,
    baseline_circuits,
    cmd,
    cpr,
    faithfulness,
    measure,
    middle,
    plan_sizes,
    size_curve,
    smallest_faithful,
)
from cutaway.causal.edge_graph import EdgeGraph

CHOICES = Choices("edge", "every edge", "resample", "all", "complement", "12 pairs of a toy")


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy.random(EdgeGraph(2, 2), 12)


@pytest.fixture(scope="module")
def scores(toy: Toy) -> torch.Tensor:
    """How much f loses without each edge, by taking it out."""
    graph, falls = toy.graph, torch.zeros(toy.graph.shape)
    for f, g in graph.real.nonzero().tolist():
        mask = graph.full()
        mask[f, g] = False
        falls[f, g] = 1 - toy.f(mask)
    return falls


def test_faithfulness_is_its_definition() -> None:
    """Three pairs by hand, four times over."""
    clean, corrupt = [3.0, 2.0, 4.0] * 4, [1.0, -1.0, 0.0] * 4
    values = [[2.0, 2.0, 3.0] * 4, corrupt, clean, [5.0, 0.0, -2.0] * 4]
    measured = measure(ToyRuns(torch.tensor(values), torch.tensor(clean), torch.tensor(corrupt)))
    assert measured.ratio.tolist() == pytest.approx([7 / 9, 0.0, 1.0, 3 / 9], abs=1e-12)
    each, dropped = measured.mean_of_ratios(0)
    assert dropped == 0
    assert each[:3].tolist() == pytest.approx([1 / 2, 1.0, 3 / 4])
    low, high = measured.interval(0)
    assert low < 7 / 9 < high
    assert measured.interval(2) == pytest.approx((1.0, 1.0))


def test_the_interval_is_that_of_a_loop_over_draws() -> None:
    import numpy as np

    generator = torch.Generator().manual_seed(0)
    clean, corrupt, value = (torch.randn(10, generator=generator, dtype=torch.float64) + shift for shift in (3, 0, 2))
    measured = measure(ToyRuns(value[None], clean, corrupt), resamples=50, seed=7)
    drawn = np.random.default_rng(7).multinomial(10, np.full(10, 0.1), size=50)
    expected = []
    for counts in drawn:
        rows = [row for row, count in enumerate(counts) for _ in range(count)]
        expected.append(float((value[rows].mean() - corrupt[rows].mean()) / (clean[rows] - corrupt[rows]).mean()))
    assert measured.resampled[:, 0].tolist() == pytest.approx(expected, rel=1e-12)
    assert drawn / 10 == pytest.approx(measured.weights.numpy())
    whole = measure(ToyRuns(value[None], clean, corrupt))
    ends = tuple(ratio_intervals((value - corrupt).numpy(), (clean - corrupt).numpy()))
    assert measured.interval(0) == whole.interval(0) == pytest.approx(ends)
    # of any figure of circuits, from its draws: here the same ratio, to first order
    f = float(whole.ratio[0])
    low, high = whole.interval_over(f, whole.resampled[:, 0])
    assert low < f < high
    assert high - low == pytest.approx(ends[1] - ends[0], rel=0.3)


def test_a_pair_without_a_fall_is_left_out_of_the_mean_of_ratios() -> None:
    clean = torch.tensor([2.0] * 9 + [0.01])
    corrupt = torch.zeros(10)
    runs = ToyRuns(torch.tensor([[1.0] * 9 + [5.0]]), clean, corrupt)
    each, dropped = measure(runs).mean_of_ratios(0)
    assert dropped == 1
    assert each.tolist() == pytest.approx([0.5] * 9)


def test_areas_by_hand() -> None:
    straight = torch.tensor(FRACTIONS, dtype=torch.float64)
    assert float(cpr(FRACTIONS, straight)) == pytest.approx((1 - 0.001**2) / 2, rel=1e-12)
    assert float(cmd(FRACTIONS, straight)) == pytest.approx(0.999 - (1 - 0.001**2) / 2, rel=1e-12)
    assert float(cpr(FRACTIONS, torch.ones(10))) == pytest.approx(0.999)
    assert float(cmd(FRACTIONS, torch.ones(10))) == 0
    f = torch.tensor([[0.0, 0.5, 1.5]])
    assert cpr((0.1, 0.2, 0.4), f).tolist() == pytest.approx([0.1 * 0.25 + 0.2 * 1.0])
    assert cmd((0.1, 0.2, 0.4), f).tolist() == pytest.approx([0.1 * 0.75 + 0.2 * 0.5])  # 1.5 is as far from 1 as 0.5


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(CutawayError, match="7 pairs are too few for an interval; give 8"):
        measure(ToyRuns(torch.ones(1, 7), torch.ones(7), torch.zeros(7)))
    with pytest.raises(CutawayError, match="no circuit can be told from none"):
        measure(ToyRuns(torch.ones(1, 9), torch.ones(9), torch.ones(9)))


def test_effects_stand_beside_their_baselines(toy: Toy, scores: torch.Tensor) -> None:
    graph = toy.graph
    mask = select_edges(graph, scores, 16)
    magnitude = torch.rand(graph.shape, generator=torch.Generator().manual_seed(5))
    baselines = baseline_circuits(graph, mask, magnitude, select="greedy", draws=20, seed=1)
    assert baselines.magnitude is not None
    assert int(baselines.magnitude.sum()) >= int(mask.sum())
    assert {int(one.sum()) for one in baselines.random} == {int(mask.sum())}
    measured = measure(toy(torch.cat([mask[None], baselines.masks])))
    with recording("cutaway circuit"):
        found = faithfulness(measured, baselines, choices=CHOICES, search=0.9)
    whole, pairs = found.effects
    assert whole.value == pytest.approx(toy.f(mask), abs=1e-9)
    random, strong, search = whole.controls
    by_hand = [toy.f(one) for one in baselines.random]
    assert random.value == pytest.approx(sum(by_hand) / 20, abs=1e-9)
    assert random.interval is not None
    assert random.interval[1] > sorted(by_hand)[-2]  # a spread of circuits, not the interval of their mean
    assert strong.value == pytest.approx(toy.f(baselines.magnitude), abs=1e-9)
    assert search.value == 0.9
    assert whole.choices == pairs.choices == CHOICES
    assert whole.command == "cutaway circuit"
    each = (toy.one(mask) - toy.one(graph.empty())) / (toy.one(graph.full()) - toy.one(graph.empty()))
    assert pairs.value == pytest.approx(float(each.mean()), abs=1e-9)


def test_size_curve(toy: Toy, scores: torch.Tensor) -> None:
    graph = toy.graph
    fractions = (0.05, 0.2, 0.5, 1.0)
    magnitude = torch.rand(graph.shape, generator=torch.Generator().manual_seed(5))
    plan = plan_sizes(graph, scores, magnitude, fractions=fractions, draws=2)
    assert len(plan.masks) == (4 + 2) * 4
    curve = size_curve(plan, measure(toy(plan.masks)), choices=CHOICES)
    cpr_effect, cmd_effect = curve.effects
    ours, strong, random = curve.series
    sizes = [max(1, int(fraction * graph.n_edges)) for fraction in fractions]
    chosen = [select_edges(graph, scores, size) for size in sizes]
    assert ours.edges == tuple(float(mask.sum()) for mask in chosen)
    assert ours.value == pytest.approx([toy.f(mask) for mask in chosen], abs=1e-9)
    assert ours.value[-1] == pytest.approx(1)
    assert random.edges == tuple(max(1.0, edges) for edges in ours.edges)
    assert not ours.control
    assert strong.control
    assert random.control
    for by, effect, function in (("signed", cpr_effect, cpr), ("absolute", cmd_effect, cmd)):
        f = [toy.f(select_edges(graph, scores, size, "top", by)) for size in sizes]  # type: ignore[arg-type]
        assert effect.value == pytest.approx(float(function(fractions, torch.tensor(f))), abs=1e-6)
        assert [control.name for control in effect.controls] == ["random circuits", "strongest edges"]
        assert effect.interval is not None


@pytest.mark.parametrize("target", [0.3, 0.7, 0.95])
def test_the_smallest_faithful_circuit(toy: Toy, scores: torch.Tensor, target: float) -> None:
    graph = toy.graph
    # with as many steps as there are sizes the grid is every size: brute force says which is the first
    mask, asked, f = smallest_faithful(toy, graph, scores, target, max_edges=graph.n_edges, steps=200)
    by_size = [toy.f(select_edges(graph, scores, size)) for size in range(1, graph.n_edges + 1)]
    first = next(size for size, value in enumerate(by_size, 1) if value >= target)
    assert asked == first
    assert f == pytest.approx(by_size[first - 1], abs=1e-9)
    assert torch.equal(mask, select_edges(graph, scores, first))
    coarse, rough, value = smallest_faithful(toy, graph, scores, target, max_edges=graph.n_edges, steps=5)
    assert value >= target
    assert rough >= first
    assert int(coarse.sum()) <= rough


def test_finer_grids_find_the_first_size_where_f_only_rises(scores: torch.Tensor) -> None:
    graph = EdgeGraph(2, 2)
    sizes: list[int] = []

    def run(masks: torch.Tensor) -> ToyRuns:
        share = masks.flatten(1).sum(1) / graph.n_edges
        sizes.extend(masks.flatten(1).sum(1).tolist())
        return ToyRuns(share[:, None].expand(-1, 8), torch.ones(8), torch.zeros(8))

    for target in (0.21, 0.5, 0.9):
        mask, _, f = smallest_faithful(run, graph, scores, target, max_edges=graph.n_edges, steps=5, rounds=9)
        able = {int(select_edges(graph, scores, asked).sum()) for asked in range(1, graph.n_edges + 1)}
        assert int(mask.sum()) == min(size for size in able if size >= target * graph.n_edges)
        assert f == pytest.approx(int(mask.sum()) / graph.n_edges)
    assert len(sizes) < 3 * graph.n_edges


def test_a_faithfulness_out_of_reach_is_refused(toy: Toy, scores: torch.Tensor) -> None:
    with pytest.raises(CutawayError, match=r"No circuit of up to 2 edges reaches a faithfulness of 0\.99"):
        smallest_faithful(toy, toy.graph, -scores, 0.99, by="signed", max_edges=2)
    for target in (0.0, 1.5):
        with pytest.raises(CutawayError, match="above 0 and up to 1"):
            smallest_faithful(toy, toy.graph, scores, target)


def test_middle() -> None:
    low, high = middle(torch.arange(1001.0).view(7, 143))
    assert (low, high) == pytest.approx((25.0, 975.0))
    assert not math.isnan(low)
