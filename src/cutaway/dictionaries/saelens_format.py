"""Dictionaries as files in the layout of SAELens 6, which the field's tools read.

    FOLDER/cfg.json                      architecture, sizes, k, and what it was trained on
    FOLDER/sae_weights.safetensors       W_enc [d, F], b_enc [F], W_dec [F, d], b_dec [d]
    FOLDER/sparsity.safetensors          sparsity [F]: log10 of how often each latent fires (if measured)

All scaling is folded into the weights, so a reader needs none: `normalize_activations` is "none", activations are not
rescaled by decoder norms, and b_dec is subtracted from the input.
"""

import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.files import disk_errors, make_folder, plain, read_json, write_json, write_safetensors
from cutaway.dictionaries.dictionary import Dictionary, TopK

CFG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
_WRITTEN_FOR = "6.54.0"
_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")

_HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn.out": "hook_attn_out",
    "attn.z": "attn.hook_z",
    "mlp.out": "hook_mlp_out",
    "mlp.post": "mlp.hook_post",
    "mlp.pre": "mlp.hook_pre",
    "ln1.normalized": "ln1.hook_normalized",
    "ln2.normalized": "ln2.hook_normalized",
}


def hook_name(site: str) -> str:
    """TransformerLens' spelling of a site: "blocks.3.resid_post" -> "blocks.3.hook_resid_post".

    A site that it has no name for keeps ours.
    """
    parts = site.split(".", 2)
    if len(parts) == 3 and parts[0] == "blocks" and parts[2] in _HOOKS:
        return f"blocks.{parts[1]}.{_HOOKS[parts[2]]}"
    return {"embed": "hook_embed", "pos_embed": "hook_pos_embed"}.get(site, site)


def site_name(hook: str) -> str:
    """Our name of a TransformerLens hook, the inverse of `hook_name`."""
    parts = hook.split(".", 2)
    if len(parts) == 3 and parts[0] == "blocks":
        for ours, theirs in _HOOKS.items():
            if parts[2] == theirs:
                return f"blocks.{parts[1]}.{ours}"
    return {"hook_embed": "embed", "hook_pos_embed": "pos_embed"}.get(hook, hook)


