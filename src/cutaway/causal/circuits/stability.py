"""Would other prompts of the same kind have given the same circuit?

Pairs are drawn again with replacement, the edges' scores averaged over the draw, and the circuit selected anew (Efron
1979; that circuits of single samples differ is shown by Shi et al. 2024 and others). Overlap is the Jaccard index.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.results import Choices, Control, Effect
from cutaway.artifacts.statistics import bootstrap_weights
from cutaway.causal.circuits.baselines import By, Select, nodes_of, random_circuits, select_edges
from cutaway.causal.edge_graph import EdgeGraph
from cutaway.causal.effects import Effects

MIN_PAIRS = 8
MIN_RESAMPLES = 100


@dataclass(frozen=True)
class Overlap:
    """Jaccard indices of R resampled circuits: with the circuit of all pairs [R], and of every two of them [R, R]."""

    with_all: Tensor
    pairwise: Tensor

    @property
    def mean_pairwise(self) -> float:
        """Mean over pairs of different resamples."""
        n = len(self.pairwise)
        return float((self.pairwise.sum() - self.pairwise.trace()) / (n * (n - 1)))


@dataclass(frozen=True, repr=False)
class Stability(Effects):
    """Overlap of the circuits that resampled pairs give, with one another and with the circuit."""

    title = "Would other pairs give the same circuit?"


def jaccard(a: Tensor, b: Tensor) -> Tensor:
    """|A ∩ B| / |A ∪ B| of every set in `a` [R, E] with every set in `b` [S, E], float64 [R, S]; two empty ones: 1."""
    a, b = a.double(), b.double()
    both = a @ b.T
    either = a.sum(1)[:, None] + b.sum(1)[None] - both
    return torch.where(either > 0, both / either.clamp(min=1), torch.ones_like(both))


def resampled_circuits(
    graph: EdgeGraph,
    per_pair: Tensor,
    asked: int,
    *,
    select: Select = "greedy",
    by: By = "absolute",
    resamples: int = MIN_RESAMPLES,
    seed: int = 0,
) -> Tensor:
    """The circuit that each of `resamples` bootstrap draws of the pairs gives, masks [R, ...].

    `per_pair` [n, ...] are each pair's edge scores; `asked` is how many edges are selected before pruning.
    """
    n = len(per_pair)
    drawn = bootstrap_weights(n, resamples, seed)
    means = torch.from_numpy(drawn).to(per_pair.dtype) @ per_pair.flatten(1)
    return torch.stack([select_edges(graph, row.view(graph.shape), asked, select, by) for row in means])


def overlap(graph: EdgeGraph, circuits: Tensor, mask: Tensor) -> tuple[Overlap, Overlap]:
    """Overlap of circuits [R, ...] by their edges, and by their nodes."""
    edges, edge = circuits.flatten(1), mask.flatten()[None]
    nodes, node = nodes_of(graph, circuits), nodes_of(graph, mask)[None]
    return (
        Overlap(jaccard(edges, edge)[:, 0], jaccard(edges, edges)),
        Overlap(jaccard(nodes, node)[:, 0], jaccard(nodes, nodes)),
    )


def stability(
    graph: EdgeGraph,
    mask: Tensor,
    per_pair: Tensor,
    asked: int,
    *,
    choices: Choices,
    select: Select = "greedy",
    by: By = "absolute",
    resamples: int = MIN_RESAMPLES,
    draws: int = 20,
    seed: int = 0,
) -> Stability:
    """Mean Jaccard index of resampled circuits, pairwise and with the circuit itself, by edges and by nodes.

    The interval is the middle 95 % of resamples (of their pairs, pairwise). The control is the same of random circuits
    with as many edges.

    Args:
        graph: The graph that the circuit is of.
        mask: The circuit, bool, of the graph's shape.
        per_pair: Signed importance of every edge for each of n pairs [n, ...].
        asked: Edges that were asked for before pruning.
        choices: The six choices that the effects depend on.
        select: How circuits are selected: "greedy" or "top".
        by: Ranked by "absolute" or "signed" scores.
        resamples: Bootstrap draws of the pairs, 100 or more.
        draws: Random circuits to compare with.
        seed: Of both.

    Raises:
        CutawayError: Fewer than 8 pairs, where resamples are too much alike to tell.

    Source: Efron 1979; Shi et al. 2024.
    """
    n = len(per_pair)
    if n < MIN_PAIRS:
        raise CutawayError(f"{n} pairs are too few to tell whether a circuit is stable; give {MIN_PAIRS} or more.")
    if resamples < MIN_RESAMPLES:
        raise CutawayError(f"Stability takes {MIN_RESAMPLES} resamples or more; {resamples} were asked for.")
    circuits = resampled_circuits(graph, per_pair, asked, select=select, by=by, resamples=resamples, seed=seed)
    random = random_circuits(graph, int(mask.sum()), draws, seed=seed + 1)
    effects: list[Effect] = []
    for what, ours, control in zip(
        ("edges", "nodes"), overlap(graph, circuits, mask), overlap(graph, random, mask), strict=True
    ):
        for how, values, value, chance in (
            ("with one another", _pairs(ours.pairwise), ours.mean_pairwise, _pairs(control.pairwise)),
            ("with the circuit", ours.with_all, float(ours.with_all.mean()), control.with_all),
        ):
            effects.append(
                Effect(
                    name=f"overlap of resampled circuits {how}, {what}",
                    value=value,
                    n=n,
                    interval=_middle(values),
                    controls=(
                        Control("random circuits of the same size", float(chance.mean()), _middle(chance), draws),
                    ),
                    ablation="none",
                    units=f"Jaccard index over {resamples} resamples",
                    choices=choices,
                )
            )
    return Stability(tuple(effects))


def _pairs(matrix: Tensor) -> Tensor:
    rows, columns = torch.triu_indices(len(matrix), len(matrix), offset=1)
    return matrix[rows, columns]


def _middle(values: Tensor) -> tuple[float, float]:
    low, high = np.quantile(values.numpy(), [0.025, 0.975])
    return float(low), float(high)
