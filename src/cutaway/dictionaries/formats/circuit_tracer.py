"""circuit-tracer: a set of transcoders, one per layer: `config.yaml` and `layer_{n}.safetensors`.

    W_enc [F, d], W_dec [F, d_out], b_enc [F], b_dec [d_out]; perhaps W_skip [d_out, d] and
    activation_function.threshold [F]; k

    a = relu(x · W_encᵀ + b_enc), or jumprelu, or topk;   y = a · W_dec + b_dec (+ x · W_skipᵀ)

`config.yaml` has the model, the hooks that are read and written in every layer, and where the layers' files are.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cutaway.artifacts.errors import BadFile, CutawayError, NotSupported
from cutaway.artifacts.files import plain, write_safetensors, write_text
from cutaway.dictionaries.dictionary import Dictionary, ReLU, TopK
from cutaway.dictionaries.formats import folds
from cutaway.dictionaries.formats.hooks import hook_name, site_name
from cutaway.dictionaries.formats.reading import (
    Reading,
    Source,
    assemble,
    mapping,
    our_block,
    ports,
    restored,
    thresholded,
)
from cutaway.dictionaries.formats.untrusted import read_settings, read_tensors
from cutaway.dictionaries.selectors import Selector

CFG = "config.yaml"
_LAYER = re.compile(r"layer_(\d+)\.safetensors")
_THRESHOLDS = ("activation_function.threshold", "threshold")


def fits(path: Path) -> bool:
    """Whether the path is a layer's file, or a folder of them."""
    if path.is_file():
        return _LAYER.fullmatch(path.name) is not None
    marked = (path / CFG).is_file() or (path / "W_enc_0.safetensors").is_file()
    return path.is_dir() and (marked or any(_LAYER.fullmatch(file.name) for file in path.iterdir()))


def layers(path: Path) -> dict[str, str | Path]:
    """Where the dictionaries of a set are, by name: files of the folder, or addresses ("hf://...")."""
    if path.is_file():
        return {path.stem: path}
    config = read_settings(path / CFG) if (path / CFG).is_file() else {}
    _refuse_cross_layer(path, config)
    found: dict[str, str | Path] = {}
    entries = config.get("transcoders")
    if entries is not None and not isinstance(entries, list):
        raise CutawayError(f"{path / CFG}: 'transcoders' is no list")
    for number, entry in enumerate(entries or ()):
        place = entry.get("filepath") if isinstance(entry, dict) else entry
        layer = entry.get("layer", number) if isinstance(entry, dict) else _number_in(entry, number)
        if not isinstance(place, str) or not isinstance(layer, int):
            raise CutawayError(f"{path / CFG}: entry {number} of 'transcoders' is {entry!r}")
        if place.startswith("hf://"):
            found[f"layer_{layer}"] = place
            continue
        try:
            file = (path / place).resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a link in a circle, a zero byte
            raise CutawayError(f"{path / CFG} names {place!r}, which is no file") from error
        if not file.is_relative_to(path.resolve()):
            raise CutawayError(f"{path / CFG} names {place}, which is outside of its folder")
        found[f"layer_{layer}"] = file
    if not entries:
        files = [file for file in path.iterdir() if _LAYER.fullmatch(file.name)]
        found = {file.stem: file for file in sorted(files, key=lambda file: int(file.stem.split("_")[1]))}
    if not found:
        raise BadFile(f"{path} holds no layer_0.safetensors, layer_1.safetensors, ..., and its {CFG} names none")
    return found


def _number_in(place: Any, otherwise: int) -> int:
    match = re.search(r"layer_(\d+)", place) if isinstance(place, str) else None
    return int(match[1]) if match else otherwise


def _refuse_cross_layer(path: Path, config: dict[str, Any]) -> None:
    if config.get("model_kind") == "cross_layer_transcoder" or (path / "W_enc_0.safetensors").exists():
        raise BadFile(
            f"{path} is a cross-layer transcoder, whose latents write to every later layer at once, which is not read"
        )


