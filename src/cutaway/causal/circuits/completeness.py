"""Is anything missing from a circuit, is anything in it idle, and does the model repair what is taken away?

Completeness and minimality follow Wang et al. 2023: a circuit that is complete behaves as the model does when the same
nodes K are taken out of both, and in one that is minimal every part matters. Everything is in shares of the whole
model's fall, m(N) - m(∅), as faithfulness is.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.results import Choices, Control, Effect
from cutaway.causal.circuits.baselines import nodes_of, random_circuits, without_nodes
from cutaway.causal.circuits.faithfulness import UNITS, MeasuredCircuits, RunCircuits, measure, middle
from cutaway.causal.edge_graph import EdgeGraph
from cutaway.causal.effects import Effects
from cutaway.draw.charts import Bar, bars_html
from cutaway.draw.panels import fold, table_html

_SHOWN = 16
_IDLE = 0.01  # of the whole: Wang et al.'s bar for a part that matters


@dataclass(frozen=True)
class Knockout:
    """The same nodes taken out of circuit and model: f of both, and of a random circuit of the circuit's size."""

    nodes: tuple[str, ...]
    how: str  # "random" or "greedy"
    circuit: float
    model: float
    random: float

    @property
    def gap(self) -> float:
        """|f(C∖K) - f(M∖K)|: 0 is complete."""
        return abs(self.circuit - self.model)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Knockout:
        return cls(**{**data, "nodes": tuple(data["nodes"])})


@dataclass(frozen=True)
class Removal:
    """How f falls when one edge or node is taken out of the circuit."""

    part: str
    fall: float
    low: float
    high: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Removal:
        return cls(**data)


@dataclass(frozen=True, repr=False)
class Completeness(Effects):
    """f of all that is outside a circuit, and how differently circuit and model take the loss of the same nodes."""

    knockouts: tuple[Knockout, ...]
    """Every set of nodes that was taken out."""

    title = "Is anything missing?"

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "knockouts": [one.to_json() for one in self.knockouts]}

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "nodes": ", ".join(one.nodes), "chosen": one.how, "circuit": one.circuit, "model": one.model,
                "gap": one.gap, "gap of a random circuit": abs(one.random - one.model),
            }
            for one in self.knockouts
        ]  # fmt: skip

    def drawing(self) -> Markup:
        columns = ["chosen", "nodes taken out", "circuit", "model", "gap", "control: random circuit's gap"]
        cells = [
            [one.how, ", ".join(one.nodes), one.circuit, one.model, one.gap, abs(one.random - one.model)]
            for one in self.knockouts
        ]
        table = table_html(columns=columns, rows=cells, title="Knock-outs")
        return super().drawing() + fold("Every set of nodes", table)


@dataclass(frozen=True, repr=False)
class Minimality(Effects):
    """What f loses without each edge, and without each node, of a circuit; and the share of edges that is idle."""

    edges: tuple[Removal, ...]
    """What f loses without each edge of those tried."""
    nodes: tuple[Removal, ...]
    """What f loses without each node."""

    title = "Is anything idle?"

    def to_json(self) -> dict[str, Any]:
        parts = {"edges": self.edges, "nodes": self.nodes}
        return {**super().to_json(), **{key: [one.to_json() for one in rows] for key, rows in parts.items()}}

    def rows(self) -> list[dict[str, Any]]:
        parts = {"edge": self.edges, "node": self.nodes}
        return [{"kind": kind, **one.to_json()} for kind, rows in parts.items() for one in rows]

    def drawing(self) -> Markup:
        over = Markup('<div class="cw-over">{}</div>')
        return (
            super().drawing()
            + over.format(f"without one node (the {_SHOWN} largest)") + _bars(self.nodes)
            + over.format(f"without one edge (the {_SHOWN} largest of those tried)") + _bars(self.edges)
        )  # fmt: skip


@dataclass(frozen=True, repr=False)
class CircuitSelfRepair(Effects):
    """How much more the model needs its other nodes once the most needed one is gone."""

    repaired: str
    """The node that is knocked out first."""
    repair: tuple[Removal, ...]
    """The growth of what every other node costs, the largest first."""

    title = "Does the model repair itself?"

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "repaired": self.repaired, "repair": [one.to_json() for one in self.repair]}

    def rows(self) -> list[dict[str, Any]]:
        return [{"knocked out": self.repaired, **one.to_json()} for one in self.repair]

    def drawing(self) -> Markup:
        return super().drawing() + _bars(self.repair)


