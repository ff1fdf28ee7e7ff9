"""Text for looking into atlas, as a file that every corpus command reads."""

from pathlib import Path

import pytest

from cutaway.artifacts.errors import CutawayError
from cutaway.data.corpus.documents import documents_of
from cutaway.subjects.atlas.text import library_text, world_text, write_text


def test_the_text_is_the_seeds_and_reads_back(tmp_path: Path) -> None:
    n = write_text(tmp_path / "a" / "text.jsonl", 20_000, seed=1)
    write_text(tmp_path / "again.jsonl", 20_000, seed=1)
    write_text(tmp_path / "other.jsonl", 20_000, seed=2)
    first, again, other = (tmp_path / name for name in ("a/text.jsonl", "again.jsonl", "other.jsonl"))
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()
    read = [document if isinstance(document, str) else document.text for document in documents_of(first)]
    assert len(read) == n
    assert sorted(read) == sorted([*world_text(20_000, "text-1"), *library_text()])
    assert read[: n // 2] != sorted(read)[: n // 2]
    with pytest.raises(CutawayError, match="exists"):
        write_text(first, 20_000, seed=1)


def test_no_stream_of_it_is_that_of_the_training() -> None:
    assert not set(world_text(20_000, "text-0")) & set(world_text(20_000, "0"))
