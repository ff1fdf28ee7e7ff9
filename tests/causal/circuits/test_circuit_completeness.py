"""Completeness, minimality and self-repair on a toy, against loops over the definition."""

import itertools

import pytest
import torch
from toy_graph import Toy

from cutaway.artifacts.results import Choices
from cutaway.causal.circuits.baselines import select_edges, without_nodes
from cutaway.causal.circuits.completeness import (
    circuit_self_repair,
    completeness,
    greedy_subset,
    inner_nodes,
    minimality,
)
from cutaway.causal.edge_graph import EdgeGraph

CHOICES = Choices("edge", "every edge", "resample", "all", "complement", "10 pairs of a toy")


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy.random(EdgeGraph(2, 2), 10, seed=3)


@pytest.fixture(scope="module")
def mask(toy: Toy) -> torch.Tensor:
    return select_edges(toy.graph, toy.weights.float(), 14)


def out(toy: Toy, mask: torch.Tensor, nodes: tuple[int, ...]) -> torch.Tensor:
    """The mask without the rows of these nodes."""
    left = mask.clone()
    left[list(nodes)] = False
    return left


def gap(toy: Toy, mask: torch.Tensor, nodes: tuple[int, ...]) -> float:
    return abs(toy.f(out(toy, mask, nodes)) - toy.f(out(toy, toy.graph.full(), nodes)))


def test_the_greedy_subset_takes_the_best_node_at_each_step(toy: Toy, mask: torch.Tensor) -> None:
    nodes = inner_nodes(toy.graph, mask)
    found = greedy_subset(toy, toy.graph, mask, steps=3, width=99)
    chosen: tuple[int, ...] = ()
    for _ in range(3):
        tried = {(*chosen, node): gap(toy, mask, (*chosen, node)) for node in nodes if node not in chosen}
        best = next(one for one, value in tried.items() if value == max(tried.values()))
        if chosen and tried[best] <= gap(toy, mask, chosen):
            break
        chosen = best
    assert len(found) >= 1
    assert found == chosen
    # and it is no worse than the best single node of all, by brute force
    every = {one: gap(toy, mask, one) for k in (1, 2) for one in itertools.combinations(nodes, k)}
    assert gap(toy, mask, found) >= max(value for one, value in every.items() if len(one) == 1) - 1e-12


def test_completeness_is_the_gap_between_circuit_and_model(toy: Toy, mask: torch.Tensor) -> None:
    graph = toy.graph
    found = completeness(toy, graph, mask, choices=CHOICES, count=4, draws=2)
    rows, (complement, random, greedy) = found.knockouts, found.effects
    assert complement.value == pytest.approx(toy.f(graph.full() & ~mask), abs=1e-9)
    assert [row.how for row in rows] == ["random"] * 4 + ["greedy"]
    for row in rows:
        nodes = tuple(graph.source(name) for name in row.nodes)
        assert row.circuit == pytest.approx(toy.f(out(toy, mask, nodes)), abs=1e-9)
        assert row.model == pytest.approx(toy.f(out(toy, graph.full(), nodes)), abs=1e-9)
        assert row.gap == pytest.approx(gap(toy, mask, nodes), abs=1e-9)
    assert random.value == pytest.approx(sum(row.gap for row in rows[:4]) / 4)
    assert greedy.value == pytest.approx(rows[4].gap)
    for effect in (complement, random, greedy):
        assert len(effect.controls) == 1
        assert effect.interval is not None
        assert effect.choices == CHOICES


def test_the_whole_model_is_complete(toy: Toy) -> None:
    found = completeness(toy, toy.graph, toy.graph.full(), choices=CHOICES, count=3, draws=1)
    assert all(row.gap < 1e-12 for row in found.knockouts)
    assert found.effects[0].value == pytest.approx(0, abs=1e-12)  # the complement is empty


def test_minimality_takes_out_one_part_at_a_time(toy: Toy, mask: torch.Tensor) -> None:
    graph = toy.graph
    found = minimality(toy, graph, mask, choices=CHOICES, max_edges=999)
    edges, nodes, (idle,) = found.edges, found.nodes, found.effects
    assert {row.part for row in edges} == {f"{a}->{b}" for a, b in graph.edges_of(mask)}
    for row in edges:
        left = mask.clone()
        left[graph.edge(row.part)] = False
        assert row.fall == pytest.approx(toy.f(mask) - toy.f(left), abs=1e-9)
        assert row.low - 1e-9 <= row.fall <= row.high + 1e-9
    for row in nodes:
        left = without_nodes(graph, mask, torch.arange(graph.n_sources) == graph.source(row.part))
        assert row.fall == pytest.approx(toy.f(mask) - toy.f(left), abs=1e-9)
    assert idle.value == pytest.approx(sum(abs(row.fall) < 0.01 for row in edges) / len(edges))
    sampled = minimality(toy, graph, mask, choices=CHOICES, max_edges=5)
    assert len(sampled.edges) == 5
    assert f"5 of {int(mask.sum())} tried" in sampled.effects[0].name


def test_an_edge_of_no_weight_is_idle() -> None:
    toy = Toy.random(EdgeGraph(2, 2), 10, seed=3)
    f, g = toy.graph.edge("L0H0->logits")
    toy.weights[f, g] = 0
    edges = minimality(toy, toy.graph, toy.graph.full(), choices=CHOICES, max_edges=999).edges
    assert {row.part: row.fall for row in edges}["L0H0->logits"] == pytest.approx(0, abs=1e-12)


def planted() -> Toy:
    """Two heads write the same to one MLP that saturates, so that one stands in for the other; a third writes too."""
    graph = EdgeGraph(2, 4)
    weights = torch.zeros(graph.shape, dtype=torch.float64)
    for name in ("embed->L0H0.q", "embed->L0H1.q", "embed->L0H2.q", "embed->L0H3.q"):
        weights[graph.edge(name)] = 2.0
    for name, weight in (("L0H0->L0.mlp", 1.5), ("L0H1->L0.mlp", 1.0), ("L0.mlp->logits", 1.0)):
        weights[graph.edge(name)] = weight
    weights[graph.edge("L0H2->logits")] = 0.3
    weights[graph.edge("L0H3->logits")] = 0.001
    clean = torch.linspace(1, 2, 10, dtype=torch.float64)
    return Toy(graph, weights, clean, torch.zeros(10, dtype=torch.float64))


def test_a_backup_head_is_found_by_self_repair() -> None:
    toy = planted()
    graph = toy.graph
    # without L0H2 and the MLP, so that the pair is what is tried
    mask = graph.mask_of(["embed->L0H0.q", "embed->L0H1.q", "embed->L0H3.q"])
    mask |= graph.mask_of(["L0H0->L0.mlp", "L0H1->L0.mlp", "L0H3->logits"])
    found = circuit_self_repair(toy, graph, mask, choices=CHOICES)
    assert found is not None
    name, rows, (effect,) = found.repaired, found.repair, found.effects
    whole = graph.full()
    assert name == "L0H0"
    assert [row.part for row in rows] == ["L0H1"]

    def cost(nodes: tuple[int, ...], node: int) -> float:
        return toy.f(out(toy, whole, nodes)) - toy.f(out(toy, whole, (*nodes, node)))

    zero, one = graph.source("L0H0"), graph.source("L0H1")
    assert rows[0].fall == pytest.approx(cost((zero,), one) - cost((), one), abs=1e-9)
    assert rows[0].fall > 0.4  # alone it costs little, as the only one left it costs everything
    assert effect.controls[0].name.startswith("after L0H3")
    assert abs(effect.controls[0].value) < 0.01
