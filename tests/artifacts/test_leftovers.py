"""What a killed writer leaves is removed by the next one, and what a living one is writing is not."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.files import (
    atomic_folder,
    atomic_path,
    clear_leftovers,
    scratch_folder,
    write_safetensors,
    write_text,
)

WRITER = """
    import os, signal, sys, time
    from pathlib import Path
    from cutaway.artifacts import files
    kind, folder, end = sys.argv[1], Path(sys.argv[2]), sys.argv[3]

    def stop(*_, **__):
        print("in the middle", flush=True)
        os.kill(os.getpid(), signal.SIGKILL) if end == "kill" else time.sleep(120)

    if kind == "file":
        with files.atomic_path(folder / "a.txt") as temporary:
            temporary.write_text("half")
            stop()
    elif kind == "safetensors":
        import numpy, safetensors.numpy
        safetensors.numpy.save_file = stop
        files.write_safetensors(folder / "a.safetensors", {"x": numpy.ones(3)})
    elif kind == "scratch":
        with files.scratch_folder(folder / "export") as room:
            (room / "half").write_text("half")
            stop()
    else:
        with files.atomic_folder(folder / "made") as fresh:
            (fresh / "new").write_text("new")
            if kind == "exchange":
                rename, calls = os.rename, []
                def once(*names):
                    calls.append(names)
                    rename(*names) if len(calls) == 1 else stop()
                os.rename = once
            else:
                stop()
"""


def begin(kind: str, folder: Path, end: str) -> subprocess.Popen[str]:
    """A writer that has come to the middle of its work, and stays there, or is killed there."""
    words = [sys.executable, "-c", textwrap.dedent(WRITER), kind, str(folder), end]
    writer = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "in the middle\n"
    if end == "kill":
        writer.wait()
    return writer


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("kind", ["file", "safetensors", "scratch", "folder", "exchange"])
def test_what_a_killed_writer_left_goes_with_the_next_file_written_there(tmp_path: Path, kind: str) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "old").write_text("the only copy")
    begin(kind, tmp_path, "kill")
    assert any(name.endswith((".tmp", ".old")) for name in names(tmp_path))
    write_text(tmp_path / "b.txt", "b")
    assert names(tmp_path) == ["b.txt", "made"]
    assert names(tmp_path / "made") == ["old"]  # also when it was killed between the two names of an exchange


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_living_process_is_writing_stays_until_it_is_killed(tmp_path: Path, kind: str) -> None:
    writer = begin(kind, tmp_path, "sleep")
    try:
        (left,) = names(tmp_path)
        write_text(tmp_path / "b.txt", "b")
        clear_leftovers(tmp_path)
        assert names(tmp_path) == [left, "b.txt"]
    finally:
        writer.kill()  # and not waited for: a dead process that still has its number
    deadline = time.monotonic() + 30
    while names(tmp_path) != ["b.txt"] and time.monotonic() < deadline:
        clear_leftovers(tmp_path)
    assert names(tmp_path) == ["b.txt"]
    writer.wait()


def test_what_this_process_is_writing_stays(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("a")
        with scratch_folder(tmp_path / "b") as room:
            clear_leftovers(tmp_path)
            write_text(tmp_path / "c.txt", "c")
            assert temporary.exists()
            assert room.is_dir()
    assert names(tmp_path) == ["a.txt", "c.txt"]


def test_what_another_machine_may_be_writing_goes_after_a_day_without_a_change(tmp_path: Path) -> None:
    old, new = tmp_path / f".a.txt.{'0' * 24}.tmp", tmp_path / f".b.txt.{'1' * 24}.tmp"
    folder = tmp_path / f".d.{'2' * 24}.tmp"
    for path in (old, new):
        path.write_text("half")
    folder.mkdir()
    (folder / "part").write_text("being written")
    two_days_ago = time.time() - 2 * 24 * 3600
    for path in (old, folder):
        os.utime(path, (two_days_ago, two_days_ago))
    clear_leftovers(tmp_path)
    assert names(tmp_path) == sorted([new.name, folder.name])


def test_other_hidden_files_links_and_names_that_only_look_alike_stay(tmp_path: Path) -> None:
    token = "0123456789abcdef01234567"
    kept = [".hidden", ".a.tmp", ".a.0123abcd.tmp", f"a.{token}.tmp", f".a.{token.upper()}.tmp", f".a.{token}.bak"]
    for name in kept:
        (tmp_path / name).write_text("the user's")
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / f".link.{'0' * 24}.tmp").symlink_to(tmp_path)
    clear_leftovers(tmp_path)
    assert names(tmp_path) == sorted([*kept, f".link.{'0' * 24}.tmp"])


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "deep" / "made") as fresh:
        (fresh / "a").write_text("1")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "deep" / "made") as fresh:  # noqa: PT012
        (fresh / "b").write_text("2")
        raise KeyboardInterrupt
    assert names(tmp_path / "deep") == ["made"]
    assert names(tmp_path / "deep" / "made") == ["a"]
    with atomic_folder(tmp_path / "deep" / "made") as fresh:
        (fresh / "b").write_text("2")
    assert names(tmp_path / "deep" / "made") == ["b"]
    assert names(tmp_path / "deep") == ["made"]


@pytest.mark.parametrize("length", [218, 255])
def test_a_name_as_long_as_names_can_be_is_written_and_a_longer_one_refused(tmp_path: Path, length: int) -> None:
    write_text(tmp_path / ("n" * length), "text")
    import numpy as np

    write_safetensors(tmp_path / ("t" * length), {"x": np.ones(2)})
    assert names(tmp_path) == ["n" * length, "t" * length]
    with pytest.raises(CutawayError, match="its name is too long"):
        write_text(tmp_path / ("n" * 256), "text")
    with pytest.raises(CutawayError, match="too long for a folder's name"), atomic_folder(tmp_path / ("f" * 256)):
        pass