def read(path: Path, config_folder: Path | None = None) -> Reading:
    """Read one layer's file; the settings are those of the folder that it is in, or of another."""
    folder = config_folder or path.parent
    config = read_settings(folder / CFG) if (folder / CFG).is_file() else {}
    _refuse_cross_layer(folder, config)
    if not path.is_file():
        raise BadFile(f"{path} is missing")
    number = _LAYER.fullmatch(path.name)
    source = Source(path, dict(read_tensors(path)))
    W_enc = source.take("W_enc", "W_enc [d_in, F]", dims=2, transposed=True)
    b_enc, b_dec = source.take("b_enc", "b_enc [F]"), source.take("b_dec", "b_dec [d_out]")
    n, out = W_enc.shape[1], len(b_dec)
    stored = source.tensors.get("W_dec")
    turned = stored is not None and tuple(getattr(stored, "shape", ())) == (out, n) and out != n  # of the first files
    W_dec = source.take("W_dec", "W_dec [F, d_out]", dims=2, transposed=turned)
    skip = source.maybe("W_skip", "W_skip [d_out, d_in]", dims=2)
    selector = _selector(source, n)
    source.rest()
    hooks = tuple(config.get(name) for name in ("feature_input_hook", "feature_output_hook"))
    sites = ["", ""]
    if number is not None:
        for i, hook in enumerate(hooks):
            sites[i] = site_name(f"blocks.{number[1]}.{hook}") if isinstance(hook, str) else ""
    dictionary = assemble(
        source,
        {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec},
        selector,
        W_skip=skip,
        subtract_b_dec=False,
        **ports(sites[0], sites[1], (W_enc.shape[0], out), config.get("model_name")),
    )
    block = mapping(mapping(config, "cutaway", folder / CFG), path.stem, folder / CFG)
    return Reading(
        dictionary=restored(dictionary, block, folder / CFG),
        format="circuit-tracer transcoder",
        path=path,
        tensors=tuple(source.stored),
        folds=tuple(source.folds),
        hooks=tuple(hook for hook in hooks if isinstance(hook, str)),
        notes=tuple(source.notes),
    )


def _selector(source: Source, n_latents: int) -> Selector:
    k = source.number("k", "k")
    if k is not None:
        if not 1 <= k <= n_latents:
            raise BadFile(f"{source.path}: k is {k}, where a number from 1 to {n_latents} is needed")
        return TopK(int(k))
    for name in _THRESHOLDS:
        if name in source:
            value = source.tensors[name]
            if getattr(value, "numel", lambda: 0)() == 1 and n_latents != 1:
                one = source.number(name, "threshold, the same of all latents")
                assert one is not None
                return thresholded(source, source.tensors["b_enc"].new_full((n_latents,), one))
            return thresholded(source, source.take(name, "threshold [F]"))
    return ReLU()


def write(dictionaries: Sequence[Dictionary], folder: Path) -> None:
    """Write a set into an existing, empty folder: one transcoder per layer."""
    import yaml

    files: dict[str, Dictionary] = {}
    hooks: set[tuple[str, str]] = set()
    for dictionary in dictionaries:
        layer, read_hook = _split(dictionary, dictionary.inputs[0].site)
        _, write_hook = _split(dictionary, dictionary.outputs[0].site)
        what = None
        if dictionary.kind == "crosscoder":
            what = "is a crosscoder"
        elif dictionary.input_norm:
            what = "normalises its input"
        elif folds.as_thresholds(dictionary) is None and not isinstance(dictionary.selector, TopK):
            what = f"is {dictionary.selector.name}"
        if what is not None:
            raise NotSupported(
                f"circuit-tracer has relu, jumprelu and topk transcoders without normalisation, and this one {what}: "
                "save it as format='cutaway'"
            )
        if f"layer_{layer}" in files:
            raise CutawayError(f"two dictionaries are of layer {layer}: a set of circuit-tracer has one per layer")
        files[f"layer_{layer}"] = dictionary
        hooks.add((read_hook, write_hook))
    if len(hooks) != 1:
        raise CutawayError("the dictionaries of a set read the same hook in every layer, and so they write")
    block: dict[str, Any] = {}
    for name, dictionary in files.items():
        plainer = folds.subtracting(dictionary, subtract=False)
        tensors = {"W_enc": plainer.W_enc.T, "W_dec": plainer.W_dec, "b_enc": plainer.b_enc, "b_dec": plainer.b_dec}
        selector = plainer.selector
        if isinstance(selector, TopK):
            tensors["k"] = plainer.b_enc.new_tensor(selector.k).long()
        elif not isinstance(selector, ReLU):
            threshold = folds.as_thresholds(plainer)
            assert threshold is not None
            tensors["activation_function.threshold"] = threshold
        if plainer.W_skip is not None:
            tensors["W_skip"] = plainer.W_skip
        write_safetensors(
            folder / f"{name}.safetensors", {key: tensor.detach().cpu() for key, tensor in tensors.items()}
        )
        block[name] = plain(our_block(dictionary))
    read_hook, write_hook = hooks.pop()
    model = dictionaries[0].model.get("id")
    config = {
        "model_name": model,
        "model_kind": "transcoder_set",
        "feature_input_hook": read_hook,
        "feature_output_hook": write_hook,
        "scan": model,
        "transcoders": [f"{name}.safetensors" for name in files],
        "cutaway": block,
    }
    write_text(folder / CFG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def _split(dictionary: Dictionary, site: str) -> tuple[int, str]:
    """The layer and TransformerLens' hook of a site."""
    parts = hook_name(site).split(".", 2)
    if len(parts) != 3 or parts[0] != "blocks" or not parts[1].isdigit():
        raise NotSupported(
            f"circuit-tracer's sets have one transcoder per layer, and {dictionary!r} is at {site!r}: save it as "
            "format='cutaway'"
        )
    return int(parts[1]), parts[2]
