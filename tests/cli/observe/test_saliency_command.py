"""`cutaway saliency` on the shipped model: table, JSON, page, and bad input as one sentence."""

import json
from pathlib import Path

import pytest

import cutaway
from cutaway.cli.main import main
from cutaway.model.language_model import LanguageModel

PROMPT = "The capital of the state containing Dallas is"
FEW = ["--seeds", "1", "--draws", "3", "--steps", "16"]


@pytest.fixture(autouse=True)
def loaded_once(atlas: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    load = cutaway.load
    monkeypatch.setattr(cutaway, "load", lambda model, **options: atlas if model == "atlas" else load(model, **options))
    monkeypatch.setenv("CUTAWAY_QUIET", "1")


def test_the_city_matters_and_every_map_has_its_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    words = ["saliency", "atlas", PROMPT, "--answer", " Austin", "--wrong", " Sacramento", *FEW[:4], "--steps", "256"]
    assert main([*words, "--json", "--html", str(page)]) == 0
    printed = json.loads(capsys.readouterr().out)
    found = printed["figures"]
    assert [one["method"] for one in found["methods"]] == ["gradient-x-input", "integrated-gradients", "occlusion"]
    for one in found["methods"]:
        (tokens,) = one["maps"]
        top = max(zip(tokens["values"], tokens["tokens"], strict=True))[1]
        assert top == " Dallas"
        assert one["sanity"][-1]["randomised"] == "everything"
        assert one["deletion"]["controls"]
        assert one["not_shown"]
    assert len(found["agreement"]) == 3
    assert printed["command"].startswith("cutaway saliency atlas")
    html = page.read_text()
    for word in ("gradient × input", "would it look the same without training?", "Do the methods agree?", "·Dallas"):
        assert word in html.replace("<i>·</i>", "·")


def test_one_method_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["saliency", "atlas", PROMPT, "--method", "occlusion", "--baseline", "delete", *FEW]
    assert main(words) == 0
    out = capsys.readouterr().out  # without --answer: the model's own, which is right
    assert out.startswith("occlusion (baseline: delete): logit of ' Austin'")
    assert "rank correlation with untrained weights" in out
    assert "agreement" not in out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--answer", " Austin"], "there is no prompt"),
        ([PROMPT, "--answer", " Austin Texas"], "tokens of atlas"),
        ([PROMPT, "--answer", " Austin", "--wrong", " Austin"], "also the wrong answer"),
        ([PROMPT, "--answer", " a", "--answer", " b"], "2 answers for 1 prompts"),
        ([PROMPT, "--answer", " Austin", "--baseline", "delete"], "occlusion alone"),
        ([PROMPT, "--answer", " Austin", "--method", "lime"], "lime"),
        ([PROMPT, "--answer", " Austin", "--steps", "0"], "steps"),
    ],
)
def test_bad_input_is_one_sentence(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["saliency", "atlas", *options]) == 2
    out, err = capsys.readouterr()
    assert says in err
    assert err.count("\n") == 1
    assert out == ""
