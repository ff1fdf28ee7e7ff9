"""Commands that are killed leave nothing half-written, and end with the figures of those that are not."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[1] / "helpers" / "killed_commands.py"
NAMES = ("circuit", "tasks", "tour", "harvest")
_TIMES = {"seconds", "total_seconds", "created"}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("killed")
    seed = random.randrange(1000)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), str(seed)],
        capture_output=True, text=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1", "CUTAWAY_QUIET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, (seed, done.stderr)
    return folder, {**json.loads(done.stdout.splitlines()[-1]), "seed": seed}


def log_of(folder: Path, name: str) -> str:
    return (folder / f"{name}.log").read_text()[-3000:]


@pytest.mark.parametrize("name", NAMES)
def test_killed_and_whole_leave_the_same(ran: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, report = ran
    found = report[name]
    assert found["codes"] == [0, 0], (report["seed"], log_of(folder, name))
    assert found["kills"] >= 2, report
    assert found["broken"] == [], report
    whole, killed = (files(folder / name / run) for run in ("whole", "killed"))
    assert sorted(whole) == sorted(killed), (report["seed"], log_of(folder, name))
    for path in whole:
        assert figures(folder / name / "whole" / path) == figures(folder / name / "killed" / path), (path, report)


@pytest.mark.parametrize("name", NAMES)
def test_two_writers_of_one_place(ran: tuple[Path, dict[str, Any]], name: str) -> None:
    """Both end well, or one is refused in a sentence; what they leave is whole."""
    folder, report = ran
    assert sorted(report[name]["both"]) in ([0, 0], [0, 2]), (report, log_of(folder, name))
    assert "Traceback" not in (folder / f"{name}.log").read_text()
    assert sorted(files(folder / name / "both")) == sorted(files(folder / name / "whole"))
    for path in files(folder / name / "both"):
        assert figures(folder / name / "both" / path) == figures(folder / name / "whole" / path), (path, report)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def figures(path: Path) -> Any:
    """What a file holds, but for times and for the folder it was written to."""
    if path.suffix == ".json":
        text = path.read_text()
        for run in ("killed", "both"):
            text = text.replace(f"/{run}/", "/whole/")
        return without(json.loads(text))
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pydict()
    if path.suffix == ".safetensors":
        return path.read_bytes()
    return path.suffix


def without(value: Any) -> Any:
    """The value without times; the tour's last section is a table of times."""
    if isinstance(value, dict) and value.get("id") == "again":
        return None
    if isinstance(value, dict):
        return {key: without(one) for key, one in value.items() if key not in _TIMES}
    return [without(one) for one in value] if isinstance(value, list) else value
