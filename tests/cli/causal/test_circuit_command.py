"""`cutaway circuit`: the table, the file, the page, and what is refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import cutaway
from cutaway.artifacts.manifest import Manifest, ModelIdentity
from cutaway.causal.circuits.circuit import Circuit
from cutaway.cli.main import main
from cutaway.model.language_model import LanguageModel


@pytest.fixture(autouse=True)
def loaded_once(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutaway, "load", lambda model, **options: tiny)


def some_pairs(n: int, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for i in range(n):
        ids = torch.randint(2, 61, (5,), generator=generator).tolist()
        other = [*ids[:2], (ids[2] + 7) % 59 + 2, *ids[3:]]
        words, others = (" ".join(f"w{i}" for i in row) for row in (ids, other))
        pairs.append({"clean": words, "corrupt": others, "answer": f" w{3 + i}", "wrong": f" w{30 + i}"})
    return pairs


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(some_pairs(18)))
    return path


QUICK = ["--force", "--quick", "--draws", "5"]


def test_the_file_the_json_and_the_page(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, page = tmp_path / "circuit.json", tmp_path / "page.html"
    words = ["circuit", "tiny", "--pairs", str(pairs), "--size", "20%", *QUICK, "--out", str(out), "--html", str(page)]
    assert main([*words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["figures"]
    assert printed == json.loads(out.read_text())
    found = Circuit.load(out)
    assert 0 < found.n_edges <= 0.2 * found.graph.n_edges
    assert found.manifest.command is not None
    assert found.manifest.command.startswith(f"cutaway circuit tiny --pairs {pairs} --size 20%")
    names = [effect["name"] for effect in printed["evidence"]["effects"]]
    assert names[0] == "faithfulness"
    assert {"CPR", "CMD"} <= set(names)
    text = page.read_text()
    assert text.count("<h1>") == 1
    assert "cw-circuit" in text
    assert 'class="cw-alarm">The model cannot do the task: it is right on' in text  # forced
    assert "nan" not in text
    assert main(words) == 0
    table = capsys.readouterr().out
    assert "beside random circuits of the same size" in table
    assert f"circuit: {out}" in table
    assert f"page: {page}" in table


def test_pairs_that_do_not_align_are_left_out_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([{**some_pairs(1, 9)[0], "corrupt": "w3 w4"}, *some_pairs(16)]))
    assert main(["circuit", "tiny", "--pairs", str(path), "--size", "30", *QUICK, "--json"]) == 0
    printed = capsys.readouterr()
    assert "cutaway: 1 of 17 pairs do not align and are left out (clean and corrupt must have" in printed.err
    assert json.loads(printed.out)["figures"]["method"]["left_out"] == 1


def test_a_saved_circuit_is_judged_on_other_pairs(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "circuit.json", tmp_path / "other.json"
    other.write_text(json.dumps(some_pairs(9, 3)))
    held = ["--held-out", str(other), "--faithfulness", "0.5"]
    assert main(["circuit", "tiny", "--pairs", str(pairs), *held, *QUICK, "--out", str(out), "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["figures"]
    assert main(["circuit", "tiny", "--pairs", str(other), "--evaluate", str(out), *QUICK, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["figures"]
    assert again["edges"] == first["edges"]
    ours, theirs = (data["evidence"]["effects"][0] for data in (again, first))
    assert ours["value"] == pytest.approx(theirs["value"], abs=1e-6)
    assert ours["n"] == 9
    assert main(["circuit", "tiny", "--pairs", str(other), "--evaluate", str(out), *QUICK, "--ablation", "zero"]) == 0
    assert "zero ablation" in capsys.readouterr().out


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["circuit", "tiny", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = [line for line in printed.err.splitlines() if line.startswith("cutaway: ")]
    return lines[-1]


def test_bad_input_is_one_sentence(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--pairs", str(pairs)]
    few = tmp_path / "few.json"
    few.write_text(json.dumps(some_pairs(6)))
    uneven = tmp_path / "uneven.json"
    uneven.write_text(json.dumps([{**pair, "corrupt": "w3 w4"} for pair in some_pairs(12)]))
    assert "--task NAME, or --pairs FILE" in refused([], capsys)
    assert "--task NAME, or --pairs FILE" in refused([*given, "--task", "ioi"], capsys)
    assert "give one of them" in refused([*given, "--size", "5", "--faithfulness", "0.5"], capsys)
    assert "give a number of edges (120) or a share" in refused([*given, "--size", "many"], capsys)
    assert "at most 100% of them" in refused([*given, "--size", "120%"], capsys)
    assert "at least 1 edge" in refused([*given, "--size", "0"], capsys)
    assert "so a circuit has 1 to that many; not 99,999" in refused([*given, "--size", "99999", *QUICK], capsys)
    assert "give a share above 0 and up to 1" in refused([*given, "--faithfulness", "nan"], capsys)
    assert "at most 100% of them" in refused([*given, "--size", "nan%"], capsys)
    same = tmp_path / "same"
    assert "--out and --html both name" in refused([*given, "--out", str(same), "--html", str(same)], capsys)
    assert "is a folder; name a file" in refused([*given, "--out", str(tmp_path)], capsys)
    assert "is a file, not a folder" in refused([*given, "--out", str(pairs / "circuit.json")], capsys)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert "is a device or a pipe" in refused([*given, "--out", str(pipe)], capsys)
    assert "18 of the 18 held-out pairs are among the 18 pairs of the search" in refused(
        [*given, "--held-out", str(pairs), "--size", "9", *QUICK], capsys
    )
    assert "--held-out goes with --pairs" in refused(["--task", "ioi", "--held-out", str(pairs)], capsys)
    assert "100 or more" in refused([*given, "--resamples", "20"], capsys)
    assert 'Choose from: "logit_difference"' in refused([*given, "--metric", "beauty"], capsys)
    assert "use logit_difference" in refused([*given, "--metric", "kl", "--scorer", "eap", *QUICK], capsys)
    assert "pairs to search with, too few for an interval" in refused(["--pairs", str(few), *QUICK], capsys)
    assert "clean and corrupt must have the same number of tokens: 5 and 2" in refused(
        ["--pairs", str(uneven), *QUICK], capsys
    )
    assert "The circuit is empty" in refused([*given, "--size", "1", "--select", "top", *QUICK], capsys)
    assert "tiny cannot do own pairs: it is right on" in refused([*given, "--size", "9", "--quick"], capsys)
    assert "no task is called 'chess'" in refused(["--task", "chess"], capsys)


def test_a_defective_circuit_is_refused_and_nothing_is_written(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "circuit.json"
    words = ["--pairs", str(pairs)]
    assert main(["circuit", "tiny", *words, "--size", "30", *QUICK, "--out", str(out)]) == 0
    capsys.readouterr()
    data = json.loads(out.read_text())
    bad = tmp_path / "bad.json"
    for change, message in (
        ({"edges": []}, "the circuit is empty"),
        ({"edges": [{"from": "L7H7", "to": "logits", "score": 1.0}]}, "no source 'L7H7' in this graph"),
        ({"edges": [{"from": "L1.mlp", "to": "L0.mlp", "score": 1.0}]}, "L1.mlp->L0.mlp is no edge"),
        ({"edges": [{"from": "embed", "to": "logits", "score": 10**400}]}, "which is no number"),
        ({"nodes": None}, "its nodes are not a list"),
        ({"method": "by hand"}, "its method is not an object"),
        ({"manifest": None}, "the manifest is damaged: it is not an object"),
        ({"graph": {**data["graph"], "n_layers": 10**6}}, "no model has 1000000 layers"),
    ):
        bad.write_text(json.dumps({**data, **change}))
        again = tmp_path / "again.json"
        assert message in refused([*words, "--evaluate", str(bad), "--out", str(again)], capsys)
        assert not again.exists()
    for option in (["--size", "9"], ["--scorer", "eap"], ["--faithfulness", "0.5"], ["--grouped"]):
        assert f"{option[0]} says how a circuit is found" in refused([*words, "--evaluate", str(out), *option], capsys)
    dangling = {**data, "edges": [{"from": "L0H0", "to": "logits", "score": 1.0}]}
    dangling.pop("nodes")
    bad.write_text(json.dumps(dangling))
    assert "none of its edges lies on a path" in refused([*words, "--evaluate", str(bad), *QUICK], capsys)
    manifest = Manifest.create("circuit", model=ModelIdentity("other", None, "0" * 64))
    bad.write_text(json.dumps({**data, "manifest": manifest.to_json()}))
    assert "was found in other" in refused([*words, "--evaluate", str(bad), *QUICK], capsys)
