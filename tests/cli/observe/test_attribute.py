"""`cutaway attribute`: the table, its JSON and its page, and what is refused."""

import json
from pathlib import Path

import pytest

import cutaway
from cutaway.cli.main import main
from cutaway.model.language_model import LanguageModel

PROMPT = "The capital of the state containing Dallas is"
AUSTIN = ["--answer", " Austin", "--wrong", " Sacramento"]


@pytest.fixture(autouse=True)
def loaded_once(atlas: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutaway, "load", lambda model, **options: atlas)


def test_the_table_sums_to_the_models_difference(atlas: LanguageModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attribute", "atlas", PROMPT, *AUSTIN, "--by", "head", "--ablate", "2"]) == 0
    out = capsys.readouterr().out
    logits = atlas.run(PROMPT, logits="last").logits
    assert logits is not None
    ids = [int(atlas.tokens(word, bos=False).ids[0, -1]) for word in (" Austin", " Sacramento")]
    difference = float(logits[0, 0, ids[0]] - logits[0, 0, ids[1]])
    lines = {line.rsplit(None, 1)[0].strip(): line.rsplit(None, 1)[-1] for line in out.splitlines() if line.strip()}
    assert lines["sum"] == f"{difference:.3f}"
    assert "random pairs" in out
    assert "It is not what the answer would lose" in out
    assert "mean-ablated alone" in out


@pytest.mark.parametrize("by", ["component", "neuron", "source"])
def test_json_and_page(by: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert main(["attribute", "atlas", PROMPT, *AUSTIN, "--by", by, "--json", "--html", str(page), "--top", "5"]) == 0
    data = json.loads(capsys.readouterr().out)["figures"]
    assert data["relative_error"] < 1e-5
    assert len(data["parts"]) == (17 if by == "component" else 5)
    assert sum(part["value"] for part in data["parts"]) + data["rest"] == pytest.approx(data["total"][0], abs=1e-4)
    assert all(part["control"] > 0 for part in data["parts"][:3])
    text = page.read_text()
    assert text.count("<h1>") == 1
    assert "random pairs" in text
    assert "Sacramento" in text
    assert "nan" not in text


def test_several_prompts_are_averaged_with_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    other = PROMPT.replace("Dallas", "Oakland")
    words = ["attribute", "atlas", PROMPT, other, "--answer", " Austin", "--answer", " Sacramento", "--against", "mean"]
    assert main([*words, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)["figures"]
    assert len(data["total"]) == 2
    assert data["wrong"] == ["the mean logit"] * 2
    low, high = data["parts"][0]["interval"]
    assert low <= data["parts"][0]["value"] <= high


def test_means_may_come_from_other_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The capital of the state containing {city} is" for city in ("Oakland", "Miami") * 60))
    words = ["attribute", "atlas", PROMPT, *AUSTIN, "--ablate", "1", "--json"]
    assert main(words) == 0
    own = json.loads(capsys.readouterr().out)["figures"]["ablations"][0]
    assert main([*words, "--reference", str(text)]) == 0
    other = json.loads(capsys.readouterr().out)["figures"]["ablations"][0]
    assert "mean over the prompts" in own["ablation"]
    assert "mean over the reference texts" in other["ablation"]
    assert own["value"] != other["value"]


def test_without_an_answer_the_models_own_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert main(["attribute", "atlas", PROMPT, "--position", "-2", "--top", "3", "--json", "--html", str(page)]) == 0
    printed = json.loads(capsys.readouterr().out)
    data = printed["figures"]
    assert data["answer"] == [" is"]
    assert data["wrong"] == [""]
    assert printed["command"] == f"cutaway attribute atlas '{PROMPT}' --position -2 --top 3"
    assert "--position -2" in page.read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "there is no prompt"),
        ([PROMPT, "--position", "40"], "Position 40 is outside row 0, which has 9 tokens"),
        ([PROMPT, "--wrong", "Sacramentox"], "tokens of atlas: "),
        ([PROMPT, "--wrong", " Boston", "--against", "mean"], "the same thing twice"),
        ([PROMPT, "--ablate", "-1"], "give 0 or more parts"),
        ([PROMPT, "--by", "source", "--ablate", "2"], "by source has no ablation"),
        ([PROMPT, PROMPT, PROMPT, "--answer", " Boston"], "2 answers for 3 prompts"),
        ([PROMPT, PROMPT, PROMPT, "--wrong", " A", "--wrong", " B"], "2 wrong answers for 3 prompts"),
        ([PROMPT, "--by", "layer"], "Choose from"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attribute", "atlas", *words, "--answer", " Austin"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.count("\n") == 1
