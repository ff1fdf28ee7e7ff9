"""dictionary_learning: `ae.pt`, a torch archive, beside `config.json`; checkpoints are `checkpoints/ae_{step}.pt`.

    class                     keys, and what the forward is
    AutoEncoder               encoder.weight [F, d], encoder.bias, decoder.weight [d, F], bias; relu(E(x − bias)); its
                              loader folds decoder norms into the encoder, so that activations are lengths
    AutoEncoderNew            decoder.bias in place of bias, and nothing taken off x
    GatedAutoEncoder          r_mag, gate_bias, mag_bias, decoder_bias in place of the biases
    AutoEncoderTopK           b_dec, k, threshold; the k largest of a token
    BatchTopKSAE              the same keys; relu(h)·1[h > threshold]
    MatryoshkaBatchTopKSAE    W_enc [d, F], W_dec [F, d], b_enc, b_dec, k, threshold, group_sizes
    JumpReluAutoEncoder       W_enc, W_dec, b_enc, b_dec, threshold [F]; nothing taken off x

A finished file is in the model's own units. An interrupted run's {step, ae, norm_factor} is not: there biases and
thresholds are still divided by norm_factor. For crosscoders see `crosscoders.py`.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cutaway.artifacts.errors import BadFile, NotSupported
from cutaway.artifacts.files import plain, write_json
from cutaway.dictionaries.dictionary import BatchTopK, Dictionary, Gated, JumpReLU, ReLU, TopK
from cutaway.dictionaries.formats import crosscoders, folds
from cutaway.dictionaries.formats.archive import CFG, WEIGHTS, normalisation, write_archive
from cutaway.dictionaries.formats.hooks import site_name
from cutaway.dictionaries.formats.reading import (
    Reading,
    Source,
    assemble,
    batch_topk,
    fold,
    mapping,
    our_block,
    ports,
    restored,
    thresholded,
)
from cutaway.dictionaries.formats.untrusted import read_settings, read_tensors
from cutaway.dictionaries.selectors import Selector

_CLASSES = (
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
    "JumpReluAutoEncoder",
)


def fits(path: Path) -> bool:
    """Whether the folder holds `ae.pt`, or the file is a checkpoint such as "ae_1000.pt"."""
    return (path / WEIGHTS).is_file() or (path.is_file() and re.fullmatch(r"ae(_\d+)?\.pt", path.name) is not None)


def read(path: Path) -> Reading:
    """Read a trainer's folder, or one of its checkpoints."""
    file = path if path.is_file() else path / WEIGHTS
    candidates = (file.parent / CFG, file.absolute().parent.parent / CFG)
    settings = next((candidate for candidate in candidates if candidate.is_file()), None)
    config = read_settings(settings) if settings else {}
    trainer = mapping(config, "trainer", settings or file)
    stored: dict[str, Any] = dict(read_tensors(file))
    factor: Any = None
    if isinstance(stored.get("ae"), dict):  # an interrupted run
        factor = stored.get("norm_factor")
        stored = dict(stored["ae"])
    stored = {name.removeprefix("_orig_mod."): value for name, value in stored.items()}
    source = Source(file, stored)
    if isinstance(weight := stored.get("encoder.weight"), Tensor) and weight.ndim == 3:
        return crosscoders.read_learned(source, config, path)
    kind = _class(source, trainer.get("dict_class"))
    dictionary = _dictionary(source, kind, trainer)
    if isinstance(factor, int | float) and factor > 0 and factor != 1:
        dictionary = fold(
            source,
            f"norm_factor {factor:.6g} of an interrupted run: biases and thresholds times it",
            dictionary,
            lambda d: _biases_scaled(d, float(factor)),
        )
    source.rest()
    where = trainer.get("submodule_name")
    block = mapping(config, "cutaway", settings or file)
    if not block and dictionary.site.startswith("blocks.") and not isinstance(where, str):
        source.notes.append(f"the site is taken for the output of layer {trainer['layer']}: no module is named")
    return Reading(
        dictionary=restored(dictionary, block, settings or file),
        format=f"dictionary_learning {kind}",
        path=path,
        tensors=tuple(source.stored),
        folds=tuple(source.folds),
        hooks=(where,) if isinstance(where, str) else (),
        notes=tuple(source.notes),
    )


