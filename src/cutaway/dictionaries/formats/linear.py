"""Releases whose files hold two linear layers: OpenAI, Goodfire, DeepSeek-R1, Qwen-Scope, Llama Scope. Read only.

OpenAI         pre_bias [d], encoder.weight [F, d], latent_bias [F], decoder.weight [d, F], activation;
               the TopK ones see (x − mean)/std of the token, and it is undone
Goodfire       encoder_linear.{weight [F, d], bias}, decoder_linear.{weight [d, F], bias}; relu
DeepSeek-R1    encoder.{weight, bias}, decoder.{weight, bias}; relu
Qwen-Scope     W_enc [F, d], W_dec [d, F], b_enc, b_dec; topk, with k in the repository's name
Llama Scope    encoder.*, decoder.*: hyperparams.json and checkpoints/final.safetensors with one threshold and the
               mean norms by which x is scaled, or config.json and log_jumprelu_threshold [F]
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cutaway.artifacts.errors import BadFile, CutawayError
from cutaway.dictionaries.dictionary import ReLU, TopK
from cutaway.dictionaries.formats import by_tensors, folds
from cutaway.dictionaries.formats.hooks import site_name
from cutaway.dictionaries.formats.reading import (
    ExpectedL0,
    Ports,
    Reading,
    Source,
    assemble,
    fold,
    mapping,
    ports,
    thresholded,
)
from cutaway.dictionaries.formats.untrusted import read_settings, read_tensors, tensor_names

_OPENAI_SITES = {
    "mlp_post_act": "mlp.post",
    "resid_delta_attn": "attn.out",
    "resid_post_attn": "resid_mid",
    "resid_delta_mlp": "mlp.out",
    "resid_post_mlp": "resid_post",
}
_QWEN = re.compile(r"SAE-Res-(.+)-W\d+K-L0_(\d+)")  # in the path; it has the k
_FINAL = Path("checkpoints", "final.safetensors")


def fits_archive(path: Path) -> bool:
    """Whether the path is a torch archive, which its keys tell apart."""
    return path.is_file() and path.suffix in (".pt", ".pth")


def fits_llama_scope(path: Path) -> bool:
    """Whether the folder is one of Llama Scope's."""
    if (path / "hyperparams.json").is_file():
        return True
    weights = path / "sae_weights.safetensors"
    return (path / "config.json").is_file() and weights.is_file() and "log_jumprelu_threshold" in tensor_names(weights)


def read_archive(path: Path) -> Reading:
    """Read one of the torch archives above, recognised by its keys."""
    source = Source(path, dict(read_tensors(path)))
    if "pre_bias" in source and "latent_bias" in source:
        return _openai(source)
    layer = re.search(r"(?:layer|[-_.]l|/l)[._-]?(\d+)", str(path.absolute()), re.IGNORECASE)
    site = f"blocks.{layer[1]}.resid_post" if layer else ""
    if "W_enc" in source and "W_dec" in source and "threshold" not in source and _QWEN.search(str(path.absolute())):
        return _qwen(source, site)
    prefix = "_linear" if "encoder_linear.weight" in source else ""
    if f"encoder{prefix}.weight" not in source or f"decoder{prefix}.bias" not in source:
        return by_tensors.read(path)
    weights = _linear(source, f"encoder{prefix}", f"decoder{prefix}")
    source.rest()
    dictionary = assemble(source, weights, ReLU(), subtract_b_dec=False, **_ports(weights, site, None))
    name = "Goodfire" if prefix else "encoder and decoder layers (DeepSeek-R1)"
    return Reading(dictionary, name, path, tuple(source.stored), notes=_guessed(source, site))


def _linear(source: Source, encoder: str, decoder: str) -> dict[str, Tensor]:
    return {
        "W_enc": source.take(f"{encoder}.weight", "W_enc [d_in, F]", dims=2, transposed=True),
        "b_enc": source.take(f"{encoder}.bias", "b_enc [F]"),
        "W_dec": source.take(f"{decoder}.weight", "W_dec [F, d_out]", dims=2, transposed=True),
        "b_dec": source.take(f"{decoder}.bias", "b_dec [d_out]"),
    }


def _ports(weights: dict[str, Tensor], site: str, model: Any) -> Ports:
    return ports(site, None, (weights["W_enc"].shape[0], weights["W_dec"].shape[1]), model)


def _guessed(source: Source, site: str) -> tuple[str, ...]:
    said = f"the site is guessed from the file's name: {site}" if site else "nothing says which site it belongs to"
    return (*source.notes, said)


