"""A harvest that is killed ends with the bytes of one that is not; processes that share the work leave the same too."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cutaway.data.harvesting.store import Store

SCRIPT = Path(__file__).parents[2] / "helpers" / "killed.py"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), "0"],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", "CUTAWAY_QUIET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def contents(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    info = json.loads(found["manifest.json"])
    info["manifest"]["created"] = None
    return {**found, "manifest.json": info}


def test_killed_at_random_moments(ran: tuple[Path, dict[str, Any]]) -> None:
    folder, report = ran
    assert report["kills"] >= 3, report
    assert contents(folder / "killed") == contents(folder / "whole")
    store = Store.open(folder / "killed", verify=True)
    everything = store[:]
    places = list(zip(everything.document.tolist(), everything.offset.tolist(), strict=True))
    assert len(set(places)) == len(places) == len(store)
    assert len(store) + store.counts["high_norm"] == 600 * 11


def test_two_processes_share_the_work(ran: tuple[Path, dict[str, Any]]) -> None:
    folder, report = ran
    assert report["waiting"], report  # the first waited for the second, which had been killed
    assert report["codes"] == [0, 0]
    assert contents(folder / "shared") == contents(folder / "whole")
