"""Results about circuits print, tabulate, draw and save themselves."""

from pathlib import Path

import pytest
import torch
from result_checks import check_result
from toy_graph import Toy

from cutaway.artifacts.errors import BadFile
from cutaway.artifacts.manifest import Manifest, ModelIdentity
from cutaway.artifacts.results import Choices
from cutaway.causal.circuits.baselines import sized_circuit
from cutaway.causal.circuits.circuit import Circuit
from cutaway.causal.circuits.edge_scores import EdgeScores
from cutaway.causal.circuits.evidence import Evaluation, Ranking, gather_evidence
from cutaway.causal.circuits.faithfulness import Faithfulness
from cutaway.causal.circuits.runs import CircuitRuns
from cutaway.causal.edge_graph import EdgeGraph

CHOICES = Choices("edge", "every edge", "resample", "all", "complement", "10 pairs of a toy")


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    toy = Toy.random(EdgeGraph(2, 2), 10)
    scores = toy.weights.float()
    mask, asked = sized_circuit(toy.graph, scores, 15)
    per_pair = scores + 0.1 * torch.randn(10, *toy.graph.shape, generator=torch.Generator().manual_seed(0))
    evidence = gather_evidence(
        toy, toy.graph, mask, choices=CHOICES, ranking=Ranking(scores=scores, per_pair=per_pair, asked=asked),
        magnitude=scores.abs(), search=0.9, evaluation=Evaluation(draws=4, curve_draws=2),
    )  # fmt: skip
    manifest = Manifest.create("circuit", model=ModelIdentity("toy", None, "0" * 64))
    return Circuit(toy.graph, mask, scores * mask, "toy", "logit difference", CHOICES, manifest, evidence=evidence)


def test_a_circuit(circuit: Circuit, tmp_path: Path) -> None:
    folder = check_result(circuit, tmp_path)
    assert Circuit.load(folder / "result.json").to_json() == circuit.to_json()
    assert 'class="cw-circuit' in (folder / "result.svg").read_text()
    assert "faithfulness" in repr(circuit)
    with pytest.raises(BadFile, match="a result is saved as one of"):
        circuit.save(tmp_path / "circuit.txt")


@pytest.mark.parametrize("part", ["size_curve", "stability", "completeness", "minimality", "self_repair"])
def test_each_part_of_the_evidence(circuit: Circuit, tmp_path: Path, part: str) -> None:
    assert circuit.evidence is not None
    result = getattr(circuit.evidence, part)
    folder = check_result(result, tmp_path)
    assert set(result.effects) <= set(circuit.evidence.effects)
    assert result.title in (folder / "result.html").read_text()


def test_the_evidence_and_its_parts_hold_the_same(circuit: Circuit, tmp_path: Path) -> None:
    evidence = circuit.evidence
    assert evidence is not None
    check_result(evidence, tmp_path)
    assert [row["value"] for row in evidence.rows() if not row["control"]] == [e.value for e in evidence.effects]
    parts = (evidence.size_curve, evidence.stability, evidence.completeness, evidence.minimality, evidence.self_repair)
    assert sum(len(part.effects) for part in parts if part is not None) + 2 == len(evidence.effects)
    assert Evaluation().draws == 20
    check_result(Faithfulness(evidence.effects[:2]), tmp_path)


def test_scores_of_edges(tmp_path: Path) -> None:
    for graph in (EdgeGraph(2, 2), EdgeGraph(2, 2, columns=("city", "other"))):
        values = torch.randn(graph.shape, generator=torch.Generator().manual_seed(0)) * graph.real
        found = EdgeScores(graph, values, None, "eap", "nll", "noise", 3, torch.ones(3), torch.zeros(3))
        check_result(found, tmp_path)
        assert len(found.rows()) == graph.n_edges
        assert sum(row["score"] for row in found.rows()) == pytest.approx(float(values.sum()), abs=1e-4)


def test_runs_of_circuits(tmp_path: Path) -> None:
    runs = CircuitRuns(torch.rand(20, 5), torch.ones(5), torch.zeros(5), "nll", "resample")
    check_result(runs, tmp_path)
    assert len(runs.rows()) == 100
    assert "… and 12 more" in repr(runs)