def _openai(source: Source) -> Reading:
    path = source.path
    weights = {
        "W_enc": source.take("encoder.weight", "W_enc [d_in, F]", dims=2, transposed=True),
        "b_enc": source.take("latent_bias", "b_enc [F]"),
        "W_dec": source.take("decoder.weight", "W_dec [F, d_out]", dims=2, transposed=True),
        "b_dec": source.take("pre_bias", "b_dec [d_out]"),
    }
    activation = source.tensors.get("activation")
    state = source.tensors.get("activation_state_dict")
    if activation == "TopK":
        k = state.get("k") if isinstance(state, dict) else None
        k = int(k) if isinstance(k, Tensor) and k.numel() == 1 else k
        if not isinstance(k, int):
            raise BadFile(f"{path}: activation_state_dict has k = {k!r}")
        selector: Any = TopK(k)
    elif activation in ("ReLU", None):
        selector = ReLU()
    else:
        raise BadFile(f"{path} has activation {activation!r}; read are TopK and ReLU")
    for name in ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"):
        source.unused(name, "a statistic of training")
    source.rest()
    place = next((part for part in path.absolute().parts if re.sub(r"_v\d.*", "", part) in _OPENAI_SITES), None)
    site = ""
    if place is not None and path.stem.isdigit():
        site = f"blocks.{path.stem}.{_OPENAI_SITES[re.sub(r'_v[0-9].*', '', place)]}"
    norm = "layer_norm" if activation == "TopK" else None
    dictionary = assemble(source, weights, selector, input_norm=norm, **_ports(weights, site, "gpt2" if site else None))
    return Reading(
        dictionary, "OpenAI", path, tuple(source.stored), hooks=(place,) if place else (), notes=_guessed(source, site)
    )


def _qwen(source: Source, site: str) -> Reading:
    path = source.path
    weights = {
        "W_enc": source.take("W_enc", "W_enc [d_in, F]", dims=2, transposed=True),
        "b_enc": source.take("b_enc", "b_enc [F]"),
        "W_dec": source.take("W_dec", "W_dec [F, d_out]", dims=2, transposed=True),
        "b_dec": source.take("b_dec", "b_dec [d_out]"),
    }
    named = _QWEN.search(str(path.absolute()))
    assert named is not None
    source.rest()
    model = f"Qwen/{named[1].split('/')[-1]}"
    dictionary = assemble(source, weights, TopK(int(named[2])), subtract_b_dec=False, **_ports(weights, site, model))
    return Reading(dictionary, "Qwen-Scope", path, tuple(source.stored), notes=_guessed(source, site))


def read_llama_scope(path: Path) -> Reading:
    """Read a folder of Llama Scope, or of its R1 distillation."""
    if (path / "hyperparams.json").is_file():
        return _llama_scope(path)
    cfg = read_settings(path / "config.json")
    source = Source(path / "sae_weights.safetensors", dict(read_tensors(path / "sae_weights.safetensors")))
    weights = _linear(source, "encoder", "decoder")
    threshold = source.take("log_jumprelu_threshold", "threshold [F], exp applied").exp()
    source.rest()
    hook = cfg.get("hook_point_in")
    site = site_name(hook) if isinstance(hook, str) else ""
    dictionary = assemble(
        source, weights, thresholded(source, threshold), subtract_b_dec=False,
        **_ports(weights, site, cfg.get("model_name")),
    )  # fmt: skip
    hooks = (hook,) if isinstance(hook, str) else ()
    return Reading(dictionary, "Llama Scope R1", path, tuple(source.stored), hooks=hooks, notes=tuple(source.notes))


def _llama_scope(path: Path) -> Reading:
    cfg = read_settings(path / "hyperparams.json")
    source = Source(path / _FINAL, dict(read_tensors(path / _FINAL)))
    weights = _linear(source, "encoder", "decoder")
    norms = mapping(cfg, "dataset_average_activation_norm", path / "hyperparams.json")
    threshold, norm_in, norm_out = cfg.get("jump_relu_threshold"), norms.get("in"), norms.get("out")
    numbers = [value for value in (threshold, norm_in, norm_out) if isinstance(value, int | float) and value > 0]
    if len(numbers) < 3:
        raise CutawayError(
            f"{path / 'hyperparams.json'} has threshold and mean norms {threshold!r}, {norms}: three positive "
            "numbers are needed"
        )
    threshold, norm_in, norm_out = numbers
    d_in, d_out = weights["W_enc"].shape[0], weights["W_dec"].shape[1]
    scale_in, scale_out = d_in**0.5 / norm_in, d_out**0.5 / norm_out
    hooks = tuple(hook for hook in (cfg.get("hook_point_in"), cfg.get("hook_point_out")) if isinstance(hook, str))
    writes = site_name(hooks[1]) if len(hooks) == 2 and hooks[0] != hooks[1] else None
    dictionary = assemble(
        source,
        weights,
        thresholded(source, torch.full_like(weights["b_enc"], threshold * scale_in)),
        subtract_b_dec=False,
        **ports(site_name(hooks[0]) if hooks else "", writes, (d_in, d_out), "meta-llama/Llama-3.1-8B"),
    )
    dictionary = fold(
        source,
        f"mean norms {norm_in:.6g} in and {norm_out:.6g} out: scales {scale_in:.6g} and {scale_out:.6g}",
        dictionary,
        lambda d: folds.scaled(d, scale_in, scale_out),
    )
    source.rest()
    source.notes.append("the threshold is multiplied by the scale too, as SAELens does: see that L0 is about 50")
    return Reading(
        dictionary, "Llama Scope", path, tuple(source.stored), tuple(source.folds), hooks,
        (ExpectedL0(50.0, "the release"),), tuple(source.notes),
    )  # fmt: skip
