"""What dictionary_learning trains we load, and what we save its loader loads: equal activations and reconstructions."""

from collections.abc import Callable
from pathlib import Path

from peer_dictionaries import assert_read, random_dictionaries, read_all, work, write_all


def test_we_load_what_dictionary_learning_trains(tmp_path: Path, peer: Callable[[str], Path]) -> None:
    """Every class, as its trainer leaves it and with biases scaled; thresholds before their first update (−1) too."""
    work(peer("dictionary_learning"), "dictionary_learning", "make", tmp_path)
    assert read_all(tmp_path, {}) == 20


def test_dictionary_learning_loads_what_we_save(tmp_path: Path, peer: Callable[[str], Path]) -> None:
    """All selectors of dictionaries that write what they read and normalise nothing."""
    python = peer("dictionary_learning")
    dictionaries = {
        name: dictionary
        for name, dictionary in random_dictionaries().items()
        if dictionary.kind == "sae" and dictionary.input_norm is None
    }
    write_all(tmp_path, dictionaries, "dictionary_learning")
    work(python, "dictionary_learning", "read", tmp_path)
    assert_read(tmp_path, dictionaries)
    assert len(dictionaries) == 10
