"""Files that are either whole or not there.

Everything is written to a temporary name in the same folder, flushed to the disk and then renamed, so a reader never
sees half a file, whatever stops the writer. A disk that is full or a folder that may not be written to is the user's to
mend: it raises `CutawayError` with the path and the way out.
"""

import contextlib
import errno
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cutaway.artifacts.errors import CutawayError

if TYPE_CHECKING:
    import pyarrow

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_OBSTRUCTED = {errno.ENOTDIR, errno.EEXIST, errno.EISDIR}


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals while writing `path` into a `CutawayError` that names the way out."""
    try:
        yield
    except OSError as error:
        if not _concerns(error, path):
            raise
        if error.errno in _FULL:
            raise CutawayError(
                f"{path} could not be written: the disk is full (free some space, or name a folder on another disk)"
            ) from error
        if error.errno in _FORBIDDEN:
            raise CutawayError(
                f"{path} could not be written: the folder may not be written to (change its rights, or name another)"
            ) from error
        if error.errno in _OBSTRUCTED:
            raise CutawayError(
                f"{path} could not be written: a file is where a folder should be, or a folder where the file should "
                "be (move it, or name another path)"
            ) from error
        if error.errno == errno.ENOENT:
            raise CutawayError(
                f"{path} could not be written: its folder is gone, or cannot be made there (name another folder)"
            ) from error
        raise


def _umask() -> int:
    """The process's umask; it can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _concerns(error: OSError, path: Path) -> bool:
    """Whether the refusal is about `path`, its folders or a temporary file beside it, and not some other file."""
    if not isinstance(error.filename, (str, os.PathLike)):
        return True
    refused, path = Path(error.filename).absolute(), path.absolute()
    return refused.parent == path.parent or refused in path.parents


