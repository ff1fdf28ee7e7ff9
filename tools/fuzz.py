"""Spoil every kind of file that cutaway reads, and see that each is read, or refused in one sentence.

    python tools/fuzz.py [--mutations N] [--seed N] [--reader PART OF A NAME] [--keep FOLDER]

Each reader (`fuzz_readers.py`) is given N copies of good files with one of them spoiled (`fuzz_mutations.py`), in this
process, under a limit of time and of memory. Anything but success or a `CutawayError` is a failure: the
copy is kept, with the traceback beside it. Prints how often each reader read, refused, failed ("raw") or did not come
to an end ("hangs"); exits with 1 where any failed.
"""

import argparse
import contextlib
import faulthandler
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from fuzz_mutations import mutate
from fuzz_readers import READERS, Reader

from cutaway.artifacts.errors import CutawayError

SECONDS = 5.0  # for one copy
GIBIBYTES = 6  # beside what is taken already
COLUMNS = ("mutations", "refused", "read", "raw", "hangs")


class TooSlow(BaseException):
    """Raised where a reader is, when its time is over."""


@dataclass
class Count:
    """What came of one reader's mutations, and where its failures are kept."""

    found: Counter[str] = field(default_factory=Counter)
    kept: list[Path] = field(default_factory=list)
    seconds: float = 0.0


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise `TooSlow` in the block when it takes longer; a call that cannot be interrupted ends the process."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(20 * seconds, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


@contextmanager
def memory_limit(gibibytes: float) -> Iterator[None]:
    """Let allocations fail that go far beyond what is taken now, as if the machine were small."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (int(taken + gibibytes * 2**30), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def spoil(rng: random.Random, reader: Reader, folder: Path) -> str:
    """Spoil one file of a reader's folder; what was done."""
    found = {file for pattern in reader.files for file in folder.glob(pattern) if file.is_file()}
    file = rng.choice(sorted(found))
    how = rng.random()
    if how < 0.03:
        file.unlink()
        done = "gone"
    elif how < 0.05:
        file.unlink()
        file.mkdir() if rng.random() < 0.5 else file.symlink_to(file)
        done = "a folder or a link in its place"
    else:
        done, data = mutate(rng, file.suffix or file.name, file.read_bytes())
        file.write_bytes(data)
    if reader.mend is not None and rng.random() < 0.5:
        try:
            reader.mend(folder)
        except Exception:  # what is spoiled need not have anything to put right
            done += ", not signed"
        else:
            done += ", signed"
    return f"{file.relative_to(folder)}: {done}"


def fuzz(reader: Reader, mutations: int, seed: int, keep: Path) -> Count:
    """Read so many spoiled copies. Raises what the reader raises for the good files: then nothing can be told."""
    count = Count()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as room:
        whole, copy = Path(room) / "whole", Path(room) / "copy"
        whole.mkdir()
        with contextlib.redirect_stderr(io.StringIO()):
            reader.make(whole)
        shutil.copytree(whole, copy)
        with at_most(20 * SECONDS):
            reader.read(copy)
            if reader.mend is not None:
                reader.mend(copy)
                reader.read(copy)
        for number in range(mutations):
            shutil.rmtree(copy)
            shutil.copytree(whole, copy)
            done = spoil(random.Random(f"{seed} {reader.name} {number}"), reader, copy)
            spoiled = keep / f"{_as_name(reader.name)}-{seed}-{number}"
            shutil.rmtree(spoiled, ignore_errors=True)
            kind, why = _outcome(reader, copy, spoiled)
            count.found[kind] += 1
            if kind in ("raw", "hangs"):
                (spoiled / "failure.txt").write_text(f"{done}\n{why}", encoding="utf-8", errors="replace")
                count.kept.append(spoiled)
            else:
                shutil.rmtree(spoiled, ignore_errors=True)
    count.seconds = time.monotonic() - began
    return count


def _outcome(reader: Reader, copy: Path, spoiled: Path) -> tuple[str, str]:
    """What the reader does with a copy, which is kept under another name before: a crash leaves it there."""
    shutil.copytree(copy, spoiled, symlinks=True)
    try:
        with at_most(SECONDS), contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            reader.read(copy)
    except CutawayError:
        return "refused", ""
    except SystemExit as error:
        return ("refused" if error.code == 2 else "raw"), f"exit code {error.code}"
    except TooSlow:
        return "hangs", traceback.format_exc()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "raw", traceback.format_exc()
    return "read", ""


def _as_name(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name).strip("-")


def main(words: list[str] | None = None) -> int:
    """Fuzz the readers that are asked for and print the table; 1 where any failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--mutations", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", default="", help="only readers with this in their names")
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="where failures go")
    asked = parser.parse_args(words)
    os.environ["CUTAWAY_QUIET"] = "1"
    warnings.simplefilter("ignore")
    chosen = [reader for reader in READERS if asked.reader in reader.name]
    asked.keep.mkdir(parents=True, exist_ok=True)
    wide = max(len(reader.name) for reader in chosen)
    print("reader".ljust(wide), *COLUMNS, "seconds", sep="  ")
    total: Counter[str] = Counter()
    failures: list[Path] = []
    began = time.monotonic()
    with memory_limit(GIBIBYTES):
        for reader in chosen:
            count = fuzz(reader, asked.mutations, asked.seed, asked.keep)
            found = {**count.found, "mutations": asked.mutations}
            cells = [f"{found.get(name, 0):>{len(name)},}" for name in COLUMNS]
            print(reader.name.ljust(wide), *cells, f"{count.seconds:7.1f}", sep="  ", flush=True)
            total.update({name: found.get(name, 0) for name in COLUMNS})
            failures += count.kept
    cells = [f"{total[name]:>{len(name)},}" for name in COLUMNS]
    print("all".ljust(wide), *cells, f"{time.monotonic() - began:7.1f}", sep="  ")
    if failures:
        print(f"\n{len(failures)} failures, kept with their tracebacks in {asked.keep}:")
        for kept in failures[:40]:
            lines = (kept / "failure.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            print(f"  {kept.name}  {lines[0][:70]}  {lines[-1][:110]}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
