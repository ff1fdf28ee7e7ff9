"""Ends of paths by name: which parts of a model write, which inputs are read, and at which tokens."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.causal.edge_graph import EdgeGraph
from cutaway.data.pairs import AlignedPairs

Name = str | Sequence[str]
"""One end of a path: a node ("L3H7"), a node at one role or position ("L3H7@subject", "L3H7@-1"), or several."""

_NODE = re.compile(r"L(\d+)(?:([HK])(\d+))?(?:\.(\w+))?$")


@dataclass(frozen=True)
class Node:
    """One node of the graph, at all positions or at one role of the pairs.

    `index` is its place among the graph's sources or destinations; `part` is "embed", "head", "mlp", "q", "k", "v" or
    "logits". `layer` of the logits is the number of layers, `head` is -1 where there is none.
    """

    name: str
    index: int
    part: str
    layer: int
    head: int
    role: str | None

    @property
    def kind(self) -> str:
        """What a control must share: the part, and the positions."""
        return self.part if self.role is None else f"{self.part}@{self.role}"

    @property
    def site(self) -> str:
        """The site that is set: of a sender what it writes, of a receiver what it reads."""
        sites = {"embed": "blocks.0.resid_pre", "head": "attn.z", "mlp": "mlp.out", "logits": "logits"}
        found = sites.get(self.part, f"attn.{self.part}")
        return found if self.part in ("embed", "logits") else f"blocks.{self.layer}.{found}"

    @property
    def reads(self) -> str:
        """The site of a receiver's input."""
        return f"blocks.{self.layer}.mlp.in" if self.part == "mlp" else self.site

    def positions(self, pairs: AlignedPairs, side: int) -> list[list[int]] | None:
        """The node's position in each clean (0) or corrupt (1) prompt; None for all of them."""
        if self.role is None:
            return None
        if self.role in pairs.places:
            return [[p] for p in pairs.places[self.role][side].tolist()]
        lengths = (pairs.clean, pairs.corrupt)[side].lengths.tolist()
        at = int(self.role)
        if not all(-length <= at < length for length in lengths):
            raise CutawayError(f"'{self.name}' names position {at}, but some prompts have {min(lengths)} tokens")
        return [[at % length] for length in lengths]


Nodes = tuple[Node, ...]


def end_name(nodes: Sequence[Node]) -> str:
    """How one end of a path is called."""
    return " + ".join(node.name for node in nodes)


def parse(graph: EdgeGraph, given: Name, pairs: AlignedPairs, *, sender: bool) -> tuple[Node, ...]:
    """One end of a path from its name or names. Raises `CutawayError` for what the model or the pairs do not have."""
    if not isinstance(given, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise CutawayError(f"{given!r} is no node; name one, such as 'L3H7', or a list of names")
    names = [given] if isinstance(given, str) else list(given)
    if not names:
        raise CutawayError(f"an empty list is no {'sender' if sender else 'receiver'}; name a node such as 'L3H7'")
    nodes = [_node(graph, name, pairs, sender) for name in names]
    if len({node.name for node in nodes}) < len(nodes):
        raise CutawayError(f"'{end_name(nodes)}' names a node twice")
    if not sender and len(nodes) > 1 and any(node.part == "logits" for node in nodes):
        raise CutawayError("the logits are a receiver by themselves; ask for the other receivers apart")
    return tuple(nodes)


def _node(graph: EdgeGraph, name: str, pairs: AlignedPairs, sender: bool) -> Node:
    plain, _, role = name.partition("@")
    if role and role not in pairs.places and not re.fullmatch(r"-?\d+", role):
        raise CutawayError(
            f"'{name}' names the position {role!r}; the pairs name {', '.join(pairs.places)}, or give a number"
        )
    if not sender and role and plain == "logits":
        raise CutawayError("the logits are read at each prompt's last token; name no position for them")
    grouped = graph.kv < graph.n_heads and not sender and re.fullmatch(r"L\d+H(\d+)\.[kv]", plain)
    if grouped:
        group = graph.n_heads // graph.kv
        key = int(grouped[1]) // group
        raise CutawayError(
            f"heads {key * group} to {key * group + group - 1} share their keys and values, so '{plain}' has no input "
            f"of its own; take '{plain.split('H')[0]}K{key}.{plain[-1]}'"
        )
    index = graph.source(plain) if sender else graph.destination(plain)
    return _named(name, plain, index, role or None, graph)


def _named(name: str, plain: str, index: int, role: str | None, graph: EdgeGraph) -> Node:
    match = _NODE.match(plain)
    if match is None:  # the two that have no layer
        return Node(name, index, plain, 0 if plain == "embed" else graph.n_layers, -1, role)
    layer, _, head, part = match.groups()
    return Node(name, index, part or "head", int(layer), -1 if head is None else int(head), role)


def earlier(graph: EdgeGraph, senders: Sequence[Node], receivers: Sequence[Node]) -> bool:
    """Whether every sender can write to what every receiver reads."""
    return all(bool(graph.real[s.index, r.index]) for s in senders for r in receivers)


def sources(graph: EdgeGraph, role: str | None = None) -> list[Node]:
    """Every source, at all positions or at one role."""
    names = [plain if role is None else f"{plain}@{role}" for plain in graph.sources]
    return [
        _named(name, plain, index, role, graph)
        for index, (name, plain) in enumerate(zip(names, graph.sources, strict=True))
    ]


def signature(nodes: Nodes) -> tuple[str, ...]:
    """The kinds of a set of nodes, which a control shares."""
    return tuple(sorted(node.kind for node in nodes))


def random_others(
    graph: EdgeGraph, sending: Sequence[Nodes], receiving: Sequence[Nodes], real: Tensor, draws: int, seed: int
) -> tuple[list[Nodes], dict[tuple[tuple[str, ...], int], list[int]]]:
    """The senders, then the random ones that are not among them; and which of all are drawn for each signature and
    receiver.

    A random sender has nodes of the same kinds, all of them before the receiver (of any kind, where there is no second
    one of a kind). For one signature and one receiver they are drawn once, one more than asked for, so that a sender
    that is among them itself has enough others.
    """
    generator = np.random.default_rng(seed)
    chosen = list(sending)
    places = {frozenset(nodes): i for i, nodes in enumerate(chosen)}
    drawn: dict[tuple[tuple[str, ...], int], list[int]] = {}
    for j, receiver in enumerate(receiving):
        signatures = {signature(nodes): nodes for i, nodes in enumerate(sending) if real[i, j]}
        for kinds, like in signatures.items() if draws > 0 else ():
            pools = [_pool(graph, node, receiver) for node in like]
            found: dict[frozenset[Node], None] = {}
            for _ in range(20 * (draws + 1)):
                nodes = frozenset(pool[int(generator.integers(len(pool)))] for pool in pools)
                if len(nodes) == len(like):
                    found[nodes] = None
                if len(found) == draws + 1:
                    break
            for nodes in found:
                if nodes not in places:
                    places[nodes] = len(chosen)
                    chosen.append(tuple(sorted(nodes, key=lambda node: node.index)))
                drawn.setdefault((kinds, j), []).append(places[nodes])
    return chosen, drawn


def _pool(graph: EdgeGraph, like: Node, receiver: Nodes) -> list[Node]:
    """What may stand for a sender's node before a receiver: nodes of its kind, or any where it is the only one."""
    before = [node for node in sources(graph, like.role) if earlier(graph, (node,), receiver)]
    return alike if len(alike := [node for node in before if node.kind == like.kind]) > 1 else before