def _class(source: Source, named: Any) -> str:
    """The class that the configuration names, or that the keys allow."""
    if named is not None and named not in _CLASSES:
        raise BadFile(f"{source.path} is a {named!r}; read are {', '.join(_CLASSES)} and crosscoders")
    if named:
        return named
    for kind, keys in (
        ("GatedAutoEncoder", ("r_mag",)),
        ("MatryoshkaBatchTopKSAE", ("group_sizes",)),
        ("JumpReluAutoEncoder", ("W_enc", "threshold")),
        ("AutoEncoderNew", ("decoder.bias",)),
        ("AutoEncoder", ("encoder.weight", "bias")),
    ):
        if all(key in source for key in keys):
            return kind
    raise BadFile(f"{source.path} has no {CFG} beside it that names its class, and its keys fit several classes")


def _dictionary(source: Source, kind: str, trainer: dict[str, Any]) -> Dictionary:
    if "W_enc" in source:
        W_enc = source.take("W_enc", "W_enc [d_in, F]", dims=2)
        W_dec = source.take("W_dec", "W_dec [F, d_out]", dims=2)
    else:
        W_enc = source.take("encoder.weight", "W_enc [d_in, F]", dims=2, transposed=True)
        W_dec = source.take("decoder.weight", "W_dec [F, d_out]", dims=2, transposed=True)
    names = {
        "AutoEncoder": ("encoder.bias", "bias"),
        "AutoEncoderNew": ("encoder.bias", "decoder.bias"),
        "GatedAutoEncoder": ("gate_bias", "decoder_bias"),
        "AutoEncoderTopK": ("encoder.bias", "b_dec"),
        "BatchTopKSAE": ("encoder.bias", "b_dec"),
    }.get(kind, ("b_enc", "b_dec"))
    b_enc, b_dec = source.take(names[0], "b_enc [F]"), source.take(names[1], "b_dec [d_out]")
    layer, model = trainer.get("layer"), trainer.get("lm_name")
    where = trainer.get("submodule_name")
    site = site_name(where) if isinstance(where, str) else ""
    if not site.startswith("blocks.") and isinstance(layer, int):
        site = f"blocks.{layer}.resid_post"
    dictionary = assemble(
        source,
        {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec},
        _selector(source, kind, trainer, W_enc.shape[1]),
        subtract_b_dec=kind not in ("AutoEncoderNew", "JumpReluAutoEncoder"),
        **ports(site, None, (W_enc.shape[0], W_dec.shape[1]), model),
    )
    norms = dictionary.W_dec.norm(dim=1)
    if kind == "AutoEncoder" and not _unit(norms):
        dictionary = fold(
            source,
            "decoder norms: into W_enc and b_enc and out of W_dec, as dictionary_learning does when it loads",
            dictionary,
            lambda d: folds.selected_by_decoder_norm(d, torch.where(norms > 0, norms, torch.ones_like(norms))),
        )
    return _denormalised(source, dictionary)


def _unit(norms: Tensor) -> bool:
    return torch.allclose(norms, torch.ones_like(norms))


def _selector(source: Source, kind: str, trainer: dict[str, Any], n_latents: int) -> Selector:
    if kind == "GatedAutoEncoder":
        return Gated(source.take("r_mag", "r_mag [F]"), source.take("mag_bias", "b_mag [F]"))
    if kind == "JumpReluAutoEncoder":
        return thresholded(source, source.take("threshold", "threshold [F]"))
    if kind in ("AutoEncoder", "AutoEncoderNew"):
        return ReLU()
    k = source.number("k", "k") if "k" in source else trainer.get("k")
    if not isinstance(k, int | float) or not 1 <= k <= n_latents:
        raise BadFile(f"{source.path} has k = {k!r}, where a number from 1 to {n_latents} is needed")
    if kind == "AutoEncoderTopK":
        source.unused("threshold", "the k largest of a token are taken")
        return TopK(int(k))
    return batch_topk(source, k, source.number("threshold", "threshold"), n_latents)


