"""`cutaway tasks`: the table, its JSON and its page, own files, and what is refused."""

import json
from pathlib import Path

import pytest

import cutaway
from cutaway.cli.main import main
from cutaway.data.tasks.files import read_pair_file
from cutaway.model.language_model import LanguageModel


@pytest.fixture(autouse=True)
def loaded_once(atlas: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutaway, "load", lambda model, **options: atlas)


def test_the_table_says_what_it_can_and_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", "atlas", "--task", "two-hop capitals", "--task", "pronoun", "--n", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[2:6]] == ["two-hop capitals"] * 2 + ["pronoun"] * 2
    assert lines[2].endswith("yes")
    assert lines[4].endswith("  no")
    assert any("clean and corrupt must have the same number of tokens" in line for line in lines)


def test_json_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    words = ["tasks", "atlas", "--task", "greater than", "--split", "held-out", "--n", "12"]
    assert main([*words, "--json", "--html", str(page)]) == 0
    printed = json.loads(capsys.readouterr().out)
    data = printed["figures"]
    assert printed["command"] == "cutaway tasks atlas --task 'greater than' --split held-out --n 12"
    (found,) = data["tasks"]
    assert (found["task"], found["split"], found["able"]) == ("greater than", "held_out", True)
    measured = found["task_accuracy"]
    assert measured["n"] == 12
    assert measured["interval"][0] < measured["value"] <= measured["interval"][1]
    low, high = measured["logit_difference_interval"]
    assert low <= measured["logit_difference"] <= high
    assert measured["corrupt_logit_difference"] < measured["logit_difference"]
    text = page.read_text()
    assert text.count("<h1>") == 1
    assert "greater than, held out" in text
    assert "nan" not in text


def test_own_pairs_and_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "own.json"
    assert main(["tasks", "atlas", "--task", "two hop", "--n", "10", "--out", str(file)]) == 0
    found = read_pair_file(file)
    assert (found.name, len(found.pairs), len(found.held_out)) == ("two-hop capitals", 10, 10)
    capsys.readouterr()
    assert main(["tasks", "atlas", "--task", str(file), "--json"]) == 0
    tried = json.loads(capsys.readouterr().out)["figures"]["tasks"]
    assert [(one["task"], one["split"], one["task_accuracy"]["n"]) for one in tried] == [
        ("two-hop capitals", "search", 10),
        ("two-hop capitals", "held_out", 10),
    ]
    assert tried[0]["task_accuracy"]["value"] == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--task", "chess"], "no task is called 'chess'"),
        (["--task", "absent.json"], "there is no file absent.json"),
        (["--out", "x.json"], "--out takes the pairs of one task"),
        (["--threshold", "1.5"], "threshold"),
        (["--n", "1"], "--n"),
    ],
)
def test_bad_input(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", "atlas", *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert says in said.err


def test_a_file_without_held_out_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "own.json"
    prompt = "The capital of the state containing {} is"
    pair = {"clean": prompt.format("Dallas"), "corrupt": prompt.format("Oakland")}
    file.write_text(json.dumps([{**pair, "answer": " Austin", "wrong": " Sacramento"}]))
    assert main(["tasks", "atlas", "--task", str(file), "--json"]) == 0
    search, held_out = json.loads(capsys.readouterr().out)["figures"]["tasks"]
    assert search["reason"] == "only 1 of its prompt pairs align with the tokenizer"
    assert search["task_accuracy"]["logit_difference_interval"] == [None, None]
    assert held_out["task_accuracy"] is None
    assert "has no held-out pairs" in held_out["reason"]
