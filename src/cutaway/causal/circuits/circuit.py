"""A circuit: edges of one model's graph, how they were found, and what was measured of them. A JSON file.

    {"format": "cutaway circuit", "schema": 1, "manifest": {...}, "graph": {...}, "task": ..., "metric": ...,
     "choices": {...}, "method": {...}, "nodes": [...], "edges": [{"from": ..., "to": ..., "score": ...}, ...],
     "evidence": {...}}

The manifest names the model (with the hash of its weights), the pairs' hash, the settings, the version and the command.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.files import read_json, refuse_replacing, write_json
from cutaway.artifacts.manifest import Manifest
from cutaway.artifacts.results import Choices, interval_text
from cutaway.causal.circuits.baselines import nodes_of
from cutaway.causal.circuits.evidence import Evidence
from cutaway.causal.edge_graph import EdgeGraph

if TYPE_CHECKING:
    from cutaway.model.language_model import LanguageModel

FORMAT, SCHEMA = "cutaway circuit", 1
_LARGEST = 10**9  # heads squared; a file that asks for more would only fill the memory
_GRAPH = ("n_layers", "n_heads", "parallel", "n_kv_heads", "columns")


def refuse_no_circuit(path: Path) -> None:
    """Raise `CutawayError` where a circuit would replace a file that is none of ours."""
    refuse_replacing(path, "circuit", f'"format": "{FORMAT}"')


@dataclass(frozen=True, eq=False)
class Circuit:
    """Some edges of a graph.

    `mask` bool and `scores` float32 have the graph's shape; a score is by how much the metric moves away from the
    ablated model's when the edge stays: above 0 the edge helps. Only the circuit's own edges have one. `method` says
    how it was found (scorer, selection, size, pairs) in plain values.
    """

    graph: EdgeGraph
    mask: Tensor
    scores: Tensor
    task: str
    metric: str
    choices: Choices
    manifest: Manifest
    method: Mapping[str, Any] = field(default_factory=dict)
    evidence: Evidence | None = None

    @property
    def n_edges(self) -> int:
        return int(self.mask.sum())

    @property
    def share(self) -> float:
        """Of the graph's edges."""
        return self.n_edges / self.graph.n_edges

    @property
    def nodes(self) -> list[str]:
        """The sources that write into the circuit, in order of depth."""
        return [self.graph.sources[i] for i in nodes_of(self.graph, self.mask).nonzero().flatten().tolist()]

    @property
    def edges(self) -> list[tuple[str, str, float]]:
        """Source, destination and score of every edge, the largest |score| first (positions summed)."""
        mask, scores = self.mask, self.scores
        if self.graph.columns is not None:
            mask, scores = mask.any(0), (scores * mask).sum(0)
        found = [
            (self.graph.sources[f], self.graph.destinations[g], float(scores[f, g])) for f, g in mask.nonzero().tolist()
        ]
        return sorted(found, key=lambda edge: -abs(edge[2]))

    def check_model(self, lm: LanguageModel) -> None:
        """Raise CutawayError unless this is the model that the circuit was found in."""
        here = self.manifest.model
        there = lm.identity()
        if here is not None and here.weight_hash != there.weight_hash:
            raise CutawayError(
                f"This circuit was found in {here.id} (weights {here.weight_hash[:12]}), not in {there.id} (weights "
                f"{there.weight_hash[:12]}): edges of one model mean nothing in another, so find its own."
            )
        kv = self.graph.kv
        if (self.graph.n_layers, self.graph.n_heads) != (lm.n_layers, lm.n_heads) or kv not in (
            lm.n_heads,
            lm.n_kv_heads,
        ):
            raise CutawayError(
                f"This circuit's graph has {self.graph.n_layers} layers of {self.graph.n_heads} heads ({kv} for keys), "
                f"{lm.name} has {lm.n_layers} of {lm.n_heads} ({lm.n_kv_heads})."
            )

    def to_json(self) -> dict[str, Any]:
        edges = []
        columns = self.graph.columns
        places = self.mask.nonzero().tolist()
        for *at, f, g in sorted(places, key=lambda place: (place[-1], place)):
            edge: dict[str, Any] = {"from": self.graph.sources[f], "to": self.graph.destinations[g]}
            if columns is not None:
                edge["at"] = columns[at[0]]
            edges.append({**edge, "score": float(self.scores[(*at, f, g)])})
        graph = {key: getattr(self.graph, key) for key in _GRAPH}
        return {
            "format": FORMAT,
            "schema": SCHEMA,
            "manifest": self.manifest.to_json(),
            "graph": {**graph, "n_edges": self.graph.n_edges},
            "task": self.task,
            "metric": self.metric,
            "choices": self.choices.to_json(),
            "method": dict(self.method),
            "nodes": self.nodes,
            "edges": edges,
            "evidence": None if self.evidence is None else self.evidence.to_json(),
        }

    def save(self, path: Path | str) -> None:
        """Write the file, whole or not at all; `CutawayError` where a file is there that is no circuit."""
        refuse_no_circuit(Path(path))
        write_json(Path(path), self)

    @classmethod
    def load(cls, path: Path | str) -> Circuit:
        """The circuit of a file; CutawayError, in one sentence, for a file that is none or has a defect."""
        data = read_json(Path(path))
        try:
            return cls.from_json(data)
        except CutawayError as error:
            raise CutawayError(f"{path}: {error}") from error

    @classmethod
    def from_json(cls, data: Any) -> Circuit:
        """The circuit that `to_json` wrote, everything checked."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise CutawayError(f'it is not a circuit; one begins with "format": "{FORMAT}".')
        if data.get("schema") != SCHEMA:
            raise CutawayError(
                f"it has the schema {data.get('schema')!r}, this version reads {SCHEMA}: take a newer cutaway."
            )
        needed = ("manifest", "graph", "task", "metric", "choices", "edges")
        missing = [key for key in needed if key not in data]
        if missing:
            raise CutawayError(f"it has no {missing[0]!r}; a circuit needs {', '.join(needed)}.")
        graph = _graph_from(data["graph"])
        mask, scores = _edges_from(graph, data["edges"])
        try:
            manifest = Manifest.from_json(data["manifest"])
            choices = Choices.from_json(data["choices"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CutawayError("its manifest or its choices are damaged; write it again.") from error
        if not isinstance(data["task"], str) or not isinstance(data["metric"], str):
            raise CutawayError("its task and its metric must be names.")
        try:
            evidence = None if data.get("evidence") is None else Evidence.from_json(data["evidence"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CutawayError(
                f"its evidence is damaged ({type(error).__name__}: {error}); evaluate the circuit again."
            ) from error
        method = {} if data.get("method") is None else data["method"]
        if not isinstance(method, dict):
            raise CutawayError("its method is not an object; leave it out, or write the file again.")
        if not isinstance(data.get("nodes", []), list):
            raise CutawayError("its nodes are not a list; leave them out, or write the file again.")
        circuit = cls(graph, mask, scores, data["task"], data["metric"], choices, manifest, method, evidence)
        if "nodes" in data and data["nodes"] != circuit.nodes:
            stray = next((str(node) for node in data["nodes"] if node not in circuit.nodes), None)
            raise CutawayError(
                f"its nodes are not those of its edges ({f'{stray} has no edge' if stray else 'some are not listed'}); "
                "leave the nodes out, or write the file again."
            )
        return circuit

    def __str__(self) -> str:
        lines = [
            f"{self.task} in {self.manifest.model.id if self.manifest.model else 'a model'}: {self.n_edges:,} of "
            f"{self.graph.n_edges:,} edges ({100 * self.share:.2g} %), {len(self.nodes)} nodes; "
            f"{self.metric.replace('_', ' ')}, "
            f"{self.choices.ablation} ablation"
        ]
        if self.evidence is not None:
            lines += ["", f"on {self.evidence.pairs}:", *map(_line, self.evidence.effects)]
        lines += ["", "strongest edges (above 0: the answer loses it when the edge is cut)"]
        lines += [f"  {score:+9.4f}  {source} -> {destination}" for source, destination, score in self.edges[:12]]
        return "\n".join(lines)


def _line(effect: Any) -> str:
    controls = "; ".join(f"{c.name} {c.value:.2f}{_ends(c.interval)}" for c in effect.controls)
    return f"  {effect.name}: {effect.value:.3f}{_ends(effect.interval)}   beside {controls}"


def _ends(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" {interval_text(interval, 2)}"


def _graph_from(data: Any) -> EdgeGraph:
    if not isinstance(data, dict) or any(key not in data for key in _GRAPH):
        raise CutawayError(f"its graph is damaged; it needs {', '.join(_GRAPH)}.")
    layers, heads, parallel, kv, columns = (data[key] for key in _GRAPH)
    whole = [layers, heads, *([] if kv is None else [kv])]
    fits = all(isinstance(one, int) and not isinstance(one, bool) and one > 0 for one in whole)
    fits = fits and isinstance(parallel, bool) and (kv is None or heads % kv == 0)
    if columns is not None:
        fits = fits and isinstance(columns, list) and columns != [] and all(isinstance(name, str) for name in columns)
    if not fits:
        raise CutawayError(
            "its graph is damaged: layers and heads are whole numbers, parallel is true or false, columns are names."
        )
    if layers * layers * heads * heads > _LARGEST:
        raise CutawayError(f"its graph is damaged: no model has {layers} layers of {heads} heads.")
    graph = EdgeGraph(layers, heads, parallel, kv, None if columns is None else tuple(columns))
    if data.get("n_edges", graph.n_edges) != graph.n_edges:
        raise CutawayError(f"its graph says it has {data['n_edges']} edges, but such a graph has {graph.n_edges}.")
    return graph


def _is_number(value: Any) -> bool:
    """Whether it is a finite number that float32 holds."""
    whole = isinstance(value, (int, float)) and not isinstance(value, bool)
    return whole and abs(value) <= torch.finfo(torch.float32).max


def _edges_from(graph: EdgeGraph, data: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(data, list):
        raise CutawayError("its edges are not a list.")
    if not data:
        raise CutawayError("the circuit is empty: it has no edges.")
    mask, scores = graph.empty(), torch.zeros(graph.shape)
    for number, edge in enumerate(data, 1):
        try:
            ends, score = (edge["from"], edge["to"]), edge.get("score", 0.0)
            at = edge.get("at")
        except (AttributeError, KeyError, TypeError):
            raise CutawayError(f'edge {number} has not the form {{"from": ..., "to": ..., "score": ...}}.') from None
        if not (isinstance(ends[0], str) and isinstance(ends[1], str)):
            raise CutawayError(f"edge {number} does not name its two ends by texts.")
        place: tuple[int, ...] = graph.edge(ends)
        if graph.columns is not None:
            if at not in graph.columns:
                raise CutawayError(f"edge {number} is at {at!r}; the positions are {', '.join(graph.columns)}.")
            place = (graph.columns.index(at), *place)
        if not _is_number(score):
            told = repr(score)[:40]
            raise CutawayError(f"edge {number} ({ends[0]}->{ends[1]}) has the score {told}, which is no number.")
        if bool(mask[place]):
            raise CutawayError(f"edge {number} ({ends[0]}->{ends[1]}) is there twice.")
        mask[place], scores[place] = True, float(score)
    return mask, scores
