"""SAELens: folders of `cfg.json`, `sae_weights.safetensors` and perhaps `sparsity.safetensors`.

    W_enc [d, F], W_dec [F, d_out], b_dec [d_out], b_enc [F]; threshold [F] (jumprelu); b_gate, b_mag, r_mag [F] instead
    of b_enc (gated); W_skip [d_out, d] (skip transcoders)

Read are the layouts of versions 6 and 5 and before (flat settings), and checkpoints of its training, which hold
`topk_threshold` or `log_threshold` and scale in a file beside. What is written needs no scaling: normalisation is that
of the token or none, and activations are not rescaled by decoder norms. Where SAELens has no architecture for a
dictionary ("crosscoder", ...) the same files are written under a name that it does not know.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cutaway.artifacts.errors import BadFile, CutawayError, NotSupported
from cutaway.artifacts.files import plain, write_json, write_safetensors
from cutaway.dictionaries.dictionary import BatchTopK, Dictionary, Gated, Port, ReLU, TopK
from cutaway.dictionaries.formats import folds
from cutaway.dictionaries.formats.hooks import hook_name, site_name
from cutaway.dictionaries.formats.reading import (
    ExpectedL0,
    Ports,
    Reading,
    Source,
    assemble,
    batch_topk,
    fold,
    integer,
    mapping,
    our_block,
    port_of,
    ports,
    restored,
    thresholded,
)
from cutaway.dictionaries.formats.untrusted import read_settings, read_tensors
from cutaway.dictionaries.selectors import Selector

CFG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
SCALER, _WHITENING = "activation_scaler.json", "activation_whitening.safetensors"
_WRITTEN_FOR = "6.54.0"
_TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
_SAES = ("standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka_batchtopk")
_OURS = ("crosscoder", "topk_transcoder", "topk_skip_transcoder", "gated_transcoder", "gated_skip_transcoder")
_NORMALISED = "normalised_"  # before the name of one whose skip connection sees the normalised input, not x itself
_OURS_SAES = ("skip", "jumprelu_skip", "topk_skip", "gated_skip")
_REFUSED = {
    "abstopk": "its activations have signs",
    "matching_pursuit": "it encodes step by step, without encoder weights",
    "temporal": "it predicts from other tokens",
}
_NORMS = {"layer_norm": "layer_norm", "constant_norm_rescale": "unit", "none": None}
_FOLDED_NORMS = ("expected_average_only_in", "covariance_whitening")


def fits(path: Path) -> bool:
    """Whether the folder looks like SAELens'."""
    return (path / CFG).is_file() and not (path / "sae.safetensors").exists() and not (path / "cc_weights.pt").exists()


def read(path: Path) -> Reading:
    """Read a folder. Raises `CutawayError` for what is spoiled, and for architectures that are no dictionaries."""
    cfg = read_settings(path / CFG)
    version, cfg = _modern(cfg, path)
    metadata = mapping(cfg, "metadata", path / CFG)
    architecture = str(cfg.get("architecture")).removeprefix(_NORMALISED)
    if architecture in _REFUSED:
        raise BadFile(f"{path} is a dictionary of architecture {architecture!r}, not read: {_REFUSED[architecture]}")
    if architecture not in (*_SAES, *_TRANSCODERS, *_OURS, *_OURS_SAES):
        raise BadFile(
            f"{path} is a dictionary of architecture {architecture!r}; read are {', '.join((*_SAES, *_TRANSCODERS))}"
        )
    block = mapping(metadata, "cutaway", path / CFG)
    source = Source(path / WEIGHTS, dict(read_tensors(path / WEIGHTS)))
    hooks = tuple(hook for hook in (metadata.get("hook_name"), metadata.get("hook_name_out")) if isinstance(hook, str))
    dictionary, checkpoint = _dictionary(source, cfg, architecture, metadata, path)
    dictionary = _unscaled(source, dictionary, cfg, path)
    dictionary = restored(dictionary, block, path / CFG)
    if (path / SPARSITY).exists():
        sparsity = read_tensors(path / SPARSITY).get("sparsity")
        if sparsity is None:
            raise CutawayError(f"{path / SPARSITY} lacks sparsity")
        try:
            dictionary = replace(dictionary, sparsity=sparsity.float())
        except CutawayError as error:
            raise CutawayError(f"{path / SPARSITY}: {error}") from error
    if metadata.get("hook_head_index") is not None:
        source.notes.append(f"only head {metadata['hook_head_index']} of the site is read")
    source.rest()
    l0 = metadata.get("l0")
    ours = " (with cutaway's block)" if block else ""
    return Reading(
        dictionary=dictionary,
        format=f"SAELens {version}{', training checkpoint' if checkpoint else ''}{ours}",
        path=path,
        tensors=tuple(source.stored),
        folds=tuple(source.folds),
        hooks=hooks,
        expected_l0=(ExpectedL0(float(l0), "metadata.l0"),) if isinstance(l0, int | float) else (),
        notes=tuple(source.notes),
    )


