"""A training that is killed at random steps ends with the bits of one that is not, for every kind of dictionary."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

SCRIPT = Path(__file__).parents[2] / "helpers" / "killed_training.py"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("killed")
    seed = random.randrange(1000)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), str(seed)],
        capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1", "CUTAWAY_QUIET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, (seed, done.stderr)
    return folder, {**json.loads(done.stdout.splitlines()[-1]), "seed": seed}


def test_every_dictionary_has_the_same_bits(ran: tuple[Path, dict[str, Any]]) -> None:
    folder, report = ran
    assert len({stop for stop in report["stops"] if stop}) >= 2, report  # killed at different steps, in the midst
    names = [path.parent.name for path in sorted((folder / "whole").glob("*/sae_weights.safetensors"))]
    assert len(names) == 9
    for name in names:
        one, other = folder / "whole" / name, folder / "killed" / name
        files = sorted(path.name for path in one.iterdir())
        assert files == sorted(path.name for path in other.iterdir())
        for file in files:
            assert (one / file).read_bytes() == (other / file).read_bytes(), (name, file, report)
    weights = load_file(folder / "whole" / "topk" / "sae_weights.safetensors")
    assert weights["W_dec"].isfinite().all()


def test_logs_hold_each_step_once(ran: tuple[Path, dict[str, Any]]) -> None:
    folder, report = ran
    for path in sorted((folder / "whole" / "logs").glob("*.jsonl")):
        found: list[list[dict[str, Any]]] = []
        for run in ("whole", "killed"):
            lines = (folder / run / "logs" / path.name).read_text().splitlines()
            records = [json.loads(line) for line in lines]
            steps = [record["step"] for record in records]
            assert steps == sorted(set(steps)), (path.name, report)
            found.append([{k: v for k, v in record.items() if k != "tokens_per_second"} for record in records])
        assert found[0] == found[1], (path.name, report)
    aux = [json.loads(line)["auxk"] for line in (folder / "whole" / "logs" / "topk.jsonl").read_text().splitlines()]
    assert any(value > 0 for value in aux)  # dead latents were among what had to be resumed


def test_nothing_is_left_over(ran: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = ran
    whole, killed = (
        {str(path.relative_to(folder / run)) for path in (folder / run).rglob("*") if ".tmp" not in path.name}
        for run in ("whole", "killed")
    )
    assert whole == killed
    assert not (folder / "killed" / "checkpoints").exists()
