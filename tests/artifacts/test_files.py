"""Files are whole or absent, and a disk's refusal is one clear sentence."""

import errno
import json
import math
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.files import (
    atomic_path,
    make_folder,
    plain,
    read_json,
    write_json,
    write_parquet,
    write_safetensors,
    write_text,
)


@contextmanager
def without_root() -> Iterator[None]:
    """Root may write anywhere; nobody may not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def files_of_at_most(n_bytes: int) -> Iterator[None]:
    """The kernel refuses longer files, as a full disk or a quota does; Python ignores the signal that comes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_the_file_appears_only_when_the_body_ends_well(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "er" / "a.txt"
    with atomic_path(final) as temporary:
        temporary.write_text("new")
        assert temporary.parent == final.parent
        assert not final.exists()
    assert final.read_text() == "new"
    assert names(final.parent) == ["a.txt"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, ValueError])
def test_whatever_stops_the_writer_the_old_file_stays_and_nothing_else(
    tmp_path: Path, stop: type[BaseException]
) -> None:
    final = tmp_path / "a.txt"
    final.write_text("old")
    with pytest.raises(stop), atomic_path(final) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise stop
    assert final.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_killed_writer_never_leaves_half_a_file_under_the_final_name(tmp_path: Path) -> None:
    final = tmp_path / "a.json"
    code = """
        import sys
        from pathlib import Path
        from cutaway.artifacts.files import write_json
        n = 0
        while True:
            n += 1
            write_json(Path(sys.argv[1]), {"n": n, "padding": ["x" * 1000] * 200})
            if n == 1:
                print("running", flush=True)
    """
    writer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(final)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "running\n"
    time.sleep(0.2)
    writer.kill()
    writer.wait()
    assert len(json.loads(final.read_text())["padding"]) == 200


def test_a_folder_without_rights_is_named_with_the_way_out(tmp_path: Path) -> None:
    final = tmp_path / "locked" / "a.txt"
    final.parent.mkdir()
    final.parent.chmod(0o500)
    with without_root(), pytest.raises(CutawayError, match=r"a\.txt could not be written: .*change its rights"):
        write_text(final, "x")
    with without_root(), pytest.raises(CutawayError, match="change its rights"):
        make_folder(final.parent / "below")


@pytest.mark.parametrize(
    ("number", "says"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk is full"), (errno.EROFS, "may not be written to")],
)
def test_a_refusal_at_the_last_moment_is_named_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, says: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CutawayError, match=says):
        write_text(tmp_path / "a.txt", "x")
    assert names(tmp_path) == []


def writers(path: Path, n: int) -> dict[str, Any]:
    array = np.random.default_rng(0).standard_normal(n)
    torch = pytest.importorskip("torch")
    return {
        "text": lambda: write_text(path, "x" * n),
        "json": lambda: write_json(path, array),
        "safetensors of numpy": lambda: write_safetensors(path, {"a": array}),
        "safetensors of torch": lambda: write_safetensors(path, {"a": torch.from_numpy(array)}),
        "parquet": lambda: write_parquet(path, pa.table({"a": array})),
    }


@pytest.mark.parametrize("kind", ["text", "json", "safetensors of numpy", "safetensors of torch", "parquet"])
def test_every_writer_reports_a_full_disk_and_leaves_nothing(tmp_path: Path, kind: str) -> None:
    write = writers(tmp_path / "a", 200_000)[kind]
    with files_of_at_most(50_000), pytest.raises(CutawayError, match="the disk is full"):
        write()
    assert names(tmp_path) == []


def test_a_device_or_a_pipe_is_refused_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    stream = tmp_path / "stream"
    stream.symlink_to("/proc/self/fd/1")  # what /dev/stdout is
    with pytest.raises(CutawayError, match="pipe is a device or a pipe, not a file; name a file"):
        write_text(pipe, "text")
    with pytest.raises(CutawayError, match="not a file; name a file"):
        write_text(stream, "text")
    assert pipe.is_fifo()
    assert stream.is_symlink()
    assert sorted(tmp_path.iterdir()) == [pipe, stream]


def test_a_file_where_a_folder_should_be_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CutawayError, match="a file is where a folder should be"):
        write_text(tmp_path / "file" / "a.txt", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CutawayError, match="a folder where the file should be"):
        write_text(tmp_path / "folder", "x")


def test_an_error_about_some_other_file_keeps_its_own_message(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(IsADirectoryError), atomic_path(tmp_path / "here" / "a.txt") as temporary:
        temporary.write_bytes((tmp_path / "other").read_bytes())
    assert names(tmp_path / "here") == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(JSON)
def test_json_comes_back_exactly(value: Any) -> None:
    assert plain(value) == value


@given(value=JSON)
def test_json_files_come_back_exactly(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path) == value


def test_json_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(CutawayError, match="nested too deeply"):
        read_json(tmp_path / "a.json")


def test_a_name_that_is_not_utf8_survives_json_too(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    write_json(tmp_path / "a.json", {name: "ü"})
    assert read_json(tmp_path / "a.json") == {name: "ü"}
    (tmp_path / "a.json").read_text()


def test_arrays_paths_and_what_is_not_finite_become_plain() -> None:
    value = {
        "array": np.array([[1.5, math.nan], [math.inf, -2.0]]),
        "scalar": np.float32(0.5),
        "integer": np.int64(3),
        "flag": np.bool_(True),
        "path": Path("a/b"),
        "tuple": (1, 2.5),
        7: "a layer's number as a key",
    }
    assert plain(value) == {
        "array": [[1.5, None], [None, -2.0]],
        "scalar": 0.5,
        "integer": 3,
        "flag": True,
        "path": "a/b",
        "tuple": [1, 2.5],
        "7": "a layer's number as a key",
    }
    with pytest.raises(TypeError, match="object cannot be written as JSON"):
        plain({"a": object()})
    with pytest.raises(TypeError, match="keys are strings"):
        plain({(1, 2): 3})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "not JSON: line 1"),
        (b'"\xff"', "not JSON: byte 1 is not UTF-8"),
        (b"9" * 5000, "a number of too many digits"),
        (None, "does not exist"),
    ],
)
def test_unreadable_json_says_why(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CutawayError, match=says):
        read_json(path)


def test_safetensors_and_parquet_hold_what_was_written(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_safetensors(tmp_path / "a.safetensors", {"a": array.T}, {"made by": "a test"})
    assert (load_file(tmp_path / "a.safetensors")["a"] == array.T).all()

    torch = pytest.importorskip("torch")
    from safetensors import safe_open

    tensor = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).requires_grad_()
    write_safetensors(tmp_path / "b.safetensors", {"t": tensor.T}, {"made by": "a test"})
    with safe_open(tmp_path / "b.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("t"), tensor.detach().T)
        assert file.metadata() == {"made by": "a test"}

    table = pa.table({"text": ["a", "ü", None], "value": [1.0, 2.0, 3.0]})
    write_parquet(tmp_path / "c.parquet", table)
    assert pq.read_table(tmp_path / "c.parquet").equals(table)


def test_two_names_of_one_memory_are_both_written(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    rows = torch.arange(6.0).view(2, 3)
    write_safetensors(tmp_path / "shared.safetensors", {"a": rows, "b": rows, "c": rows[1]})
    loaded = load_file(tmp_path / "shared.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in {"a": rows, "b": rows, "c": rows[1]}.items())


def test_files_can_be_read_as_the_umask_says(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    before = os.umask(0o027)
    try:
        write_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(2)})
        write_text(tmp_path / "a.txt", "text")
    finally:
        os.umask(before)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("a.safetensors", "a.txt")} == {0o640}
