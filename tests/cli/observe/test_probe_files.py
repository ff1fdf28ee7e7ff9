"""`cutaway probe` on the files people have: other column names, no header, and words with labels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.cli.main import main
from cutaway.data.labelled.rows import read_rows
from cutaway.model.language_model import LanguageModel
from cutaway.observe.probes.words import word_places

QUICK = ["--site", "blocks.0.resid_post", "--draws", "1", "--folds", "3", "--json"]


@pytest.fixture(autouse=True)
def loaded(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutaway, "load", lambda *_, **__: tiny)
    monkeypatch.setenv("CUTAWAY_QUIET", "1")


def file(folder: Path, name: str, content: str) -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


WANTED = [{"text": "a, b", "label": "1"}, {"text": "c", "label": "0"}]


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("d.csv", 'sentence,tag\n"a, b",1\nc,0\n', {"text": "sentence", "label": "tag"}),
        ("d.csv", 'id,label,text\n7,1,"a, b"\n8,0,c\n', {}),
        ("d.csv", 'text,label,other\nx,1,"a, b"\ny,0,c\n', {"text": "other"}),
        ("d.csv", '"a, b",1\nc,0\n', {"text": "1", "label": "2", "header": False}),
        ("d.tsv", "7\t1\ta, b\n8\t0\tc\n", {"text": "3", "label": "2", "header": False}),
        ("d.jsonl", '{"s": "a, b", "l": "1"}\n{"s": "c", "l": "0"}\n', {"text": "s", "label": "l"}),
        ("d.jsonl", '{"words": [], "text": "a, b", "label": "1"}\n{"text": "c", "label": "0"}\n', {}),
    ],
)
def test_columns_by_name_and_by_number(tmp_path: Path, name: str, content: str, options: dict[str, Any]) -> None:
    rows = read_rows(file(tmp_path, name, content), **options)
    assert [{key: row[key] for key in ("text", "label")} for row in rows] == WANTED


SENTENCES = [
    {"words": ["The", "dog", "sleeps"], "labels": ["DET", "NOUN", "VERB"]},
    {"words": ["Go", "#", "“x”"], "labels": ["VERB", "SYM", None]},
]
CONLLU = """# sent_id = 1
# text = The dog sleeps
1\tThe\tthe\tDET\tDT\t_\t2\tdet\t_\t_
2-3\tdogsleeps\t_\t_\t_\t_\t_\t_\t_\t_
2\tdog\tdog\tNOUN\tNN\t_\t3\tnsubj\t_\t_
3\tsleeps\tsleep\tVERB\tVBZ\t_\t0\troot\t_\t_
3.1\tnothing\t_\tVERB\t_\t_\t_\t_\t_\t_

