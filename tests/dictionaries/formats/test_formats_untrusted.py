"""Files that nobody vouches for: spoiled, truncated, oversized, malicious; and addresses on the hub."""

import io
import json
import os
import pickle
import random
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.dictionaries.dictionary import Dictionary, JumpReLU, TopK
from cutaway.dictionaries.formats.files import Format, load, load_all, save
from cutaway.dictionaries.formats.hooks import hook_name, site_name

D, F = 6, 20


def dictionary(*, jump: bool = False) -> Dictionary:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    selector = JumpReLU(draw(F).abs()) if jump else TopK(3)
    return Dictionary(
        draw(D, F), draw(F), draw(F, D), draw(D), selector, "blocks.3.resid_post",
        {"id": "tiny", "revision": None, "weight_hash": None},
    )  # fmt: skip


def refused(path: Path, match: str) -> None:
    with pytest.raises(CutawayError, match=match) as caught:
        load(path)
    assert "\n" not in str(caught.value)


class Bomb:
    """What runs when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self.target}",)

    def __init__(self, target: Path) -> None:
        self.target = target


def test_saelens_files_that_are_spoiled_are_refused_with_their_name(tmp_path: Path) -> None:
    folder = save(dictionary(), tmp_path / "dictionary")
    weights, cfg_file = folder / "sae_weights.safetensors", folder / "cfg.json"
    good, cfg = load_file(weights), json.loads(cfg_file.read_text())
    data = weights.read_bytes()
    weights.write_bytes(data[:-100])
    refused(folder, "sae_weights.safetensors is cut short")
    weights.write_bytes(b"")
    refused(folder, "sae_weights.safetensors is cut short")
    weights.write_bytes(struct.pack("<Q", 1 << 60) + data[8:])  # a header longer than any file
    refused(folder, "sae_weights.safetensors is cut short or not a safetensors file")
    header = {"W_enc": {"dtype": "F32", "shape": [1 << 30, 1 << 30], "data_offsets": [0, 4 << 60]}}
    text = json.dumps(header).encode()
    weights.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 64)  # a shape that no file fills
    refused(folder, "sae_weights.safetensors is cut short or not a safetensors file")
    save_file({name: tensor for name, tensor in good.items() if name != "b_dec"}, weights)
    refused(folder, "lacks b_dec; it holds W_dec, W_enc, b_enc")
    save_file(good | {"W_enc": good["W_enc"].T.contiguous()}, weights)
    refused(folder, r"W_enc has shape \[20, 6\], but cfg.json says d_in=6, d_sae=20")
    save_file(good | {"b_enc": torch.zeros(7)}, weights)
    refused(folder, "b_enc has shape")
    save_file(good | {"W_dec": torch.zeros(F, D, 2)}, weights)
    refused(folder, r"W_dec has shape \[20, 6, 2\], where 2 dimensions are needed")
    save_file(good | {"b_enc": torch.full((F,), torch.inf)}, weights)
    refused(folder, "b_enc holds NaN or infinite")
    save_file(good | {"W_enc": torch.full((D, F), torch.nan)}, weights)
    refused(folder, "W_enc holds NaN or infinite")
    save_file(good | {"b_enc": torch.zeros(F, dtype=torch.int64)}, weights)
    refused(folder, "b_enc is torch.int64, where floating-point weights are needed")
    weights.unlink()
    refused(folder, "sae_weights.safetensors is missing")
    save_file(good, weights)
    for change, match in (
        ({"k": None}, "lacks 'k'"),
        ({"k": 500}, "k = 500"),
        ({"d_in": "8"}, "'d_in' is '8'"),
        ({"d_sae": -1}, "'d_sae' is -1"),
        ({"architecture": "wonderful"}, "architecture 'wonderful'; read are standard, gated"),
        ({"normalize_activations": "best"}, "normalize_activations is 'best'"),
        ({"metadata": []}, "'metadata' is .*, where an object is needed"),
        ({"metadata": cfg["metadata"] | {"cutaway": {"site": 3}}}, "block 'cutaway'"),
        ({"metadata": cfg["metadata"] | {"cutaway": {"site": "a", "reads": ["b"]}}}, "names a tensor as 'b'"),
        (
            {"metadata": cfg["metadata"] | {"cutaway": {"site": "a", "reads": [{"site": "a", "width": 9}]}}},
            r"reads \[9\] values, but the weights have 6",
        ),
    ):
        cfg_file.write_text(json.dumps(cfg | change))
        refused(folder, match)
    for text in ("{", '"text"', "[" * 100_000, "\xff"):
        cfg_file.write_text(text, encoding="latin-1")
        refused(folder, "cfg.json is not")
    with open(cfg_file, "wb") as file:
        file.truncate(17 << 20)
    refused(folder, "that is no file of settings")
    cfg_file.unlink()
    (folder / "sae_weights.safetensors").unlink()
    refused(folder, "holds no dictionary: looked for params.npz")
    refused(tmp_path / "nothing", "nothing does not exist: name a folder or file, or an address")


def test_the_sparsity_must_fit(tmp_path: Path) -> None:
    folder = save(dictionary(), tmp_path / "dictionary")
    save_file({"sparsity": torch.zeros(3)}, folder / "sparsity.safetensors")
    refused(folder, r"sparsity.safetensors: sparsity has shape \[3\]")
    save_file({"other": torch.zeros(F)}, folder / "sparsity.safetensors")
    refused(folder, "sparsity.safetensors lacks sparsity")


def test_torch_archives_run_nothing(tmp_path: Path) -> None:
    folder = save(dictionary(), tmp_path / "dictionary", "dictionary_learning")
    file, mark = folder / "ae.pt", tmp_path / "ran"
    good, data = torch.load(file, weights_only=True), file.read_bytes()
    torch.save(good | {"surprise": Bomb(mark)}, file)
    refused(folder, "ae.pt holds Python objects beside tensors")
    file.write_bytes(pickle.dumps(Bomb(mark)))
    refused(folder, r"ae.pt is cut short or not an archive of torch.save")
    assert not mark.exists()
    for cut in (10, len(data) // 2, len(data) - 10):
        file.write_bytes(data[:cut])
        refused(folder, "ae.pt is cut short")
    torch.save(good["encoder.weight"], file)
    refused(folder, "holds a Tensor where named tensors are needed")
    huge = torch.zeros(1).expand(1 << 20, 1 << 20)  # a few bytes that claim four terabytes
    torch.save(good | {"encoder.weight": huge}, file)
    refused(folder, r"encoder.weight claims \[1048576, 1048576\] values and holds fewer")
    torch.save(good | {"encoder.weight": good["encoder.weight"].to_sparse()}, file)
    refused(folder, "encoder.weight claims")
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            content = b"\0" * (64 << 20) if member.filename.endswith("/data/0") else source.read(member)
            target.writestr(member.filename, content)
    refused(folder, "unpacks from")
    torch.save({name: tensor for name, tensor in good.items() if name != "k"}, file)
    config = json.loads((folder / "config.json").read_text())
    config["trainer"]["k"] = None
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "has k = None")
    torch.save(good, file)
    config["trainer"]["dict_class"] = "HyperAutoEncoder"
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "is a 'HyperAutoEncoder'; read are AutoEncoder")
    (folder / "config.json").unlink()
    refused(folder, "no config.json beside it that names its class")


def test_npz_files_run_nothing(tmp_path: Path) -> None:
    folder = save(dictionary(jump=True), tmp_path / "dictionary", "gemma-scope")
    file, mark = folder / "params.npz", tmp_path / "ran"
    with np.load(file) as stored:
        good: dict[str, Any] = {name: stored[name] for name in stored.files}
    data = file.read_bytes()

    def spoiled(**changes: Any) -> dict[str, Any]:
        return good | changes

    np.savez(file, **spoiled(b_enc=np.array([Bomb(mark)], dtype=object)), allow_pickle=True)
    refused(folder, "b_enc.npy holds Python objects")
    assert not mark.exists()
    for cut in (10, len(data) // 2, len(data) - 10):
        file.write_bytes(data[:cut])
        refused(folder, "params.npz is cut short or not an npz file")
    np.savez(file, **{name: value for name, value in good.items() if name != "threshold"})
    refused(folder, "lacks threshold")
    np.savez(file, **spoiled(threshold=np.full(F, np.nan, dtype=np.float32)))
    refused(folder, "threshold holds NaN")
    np.savez(file, **spoiled(W_enc=good["W_enc"].astype(np.complex64)))
    refused(folder, "W_enc is torch.complex64")
    np.savez_compressed(file, **spoiled(W_enc=np.zeros((1 << 13, 1 << 12), dtype=np.float32)))
    refused(folder, "unpacks from")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 1 << 20)})
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("W_enc.npy", header.getvalue() + b"\0" * 64)
    refused(folder, "W_enc.npy claims .* values and holds fewer")


def test_a_folder_of_folders_says_what_is_in_it(tmp_path: Path) -> None:
    for layer in (0, 1):
        save(dictionary(), tmp_path / f"blocks.{layer}.resid_post", "sparsify")
    with pytest.raises(CutawayError, match=r"holds 2: name one of blocks.0.resid_post, blocks.1.resid_post"):
        load(tmp_path)
    assert list(load_all(tmp_path)) == ["blocks.0.resid_post", "blocks.1.resid_post"]
    assert list(load_all(tmp_path / "blocks.0.resid_post")) == ["blocks.0.resid_post"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(CutawayError, match="holds no dictionary: looked for"):
        load_all(tmp_path / "empty")
    with pytest.raises(CutawayError, match="holds no dictionary: looked for"):
        load(tmp_path / "empty")


def test_a_folder_that_holds_one_stands_for_it(tmp_path: Path) -> None:
    """Wherever it is below: a run's folder, or a release's layer/width/L0."""
    deep = save(dictionary(), tmp_path / "run" / "layer_3" / "width_16", "sparsify")
    (tmp_path / "run" / "logs").mkdir()
    assert torch.equal(load(tmp_path / "run").W_enc, load(deep).W_enc)
    assert list(load_all(tmp_path / "run")) == ["layer_3/width_16"]
    save(dictionary(), tmp_path / "run" / "another", "sparsify")
    with pytest.raises(CutawayError, match=r"holds 2: name one of another, layer_3/width_16$"):
        load(tmp_path / "run")


def cached(cache: Path, repository: str, files: dict[str, Path]) -> None:
    """A repository as the hub's client keeps it, made by hand."""
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / ("a" * 40)
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("a" * 40)
    for name, source in files.items():
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_bytes(source.read_bytes())


