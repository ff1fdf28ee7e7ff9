"""Each format's own forward, written plainly in float64 from the tensors in its files: nothing of cutaway is used.

`forward(format, folder, x)` returns the activations [n, F] and what is written [n, d_out].
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor


def keep_largest(h: Tensor, k: int) -> Tensor:
    """relu(h) at the k largest of each row, else 0."""
    kept = torch.zeros_like(h)
    for row in range(len(h)):
        for latent in sorted(range(h.shape[1]), key=lambda i: float(h[row, i]), reverse=True)[:k]:
            kept[row, latent] = max(float(h[row, latent]), 0.0)
    return kept


def jump(h: Tensor, threshold: Tensor | float) -> Tensor:
    return torch.where(h > threshold, h.clamp_min(0), torch.zeros_like(h))


def doubles(tensors: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in tensors.items()}


def saelens(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    cfg = json.loads((folder / "cfg.json").read_text())
    t = doubles(load_file(folder / "sae_weights.safetensors"))
    architecture = cfg["architecture"]
    if cfg.get("activation_fn_str") == "topk":
        architecture, cfg["k"] = "topk", cfg["activation_fn_kwargs"]["k"]
    transcoder = "transcoder" in architecture
    whole = x
    scale = 1.0
    if (folder / "activation_scaler.json").exists():
        scale = json.loads((folder / "activation_scaler.json").read_text())["scaling_factor"] or 1.0
    x = x * scale
    whitening = None
    if (folder / "activation_whitening.safetensors").exists():
        whitening = doubles(load_file(folder / "activation_whitening.safetensors"))
        x = (x - whitening["mean"]) @ whitening["matrix"]
    mu, std = torch.zeros(len(x), 1).double(), torch.ones(len(x), 1).double()
    if cfg["normalize_activations"] == "layer_norm":
        mu = x.mean(1, keepdim=True)
        std = (x - mu).std(1, keepdim=True)
        x = (x - mu) / (std + 1e-5)
    elif cfg["normalize_activations"] == "constant_norm_rescale":
        std = x.norm(dim=1, keepdim=True) / x.shape[1] ** 0.5
        x = x / std
    if cfg["apply_b_dec_to_input"] and not transcoder:
        x = x - t["b_dec"]
    norms = t["W_dec"].norm(dim=1) if cfg.get("rescale_acts_by_decoder_norm") else torch.ones(len(t["W_dec"])).double()
    if architecture == "gated":
        gate = x @ t["W_enc"] + t["b_gate"] > 0
        a = gate * torch.relu(x @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"])
    else:
        h = (x @ t["W_enc"] + t["b_enc"]) * norms
        if architecture == "topk":
            a = keep_largest(h, cfg["k"])
        elif architecture.startswith("jumprelu"):
            a = jump(h, t["threshold"] if "threshold" in t else t["log_threshold"].exp())
        elif architecture in ("batchtopk", "matryoshka_batchtopk"):
            a = jump(h, t["topk_threshold"])
        else:
            assert architecture in ("standard", "transcoder", "skip_transcoder"), architecture
            a = torch.relu(h)
    factor = t["scaling_factor"] if cfg.get("finetuning_scaling_factor") else 1.0
    y = (a / norms * factor) @ t["W_dec"] + t["b_dec"]
    if not transcoder:
        y = y * std + mu
    if whitening is not None:
        y = y @ whitening["inverse_matrix"] + whitening["mean"]
    y = y / scale
    if "W_skip" in t:
        y = y + whole @ t["W_skip"].T
    rescaled = cfg.get("rescale_acts_by_decoder_norm") and whitening is None
    return a / scale if rescaled else a, y  # SAELens exports activations for decoders of norm 1 in the model's units


def sparsify(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    cfg = json.loads((folder / "cfg.json").read_text())
    t = doubles(load_file(folder / "sae.safetensors"))
    h = torch.nn.functional.linear(x if cfg["transcode"] else x - t["b_dec"], t["encoder.weight"], t["encoder.bias"])
    a = keep_largest(h.relu(), cfg["k"])
    y = a @ t["W_dec"] + t["b_dec"]
    return a, y + x @ t["W_skip"].mT if "W_skip" in t else y


def dictionary_learning(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    t = doubles(torch.load(folder / "ae.pt", weights_only=True))
    kind = trainer["dict_class"]
    if kind in ("CrossCoder", "BatchTopKCrossCoder"):
        return crosscoder_learning(t, x)
    if kind in ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):
        h = (x if kind[0] == "J" else x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
        a = jump(h, t["threshold"])
        return a, a @ t["W_dec"] + t["b_dec"]
    bias = {"AutoEncoder": "bias", "GatedAutoEncoder": "decoder_bias"}.get(kind, "b_dec")
    if kind == "AutoEncoderNew":
        a = torch.relu(x @ t["encoder.weight"].T + t["encoder.bias"])
        return a, a @ t["decoder.weight"].T + t["decoder.bias"]
    u = (x - t[bias]) @ t["encoder.weight"].T
    if kind == "GatedAutoEncoder":
        a = (u + t["gate_bias"] > 0) * torch.relu(t["r_mag"].exp() * u + t["mag_bias"])
    elif kind == "AutoEncoder":
        a = torch.relu(u + t["encoder.bias"])  # its loader makes them lengths
        return a * t["decoder.weight"].norm(dim=0), a @ t["decoder.weight"].T + t[bias]
    elif kind == "AutoEncoderTopK":
        a = keep_largest(u + t["encoder.bias"], int(t["k"]))
    else:
        a = jump(u + t["encoder.bias"], t["threshold"])
    return a, a @ t["decoder.weight"].T + t[bias]


def crosscoder_learning(t: dict[str, Any], x: Tensor) -> tuple[Tensor, Tensor]:
    layers, d, _ = t["encoder.weight"].shape
    x = x.view(len(x), layers, d)
    scale = None
    if "activation_mean" in t and not t["activation_mean"].isnan().any():
        scale = t["activation_global_scale"][None, :, None]
        x = (x - t["activation_mean"]) * scale
    a = torch.relu(torch.einsum("nld,ldf->nf", x, t["encoder.weight"]) + t["encoder.bias"])
    norms = {
        1: t["decoder.weight"].norm(dim=2).sum(0),
        2: t["decoder.weight"].norm(dim=(0, 2)),
        4: torch.ones(a.shape[1]).double(),
    }[int(t["code_normalization_id"])]
    if "k" in t:
        a = a * (a * norms > t["threshold"])
    y = torch.einsum("nf,lfd->nld", a, t["decoder.weight"]) + t["decoder.bias"]
    if scale is not None:
        y = y / (scale + 1e-8) + t["activation_mean"]
    return (a * norms if "k" in t else a), y.reshape(len(x), -1)


def gemma_scope(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    with np.load(folder / "params.npz", allow_pickle=False) as stored:
        t = {k: torch.from_numpy(stored[k]).double() for k in stored.files}
    a = jump(x @ t["W_enc"] + t["b_enc"], t["threshold"])
    return a, a @ t["W_dec"] + t["b_dec"]


def gemma_scope_2(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    t = doubles(load_file(folder / "params.safetensors"))
    a = jump(x @ t["w_enc"] + t["b_enc"], t["threshold"])
    y = a @ t["w_dec"] + t["b_dec"]
    return a, y + x @ t["affine_skip_connection"] if "affine_skip_connection" in t else y


def circuit_tracer(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    file = next(folder.glob("layer_*.safetensors"))
    assert yaml.safe_load((folder / "config.yaml").read_text())["model_kind"] == "transcoder_set"
    t = doubles(load_file(file))
    h = x @ t["W_enc"].T + t["b_enc"]
    if "k" in t:
        a = keep_largest(h, int(t["k"]))
    else:
        a = jump(h, t["activation_function.threshold"]) if "activation_function.threshold" in t else h.relu()
    y = a @ t["W_dec"] + t["b_dec"]
    return a, y + x @ t["W_skip"].T if "W_skip" in t else y


FORWARD: dict[str, Callable[[Path, Tensor], tuple[Tensor, Tensor]]] = {
    "saelens": saelens,
    "saelens-5": saelens,
    "saelens-training": saelens,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "gemma-scope": gemma_scope,
    "gemma-scope-2": gemma_scope_2,
    "circuit-tracer": circuit_tracer,
}
