"""What SAELens saves we load, and what we save SAELens loads: equal activations, equal reconstructions."""

import json
from collections.abc import Callable
from pathlib import Path

from peer_dictionaries import OUT, D, F, assert_read, random_dictionaries, read_all, work, write_all, write_one

from cutaway.dictionaries.formats.files import Format

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


def test_saelens_converts_what_we_write_in_other_formats(tmp_path: Path, peer: Callable[[str], Path]) -> None:
    """By its importers of Gemma Scope 1 and 2, dictionary_learning, and transcoders as circuit-tracer has them.

    Its importer of sparsify is left out: it transposes W_dec, which sparsify stores as SAELens does.
    """
    python = peer("saelens")
    ours = random_dictionaries()
    size: dict[str, object] = {"d_in": D, "d_sae": F}
    scope, second = "gemma_2_sae_huggingface_loader", "gemma_3_sae_huggingface_loader"
    learned = "dictionary_learning_sae_huggingface_loader_1"
    cases: dict[str, tuple[str, Format, str, str, str, dict[str, object]]] = {}
    for name in ("jumprelu", "jumprelu-no-b_dec", "batchtopk", "relu"):
        place = f"layer_3/width_16k/average_l0_{len(cases) + 1}"
        cases[f"scope-{name}"] = (name, "gemma-scope", scope, "google/gemma-scope-2b-pt-res", place, size)
        place = f"resid_post/layer_3_width_16k_l0_{name}"
        cases[f"second-{name}"] = (name, "gemma-scope-2", second, "google/gemma-scope-2-1b-pt", place, {})
    for name in ("jumprelu-transcoder", "batchtopk-transcoder"):
        place = f"layer_3/width_16k/average_l0_{len(cases) + 1}"
        repository, importer = "google/gemma-scope-2b-pt-transcoders", "gemma_2_transcoder_huggingface_loader"
        cases[f"scope-{name}"] = (name, "gemma-scope", importer, repository, place, {**size, "d_out": OUT})
        for kind in ("transcoder", "skip_transcoder"):
            other = name.replace("transcoder", kind)
            place = f"transcoder/layer_3_width_16k_{other}"
            cases[f"second-{other}"] = (other, "gemma-scope-2", second, "google/gemma-scope-2-1b-pt", place, {})
    for name in ("topk", "batchtopk", "jumprelu", "gated"):
        cases[f"learned-{name}"] = (name, "dictionary_learning", learned, "someone/saes", f"trainer_{name}", {})
    tracer = "mwhanna_transcoder_huggingface_loader"
    place = "layer_3.safetensors"
    cases["tracer"] = ("relu-transcoder", "circuit-tracer", tracer, "someone/transcoders", place, {"d_out": OUT})
    for case, (name, format, _, repository, place, _) in cases.items():
        folder = tmp_path / repository / ("" if format == "circuit-tracer" else place)
        write_one(tmp_path, case, folder, ours[name], format)
    wandb = {"d_model": {"value": D}, "d_feature": {"value": F}, "batch_size": {"value": 1}}
    (tmp_path / "someone/transcoders/wandb-config.yaml").write_text(json.dumps(wandb))
    (tmp_path / "convert.json").write_text(json.dumps({case: what[2:] for case, what in cases.items()}))
    work(python, "saelens", "convert", tmp_path)
    assert_read(tmp_path, {case: ours[what[0]] for case, what in cases.items()})
    assert len(cases) == 19