def _bars(rows: Sequence[Removal]) -> Markup:
    """The largest falls as bars."""
    items: list[Bar] = [
        {"label": one.part, "value": one.fall, "low": one.low, "high": one.high}
        for one in sorted(rows, key=lambda row: -abs(row.fall))[:_SHOWN]
    ]
    return bars_html(items=items, units="of the whole model's fall")


def inner_nodes(graph: EdgeGraph, mask: Tensor) -> list[int]:
    """The sources of a circuit without the embedding."""
    return [node for node in nodes_of(graph, mask).nonzero().flatten().tolist() if node]


def subsets(nodes: list[int], count: int, generator: torch.Generator) -> list[tuple[int, ...]]:
    """Random subsets, each node in it with probability ½, none empty."""
    drawn: list[tuple[int, ...]] = []
    while len(drawn) < count and nodes:
        kept = torch.rand(len(nodes), generator=generator) < 0.5
        if bool(kept.any()):
            drawn.append(tuple(node for node, keep in zip(nodes, kept.tolist(), strict=True) if keep))
    return drawn


def _out(graph: EdgeGraph, masks: Tensor, chosen: list[tuple[int, ...]]) -> Tensor:
    """Every mask [M, ...] without each of the K node sets: [K * M, ...], sets outermost."""
    out = torch.zeros(len(chosen), 1, graph.n_sources, dtype=torch.bool)
    for row, nodes in enumerate(chosen):
        out[row, 0, list(nodes)] = True
    return without_nodes(graph, masks.expand(len(chosen), *masks.shape), out).flatten(0, 1)


def greedy_subset(
    run: RunCircuits, graph: EdgeGraph, mask: Tensor, *, steps: int = 4, width: int = 10, seed: int = 0
) -> tuple[int, ...]:
    """Nodes K of the circuit that make |f(C∖K) - f(M∖K)| large: always the node that adds most, while one does.

    Each step tries `width` random nodes (all of them where there are no more), in one pass.
    """
    generator = torch.Generator().manual_seed(seed)
    nodes, chosen, gap = inner_nodes(graph, mask), tuple[int, ...](), 0.0
    both = torch.stack([mask, graph.full()])
    for _ in range(min(steps, len(nodes))):
        left = [node for node in nodes if node not in chosen]
        tried = sorted(left[i] for i in torch.randperm(len(left), generator=generator)[:width].tolist())
        sets = [(*chosen, node) for node in tried]
        f = measure(run(_out(graph, both, sets)), resamples=1).ratio.view(-1, 2)
        gaps = (f[:, 0] - f[:, 1]).abs()
        best = int(gaps.argmax())
        if not float(gaps[best]) > gap:
            break
        chosen, gap = sets[best], float(gaps[best])
    return chosen


