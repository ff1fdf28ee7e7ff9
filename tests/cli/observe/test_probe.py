"""`cutaway probe` on the shipped model: what is printed and drawn, and each bad input as one sentence."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

import cutaway
from cutaway.cli.main import main
from cutaway.cli.observe.probe import read_rows
from cutaway.model.language_model import LanguageModel
from cutaway.subjects.world.statements.relations import relation


@pytest.fixture(autouse=True)
def loaded_once(atlas: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    load = cutaway.load
    monkeypatch.setattr(cutaway, "load", lambda model, **options: atlas if model == "atlas" else load(model, **options))
    monkeypatch.setenv("CUTAWAY_QUIET", "1")


@pytest.fixture
def regions(tmp_path: Path) -> Path:
    """Is a city's region the South? Only cities that atlas never saw in a sentence of two facts, and no state on both
    sides of a fold."""
    path = tmp_path / "regions.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "group", "answer", "wrong"])
        for fact in relation("two_hop_region").facts:
            if fact.held_out:
                text = f"The region of the state where {fact.x} is located is the"
                south = fact.answer == "South"
                label, wrong = ("South", " West") if south else ("elsewhere", " South")
                writer.writerow([text, label, fact.between, f" {fact.answer}", wrong])
    return path


def test_a_held_out_fact_is_read_and_used(regions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    words = ["probe", "atlas", str(regions), "--site", "blocks.0.resid_post", "--folds", "4", "--draws", "2"]
    words += ["--site", "blocks.5.resid_post"]
    options = [
        "--use",
        "--use-site",
        "blocks.5.resid_post",
        "--json",
        "--html",
        str(page),
        "--out",
        str(tmp_path / "p"),
    ]
    assert main([*words, *options]) == 0
    found = json.loads(capsys.readouterr().out)["figures"]
    rows = found["sweep"]["rows"]
    score = [row["effect"]["value"] for row in rows]
    controls = {c["name"].split(" (")[0]: c["value"] for c in rows[1]["effect"]["controls"]}
    assert score[0] < 0.75  # at the first layer the last token, "the", does not know the city yet
    assert score[1] > 0.85
    assert max(controls[name] for name in ("bag of tokens", "embedding", "position and length")) < 0.65
    assert controls["untrained model"] < 0.7
    effects = {row["action"]: row["effect"]["value"] for row in found["use"]["rows"]}
    assert effects["ablate"] < 0
    assert effects["steer +"] > 3
    assert effects["steer −"] < -3
    html = page.read_text()
    for word in (
        "AUROC by site",
        "steer towards elsewhere",
        "Do its probabilities",
        "random directions",
        "untrained model",
    ):
        assert word in html
    assert "http" not in html.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert (tmp_path / "p" / "probe.safetensors").is_file()


def test_the_table_names_every_layer(regions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["probe", "atlas", str(regions), "--site", "blocks.{3..4}.resid_post", "--draws", "1", "--folds", "3"]
    assert main([*words, "--kind", "mass-mean", "--position", "-1"]) == 0
    out = capsys.readouterr().out
    assert "mass-mean probe at the position rule '-1'" in out
    assert "blocks.3.resid_post" in out
    assert "blocks.4.resid_post" in out
    assert "site chosen inside each fold" in out


def file(folder: Path, name: str, content: str) -> str:
    path = folder / name
    path.write_text(content)
    return str(path)


ROWS = "text,label\n" + "".join(f"word {i},{'a' if i % 2 else 'b'}\n" for i in range(12))


@pytest.mark.parametrize(
    ("name", "content", "options", "says"),
    [
        ("d.csv", "", [], "must name the columns text and label"),
        ("d.csv", "text,label\n", [], "has no rows"),
        ("d.csv", "sentence,label\na,b\n", [], "it lacks text"),
        ("d.csv", "text,label\nA dog,1\nA cat,\n", [], "line 3 has no label"),
        ("d.csv", "text,label\nA dog,1\nA cat,nan\n", [], "line 3 has no label"),
        ("d.csv", "text,label\n,1\n", [], "line 2 has no text"),
        ("d.csv", "text,label\nA dog,1\nA cat,1\n", [], "at least two classes"),
        ("d.csv", "text,label\nA dog,1\nA cat,0\nA cow,0\n", [], "is in 1; give 4 more rows of it"),
        ("d.csv", ROWS, ["--site", "blocks.*.resid_pst"], "did you mean 'blocks.*.resid_post'"),
        ("d.csv", ROWS, ["--site", "pos_embed"], "rotary"),
        ("d.csv", ROWS, ["--site", "blocks.99.resid_post"], "layers are 0 to 7"),
        ("d.csv", ROWS, ["--site", "blocks.*.attn.pattern"], "one vector per token"),
        ("d.csv", ROWS, ["--position", "99"], "Position 99 is outside"),
        ("d.csv", ROWS, ["--position", "match"], "the column match"),
        ("d.csv", ROWS, ["--position", "match:zebra"], "does not occur"),
        ("d.csv", ROWS, ["--folds", "2"], "use 3 or more"),
        ("d.csv", ROWS, ["--head", "1"], "has no heads"),
        ("d.csv", ROWS, ["--regression"], "needs numbers as labels"),
        ("d.csv", ROWS, ["--kind", "svm"], "svm"),
        ("d.csv", "text,label,group\nA dog,1,x\nA cat,0,\n", [], "a group for some rows but not for row 2"),
        ("d.csv", "text,label\n" + "".join(f"word {i},{i / 10}\n" for i in range(9)), [], "use ridge or mlp"),
        ("d.jsonl", '{"text": "A dog", "label": 1}\nnothing\n', [], "line 2 is not JSON"),
        ("d.jsonl", '{"text": "A dog", "label": NaN}\n', [], "line 1 has no label"),
        ("d.csv", "text,label\nA dog, a cat,1\n", [], "line 2 has more cells than the 2 columns"),
        ("d.csv", "text,text,label\nA dog,A cat,1\n", [], "the column text twice"),
        ("d.jsonl", '{"text": ' + "[" * 100_000, [], "line 1 is not usable: its JSON is nested too deeply"),
        ("d.jsonl", '["A dog", 1]\n', [], "line 1 is no object"),
        ("d.txt", "A dog\t1\n", [], "neither .csv, .tsv nor .jsonl"),
    ],
)
def test_bad_input_is_one_sentence(
    name: str, content: str, options: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert main(["probe", "atlas", file(tmp_path, name, content), *options, "--html", str(page)]) == 2
    out, err = capsys.readouterr()
    assert says in err
    assert err.count("\n") == 1
    assert out == ""
    assert not page.exists()


def test_use_without_answers_says_what_to_give(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["probe", "atlas", file(tmp_path, "d.csv", ROWS), "--site", "blocks.0.resid_post", "--draws", "1", "--use"]
    for more, says in (
        ([], "give --answer and --wrong"),
        (["--answer", " yes"], "give --wrong for 'a' too"),
        (["--answer", " yes", "--wrong", " yes"], "begin with the same token"),
        (["--use-site", "blocks.1.resid_post", "--answer", " a", "--wrong", " b"], "not among the sites"),
    ):
        assert main([*words, *more]) == 2
        err = capsys.readouterr().err
        assert says in err
        assert err.count("\n") == 1


def test_rows_of_all_three_formats_are_the_same(tmp_path: Path) -> None:
    wanted: list[dict[str, Any]] = [{"text": "a, b", "label": "1"}, {"text": "c", "label": "0"}]
    for name, content in (
        ("d.csv", '\ufefftext,label\n"a, b",1\nc,0\n'),
        ("d.tsv", "text\tlabel\na, b\t1\nc\t0\n"),
        ("d.jsonl", '{"text": "a, b", "label": "1"}\n\n{"text": "c", "label": "0"}\n'),
    ):
        assert read_rows(Path(file(tmp_path, name, content))) == wanted
