"""Files that are either whole or not there.

Everything is written to a temporary name in the same folder, flushed to the disk and then renamed, so a reader never
sees half a file, whatever stops the writer. What a killed writer leaves there is removed by whoever writes into the
folder next (`clear_leftovers`). A disk that is full or a folder that may not be written to is the user's to mend: it
raises `CutawayError` with the path and the way out.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cutaway.artifacts.errors import BadFile, CutawayError

if TYPE_CHECKING:
    import pyarrow

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_OBSTRUCTED = {errno.ENOTDIR, errno.EEXIST, errno.EISDIR}
_LONGEST_NAME = 200  # bytes; with what a temporary name adds, 255 are a file system's limit
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<token>[0-9a-f]{24})\.(?P<end>tmp|old)", re.DOTALL)
_DEEPEST = 100  # levels of JSON
_ABANDONED = 24 * 3600.0  # seconds without a change, for writers of which nothing can be known
_mine: set[str] = set()  # tokens of what this process is writing

Noted = Callable[[Path, os.stat_result | None], None]
_watchers: list[tuple[str, Noted]] = []


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
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise CutawayError(
                f"{str(path)[:60]}… could not be written: its name is too long, or its links lead in a circle (name "
                "another path)"
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
        raise BadFile(f"{path} is there and cannot be read, so it is not replaced; name another file") from error
    if ends and mark.encode() not in ends:
        raise BadFile(f"{path} exists and is no {what} that cutaway wrote; name another file, or move it")


def check_folder(folder: Path, what: str, files: Mapping[str, str]) -> None:
    """Raise `CutawayError` where a folder cannot get `files`, name to mark (see `refuse_replacing`).

    That is where a file would be replaced that is not ours, and in a model's folder: all safetensors there count as its
    weights.
    """
    if os.path.isfile(folder):
        raise BadFile(f"{folder} is a file; name a folder for the {what}")
    if any(os.path.isfile(folder / name) for name in ("config.json", "adapter_config.json")):
        raise BadFile(f"{folder} holds a config.json, as a model's folder does; name another for the {what}")
    for name, mark in files.items():
        refuse_replacing(folder / name, what, mark)


def take_folder(folder: Path, what: str, files: Mapping[str, str]) -> Path:
    """Make the folder that gets `files`, or go on with one that may get them; raises as `check_folder` does."""
    check_folder(folder, what, files)
    return make_folder(folder)


# Temporary names, and what a kill leaves of them


@cache
def _here() -> str:
    """Which machine this is, or which container: eight digits. Numbers of processes say nothing elsewhere."""
    with contextlib.suppress(OSError):
        return hashlib.sha256(f"{platform.node()} {os.stat('/proc/self/ns/pid').st_ino}".encode()).hexdigest()[:8]
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


@contextlib.contextmanager
def _temporary_name(final: Path, end: str = "tmp") -> Iterator[Path]:
    """A name beside `final` that says who writes there: `.NAME.TOKEN.tmp`."""
    token = f"{_here()}{os.getpid():08x}{secrets.token_hex(4)}"
    name = os.fsencode(final.name)
    short = final.name if len(name) <= _LONGEST_NAME else hashlib.sha256(name).hexdigest()[:16]
    _mine.add(token)
    try:
        yield final.with_name(f".{short}.{token}.{end}")
    finally:
        _mine.discard(token)


def _abandoned(path: Path, token: str) -> bool:
    """Whether nobody writes there any more: the process has ended, or (elsewhere) nothing has changed for a day."""
    if token in _mine:
        return False
    if os.name == "posix" and token.startswith(_here()):
        process = int(token[8:16], 16)
        return process == os.getpid() or not _alive(process)  # or an earlier process of the same number
    times = [path.stat().st_mtime, *(part.stat().st_mtime for part in path.rglob("*"))]
    return time.time() - max(times) > _ABANDONED


def _alive(process: int) -> bool:
    with contextlib.suppress(OSError, IndexError):  # one that was killed and that nobody has waited for
        if Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"Z":
            return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def clear_leftovers(folder: Path, *, below: bool = False) -> None:
    """Remove what killed processes left half written in a folder, with `below` also in the folders in it.

    A folder that was moved aside to be replaced is put back where its successor never came. What a living process is
    writing stays. What may not be looked at or removed stays, too.
    """
    with contextlib.suppress(OSError):
        for entry in [*os.scandir(folder)]:
            match = _TEMPORARY.fullmatch(entry.name)
            if match is not None and not entry.is_symlink():
                with contextlib.suppress(OSError):
                    _clear(Path(entry.path), match)
            elif below and entry.is_dir(follow_symlinks=False):
                clear_leftovers(Path(entry.path), below=True)


def _clear(path: Path, match: re.Match[str]) -> None:
    if not _abandoned(path, match["token"]):
        return
    final = path.with_name(match["name"])
    if match["end"] == "old" and path.is_dir() and not os.path.lexists(final):
        os.rename(path, final)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextlib.contextmanager
def atomic_path(final: Path) -> Iterator[Path]:
    """Yield a temporary path beside `final`; when the body ends well, it becomes `final`.

    The body creates the file under the yielded path. On any exception, Ctrl-C included, the temporary file is removed
    and whatever `final` held before stays as it was. Raises `CutawayError` when the disk is full, the folder may not be
    written to, or `final` is a device or a pipe.
    """
    final = Path(final)
    with disk_errors(final):
        refuse_device(final)
        final.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(final.parent)
        with _temporary_name(final) as temporary:
            try:
                yield temporary
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
                os.chmod(temporary, 0o666 & ~_umask())  # safetensors writes files that nobody else may read
                note_written(final, temporary)
                os.replace(temporary, final)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        _sync_folder(final.parent)


@contextlib.contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """A folder beside a path for what is not finished; it is gone when the body ends."""
    with disk_errors(beside):
        beside.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(beside.parent)
        with _temporary_name(beside) as room:
            room.mkdir()
            try:
                yield room
            finally:
                shutil.rmtree(room, ignore_errors=True)


@contextlib.contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Yield a new folder beside `final`; when the body ends well, it becomes `final`, all of which it replaces.

    On any exception `final` stays as it was. A kill in the middle of the exchange leaves the earlier folder under
    another name; `clear_leftovers` puts it back.
    """
    final = Path(final)
    if len(os.fsencode(final.name)) > _LONGEST_NAME:
        raise BadFile(f"{final.name[:60]}… is too long for a folder's name: at most {_LONGEST_NAME} bytes")
    with scratch_folder(final) as fresh:
        yield fresh
        for part in sorted(fresh.rglob("*")):
            if part.is_file():
                note_written(final / part.relative_to(fresh), part)
        with disk_errors(final), _temporary_name(final, "old") as old:
            if final.exists():
                os.rename(final, old)
            try:
                os.rename(fresh, final)
            except BaseException:
                if old.exists():
                    os.rename(old, final)
                raise
            shutil.rmtree(old, ignore_errors=True)


