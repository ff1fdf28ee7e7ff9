"""Tuned lenses on disk: our folders, and those of the tuned-lens library, which are only read.

    lens.safetensors   weight [L, d, d] and bias [L, d]
    manifest.json      model (name, revision, weight hash), corpus, configuration, losses, evaluation, and the hash of
                       lens.safetensors

The library's folder has `config.json` and `params.pt`, a state dict of one linear map per layer (`0.weight`, `0.bias`,
...), whose output is added to the stream as ours is; layer i reads the input of decoder layer i.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from cutaway.artifacts.command import current_command
from cutaway.artifacts.errors import BadFile, CutawayError, NotSupported
from cutaway.artifacts.files import read_json, take_folder, write_json, write_safetensors
from cutaway.artifacts.manifest import Manifest, file_hash
from cutaway.observe.lens.evaluation import LensEvaluation
from cutaway.observe.lens.tuned_lens import TunedLens

TENSORS, MANIFEST = "lens.safetensors", "manifest.json"


def save_tuned_lens(lens: TunedLens, folder: str | Path, *, evaluation: LensEvaluation | None = None) -> Path:
    """Write a lens into a folder; the manifest comes last.

    Args:
        lens: the lens.
        folder: a new folder, or one that holds a tuned lens.
        evaluation: what `evaluate_lens` found, to be kept beside it; what the lens's own file said if None.

    Returns:
        The folder.

    Raises:
        NotSupported: it is not known which model the lens belongs to, as for one that the tuned-lens library trained.
        CutawayError: the folder holds something else.
    """
    if lens.model is None:
        raise NotSupported(
            f"This tuned lens says no weights that it was trained on (only a name, {lens.model_name!r}), so it cannot "
            "be written with its model's identity; keep its own folder."
        )
    folder = take_folder(Path(folder), "tuned lens", {MANIFEST: '"kind": "tuned lens"', TENSORS: "cutaway tuned lens"})
    write_safetensors(folder / TENSORS, {"weight": lens.weight, "bias": lens.bias}, {"format": "cutaway tuned lens 1"})
    manifest = Manifest.create(
        "tuned lens",
        model=lens.model,
        corpus_hash=lens.about.get("corpus_hash"),
        configuration=lens.about.get("configuration"),
        seed=lens.about.get("seed"),
        command=current_command(),
    )
    record = {
        "manifest": manifest.to_json(),
        "model_name": lens.model_name,
        "sha256": file_hash(folder / TENSORS),
        "history": lens.about.get("history", []),
        "evaluation": evaluation.to_json() if evaluation is not None else lens.about.get("evaluation"),
    }
    write_json(folder / MANIFEST, record)
    return folder


def load_tuned_lens(folder: str | Path) -> TunedLens:
    """Read a lens from our folder, or from one of the tuned-lens library's. `lens.check(lm)` says whether it fits.

    Args:
        folder: what `save_tuned_lens` wrote, or a folder with the library's config.json and params.pt, of which tensors
            alone are read.

    Returns:
        The lens.

    Raises:
        BadFile: no such folder, files missing, damaged or changed, another kind of lens, entries that are not finite,
            shapes that do not fit each other.
    """
    folder = Path(folder)
    if os.path.isfile(folder / MANIFEST) or os.path.isfile(folder / TENSORS):
        lens = _ours(folder)
    elif os.path.isfile(folder / "config.json"):
        lens = _of_the_library(folder)
    elif not os.path.exists(folder):
        raise BadFile(f"{folder} does not exist: name the folder of a tuned lens")
    else:
        raise BadFile(
            f"{folder} is no folder of a tuned lens: it holds neither {TENSORS} with {MANIFEST}, nor the tuned-lens "
            "library's config.json with params.pt"
        )
    for name, value in (("weight", lens.weight), ("bias", lens.bias)):
        if not bool(torch.isfinite(value).all()):
            layer = int((~torch.isfinite(value)).flatten(1).any(1).nonzero()[0])
            raise BadFile(f"{folder}: the {name} of translator {layer} holds NaN or infinite values")
    return lens


def _ours(folder: Path) -> TunedLens:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    way_out = "train it again, or copy the folder again"
    record = read_json(folder / MANIFEST)
    if not isinstance(record, dict) or not {"manifest", "sha256", "model_name"} <= record.keys():
        raise BadFile(f"{folder / MANIFEST} is not the manifest of a tuned lens")
    try:
        manifest = Manifest.from_json(record["manifest"])
    except CutawayError as error:
        raise BadFile(f"{folder / MANIFEST}: {error}: {way_out}") from error
    path = folder / TENSORS
    if not path.is_file():
        raise BadFile(f"{path} is missing: {way_out}")
    if file_hash(path) != record["sha256"]:
        raise BadFile(f"{path} is not the file that its manifest describes (its hash differs): {way_out}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadFile(f"{path} could not be read ({error}): {way_out}") from error
    about = {key: record.get(key) for key in ("history", "evaluation")}
    about |= {"configuration": manifest.configuration, "corpus_hash": manifest.corpus_hash, "seed": manifest.seed}
    weight, bias = tensors.get("weight"), tensors.get("bias")
    good = weight is not None and bias is not None and weight.is_floating_point() and bias.is_floating_point()
    if weight is None or bias is None or not good or bias.ndim != 2 or weight.shape != (*bias.shape, bias.shape[1]):
        found = {name: [*tensor.shape] for name, tensor in tensors.items()}
        raise BadFile(f"{path} holds {found}, where weight [layers, d, d] and bias [layers, d] are expected: {way_out}")
    return TunedLens(weight, bias, manifest.model, str(record["model_name"]), None, about)


def _of_the_library(folder: Path) -> TunedLens:
    config = read_json(folder / "config.json")
    needed = ("base_model_name_or_path", "d_model", "num_hidden_layers")
    if not isinstance(config, dict) or not set(needed) <= config.keys():
        raise BadFile(f"{folder / 'config.json'} is not the tuned-lens library's: it lacks one of {needed}")
    kind = config.get("lens_type", "linear_tuned_lens")
    if kind != "linear_tuned_lens":
        raise BadFile(f"{folder} holds a lens of the type {kind!r}; only linear_tuned_lens can be read")
    layers, width, bias = config["num_hidden_layers"], config["d_model"], bool(config.get("bias", True))
    for name, number in (("num_hidden_layers", layers), ("d_model", width)):
        if type(number) is not int or number < 1:
            raise BadFile(f"{folder / 'config.json'} says {name} = {number!r}, where a number above 0 is expected")
    path = folder / "params.pt"
    if not path.is_file():
        raise BadFile(f"{path} is missing: it holds the translators")
    try:  # tensors alone: nothing that such a file may hold is run
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # rubbish ends the reader in whatever error its bytes happen to name
        raise BadFile(f"{path} is not a file of tensors alone ({type(error).__name__})") from error
    if not isinstance(state, dict) or layers > len(state):  # before a list is made of what a config.json may claim
        count = len(state) if isinstance(state, dict) else 0
        raise BadFile(f"{path} does not fit its config.json: it holds {count} tensors, too few for {layers} layers")
    expected = {f"{i}.weight": (width, width) for i in range(layers)}
    expected |= {f"{i}.bias": (width,) for i in range(layers)} if bias else {}
    found = {str(k): tuple(v.shape) for k, v in state.items() if isinstance(v, Tensor) and v.is_floating_point()}
    if wrong := sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)):
        raise BadFile(
            f"{path} does not fit its config.json ({layers} layers of width {width}): {wrong[0]} is "
            f"{found.get(wrong[0], 'missing')}, where {expected.get(wrong[0], 'nothing')} is expected"
        )
    if any(held.layout is not torch.strided or held.device.type != "cpu" for held in state.values()):
        raise BadFile(f"{path} holds tensors that are sparse or have no values: save them as plain tensors")
    weight = torch.stack([state[f"{i}.weight"].float() for i in range(layers)])
    biases = [state[f"{i}.bias"].float() if bias else torch.zeros(width) for i in range(layers)]
    hashed = config.get("unembed_hash")
    return TunedLens(
        weight, torch.stack(biases), None, str(config["base_model_name_or_path"]), hashed, {"configuration": config}
    )
