"""How long `cutaway.load` takes beside plain transformers: model and tokenizer of the same folder in the same dtype.

    python benchmarks/loading.py [MODEL ...] [--pairs 15] [--processes 5] [--profile]

A MODEL is "atlas" or a folder. The two take turns in this process, where everything is imported already, and then, as
often as --processes says, in processes of their own, imports and all. The exit code is 1 where the median ratio is
above 1.1. --profile prints where the time of one more load goes.
"""

import argparse
import cProfile
import pstats
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from paired import ROOT, Claim, Row, Subject, take_turns, timed, verdict
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import cutaway
from cutaway.artifacts.files import write_json
from cutaway.model.named import named_folder, title_of

BOUND = 1.1
OURS, PLAIN = "cutaway.load", "AutoModelForCausalLM and AutoTokenizer"
_PLAIN = (
    "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer; "
    "AutoModelForCausalLM.from_pretrained({0!r}, dtype=torch.float32).eval(); AutoTokenizer.from_pretrained({0!r})"
)
_OURS = "import cutaway; cutaway.load({0!r}, device='cpu', dtype='float32')"


def main() -> int:
    """Time every model, print a row for each, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["atlas"], metavar="MODEL")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    asked = parser.parse_args()
    logging.disable_progress_bar()
    rows: list[Row] = []
    for model in asked.models:
        folder = str(named_folder(model) or Path(model).expanduser())
        name = title_of(model)
        rows.append(
            _row(name, "in this process", {OURS: partial(_ours, folder), PLAIN: partial(_plain, folder)}, asked.pairs)
        )
        if asked.processes:
            programs = {OURS: _OURS.format(folder), PLAIN: _PLAIN.format(folder)}
            fresh = {who: partial(_process, program) for who, program in programs.items()}
            rows.append(_row(name, "in a process of its own", fresh, asked.processes))
        if asked.profile:
            _profile(folder)
    write_json(ROOT / "runs" / "bench" / "loading.json", [row.to_json() for row in rows])
    return 0 if all(one.met for row in rows for one in row.verdicts) else 1


def _row(name: str, where: str, subjects: Mapping[str, Subject], pairs: int) -> Row:
    row = Row(name, f"a model and its tokenizer, loaded {where}", seconds=take_turns(subjects, max(pairs, 2)))
    row.verdicts.append(verdict(Claim(f"{OURS} / plain", OURS, PLAIN, "<=", BOUND), row.seconds))
    print(row, flush=True)
    return row


def _ours(folder: str, _turn: int = 0) -> float:
    return timed(lambda: cutaway.load(folder, device="cpu", dtype="float32"))


def _plain(folder: str, _turn: int = 0) -> float:
    def load() -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return model, AutoTokenizer.from_pretrained(folder)

    return timed(load)


def _process(program: str, _turn: int = 0) -> float:
    return timed(lambda: subprocess.run([sys.executable, "-c", program], check=True, stderr=subprocess.DEVNULL))


def _profile(folder: str) -> None:
    profile = cProfile.Profile()
    profile.runcall(_ours, folder)
    pstats.Stats(profile).sort_stats("cumulative").print_stats(30)


if __name__ == "__main__":
    sys.exit(main())
