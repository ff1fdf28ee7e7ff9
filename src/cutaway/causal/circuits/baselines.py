"""Circuits of a given size: by a ranking of the edges, and at random, to compare with.

Sizes count edges after pruning: an edge that hangs in the air does nothing, and a baseline that holds many of them
would be no baseline.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.causal.edge_graph import EdgeGraph

Select = Literal["greedy", "top"]
By = Literal["absolute", "signed"]
_TRIES = 200


def select_edges(
    graph: EdgeGraph, scores: Tensor, asked: int, select: Select = "greedy", by: By = "absolute"
) -> Tensor:
    """The pruned circuit of `asked` edges: grown from the logits ("greedy"), or the highest ones ("top")."""
    if select not in ("greedy", "top"):
        raise CutawayError(f"Edges are selected by 'greedy' or 'top', not by {select!r}.")
    chosen = graph.greedy if select == "greedy" else graph.top
    return graph.prune(chosen(scores, asked, by=by))


def sized_circuit(
    graph: EdgeGraph,
    scores: Tensor,
    n: int,
    *,
    select: Select = "greedy",
    by: By = "absolute",
    rounding: Literal["down", "up"] = "down",
) -> tuple[Tensor, int]:
    """The circuit of n edges after pruning, and how many edges had to be asked for.

    Pruned sizes grow with what is asked for, but in jumps. Rounded "down" it is the largest circuit of at most n edges
    (perhaps none), "up" the smallest of at least n.
    """
    if not 0 < n <= graph.n_edges:
        raise CutawayError(f"A circuit of this graph has 1 to {graph.n_edges} edges; {n} were asked for.")
    few, many = 0, graph.n_edges  # asked for: few gives at most n edges, many more than n (or everything)
    down = rounding == "down"
    best = {0: graph.empty(), many: graph.full()}
    if down and n == graph.n_edges:
        return best[many], many
    while many - few > 1:
        asked = (few + many) // 2
        best[asked] = select_edges(graph, scores, asked, select, by)
        size = int(best[asked].sum())
        if size <= n if down else size < n:
            few = asked
        else:
            many = asked
    return (best[few], few) if down else (best[many], many)


def random_circuits(graph: EdgeGraph, n: int, count: int = 20, *, seed: int = 0) -> Tensor:
    """`count` random circuits of exactly n edges, all of them on paths from the embedding to the logits.

    Edges get random scores, n of them are grown from the logits and pruned as a real circuit's are, and what pruning
    took is made up for by random edges between the nodes that are left.

    Args:
        graph: Whose edges are drawn.
        n: Edges of each circuit.
        count: How many circuits.
        seed: Of the draw.

    Returns:
        Masks, bool [count, F, G] (or [count, P, F, G]).
    """
    if not 0 < n <= graph.n_edges:
        raise CutawayError(f"A circuit of this graph has 1 to {graph.n_edges} edges; {n} were asked for.")
    generator = torch.Generator().manual_seed(seed)
    circuits: list[Tensor] = []
    while len(circuits) < count:
        for _ in range(_TRIES):
            scores = torch.rand(graph.shape, generator=generator)
            mask = _filled(graph, select_edges(graph, scores, n), n, generator)
            if mask is not None:
                circuits.append(mask)
                break
        else:
            raise CutawayError(f"No random circuit of {n} edges was found in {_TRIES} tries; ask for another size.")
    return torch.stack(circuits)


def _filled(graph: EdgeGraph, mask: Tensor, n: int, generator: torch.Generator) -> Tensor | None:
    """The pruned mask with random edges added up to n, or None where its nodes have no more."""
    mask = mask.clone()
    while (lacking := n - int(mask.sum())) > 0:
        able = (joinable(graph, mask) & ~mask).flatten().nonzero().flatten()
        if len(able):
            drawn = able[torch.randperm(len(able), generator=generator)[:lacking]]
            mask.view(-1)[drawn] = True
        elif lacking < 2:
            return None
        else:
            _bridge(graph, mask, generator)
    return mask


def joinable(graph: EdgeGraph, mask: Tensor) -> Tensor:
    """The edges between nodes that a pruned mask holds (the embedding and the logits are always held)."""
    here = nodes_of(graph, mask)
    reads = (here.float() @ graph.owns.float()) > 0
    here[0] = True
    reads[-1] = True
    return (graph.real & here[:, None] & reads).expand(graph.shape)


def _bridge(graph: EdgeGraph, mask: Tensor, generator: torch.Generator) -> None:
    """Add embed -> a random new node -> logits."""
    flat = mask if graph.columns is None else mask[int(torch.randint(len(mask), (1,), generator=generator))]
    new = (~nodes_of(graph, mask)).nonzero().flatten()
    new = new[new > 0]
    if not len(new):
        return
    node = int(new[torch.randint(len(new), (1,), generator=generator)])
    ports = graph.owns[node].nonzero().flatten()
    flat[0, ports[torch.randint(len(ports), (1,), generator=generator)]] = True
    flat[node, -1] = True


def nodes_of(graph: EdgeGraph, mask: Tensor) -> Tensor:
    """Which sources write to an edge of the mask: bool [..., F] for masks [..., F, G] (at any position)."""
    at_all = mask if graph.columns is None else mask.any(-3)
    return at_all.any(-1)


def without_nodes(graph: EdgeGraph, mask: Tensor, nodes: Tensor) -> Tensor:
    """The mask without what these sources write (bool [..., F]): everything reads the ablation of them."""
    kept = ~nodes[..., :, None]
    return mask & (kept if graph.columns is None else kept.unsqueeze(-3))