def save_dictionary(dictionary: Dictionary, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write the folder, whole or not at all, and return its path.

    Raises `CutawayError` when the folder exists (and not `overwrite`), is not a dictionary's, or cannot be written to.
    """
    folder = Path(folder)
    if folder.exists():
        if not overwrite:
            raise CutawayError(f"{folder} exists: name another folder, or allow it to be overwritten")
        if not (folder / CFG).exists():
            raise CutawayError(f"{folder} exists and is not a dictionary's folder: name another")
    make_folder(folder.parent)
    token = secrets.token_hex(4)
    fresh, old = (folder.with_name(f".{folder.name}.{token}.{end}") for end in ("tmp", "old"))
    try:
        write_json(fresh / CFG, _configuration(dictionary))
        tensors = {name: getattr(dictionary, name).detach().float().cpu() for name in _TENSORS}
        write_safetensors(fresh / WEIGHTS, tensors, {"format": "pt"})
        if dictionary.sparsity is not None:
            write_safetensors(fresh / SPARSITY, {"sparsity": dictionary.sparsity.detach().float().cpu()})
        with disk_errors(folder):
            if folder.exists():
                os.rename(folder, old)
            os.rename(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
    return folder


def load_dictionary(folder: str | Path, device: str | torch.device = "cpu") -> Dictionary:
    """The dictionary that a folder holds, SAELens' own TopK dictionaries included.

    Raises `CutawayError` when a file or a field is missing, cut short, of the wrong shape or not finite, and when the
    architecture or a normalisation is one that this version does not read.
    """
    folder = Path(folder)
    if not (folder / CFG).is_file():
        raise CutawayError(f"{folder} holds no dictionary: {CFG} is missing")
    cfg = read_json(folder / CFG)
    if not isinstance(cfg, dict):
        raise CutawayError(f"{folder / CFG} is not an object of settings")
    architecture = _field(cfg, "architecture", str, folder)
    if architecture != "topk":
        raise CutawayError(f"{folder} is a dictionary of architecture {architecture!r}; only 'topk' is read so far")
    k, d_in, d_sae = (_field(cfg, name, int, folder) for name in ("k", "d_in", "d_sae"))
    normalisation = cfg.get("normalize_activations", "none")
    if normalisation != "none":
        raise CutawayError(f"{folder} normalises its input ({normalisation!r}); fold that into the weights first")
    tensors = _read_tensors(folder / WEIGHTS)
    missing = [name for name in _TENSORS if name not in tensors]
    if missing:
        raise CutawayError(f"{folder / WEIGHTS} lacks {', '.join(missing)}")
    if tuple(tensors["W_enc"].shape) != (d_in, d_sae):
        raise CutawayError(
            f"{folder}: W_enc has shape {list(tensors['W_enc'].shape)}, but {CFG} says d_in={d_in}, d_sae={d_sae}"
        )
    weights: dict[str, Any] = {name: tensors[name].to(device) for name in _TENSORS}
    if not cfg.get("apply_b_dec_to_input", True):  # h = x·W + b is (x − b_dec)·W + (b + b_dec·W)
        weights["b_enc"] = weights["b_enc"] + weights["b_dec"] @ weights["W_enc"]
    if cfg.get("rescale_acts_by_decoder_norm", False):
        weights = _unit_decoder(weights)
    sparsity = _read_tensors(folder / SPARSITY).get("sparsity") if (folder / SPARSITY).exists() else None
    metadata = cfg.get("metadata") or {}
    ours = metadata.get("cutaway") or {}
    try:
        return Dictionary(
            **weights,
            selector=TopK(k),
            site=ours.get("site") or site_name(metadata.get("hook_name") or ""),
            model=ours.get("model") or {"id": metadata.get("model_name"), "revision": None, "weight_hash": None},
            sparsity=sparsity,
            metadata=ours.get("metadata") or {},
        )
    except CutawayError as error:
        raise CutawayError(f"{folder}: {error}") from error


def _configuration(dictionary: Dictionary) -> dict[str, Any]:
    metadata = dictionary.metadata
    return {
        "architecture": "topk",
        "d_in": dictionary.d_in,
        "d_sae": dictionary.d_sae,
        "k": dictionary.selector.k if isinstance(dictionary.selector, TopK) else None,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {
            "sae_lens_version": _WRITTEN_FOR,
            "sae_lens_training_version": None,
            "model_name": dictionary.model.get("id"),
            "hook_name": hook_name(dictionary.site),
            "hook_head_index": None,
            "context_size": metadata.get("context"),
            "prepend_bos": metadata.get("prepend_bos", True),
            "dataset_path": metadata.get("corpus"),
            "exclude_special_tokens": metadata.get("excluded_tokens"),
            "cutaway": plain(
                {"site": dictionary.site, "model": dict(dictionary.model), "metadata": dict(dictionary.metadata)}
            ),
        },
    }


def _field(cfg: dict[str, Any], name: str, kind: type, folder: Path) -> Any:
    value = cfg.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise CutawayError(
            f"{folder / CFG} lacks {name!r}" if value is None else f"{folder / CFG}: {name!r} is {value!r}"
        )
    return value


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CutawayError(f"{path} is missing") from error
    except (SafetensorError, OSError) as error:
        raise CutawayError(f"{path} is cut short or not a safetensors file: {error}") from error


def _unit_decoder(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fold decoder norms: with h scaled by them and decoder rows divided by them the function stays the same."""
    norms = weights["W_dec"].norm(dim=1)
    return {
        "W_enc": weights["W_enc"] * norms,
        "b_enc": weights["b_enc"] * norms,
        "W_dec": weights["W_dec"] / norms[:, None],
        "b_dec": weights["b_dec"],
    }
