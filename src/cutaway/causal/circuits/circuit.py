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
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import BadFile, CutawayError
from cutaway.artifacts.files import read_json, refuse_replacing
from cutaway.artifacts.manifest import Manifest
from cutaway.artifacts.results import Choices
from cutaway.causal.accuracy import ABLE
from cutaway.causal.circuits.baselines import nodes_of
from cutaway.causal.circuits.evidence import Evidence, faithfulness_drawing, part_sections
from cutaway.causal.edge_graph import EdgeGraph
from cutaway.causal.effects import effect_line
from cutaway.draw.circuit import CircuitEdge, circuit_svg
from cutaway.draw.page import Section, sections_html
from cutaway.draw.panels import alarm_html, figures_html, fold, table_html
from cutaway.draw.result import Result
from cutaway.draw.text import interval

if TYPE_CHECKING:
    from cutaway.model.language_model import LanguageModel

_FORMAT, _SCHEMA = "cutaway circuit", 1
_LARGEST = 10**9  # heads squared; a file that asks for more would only fill the memory
_GRAPH = ("n_layers", "n_heads", "parallel", "n_kv_heads", "columns")


def refuse_no_circuit(path: Path) -> None:
    """Raise `CutawayError` where a circuit would replace a file that is none of ours."""
    refuse_replacing(path, "circuit", f'"format": "{_FORMAT}"')