def completeness(
    run: RunCircuits,
    graph: EdgeGraph,
    mask: Tensor,
    *,
    choices: Choices,
    count: int = 10,
    steps: int = 4,
    width: int = 10,
    draws: int = 5,
    seed: int = 0,
) -> Completeness:
    """f of all that is outside the circuit, and how differently circuit and model take the loss of the same nodes.

    Random and greedily chosen sets of nodes are taken out. The controls are the same of random circuits of its size.

    Args:
        run: From masks to the metric of the pairs.
        graph: The graph that the circuit is of.
        mask: The circuit, bool, of the graph's shape.
        choices: The six choices that the effects depend on.
        count: Random sets of nodes.
        steps: Nodes of the greedy set, at most.
        width: Nodes that are tried in each of its steps.
        draws: Random circuits to compare with.
        seed: Of everything that is drawn.

    Source: Wang et al. 2023; https://arxiv.org/abs/2211.00593.
    """
    generator = torch.Generator().manual_seed(seed)
    random = random_circuits(graph, int(mask.sum()), draws, seed=seed + 1)
    nodes = inner_nodes(graph, mask)
    sets = subsets(nodes, count, generator)
    worst = greedy_subset(run, graph, mask, steps=steps, width=width, seed=seed)
    hows = ["random"] * len(sets)
    if worst:
        sets, hows = [*sets, worst], [*hows, "greedy"]
    whole = graph.full()
    three = torch.stack([mask, whole, random[0]])
    masks = torch.cat([(whole & ~mask)[None], whole & ~random, _out(graph, three, sets)])
    measured = measure(run(masks))
    knocked = measured.ratio[1 + draws :].view(len(sets), 3).tolist()
    found = [
        Knockout(tuple(graph.sources[node] for node in nodes), how, *f)
        for nodes, how, f in zip(sets, hows, knocked, strict=True)
    ]
    others = measured[slice(1, 1 + draws)]
    effects = [
        Effect(
            "faithfulness of the complement", float(measured.ratio[0]), measured.n, measured.interval(0),
            (Control("complements of random circuits", float(others.ratio.mean()), middle(others.resampled), draws),),
            choices.ablation, UNITS, choices=choices,
        )
    ]  # fmt: skip
    drawn = measured.resampled[:, 1 + draws :].unflatten(1, (-1, 3)) if sets else None
    for how in ("random", "greedy"):
        rows = [row for row, one in enumerate(hows) if one == how]
        if drawn is None or not rows:
            continue
        gaps = (drawn[:, rows, 0] - drawn[:, rows, 1]).abs().mean(1)
        beside = (drawn[:, rows, 2] - drawn[:, rows, 1]).abs().mean(1)
        gap = sum(found[row].gap for row in rows) / len(rows)
        control = sum(abs(found[row].random - found[row].model) for row in rows) / len(rows)
        ends = measured.interval_over(control, beside)
        effects.append(
            Effect(
                f"incompleteness, {how} nodes taken out", gap, measured.n,
                measured.interval_over(gap, gaps),
                (Control("a random circuit of the same size", control, ends, measured.n),),
                choices.ablation, UNITS, choices=choices,
            )
        )  # fmt: skip
    return Completeness(tuple(effects), tuple(found))


def minimality(
    run: RunCircuits,
    graph: EdgeGraph,
    mask: Tensor,
    *,
    choices: Choices,
    max_edges: int = 48,
    seed: int = 0,
) -> Minimality:
    """What f loses without each edge, and without each node, of the circuit; and the share that is idle (below 1 %).

    Of more than `max_edges` edges a random sample is tried. The control is the same of a random circuit of its size.

    Args:
        run: From masks to the metric of the pairs (`circuit_runner`).
        graph: The graph whose edges the circuit has.
        mask: The circuit, bool, of the graph's shape.
        choices: The six choices that the effects depend on.
        max_edges: Edges at most that are taken out one by one.
        seed: Of what is drawn at random.
    """
    generator = torch.Generator().manual_seed(seed)
    random = random_circuits(graph, int(mask.sum()), 1, seed=seed + 1)[0]
    edges, others = (_sample(one, max_edges, generator) for one in (mask, random))
    nodes = inner_nodes(graph, mask)
    masks = torch.cat(
        [
            torch.stack([mask, random]),
            _without_edges(mask, edges),
            _without_edges(random, others),
            _out(graph, mask[None], [(node,) for node in nodes]),
        ]
    )
    measured = measure(run(masks))
    split = [2, 2 + len(edges), 2 + len(edges) + len(others), len(masks)]
    ours, theirs, of_nodes = (slice(a, b) for a, b in itertools.pairwise(split))
    names = [_edge_name(graph, int(edge)) for edge in edges]
    by_edge = _falls(measured, 0, ours, names)
    by_node = _falls(measured, 0, of_nodes, [graph.sources[node] for node in nodes])
    by_other = _falls(measured, 1, theirs, [""] * len(others))
    idle, control = (sum(abs(one.fall) < _IDLE for one in rows) / len(rows) for rows in (by_edge, by_other))
    resampled = [
        ((measured.resampled[:, [base]] - measured.resampled[:, block]).abs() < _IDLE).double().mean(1)
        for base, block in ((0, ours), (1, theirs))
    ]
    effect = Effect(
        f"idle edges ({len(edges)} of {int(mask.sum())} tried)", idle, measured.n, middle(resampled[0]),
        (Control("a random circuit of the same size", control, middle(resampled[1]), len(others)),),
        choices.ablation, "share of edges without which f moves by less than 0.01", choices=choices,
    )  # fmt: skip
    return Minimality((effect,), tuple(by_edge), tuple(by_node))


