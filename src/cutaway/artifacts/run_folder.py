"""The folder that one run of a command fills, so that an interrupted run goes on where it stopped.

    run.json            command, configuration, version of the code: what the folder belongs to
    steps/NAME.json     the result of each finished step
    steps/NAME.sha256   hashes of that file, and of the files that the step wrote
    .written            every file that the run wrote, with its size and time: nothing else is ever removed
    .lock               held by the process that is writing

A folder belongs to one command and one configuration. The same ones resume it; others are refused rather than mixed.
"""

import contextlib
import json
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Self

from cutaway.artifacts.errors import BadFile, CutawayError
from cutaway.artifacts.files import (
    clear_leftovers,
    disk_errors,
    make_folder,
    plain,
    read_json,
    watched,
    write_json,
)
from cutaway.artifacts.manifest import code_version, file_hash
from cutaway.artifacts.progress import is_quiet

_RUN = "run.json"
_LOCK = ".lock"
_WRITTEN = ".written"
_AGAIN = "restore it, or begin again with --overwrite"
_STEP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class RunFolder:
    """An open run folder; use it as a context manager, so that the lock is given back.

    Args:
        path: The folder.
        held: What is given back when it is closed.

    Example:
        with RunFolder.open(out, command="tour", configuration={"model": model, "seed": 0}) as folder:
            lens = folder.step("lens")
            if lens is None:
                lens = folder.save_step("lens", logit_lens(...))
    """

    def __init__(self, path: Path, held: contextlib.ExitStack) -> None:
        self.path = path
        self._held = held

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        command: str,
        configuration: Mapping[str, Any],
        writes: Collection[str] = (),
        resume: bool = True,
    ) -> "RunFolder":
        """Create a run folder, or go on with one.

        Args:
            path: The folder.
            command: The verb: "tour".
            configuration: Everything that determines the result: put the hashes of the model and of the corpus into it,
                not only their paths.
            writes: The names, or patterns of names, that the command writes at the top of the folder.
            resume: False removes what the run wrote there and begins again. What else lies in the folder is the user's
                and stays.

        Raises:
            CutawayError: The folder holds another command's, configuration's or release's run, or something that is no
                run at all; another process is at work in it; it cannot be written to; with `resume=False` also where a
                file under one of the names was not written by the run, or has been changed since.
        """
        path = Path(path)
        record = {
            "cutaway": _release(),
            "code": code_version(),
            "command": command,
            "configuration": plain(configuration),
        }
        if _is_of_someone_else(path):
            raise BadFile(f"{path} exists and is not a run folder: name an empty or a new folder")
        make_folder(path)
        with contextlib.ExitStack() as held:
            held.callback(_unlock, _acquire(path))
            clear_leftovers(path, below=True)
            if not resume:
                _clear(path, writes)
            held.enter_context(recorded(path))
            if (path / _RUN).exists():
                _check(path, read_json(path / _RUN), record)
            else:
                write_json(path / _RUN, record)
            make_folder(path / "steps")
            return cls(path, held.pop_all())

    def has(self, name: str) -> bool:
        """Whether a step has finished; `step` says whether what it left is whole.

        Args:
            name: The step's.
        """
        return self._step_file(name).exists()

    def step(self, name: str) -> Any | None:
        """What the step saved when it finished, None if it has not.

        Args:
            name: The step's.

        Raises:
            BadFile: It, or a file that the step wrote, is not what it was then.
        """
        file = self._step_file(name)
        hashes = file.with_suffix(".sha256")
        if not self.has(name):
            return None
        if not hashes.exists():  # of an earlier release, or killed before it was written
            return read_json(file)
        recorded = read_json(hashes)
        if not isinstance(recorded, dict) or file.relative_to(self.path).as_posix() not in recorded:
            raise BadFile(f"{hashes} is damaged: {_AGAIN}")
        if any(".." in Path(part).parts or os.path.isabs(part) or "\0" in part for part in recorded):
            raise BadFile(f"{hashes} is damaged: it names files outside the folder: {_AGAIN}")
        for part, known in recorded.items():
            there = self.path / part
            if not there.is_file():
                raise BadFile(f"{there} is missing, which a finished step wrote: {_AGAIN}")
            if file_hash(there) != known:
                raise BadFile(f"{there} was changed after it was written: {_AGAIN}")
        return read_json(file)

    def save_step(self, name: str, payload: object, files: Collection[str] = ()) -> Any:
        """Record that a step finished.

        Args:
            name: The step's.
            payload: Its result: anything but None; what is not plain JSON is made so where that can be done.
            files: What the step wrote into the folder, files or folders of them: `step` refuses them when they have
                been changed.

        Returns:
            The payload as `step` will give it: through JSON and back.
        """
        if payload is None:
            raise ValueError(f"step {name!r}: None would read as a step that has not finished")
        file = self._step_file(name)
        hashes = file.with_suffix(".sha256")
        hashes.unlink(missing_ok=True)
        write_json(file, payload)
        wrote = [file, *(part for entry in files for part in _files_of(self.path / entry))]
        write_json(hashes, {part.relative_to(self.path).as_posix(): file_hash(part) for part in wrote})
        return read_json(file)

    def file(self, *parts: str) -> Path:
        """A path inside the folder; the folders above it are made.

        Args:
            parts: Of the path.
        """
        path = self.path.joinpath(*parts)
        make_folder(path.parent)
        return path

    def take(self, name: str) -> Path:
        """Have a folder in the run's, all of which counts as written by the run: another program fills it.

        Args:
            name: The folder's.

        Raises:
            BadFile: There is one already that the run did not take.
        """
        path, known = self.path / name, _written(self.path)
        if path.exists() and known and f"{name}/" not in known:  # nothing is known of a run of an earlier version
            raise BadFile(f"{path} is there and not of this run: move it, or name another folder")
        _append(self.path, {"path": f"{name}/"})
        return path

    def discard(self, name: str) -> None:
        """Remove a folder, or a file, that the run wrote and does not need any more; what is not the run's stays.

        Args:
            name: The folder's or file's.
        """
        with disk_errors(self.path / name):
            files, strange = _sorted_out(self.path, [self.path / name])
            _remove(self.path / name, files)
            if not strange:
                _append(self.path, {"path": name, "gone": True})

    def close(self) -> None:
        """Give the lock back. Closing twice is harmless."""
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _step_file(self, name: str) -> Path:
        if not _STEP_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a step's name: letters, digits, '.', '_' and '-'")
        return self.path / "steps" / f"{name}.json"


