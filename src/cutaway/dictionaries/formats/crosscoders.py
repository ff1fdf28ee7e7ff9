"""Crosscoders: those of the crosscoder branch of dictionary_learning, and the two-model ones of 2024.

    crosscoder_learning       encoder.weight [L, d, F], encoder.bias [F], decoder.weight [L, F, d], decoder.bias [L, d],
                              code_normalization_id; with BatchTopK also k and threshold
    cfg.json + cc_weights.pt  W_enc [L, d, F], W_dec [F, L, d], b_enc [F], b_dec [L, d]; relu

Nothing is taken off the inputs. BatchTopK selects where relu(h)·n > θ, n the latent's decoder norm by its code
normalisation; n goes into the encoder and out of the decoder, so that activations are the scaled ones.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cutaway.artifacts.errors import BadFile, NotSupported
from cutaway.artifacts.files import plain, write_json
from cutaway.dictionaries.dictionary import BatchTopK, Dictionary, Port, ReLU
from cutaway.dictionaries.formats import folds
from cutaway.dictionaries.formats.archive import CFG, WEIGHTS, normalisation, write_archive
from cutaway.dictionaries.formats.reading import (
    Reading,
    Source,
    assemble,
    batch_topk,
    fold,
    mapping,
    model_record,
    our_block,
    restored,
)
from cutaway.dictionaries.formats.untrusted import read_settings, read_tensors

_NORMALISATIONS = {1: "crosscoder", 2: "sae", 3: "mixed", 4: "none", 5: "decoupled"}
_MIXED = (1.0, 0.1)  # weights of the two norms; the file does not hold them, these are the defaults


def fits(path: Path) -> bool:
    """Whether the folder is that of a two-model crosscoder."""
    return (path / "cc_weights.pt").is_file()


def read(path: Path) -> Reading:
    """Read `cfg.json` and `cc_weights.pt`."""
    cfg = read_settings(path / "cfg.json")
    file = path / "cc_weights.pt"
    source = Source(file, dict(read_tensors(file)))
    W_enc = source.take("W_enc", "W_enc [L·d, F], flattened", dims=3)
    W_dec = source.take("W_dec", "W_dec [F, L·d], flattened", dims=3)
    b_dec = source.take("b_dec", "b_dec [L·d], flattened", dims=2)
    n, d, f = W_enc.shape
    _same_shape(source, "W_dec", W_dec, (f, n, d))
    _same_shape(source, "b_dec", b_dec, (n, d))
    models = [cfg.get("model_name"), cfg.get("model_name_b") or cfg.get("model_name")]
    site = str(cfg.get("hook_point") or "unknown")
    dictionary = _assembled(
        source, W_enc, source.take("b_enc", "b_enc [F]"), W_dec.reshape(f, n * d), b_dec, ReLU(),
        [(site, models[min(i, 1)]) for i in range(n)],
    )  # fmt: skip
    source.rest()
    return Reading(
        dictionary=restored(dictionary, mapping(cfg, "cutaway", path), path),
        format="crosscoder (cfg.json + cc_weights.pt)",
        path=path,
        tensors=tuple(source.stored),
        hooks=(site,),
        notes=tuple(source.notes),
    )


def read_learned(source: Source, config: Mapping[str, Any], path: Path) -> Reading:
    """The crosscoder of a crosscoder_learning state_dict."""
    trainer = mapping(config, "trainer", path)
    W_enc = source.take("encoder.weight", "W_enc [L·d, F], flattened", dims=3)
    W_dec = source.take("decoder.weight", "W_dec [F, L·d], turned and flattened", dims=3)
    b_enc = source.take("encoder.bias", "b_enc [F]")
    b_dec = source.take("decoder.bias", "b_dec [L·d], flattened", dims=2)
    n, d, f = W_enc.shape
    _same_shape(source, "decoder.weight", W_dec, (n, f, d))
    _same_shape(source, "decoder.bias", b_dec, (n, d))
    code = source.number("code_normalization_id", "what latents are selected by")
    name = _NORMALISATIONS.get(int(code) if code is not None else 1)
    if name is None:
        raise BadFile(f"{source.path}: code_normalization_id is {code}, where 1 to 5 is needed")
    batch = "k" in source or "threshold" in source
    selector: Any = ReLU()
    if batch:
        if name == "decoupled":
            raise BadFile(
                f"{source.path} selects latents for each layer apart (decoupled), which is none of the selectors here"
            )
        threshold = source.number("threshold", "threshold")
        selector = batch_topk(source, source.number("k", "k") or f, threshold, f)
    places = [(str(trainer.get("submodule_name") or "unknown"), trainer.get("lm_name"))] * n
    dictionary = _assembled(source, W_enc, b_enc, W_dec.transpose(0, 1).reshape(f, n * d), b_dec, selector, places)
    if batch:
        if code is None:
            source.notes.append("no code_normalization_id: latents are taken to be selected by summed decoder norms")
        if name == "mixed":
            source.notes.append(f"the weights of mixed code normalisation are not in the file: {_MIXED} is assumed")
        norms = _code_norms(W_dec, name).clamp_min(1e-12)
        if name != "none":
            dictionary = fold(
                source,
                f"code normalisation ({name}): activations are those times the decoder's norms",
                dictionary,
                lambda crosscoder: folds.selected_by_decoder_norm(crosscoder, norms),
            )
    normal = normalisation(source, (n, d))
    if normal is not None:
        mean, scale_in, scale_out = (tensor.reshape(-1) for tensor in normal)
        dictionary = fold(
            source,
            "activation_mean and activation_std: into the weights and biases",
            dictionary,
            lambda crosscoder: folds.centred(folds.scaled(crosscoder, scale_in, scale_out), mean),
        )
    source.rest()
    return Reading(
        dictionary=restored(dictionary, mapping(config, "cutaway", path), path),
        format=f"dictionary_learning {'BatchTopKCrossCoder' if batch else 'CrossCoder'}",
        path=path,
        tensors=tuple(source.stored),
        folds=tuple(source.folds),
        notes=tuple(source.notes),
    )


def _code_norms(W_dec: Tensor, name: str) -> Tensor:
    """The norm [F] that latents of decoders [L, F, d] are scaled by: summed over layers, of all together, or both."""
    together, summed = W_dec.norm(dim=(0, 2)), W_dec.norm(dim=2).sum(0)
    if name == "sae":
        return together
    if name == "mixed":
        return together * _MIXED[0] + summed * _MIXED[1]
    return torch.ones_like(summed) if name == "none" else summed


def _same_shape(source: Source, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise BadFile(f"{source.path}: {name} has shape {list(tensor.shape)} where {list(shape)} is needed")


def _assembled(
    source: Source, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, selector: Any,
    places: list[tuple[str, Any]],
) -> Dictionary:  # fmt: skip
    """Of encoders [L, d, F], decoders [F, L·d] and a bias [L, d]; `places` are (site, model) of each input."""
    n, d, f = W_enc.shape
    ports = [Port(site, d, model_record(model)) for site, model in places]
    weights = {"W_enc": W_enc.reshape(n * d, f), "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec.reshape(-1)}
    return assemble(source, weights, selector, reads=ports, writes=ports, subtract_b_dec=False)


def write_learned(dictionary: Dictionary, folder: Path) -> None:
    """Write `ae.pt` and `config.json` of crosscoder_learning into an existing, empty folder.

    Latents are not normalised (id 4, none), so a threshold is one of activations as they are.
    """
    widths = {port.width for port in (*dictionary.inputs, *dictionary.outputs)}
    selector = dictionary.selector
    if not dictionary.writes_what_it_reads or len(widths) != 1 or dictionary.W_skip is not None:
        raise NotSupported(
            "dictionary_learning has crosscoders that write the tensors that they read, all of one width, and this one "
            "does not: save it as format='cutaway'"
        )
    if not isinstance(selector, ReLU | BatchTopK):
        raise NotSupported(
            f"dictionary_learning has crosscoders with relu and batchtopk, and this one is {selector.name}: save it as "
            "format='cutaway'"
        )
    dictionary = folds.subtracting(dictionary, subtract=False)
    n, d, f = len(dictionary.inputs), widths.pop(), dictionary.d_sae
    tensors = {
        "encoder.weight": dictionary.W_enc.reshape(n, d, f),
        "encoder.bias": dictionary.b_enc,
        "decoder.weight": dictionary.W_dec.reshape(f, n, d).transpose(0, 1),
        "decoder.bias": dictionary.b_dec.reshape(n, d),
        "code_normalization_id": torch.tensor(4, dtype=torch.int32),
    }
    if isinstance(selector, BatchTopK):
        dtype = torch.promote_types(torch.float32, dictionary.b_enc.dtype)
        tensors |= {
            "k": torch.tensor(selector.k, dtype=torch.int32),
            "threshold": torch.tensor(selector.threshold, dtype=dtype),
        }
    trainer = {
        "dict_class": "BatchTopKCrossCoder" if isinstance(selector, BatchTopK) else "CrossCoder",
        "activation_dim": d,
        "dict_size": f,
        "num_layers": n,
        "lm_name": dictionary.inputs[0].model.get("id"),
    }
    write_archive(folder / WEIGHTS, tensors)
    write_json(folder / CFG, {"trainer": trainer, "cutaway": plain(our_block(dictionary))})
