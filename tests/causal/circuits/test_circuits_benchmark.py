"""What benchmarks/circuits.py compares and draws, without a peer."""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file

from cutaway.causal.edge_graph import EdgeGraph

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, Any]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return import_module("circuits"), import_module("circuit_peers"), import_module("circuit_plot")


def test_pairs_differ_in_a_few_places_and_two_answers(modules, tmp_path: Path) -> None:
    circuits, _, _ = modules
    pairs = load_file(circuits.make_pairs(circuits.TINY, tmp_path / "pairs"))
    differ = (pairs["clean"] != pairs["corrupt"]).sum(1)
    assert differ.min() >= 1
    assert differ.max() <= 3
    assert not (pairs["clean"] != pairs["corrupt"])[:, [0, -1]].any()
    assert (pairs["answer"] != pairs["wrong"]).all()
    again = load_file(circuits.make_pairs(circuits.TINY, tmp_path / "again"))
    assert all(torch.equal(again[name], value) for name, value in pairs.items())


def test_rows_and_columns_are_found_by_name(modules) -> None:
    """A peer that orders its nodes otherwise gives the same matrix; one with other nodes is refused."""
    circuits, peers, _ = modules
    graph = EdgeGraph(2, 3)
    theirs = ["input", *(f"a{layer}.h{head}" for layer in (1, 0) for head in (2, 0, 1)), "m1", "m0"]
    parts = [f"a{layer}.h{head}<{part}>" for part in "vqk" for layer in (0, 1) for head in range(3)]
    columns = [peers.peer_name(name) for name in ["logits", "m0", "m1", *parts]]
    rows = [peers.peer_name(name) for name in theirs]
    worker = peers.Method("", rows, columns, {})
    ours = torch.arange(graph.n_sources * graph.n_destinations).view(graph.shape)
    shuffled = torch.stack(
        [torch.stack([ours[graph.source(row), graph.destination(column)] for column in columns]) for row in rows]
    )
    assert torch.equal(circuits.in_order(shuffled, worker, graph), ours)
    with pytest.raises(RuntimeError, match="the graphs differ"):
        circuits.in_order(shuffled, worker, EdgeGraph(2, 2))


def test_a_wrong_number_is_a_missed_target(modules) -> None:
    circuits, _, _ = modules
    scores = torch.randn(500, generator=torch.Generator().manual_seed(0))
    for change, met in ((0.0, [True, True]), (1e-3, [False, True])):
        row = circuits.Row("eap", "")
        other = scores.clone()
        other[3] += change * scores.abs().max()
        circuits.agreement(row, scores, other)
        assert [one.met for one in row.verdicts] == met
    row = circuits.Row("eap", "")
    circuits.agreement(row, scores, scores.flip(0))
    assert [one.met for one in row.verdicts] == [False, False]


def test_the_plot_has_four_panels_and_says_the_ratios(modules) -> None:
    _, _, plot = modules
    points = [
        plot.Point(8 * k, 2 * k, {"cutaway": k, "eap_ig": 4.0 * k * k}, {"cutaway": 10.0, "eap_ig": 50.0 * k})
        for k in (1, 2, 3)
    ]
    root = ElementTree.fromstring(plot.cost_svg(points, points, ("cutaway", "EAP-IG"), "about < it"))
    assert len(root.findall("{*}svg")) == 4
    heads = [text.text or "" for text in root.findall("{*}text[@class='head']")]
    assert heads == [
        "theirs / ours: 4.0 at 8 tokens, 12.0 at 24",
        "theirs / ours: 4.0 at 2 layers, 12.0 at 6",
        "theirs / ours: 5.0 at 8 tokens, 15.0 at 24",
        "theirs / ours: 5.0 at 2 layers, 15.0 at 6",
    ]


def test_an_absent_peer_is_said_and_a_wrong_path_refused(
    modules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    circuits, _, _ = modules
    out = tmp_path / "c.json"
    monkeypatch.setattr(sys, "argv", ["circuits.py", "--quick", "--only", "eap_ig", "--out", str(out)])
    assert circuits.main() == 0
    assert "peer absent: EAP-IG (give --peer PATH" in capsys.readouterr().out
    assert json.loads(out.read_text())["rows"] == []
    monkeypatch.setattr(sys, "argv", ["circuits.py", "--peer", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        circuits.main()
    assert "is no checkout of EAP-IG" in capsys.readouterr().err
