"""Circuits of a given size really have it, and hang together."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.causal.circuits.baselines import (
    joinable,
    nodes_of,
    random_circuits,
    select_edges,
    sized_circuit,
    without_nodes,
)
from cutaway.causal.edge_graph import EdgeGraph

GRAPHS = (EdgeGraph(2, 2), EdgeGraph(3, 4), EdgeGraph(3, 4, parallel=True), EdgeGraph(2, 4, n_kv_heads=2))


def on_a_path(graph: EdgeGraph, mask: Tensor) -> bool:
    """Whether every edge lies on a path from the embedding to the logits: by following paths, one edge at a time."""
    edges = [(f, g) for f, g in mask.nonzero().tolist()]
    owner: dict[int, list[int]] = {
        g: graph.owns[:, g].nonzero().flatten().tolist() for g in range(graph.n_destinations)
    }
    reached, before = {0}, set[int]()
    while reached != before:
        before = set(reached)
        for f, g in edges:
            if f in reached:
                reached |= set(owner[g])
    last = graph.n_destinations - 1
    leads, before = {last}, set[int]()
    while leads != before:
        before = set(leads)
        leads |= {g for g in owner if any(f in owner[g] and h in leads for f, h in edges)}
    return all(f in reached and g in leads for f, g in edges)


@settings(max_examples=40)
@given(st.integers(0, len(GRAPHS) - 1), st.integers(0, 10**6), st.data())
def test_random_circuits_have_their_size_and_hang_together(which: int, seed: int, data: st.DataObject) -> None:
    graph = GRAPHS[which]
    n = data.draw(st.integers(1, graph.n_edges))
    masks = random_circuits(graph, n, 3, seed=seed)
    for mask in masks:
        assert int(mask.sum()) == n
        assert torch.equal(graph.prune(mask), mask)
        assert on_a_path(graph, mask)
    assert torch.equal(masks, random_circuits(graph, n, 3, seed=seed))


def test_random_circuits_differ_and_cover_the_graph() -> None:
    graph = EdgeGraph(3, 4)
    masks = random_circuits(graph, 40, 200, seed=0)
    often = masks.double().mean(0)[graph.real]
    assert float(often.min()) > 0  # every edge has its chance
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 200


def test_only_edges_between_nodes_of_a_circuit_join_it() -> None:
    graph = EdgeGraph(2, 2)
    assert graph.edges_of(joinable(graph, graph.empty())) == [("embed", "logits")]
    mask = graph.mask_of(["embed->L0H1.q", "L0H1->logits"])
    ends = {("embed", f"L0H1.{part}") for part in "qkv"} | {("embed", "logits"), ("L0H1", "logits")}
    assert set(graph.edges_of(joinable(graph, mask))) == ends


def test_random_circuits_with_positions() -> None:
    graph = EdgeGraph(2, 2, columns=("a", "b"))
    for n in (1, 2, 3, 9, graph.n_edges):
        for mask in random_circuits(graph, n, 5, seed=n):
            assert int(mask.sum()) == n
            assert torch.equal(graph.prune(mask), mask)


@pytest.mark.parametrize("select", ["greedy", "top"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_sized_circuits_are_the_nearest_from_below_and_above(graph: EdgeGraph, select: str) -> None:
    scores = torch.randn(graph.shape, generator=torch.Generator().manual_seed(3))
    sizes = {
        asked: int(select_edges(graph, scores, asked, select).sum())  # type: ignore[arg-type]
        for asked in range(1, graph.n_edges + 1)
    }
    for n in (1, 2, 5, 11, graph.n_edges // 2, graph.n_edges - 1, graph.n_edges):
        below, asked = sized_circuit(graph, scores, n, select=select)  # type: ignore[arg-type]
        above, more = sized_circuit(graph, scores, n, select=select, rounding="up")  # type: ignore[arg-type]
        assert int(below.sum()) == max([size for size in sizes.values() if size <= n], default=0)
        assert int(above.sum()) == min(size for size in sizes.values() if size >= n)
        assert asked == 0 or sizes[asked] == int(below.sum())
        assert sizes[more] == int(above.sum())


def test_sizes_out_of_range_are_refused() -> None:
    graph = EdgeGraph(2, 2)
    for n in (0, -3, graph.n_edges + 1):
        with pytest.raises(CutawayError, match=f"1 to {graph.n_edges} edges"):
            sized_circuit(graph, torch.ones(graph.shape), n)
        with pytest.raises(CutawayError, match=f"1 to {graph.n_edges} edges"):
            random_circuits(graph, n)
    with pytest.raises(CutawayError, match="'greedy' or 'top'"):
        select_edges(graph, torch.ones(graph.shape), 3, "best")  # type: ignore[arg-type]


def test_taking_out_nodes_takes_out_what_they_write() -> None:
    graph = EdgeGraph(2, 2)
    mask = graph.mask_of(["embed->L0H1.q", "L0H1->L1H0.k", "L0H1->logits", "L1H0->logits"])
    names = [graph.sources[i] for i in nodes_of(graph, mask).nonzero().flatten()]
    assert names == ["embed", "L0H1", "L1H0"]
    out = torch.zeros(graph.n_sources, dtype=torch.bool)
    out[graph.source("L0H1")] = True
    assert graph.edges_of(without_nodes(graph, mask, out)) == [("embed", "L0H1.q"), ("L1H0", "logits")]
