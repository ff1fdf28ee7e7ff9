"""`cutaway trace` on the shipped model: table, JSON, page, files of prompts, and bad input as one sentence."""

import html
import json
from pathlib import Path

import pytest

import cutaway
from cutaway.cli.main import main
from cutaway.model.language_model import LanguageModel

PROMPT = "The capital of the state containing Dallas is"
DALLAS = [PROMPT, "--subject", "Dallas"]


@pytest.fixture(autouse=True)
def loaded_once(atlas: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    load = cutaway.load
    monkeypatch.setattr(cutaway, "load", lambda model, **options: atlas if model == "atlas" else load(model, **options))
    monkeypatch.setenv("CUTAWAY_QUIET", "1")


def test_one_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    words = ["trace", "atlas", *DALLAS, "--answer", " Austin", "--draws", "3"]
    assert main([*words, "--json", "--html", str(page)]) == 0
    printed = json.loads(capsys.readouterr().out)
    found = printed["figures"]
    assert printed["command"].startswith("cutaway trace atlas 'The capital")
    assert (found["n"], found["draws"], found["noise_in_sigma"]) == (1, 3, 3.0)
    assert found["total_effect"]["value"] > 0.4
    assert found["prompts"][0]["tokens"] == [" Dallas", " is"]
    assert set(found["grids"]) == {"state", "attention", "MLP"}
    html = page.read_text()
    assert html.count('<svg class="cw-heatmap"') == 3
    for text in (
        "What the noise takes",
        "0 is nothing",
        "would be all that the noise took",
        "·Dallas",
        "random other position",
    ):
        assert text in html.replace("<i>·</i>", "·")
    assert main(words) == 0
    assert "average indirect effect of resid_post, one layer" in capsys.readouterr().out


def test_a_file_of_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, page = tmp_path / "facts.json", tmp_path / "page.html"
    capitals = {"France": " Paris", "Germany": " Berlin", "Italy": " Paris"}
    prompts = [{"prompt": f"The capital of {x} is", "subject": x, "answer": y} for x, y in capitals.items()]
    file.write_text(json.dumps(prompts))
    words = ["trace", "atlas", "--prompts", str(file), "--draws", "2", "--window", "1", "--noise", "4"]
    assert main([*words, "--json", "--html", str(page)]) == 0
    found = json.loads(capsys.readouterr().out)["figures"]
    assert found["n"] == 2
    assert found["grids"]["MLP"]["window"] == 1
    assert [one["prompt"] for one in found["refused"]] == ["The capital of Italy is"]
    assert "subject last" in page.read_text()


def test_without_an_answer_the_models_own_is_called_a_guess(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, words = tmp_path / "page.html", ["trace", "atlas", *DALLAS, "--draws", "1"]
    assert main([*words, "--json", "--html", str(page)]) == 0
    found = json.loads(capsys.readouterr().out)["figures"]
    assert found["prompts"][0]["guessed"] is True
    whose = "1 prompt with the model's own guess, not known to be right"
    assert found["total_effect"]["choices"]["evaluation"] == f"{whose} (atlas)"
    shown = html.unescape(page.read_text())
    assert "the model's own guess: Austin" in shown
    assert "Austin (guess)" in shown
    assert "right answer" not in shown
    assert "answered rightly" not in shown
    mixed = tmp_path / "facts.json"
    france = {"prompt": "The capital of France is", "subject": "France", "answer": " Paris"}
    mixed.write_text(json.dumps([france, {"prompt": PROMPT, "subject": "Dallas"}]))
    assert main(["trace", "atlas", "--prompts", str(mixed), "--draws", "1"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.endswith("1 prompt answered rightly, 1 with the model's own guess, not known to be right")


def test_without_prompts_it_traces_landmarks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "atlas", "--n", "2", "--draws", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("causal tracing of atlas: 2 prompts answered rightly")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([PROMPT], "needs a prompt and --subject"),
        (["--subject", "Dallas"], "needs a prompt and --subject"),
        ([PROMPT, "--subject", "Tampa"], "'Tampa' does not stand in the prompt"),
        ([*DALLAS, "--answer", " Boston"], "atlas answers no prompt rightly"),
        ([*DALLAS, "--window", "99"], "a window of 99 layers"),
        ([*DALLAS, "--noise", "0"], "hides nothing"),
        ([*DALLAS, "--draws", "0"], "draws"),
        ([*DALLAS, "--prompts", "FILE"], "leave the prompt"),
        (["--prompts", "FILE"], "prompt 1 of"),
        (["--prompts", "NOWHERE"], "NOWHERE"),
        (["--prompts", "EMPTY"], "holds no list"),
        (["--prompts", "MISSPELT"], "an unknown key 'anwser'; known are prompt, subject, answer"),
    ],
)
def test_bad_input_is_one_sentence(
    options: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, empty = tmp_path / "facts.json", tmp_path / "empty.json"
    file.write_text('[{"prompt": "The capital of France is", "subject": "France"}, {"prompt": "no subject"}]')
    empty.write_text("{}")
    misspelt = tmp_path / "misspelt.json"
    misspelt.write_text('[{"prompt": "The capital of France is", "subject": "France", "anwser": " Paris"}]')
    given = {"FILE": str(file), "EMPTY": str(empty), "MISSPELT": str(misspelt)}
    assert main(["trace", "atlas", *(given.get(option, option) for option in options)]) == 2
    out, err = capsys.readouterr()
    assert says in err
    assert err.count("\n") == 1
    assert out == ""


def test_a_model_that_knows_no_landmark_says_so(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(shared / "models" / "stories260K")]) == 2
    out, err = capsys.readouterr()
    assert "answers no prompt rightly" in err
    assert err.count("\n") == 1
    assert out == ""
