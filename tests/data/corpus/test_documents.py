"""Documents as a stream: the same as reading whole files, from every kind of source, and clear where there is none."""

import builtins
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutaway.artifacts.errors import CutawayError
from cutaway.data.corpus import documents as module
from cutaway.data.corpus.corpus import read_corpus
from cutaway.data.corpus.documents import documents_of, file_documents


def whole_file(data: bytes) -> list[str]:
    """The obvious version: decode everything, cut everything."""
    text = data.decode("utf-8-sig").replace("\r\n", "\n")
    return [piece.strip("\n") for piece in re.split(r"\n[ \t]*\n\s*", text) if piece.strip()]


@given(
    parts=st.lists(
        st.sampled_from(["\n", "\n", "\n\n", " ", "\t", "\r\n", "\r", "a", "über", "\u00a0", "\f"]), max_size=40
    ),
    piece=st.integers(1, 9),
    mark=st.booleans(),
)
@settings(max_examples=200)
def test_paragraphs_are_the_same_however_the_file_is_cut(
    tmp_path_factory: Any, parts: list[str], piece: int, mark: bool
) -> None:
    data = ("\ufeff" * mark + "".join(parts)).encode()
    file = tmp_path_factory.getbasetemp() / "some.txt"
    file.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE", piece)
        assert list(file_documents(file)) == whole_file(data)


@pytest.mark.parametrize("piece", [1, 2, 7, 1 << 20])
def test_a_byte_that_is_not_utf8_is_found_wherever_the_pieces_end(
    tmp_path: Path, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PIECE", piece)
    for suffix in (".txt", ".md", ".jsonl"):
        file = tmp_path / f"a{suffix}"
        file.write_bytes("ü".encode() * 5 + b"\xff rest\n")
        with pytest.raises(CutawayError, match="is not UTF-8: byte 10 is 0xff"):
            list(file_documents(file))
        file.write_bytes("ü".encode() + b"\xc3")  # cut in the middle of a letter
        with pytest.raises(CutawayError, match="is not UTF-8: byte 2 is 0xc3"):
            list(file_documents(file))


def test_only_a_piece_of_a_file_is_in_memory(tmp_path: Path) -> None:
    import tracemalloc

    file = tmp_path / "long.txt"
    with open(file, "w") as out:
        for number in range(400_000):
            out.write(f"paragraph {number} of a long file\n\n")
    tracemalloc.start()
    n = sum(1 for _ in file_documents(file))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 400_000
    assert file.stat().st_size > 12_000_000
    assert peak < 5_000_000


def test_parquet(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(700)]
    pq.write_table(pa.table({"text": [*texts, None], "other": list(range(701))}), tmp_path / "a.parquet")
    assert list(documents_of(tmp_path)) == texts
    assert read_corpus(tmp_path / "a.parquet").documents == tuple(texts)
    with pytest.raises(CutawayError, match="no column 'body'; it has text, other"):
        list(documents_of(tmp_path, field="body"))
    with pytest.raises(CutawayError, match=r"'other' .* holds int64, not text"):
        list(documents_of(tmp_path, field="other"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(CutawayError, match="cannot be read as Parquet"):
        list(documents_of(tmp_path))


def test_iterables_of_texts_and_of_records() -> None:
    assert list(documents_of(["a", "b"])) == ["a", "b"]
    assert list(documents_of([{"body": "a"}, {"body": "b"}], field="body")) == ["a", "b"]
    again = documents_of(lambda: (f"{i}" for i in range(3)))
    assert list(again) == list(again) == ["0", "1", "2"]
    assert documents_of(["a"]).fingerprint != documents_of(["b"]).fingerprint

    def once() -> Iterator[str]:
        yield "a"

    source = documents_of(once())
    assert list(source) == ["a"]
    with pytest.raises(CutawayError, match="only once"):
        list(source)
    with pytest.raises(CutawayError, match="no text in 'text'"):
        list(documents_of([{"body": "a"}]))
    with pytest.raises(CutawayError, match="Document 1 of list is int"):
        list(documents_of(cast(Any, ["a", 3])))
    with pytest.raises(CutawayError, match="not a float"):
        documents_of(cast(Any, 0.5))


def test_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"text": ["a", "b"], "body": ["c", "d"]})
    assert list(documents_of(made)) == ["a", "b"]
    assert list(documents_of(made, field="body")) == ["c", "d"]
    assert documents_of(made).fingerprint is not None
    assert list(documents_of(made.to_iterable_dataset())) == ["a", "b"]
    several = datasets.DatasetDict({"train": made, "test": made.select([1])})
    assert list(documents_of(several, split="test")) == ["b"]
    with pytest.raises(CutawayError, match="no split 'dev'; it has train, test"):
        documents_of(several, split="dev")
    (tmp_path / "set").mkdir()
    made.to_parquet(str(tmp_path / "set" / "train.parquet"))
    assert list(documents_of(f"hub:{tmp_path / 'set'}")) == ["a", "b"]
    with pytest.raises(CutawayError, match=r"The data set .* cannot be loaded"):
        documents_of(f"hub:{tmp_path / 'none'}")


def test_without_the_library_a_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(CutawayError, match=r"takes the library datasets.*pip install"):
        documents_of("hub:some/set")


def test_the_fingerprint_of_files_changes_with_them(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a"}))
    before = documents_of(tmp_path)
    assert before.size == (tmp_path / "a.jsonl").stat().st_size
    (tmp_path / "b.txt").write_text("b")
    assert documents_of(tmp_path).fingerprint != before.fingerprint
