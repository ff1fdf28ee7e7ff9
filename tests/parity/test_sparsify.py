"""What sparsify saves we load, and what we save sparsify loads: equal activations, equal reconstructions."""

from collections.abc import Callable
from pathlib import Path

import pytest
from peer_dictionaries import OUT, assert_read, random_dictionaries, read_all, work, write_all

import cutaway.dictionaries
from cutaway.artifacts.errors import CutawayError


def test_we_load_what_sparsify_saves(tmp_path: Path, peer: Callable[[str], Path]) -> None:
    work(peer("sparsify"), "sparsify", "make", tmp_path)
    assert read_all(tmp_path, {"groupmax": "groupmax"}) == 7


def test_sparsify_loads_what_we_save(tmp_path: Path, peer: Callable[[str], Path]) -> None:
    """It has TopK alone, and one width for what is read and what is written."""
    python = peer("sparsify")
    kept = {name: dictionary for name, dictionary in random_dictionaries().items() if name in ("topk", "topk-no-b_dec")}
    write_all(tmp_path, kept, "sparsify")
    work(python, "sparsify", "read", tmp_path)
    assert_read(tmp_path, kept)


@pytest.mark.parametrize("name", ["relu", "jumprelu", "gated", "topk-layer_norm", "topk-transcoder"])
def test_what_sparsify_has_no_name_for_is_refused(tmp_path: Path, name: str) -> None:
    dictionary = random_dictionaries()[name]
    assert name != "topk-transcoder" or dictionary.d_out == OUT
    with pytest.raises(CutawayError):
        cutaway.dictionaries.save(dictionary, tmp_path / name, format="sparsify")
    assert not (tmp_path / name).exists()
