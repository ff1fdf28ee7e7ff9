"""Overlap by sets, and the bootstrap by a loop."""

import itertools

import numpy as np
import pytest
import torch

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.results import Choices
from cutaway.causal.circuits.baselines import nodes_of, select_edges
from cutaway.causal.circuits.stability import jaccard, overlap, resampled_circuits, stability
from cutaway.causal.edge_graph import EdgeGraph

CHOICES = Choices("edge", "heads", "none", "all", "complement", "search pairs")


def test_jaccard_is_that_of_sets() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(6, 20, generator=generator) < 0.3
    masks[2] = False
    masks[3] = False
    sets = [set(mask.nonzero().flatten().tolist()) for mask in masks]
    found = jaccard(masks, masks)
    for i, j in itertools.product(range(6), repeat=2):
        either = sets[i] | sets[j]
        expected = len(sets[i] & sets[j]) / len(either) if either else 1.0
        assert float(found[i, j]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("select", ["greedy", "top"])
def test_resampled_circuits_by_a_loop(select: str) -> None:
    graph = EdgeGraph(2, 2)
    per_pair = torch.randn(9, *graph.shape, generator=torch.Generator().manual_seed(1)).masked_fill(~graph.real, 0)
    masks = resampled_circuits(graph, per_pair, 12, select=select, resamples=5, seed=4)  # type: ignore[arg-type]
    drawn = np.random.default_rng(4).multinomial(9, np.full(9, 1 / 9), size=5)
    for counts, mask in zip(drawn, masks, strict=True):
        rows = [row for row, count in enumerate(counts) for _ in range(count)]
        assert len(rows) == 9
        mean = per_pair[rows].double().mean(0)
        assert torch.equal(mask, select_edges(graph, mean, 12, select))  # type: ignore[arg-type]


def test_overlap_by_sets_of_edges_and_nodes() -> None:
    graph = EdgeGraph(2, 2)
    whole = graph.mask_of(["embed->L0H1.q", "L0H1->logits", "embed->L1.mlp", "L1.mlp->logits"])
    first = graph.mask_of(["embed->L0H1.q", "L0H1->logits"])
    second = graph.mask_of(["embed->L0H1.k", "L0H1->logits", "embed->logits"])
    edges, nodes = overlap(graph, torch.stack([first, second]), whole)
    assert edges.with_all.tolist() == pytest.approx([2 / 4, 1 / 6])
    assert edges.mean_pairwise == pytest.approx(1 / 4)
    assert nodes.with_all.tolist() == pytest.approx([2 / 3, 2 / 3])
    assert nodes.mean_pairwise == pytest.approx(1.0)
    assert nodes_of(graph, whole).sum() == 3


def test_one_kind_of_pair_is_perfectly_stable_and_noise_is_not() -> None:
    graph = EdgeGraph(3, 4)
    generator = torch.Generator().manual_seed(2)
    same = torch.randn(graph.shape, generator=generator).masked_fill(~graph.real, 0).expand(12, *graph.shape)
    noise = torch.randn(12, *graph.shape, generator=generator).masked_fill(~graph.real, 0)
    mask = select_edges(graph, same[0], 30)
    alike = stability(graph, mask, same, 30, choices=CHOICES).effects
    assert [effect.value for effect in alike] == pytest.approx([1.0] * 4)
    assert all(effect.controls[0].value < 0.9 for effect in alike)
    unlike = stability(graph, select_edges(graph, noise.mean(0), 30), noise, 30, choices=CHOICES).effects
    assert unlike[0].value < 0.6
    assert unlike[0].value < unlike[1].value  # two resamples differ more than each from the whole
    for effect in (*alike, *unlike):
        assert effect.interval is not None
        assert effect.interval[0] <= effect.value <= effect.interval[1]
        assert effect.choices == CHOICES


def test_too_few_pairs_or_resamples_are_refused() -> None:
    graph = EdgeGraph(2, 2)
    few = torch.ones(7, *graph.shape)
    with pytest.raises(CutawayError, match="7 pairs are too few"):
        stability(graph, graph.full(), few, 9, choices=CHOICES)
    with pytest.raises(CutawayError, match="100 resamples or more"):
        stability(graph, graph.full(), torch.ones(8, *graph.shape), 9, choices=CHOICES, resamples=20)
