"""A toy whose nodes are numbers: what every circuit of it gives can be computed one edge at a time, in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cutaway.causal.edge_graph import EdgeGraph


@dataclass(frozen=True)
class ToyRuns:
    values: Tensor
    clean: Tensor
    corrupt: Tensor


@dataclass(frozen=True)
class Toy:
    """Source f is tanh(what its destinations read), destination g reads sum of W[f, g] · f; the metric is the logits.

    The embedding is one number a pair: `clean` [n], `corrupt` [n].
    """

    graph: EdgeGraph
    weights: Tensor
    clean: Tensor
    corrupt: Tensor

    @classmethod
    def random(cls, graph: EdgeGraph, n: int = 12, seed: int = 0) -> "Toy":
        generator = torch.Generator().manual_seed(seed)
        weights = torch.randn(graph.shape, generator=generator, dtype=torch.float64) * 0.5
        clean = 1 + torch.rand(n, generator=generator, dtype=torch.float64)
        return cls(graph, weights * graph.real, clean, -clean + 0.2)

    def sources(self, x: Tensor, mask: Tensor, ablated: Tensor) -> Tensor:
        """The value of every source [F, n], and last the logits; edges outside the mask carry `ablated` [F, n]."""
        graph = self.graph
        values = [x]

        def read(g: int) -> Tensor:
            total = torch.zeros_like(x)
            for f in graph.real[:, g].nonzero().flatten().tolist():
                total = total + self.weights[f, g] * (values[f] if mask[f, g] else ablated[f])
            return total

        for f in range(1, graph.n_sources):
            inputs = [read(g) for g in graph.owns[f].nonzero().flatten().tolist()]
            values.append(torch.tanh(torch.stack(inputs).sum(0)))
        return torch.stack([*values, read(graph.n_destinations - 1)])

    def one(self, mask: Tensor) -> Tensor:
        """The metric of every pair [n] under one circuit."""
        nothing = torch.zeros(self.graph.n_sources, len(self.clean), dtype=torch.float64)
        ablated = self.sources(self.corrupt, self.graph.full(), nothing)
        return self.sources(self.clean, mask, ablated)[-1]

    def __call__(self, masks: Tensor) -> ToyRuns:
        return ToyRuns(
            torch.stack([self.one(mask) for mask in masks]), self.one(self.graph.full()), self.one(self.graph.empty())
        )

    def f(self, mask: Tensor) -> float:
        """Ratio of means, straight from the definition."""
        whole, nothing = self.one(self.graph.full()).mean(), self.one(self.graph.empty()).mean()
        return float((self.one(mask).mean() - nothing) / (whole - nothing))
