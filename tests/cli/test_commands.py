"""`check`, `sites` and `subjects` on the shipped model: what is printed, and what a failure looks like."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cutaway
from cutaway.cli.main import main
from cutaway.draw.text import escape
from cutaway.model.language_model import LanguageModel


@pytest.fixture(autouse=True)
def loaded_once(atlas: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    load = cutaway.load
    monkeypatch.setattr(cutaway, "load", lambda model, **options: atlas if model == "atlas" else load(model, **options))


def test_check_prints_a_card_and_the_algebra(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "atlas"]) == 0
    out, err = capsys.readouterr()
    lines = {tuple(line.split(None, 1)) for line in out.splitlines() if line}
    assert ("parameters", "8,327,424") in lines
    assert ("layers", "8") in lines
    assert ("dtype", "float32") in lines
    assert "resid_pre + attn.out = resid_mid" in out
    assert out.rstrip().endswith("passed")
    assert err == ""


def test_check_json_is_the_whole_table(atlas: LanguageModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "atlas", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["figures"]
    assert found["passed"] is True
    assert found["card"]["d_model"] == 256
    assert len(found["card"]["weights"].removeprefix("sha256 ")) == 64
    assert len(found["rows"]) == len(atlas.selftest().checks)
    assert all(row["residual"] <= row["tolerance"] and row["ok"] for row in found["rows"])
    assert {row["layer"] for row in found["rows"]} >= set(range(8))


def test_check_leaves_a_page(atlas: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "check.html"
    assert main(["check", "atlas", "--html", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    test = atlas.selftest()
    assert f"all {len(test.checks)} checks pass" in text
    assert all(escape(row.check) in text for row in test.checks)
    assert "cutaway check atlas" in text
    assert str(page) in capsys.readouterr().out
    assert main(["check", "atlas", "--html", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_check_says_with_its_exit_code_that_a_check_failed(
    atlas: LanguageModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = atlas.selftest()
    broken = replace(sound, checks=(replace(sound.checks[0], residual=0.5), *sound.checks[1:]))
    monkeypatch.setattr(atlas, "selftest", lambda: broken, raising=False)
    assert main(["check", "atlas"]) == 1
    assert "FAILS" in capsys.readouterr().out


def test_sites_prints_one_line_for_layers_that_agree(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sites", "atlas"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["site", "layers", "dims", "shape", "meaning"]
    (mid,) = [line for line in lines if line.startswith("blocks.{l}.resid_mid ")]
    assert mid.split() == ["blocks.{l}.resid_mid", "0-7", "b", "p", "d", "b", "p", "256", *mid.split()[8:]]
    (positions,) = [line for line in lines if line.startswith("pos_embed ")]
    assert "absent: positions enter attention (rotary" in positions
    assert len({line.index("b p") for line in lines if line.startswith("blocks") and " b p" in line}) == 1


def test_sites_json_lists_every_site(atlas: LanguageModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sites", "atlas", "--json"]) == 0
    found = {site["name"]: site for site in json.loads(capsys.readouterr().out)["figures"]["sites"]}
    assert found.keys() == {site.name for site in atlas.sites()}
    assert found["blocks.3.resid_post"]["shape"] == ["b", "p", 256]
    assert found["blocks.3.resid_post"]["absent"] is None
    assert found["pos_embed"]["absent"]


@pytest.mark.parametrize("command", ["check", "sites"])
def test_a_model_that_is_not_there_is_one_sentence(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for model in (tmp_path / "none", empty):
        assert main([command, str(model)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("cutaway: ")
        assert str(model) in err
        assert err.count("\n") == 1


def test_samples_are_drawn_by_seed_and_an_unknown_part_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("0", "0", "1"):
        assert main(["subjects", "samples", "facts", "--n", "3", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].count("\n\n") == 2
    assert main(["subjects", "samples", "none"]) == 2
    assert "two_hop" in capsys.readouterr().err


def test_training_gets_every_option(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import cutaway.subjects.atlas.training.train as training
    from cutaway.subjects.atlas.training.recipe import Machine, Recipe

    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(training, "train_command", lambda *given, **options: calls.append((*given, options)))

    words = "subjects train atlas --tokens 5000 --seed 2 --device cpu --batch 4 --context 64 --processes 1 --compiled"
    words += " --from atlas-1 --lr 0.001 --optimizer muon --reply-weight 3"
    assert main([*words.split(), "--overwrite", "--out", "o", "--corpus", "c"]) == 0
    recipe = Recipe(tokens=5000, seed=2, rows=4, context=64, peak=0.001, optimizer="muon", reply_weight=3.0)
    options = {"start": "atlas-1", "corpus": Path("c"), "machine": Machine("cpu", 1, True), "overwrite": True}
    assert calls.pop() == (Path("o"), recipe, options)


def test_evaluation_measures_both_models_alike_and_writes_the_page(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import cutaway.atlas_evaluation.compare as comparison
    import cutaway.atlas_evaluation.evaluate as evaluation
    from cutaway.artifacts.command import current_command
    from cutaway.atlas_evaluation import page, report

    calls: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(cutaway, "load", lambda model: model)
    monkeypatch.setattr(evaluation, "evaluate", lambda lm, **options: calls.append((lm, options)))
    monkeypatch.setattr(comparison, "compare", lambda *_: "compared")
    monkeypatch.setattr(page, "as_markdown", lambda found, folder: f"# Atlas\n{current_command()}\n")
    monkeypatch.setattr(page, "comparison_markdown", lambda *_: "beside the other\n")
    monkeypatch.setattr(report, "as_text", lambda _: "figures")
    monkeypatch.setattr(report, "comparison_text", lambda *words: " ".join(words))
    out = tmp_path / "atlas.md"
    words = f"subjects evaluate atlas --model m --quick --outside {tmp_path} --against atlas --n 5 --out {out}"
    assert main(words.split()) == 0
    options = {"n": 24, "causal": False, "outside": tmp_path}
    assert calls == [("m", options), ("atlas", options)]
    assert capsys.readouterr().out == "figures\n\ncompared m atlas\n"
    command = f"cutaway {words}"
    assert out.read_text() == f"# Atlas\n{command}\n\nbeside the other\n"
    calls.clear()
    assert main(["subjects", "evaluate", "atlas", "--n", "5"]) == 0
    assert calls == [("atlas", {"n": 5, "causal": True, "outside": None})]


@pytest.mark.parametrize(
    "words", ["train atlas --tokens 0", "evaluate atlas --n 0", "evaluate atlas --outside /no/such"]
)
def test_nonsense_is_refused_before_anything_heavy_is_loaded(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["subjects", *words.split()]) == 2
    assert capsys.readouterr().err.count("\n") == 1
