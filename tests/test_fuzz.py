"""A few mutations of every kind of file that is read; `make fuzz` makes 250 of each."""

import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

import fuzz  # noqa: E402
from fuzz_mutations import mutate  # noqa: E402
from fuzz_readers import READERS, Reader  # noqa: E402

from cutaway.artifacts.errors import CutawayError  # noqa: E402

MUTATIONS = 8
SLOW = ("model folder", "adapter")


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTAWAY_QUIET", "1")


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_a_spoiled_file_is_read_or_refused_in_one_sentence(reader: Reader, tmp_path: Path) -> None:
    count = fuzz.fuzz(reader, 3 if reader.name in SLOW else MUTATIONS, seed=7, keep=tmp_path)
    why = [(kept / "failure.txt").read_text(encoding="utf-8", errors="replace") for kept in count.kept]
    assert not why, "\n\n".join(why)
    assert count.found["refused"] > 0 or reader.name in SLOW


def test_failures_are_seen_and_kept(tmp_path: Path) -> None:
    """A reader that fails in each of the ways there are, by the first byte of what it reads."""

    def read(folder: Path) -> None:
        data = (folder / "a.json").read_bytes()
        if not data:
            raise CutawayError("empty")
        if data[0] % 4 == 1:
            raise KeyError("raw")
        if data[0] % 4 == 2:
            sys.exit(1)
        while data[0] % 4 == 0:
            pass

    def make(folder: Path) -> None:
        (folder / "a.json").write_bytes(b"{}" + bytes(60))

    before, fuzz.SECONDS = fuzz.SECONDS, 0.05
    try:
        count = fuzz.fuzz(Reader("a bad reader", make, lambda folder: read(folder)), 60, seed=0, keep=tmp_path)
    except KeyError:
        pytest.fail("the good file is read")
    finally:
        fuzz.SECONDS = before
    assert count.found["raw"] > 0
    assert count.found["hangs"] > 0
    assert count.found["refused"] > 0
    assert len(count.kept) == count.found["raw"] + count.found["hangs"] == len(list(tmp_path.iterdir()))
    told = [(kept / "failure.txt").read_text() for kept in count.kept]
    assert any("KeyError: 'raw'" in text for text in told)
    assert any("exit code 1" in text for text in told)
    assert any("TooSlow" in text for text in told)


def test_mutations_are_the_same_for_a_seed_and_of_every_kind() -> None:
    import random

    whole = b'{"a": [1, 2.5, "text"], "b": {"c": null}}'
    made = [mutate(random.Random(i), ".json", whole) for i in range(400)]
    assert made == [mutate(random.Random(i), ".json", whole) for i in range(400)]
    kinds = Counter(how for how, _ in made)
    assert kinds["value in .json"] > 150
    assert len(kinds) == 13
    assert sum(data != whole for _, data in made) > 370