def make_folder(path: Path) -> Path:
    """Create `path` and its parents where they are missing; `CutawayError` when that is refused."""
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def refuse_device(path: Path) -> None:
    """Raise `CutawayError` for a device or a pipe: a file is moved to its name in the end, which would replace it."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise CutawayError(f"{path} is a device or a pipe, not a file; name a file")
    if os.path.islink(path) and os.readlink(path).startswith("/proc/"):  # /dev/stdout, whatever stdout is
        raise CutawayError(f"{path} is a stream of this process, not a file; name a file")


def refuse_replacing(path: Path, what: str, mark: str) -> None:
    """Raise `CutawayError` where `path` is a file that cutaway did not write as `what`: it may be somebody's input.

    A file of ours has `mark` in its first or last bytes. What is empty is nobody's loss.
    """
    path, reach = Path(path), 1 << 16
    try:
        if not os.path.isfile(path):
            return
        with open(path, "rb") as file:
            ends = file.read(reach)
            file.seek(max(0, os.path.getsize(path) - reach))
            ends += file.read(reach)
    except OSError as error:
        raise CutawayError(f"{path} is there and cannot be read, so it is not replaced; name another file") from error
    if ends and mark.encode() not in ends:
        raise CutawayError(f"{path} exists and is no {what} that cutaway wrote; name another file, or move it")


def check_folder(folder: Path, what: str, files: Mapping[str, str]) -> None:
    """Raise `CutawayError` where a folder cannot get `files`, name to mark (see `refuse_replacing`).

    That is where a file would be replaced that is not ours, and in a model's folder: all safetensors there count as its
    weights.
    """
    if os.path.isfile(folder):
        raise CutawayError(f"{folder} is a file; name a folder for the {what}")
    if any(os.path.isfile(folder / name) for name in ("config.json", "adapter_config.json")):
        raise CutawayError(f"{folder} holds a config.json, as a model's folder does; name another for the {what}")
    for name, mark in files.items():
        refuse_replacing(folder / name, what, mark)


def take_folder(folder: Path, what: str, files: Mapping[str, str]) -> Path:
    """Make the folder that gets `files`, or go on with one that may get them; raises as `check_folder` does."""
    check_folder(folder, what, files)
    return make_folder(folder)


@contextlib.contextmanager
def atomic_path(final: Path) -> Iterator[Path]:
    """Yield a temporary path beside `final`; when the body ends well, it becomes `final`.

    The body creates the file under the yielded path. On any exception, Ctrl-C included, the temporary file is removed
    and whatever `final` held before stays as it was. Raises `CutawayError` when the disk is full, the folder may not be
    written to, or `final` is a device or a pipe.
    """
    final = Path(final)
    refuse_device(final)
    temporary = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
    with disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())  # safetensors writes files that nobody else may read
            os.replace(temporary, final)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(final.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 with the line endings it has."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode())


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: dicts, lists, strings, numbers, booleans, null.

    Arrays and tensors become lists, paths strings, objects with `to_json` what that returns. JSON has no infinities and
    no NaN: a float that is not finite becomes null. Raises `TypeError` for anything else.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_key(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "to_json"):
        return plain(value.to_json())
    if hasattr(value, "tolist"):  # numpy and torch, without importing either
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _key(key: object) -> str:
    if isinstance(key, str):
        return key
    if isinstance(key, int) and not isinstance(key, bool):
        return str(key)
    raise TypeError(f"a JSON object's keys are strings, not {type(key).__name__}")


def write_json(path: Path, value: Any) -> None:
    """Write `plain(value)`, indented, keys in their order."""
    content = plain(value)
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    if not text.isascii() and _has_lone_surrogate(text):  # of a file name that is not UTF-8, say
        text = json.dumps(content, indent=2, allow_nan=False)
    write_text(path, text + "\n")


def _has_lone_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def read_json(path: Path) -> Any:
    """What the JSON file holds; `CutawayError` when it is absent, unreadable or not JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise CutawayError(f"{path} does not exist") from error
    except OSError as error:
        raise CutawayError(f"{path} could not be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CutawayError(f"{path} is not JSON: byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise CutawayError(f"{path} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise CutawayError(f"{path} is not usable: its JSON is nested too deeply") from error
    except ValueError as error:  # Python reads whole numbers of up to 4300 digits
        raise CutawayError(f"{path} is not usable: it holds a number of too many digits") from error


def write_safetensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write named torch tensors, or named numpy arrays, as safetensors; views and names of one memory are copied."""
    if any(type(tensor).__module__.partition(".")[0] == "torch" for tensor in tensors.values()):
        from safetensors.torch import save_file

        whole: dict[str, Any] = {}
        seen: set[int] = set()
        for name, tensor in tensors.items():
            tensor = tensor.detach().contiguous()
            memory = tensor.untyped_storage().data_ptr()
            whole[name] = tensor.clone() if memory in seen else tensor
            seen.add(memory)
    else:
        import numpy as np
        from safetensors.numpy import save_file

        whole = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with atomic_path(path) as temporary, _safetensors_errors():
        # safetensors makes a file of its own beside the one it is given, which a kill would leave under a random name
        room = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        room.mkdir()
        try:
            save_file(whole, room / "file", metadata=None if metadata is None else dict(metadata))
            os.replace(room / "file", temporary)
        finally:
            shutil.rmtree(room, ignore_errors=True)


def write_parquet(path: Path, table: "pyarrow.Table") -> None:
    """Write a pyarrow table as Parquet, zstd-compressed."""
    import pyarrow.parquet

    with atomic_path(path) as temporary:
        pyarrow.parquet.write_table(table, temporary, compression="zstd")


@contextlib.contextmanager
def _safetensors_errors() -> Iterator[None]:
    """safetensors wraps the operating system's error in its own class, with the number only in the text."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        for number in _FULL | _FORBIDDEN | _OBSTRUCTED:
            if f"os error {number})" in str(error):
                raise OSError(number, os.strerror(number)) from error
        raise


def _sync_folder(folder: Path) -> None:
    """Make a rename durable. Some file systems refuse to sync a folder; the file itself is safe there too."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