def _denormalised(source: Source, dictionary: Dictionary) -> Dictionary:
    """Fold the normalisation that some forks store: (x − mean) · scale goes in, and back at the end."""
    normal = normalisation(source, (dictionary.d_in,))
    if normal is None:
        return dictionary
    mean, scale_in, scale_out = normal
    return fold(
        source,
        "activation_mean and activation_std: into the weights and biases",
        dictionary,
        lambda d: folds.centred(folds.scaled(d, scale_in, scale_out), mean),
    )


def _biases_scaled(dictionary: Dictionary, factor: float) -> Dictionary:
    selector = dictionary.selector
    if isinstance(selector, JumpReLU):
        selector = JumpReLU(selector.threshold * factor)
    elif isinstance(selector, BatchTopK):
        selector = replace(selector, threshold=selector.threshold * factor)
    elif isinstance(selector, Gated):
        selector = replace(selector, b_mag=selector.b_mag * factor)
    return replace(dictionary, b_enc=dictionary.b_enc * factor, b_dec=dictionary.b_dec * factor, selector=selector)


def write(dictionary: Dictionary, folder: Path) -> None:
    """Write `ae.pt` and `config.json` into an existing, empty folder."""
    if dictionary.kind == "crosscoder":
        crosscoders.write_learned(dictionary, folder)
        return
    if not dictionary.writes_what_it_reads or dictionary.W_skip is not None or dictionary.input_norm:
        what = "normalises its input" if dictionary.input_norm else f"is a {dictionary.kind.replace('_', ' ')}"
        raise NotSupported(
            f"dictionary_learning has autoencoders without normalisation, and this one {what}: save it as "
            "format='saelens' or 'cutaway'"
        )
    selector = dictionary.selector
    # AutoEncoder's loader folds decoder norms away, which would change the activations; AutoEncoderNew's does not
    free = isinstance(selector, ReLU) and not _unit(dictionary.W_dec.float().norm(dim=1))
    dictionary = folds.subtracting(dictionary, subtract=not (isinstance(selector, JumpReLU) or free))
    linear = {"encoder.weight": dictionary.W_enc.T, "decoder.weight": dictionary.W_dec.T}
    plain_names = {name: getattr(dictionary, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    if isinstance(selector := dictionary.selector, Gated):
        kind = "GatedAutoEncoder"
        tensors = linear | {
            "decoder_bias": dictionary.b_dec,
            "r_mag": selector.r_mag,
            "gate_bias": dictionary.b_enc,
            "mag_bias": selector.b_mag,
        }
    elif isinstance(selector, JumpReLU):
        kind, tensors = "JumpReluAutoEncoder", plain_names | {"threshold": selector.threshold}
    elif isinstance(selector, ReLU):
        kind, bias = ("AutoEncoderNew", "decoder.bias") if free else ("AutoEncoder", "bias")
        tensors = linear | {"encoder.bias": dictionary.b_enc, bias: dictionary.b_dec}
    else:
        kind = "AutoEncoderTopK" if isinstance(selector, TopK) else "BatchTopKSAE"
        threshold = selector.threshold if isinstance(selector, BatchTopK) else -1.0
        tensors = linear | {
            "encoder.bias": dictionary.b_enc,
            "b_dec": dictionary.b_dec,
            "k": torch.tensor(selector.k, dtype=torch.int32),
            "threshold": torch.tensor(threshold, dtype=torch.promote_types(torch.float32, dictionary.b_enc.dtype)),
        }
    parts = dictionary.site.split(".")
    trainer = {
        "dict_class": kind,
        "activation_dim": dictionary.d_in,
        "dict_size": dictionary.d_sae,
        "layer": int(parts[1]) if parts[0] == "blocks" and len(parts) > 1 and parts[1].isdigit() else None,
        "lm_name": dictionary.model.get("id"),
        "submodule_name": None,
    }
    if isinstance(selector, TopK | BatchTopK):
        trainer["k"] = selector.k
    buffer = {"ctx_len": dictionary.metadata.get("context")}  # SAELens asks for it when it reads this format
    write_archive(folder / WEIGHTS, tensors)
    write_json(folder / CFG, {"trainer": trainer, "buffer": buffer, "cutaway": plain(our_block(dictionary))})