@dataclass(frozen=True, eq=False, repr=False)
class Circuit(Result):
    """Some edges of a graph, how they were found, and what was measured of them.

    Example:
        >>> circuit = Circuit.load("ioi.json")  # doctest: +SKIP
        >>> circuit.edges[0]  # doctest: +SKIP
    """

    graph: EdgeGraph
    """All edges of the model."""
    mask: Tensor
    """Which of them are in the circuit, bool [F, G] (or [P, F, G] where the graph tells positions apart)."""
    scores: Tensor
    """Signed importance, float32 of the same shape, in units of the metric: by how much the metric moves away from the
    ablated model's when the edge stays. Above 0 the edge helps; 0 outside the circuit."""
    task: str
    """The task's name, or "own pairs"."""
    metric: str
    """What was asked of the logits."""
    choices: Choices
    """The six choices that the effects depend on."""
    manifest: Manifest
    """Model with the hash of its weights, hash of the pairs, settings, version, command."""
    method: Mapping[str, Any] = field(default_factory=dict)
    """How it was found (scorer, selection, size, pairs) in plain values."""
    evidence: Evidence | None = None
    """What was measured of it on held-out pairs."""

    title = "Circuit"

    @property
    def n_edges(self) -> int:
        """Edges of the circuit."""
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
        """Raise CutawayError unless this is the model that the circuit was found in.

        Args:
            lm: The model that the circuit is to be run in.
        """
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
        """The circuit's file; `from_json` reads it."""
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
            "format": _FORMAT,
            "schema": _SCHEMA,
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

    def save(self, path: Path | str) -> Path:
        """Write the circuit as what the path's suffix names: .json is the file that `load` reads.

        The file is whole or not there. Raises `BadFile` for another suffix, or where a file is there that is none of
        its kind.

        Args:
            path: Where to: .json for the file that `load` reads, .html, .svg, ...; folders are made.
        """
        if (path := Path(path)).suffix.lower() == ".json":
            refuse_no_circuit(path)
        return super().save(path)

    @classmethod
    def load(cls, path: Path | str) -> Circuit:
        """The circuit of a file; BadFile, in one sentence, for a file that is none or has a defect.

        Args:
            path: A .json file that `save` wrote.
        """
        data = read_json(Path(path))
        try:
            return cls.from_json(data)
        except CutawayError as error:
            raise BadFile(f"{path}: {error}") from error

    @classmethod
    def from_json(cls, data: Any) -> Circuit:
        """The circuit that `to_json` wrote, everything checked.

        Args:
            data: What the file holds, as `json.load` gives it.
        """
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise BadFile(f'it is not a circuit; one begins with "format": "{_FORMAT}".')
        if data.get("schema") != _SCHEMA:
            raise BadFile(
                f"it has the schema {data.get('schema')!r}, this version reads {_SCHEMA}: take a newer cutaway."
            )
        needed = ("manifest", "graph", "task", "metric", "choices", "edges")
        missing = [key for key in needed if key not in data]
        if missing:
            raise BadFile(f"it has no {missing[0]!r}; a circuit needs {', '.join(needed)}.")
        graph = _graph_from(data["graph"])
        mask, scores = _edges_from(graph, data["edges"])
        try:
            manifest = Manifest.from_json(data["manifest"])
            choices = Choices.from_json(data["choices"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BadFile("its manifest or its choices are damaged; write it again.") from error
        if not isinstance(data["task"], str) or not isinstance(data["metric"], str):
            raise BadFile("its task and its metric must be names.")
        try:
            evidence = None if data.get("evidence") is None else Evidence.from_json(data["evidence"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BadFile(
                f"its evidence is damaged ({type(error).__name__}: {error}); evaluate the circuit again."
            ) from error
        method = {} if data.get("method") is None else data["method"]
        if not isinstance(method, dict):
            raise BadFile("its method is not an object; leave it out, or write the file again.")
        if not isinstance(data.get("nodes", []), list):
            raise BadFile("its nodes are not a list; leave them out, or write the file again.")
        circuit = cls(graph, mask, scores, data["task"], data["metric"], choices, manifest, method, evidence)
        if "nodes" in data and data["nodes"] != circuit.nodes:
            stray = next((str(node) for node in data["nodes"] if node not in circuit.nodes), None)
            raise BadFile(
                f"its nodes are not those of its edges ({f'{stray} has no edge' if stray else 'some are not listed'}); "
                "leave the nodes out, or write the file again."
            )
        return circuit

    def rows(self) -> list[dict[str, Any]]:
        """An edge per row, the largest |score| first."""
        return [{"from": source, "to": destination, "score": score} for source, destination, score in self.edges]

    def drawing(self) -> Markup:
        return _circuit_drawing(self)

    def summary(self) -> str:
        lines = [self._head()]
        if self.evidence is not None:
            found = self.evidence.effects[:1]
            lines += [f"on {self.evidence.pairs}:", *map(effect_line, found)]
        left = "" if self.n_edges <= 8 else f", of {self.n_edges:,}"
        lines += [f"strongest edges{left} (above 0: the answer loses it when the edge is cut)"]
        return "\n".join(lines + self._strongest(8))

    def __str__(self) -> str:
        lines = [self._head()]
        if self.evidence is not None:
            lines += ["", f"on {self.evidence.pairs}:", *map(effect_line, self.evidence.effects)]
        lines += ["", "strongest edges (above 0: the answer loses it when the edge is cut)"]
        return "\n".join(lines + self._strongest(12))

    def _head(self) -> str:
        return (
            f"{self.task} in {self.manifest.model.name if self.manifest.model else 'a model'}: {self.n_edges:,} of "
            f"{self.graph.n_edges:,} edges ({100 * self.share:.2g} %), {len(self.nodes)} nodes; "
            f"{self.metric.replace('_', ' ')}, "
            f"{self.choices.ablation} ablation"
        )

    def _strongest(self, k: int) -> list[str]:
        return [f"  {score:+9.4f}  {source} -> {destination}" for source, destination, score in self.edges[:k]]


def _graph_from(data: Any) -> EdgeGraph:
    if not isinstance(data, dict) or any(key not in data for key in _GRAPH):
        raise BadFile(f"its graph is damaged; it needs {', '.join(_GRAPH)}.")
    layers, heads, parallel, kv, columns = (data[key] for key in _GRAPH)
    whole = [layers, heads, *([] if kv is None else [kv])]
    fits = all(isinstance(one, int) and not isinstance(one, bool) and one > 0 for one in whole)
    fits = fits and isinstance(parallel, bool) and (kv is None or heads % kv == 0)
    if columns is not None:
        fits = fits and isinstance(columns, list) and columns != [] and all(isinstance(name, str) for name in columns)
    if not fits:
        raise BadFile(
            "its graph is damaged: layers and heads are whole numbers, parallel is true or false, columns are names."
        )
    if layers * layers * heads * heads > _LARGEST:
        raise BadFile(f"its graph is damaged: no model has {layers} layers of {heads} heads.")
    graph = EdgeGraph(layers, heads, parallel, kv, None if columns is None else tuple(columns))
    if data.get("n_edges", graph.n_edges) != graph.n_edges:
        raise BadFile(f"its graph says it has {data['n_edges']} edges, but such a graph has {graph.n_edges}.")
    return graph


def _is_number(value: Any) -> bool:
    """Whether it is a finite number that float32 holds."""
    whole = isinstance(value, (int, float)) and not isinstance(value, bool)
    return whole and abs(value) <= torch.finfo(torch.float32).max


def _edges_from(graph: EdgeGraph, data: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(data, list):
        raise BadFile("its edges are not a list.")
    if not data:
        raise BadFile("the circuit is empty: it has no edges.")
    mask, scores = graph.empty(), torch.zeros(graph.shape)
    for number, edge in enumerate(data, 1):
        try:
            ends, score = (edge["from"], edge["to"]), edge.get("score", 0.0)
            at = edge.get("at")
        except (AttributeError, KeyError, TypeError):
            raise BadFile(f'edge {number} has not the form {{"from": ..., "to": ..., "score": ...}}.') from None
        if not (isinstance(ends[0], str) and isinstance(ends[1], str)):
            raise BadFile(f"edge {number} does not name its two ends by texts.")
        place: tuple[int, ...] = graph.edge(ends)
        if graph.columns is not None:
            if at not in graph.columns:
                raise BadFile(f"edge {number} is at {at!r}; the positions are {', '.join(graph.columns)}.")
            place = (graph.columns.index(at), *place)
        if not _is_number(score):
            written = repr(score)[:40]
            raise BadFile(f"edge {number} ({ends[0]}->{ends[1]}) has the score {written}, which is no number.")
        if bool(mask[place]):
            raise BadFile(f"edge {number} ({ends[0]}->{ends[1]}) is there twice.")
        mask[place], scores[place] = True, float(score)
    return mask, scores


def circuit_sections(circuit: Circuit) -> list[Section]:
    """The verdict, the drawing, f by size, what is missing, what is idle, stability, self-repair, and the choices."""
    sections = []
    evidence = circuit.evidence
    if evidence is not None:
        sections.append(_verdict(circuit, evidence))
    sections.append(_drawing(circuit))
    if evidence is not None:
        sections += part_sections(evidence)
    sections.append(_choices(circuit))
    sections.append(_edges(circuit))
    return sections


def _circuit_drawing(circuit: Circuit) -> Markup:
    """All sections as one drawing, the circuit itself first."""
    return sections_html(sorted(circuit_sections(circuit), key=lambda section: section[0] != "The circuit"))


def lead(circuit: Circuit) -> str:
    """What the page is about, in a sentence."""
    model = circuit.manifest.model.name if circuit.manifest.model else "a model"
    return (
        f"{model}, {circuit.task}: {circuit.n_edges:,} of {circuit.graph.n_edges:,} edges "
        f"({100 * circuit.share:.2g} %) between {len(circuit.nodes)} parts of the model and the logits."
    )


def _verdict(circuit: Circuit, evidence: Evidence) -> Section:
    found = evidence.faithfulness
    low, high = found.interval or (None, None)
    tiles = figures_html(
        items=[
            {"label": "faithfulness", "value": found.value, "detail": interval(found.value, low, high)},
            {"label": "edges", "value": circuit.n_edges, "detail": f"{100 * circuit.share:.2g} % of the graph's"},
            {"label": "pairs", "value": found.n, "detail": "held out"},
        ]
    )
    above = (
        "It lies above the intervals of random circuits and of the strongest edges."
        if evidence.above_controls()
        else "It does NOT lie above the intervals of all its controls: this is no evidence for the circuit."
    )
    text = (
        f"How much of the metric's fall (from the whole model to the model with every edge ablated) is kept when only "
        f"the circuit's edges carry the clean prompt: 1 is all of it. Measured on {evidence.pairs}. {above}"
    )
    drawing = Markup('<div style="margin-bottom: 1.5rem">{}</div>{}').format(tiles, faithfulness_drawing(evidence))
    able = circuit.method.get("task_accuracy")
    if able is not None and able["value"] < ABLE:
        cannot = f"The model cannot do the task: it is right on {able['right']} of {able['n']} pairs of the search. "
        drawing = alarm_html(f"{cannot}A circuit for what it does not do means nothing.") + drawing
    return ("Does the circuit do it?", text, drawing)


def _drawing(circuit: Circuit) -> Section:
    group = circuit.graph.n_heads // circuit.graph.kv
    edges: list[CircuitEdge] = [
        {"source": source, "destination": destination, "score": score, "group": group}
        for source, destination, score in circuit.edges
    ]
    drawing = circuit_svg(
        edges=edges, title=f"Circuit of {circuit.task}", units=circuit.metric.replace("_", " "),
        parallel=circuit.graph.parallel,
    )  # fmt: skip
    text = (
        "The embedding is below, the logits above; a head reads at q, k and v. The width of an edge grows with the "
        "square root of its score. Point at an edge for its score, at a node to see its edges alone."
    )
    return ("The circuit", text, drawing)


def _choices(circuit: Circuit) -> Section:
    rows = [[name, value] for name, value in circuit.choices.to_json().items()]
    rows += [[name.replace("_", " "), str(value)] for name, value in circuit.method.items() if name != "task_accuracy"]
    able = circuit.method.get("task_accuracy")
    if able:
        rows.append(["task accuracy", f"right on {able['right']} of {able['n']} search pairs"])
    rows.append(["metric", circuit.metric])
    table = table_html(columns=["", ""], rows=rows, title="Choices")
    return ("The choices made", "Two circuits that differ in one of these are not comparable.", table)


def _edges(circuit: Circuit) -> Section:
    rows = [[source, destination, score] for source, destination, score in circuit.edges]
    table = table_html(columns=["from", "to", "score"], rows=rows, title="Edges")
    drawing = fold(f"All {circuit.n_edges} edges", table)
    text = f"Scores are in {circuit.metric.replace('_', ' ')}; above 0 the answer loses it when the edge is cut."
    return ("Every edge", text, drawing)
