"""Separators between documents: cut as a whole text is cut by hand, part of what a run is, noticed when forgotten."""

import json
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.cli.main import main
from cutaway.data.corpus import documents as module
from cutaway.data.corpus.corpus import read_corpus, token_rows
from cutaway.data.corpus.documents import documents_of
from cutaway.data.corpus.separators import Marks
from cutaway.data.corpus.training_rows import training_rows
from cutaway.data.harvesting.harvest import harvest
from cutaway.data.harvesting.store import Store
from cutaway.model.language_model import LanguageModel

STORIES = "One day.\n\nShe ran.\n<|endoftext|>\nHe sat.\n\nThe end.<|endoftext|>\n \n<|endoftext|>\n\nLast."
SITE = "blocks.0.resid_post"


def by_hand(text: str, separator: str) -> list[str]:
    """The obvious version: the whole text, character by character, or line by line."""
    text = text.replace("\r\n", "\n")
    if separator.startswith("<") or "\n" in separator:
        found, begin, i = [], 0, 0
        while i < len(text):
            if text[i : i + len(separator)] == separator:
                found.append(text[begin:i])
                begin = i = i + len(separator)
            else:
                i += 1
        found.append(text[begin:])
    else:
        found = [""]
        for line in text.split("\n"):
            if line.strip() == separator:
                found.append("")
            else:
                found[-1] += line + "\n"
    return [document.strip("\n") for document in found if document.strip()]


@given(
    parts=st.lists(
        st.sampled_from(["\n", "\n\n", "\r\n", "\r", " ", "a", "---", "-", "<|endoftext|>", "<|end", "\n\n\n"]),
        max_size=30,
    ),
    piece=st.integers(1, 9),
    separator=st.sampled_from(["<|endoftext|>", "---", "\n\n\n"]),
)
@settings(max_examples=200)
def test_a_file_is_cut_as_the_whole_text_is(
    tmp_path_factory: Any, parts: list[str], piece: int, separator: str
) -> None:
    text = "".join([*parts, "x\n", separator, "\ny"])
    file = tmp_path_factory.getbasetemp() / "separated.txt"
    file.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE", piece)
        assert list(documents_of(file, document_separator=separator)) == by_hand(text, separator)


def test_it_cuts_every_kind_of_corpus(tmp_path: Path) -> None:
    expected = ["One day.\n\nShe ran.", "He sat.\n\nThe end.", "Last."]
    (tmp_path / "a.txt").write_text(STORIES)
    (tmp_path / "b.md").write_text(STORIES)
    (tmp_path / "c.jsonl").write_text(json.dumps({"story": STORIES}) + "\n")
    pq.write_table(pa.table({"story": [STORIES]}), tmp_path / "d.parquet")
    for corpus in (*sorted(tmp_path.iterdir()), [STORIES], ({"story": text} for text in [STORIES])):
        found = documents_of(corpus, field="story", document_separator="<|endoftext|>")
        assert list(found) == expected
    assert read_corpus(tmp_path / "a.txt", document_separator="<|endoftext|>").documents == tuple(expected)
    assert len(read_corpus(tmp_path / "a.txt").documents) == 5  # at blank lines, the marks within


@pytest.mark.parametrize(
    ("separator", "said"),
    [("", "is empty"), ("  ", "is empty"), ("***", "on a line of its own, stands nowhere"), ("</s>", "stands nowhere")],
)
def test_one_that_cuts_nothing_is_refused(tmp_path: Path, separator: str, said: str) -> None:
    (tmp_path / "a.txt").write_text(STORIES + "\nnot ***\n")
    with pytest.raises(CutawayError, match=said.replace("*", r"\*")):
        list(documents_of(tmp_path / "a.txt", document_separator=separator))


# Part of what a run is ----------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Documents of words; "---" and "===" both stand between some, so that either cuts."""
    path = tmp_path / "words.txt"
    lines = [" ".join(f"w{2 + (7 * i + j * j) % 59}" for j in range(12)) for i in range(60)]
    path.write_text("\n".join(f"{line}\n{('---', '===', '')[i % 3]}" for i, line in enumerate(lines)))
    return path


def test_a_harvest_with_another_separator_is_another(tiny: LanguageModel, corpus: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"out": tmp_path / "h", "context": 16}
    made = harvest(tiny, documents_of(corpus, document_separator="---"), SITE, **options)
    assert made.manifest.configuration["document_separator"] == "---"
    by_lists = harvest(tiny, by_hand(corpus.read_text(), "---"), SITE, context=16)
    assert torch.equal(made[:].token, by_lists[:].token)
    assert torch.equal(made[:].document, by_lists[:].document)
    assert len(harvest(tiny, documents_of(corpus, document_separator="---"), SITE, **options)) == len(made)  # goes on
    for other in ("===", None):
        with pytest.raises(CutawayError, match="holds another harvest: its document separator is ---"):
            harvest(tiny, documents_of(corpus, document_separator=other), SITE, **options)
    with pytest.raises(CutawayError, match="a document is a text"):
        harvest(tiny, documents_of(cast(Any, [[2, 3, 4]]), document_separator="---"), SITE)


