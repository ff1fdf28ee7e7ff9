"""Tensors from files that nobody vouches for: safetensors, npz and torch archives.

Nothing is executed (no pickled objects), no more memory is taken than the file itself holds bytes for, and whatever is
wrong with a file is one sentence that names it.
"""

import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cutaway.artifacts.errors import BadFile
from cutaway.artifacts.files import parse_json

_TEXT_BYTES = 16 << 20  # of a configuration
_EXPANSION = 64  # weights do not compress by so much; an archive that claims more is made to fill the memory


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Named tensors of a `.safetensors`, `.npz`, `.pt` or `.pth` file, on the CPU as they are stored.

    Of a torch archive also entries that are not tensors (numbers, texts, nested dictionaries) are returned, as they
    are. Raises `CutawayError` for a file that is missing, cut short, of another kind, or would run code.
    """
    if not path.is_file():
        raise BadFile(f"{path} is missing")
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if path.suffix == ".npz":
        return _npz(path)
    return _torch_archive(path)


def tensor_names(path: Path) -> set[str]:
    """Names of the tensors in a safetensors file; empty for one that cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError):
        return set()


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON object, or a YAML one (`.yaml`), of settings. Raises `CutawayError` when it is anything else."""
    try:
        if path.stat().st_size > _TEXT_BYTES:
            raise BadFile(f"{path} has {path.stat().st_size:,} bytes: that is no file of settings")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise BadFile(f"{path} is missing") from error
    except OSError as error:
        raise BadFile(f"{path} could not be read: {error.strerror}") from error
    try:
        if path.suffix in (".yaml", ".yml"):
            import yaml

            try:
                settings = yaml.safe_load(data)
            except yaml.YAMLError as error:
                raise BadFile(f"{path} is not YAML: {' '.join(str(error).split())}") from error
        else:
            settings = parse_json(data, str(path))
    except (ValueError, RecursionError) as error:  # of YAML's dates and nesting
        raise BadFile(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise BadFile(f"{path} is not an object of settings")
    if not _within_floats(settings):
        raise BadFile(f"{path} is not usable: it holds a number of too many digits")
    return settings


def _within_floats(value: Any, levels: int = 100) -> bool:
    """Whether no whole number is too large for a float, and nothing is nested in more levels."""
    if isinstance(value, (dict, list)):
        inside = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        return levels > 0 and all(_within_floats(item, levels - 1) for item in inside)
    return not isinstance(value, int) or abs(value) < 2**64


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)  # checks that the header's shapes fill the file exactly, and runs nothing
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise BadFile(f"{path} is cut short or not a safetensors file: {error}") from error


def _npz(path: Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            _within_bounds(path, archive)
            for member in archive.infolist():
                with archive.open(member) as file:
                    shape, dtype = _npy_header(file)
                if dtype.hasobject:
                    raise BadFile(f"{path}: {member.filename} holds Python objects, which are not read")
                if math.prod(shape) * dtype.itemsize > member.file_size:
                    raise BadFile(f"{path}: {member.filename} claims {list(shape)} values and holds fewer")
        with np.load(path, allow_pickle=False) as stored:
            return {name: torch.from_numpy(np.ascontiguousarray(stored[name])) for name in stored.files}
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, KeyError, TypeError, NotImplementedError) as error:
        raise BadFile(f"{path} is cut short or not an npz file: {error}") from error


def _npy_header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def _within_bounds(path: Path, archive: zipfile.ZipFile) -> None:
    unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > _EXPANSION * path.stat().st_size + _TEXT_BYTES:
        raise BadFile(f"{path} unpacks from {path.stat().st_size:,} to {unpacked:,} bytes: weights do not")


def _torch_archive(path: Path) -> dict[str, Any]:
    try:
        if not zipfile.is_zipfile(path):
            raise BadFile(
                f"{path} is cut short or not an archive of torch.save (1.6 or later): save it again, or as safetensors"
            )
        with zipfile.ZipFile(path) as archive:
            _within_bounds(path, archive)
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BadFile(
            f"{path} holds Python objects beside tensors, which could run code and are not read: save its state_dict() "
            "alone, or as safetensors"
        ) from error
    except (RuntimeError, zipfile.BadZipFile, ValueError, OSError, EOFError, KeyError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadFile(f"{path} is cut short or not an archive of torch.save: {reason}") from error
    if not isinstance(stored, dict):
        raise BadFile(f"{path} holds a {type(stored).__name__} where named tensors are needed")
    _no_phantoms(path, stored)
    return stored


def _no_phantoms(path: Path, stored: dict[Any, Any]) -> None:
    """Refuse tensors that claim more values than they have memory: strides of 0 make any shape of a few bytes."""
    for name, value in stored.items():
        if isinstance(value, dict):
            _no_phantoms(path, value)
        elif isinstance(value, Tensor) and (
            value.layout != torch.strided or value.numel() * value.element_size() > value.untyped_storage().nbytes()
        ):
            raise BadFile(f"{path}: {name} claims {list(value.shape)} values and holds fewer")