def test_addresses_are_read_from_the_hub_s_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    jump = save(dictionary(jump=True), tmp_path / "gemma", "gemma-scope")
    topk = save(dictionary(), tmp_path / "topk")
    inside = "layer_12/width_16k/average_l0_82"
    cached(cache, "google/gemma-scope-2b-pt-mlp", {f"{inside}/params.npz": jump / "params.npz"})
    cached(cache, "me/one", {file.name: file for file in topk.iterdir()})
    found = load(f"hf://google/gemma-scope-2b-pt-mlp/{inside}")
    assert (found.site, found.model["id"]) == ("blocks.12.mlp.out", "google/gemma-2-2b")
    assert torch.equal(found.W_enc, dictionary(jump=True).W_enc)
    for address in ("hf://me/one", "hf://me/one/", "hf://me/one@main", "hf://me/one?revision=main"):
        assert torch.equal(load(address).W_enc, dictionary().W_enc)
    for address, match in (
        ("hf://me/absent", "not in the cache"),
        ("hf://me/one/layer_3", "has no layer_3"),
        ("hf://me", "is no address"),
        ("hf://me/one/../../secret", "is no address"),
    ):
        with pytest.raises(CutawayError, match=match):
            load(address)


def test_only_the_folder_that_is_named_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fnmatch import fnmatch

    asked: list[dict[str, Any]] = []

    def snapshot_download(repository: str, **options: Any) -> str:
        asked.append({"repository": repository} | options)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(CutawayError, match="has no width_16k/l0_5"):
        load("hf://a/b@v2/width_16k/l0_5")
    assert (asked[0]["repository"], asked[0]["revision"]) == ("a/b", "v2")

    def wanted(name: str) -> bool:
        allowed = any(fnmatch(name, pattern) for pattern in asked[-1]["allow_patterns"])
        return allowed and not any(fnmatch(name, pattern) for pattern in asked[-1]["ignore_patterns"] or ())

    assert wanted("width_16k/l0_5/params.npz")
    assert not wanted("width_16k/l0_50/params.npz")
    assert not wanted("width_16k/l0_5/checkpoints/step_1.safetensors")
    assert not wanted("README.md")
    with pytest.raises(CutawayError, match="no dictionary"):
        load("hf://a/b")
    assert wanted("cfg.json")
    assert not wanted("layer_0/params.npz")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("blocks.7.hook_resid_pre", "blocks.7.resid_pre"),
        ("blocks.7.attn.hook_z", "blocks.7.attn.z"),
        ("blocks.7.hook_mlp_in", "blocks.7.resid_mid"),  # before the norm
        ("blocks.7.mlp.hook_in", "blocks.7.mlp.in"),  # after it
        ("blocks.7.ln2.hook_normalized", "blocks.7.ln2.normalized"),
        ("hook_embed", "embed"),
        ("model.layers.7", "blocks.7.resid_post"),
        ("model.layers.7.output", "blocks.7.resid_post"),
        ("model.language_model.layers.7.input", "blocks.7.resid_pre"),
        ("layers.7.mlp", "blocks.7.mlp.out"),
        ("h.7.attn", "blocks.7.attn.out"),
        ("gpt_neox.layers.7.attention", "blocks.7.attn.out"),
        ("transformer.h.7.mlp.output", "blocks.7.mlp.out"),
        ("model.layers.7.self_attn.o_proj.input", "blocks.7.attn.z"),
        ("model.layers.7.pre_feedforward_layernorm.output", "blocks.7.mlp.in"),
        ("model.layers.7.post_feedforward_layernorm.output", "blocks.7.mlp.out"),
        ("something.else", "something.else"),
    ],
)
def test_sites_in_others_spellings(theirs: str, ours: str) -> None:
    assert site_name(theirs) == ours