def _modern(cfg: dict[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
    """The version's name and the settings as version 6 has them, by the rules of its own upgrade."""
    metadata = mapping(cfg, "metadata", path / CFG)
    version = cfg.get("sae_lens_version") or metadata.get("sae_lens_version")
    if isinstance(version, str) and version.split(".")[0].isdigit() and int(version.split(".")[0]) >= 6:
        return "6", cfg
    renamed = {
        "hook_point": "hook_name",
        "hook_point_head_index": "hook_head_index",
        "activation_fn_str": "activation_fn",
    }
    new = {renamed.get(name, name): value for name, value in cfg.items()}
    if "metadata" not in cfg:  # flat: what is not a setting of the dictionary is about where it belongs
        new["metadata"] = {**new}
    new.setdefault("architecture", "standard")
    new.setdefault("apply_b_dec_to_input", True)
    function = new.get("activation_fn", "relu")
    arguments = mapping(new, "activation_fn_kwargs", path / CFG)
    if function == "topk" and arguments.get("k") is not None:
        new |= {"architecture": "topk", "k": arguments["k"]}
    elif function not in ("relu", "topk", None):
        raise BadFile(f"{path} has activations {function!r}; read are relu and topk")
    normalise = new.get("normalize_activations")
    if isinstance(normalise, bool) or normalise is None:
        new["normalize_activations"] = "expected_average_only_in" if normalise else "none"
    return "5", new


def _dictionary(
    source: Source, cfg: Mapping[str, Any], architecture: str, metadata: Mapping[str, Any], path: Path
) -> tuple[Dictionary, bool]:
    """The dictionary before any scaling is folded, and whether the weights are a training checkpoint's."""
    d_in, d_sae = (integer(cfg, name, path / CFG) for name in ("d_in", "d_sae"))
    W_enc = source.take("W_enc", "W_enc [d_in, F]", dims=2)
    if tuple(W_enc.shape) != (d_in, d_sae):
        raise BadFile(f"{path}: W_enc has shape {list(W_enc.shape)}, but {CFG} says d_in={d_in}, d_sae={d_sae}")
    W_dec = source.take("W_dec", "W_dec [F, d_out]", dims=2)
    b_enc = source.take("b_gate" if "b_gate" in source or architecture.startswith("gated") else "b_enc", "b_enc [F]")
    selector, checkpoint = _selector(source, cfg, architecture, d_sae, path)
    other = architecture in _TRANSCODERS or architecture.endswith("_transcoder")
    b_dec = source.take("b_dec", "b_dec [d_out]")
    skip = source.maybe("W_skip", "W_skip [d_out, d_in]", dims=2)
    norm = cfg.get("normalize_activations", "none")
    if norm not in (*_NORMS, *_FOLDED_NORMS):
        raise CutawayError(
            f"{path / CFG}: normalize_activations is {norm!r}; read are {', '.join((*_NORMS, *_FOLDED_NORMS))}"
        )
    if skip is not None and _NORMS.get(norm) is not None and not str(cfg["architecture"]).startswith(_NORMALISED):
        raise BadFile(f"{path} normalises its input but not that of its skip connection, which is not read")
    named = _ports(metadata, W_enc.shape[0], W_dec.shape[1], other)
    if architecture == "crosscoder":  # the sites are in our block
        named = Ports(reads=_halves(metadata, "reads", path), writes=_halves(metadata, "writes", path))
    dictionary = assemble(
        source,
        {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec},
        selector,
        W_skip=skip,
        subtract_b_dec=not other and bool(cfg.get("apply_b_dec_to_input", True)),
        input_norm=_NORMS.get(norm),
        **named,
    )
    if cfg.get("rescale_acts_by_decoder_norm", False):
        norms = dictionary.W_dec.norm(dim=1).clamp_min(1e-8)  # the floor is SAELens'
        dictionary = fold(
            source,
            "decoder norms: h · ‖W_dec,i‖ is what is selected, so they went into W_enc and b_enc and out of W_dec",
            dictionary,
            lambda d: folds.selected_by_decoder_norm(d, norms),
        )
    factor = source.maybe("scaling_factor", "factor of the activations [F]")
    if factor is not None and not torch.allclose(factor, torch.ones_like(factor)):
        if not cfg.get("finetuning_scaling_factor", False):
            raise BadFile(f"{source.path} has a scaling_factor that {CFG} does not say is to be used")
        dictionary = fold(
            source, "scaling_factor: into W_dec", dictionary, lambda d: replace(d, W_dec=d.W_dec * factor[:, None])
        )
    return dictionary, checkpoint


def _selector(
    source: Source, cfg: Mapping[str, Any], architecture: str, d_sae: int, path: Path
) -> tuple[Selector, bool]:
    """The selector, and whether the weights are a training checkpoint's."""
    checkpoint = "topk_threshold" in source or "log_threshold" in source
    cross = architecture == "crosscoder"
    if architecture.startswith("gated") or (cross and "r_mag" in source):
        return Gated(source.take("r_mag", "r_mag [F]"), source.take("b_mag", "b_mag [F]")), checkpoint
    if architecture.startswith("topk") or (cross and "k" in cfg):
        return TopK(integer(cfg, "k", path / CFG)), checkpoint
    if architecture in ("batchtopk", "matryoshka_batchtopk"):
        threshold = source.number("topk_threshold", "threshold")
        return batch_topk(source, _number(cfg, "k", path), threshold, d_sae), True
    if architecture.startswith("jumprelu") or (cross and "threshold" in source):
        log = source.maybe("log_threshold", "threshold [F], exp applied")
        return thresholded(source, source.take("threshold", "threshold [F]") if log is None else log.exp()), checkpoint
    return ReLU(), checkpoint


def _halves(metadata: Mapping[str, Any], name: str, path: Path) -> tuple[Port, ...]:
    block = mapping(metadata, "cutaway", path / CFG)
    if name == "reads" and not block.get("reads"):
        raise CutawayError(f"{path / CFG} is of a crosscoder and does not name the tensors that it reads")
    records = block.get(name) or ()
    return tuple(port_of(record, path / CFG) for record in records)


def _ports(metadata: Mapping[str, Any], d_in: int, d_out: int, other: bool) -> Ports:
    """Sites by the names of Hugging Face modules where there are any: hooks of the same name differ in meaning."""

    def site(*names: str) -> str:
        stored = [metadata.get(name) for name in names]
        found = [site_name(hook) for hook in stored if isinstance(hook, str) and hook]
        return (
            next((name for name in found if name.startswith(("blocks.", "embed", "pos_embed"))), "")
            or (found or [""])[-1]
        )

    read = site("hf_hook_name", "hook_name")
    write = site("hf_hook_name_out", "hook_name_out") if other else None
    return ports(read, write, (d_in, d_out), metadata.get("model_name"))


def _unscaled(source: Source, dictionary: Dictionary, cfg: Mapping[str, Any], path: Path) -> Dictionary:
    """Fold the scaling of a training checkpoint, which is applied to x first and whitened next."""
    norm = cfg.get("normalize_activations", "none")
    whitening = _whitening(path)
    if whitening is not None:
        mean, matrix, inverse = whitening
        dictionary = fold(
            source,
            f"whitening of {_WHITENING}: into W_enc, W_dec and b_dec",
            dictionary,
            lambda d: folds.whitened(d, mean, matrix, inverse),
        )
    scale = read_settings(path / SCALER).get("scaling_factor") if (path / SCALER).exists() else None
    if scale is not None:
        if not isinstance(scale, int | float) or not 0 < scale < float("inf"):
            raise CutawayError(f"{path / SCALER}: scaling_factor is {scale!r}")
        dictionary = fold(
            source, f"scale {scale:.6g} of {SCALER}: W_enc times it, W_dec and b_dec divided", dictionary,
            lambda d: folds.scaled(d, float(scale), float(scale)),
        )  # fmt: skip
        if cfg.get("rescale_acts_by_decoder_norm", False):  # by the norms as they are in the model's own units
            dictionary = fold(
                source, f"activations divided by {scale:.6g}, with which the decoder norms are 1 again", dictionary,
                lambda d: folds.activations_times(d, 1 / float(scale)),
            )  # fmt: skip
    if norm in _FOLDED_NORMS and scale is None and whitening is None:
        source.notes.append(
            f"normalize_activations is {norm!r} and no file says by how much: the weights are read as if it were folded"
        )
    return dictionary


def _whitening(path: Path) -> tuple[Tensor, Tensor, Tensor] | None:
    says = read_settings(path / SCALER).get("has_whitening", True) if (path / SCALER).exists() else True
    if not says or not (path / _WHITENING).exists():
        return None
    file = Source(path / _WHITENING, dict(read_tensors(path / _WHITENING)))
    mean = file.take("mean", "mean")
    matrix, inverse = file.take("matrix", "matrix", dims=2), file.take("inverse_matrix", "inverse", dims=2)
    if not all(torch.isfinite(tensor).all() for tensor in (mean, matrix, inverse)):
        raise CutawayError(f"{path / _WHITENING} holds NaN or infinite values")
    return mean, matrix, inverse


def _number(cfg: Mapping[str, Any], name: str, path: Path) -> float:
    value = cfg.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise CutawayError(f"{path / CFG}: {name!r} is {value!r}, where a number is needed")
    return value


def _architecture_of(dictionary: Dictionary) -> tuple[str, bool]:
    """What SAELens calls it, and whether it does: else the name is ours."""
    if dictionary.kind == "crosscoder":
        return "crosscoder", False
    selector = dictionary.selector
    name = "topk" if isinstance(selector, TopK) else "gated" if isinstance(selector, Gated) else "jumprelu"
    if isinstance(selector, ReLU):
        name = ""
    skip = dictionary.W_skip is not None
    parts = [name, "skip" if skip else "", "" if dictionary.writes_what_it_reads else "transcoder"]
    whole = "_".join(part for part in parts if part) or "standard"
    theirs = whole in (*_SAES, *_TRANSCODERS)
    return (_NORMALISED + whole, False) if skip and dictionary.input_norm else (whole, theirs)


def write(dictionary: Dictionary, folder: Path, layout: Literal["cutaway", "6", "5", "training"]) -> None:
    """Write the files into an existing, empty folder.

    Layout "cutaway" is that of version 6, also for what SAELens could not load; "5" has one flat object of settings,
    "training" are the weights of a training checkpoint, where BatchTopK is not yet jumprelu.
    """
    architecture, theirs = _architecture_of(dictionary)
    if not theirs and layout != "cutaway":
        raise NotSupported(
            f"SAELens has no architecture for this dictionary ({dictionary!r}): save it as format='cutaway'"
        )
    if layout in ("5", "training") and architecture in _TRANSCODERS:
        which = "5 has no transcoders" if layout == "5" else "does not train transcoders"
        raise CutawayError(f"SAELens {which}: save it as format='saelens'")
    if not dictionary.writes_what_it_reads:
        dictionary = folds.subtracting(dictionary, subtract=False)
    tensors = {name: getattr(dictionary, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    selector = dictionary.selector
    if isinstance(selector, Gated):
        tensors |= {"r_mag": selector.r_mag, "b_mag": selector.b_mag}
        tensors["b_gate"] = tensors.pop("b_enc")
    elif layout == "training" and isinstance(selector, BatchTopK):
        architecture = "batchtopk"
        tensors["topk_threshold"] = torch.tensor(selector.threshold, dtype=torch.float64)
    elif not isinstance(selector, ReLU | TopK):
        threshold = folds.as_thresholds(dictionary)
        assert threshold is not None
        tensors["threshold"] = threshold
    if dictionary.W_skip is not None:
        tensors["W_skip"] = dictionary.W_skip
    cfg = _configuration(dictionary, architecture)
    write_json(folder / CFG, _flat(cfg) if layout == "5" else cfg)
    if layout == "training":
        write_json(folder / SCALER, {"scaling_factor": None, "has_whitening": False})
    write_safetensors(
        folder / WEIGHTS, {name: tensor.detach().cpu() for name, tensor in tensors.items()}, {"format": "pt"}
    )
    if dictionary.sparsity is not None:
        write_safetensors(folder / SPARSITY, {"sparsity": dictionary.sparsity.detach().float().cpu()})


def _configuration(dictionary: Dictionary, architecture: str) -> dict[str, Any]:
    metadata, selector = dictionary.metadata, dictionary.selector
    theirs = {norm: name for name, norm in _NORMS.items()}
    hook = hook_name(dictionary.inputs[0].site)
    cfg: dict[str, Any] = {
        "architecture": architecture,
        "d_in": dictionary.d_in,
        "d_sae": dictionary.d_sae,
        "dtype": str(dictionary.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": dictionary.subtract_b_dec,
        "normalize_activations": theirs[dictionary.input_norm],
        "reshape_activations": "hook_z" if hook.endswith("hook_z") and dictionary.writes_what_it_reads else "none",
    }
    if isinstance(selector, TopK) or architecture == "batchtopk":
        assert isinstance(selector, TopK | BatchTopK)
        cfg |= {"k": selector.k, "rescale_acts_by_decoder_norm": False}
    if dictionary.writes:
        cfg["d_out"] = dictionary.d_out
    cfg["metadata"] = {
        "sae_lens_version": _WRITTEN_FOR,
        "sae_lens_training_version": None,
        "model_name": dictionary.model.get("id"),
        "hook_name": hook,
        **({} if dictionary.writes_what_it_reads else {"hook_name_out": hook_name(dictionary.outputs[0].site)}),
        "hook_head_index": None,
        "context_size": metadata.get("context"),
        "prepend_bos": metadata.get("prepend_bos", True),
        "dataset_path": metadata.get("corpus"),
        "exclude_special_tokens": metadata.get("excluded_tokens"),
        "cutaway": plain(our_block(dictionary)),
    }
    return cfg


def _flat(cfg: dict[str, Any]) -> dict[str, Any]:
    """The settings as version 5 has them."""
    metadata = cfg["metadata"]
    topk = cfg["architecture"] == "topk"
    hook = metadata["hook_name"]
    layer = hook.split(".")[1] if hook.startswith("blocks.") else ""
    flat = {name: value for name, value in cfg.items() if name not in ("metadata", "k", "reshape_activations")}
    return flat | {
        "architecture": "standard" if topk else cfg["architecture"],
        "activation_fn_str": "topk" if topk else "relu",
        "activation_fn_kwargs": {"k": cfg["k"]} if topk else {},
        "finetuning_scaling_factor": False,
        "context_size": metadata["context_size"],
        "model_name": metadata["model_name"],
        "hook_name": hook,
        "hook_layer": int(layer) if layer.isdigit() else None,
        "hook_head_index": None,
        "prepend_bos": metadata["prepend_bos"],
        "dataset_path": metadata["dataset_path"],
        "dataset_trust_remote_code": False,
        "sae_lens_training_version": None,
        "neuronpedia_id": None,
        "model_from_pretrained_kwargs": {},
        "seqpos_slice": [None],
        "cutaway": metadata["cutaway"],
    }