1\tGo\tgo\tVERB\tVB\t_\t0\troot\t_\t_
2\t#\t#\tSYM\tSYM\t_\t1\tobj\t_\t_
3\t“x”\tx\t_\tX\t_\t1\tobj\t_\t_
"""


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("d.jsonl", "\n".join(json.dumps(row) for row in SENTENCES), {}),
        (
            "d.jsonl",
            "\n".join(json.dumps({"tokens": r["words"], "pos": r["labels"]}) for r in SENTENCES),
            {"text": "tokens", "label": "pos"},
        ),
        ("d.conll", "The\tDET\ndog\tNOUN\nsleeps\tVERB\n\n\nGo\tVERB\n#\tSYM\n“x”\t_", {}),
        ("d.bio", "\r\nThe\tDET\r\ndog\tNOUN\r\nsleeps\tVERB\r\n \r\nGo\tVERB\r\n#\tSYM\r\n“x”\t_\r\n", {}),
        (
            "d.conll",
            "-DOCSTART- -X- O\n\nThe DET B\ndog NOUN I\nsleeps VERB O\n\nGo VERB O\n# SYM O\n“x” _ O\n",
            {"label": "2"},
        ),
        (
            "d.conll",
            "DET\t0\tThe\nNOUN\t1\tdog\nVERB\t2\tsleeps\n\nVERB\t0\tGo\nSYM\t1\t#\n_\t2\t“x”\n",
            {"text": "3", "label": "1"},
        ),
        ("d.conllu", CONLLU, {}),
    ],
)
def test_words_with_labels(tmp_path: Path, name: str, content: str, options: dict[str, Any]) -> None:
    rows = read_rows(file(tmp_path, name, content), **options)
    assert [{key: row[key] for key in ("words", "labels")} for row in rows] == SENTENCES


@pytest.mark.parametrize(
    ("name", "content", "options", "says"),
    [
        ("d.csv", "a,b\n", {}, "--no-header"),
        ("d.csv", "text,tag\na,b\n", {"label": "tags"}, "it lacks tags"),
        ("d.csv", "a,1\n", {"header": False}, "give --text-column as one"),
        ("d.csv", "a,1\n", {"header": False, "text": "1"}, "give --label-column as one"),
        ("d.csv", "a,1\n", {"header": False, "text": "0", "label": "2"}, "not '0'"),
        ("d.csv", "a,1\n", {"header": False, "text": "1", "label": "3"}, "has 2 columns, and none with the number 3"),
        ("d.csv", "a,1\nb, c,0\n", {"header": False, "text": "1", "label": "2"}, "line 2 has more cells"),
        ("d.csv", "a,1\nb\n", {"header": False, "text": "1", "label": "2"}, "line 2 has no label"),
        ("d.jsonl", "{}", {"header": False}, "--no-header is of .csv and .tsv"),
        ("d.jsonl", '{"text": "a", "label": 1}', {"text": "s"}, "no 's', which --text-column names"),
        ("d.jsonl", '{"words": ["a", 3], "labels": [1, 2]}', {}, "line 1: 'words' is not a list of words"),
        ("d.jsonl", '{"words": ["a", "b"], "labels": [1]}', {}, "not a list of 2 labels"),
        ("d.jsonl", '{"words": ["a", "b"], "labels": [1, [2]]}', {}, "is no label"),
        ("d.jsonl", '{"words": ["a"], "labels": [1]}\n{"text": "a", "label": 1}', {}, "line 2 has no list of words"),
        ("d.conll", "The\tDET\ndog\n", {}, "line 2 has 1 columns"),
        ("d.conll", "The\tDET\tx\n", {}, "say with --label-column"),
        ("d.conll", "The\t\n", {}, "line 1 has no label"),
        ("d.conll", "The\tDET\n", {"label": "tag"}, "have no names; give a number"),
        ("d.conll", "\n\n", {}, "has no rows"),
        ("d.txt", "The\tDET\n", {}, "as .conll"),
    ],
)
def test_bad_files_are_one_sentence(
    tmp_path: Path, name: str, content: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(CutawayError) as caught:
        read_rows(file(tmp_path, name, content), **options)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def sentences(n: int = 24) -> list[list[str]]:
    rng = np.random.default_rng(0)
    return [[f"w{i}" for i in rng.integers(2, 40, 6)] for _ in range(n)]


def test_a_tokenizer_that_drops_the_blanks(tiny: LanguageModel) -> None:
    """Its tokens do not spell the text again: the tokenizer is asked which characters each is."""
    sentences = [["w5", "w6", "w5"], ["w9"]]
    assert word_places(tiny, tiny.tokens([" ".join(words) for words in sentences]), sentences) == [[0, 1, 2], [0]]


def test_the_command_on_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both forms give the same figures; a tag too rare for the folds is left out and said."""
    tag = {word: ("low", "high")[int(word[1:]) > 20] for words in sentences() for word in words}
    rows = [{"words": words, "labels": [tag[word] for word in words]} for words in sentences()]
    rows[3]["labels"][2] = "odd"
    lines = "\n\n".join("\n".join(f"{w}\t{t}" for w, t in zip(r["words"], r["labels"], strict=True)) for r in rows)
    found = []
    for name, content in (("w.jsonl", "\n".join(map(json.dumps, rows))), ("w.conll", lines)):
        assert main(["probe", "tiny", str(file(tmp_path, name, content)), *QUICK]) == 0
        out, err = capsys.readouterr()
        assert "left out: odd (1)" in err
        found.append(json.loads(out)["figures"]["sweep"])
        for row in found[-1]["rows"]:
            row["effect"].pop("command")
            row["accuracy"].pop("command")
        found[-1]["picked"].pop("command")
    assert found[0] == found[1]
    assert found[0]["position"] == "words"
    assert found[0]["n"] == 24 * 6 - 1
    assert found[0]["groups"] == 24
    for more in (["--use", "--answer", " a"], ["--position", "mean"]):
        assert main(["probe", "tiny", str(tmp_path / "w.conll"), *QUICK, *more]) == 2
        assert "has a label for each word" in capsys.readouterr().err


def test_the_command_on_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(" ".join(words), "a" if int(words[-1][1:]) > 20 else "b") for words in sentences(40)]
    plain = file(tmp_path, "a.csv", "text,label\n" + "\n".join(",".join(row) for row in rows))
    bare = file(tmp_path, "b.tsv", "\n".join(f"{label}\t{text}" for text, label in rows))
    values = []
    for arguments in ([str(plain)], [str(bare), "--text-column", "2", "--label-column", "1", "--no-header"]):
        assert main(["probe", "tiny", *arguments, *QUICK]) == 0
        found = json.loads(capsys.readouterr().out)["figures"]["sweep"]
        values.append(found["rows"][0]["effect"]["value"])
        assert " ".join(arguments[1:]) in found["rows"][0]["effect"]["command"]
    assert values[0] == values[1]