def test_the_commands_take_it(
    tiny: LanguageModel,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cutaway, "load", lambda *_, **__: tiny)
    words = ["harvest", "tiny", "--corpus", str(corpus), "--site", SITE, "--context", "16"]
    assert main([*words, "--out", str(tmp_path / "h"), "--document-separator", "---"]) == 0
    assert Store.open(tmp_path / "h").manifest.configuration["document_separator"] == "---"
    small = ["--context", "16", "--batch", "64", "--tokens", "640", "--d-sae", "32", "--set", "sample=64"]
    train = ["train", "tiny", "--corpus", str(corpus), "--site", SITE, "--out", str(tmp_path / "t"), *small]
    assert main([*train, "--document-separator", "==="]) == 0
    assert 'document_separator = "==="' in (tmp_path / "t" / "recipe.toml").read_text()
    assert main([*train, "--document-separator", "==="]) == 0
    capsys.readouterr()
    for other in (["--document-separator", "---"], []):
        assert main([*train, *other]) == 2
        assert str(tmp_path / "t") in capsys.readouterr().err
    assert main(["train", str(tmp_path / "h"), "--site", SITE, "--document-separator", "-", "--dry-run"]) == 2


# Noticed when forgotten ---------------------------------------------------------------------------------------------


class Characters:
    """A tokenizer of characters: it spells out what others know as a token."""

    def __init__(self, *known: str) -> None:
        self.all_special_tokens = list(known)


def warned(capsys: pytest.CaptureFixture[str], texts: list[str], *known: str) -> str:
    marks = Marks(Characters(*known), "a.txt")
    for text in texts:
        marks.see(text)
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("texts", "mark"),
    [
        (["a\n<|endoftext|>\nb"], "<|endoftext|>"),
        (["a story.<|endoftext|>"], "<|endoftext|>"),
        (["</s>"], "</s>"),
        (["a\n <EOS> \nb"], "<EOS>"),
        (["---"] * 3, "---"),
        (["a.\n---\nb.\n---\nc.\n---\nd"], "---"),
        (["a\n\n* * *\n\nb", "* * *", "c\n\n* * *"], "* * *"),
    ],
)
def test_lines_that_look_like_separators_are_said_once(
    capsys: pytest.CaptureFixture[str], texts: list[str], mark: str
) -> None:
    err = warned(capsys, [*texts, *texts])
    assert err.count("\n") == 1
    assert f"lines of a.txt look like marks between documents: {mark!r}" in err
    assert f"--document-separator {mark!r}" in err
    assert warned(capsys, [*texts, *texts], mark) == "" or mark[0] != "<"  # the tokenizer's own


@pytest.mark.parametrize(
    "texts",
    [
        ["a < b and <b>bold</b>", "x[0] = [END, 1]", "the token <|endoftext|> ends a text"],
        ["Title\n-----\n\ntext", "Other\n-----\ntext", "Third\n-----\ntext"],  # headings
        ["=====\nTitle\n=====\n\ntext"] * 4,
        ["---"] * 2,  # an ornament
        ["-- not --", "a-b-c", "--"] * 4,
    ],
)
def test_other_lines_are_not(capsys: pytest.CaptureFixture[str], texts: list[str]) -> None:
    assert warned(capsys, texts) == ""


def test_every_way_to_rows_looks(tiny: LanguageModel, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a harvest with two passes too, once."""
    from cutaway.data.harvesting.settings import Rules

    texts = [f"w{2 + i % 50} w{3 + i % 50} w4 w5 w6 w7 w8 w9\n<|endoftext|>\nw5 w6 w7 w8" for i in range(20)]
    made = {
        "harvest": lambda: harvest(tiny, texts, SITE, context=8, rules=Rules(high_norm=50.0)),
        "token_rows": lambda: token_rows(tiny, texts, context=8),
        "training_rows": lambda: training_rows(tiny, iter(texts), context=8, tokens=200),
    }
    for name, make in made.items():
        make()
        assert capsys.readouterr().err.count("<|endoftext|>'") == 2, name
    harvest(tiny, documents_of(texts, document_separator="<|endoftext|>"), SITE, context=8)
    assert "endoftext" not in capsys.readouterr().err


def test_stories_of_another_tokenizer(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """TinyStories between marks, read by a model that spells them out: noticed, and cut where the stories end."""
    lm = cutaway.load(str(shared / "models" / "stories260K"))
    path = shared / "corpora" / "tinystories_1000.txt"
    token_rows(lm, read_corpus(path).documents, 128, limit=20)
    assert "--document-separator '<|endoftext|>'" in capsys.readouterr().err
    stories = read_corpus(path, document_separator="<|endoftext|>").documents
    assert len(stories) == 1000
    assert any("\n\n" in story for story in stories)
    token_rows(lm, stories, 128, limit=20)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["attribute", "atlas", "The end"],
        ["lens", "atlas", "The end"],
        ["heads", "atlas"],
        ["tour", "atlas"],
        ["dictionary", "inspect", "nothing"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_separator_without_a_corpus_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--document-separator", "---"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "document" in err
    assert "separator" in err
