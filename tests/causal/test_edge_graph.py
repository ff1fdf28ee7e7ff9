"""The graph of sources and destinations: counts of the field, names, selection against brute force."""

import itertools

import pytest
import torch
from edge_models import double

from cutaway.artifacts.errors import CutawayError
from cutaway.causal.edge_graph import EdgeGraph


@pytest.mark.parametrize(
    ("layers", "heads", "parallel", "edges"),
    [
        (12, 12, False, 32_491),  # GPT-2 small
        (24, 16, False, 231_877),
        (36, 20, False, 810_703),
        (48, 25, False, 2_235_025),
        (12, 12, True, 32_347),  # Pythia-160m
        (24, 14, False, 179_749),
        (26, 8, False, 74_218),
        (16, 32, False, 386_713),
        (8, 8, False, 6_637),  # atlas
        (4, 4, False, 479),
        (6, 4, False, 1_108),
    ],
)
def test_edges_are_those_of_the_field(layers: int, heads: int, parallel: bool, edges: int) -> None:
    graph = EdgeGraph(layers, heads, parallel)
    assert graph.n_edges == edges
    assert len(graph.sources) == graph.n_sources == graph.real.shape[0]
    assert len(graph.destinations) == graph.n_destinations == graph.real.shape[1]


def test_names_lead_back() -> None:
    graph = EdgeGraph(2, 3, n_kv_heads=1)
    assert graph.sources == ("embed", "L0H0", "L0H1", "L0H2", "L0.mlp", "L1H0", "L1H1", "L1H2", "L1.mlp")
    assert graph.destinations[:6] == ("L0H0.q", "L0H1.q", "L0H2.q", "L0K0.k", "L0K0.v", "L0.mlp")
    for f, g in graph.real.nonzero().tolist():
        assert graph.edge(f"{graph.sources[f]}->{graph.destinations[g]}") == (f, g)
    edges = [("L0H1", "L1K0.v"), ("embed", "logits")]
    assert graph.edges_of(graph.mask_of(edges)) == edges
    with pytest.raises(CutawayError, match="did you mean L0H1"):
        graph.source("L0.H1")
    with pytest.raises(CutawayError, match="does not come before"):
        graph.edge("L1H0->L0.mlp")
    with pytest.raises(CutawayError, match="is written like"):
        graph.edge("L1H0 L0.mlp")


def _pruned(graph: EdgeGraph, edges: set[tuple[int, int]]) -> set[tuple[int, int]]:
    """Edges on a way from the embedding to the logits, found by walking."""
    owner = {g: set(graph.owns[:, g].nonzero().flatten().tolist()) for g in range(graph.n_destinations)}
    while True:
        reached = {0} | {n for _, g in edges for n in owner[g]}
        used = {f for f, _ in edges}
        last = graph.n_destinations - 1
        kept = {(f, g) for f, g in edges if f in reached and (g == last or owner[g] & used & reached)}
        if kept == edges:
            return kept
        edges = kept


@pytest.mark.parametrize("kv", [2, 1])
def test_pruning_by_walking(kv: int) -> None:
    graph = EdgeGraph(3, 2, n_kv_heads=kv)
    generator = torch.Generator().manual_seed(0)
    masks = torch.stack(
        [(torch.rand(graph.shape, generator=generator) < q) & graph.real for q in torch.rand(40).tolist()]
    )
    pruned = graph.prune(masks)
    for mask, found in zip(masks, pruned, strict=True):
        expected = _pruned(graph, {(f, g) for f, g in mask.nonzero().tolist()})
        assert {(f, g) for f, g in found.nonzero().tolist()} == expected
    assert bool((graph.prune(pruned) == pruned).all())


@pytest.mark.parametrize("by", ["absolute", "signed"])
def test_greedy_and_top_by_brute_force(by: str) -> None:
    graph = EdgeGraph(2, 2)
    generator = torch.Generator().manual_seed(1)
    for n in (1, 3, 10, 40, graph.n_edges):
        scores = torch.randn(graph.shape, generator=generator)
        ranked = scores.abs() if by == "absolute" else scores
        real = [tuple(e) for e in graph.real.nonzero().tolist()]
        best = sorted(real, key=lambda e: -float(ranked[e]))[:n]
        top = graph.top(scores, n, by=by)  # type: ignore[arg-type]
        assert {tuple(e) for e in top.nonzero().tolist()} == set(best)
        chosen: set[tuple[int, ...]] = set()
        for _ in range(n):
            inside = {f for f, _ in chosen}
            able = [
                e
                for e in real
                if e not in chosen
                and (e[1] == graph.n_destinations - 1 or inside & set(graph.owns[:, e[1]].nonzero().flatten().tolist()))
            ]
            if not able:
                break
            chosen.add(max(able, key=lambda e: float(ranked[e])))
        greedy = graph.greedy(scores, n, by=by)  # type: ignore[arg-type]
        assert {tuple(e) for e in greedy.nonzero().tolist()} == chosen


def test_positions_share_the_nodes() -> None:
    graph = EdgeGraph(1, 1, columns=("a", "b"))
    mask = graph.empty()
    mask[0, 0, graph.destination("L0H0.k")] = True  # the key at one position
    mask[1, graph.source("L0H0"), -1] = True  # serves the head's result at another
    assert torch.equal(graph.prune(mask), mask)
    scores = torch.rand(graph.shape, generator=torch.Generator().manual_seed(0))
    for n in (1, 4, graph.n_edges):
        assert graph.greedy(scores, n).sum() == n
        assert graph.top(scores, n).sum() == n


def test_bad_scores_and_sizes() -> None:
    graph = EdgeGraph(1, 2)
    scores = torch.zeros(graph.shape)
    for n in (0, graph.n_edges + 1):
        with pytest.raises(CutawayError, match=f"1 to {graph.n_edges} edges"):
            graph.top(scores, n)
    with pytest.raises(CutawayError, match="shape"):
        graph.top(scores[:-1], 1)
    scores[0, 0] = float("nan")
    with pytest.raises(CutawayError, match="NaN"):
        graph.greedy(scores, 1)
    assert list(itertools.islice(graph.edges_of(graph.empty()), 1)) == []


def test_models_without_separate_inputs_are_refused() -> None:
    with pytest.raises(CutawayError, match="latent attention"):
        EdgeGraph.of(double("deepseek_v3"))
    with pytest.raises(CutawayError, match="grouped=True"):
        EdgeGraph.of(double("falcon"))
    assert EdgeGraph.of(double("falcon"), grouped=True).kv == double("falcon").n_kv_heads
