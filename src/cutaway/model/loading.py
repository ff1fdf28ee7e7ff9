"""Finding and reading model folders and hub ids, with errors that say what to do."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.manifest import ModelIdentity, weight_hash

Parts = tuple[PreTrainedModel, PreTrainedTokenizerBase | None, str, Callable[[], ModelIdentity]]
_PACKAGE = Path(str(cutaway.__file__)).parent
SHIPPED = {"atlas": _PACKAGE / "subjects" / "atlas" / "weights"}
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_LAYER = re.compile(r"(^|\.)(layers|h)\.\d+\.")
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model")


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> str | torch.dtype:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    short = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64", "half": "float16"}
    found = getattr(torch, short.get(dtype, dtype), None) if isinstance(dtype, str) else None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise CutawayError(f"dtype '{dtype}' is not one of float32, bfloat16, float16, float64.")
    return found


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise CutawayError(f"'{device}' is not a device; use cpu, cuda or cuda:N.") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise CutawayError(f"Device '{device}' was asked for, but PyTorch sees no GPU here; leave device out.")
    return chosen


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise CutawayError(
            f"{folder} is not a model folder: it has no config.json (name a folder written by save_pretrained)."
        )
    if not any(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        raise CutawayError(f"{folder} has a config.json but no weights; add model.safetensors.")
    if not any(folder.glob("*.safetensors")):
        raise CutawayError(
            f"{folder} has weights only as a pickle (.bin), which is not opened; convert them to safetensors."
        )


def load_parts(
    model: str | Path,
    *,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    revision: str | None,
) -> Parts:
    """The model, its tokenizer (None if it has none), its name, and a way to its identity."""
    place = _device(device)
    name = str(model)
    folder = SHIPPED.get(name) or Path(model).expanduser()
    local = folder.is_dir()
    if local:
        _check_folder(folder)
    elif folder.exists():
        raise CutawayError(f"{folder} is a file; name the folder that holds config.json and the weights.")
    elif Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise CutawayError(f"There is no folder {folder}; check the path.")
    source = str(folder) if local else name
    chatter = transformers_logging.get_verbosity()
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            hf, tokenizer = _read(source, name, local, _dtype(dtype, place), revision)
    finally:
        transformers_logging.set_verbosity(chatter)
        if bar:
            transformers_logging.enable_progress_bar()
    hf = hf.to(place)  # type: ignore[arg-type]
    hf.eval()
    found = None if local else getattr(hf.config, "_commit_hash", None) or revision

    def identify() -> ModelIdentity:
        if not local:
            return identity_of_parameters(hf, name, found)
        return ModelIdentity(name, found, weight_hash(folder))

    return hf, tokenizer, name, identify


def _read(
    source: str, name: str, local: bool, dtype: str | torch.dtype, revision: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, local_files_only=local)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and huggingface_hub's own kinds
        if local:
            raise CutawayError(
                f"{source}/config.json cannot be read as a model's configuration: {_short(error)}"
            ) from error
        raise CutawayError(
            f"There is no folder '{name}' here, and the hub gave no model of that name ({_short(error)}); check the "
            "name, or the network."
        ) from error
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            revision=revision,
            dtype=dtype,
            local_files_only=local,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # damaged files and unknown classes raise many kinds
        if "ignore_mismatched_sizes" in str(error):
            raise CutawayError(
                f"The weights of {name} have other shapes than its config.json asks for; they belong to another model."
            ) from error
        raise CutawayError(f"The weights of {name} cannot be loaded: {_short(error)}") from error
    hf, report = loaded
    missing = sorted(report.get("missing_keys", ()))
    if missing:
        raise CutawayError(
            f"The checkpoint {name} lacks {len(missing)} weights (first: {missing[0]}), which would be random; it is "
            "damaged, or not a causal language model."
        )
    dropped = sorted(key for key in report.get("unexpected_keys", ()) if _LAYER.search(key))
    if dropped:
        raise CutawayError(
            f"The checkpoint {name} holds {len(dropped)} layer weights that its config.json has no place for (first: "
            f"{dropped[0]}); they belong to a larger model."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, local_files_only=local)
    except Exception as error:
        if local and any(path for pattern in _TOKENIZERS for path in Path(source).glob(pattern)):
            raise CutawayError(f"The tokenizer of {name} cannot be read: {_short(error)}") from error
        return hf, None  # no tokenizer files: the model still takes ids
    # without its files transformers makes some families a tokenizer of special tokens alone, which reads no text
    special = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    return hf, tokenizer if {*tokenizer.get_vocab()} - special else None


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text[:157] + "…" if len(text) > 158 else text) or type(error).__name__


def identity_of_parameters(hf: PreTrainedModel, name: str, revision: str | None = None) -> ModelIdentity:
    """The identity of a model in memory: a hash over its parameters' names and bytes."""

    def parts() -> Iterator[tuple[str, bytes]]:
        for key, value in sorted(hf.state_dict().items()):
            yield key, value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()

    return ModelIdentity(name, revision, weight_hash(parts()))
