"""Finding and reading model folders and hub ids, with errors that say what to do."""

from __future__ import annotations

import importlib.util
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from cutaway.artifacts import hub
from cutaway.artifacts.errors import BadFile, CutawayError, MissingExtra, NotSupported
from cutaway.artifacts.files import read_json
from cutaway.artifacts.manifest import ModelIdentity, json_hash, weight_hash
from cutaway.model.architecture.wrapped import parameter_of, unwrap
from cutaway.model.devices import usable_device
from cutaway.model.named import named_folder, refuse_out_of_reach

Parts = tuple[PreTrainedModel, PreTrainedTokenizerBase | None, str, Callable[[], ModelIdentity]]
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_LAYER = re.compile(r"(^|\.)(layers|h)\.\d+\.")
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model")
_ADAPTER = "adapter_config.json"
DeviceMap = str | dict[str, Any]


def dtype_named(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype of real numbers by its name, long or short. Raises CutawayError for any other."""
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    short = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64", "half": "float16"}
    found = getattr(torch, short.get(dtype, dtype), None) if isinstance(dtype, str) else None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise CutawayError(f"dtype '{dtype}' is not one of float32, bfloat16, float16, float64.")
    return found


def device_named(device: str | torch.device | None) -> torch.device:
    """A device by its name, or without one a GPU if there is any. Raises CutawayError for one that is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return usable_device(device)


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise CutawayError(
            f"{folder} is not a model folder: it has no config.json (name a folder written by save_pretrained)."
        )
    if not any(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        raise BadFile(f"{folder} has a config.json but no weights; add model.safetensors.")
    if not any(folder.glob("*.safetensors")):
        raise BadFile(
            f"{folder} has weights only as a pickle (.bin), which is not opened; convert them to safetensors."
        )


def load_parts(
    model: str | Path,
    *,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    revision: str | None,
    device_map: DeviceMap | None = None,
    offload_folder: str | Path | None = None,
    adapters: tuple[str, ...] = (),
) -> Parts:
    """The model, its tokenizer (None if it has none), its name, and a way to its identity.

    `adapters` are those whose base model this is. With `device_map` transformers places the parts ("auto", or module ->
    device, "cpu" or "disk"), and `offload_folder` is where parts on "disk" go.
    """
    if device_map is not None and device is not None:
        raise CutawayError("device and device_map both say where the model goes; give one of them.")
    if device_map is not None and importlib.util.find_spec("accelerate") is None:
        raise MissingExtra("device_map takes the library accelerate, which is not installed: pip install accelerate")
    place = device_named(device)
    if not isinstance(model, (str, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise CutawayError(f"A model is named by text or a path; got {model!r} (give cutaway.attach an object).")
    name = str(model)
    try:
        folder = named_folder(name) or Path(model).expanduser()
        local = folder.is_dir()
    except (RuntimeError, ValueError) as error:  # no such user's home, or a zero byte
        raise CutawayError(f"There is no model {name[:60]!r}: {error}; check the name.") from error
    except OSError as error:
        raise CutawayError(f"There is no model {name[:60]!r}…: {error.strerror}; check the name.") from error
    if local and (folder / _ADAPTER).is_file() and not (folder / "config.json").is_file():
        options: dict[str, Any] = {"device_map": device_map, "offload_folder": offload_folder}
        if adapters:
            raise CutawayError(
                f"{adapters[-1]} names {name} as its base model, which is an adapter itself; set "
                "base_model_name_or_path to the model that both belong to."
            )
        options["adapters"] = (name,)
        return _with_adapter(folder, name, {"dtype": dtype, "device": device, "revision": revision, **options})
    if local:
        _check_folder(folder)
    elif folder.exists():
        raise CutawayError(f"{folder} is a file; name the folder that holds config.json and the weights.")
    elif Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise CutawayError(f"There is no folder {folder}; check the path.")
    source = str(folder) if local else name
    placed = {} if device_map is None else {"device_map": device_map, "offload_folder": offload_folder}
    if not local:
        refuse_out_of_reach(name, revision)
    with _quiet(), nullcontext() if local else hub.reached():
        hf, tokenizer = _read(
            source,
            name,
            local,
            dtype_named(dtype) if dtype is not None else torch.float32 if place.type == "cpu" else "auto",
            revision,
            placed,
        )
    if device_map is None and getattr(hf, "hf_quantizer", None) is None:  # what is quantised stays where it was made
        hf = hf.to(place)  # type: ignore[arg-type]
    hf.eval()
    snapshot = None if local else hub.cached(name, revision)
    found = snapshot.name if snapshot is not None else None if local else revision

    def identify() -> ModelIdentity:
        if not local:
            return identity_of_parameters(hf, name, found)
        return ModelIdentity(name, found, weight_hash(folder))

    return hf, tokenizer, name, identify


@contextmanager
def _quiet() -> Iterator[None]:
    chatter = transformers_logging.get_verbosity()
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(chatter)
        if bar:
            transformers_logging.enable_progress_bar()


def _with_adapter(folder: Path, name: str, options: dict[str, Any]) -> Parts:
    """The base model that an adapter of PEFT names, with the adapter in it, not merged."""
    config = read_json(folder / _ADAPTER)
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(base, str) or not base:
        raise BadFile(f"{folder}/{_ADAPTER} does not name its base model; set base_model_name_or_path.")
    if not any(folder.glob("adapter_model.safetensors")):
        raise BadFile(f"{folder} has an {_ADAPTER} but no adapter_model.safetensors; save the adapter as safetensors.")
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingExtra(f"{folder} is an adapter, which takes the library peft: pip install peft") from error
    hf, tokenizer, _, identify_base = load_parts(base, **options)
    try:
        with _quiet():
            adapted = PeftModel.from_pretrained(hf, str(folder))
    except Exception as error:  # files of other libraries and versions raise many kinds
        raise CutawayError(f"The adapter {name} does not fit its base model {base}: {_short(error)}") from error
    model = unwrap(adapted)
    model.eval()

    def identify() -> ModelIdentity:
        whole = json_hash([identify_base().weight_hash, weight_hash(folder)])
        return ModelIdentity(name, None, whole)

    return model, tokenizer, name, identify


def check_kind(config: Any, name: str) -> None:
    """Raise where a configuration is that of no causal language model."""
    kind = str(getattr(config, "model_type", "") or type(config).__name__)
    if getattr(config, "is_encoder_decoder", False):
        raise NotSupported(
            f"{name} is not supported: it is an encoder-decoder model ({kind}), and cutaway looks into causal language "
            "models, which only decode."
        )
    decodes = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decodes:
        raise NotSupported(
            f"{name} is not supported: it is an encoder ({kind}), which reads in both directions and predicts masked "
            "tokens, and cutaway looks into causal language models."
        )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase | None, hf: PreTrainedModel, name: str) -> None:
    """Raise where text would become ids that the model has no embedding for.

    Tokens that were added to a tokenizer (a padding token, say) may lie beyond: text does not contain them.
    """
    if tokenizer is None:
        return
    if not isinstance(tokenizer, PreTrainedTokenizerBase):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise CutawayError(f"A tokenizer is one of transformers; got {tokenizer!r}.")
    size = getattr(hf.config.get_text_config(), "vocab_size", None)
    if not isinstance(size, int):
        return
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    beyond = [token for token, index in tokenizer.get_vocab().items() if index >= size and token not in added]
    if beyond:
        raise CutawayError(
            f"The tokenizer does not fit {name}: it has {len(tokenizer):,} tokens, {len(beyond):,} of them beyond the "
            f"{size:,} of the model's embedding; it belongs to another model."
        )


def _read(
    source: str, name: str, local: bool, dtype: str | torch.dtype, revision: str | None, placed: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    where: dict[str, Any] = {"revision": revision, "local_files_only": local, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(source, **where)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and huggingface_hub's own kinds
        if "trust_remote_code" in str(error):
            raise _own_code(name) from error
        if local:
            raise BadFile(f"{source}/config.json cannot be read as a model's configuration: {_short(error)}") from error
        raise CutawayError(
            f"There is no folder '{name}' here, and the hub gave no model of that name ({_short(error)}); check the "
            "name, or the network."
        ) from error
    check_kind(config, name)
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
            raise _own_code(name)
        raise NotSupported(
            f"{name} is a model of the kind '{config.model_type}', of which transformers has no causal language model."
        )
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **where,
            **placed,
        )
    except Exception as error:  # damaged files and unknown classes raise many kinds
        if "ignore_mismatched_sizes" in str(error):
            raise BadFile(
                f"The weights of {name} have other shapes than its config.json asks for; they belong to another model."
            ) from error
        raise BadFile(f"The weights of {name} cannot be loaded: {_short(error)}") from error
    hf, report = loaded
    missing = sorted(report.get("missing_keys", ()))
    if missing:
        raise BadFile(
            f"The checkpoint {name} lacks {len(missing)} weights (first: {missing[0]}), which would be random; it is "
            "damaged, or not a causal language model."
        )
    dropped = sorted(key for key in report.get("unexpected_keys", ()) if _LAYER.search(key))
    if dropped:
        raise BadFile(
            f"The checkpoint {name} holds {len(dropped)} layer weights that its config.json has no place for (first: "
            f"{dropped[0]}); they belong to a larger model."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, config=config, **where)
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise _own_code(name) from error
        if local and any(path for pattern in _TOKENIZERS for path in Path(source).glob(pattern)):
            raise BadFile(f"The tokenizer of {name} cannot be read: {_short(error)}") from error
        return hf, None  # no tokenizer files: the model still takes ids
    # without its files transformers makes some families a tokenizer of special tokens alone, which reads no text
    special = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    return hf, tokenizer if len(tokenizer) > len(special) else None


def _own_code(name: str) -> CutawayError:
    return CutawayError(
        f"{name} comes with program code of its own, which cutaway does not run: read it, load the model with "
        "transformers (trust_remote_code=True), and give the object to cutaway.attach."
    )


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text[:157] + "…" if len(text) > 158 else text) or type(error).__name__


def identity_of_parameters(hf: PreTrainedModel, name: str, revision: str | None = None) -> ModelIdentity:
    """The identity of a model in memory: a hash over its parameters' names and bytes."""

    def parts() -> Iterator[tuple[str, bytes]]:
        modules = dict(hf.named_modules(remove_duplicate=False))
        for key, value in sorted(hf.state_dict().items(), key=lambda item: item[0]):
            if isinstance(value, Tensor) and value.device.type == "meta":
                owner, _, part = key.rpartition(".")
                value = parameter_of(modules[owner], part)
            yield key, _bytes(value)

    return ModelIdentity(name, revision, weight_hash(parts()))


def weight_versions(hf: PreTrainedModel) -> list[tuple[int, int]]:
    """What changes when a weight is changed in place or replaced; of offloaded parts, which come and go, nothing."""
    there = [p for p in hf.parameters() if p.device.type != "meta"]
    return [(id(p), -1 if p.is_inference() else p._version) for p in there]


def weight_sample(hf: PreTrainedModel) -> bytes:
    """Some entries of every weight: enough to see that a whole one was written through `.data`."""
    found = []
    for parameter in hf.parameters():
        if type(parameter.data) is Tensor and parameter.device.type != "meta" and parameter.is_floating_point():
            flat = parameter.detach().reshape(-1)
            found.append(_bytes(flat[:: max(1, len(flat) // 64)]))
    return b"".join(found)  # as bytes, in which NaN is itself


def _bytes(value: Any) -> bytes:
    """What a weight holds, however it is stored: quantised ones are made of several tensors and settings."""
    if not isinstance(value, Tensor):
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else None
        return repr(value).encode() if inner is None else b"".join(map(_bytes, inner))
    value = value.detach()
    if value.is_quantized:
        return _bytes(value.int_repr()) + _bytes(value.dequantize())
    if hasattr(value, "__tensor_flatten__"):
        names, settings = value.__tensor_flatten__()  # type: ignore[attr-defined]
        return b"".join(_bytes(getattr(value, part)) for part in names) + repr(settings).encode()
    return value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
