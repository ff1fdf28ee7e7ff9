"""What SAELens saves we load, and what we save SAELens loads: equal activations, equal reconstructions."""

import json
from collections.abc import Callable
from pathlib import Path

from peer_dictionaries import assert_read, random_dictionaries, read_all, work, write_all

# SAELens normalises what a skip transcoder encodes, and not what its skip connection reads
REFUSED = {
    f"{kind}skip_transcoder-{norm}": "skip connection"
    for kind in ("", "jumprelu_")
    for norm in ("layer_norm", "constant_norm_rescale")
}


def test_we_load_what_saelens_saves(tmp_path: Path, peer: Callable[[str], Path]) -> None:
    """Every architecture with every normalisation, training checkpoints, and the flat settings of versions 4 and 5."""
    work(peer("saelens"), "saelens", "make", tmp_path)
    assert read_all(tmp_path, REFUSED) == 93 - len(REFUSED)


def test_saelens_loads_what_we_save(tmp_path: Path, peer: Callable[[str], Path]) -> None:
    """All that it has an architecture for; it has no TopK or gated transcoders."""
    python = peer("saelens")
    dictionaries = {
        name: dictionary
        for name, dictionary in random_dictionaries().items()
        if "transcoder" not in name or name.startswith(("relu", "jumprelu", "batchtopk"))
    }
    write_all(tmp_path, dictionaries, "saelens")
    work(python, "saelens", "read", tmp_path)
    assert_read(tmp_path, dictionaries)
    assert len(dictionaries) == 26
    known = {
        "topk": ["topk", "gpt2", "blocks.3.hook_resid_post", None],
        "batchtopk": ["jumprelu", "gpt2", "blocks.3.hook_resid_post", None],
        "relu-skip_transcoder": ["skip_transcoder", "gpt2", "blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out"],
    }
    assert {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in known} == known