def goes_on(path: Path, done: int, total: int | None, unit: str) -> None:
    """Say on stderr where an interrupted run goes on, and when it was begun.

    Args:
        path: The run's folder, or one in it.
        done: What earlier runs have done.
        total: What there is to do; None where nobody knows.
        unit: Of what.
    """
    if is_quiet():
        return
    path = path.parent if (path.parent / _RUN).is_file() else path
    times = [file.stat().st_mtime for file in path.iterdir() if file.is_file() and not file.name.startswith(".")]
    begun = f", begun {datetime.fromtimestamp(min(times)).date().isoformat()}" if times else ""
    of = "" if total is None else f" of {total:,}"
    print(f"goes on at {done:,}{of} {unit} ({path}{begun})", file=sys.stderr, flush=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a folder, which is made if need be, for this process while the block runs.

    Raises `CutawayError` when another process holds it.
    """
    lock = _acquire(make_folder(path))
    try:
        clear_leftovers(path, below=True)
        yield
    finally:
        _unlock(lock)


@contextlib.contextmanager
def recorded(path: Path) -> Iterator[None]:
    """Note in a run's folder what this process writes there while the block runs."""
    top = Path(os.path.abspath(path))

    def note(file: Path, found: os.stat_result | None) -> None:
        size = None if found is None else [found.st_size, found.st_mtime_ns]
        _append(top, {"path": file.relative_to(top).as_posix(), "is": size})

    with watched(path, note):
        yield


def _append(path: Path, line: Mapping[str, Any]) -> None:
    with disk_errors(path / _WRITTEN), open(path / _WRITTEN, "a", encoding="ascii") as file:
        file.write(json.dumps(line) + "\n")


def _written(path: Path) -> dict[str, list[int] | None]:
    """What the run wrote, by its path in the folder: size and time, None where any will do (and of whole folders)."""
    found: dict[str, list[int] | None] = {}
    try:
        lines = (path / _WRITTEN).read_bytes().splitlines()
    except OSError:
        return found
    for line in lines:
        try:
            record = json.loads(line)
            if record.get("gone"):
                found.pop(f"{record['path']}/", None)
            else:
                found[str(record["path"])] = record.get("is")
        except (ValueError, KeyError, AttributeError, RecursionError):
            continue  # cut short by a kill: the file never got its name
    return found


def _sorted_out(path: Path, entries: Collection[Path]) -> tuple[list[Path], list[Path]]:
    """Of all files at and below some entries of a run's folder, those that the run wrote, and the others."""
    known = _written(path)
    taken = tuple(name for name in known if name.endswith("/"))
    ours: list[Path] = []
    others: list[Path] = []
    for entry in entries:
        whole = entry.is_dir() and not entry.is_symlink()
        for file in sorted(entry.rglob("*")) if whole else [entry]:
            if (file.is_dir() and not file.is_symlink()) or not os.path.lexists(file):
                continue
            name, there = file.relative_to(path).as_posix(), file.lstat()
            same = name in known and known[name] in (None, [there.st_size, there.st_mtime_ns])
            mine = (same and not file.is_symlink()) or file.name == _LOCK or name.startswith(taken or ("//",))
            (ours if mine else others).append(file)
    return ours, others


def _remove(entry: Path, files: Collection[Path]) -> None:
    """Remove these files, and the folders at and below `entry` that are empty then."""
    for file in files:
        file.unlink(missing_ok=True)
    if entry.is_dir() and not entry.is_symlink():
        for folder in sorted((part for part in entry.rglob("*") if part.is_dir()), reverse=True):
            with contextlib.suppress(OSError):
                folder.rmdir()
        with contextlib.suppress(OSError):
            entry.rmdir()


def _files_of(path: Path) -> list[Path]:
    return sorted(part for part in path.rglob("*") if part.is_file()) if path.is_dir() else [path] * path.is_file()


def _release() -> str:
    from cutaway import __version__

    return __version__


def _is_of_someone_else(path: Path) -> bool:
    """Whether the folder holds files but no run: not even one that was killed while its record was being written."""
    with disk_errors(path / _RUN):
        if not path.is_dir():
            return False
        if (path / _RUN).exists():
            found = read_json(path / _RUN)
            known = {"command", "configuration", "cutaway"}
            return not (isinstance(found, dict) and known <= found.keys() and isinstance(found["configuration"], dict))
        ours = (_LOCK, _WRITTEN)
        return any(name not in ours and not name.startswith(f".{_RUN}.") for name in os.listdir(path))


def _check(path: Path, found: Any, wanted: Mapping[str, Any]) -> None:
    """Raise unless the folder's record is of the same command, configuration and release."""
    way_out = "add --overwrite to begin again, or name another folder with --out"
    if found["command"] != wanted["command"]:
        raise CutawayError(f"{path} holds a run of “{found['command']}”, not of “{wanted['command']}”: {way_out}")
    if found["cutaway"] != wanted["cutaway"]:
        raise CutawayError(f"{path} was made by cutaway {found['cutaway']}, this is {wanted['cutaway']}: {way_out}")
    if found["configuration"] != wanted["configuration"]:
        old, new = found["configuration"], wanted["configuration"]
        differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        raise CutawayError(f"{path} holds a run with another configuration ({', '.join(differing)}): {way_out}")


def _clear(path: Path, writes: Collection[str]) -> None:
    """Remove what the run wrote; raise, before anything is removed, where another file has one of its names."""
    with disk_errors(path / _RUN):
        entries = [
            entry
            for entry in sorted(path.iterdir())
            if any(fnmatch(entry.name, pattern) for pattern in (_RUN, "steps", *writes))
        ]
        files, others = _sorted_out(path, entries)
        if others:
            raise BadFile(
                f"{others[0]} was not written by the run in {path}, or has been changed since: move it, or name "
                "another folder"
            )
        # the record goes last: until then the folder is still known as a run's
        for entry in sorted(entries, key=lambda entry: entry.name == _RUN):
            _remove(entry, [file for file in files if file == entry or entry in file.parents])
        (path / _WRITTEN).unlink(missing_ok=True)


def _acquire(path: Path) -> int | None:
    """Lock the folder for this process. The kernel frees the lock when its holder dies, however it dies."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    file = path / _LOCK
    with disk_errors(file):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(descriptor, 32).decode(errors="replace").strip()
        os.close(descriptor)
        who = f" (process {holder})" if holder else ""
        raise CutawayError(f"another process{who} is at work in {path}: wait for it, or name another folder") from error
    except OSError:  # a file system without locks
        os.close(descriptor)
        return None
    with contextlib.suppress(OSError):  # the number is for the message above; the lock holds without it
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


def _unlock(lock: int | None) -> None:
    # The file stays: removing it would let a third process lock a new file while a second one holds the old.
    if lock is not None:
        os.close(lock)