# Who wants to know what is written


@contextlib.contextmanager
def watched(folder: Path, note: Noted) -> Iterator[None]:
    """Have `note` called with each file that this process writes into a folder, just before it gets its name.

    It is given the path, and what `stat` says of the file; None of one that grows line by line.
    """
    entry = os.path.join(os.path.abspath(folder), ""), note
    _watchers.append(entry)
    try:
        yield
    finally:
        _watchers.remove(entry)


def note_written(final: Path, content: Path | None = None) -> None:
    """Tell those who watch the folder that `final` is being written; `content` is the file before it has its name."""
    if not _watchers:
        return
    where = os.path.abspath(final)
    for folder, note in [*_watchers]:
        inside = where.removeprefix(folder)
        if inside != where and not any(_TEMPORARY.fullmatch(part) for part in inside.split(os.sep)):
            note(Path(where), None if content is None else content.stat())


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 with the line endings it has; "?" for half of a surrogate pair, which UTF-8 cannot hold."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode(errors="replace"))


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
    if has_lone_surrogate(text):  # of a file name that is not UTF-8, say
        text = json.dumps(content, indent=2, allow_nan=False)
    write_text(path, text + "\n")


def read_json(path: Path) -> Any:
    """What the JSON file holds; `CutawayError` when it is absent, unreadable or not JSON."""
    return parse_json(read_bytes(path), str(path))


@contextlib.contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals while reading `path`, or a file in it, into a `CutawayError`."""
    try:
        yield
    except FileNotFoundError as error:
        raise BadFile(f"{error.filename or path} does not exist") from error
    except OSError as error:
        named = error.filename if isinstance(error.filename, (str, os.PathLike)) else path
        raise BadFile(f"{str(named)[:200]} could not be read: {error.strerror or error}") from error


def read_bytes(path: Path) -> bytes:
    """The content of a file; `CutawayError` when it is absent or may not be read."""
    with read_errors(path):
        return Path(path).read_bytes()


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, a byte order mark left out; `CutawayError` where it is absent, unreadable or none."""
    data = read_bytes(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadFile(f"{path} is not UTF-8 text: byte {error.start}; save it as UTF-8") from error


def parse_json(data: bytes | str, where: str) -> Any:
    """The value of some JSON; `CutawayError` that begins with `where` when it is none, or nested too deeply for use."""
    try:
        value = json.loads(data)
    except UnicodeDecodeError as error:
        raise BadFile(f"{where} is not JSON: byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}: " if error.lineno > 1 or "line" not in where else ""
        raise BadFile(f"{where} is not JSON: {at}{error.msg}") from error
    except RecursionError as error:
        raise BadFile(f"{where} is not usable: its JSON is nested too deeply") from error
    except ValueError as error:  # Python reads whole numbers of up to 4300 digits
        raise BadFile(f"{where} is not usable: it holds a number of too many digits") from error
    if _deeper(value, _DEEPEST):
        raise BadFile(f"{where} is not usable: its JSON is nested too deeply")
    return value


def _deeper(value: Any, levels: int) -> bool:
    """Whether a value of JSON is nested in more levels; what is can be read, but not written, copied or compared."""
    here = [value] if isinstance(value, (dict, list)) else []
    for _ in range(levels):
        here = [
            item
            for outer in here
            for item in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(item, (dict, list))
        ]
        if not here:
            return False
    return True


def has_lone_surrogate(text: str) -> bool:
    """Whether half of a surrogate pair is in a text, which no UTF-8 file can hold (as JSON's \\ud800 makes it)."""
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


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
    # safetensors makes a file of its own beside the one it is given, which a kill would leave under a random name
    with atomic_path(path) as temporary, _safetensors_errors(), scratch_folder(path) as room:
        save_file(whole, room / "file", metadata=None if metadata is None else dict(metadata))
        os.replace(room / "file", temporary)


def write_parquet(path: Path, table: "pyarrow.Table") -> None:
    """Write a pyarrow table as Parquet, zstd-compressed."""
    import pyarrow.parquet

    with atomic_path(path) as temporary:
        pyarrow.parquet.write_table(table, temporary, compression="zstd")


@contextlib.contextmanager
def parquet_errors(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises for a file that is damaged, or no Parquet at all, into a `CutawayError`."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        said = " ".join(str(error).split())[:200]
        raise BadFile(f"{path} cannot be read as Parquet: {said or type(error).__name__}") from error


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
