"""The edge graph of a model's parts: sources that write to the stream × destinations that read from it.

A source is the embedding, one head's result or an MLP's output; a destination is the query, key or value input of a
head, an MLP's input or the logits. An edge is what one destination reads of one source, directly through the stream.
Scores and masks of all edges are matrices [F, G] of sources × destinations, or [P, F, G] where positions are kept
apart; scorers, selection, evaluation and drawing share them.
"""

from __future__ import annotations

import difflib
import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError, NotSupported

if TYPE_CHECKING:
    from cutaway.model.language_model import LanguageModel

Edge = tuple[str, str]


@dataclass(frozen=True)
class EdgeGraph:
    """Sources × destinations of a model.

    Sources are called `embed`, `L3H7`, `L3.mlp`; destinations `L3H7.q`, `L3H7.k`, `L3H7.v` (`L3K1.k`, `L3K1.v` where
    grouped), `L3.mlp`, `logits`; an edge `L2H4->L3H7.q`. It is a graph of parts of the model; a graph of latents and
    tokens of one prompt is another (an attribution graph).

    Example:
        >>> graph = EdgeGraph.of(cutaway.load("atlas"))
        >>> graph.edge("embed->L0H1.q"), len(graph.sources)
        ((0, 1), 73)
    """

    n_layers: int
    """Layers of the model."""
    n_heads: int
    """Heads of a layer."""
    parallel: bool = False
    """Whether attention and MLP of a layer read the same stream, so that no head feeds its own layer's MLP."""
    n_kv_heads: int | None = None
    """Key and value destinations of a layer; None: as many as heads. Fewer where grouped heads are one destination."""
    columns: tuple[str, ...] | None = None
    """Names of positions that are kept apart; None: an edge is one at all positions."""

    @classmethod
    def of(cls, lm: LanguageModel, *, grouped: bool = False, columns: Sequence[str] | None = None) -> EdgeGraph:
        """The graph of a model.

        Args:
            lm: The model.
            grouped: Whether the keys (values) that a group of heads share are one destination.
            columns: Names of positions that are kept apart.

        Raises:
            NotSupported: Attention's queries, keys and values are not read from the stream one by one.
        """
        for index, layer in enumerate(lm.family.layers):
            for part in "qkv":
                projection = layer.projection(part)
                if projection is None or not projection.direct:
                    raise NotSupported(
                        f"{lm.name} has no {part} projection that reads the stream in layer {index} (latent "
                        "attention), so its heads' inputs cannot be kept apart; patch whole sites instead."
                    )
        kv = lm.n_kv_heads if grouped else lm.n_heads
        if kv == lm.n_heads != lm.n_kv_heads and (reason := _cannot_ungroup(lm)):
            raise NotSupported(
                f"{lm.name} shares keys and values between heads and {reason}; take EdgeGraph.of(lm, grouped=True), "
                "where each shared key (value) head is one destination."
            )
        return cls(lm.n_layers, lm.n_heads, lm.family.parallel, kv, None if columns is None else tuple(columns))

    @property
    def kv(self) -> int:
        """Key (value) destinations of a layer."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def n_sources(self) -> int:
        """F: the embedding, every head, every MLP."""
        return 1 + self.n_layers * (self.n_heads + 1)

    @property
    def width(self) -> int:
        """Destinations of one layer: queries, keys, values, MLP."""
        return self.n_heads + 2 * self.kv + 1

    @property
    def n_destinations(self) -> int:
        """G: queries, keys and values of every head, every MLP, the logits."""
        return self.n_layers * self.width + 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a score or mask matrix: (F, G), or (P, F, G) with positions."""
        size = (self.n_sources, self.n_destinations)
        return size if self.columns is None else (len(self.columns), *size)

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Names of the F sources, in order of depth."""
        names = ["embed"]
        for layer in range(self.n_layers):
            names += [f"L{layer}H{head}" for head in range(self.n_heads)] + [f"L{layer}.mlp"]
        return tuple(names)

    @cached_property
    def destinations(self) -> tuple[str, ...]:
        """Names of the G destinations, in order of depth."""
        names: list[str] = []
        letter = "H" if self.kv == self.n_heads else "K"
        for layer in range(self.n_layers):
            names += [f"L{layer}H{head}.q" for head in range(self.n_heads)]
            names += [f"L{layer}{letter}{head}.{part}" for part in "kv" for head in range(self.kv)]
            names.append(f"L{layer}.mlp")
        return (*names, "logits")

    def head_sources(self, layer: int) -> slice:
        """The heads of a layer among the sources; its MLP follows.

        Args:
            layer: The layer, from 0.
        """
        first = 1 + layer * (self.n_heads + 1)
        return slice(first, first + self.n_heads)

    def mlp_source(self, layer: int) -> int:
        """The MLP of a layer among the sources.

        Args:
            layer: The layer, from 0.
        """
        return self.head_sources(layer).stop

    def attention_destinations(self, layer: int) -> slice:
        """Queries, keys and values of a layer among the destinations; its MLP follows.

        Args:
            layer: The layer, from 0.
        """
        first = layer * self.width
        return slice(first, first + self.width - 1)

    def mlp_destination(self, layer: int) -> int:
        """The MLP of a layer among the destinations.

        Args:
            layer: The layer, from 0.
        """
        return self.attention_destinations(layer).stop

    def before_attention(self, layer: int) -> int:
        """How many sources a layer's attention can read: they are the first so many.

        Args:
            layer: The layer, from 0.
        """
        return 1 + layer * (self.n_heads + 1)

    def before_mlp(self, layer: int) -> int:
        """How many sources a layer's MLP can read.

        Args:
            layer: The layer, from 0.
        """
        return self.before_attention(layer) + (0 if self.parallel else self.n_heads)

    @cached_property
    def real(self) -> Tensor:
        """Which of the pairs are edges, bool [F, G]."""
        real = torch.zeros(self.n_sources, self.n_destinations, dtype=torch.bool)
        for layer in range(self.n_layers):
            real[: self.before_attention(layer), self.attention_destinations(layer)] = True
            real[: self.before_mlp(layer), self.mlp_destination(layer)] = True
        real[:, -1] = True
        return real

    @property
    def n_edges(self) -> int:
        """Edges of the graph; where positions are kept apart, an edge counts once per column."""
        return int(self.real.sum()) * (1 if self.columns is None else len(self.columns))

    @cached_property
    def owns(self) -> Tensor:
        """Which source computes from which destination, bool [F, G]; nobody owns the logits."""
        owns = torch.zeros(self.n_sources, self.n_destinations, dtype=torch.bool)
        group = self.n_heads // self.kv
        for layer in range(self.n_layers):
            heads, first = self.head_sources(layer).start, self.attention_destinations(layer).start
            for head in range(self.n_heads):
                owns[heads + head, first + head] = True
                for part in range(2):
                    owns[heads + head, first + self.n_heads + part * self.kv + head // group] = True
            owns[self.mlp_source(layer), self.mlp_destination(layer)] = True
        return owns

    def full(self) -> Tensor:
        """The mask of every edge."""
        return self.real.expand(self.shape).clone()

    def empty(self) -> Tensor:
        """The mask of no edge."""
        return torch.zeros(self.shape, dtype=torch.bool)

    def check(self, mask: Tensor) -> Tensor:
        """The mask itself; CutawayError where it has another shape or holds what is no edge.

        Args:
            mask: Edges, bool [..., F, G] (or [..., P, F, G]).
        """
        if tuple(mask.shape[-len(self.shape) :]) != self.shape:
            raise CutawayError(f"A mask of this graph has the shape {list(self.shape)}; got {list(mask.shape)}.")
        if bool((mask.bool() & ~self.real).any()):
            f, g = (mask.bool() & ~self.real).nonzero()[0, -2:].tolist()
            raise CutawayError(f"{self.sources[f]}->{self.destinations[g]} is no edge: the source comes later.")
        return mask

    # names

    def source(self, name: str) -> int:
        """The row of a source; CutawayError with the nearest names where there is none.

        Args:
            name: Such as "embed", "L3H7" or "L3.mlp".
        """
        return self._find(name, self.sources, "source")

    def destination(self, name: str) -> int:
        """The column of a destination.

        Args:
            name: Such as "L3H7.q", "L3.mlp" or "logits"; CutawayError with the nearest names where there is none.
        """
        return self._find(name, self.destinations, "destination")

    def edge(self, name: str | Edge) -> tuple[int, int]:
        """Row and column of an edge such as "L2H4->L3H7.q"; CutawayError where it is none.

        Args:
            name: The edge as one text, or its source and destination.
        """
        ends = tuple(part.strip() for part in name.split("->")) if isinstance(name, str) else name
        if len(ends) != 2:
            raise CutawayError(f"An edge is written like 'embed->L0H1.q'; got {name!r}.")
        f, g = self.source(ends[0]), self.destination(ends[1])
        if not bool(self.real[f, g]):
            raise CutawayError(f"{ends[0]}->{ends[1]} is no edge: the source does not come before the destination.")
        return f, g

    def mask_of(self, edges: Iterable[str | Edge]) -> Tensor:
        """The mask of these edges, at all positions.

        Args:
            edges: Names of edges, each one text or its source and destination.
        """
        mask = self.empty()
        for name in edges:
            f, g = self.edge(name)
            mask[..., f, g] = True
        return mask

    def edges_of(self, mask: Tensor) -> list[Edge]:
        """Names of a mask's edges (at any position), in order of destination, then source.

        Args:
            mask: Edges, bool, of the graph's shape.
        """
        flat = mask if self.columns is None else mask.any(0)
        return [(self.sources[f], self.destinations[g]) for g, f in flat.T.nonzero().tolist()]

    def _find(self, name: str, names: Sequence[str], what: str) -> int:
        if name in names:
            return names.index(name)
        close = difflib.get_close_matches(name, names, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"they run from {names[0]} to {names[-1]}."
        raise CutawayError(f"There is no {what} '{name}' in this graph; {hint}")

    # selection

    def top(self, scores: Tensor, n: int, *, by: Literal["absolute", "signed"] = "absolute") -> Tensor:
        """The mask of the n edges with the highest scores, not pruned.

        Args:
            scores: Of every edge, the graph's shape.
            n: How many edges.
            by: Whether |score| or the score itself ranks.
        """
        self._check_size(n)
        ranked = self._ranked(scores, by)
        mask = torch.zeros(ranked.numel(), dtype=torch.bool)
        mask[ranked.flatten().topk(n).indices] = True
        return mask.view(self.shape)

    def greedy(self, scores: Tensor, n: int, *, by: Literal["absolute", "signed"] = "absolute") -> Tensor:
        """The mask of n edges grown from the logits: always the best edge into a node that is already in.

        Every edge so chosen leads to the logits. Fewer than n where no edge is left.

        Args:
            scores: Of every edge, the graph's shape.
            n: How many edges.
            by: Whether |score| or the score itself ranks.
        """
        self._check_size(n)
        ranked = self._ranked(scores, by)
        flat = ranked if self.columns is not None else ranked[None]
        order = flat.argsort(dim=1, descending=True)  # [P, F, G]
        ordered, sources = flat.gather(1, order).tolist(), order.tolist()
        inputs = [row.nonzero().flatten().tolist() for row in self.owns]
        mask = torch.zeros(flat.shape, dtype=torch.bool)
        heap: list[tuple[float, int, int, int]] = []  # minus score, place in its column, position, destination

        def offer(position: int, place: int, destination: int) -> None:
            if place < self.n_sources and ordered[position][place][destination] > -torch.inf:
                heapq.heappush(heap, (-ordered[position][place][destination], place, position, destination))

        for position in range(len(flat)):
            offer(position, 0, self.n_destinations - 1)
        opened: set[int] = set()  # destinations, which are open at all positions at once or not at all
        left = n
        while heap and left:
            _, place, position, destination = heapq.heappop(heap)
            source = sources[position][place][destination]
            mask[position, source, destination] = True
            left -= 1
            offer(position, place + 1, destination)
            for opening in inputs[source]:
                if opening not in opened:
                    opened.add(opening)
                    for where in range(len(flat)):
                        offer(where, 0, opening)
        return mask.view(self.shape)

    def prune(self, mask: Tensor) -> Tensor:
        """The mask [..., F, G] without edges of nodes that lack an incoming or an outgoing edge, until none is left.

        Positions count as one here: a key at one position serves queries at others.

        Args:
            mask: Edges, bool [..., F, G] (or [..., P, F, G]).
        """
        kept = mask.bool() & self.real
        owns = self.owns.float()
        at_all = kept if self.columns is None else kept.any(-3)
        while True:
            has_out = at_all.any(-1)
            has_in = (at_all.any(-2).float() @ owns.T) > 0
            has_in[..., 0] = True
            node = has_out & has_in
            read = (node.float() @ owns) > 0
            read[..., -1] = True
            now = at_all & node[..., :, None] & read[..., None, :]
            if torch.equal(now, at_all):
                return kept & (now if self.columns is None else now.unsqueeze(-3))
            at_all = now

    def _ranked(self, scores: Tensor, by: str) -> Tensor:
        if tuple(scores.shape) != self.shape:
            raise CutawayError(f"Scores of this graph have the shape {list(self.shape)}; got {list(scores.shape)}.")
        if by not in ("absolute", "signed"):
            raise CutawayError(f"Edges are ranked by 'absolute' or 'signed' scores, not by {by!r}.")
        if not bool(torch.isfinite(scores[..., self.real]).all()):
            raise CutawayError("Some edges have scores that are NaN or infinite, so they cannot be ranked.")
        ranked = scores.abs() if by == "absolute" else scores
        return ranked.double().masked_fill(~self.real, -torch.inf)

    def _check_size(self, n: int) -> None:
        if not 0 < n <= self.n_edges:
            raise CutawayError(f"A circuit of this graph has 1 to {self.n_edges} edges; {n} were asked for.")


def _cannot_ungroup(lm: LanguageModel) -> str | None:
    """Why keys and values cannot be given to each query head by itself, or None."""
    for layer in lm.family.layers:
        if any(len(p.parts) != 1 for p in layer.projections if set(p.parts) & {"k", "v"}):
            return "computes them together with its queries in one matrix"
        if not isinstance(getattr(layer.core, "num_key_value_groups", None), int):
            return "its attention module does not say how they are shared"
    return None
