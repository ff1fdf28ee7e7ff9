"""sparsify: folders of `cfg.json` and `sae.safetensors`, one a hookpoint.

    encoder.weight [F, d], encoder.bias [F], W_dec [F, d], b_dec [d], W_skip [d, d] if `skip_connection`

    a = topk(relu((x − b_dec) · encoder.weightᵀ + encoder.bias))      without "− b_dec" if `transcode`
    y = a · W_dec + b_dec (+ x · W_skipᵀ)

`multi_topk` and `normalize_decoder` change training alone. The folder is named after the module whose output is
written; a transcoder reads the input of the same module.
"""

from pathlib import Path
from typing import Any

import torch

from cutaway.artifacts.errors import BadFile, CutawayError, NotSupported
from cutaway.artifacts.files import plain, write_json, write_safetensors
from cutaway.dictionaries.dictionary import Dictionary, TopK
from cutaway.dictionaries.formats import folds
from cutaway.dictionaries.formats.hooks import site_name
from cutaway.dictionaries.formats.reading import (
    Reading,
    Source,
    assemble,
    integer,
    mapping,
    our_block,
    ports,
    restored,
)
from cutaway.dictionaries.formats.untrusted import read_settings, read_tensors

CFG, WEIGHTS = "cfg.json", "sae.safetensors"


def fits(path: Path) -> bool:
    """Whether the folder looks like sparsify's. Without its settings nothing says k."""
    return (path / WEIGHTS).is_file() and (path / CFG).is_file()


def read(path: Path) -> Reading:
    """Read the folder of one hookpoint."""
    cfg = read_settings(path / CFG)
    activation = cfg.get("activation", "topk")
    if activation != "topk":
        raise BadFile(
            f"{path} has activation {activation!r}: only topk is read, since keeping the largest of each group of "
            "latents is none of the selectors here"
        )
    if cfg.get("signed"):
        raise BadFile(f"{path} selects by magnitude, with signs, which is none of the selectors here")
    source = Source(path / WEIGHTS, dict(read_tensors(path / WEIGHTS)))
    if any(name.startswith(("W_decs.", "post_encs.", "W_skips.")) for name in source.tensors):
        raise BadFile(f"{path} writes to several layers (cross-layer transcoder), which is not read")
    weights = {
        "W_enc": source.take("encoder.weight", "W_enc [d_in, F]", dims=2, transposed=True),
        "b_enc": source.take("encoder.bias", "b_enc [F]"),
        "W_dec": source.take("W_dec", "W_dec [F, d_out]", dims=2),
        "b_dec": source.take("b_dec", "b_dec [d_out]"),
    }
    skip = source.maybe("W_skip", "W_skip [d_out, d_in]", dims=2)
    source.rest()
    transcode = bool(cfg.get("transcode", False))
    hook = path.name
    read_site = site_name(hook, of_module="input") if transcode else site_name(hook)
    known = read_site != hook
    dictionary = assemble(
        source,
        weights,
        TopK(integer(cfg, "k", path / CFG)),
        W_skip=skip,
        subtract_b_dec=not transcode,
        **ports(
            read_site if known else "",
            (site_name(hook) if known else "") if transcode else None,
            (weights["W_enc"].shape[0], weights["W_dec"].shape[1]),
            _run(path).get("model"),
        ),
    )
    if cfg.get("d_in", dictionary.d_in) != dictionary.d_in:
        raise BadFile(f"{path}: encoder.weight is of width {dictionary.d_in}, but {CFG} says d_in={cfg['d_in']}")
    return Reading(
        dictionary=restored(dictionary, mapping(cfg, "cutaway", path / CFG), path / CFG),
        format="sparsify",
        path=path,
        tensors=tuple(source.stored),
        hooks=(f"{hook} (the folder's name)",) if known else (),
        notes=tuple(source.notes),
    )


def _run(path: Path) -> dict[str, Any]:
    """Settings of the whole run, one folder up, where they are."""
    file = path.absolute().parent / "config.json"
    return read_settings(file) if file.is_file() else {}


def write(dictionary: Dictionary, folder: Path) -> None:
    """Write the files into an existing, empty folder."""
    if not isinstance(dictionary.selector, TopK) or dictionary.kind == "crosscoder" or dictionary.input_norm:
        what = "normalises its input" if dictionary.input_norm else f"is {dictionary.selector.name}"
        what = "is a crosscoder" if dictionary.kind == "crosscoder" else what
        raise NotSupported(
            f"sparsify has TopK dictionaries of one site without normalisation, and this one {what}: save it as "
            "format='saelens' or 'cutaway'"
        )
    if dictionary.d_in != dictionary.d_out:
        raise CutawayError(
            f"sparsify's dictionaries write as many values as they read, and this one reads {dictionary.d_in} and "
            f"writes {dictionary.d_out}: save it as format='cutaway'"
        )
    transcode = not dictionary.writes_what_it_reads
    dictionary = folds.subtracting(dictionary, subtract=not transcode)
    tensors = {
        "encoder.weight": dictionary.W_enc.T,
        "encoder.bias": dictionary.b_enc,
        "W_dec": dictionary.W_dec,
        "b_dec": dictionary.b_dec,
    }
    if dictionary.W_skip is not None:
        tensors["W_skip"] = dictionary.W_skip
    norms = dictionary.W_dec.norm(dim=1)
    cfg = {
        "activation": "topk",
        "expansion_factor": max(1, dictionary.d_sae // dictionary.d_in),
        "normalize_decoder": bool(torch.allclose(norms, torch.ones_like(norms), atol=1e-4)),
        "num_latents": dictionary.d_sae,
        "k": dictionary.selector.k if isinstance(dictionary.selector, TopK) else None,
        "multi_topk": False,
        "skip_connection": dictionary.W_skip is not None,
        "transcode": transcode,
        "d_in": dictionary.d_in,
        "cutaway": plain(our_block(dictionary)),
    }
    write_json(folder / CFG, cfg)
    write_safetensors(folder / WEIGHTS, {name: tensor.detach().cpu() for name, tensor in tensors.items()})
