"""A circuit as a file: what is written is read back, and every defect is told in one sentence."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_graph import Toy

from cutaway.artifacts.command import recording
from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.manifest import Manifest, ModelIdentity
from cutaway.artifacts.results import Choices
from cutaway.causal.circuits.baselines import sized_circuit
from cutaway.causal.circuits.circuit import Circuit
from cutaway.causal.circuits.evidence import Evaluation, Ranking, gather_evidence
from cutaway.causal.edge_graph import EdgeGraph
from cutaway.model.language_model import LanguageModel

CHOICES = Choices("edge", "every edge", "resample", "all", "complement", "10 pairs of a toy")


def circuit_of(graph: EdgeGraph, mask: torch.Tensor, scores: torch.Tensor, **more: Any) -> Circuit:
    model = ModelIdentity("toy", None, "0" * 64)
    manifest = Manifest.create("circuit", model=model, configuration={"scorer": "by hand"}, seed=0, command="cutaway")
    return Circuit(graph, mask, scores * mask, "toy", "logit difference", CHOICES, manifest, {"scorer": "x"}, **more)


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    toy = Toy.random(EdgeGraph(2, 2), 10)
    scores = toy.weights.float()
    mask, asked = sized_circuit(toy.graph, scores, 15)
    per_pair = scores + 0.1 * torch.randn(10, *toy.graph.shape, generator=torch.Generator().manual_seed(0))
    with recording("cutaway circuit toy"):
        evidence = gather_evidence(
            toy, toy.graph, mask, choices=CHOICES, ranking=Ranking(scores=scores, per_pair=per_pair, asked=asked),
            magnitude=scores.abs(), search=0.9, evaluation=Evaluation(curve_draws=2),
        )  # fmt: skip
    return circuit_of(toy.graph, mask, scores, evidence=evidence)


def test_everything_is_measured_with_controls_and_choices(circuit: Circuit) -> None:
    assert circuit.evidence is not None
    names = [effect.name for effect in circuit.evidence.effects]
    for name in (
        "faithfulness", "faithfulness, mean over pairs", "CPR", "CMD", "overlap of resampled circuits with one another",
        "overlap of resampled circuits with the circuit", "faithfulness of the complement",
        "incompleteness, random", "incompleteness, greedy", "idle edges", "self-repair",
    ):  # fmt: skip
        assert any(found.startswith(name) for found in names), name
    for effect in circuit.evidence.effects:
        effect.require_controls()
        assert effect.choices == CHOICES
        assert effect.n == 10
        assert effect.command == "cutaway circuit toy"
        assert effect.interval is not None
    assert circuit.evidence.effect("CPR").name == "CPR"
    with pytest.raises(CutawayError, match="nothing called 'beauty' was measured"):
        circuit.evidence.effect("beauty")


def test_the_file_is_read_back(circuit: Circuit, tmp_path: Path) -> None:
    path = tmp_path / "circuit.json"
    circuit.save(path)
    again = Circuit.load(path)
    assert again.to_json() == circuit.to_json()
    assert torch.equal(again.mask, circuit.mask)
    assert torch.equal(again.scores, circuit.scores)
    assert again.graph == circuit.graph
    assert again.evidence == circuit.evidence
    assert again.manifest == circuit.manifest
    assert str(again) == str(circuit)
    assert list(tmp_path.iterdir()) == [path]


def test_a_circuit_with_positions_is_read_back(tmp_path: Path) -> None:
    graph = EdgeGraph(2, 2, columns=("subject", "other"))
    scores = torch.randn(graph.shape, generator=torch.Generator().manual_seed(0))
    mask, _ = sized_circuit(graph, scores, 20)
    found = circuit_of(graph, mask, scores)
    found.save(tmp_path / "c.json")
    again = Circuit.load(tmp_path / "c.json")
    assert torch.equal(again.mask, mask)
    assert torch.equal(again.scores, found.scores)
    assert len(again.edges) == int(mask.any(0).sum())


def test_nodes_and_edges_are_named(circuit: Circuit) -> None:
    edges = circuit.edges
    assert len(edges) == circuit.n_edges == int(circuit.mask.sum())
    assert [abs(score) for _, _, score in edges] == sorted((abs(score) for _, _, score in edges), reverse=True)
    assert circuit.nodes[0] == "embed"
    assert set(circuit.nodes) == {source for source, _, _ in edges}


def _without(key: str) -> Any:
    return lambda data: data.pop(key)


def _set(*path: Any) -> Any:
    def change(data: Any) -> None:
        for key in path[:-2]:
            data = data[key]
        data[path[-2]] = path[-1]

    return change


DEFECTS = {
    "not a circuit": (_set("format", "a cake"), "it is not a circuit"),
    "newer": (_set("schema", 2), "schema 2, this version reads 1"),
    "no edges key": (_without("edges"), "it has no 'edges'"),
    "empty": (_set("edges", []), "the circuit is empty"),
    "edges no list": (_set("edges", {}), "not a list"),
    "unknown node": (_set("edges", 0, "from", "L0H9"), "no source 'L0H9' in this graph; did you mean"),
    "unknown port": (_set("edges", 0, "to", "L0H1.z"), "no destination 'L0H1.z'"),
    "no edge": (_set("edges", 0, {"from": "L1.mlp", "to": "L0H1.q", "score": 1.0}), "is no edge"),
    "name no text": (_set("edges", 0, "from", 3), "edge 1 does not name its two ends"),
    "edge no object": (_set("edges", 0, "embed->logits"), "edge 1 has not the form"),
    "score no number": (_set("edges", 0, "score", "big"), "has the score 'big', which is no number"),
    "graph too small": (_set("graph", "n_layers", 0), "its graph is damaged"),
    "graph key": (lambda data: data["graph"].pop("n_heads"), "its graph is damaged"),
    "graph count": (_set("graph", "n_edges", 7), "7 edges, but such a graph has"),
    "manifest": (_set("manifest", "seed", 9), "was changed after it was written"),
    "manifest gone": (_set("manifest", None), "manifest"),
    "choices": (_set("choices", {"granularity": "edge"}), "choices are damaged"),
    "evidence": (lambda data: data["evidence"]["effects"][0].pop("n"), "its evidence is damaged"),
    "nodes": (_set("nodes", ["embed", "L0H0", "L9H9"]), "its nodes are not those of its edges"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_every_defect_is_one_sentence(circuit: Circuit, tmp_path: Path, defect: str) -> None:
    change, message = DEFECTS[defect]
    data = copy.deepcopy(json.loads(json.dumps(circuit.to_json())))
    change(data)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(data))
    with pytest.raises(CutawayError) as raised:
        Circuit.load(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_edge_twice_and_files_that_are_none(circuit: Circuit, tmp_path: Path) -> None:
    data = circuit.to_json()
    data["edges"].append(data["edges"][2])
    with pytest.raises(CutawayError, match="is there twice"):
        Circuit.from_json(data)
    with pytest.raises(CutawayError, match="does not exist"):
        Circuit.load(tmp_path / "absent.json")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(CutawayError, match="is not JSON"):
        Circuit.load(tmp_path / "text.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(CutawayError, match="it is not a circuit"):
        Circuit.load(tmp_path / "list.json")


def test_another_model_is_refused(circuit: Circuit, tiny: LanguageModel) -> None:
    with pytest.raises(CutawayError, match=r"was found in toy .*, not in tiny"):
        circuit.check_model(tiny)
    manifest = Manifest.create("circuit", model=tiny.identity())
    other = Circuit(circuit.graph, circuit.mask, circuit.scores, "t", "m", CHOICES, manifest)
    with pytest.raises(CutawayError, match="graph has 2 layers of 2 heads"):
        other.check_model(tiny)
    graph = EdgeGraph.of(tiny)
    Circuit(graph, graph.full(), torch.zeros(graph.shape), "t", "m", CHOICES, manifest).check_model(tiny)


def test_an_empty_circuit_has_no_evidence() -> None:
    toy = Toy.random(EdgeGraph(2, 2), 10)
    with pytest.raises(CutawayError, match="The circuit is empty"):
        gather_evidence(toy, toy.graph, toy.graph.empty(), choices=CHOICES)
