"""A run folder resumes its own run, and refuses to mix it with anything else."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from cutaway.artifacts import run_folder as module
from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.files import (
    _here,  # pyright: ignore[reportPrivateUsage]
    note_written,
    read_json,
    write_json,
    write_text,
)
from cutaway.artifacts.run_folder import RunFolder, goes_on

CONFIGURATION = {"model": "atlas", "seed": 0}


def open_tour(path: Path, configuration: dict = CONFIGURATION, command: str = "tour", resume: bool = True) -> RunFolder:
    return RunFolder.open(path, command=command, configuration=configuration, resume=resume)


def test_a_finished_step_is_found_again_just_as_it_was_returned(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "tour"
    with open_tour(path) as folder:
        assert folder.step("lens") is None
        saved = folder.save_step("lens", {"values": np.array([1.0, np.nan]), "rows": (1, 2)})
        assert saved == {"values": [1.0, None], "rows": [1, 2]}
    with open_tour(path) as folder:
        assert folder.step("lens") == saved
        assert folder.step("heads") is None
        assert folder.file("tables", "a.parquet").parent.is_dir()


def test_the_order_of_settings_does_not_matter_but_tuples_and_arrays_compare_as_json(tmp_path: Path) -> None:
    with open_tour(tmp_path / "r", {"a": (1, 2), "b": Path("x")}):
        pass
    with open_tour(tmp_path / "r", {"b": "x", "a": [1, 2]}):
        pass


@pytest.mark.parametrize(
    ("configuration", "command", "says"),
    [
        ({"model": "atlas", "seed": 1}, "tour", r"another configuration \(seed\)"),
        ({"model": "atlas"}, "tour", r"another configuration \(seed\)"),
        (CONFIGURATION, "train", "holds a run of “tour”, not of “train”"),
    ],
)
def test_another_run_is_refused_with_both_ways_out(
    tmp_path: Path, configuration: dict, command: str, says: str
) -> None:
    with open_tour(tmp_path / "r") as folder:
        folder.save_step("lens", 1)
    with pytest.raises(CutawayError, match=says + ".*--overwrite.*--out"):
        open_tour(tmp_path / "r", configuration, command)
    with open_tour(tmp_path / "r") as folder:  # the refusal changed nothing and gave its lock back
        assert folder.step("lens") == 1


def test_a_run_of_another_release_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_tour(tmp_path / "r"):
        pass
    monkeypatch.setattr(module, "_release", lambda: "9.0")
    with pytest.raises(CutawayError, match=r"this is 9\.0"):
        open_tour(tmp_path / "r")


def test_overwriting_begins_again_but_only_in_a_run_folder(tmp_path: Path) -> None:
    with open_tour(tmp_path / "r") as folder:
        folder.save_step("lens", 1)
        write_text(folder.file("deep", "er", "page.html"), "old")
        write_json(folder.path / "notes.json", "the run's, but not among what it says it writes")
        (folder.path / "notes.md").write_text("the user's")
    other = {"model": "other"}
    with RunFolder.open(
        tmp_path / "r", command="tour", configuration=other, writes=("deep", "pa?e"), resume=False
    ) as folder:
        assert folder.step("lens") is None
        assert sorted(os.listdir(folder.path)) == [".lock", ".written", "notes.json", "notes.md", "run.json", "steps"]

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    for resume in (True, False):
        with pytest.raises(CutawayError, match="is not a run folder: name an empty or a new folder"):
            open_tour(mine, resume=resume)
    assert os.listdir(mine) == ["thesis.tex"]
    write_json(mine / "run.json", {"name": "my experiment"})
    for resume in (True, False):
        with pytest.raises(CutawayError, match="is not a run folder: name an empty or a new folder"):
            open_tour(mine, resume=resume)
    assert sorted(os.listdir(mine)) == ["run.json", "thesis.tex"]


@pytest.mark.parametrize("theirs", ["a file in a folder of ours", "our file, changed", "a link", "a file of our name"])
def test_overwriting_removes_nothing_that_the_run_did_not_write(tmp_path: Path, theirs: str) -> None:
    path = tmp_path / "r"
    writes = ("deep", "page.html", "later.json", "link")
    with open_tour(path) as folder:
        folder.save_step("lens", 1)
        write_text(folder.file("deep", "table.csv"), "old")
        write_text(folder.path / "page.html", "old")
    strange = {
        "a file in a folder of ours": path / "deep" / "notes.md",
        "our file, changed": path / "page.html",
        "a link": path / "link",
        "a file of our name": path / "later.json",
    }[theirs]
    if theirs == "a link":
        strange.symlink_to(tmp_path)
    else:
        strange.write_text("the user's own")
    before = sorted(path.rglob("*"))
    with pytest.raises(CutawayError, match=rf"{strange.name} was not written by the run .* move it, or name another"):
        RunFolder.open(path, command="tour", configuration=CONFIGURATION, writes=writes, resume=False)
    assert sorted(path.rglob("*")) == before
    strange.unlink()
    with RunFolder.open(path, command="tour", configuration=CONFIGURATION, writes=writes, resume=False) as folder:
        assert folder.step("lens") is None
        assert not (path / "deep").exists()
        assert not (path / "page.html").exists()


def test_what_grows_and_what_another_program_fills_counts_as_written(tmp_path: Path) -> None:
    path = tmp_path / "r"
    with open_tour(path) as folder:
        log = folder.file("logs", "a.jsonl")
        write_text(log, "")
        note_written(log)
        with open(log, "a") as file:
            file.write("{}\n")
        (folder.take("board") / "deep").mkdir(parents=True)
        (path / "board" / "deep" / "events").write_text("of another program")
        write_text(folder.file("work", "state"), "half")
        (path / "work" / "mine.txt").write_text("the user's")
        folder.discard("work")
        assert os.listdir(path / "work") == ["mine.txt"]
        (path / "taken").mkdir()
        with pytest.raises(CutawayError, match="taken is there and not of this run"):
            folder.take("taken")
    RunFolder.open(path, command="tour", configuration={}, writes=("logs", "board"), resume=False).close()
    assert sorted(os.listdir(path)) == [".lock", ".written", "run.json", "steps", "taken", "work"]
    with open_tour(path, {}) as folder:
        (folder.take("board")).mkdir()
        folder.discard("board")
    (path / "board").mkdir()
    (path / "board" / "plan.txt").write_text("the user's")
    with pytest.raises(CutawayError, match=r"plan\.txt was not written by the run"):
        RunFolder.open(path, command="tour", configuration={}, writes=("logs", "board"), resume=False)


def test_a_run_removes_what_a_killed_one_left_anywhere_in_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "r"
    with open_tour(path) as folder:
        folder.file("deep", "er", "x")
    nobody = subprocess.Popen([sys.executable, "-c", ""])
    nobody.wait()
    token = f"{_here()}{nobody.pid:08x}0123abcd"
    (path / "deep" / "er" / f".x.{token}.tmp").write_text("half")
    (path / "steps" / f".lens.json.{token}.tmp").mkdir()
    open_tour(path).close()
    assert os.listdir(path / "deep" / "er") == []
    assert os.listdir(path / "steps") == []


def test_an_empty_folder_and_one_of_a_run_killed_at_its_start_are_taken(tmp_path: Path) -> None:
    (tmp_path / ".run.json.0123.tmp").write_text("{")
    (tmp_path / ".lock").write_text("12345")
    with open_tour(tmp_path) as folder:
        assert folder.step("lens") is None


def test_a_damaged_record_is_refused_not_guessed(tmp_path: Path) -> None:
    with open_tour(tmp_path / "r"):
        pass
    write_json(tmp_path / "r" / "run.json", [1])
    with pytest.raises(CutawayError, match="is not a run folder"):
        open_tour(tmp_path / "r")


def test_the_folder_says_what_it_is(tmp_path: Path) -> None:
    with open_tour(tmp_path / "r"):
        record = read_json(tmp_path / "r" / "run.json")
    assert record["command"] == "tour"
    assert record["configuration"] == CONFIGURATION
    assert record["code"].startswith(record["cutaway"])


def test_two_at_once_are_refused_even_in_one_process(tmp_path: Path) -> None:
    with (
        open_tour(tmp_path / "r"),
        pytest.raises(CutawayError, match=rf"another process \(process {os.getpid()}\) is at work"),
    ):
        open_tour(tmp_path / "r")
    open_tour(tmp_path / "r").close()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    code = """
        import sys, time
        from pathlib import Path
        from cutaway.artifacts.run_folder import RunFolder
        folder = RunFolder.open(Path(sys.argv[1]), command="tour", configuration={"model": "atlas", "seed": 0})
        folder.save_step("lens", {"done": True})
        print("open", flush=True)
        time.sleep(60)
    """
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "r")], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "open\n"
    with pytest.raises(CutawayError, match=rf"process {holder.pid}\) is at work"):
        open_tour(tmp_path / "r")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with open_tour(tmp_path / "r") as folder:
        assert folder.step("lens") == {"done": True}


def test_a_failing_body_gives_the_lock_back(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), open_tour(tmp_path / "r"):
        raise KeyboardInterrupt
    open_tour(tmp_path / "r").close()


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a b"])
def test_a_step_cannot_leave_its_folder(tmp_path: Path, name: str) -> None:
    with open_tour(tmp_path / "r") as folder, pytest.raises(ValueError, match="not a step's name"):
        folder.save_step(name, 1)


def test_none_is_no_result(tmp_path: Path) -> None:
    with open_tour(tmp_path / "r") as folder, pytest.raises(ValueError, match="None"):
        folder.save_step("lens", None)


@pytest.mark.parametrize("rights", [0o555, 0o500])
def test_a_place_that_may_not_be_written_to_is_one_sentence(rights: int) -> None:
    locked = Path(tempfile.mkdtemp())  # pytest's own folders are closed to nobody, whatever rights they are given
    (locked / "r").mkdir()
    for path in (locked / "r", locked):
        path.chmod(rights)
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        for path in (locked / "new", locked / "r"):
            with pytest.raises(CutawayError, match="the folder may not be written to"):
                open_tour(path)
    finally:
        if was == 0:
            os.seteuid(0)
        locked.chmod(0o700)
        shutil.rmtree(locked)


def test_a_finished_step_that_was_changed_since_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with open_tour(path) as folder:
        folder.file("dictionary", "weights").write_bytes(b"1234")
        folder.file("table").write_bytes(b"5678")
        folder.save_step("made", {"loss": 1.5}, files=("dictionary", "table", "never written"))
    for name in ("dictionary/weights", "table", "steps/made.json"):
        whole = (path / name).read_bytes()
        for spoilt in (whole[:-1] + b"x", None):
            (path / name).unlink() if spoilt is None else (path / name).write_bytes(spoilt)
            with open_tour(path) as folder:
                if spoilt is None and name.startswith("steps"):
                    assert folder.step("made") is None
                else:
                    with pytest.raises(CutawayError, match=f"{name} .*begin again with --overwrite"):
                        folder.step("made")
        (path / name).write_bytes(whole)
    (path / "steps" / "made.sha256").unlink()  # of a release that wrote none
    with open_tour(path) as folder:
        assert folder.step("made") == {"loss": 1.5}
        folder.file("table").write_bytes(b"again")
        folder.save_step("made", {"loss": 1}, files=("table",))
        assert folder.step("made") == {"loss": 1}


def test_an_interrupted_run_says_where_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the folder of the run, not the one in it that holds the checkpoints, and the day it was begun."""
    monkeypatch.delenv("CUTAWAY_QUIET", raising=False)
    with RunFolder.open(tmp_path / "x", command="train", configuration={}) as folder:
        folder.file("checkpoints", "one").write_text("")
    os.utime(tmp_path / "x" / "run.json", (1_796_083_200, 1_796_083_200))  # noon UTC of a day
    day = datetime.fromtimestamp(1_796_083_200).date().isoformat()
    goes_on(tmp_path / "x" / "checkpoints", 1_234_000, 4_000_000, "tokens")
    goes_on(tmp_path / "x", 3, None, "steps")
    (tmp_path / "empty").mkdir()
    goes_on(tmp_path / "empty", 3, 8, "steps")
    assert capsys.readouterr() == (
        "",
        f"goes on at 1,234,000 of 4,000,000 tokens ({tmp_path / 'x'}, begun {day})\n"
        f"goes on at 3 steps ({tmp_path / 'x'}, begun {day})\n"
        f"goes on at 3 of 8 steps ({tmp_path / 'empty'})\n",
    )
    monkeypatch.setenv("CUTAWAY_QUIET", "1")
    goes_on(tmp_path / "x", 3, None, "steps")
    assert capsys.readouterr().err == ""
