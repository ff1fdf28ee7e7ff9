"""Gemma Scope 1 (`params.npz`) and 2 (`params.safetensors`): JumpReLU, nothing taken off x.

    1    W_enc [d, F], W_dec [F, d_out], b_enc [F], b_dec [d_out], threshold [F]
    2    the same in small letters, and affine_skip_connection [d, d_out] of some transcoders; config.json names the
         modules, where it is there

Where a dictionary of the first belongs stands in the names of its folders alone:
gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71. What we write has `cutaway.json` beside it for that.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cutaway.artifacts.errors import BadFile, CutawayError, NotSupported
from cutaway.artifacts.files import atomic_path, plain, write_json, write_safetensors
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.formats import folds
from cutaway.dictionaries.formats.hooks import module_name, site_name
from cutaway.dictionaries.formats.reading import (
    ExpectedL0,
    Reading,
    Source,
    assemble,
    fold,
    mapping,
    our_block,
    ports,
    restored,
    thresholded,
)
from cutaway.dictionaries.formats.untrusted import read_settings, read_tensors, tensor_names

NPZ, SAFETENSORS, CFG, BESIDE = "params.npz", "params.safetensors", "config.json", "cutaway.json"
_L0 = {"small": (10, 20), "medium": (30, 60), "big": (90, 150)}  # what the second scope was trained for
_SITES_1 = {"res": "resid_post", "mlp": "mlp.out", "att": "attn.z"}
_SITES_2 = {"resid_post": "resid_post", "mlp_out": "mlp.out", "attn_out": "attn.z"}


def fits(path: Path) -> bool:
    """Whether the folder holds a file of either scope."""
    if path.is_file():
        return path.name == NPZ or (path.suffix == ".safetensors" and {"w_enc", "w_dec"} <= tensor_names(path))
    return (path / NPZ).is_file() or (path / SAFETENSORS).is_file()


def read(path: Path) -> Reading:
    """Read a folder, or the file in it."""
    folder = path.parent if path.is_file() else path
    if path.suffix == ".safetensors":
        return _read_second(folder, path)
    return _read_first(folder) if (folder / NPZ).is_file() else _read_second(folder, folder / SAFETENSORS)


def _read_first(folder: Path) -> Reading:
    source = Source(folder / NPZ, dict(read_tensors(folder / NPZ)))
    name = str(folder.absolute())
    W_enc, W_dec = source.take("W_enc", "W_enc [d_in, F]", dims=2), source.take("W_dec", "W_dec [F, d_out]", dims=2)
    release = re.search(r"gemma-scope-(\w+)-(pt|it)-(res|mlp|att|transcoders)", name)
    layer = re.search(r"layer_(\d+)", name)
    embedding = re.search(r"[/\\]embedding[/\\]", name) is not None
    model, reads, writes = None, "", None
    if release is not None:
        model = f"google/gemma-2-{release[1]}{'-it' if release[2] == 'it' else ''}"
    if embedding:
        reads = "embed"
    elif layer is not None and release is not None:
        if release[3] == "transcoders":
            reads, writes = f"blocks.{layer[1]}.ln2.normalized", f"blocks.{layer[1]}.mlp.out"
            source.notes.append(
                "read as SAELens and circuit-tracer do, before the gain of the norm: if FVU is poor, try mlp.in"
            )
        else:
            reads = f"blocks.{layer[1]}.{_SITES_1[release[3]]}"
    beside = read_settings(folder / BESIDE) if (folder / BESIDE).is_file() else {}
    if beside.get("writes") or W_dec.shape[1] != W_enc.shape[0]:
        writes = writes or ""
    dictionary = _assembled(source, W_enc, W_dec, ("b_enc", "b_dec"), reads, writes, model)
    if embedding:
        root = dictionary.d_in**0.5
        dictionary = fold(
            source,
            "embeddings are scaled by √d where they enter the stream: W_enc divided by it, W_dec and b_dec times it",
            dictionary,
            lambda d: folds.scaled(d, 1 / root, 1 / root),
        )
    source.rest()
    expected = re.search(r"average_l0_(\d+)", name)
    return Reading(
        dictionary=restored(dictionary, beside, folder / BESIDE),
        format="Gemma Scope 1",
        path=folder,
        tensors=tuple(source.stored),
        folds=tuple(source.folds),
        hooks=(f"{release[0]}, {layer[0]}",) if release and layer else (),
        expected_l0=(ExpectedL0(float(expected[1]), "the folder's name"),) if expected else (),
        notes=tuple(source.notes),
    )


def _read_second(folder: Path, file: Path) -> Reading:
    source = Source(file, dict(read_tensors(file)))
    cfg = read_settings(folder / CFG) if (folder / CFG).is_file() else {}
    name = str(folder.absolute())
    for tensor in ("w_enc", "w_dec"):
        if isinstance(stored := source.tensors.get(tensor), Tensor) and stored.ndim == 3:
            raise BadFile(
                f"{file} has {tensor} of shape {list(stored.shape)}: cross-layer transcoders and crosscoders of "
                "Gemma Scope 2 write one latent to several layers at once, which is not read"
            )
    architecture = cfg.get("architecture", "jump_relu")
    if architecture != "jump_relu":
        raise CutawayError(f"{folder / CFG}: architecture is {architecture!r}, where 'jump_relu' is read")
    W_enc, W_dec = source.take("w_enc", "W_enc [d_in, F]", dims=2), source.take("w_dec", "W_dec [F, d_out]", dims=2)
    point_in, point_out = cfg.get("hf_hook_point_in"), cfg.get("hf_hook_point_out")
    layer = re.search(r"layer_(\d+)", name)
    release = re.search(r"gemma-scope-2-(\w+)-(pt|it)", name)
    kind = next((kind for kind in ("transcoder", *_SITES_2) if f"{kind}" in name), None)
    reads, writes = "", None
    if isinstance(point_in, str):
        reads = site_name(point_in)
        writes = site_name(point_out) if isinstance(point_out, str) else None
    elif layer is not None and kind == "transcoder":
        reads, writes = f"blocks.{layer[1]}.mlp.in", f"blocks.{layer[1]}.mlp.out"
    elif layer is not None and kind is not None:
        reads = f"blocks.{layer[1]}.{_SITES_2[kind]}"
    if W_dec.shape[1] != W_enc.shape[0]:
        writes = writes or ""
    model = cfg.get("model_name") or (f"google/gemma-3-{release[1]}-{release[2]}" if release else None)
    skip = source.maybe("affine_skip_connection", "W_skip [d_out, d_in]", dims=2, transposed=True)
    dictionary = _assembled(source, W_enc, W_dec, ("b_enc", "b_dec"), reads, writes, model, skip)
    source.rest()
    expected = re.search(r"_l0_(small|medium|big)", name)
    span = _L0[expected[1]] if expected else None
    return Reading(
        dictionary=restored(dictionary, mapping(cfg, "cutaway", folder / CFG), folder / CFG),
        format="Gemma Scope 2",
        path=folder,
        tensors=tuple(source.stored),
        folds=tuple(source.folds),
        hooks=tuple(hook for hook in (point_in, point_out) if isinstance(hook, str)),
        expected_l0=(ExpectedL0(span[0], "the folder's name", span[1]),) if span else (),
        notes=tuple(source.notes),
    )


def _assembled(
    source: Source, W_enc: Tensor, W_dec: Tensor, biases: tuple[str, str], reads: str, writes: str | None, model: Any,
    skip: Tensor | None = None,
) -> Dictionary:  # fmt: skip
    return assemble(
        source,
        {
            "W_enc": W_enc,
            "b_enc": source.take(biases[0], "b_enc [F]"),
            "W_dec": W_dec,
            "b_dec": source.take(biases[1], "b_dec [d_out]"),
        },
        thresholded(source, source.take("threshold", "threshold [F]")),
        W_skip=skip,
        subtract_b_dec=False,
        **ports(reads, writes, (W_enc.shape[0], W_dec.shape[1]), model),
    )


def _tensors(dictionary: Dictionary, *, skip: bool) -> tuple[Dictionary, dict[str, Tensor]]:
    threshold = folds.as_thresholds(dictionary)
    what = None
    if threshold is None:
        what = f"is {dictionary.selector.name}"
    elif dictionary.input_norm:
        what = "normalises its input"
    elif dictionary.kind == "crosscoder":
        what = "is a crosscoder"
    elif dictionary.W_skip is not None and not skip:
        what = "has a skip connection"
    if what is not None:
        raise NotSupported(
            f"Gemma Scope has JumpReLU dictionaries of one site without normalisation, and this one {what}: save it as "
            f"format={'gemma-scope-2' if what == 'has a skip connection' else 'cutaway'!r}"
        )
    assert threshold is not None
    dictionary = folds.subtracting(dictionary, subtract=False)
    weights = {name: getattr(dictionary, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    return dictionary, {name: tensor.detach().cpu() for name, tensor in (weights | {"threshold": threshold}).items()}


def write_first(dictionary: Dictionary, folder: Path) -> None:
    """Write `params.npz` and `cutaway.json` into an existing, empty folder."""
    dictionary, tensors = _tensors(dictionary, skip=False)
    wide = {k: (t.float() if t.element_size() < 4 else t).numpy() for k, t in tensors.items()}  # npz has no bfloat16
    with atomic_path(folder / NPZ) as temporary, open(temporary, "wb") as file:
        np.savez(file, **wide)  # pyright: ignore[reportArgumentType]
    write_json(folder / BESIDE, plain(our_block(dictionary)))


def write_second(dictionary: Dictionary, folder: Path) -> None:
    """Write `params.safetensors` and `config.json` into an existing, empty folder."""
    dictionary, tensors = _tensors(dictionary, skip=True)
    stored = {name.lower(): tensor for name, tensor in tensors.items()}
    cfg: dict[str, Any] = {
        "architecture": "jump_relu",
        "model_name": dictionary.model.get("id"),
        "hf_hook_point_in": _point(dictionary.inputs[0].site, read=True),
    }
    if not dictionary.writes_what_it_reads:
        cfg["hf_hook_point_out"] = _point(dictionary.outputs[0].site, read=False)
        cfg["affine_connection"] = dictionary.W_skip is not None
    if dictionary.W_skip is not None:
        stored["affine_skip_connection"] = dictionary.W_skip.detach().cpu().T
    cfg["cutaway"] = plain(our_block(dictionary))
    write_json(folder / CFG, cfg)
    write_safetensors(folder / SAFETENSORS, stored)


def _point(site: str, *, read: bool) -> str:
    """A site as Gemma 3's modules name it."""
    parts = site.split(".", 2)
    if len(parts) == 3 and parts[0] == "blocks":
        special = {
            "mlp.in": "pre_feedforward_layernorm.output",
            "mlp.out": "post_feedforward_layernorm.output",
            "attn.z": "self_attn.o_proj.input",
            "resid_pre": "input",
        }
        if parts[2] in special:
            return f"model.layers.{parts[1]}.{special[parts[2]]}"
    module = module_name(site)
    return site if module == site else f"model.{module}.{'input' if read and site.endswith('.in') else 'output'}"