def test_hook_names_go_there_and_back() -> None:
    for site in (
        "blocks.11.resid_post", "blocks.0.mlp.out", "blocks.2.attn.z", "embed", "blocks.1.ln2.normalized",
        "blocks.3.mlp.in",
    ):  # fmt: skip
        assert site_name(hook_name(site)) == site
        assert hook_name(site) != site
    assert hook_name("blocks.3.attn.in") == "blocks.3.attn.in"  # no hook there has one meaning


def test_any_spoiled_byte_is_refused_in_one_sentence_or_does_not_matter(tmp_path: Path) -> None:
    """Bytes changed, cut off and taken out, and values of the settings replaced: no other error, and no other line."""
    rng = random.Random(0)
    values = (b"null", b"-1", b"1e99", b'"x"', b"[]", b"{}", b"true", b"0", b"123456789012345678901234567890")
    said: list[str] = []
    for number, format in enumerate(get_args(Format)):
        folder = save(dictionary(jump=format.startswith("gemma")), tmp_path / str(number), format)
        kept = {file: file.read_bytes() for file in folder.iterdir()}
        for _ in range(40):
            file = rng.choice(list(kept))
            data = bytearray(kept[file])
            found = (
                list(re.finditer(rb"(?<=: )[^,\n{}\[\]]+", bytes(data))) if file.suffix in (".json", ".yaml") else []
            )
            how = rng.randrange(4)
            if found and how < 3:
                place = rng.choice(found)
                data[place.start() : place.end()] = rng.choice(values)
            elif how == 0:
                del data[rng.randrange(len(data)) :]
            elif how == 1:
                place = rng.randrange(len(data))
                del data[place : place + rng.randrange(1, 40)]
            else:
                for _ in range(rng.randrange(1, 5)):
                    data[rng.randrange(min(len(data), 1500))] = rng.randrange(256)
            file.write_bytes(data)
            try:
                load_all(folder)
            except CutawayError as error:
                said.append(str(error))
            file.write_bytes(kept[file])
    assert len(said) > 100
    assert not any("\n" in sentence for sentence in said)
