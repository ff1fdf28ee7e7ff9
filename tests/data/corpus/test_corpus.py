"""Texts to documents, documents to rows of tokens, rows to a split."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cutaway.artifacts.errors import CutawayError
from cutaway.data.corpus.corpus import corpus_hash, read_corpus, rows_hash, split_rows, token_rows

BOS = 0


def words(texts: list[str], **_: object) -> dict[str, list[list[int]]]:
    """A tokenizer: the word "w7" is token 7."""
    return {"input_ids": [[int(word[1:]) for word in text.split()] for text in texts]}


class WordTokenizer:
    eos_token_id = 99

    def __call__(self, texts: list[str], **options: object) -> dict[str, list[list[int]]]:
        assert options["add_special_tokens"] is False
        return words(texts)


@dataclass
class TinyModel:
    bos_id: int | None = BOS
    name: str = "tiny"
    tokenizer: WordTokenizer = field(default_factory=WordTokenizer)
    context_length: int = 64


def model(bos_id: int | None = BOS) -> TinyModel:
    return TinyModel(bos_id)


def numbered(n_documents: int, length: int) -> list[str]:
    return [" ".join(f"w{1 + (13 * d + 7 * i + i * i * d) % 90}" for i in range(length)) for d in range(n_documents)]


def test_documents_of_each_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufefffirst\nline two\n\n \nsecond ü\r\n\r\nthird\n".encode())
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.py").write_text("x = 1\n\n\ny = 2\n")
    (tmp_path / "deep" / "c.md").write_text("# T\n\ntext\n")
    (tmp_path / "deep" / "d.jsonl").write_text(json.dumps({"text": "one\n\nstill one"}) + "\n\n" + '{"text": "two"}\n')
    (tmp_path / "deep" / "e.png").write_bytes(b"\x89PNG")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "f.txt").write_text("hidden")
    corpus = read_corpus(tmp_path)
    assert corpus.documents == (
        "first\nline two",
        "second ü",
        "third",
        "x = 1\n\n\ny = 2\n",
        "# T\n\ntext\n",
        "one\n\nstill one",
        "two",
    )
    assert corpus.hash == corpus_hash(corpus.documents)
    assert read_corpus(tmp_path / "a.txt").documents == corpus.documents[:3]
    assert corpus_hash(["ab", "c"]) != corpus_hash(["a", "bc"])
    assert corpus_hash(["b", "a"]) != corpus_hash(["a", "b"])


def test_bad_input_is_named(tmp_path: Path) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(CutawayError, match=r"latin.txt is not UTF-8: byte 3 is 0xe9; .*iconv"):
        read_corpus(latin)
    with pytest.raises(CutawayError, match="does not exist"):
        read_corpus(tmp_path / "absent.txt")
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n\n\t\n")
    with pytest.raises(CutawayError, match="holds no text"):
        read_corpus(empty)
    folder = tmp_path / "pictures"
    folder.mkdir()
    with pytest.raises(CutawayError, match=r"holds no \.txt"):
        read_corpus(folder)
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(CutawayError, match=r'lines.jsonl, line 2, is not an object with a "text"'):
        read_corpus(lines)
    lines.write_text('{"text": "\\ud800"}\n')
    with pytest.raises(CutawayError, match="line 1, holds half of a surrogate pair"):
        read_corpus(lines)
    lines.write_text("{\n")
    with pytest.raises(CutawayError, match="line 1, is not JSON"):
        read_corpus(lines)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    context=st.integers(2, 16),
    bos=st.sampled_from([None, BOS]),
    seed=st.integers(0, 5),
)
@settings(max_examples=80)
def test_rows_are_the_joined_documents_cut(lengths: list[int], context: int, bos: int | None, seed: int) -> None:
    documents = [" ".join(f"w{1 + (7 * d + i) % 90}" for i in range(length)) for d, length in enumerate(lengths)]
    if sum(lengths) + len(lengths) < 2 * context:  # so short that it may not fill a row
        documents *= 20
        documents = [f"w{1 + place} {document}" for place, document in enumerate(documents[: 2 * context])]
    rows = token_rows(model(bos), documents, context, seed)
    assert rows.dtype == torch.int64
    assert rows.shape[1] == context
    assert len({tuple(row) for row in rows.tolist()}) == len(rows)
    separator = 99 if bos is None else bos
    if bos is not None:
        assert (rows[:, 0] == bos).all()
        assert (rows[:, 1] != bos).all()  # never two at the start
    pieces = {tuple(words([document])["input_ids"][0]) for document in documents}
    for row in rows.tolist():  # between two separators there is a whole document
        inside = " ".join(map(str, row[1:] if bos is not None else row)).split(f" {separator} ")
        for whole in inside[1:-1]:
            assert tuple(map(int, whole.split())) in pieces


def test_rows_are_seeded_limited_and_lose_nothing() -> None:
    documents = numbered(40, 23)
    rows = token_rows(model(), documents, 12, seed=3)
    assert torch.equal(rows, token_rows(model(), documents, 12, seed=3))
    assert not torch.equal(rows, token_rows(model(), documents, 12, seed=4))
    assert torch.equal(token_rows(model(), documents, 12, seed=3, limit=5), rows[:5])
    tokens = sum(len(words([document])["input_ids"][0]) for document in documents)
    kept = int((rows[:, 1:] != BOS).sum())
    assert tokens - 12 < kept <= tokens
    assert rows_hash(rows) != rows_hash(rows.flip(0))


def test_repeated_text_gives_each_row_once() -> None:
    rows = token_rows(model(), ["w1 w2 w3"] * 50, 5)
    assert len({tuple(row) for row in rows.tolist()}) == len(rows)


def test_the_split_is_disjoint_and_whole() -> None:
    rows = token_rows(model(), numbered(60, 30), 10)
    split = split_rows(rows, held_out=20, seed=1)
    train, held = ({tuple(row) for row in part.tolist()} for part in (split.train, split.held_out))
    assert len(held) == 20
    assert not train & held
    assert train | held == {tuple(row) for row in rows.tolist()}
    for number in (0, len(rows)):
        with pytest.raises(CutawayError, match="cannot be held out"):
            split_rows(rows, held_out=number)


def test_contexts_that_do_not_fit() -> None:
    with pytest.raises(CutawayError, match="longer than the 64"):
        token_rows(model(), ["w1"], 65)
    with pytest.raises(CutawayError, match="at least 2"):
        token_rows(model(), ["w1"], 1)
    with pytest.raises(CutawayError, match="too few for one row"):
        token_rows(model(), ["w1 w2"], 8)
