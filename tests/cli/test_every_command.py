"""Every command: `--json` has the one shape of the schema, and what is printed fits 80 columns and 120."""

import inspect
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from cyclopts import App

import cutaway
from cutaway.cli.fit import fitted
from cutaway.cli.main import app, main
from cutaway.model.language_model import LanguageModel
from cutaway.subjects.superposition import study as toys

SCHEMA = json.loads((Path(inspect.getfile(main)).parent / "result.schema.json").read_text())
PROMPT = "The capital of the state containing Dallas is"
DICTIONARY = "atlas/blocks.3.resid_post"
CHEAP = [
    ["check", "atlas"],
    ["sites", "atlas"],
    ["lens", "atlas", PROMPT, "--mid"],
    ["attribute", "atlas", PROMPT, "--by", "head"],
    ["harvest", "atlas", "--corpus", "text.txt", "--site", "blocks.1.resid_post", "--out", "h", "--tokens", "99"],
    ["dictionary", "inspect", DICTIONARY],
    ["dictionary", "convert", DICTIONARY, "converted"],
    ["dictionary", "presets"],
    ["dictionary", "banks"],
]
SLOW = [
    ["lens", "atlas", "--train", "text.txt", "--out", "l", "--steps", "3", "--context", "32", "--held-out", "8"],
    ["heads", "atlas", PROMPT],
    ["saliency", "atlas", PROMPT, "--method", "gradient-x-input", "--seeds", "1", "--draws", "2"],
    ["probe", "atlas", "rows.csv", "--site", "blocks.3.resid_post", "--folds", "3", "--draws", "2"],
    ["tasks", "atlas", "--task", "two hop", "--n", "4"],
    ["patch", "atlas", "--task", "two hop", "--n", "8", "--layer", "3"],
    ["trace", "atlas", PROMPT, "--subject", "Dallas", "--answer", " Austin"],
    ["circuit", "atlas", "--task", "two hop", "--size", "30", "--n", "8", "--quick"],
    ["train", "atlas", "--site", "blocks.1.resid_post", "--corpus", "text.txt", "--out", "t", "--tokens", "4096",
     "--d-sae", "64"],
    ["train", "atlas", "--site", "blocks.1.resid_post", "--corpus", "text.txt", "--dry-run"],
    ["dictionary", "inspect", DICTIONARY, "--model", "atlas", "--tokens", "256"],
    ["dictionary", "judge", DICTIONARY, "--model", "atlas", "--corpus", "text.txt", "--rows", "8",
     "--spliced-rows", "2"],
    ["subjects", "superposition"],
]  # fmt: skip
ELSEWHERE = {"tour", "subjects evaluate"}
"""What takes minutes; a tour is tried below with nothing in it, the examination of atlas in tests/atlas_evaluation."""
_TRIED = [*CHEAP, *(pytest.param(words, marks=pytest.mark.slow) for words in SLOW)]


@pytest.fixture(autouse=True)
def inputs(atlas: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutaway, "load", lambda model, **options: atlas)
    study = toys.toy_study
    monkeypatch.setattr(toys, "toy_study", lambda *, seed: study(seed=seed, effort=0.02, cells=3))
    monkeypatch.setenv("CUTAWAY_QUIET", "1")
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.chdir(tmp_path)
    cities = ("Oakland", "Miami", "Dallas", "Boston")
    sentences = [f"The capital of the state containing {city} is near {other}." for city in cities for other in cities]
    Path("text.txt").write_text("\n\n".join([inspect.getsource(inspect), *sentences]))
    rows = [f"{sentence},{'Dallas' in sentence}" for sentence in sentences]
    Path("rows.csv").write_text("\n".join(["text,label", *rows]))


def commands_with_json(of: App = app, path: tuple[str, ...] = ()) -> list[str]:
    found: list[str] = []
    for name in of:
        if name.startswith("-"):
            continue
        command = of[name]
        if command.default_command is None:
            found += commands_with_json(command, (*path, name))
        elif "json" in inspect.signature(command.default_command).parameters:
            found.append(" ".join((*path, name)))
    return found


def test_every_command_is_tried() -> None:
    tried = {" ".join(words[: 2 if words[0] in ("dictionary", "subjects") else 1]) for words in [*CHEAP, *SLOW]}
    assert tried | ELSEWHERE == set(commands_with_json())


@pytest.mark.parametrize("words", _TRIED, ids=lambda words: " ".join(words[:2]))
def test_json_has_the_shape_of_the_schema(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--json"]) in (0, 1)
    out, err = capsys.readouterr()
    printed = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    jsonschema.validate(printed, SCHEMA)
    assert err == ""
    if words[-1] != "--dry-run":
        assert printed["command"].split()[:2] == ["cutaway", words[0]]
    assert printed["figures"]
    assert "json" not in printed["choices"]


def test_the_tour_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Toured:
        def model_dump(self, mode: str) -> dict[str, Any]:
            return {"sections": []}

    monkeypatch.setattr("cutaway.tour.run_tour", lambda *_, **__: Toured(), raising=False)
    assert main(["tour", "atlas", "--json"]) == 0
    jsonschema.validate(json.loads(capsys.readouterr().out), SCHEMA)


@pytest.mark.parametrize("words", _TRIED, ids=lambda words: " ".join(words[:2]))
def test_the_text_fits_and_nothing_is_cut_without_a_sign(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) in (0, 1)
    whole = capsys.readouterr().out
    pieces = whole.split()
    for width in (80, 120):
        shown = fitted(whole, width)
        too_long = [line for line in shown.splitlines() if len(line) > width and "/" not in line]
        assert not too_long, too_long[0]
        kept = shown.split()
        assert all(word in pieces or word.endswith("…") for word in kept)
        assert set(pieces) - set(kept) == set() or "…" in shown
