"""What a scorer of edges returns, and what a scorer is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from torch import Tensor

from cutaway.causal.edge_graph import EdgeGraph
from cutaway.causal.metrics import Metric, PatchDirection
from cutaway.data.pairs import AlignedPairs
from cutaway.draw.circuit import CircuitEdge, circuit_svg
from cutaway.draw.result import Result
from cutaway.model.language_model import LanguageModel


@dataclass(frozen=True, eq=False, repr=False)
class EdgeScores(Result):
    """A score for every edge, in units of the metric."""

    graph: EdgeGraph
    """The graph whose edges are scored: F sources, G destinations, and P columns where it tells positions apart."""
    values: Tensor
    """The mean over n pairs, float [F, G] (or [P, F, G]); 0 where there is no edge."""
    per_pair: Tensor | None
    """Each pair's [n, ...], where it was kept."""
    method: str
    """How they were made: "eap", "relp", ..."""
    metric: str
    """What was asked of the logits."""
    direction: PatchDirection
    """"noise": what the corrupt prompt's source does to the clean run; "denoise": the clean prompt's to the corrupt."""
    n: int
    """Pairs that were averaged."""
    clean: Tensor
    """The metric of the untouched run of the clean prompts [n]."""
    corrupt: Tensor
    """The same of the corrupt prompts [n]."""

    title = "Scores of edges"

    def strongest(self, k: int = 10) -> list[tuple[str, float]]:
        """The k edges with the largest |score|, and their scores (positions summed).

        Args:
            k: How many edges at most.
        """
        flat = self.values if self.values.ndim == 2 else self.values.sum(0)
        order = flat.abs().flatten().topk(min(k, self.graph.n_edges)).indices.tolist()
        width = flat.shape[1]
        names = [f"{self.graph.sources[i // width]}->{self.graph.destinations[i % width]}" for i in order]
        return [(name, float(flat.flatten()[i])) for name, i in zip(names, order, strict=True)]

    def summary(self) -> str:
        lines = [
            f"{self.method} scores of {self.graph.n_edges:,} edges, {self.metric.replace('_', ' ')}, n {self.n}: clean "
            f"{self.clean.mean():.3f}, corrupt {self.corrupt.mean():.3f}"
        ]
        return "\n".join([*lines, *(f"  {value:+9.4f}  {name}" for name, value in self.strongest())])

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "metric": self.metric,
            "direction": self.direction,
            "n": self.n,
            "clean": self.clean.tolist(),
            "corrupt": self.corrupt.tolist(),
            "edges": self.rows(),
        }

    def rows(self) -> list[dict[str, Any]]:
        """An edge (and column) per row."""
        graph, columns = self.graph, self.graph.columns
        places = graph.real.expand(graph.shape).nonzero().tolist()
        scores = self.values[graph.real.expand(graph.shape)].tolist()
        return [
            {
                "from": graph.sources[f], "to": graph.destinations[g], "at": columns[at[0]] if columns else None,
                "score": score,
            }
            for (*at, f, g), score in zip(places, scores, strict=True)
        ]  # fmt: skip

    def drawing(self) -> Markup:
        """The strongest edges as a circuit."""
        group = self.graph.n_heads // self.graph.kv
        edges: list[CircuitEdge] = [
            {"source": source, "destination": destination, "score": score, "group": group}
            for (source, destination), score in ((name.split("->"), score) for name, score in self.strongest(40))
        ]
        return circuit_svg(
            edges=edges, title=f"The {len(edges)} strongest edges by {self.method}",
            units=self.metric.replace("_", " "), parallel=self.graph.parallel,
        )  # fmt: skip


Scorer = Callable[[LanguageModel, AlignedPairs, str | Metric], EdgeScores]