def circuit_self_repair(
    run: RunCircuits,
    graph: EdgeGraph,
    mask: Tensor,
    *,
    choices: Choices,
    max_nodes: int = 16,
    seed: int = 0,
) -> CircuitSelfRepair | None:
    """How much more the model needs its other nodes once the most needed one is gone (McGrath et al. 2023).

    Heads of the circuit (all its nodes, where it has fewer than three) are knocked out of the whole model one by one,
    and again without the one that costs most. The growth of what a node costs is what it makes up for. The control
    knocks out the node that costs least instead. None where fewer than three nodes can be tried. (`self_repair` of
    patching is another quantity: how much less a head costs than it writes.)
    """
    nodes = inner_nodes(graph, mask)
    heads = [node for node in nodes if "H" in graph.sources[node]]
    nodes = heads if len(heads) >= 3 else nodes
    generator = torch.Generator().manual_seed(seed)
    if len(nodes) > max_nodes:
        nodes = sorted(nodes[i] for i in torch.randperm(len(nodes), generator=generator)[:max_nodes].tolist())
    if len(nodes) < 3:
        return None
    whole = graph.full()[None]
    alone = measure(run(torch.cat([whole, _out(graph, whole, [(node,) for node in nodes])])))
    cost = alone.ratio[0] - alone.ratio[1:]
    first, idle = int(cost.argmax()), int(cost.abs().argmin())
    rest = [i for i in range(len(nodes)) if i not in (first, idle)]
    sets = [(nodes[gone], nodes[i]) for gone in (first, idle) for i in rest]
    after = measure(run(_out(graph, whole, [(nodes[first],), (nodes[idle],), *sets])))
    m = len(rest)

    def growth(base: Tensor, single: Tensor, pair: Tensor) -> Tensor:
        """(f(M∖k) - f(M∖k∖v)) - (f(M) - f(M∖v)), of [..., m]."""
        return (pair[..., :1] - pair[..., 1:]) - (base[..., :1] - single)

    singles = [1 + i for i in rest]
    results = []
    for place in range(2):
        columns = [place, *range(2 + place * m, 2 + (place + 1) * m)]
        mean = growth(alone.ratio[:1], alone.ratio[singles], after.ratio[columns])
        drawn = growth(alone.resampled[:, :1], alone.resampled[:, singles], after.resampled[:, columns])
        results.append((mean, drawn))
    (mean, drawn), (idle_mean, idle_drawn) = results
    rows = [
        Removal(graph.sources[nodes[i]], float(mean[j]), *alone.interval_over(float(mean[j]), drawn[:, j]))
        for j, i in enumerate(rest)
    ]
    name = graph.sources[nodes[first]]
    effect = Effect(
        f"self-repair after {name} is knocked out", float(mean.mean()), alone.n,
        alone.interval_over(float(mean.mean()), drawn.mean(1)),
        (
            Control(
                f"after {graph.sources[nodes[idle]]} is knocked out, which costs least",
                float(idle_mean.mean()), alone.interval_over(float(idle_mean.mean()), idle_drawn.mean(1)), alone.n,
            ),
        ),
        choices.ablation, f"mean growth of what each of {m} other nodes costs", choices=choices,
    )  # fmt: skip
    return CircuitSelfRepair((effect,), name, tuple(sorted(rows, key=lambda row: -row.fall)))


def _sample(mask: Tensor, size: int, generator: torch.Generator) -> Tensor:
    edges = mask.flatten().nonzero().flatten()
    if len(edges) <= size:
        return edges
    return edges[torch.randperm(len(edges), generator=generator)[:size]].sort().values


def _without_edges(mask: Tensor, edges: Tensor) -> Tensor:
    """The mask without each of the edges (places in the flat mask), [E, ...]."""
    masks = mask.flatten().repeat(len(edges), 1)
    masks[torch.arange(len(edges)), edges] = False
    return masks.view(len(edges), *mask.shape)


def _edge_name(graph: EdgeGraph, place: int) -> str:
    f, g = divmod(place % (graph.n_sources * graph.n_destinations), graph.n_destinations)
    name = f"{graph.sources[f]}->{graph.destinations[g]}"
    if graph.columns is None:
        return name
    return f"{name} at {graph.columns[place // (graph.n_sources * graph.n_destinations)]}"


def _falls(measured: MeasuredCircuits, base: int, block: slice, names: list[str]) -> list[Removal]:
    falls = (measured.ratio[base] - measured.ratio[block]).tolist()
    # the fall is f itself, of the difference of the two metrics
    lost = measured.values[base] - measured.values[block] + measured.corrupt
    return [Removal(name, fall, *measured.interval_of(one)) for name, fall, one in zip(names, falls, lost, strict=True)]
