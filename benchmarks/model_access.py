"""How fast looking inside a model is, beside transformers alone, TransformerLens and nnsight, in one run.

    python benchmarks/model_access.py                   # at least 30 pairs a row, about ten minutes
    python benchmarks/model_access.py --quick           # few pairs: does everything run?
    python benchmarks/model_access.py --only heads-16   # rows by name or beginning of a name

Every row runs its subjects in turn, and a ratio is the median over turns of two subjects' times in the same turn, with
a bootstrap interval of that median. Peers work in their own environments (`make parity` builds them) on the same
weights and tokens, driven over pipes. Weights are random. The numbers that subjects return are compared as well.
Results go to runs/bench/model_access.json; the table that ends the output is Markdown. The exit code is 1 where a
target was missed, and where a peer is absent and --without-peers was not given.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded; the command line and the peers do too

import harvesting
import torch
from model_access_models import Models
from paired import ROOT, Claim, Peer, PeerAbsent, Row, Subject, Verdict, relative, same, take_turns, timed, verdict
from peer_worker import peak_over, resident
from sweeps import PatchSweep
from torch import Tensor

from cutaway.artifacts.files import write_json
from cutaway.model.language_model import LanguageModel

PEERS = ("transformerlens", "nnsight")
TITLES = {"transformerlens": "TransformerLens", "nnsight": "nnsight"}


class Bench:
    """What the rows share: options, models, peers, and how a row is measured."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.models = Models(folder)
        self.peers: dict[str, Peer] = {}
        self.absent: list[str] = []
        self.versions: dict[str, str] = {}
        for name in () if options.without_peers else PEERS:
            try:
                self.peers[name] = Peer(name)
            except PeerAbsent:
                self.absent.append(name)

    def pairs(self, wanted: int) -> int:
        return min(3, wanted) if self.options.quick else wanted

    def lm(self, shape: str) -> LanguageModel:
        return self.models.language_model(shape)

    def ask(self, peer: str, do: str, shape: str, task: str, ids: Tensor, **more: Any) -> dict[str, Any]:
        """A request to a peer about one of the models; the first one makes it load the model."""
        if (peer, shape) not in self.models.loaded:
            folder = str(self.models.folder(shape))
            self.versions[TITLES[peer]] = self.peers[peer].ask(do="load", model=shape, folder=folder)["version"]
            self.models.loaded.add((peer, shape))
        return self.peers[peer].ask(
            do=do, model=shape, task=task, ids=ids.tolist(), threads=torch.get_num_threads(), **more
        )

    def peer_subjects(
        self, shape: str, task: str, ids: Tensor, repeats: int = 1, only: Sequence[str] = PEERS
    ) -> dict[str, Subject]:
        """The peers that are at hand, as subjects."""

        def subject(peer: str) -> Subject:
            return lambda turn: self.ask(peer, "time", shape, task, ids, repeats=repeats)["seconds"]

        return {TITLES[peer]: subject(peer) for peer in self.peers if peer in only}

    def peer_values(
        self, row: Row, shape: str, task: str, ids: Tensor, only: Sequence[str] = PEERS, **more: Any
    ) -> dict[str, dict[str, Tensor]]:
        """What each peer returns; its peak memory goes into the row."""
        from safetensors.torch import load_file

        made = {}
        for peer in self.peers:
            if peer in only:
                file = self.models.root / "values.safetensors"
                answer = self.ask(peer, "values", shape, task, ids, file=str(file), **more)
                row.peak_bytes[TITLES[peer]] = answer["peak"]
                made[TITLES[peer]] = load_file(file)
        return made

    def measure(self, row: Row, subjects: dict[str, Subject], pairs: int, claims: Sequence[Claim]) -> None:
        """Run the turns and judge the claims whose subjects are there."""
        row.seconds = take_turns(subjects, self.pairs(pairs))
        row.verdicts += [
            verdict(claim, row.seconds) for claim in claims if claim.over in subjects and claim.under in subjects
        ]


def tokens(lm: LanguageModel, batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(2, lm.d_vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def plain(lm: LanguageModel, ids: Tensor) -> Tensor:
    """The plainest forward of transformers: logits at every position, no cache kept."""
    with torch.no_grad():
        return lm.hf(input_ids=ids, use_cache=False).logits


def forward(bench: Bench, name: str, shape: str, batch: int, length: int, repeats: int, bound: float) -> Row:
    lm = bench.lm(shape)
    ids = tokens(lm, batch, length)
    row = Row(name, f"lm.run(ids), nothing captured; {bench.models.describe(shape)}, batch {batch} × {length} tokens")
    ours = lm.run(ids).logits
    assert ours is not None
    same(row, "cutaway and HF", relative(ours, plain(lm, ids)))
    for peer, made in bench.peer_values(row, shape, "forward", ids).items():
        same(row, f"{peer} and HF", relative(made["logits"], plain(lm, ids)))
    row.peak_bytes["HF"] = peak_over(lambda: plain(lm, ids))
    row.peak_bytes["cutaway"] = peak_over(lambda: lm.run(ids))
    subjects: dict[str, Subject] = {
        "HF": lambda turn: timed(lambda: plain(lm, ids), repeats),
        "cutaway": lambda turn: timed(lambda: lm.run(ids), repeats),
        **bench.peer_subjects(shape, "forward", ids, repeats),
    }
    claims = [
        Claim("lm.run / HF", "cutaway", "HF", "<=", bound),
        Claim("TransformerLens / HF", "TransformerLens", "HF", ""),
        Claim("nnsight / HF", "nnsight", "HF", ""),
    ]
    bench.measure(row, subjects, 60 if shape == "toy" else 30, claims)
    return row


def captures(bench: Bench) -> Row:
    lm = bench.lm("toy")
    ids, site = tokens(lm, 1, 16), "blocks.*.resid_post"
    layers = lm.hf.model.layers  # pyright: ignore[reportAttributeAccessIssue]
    row = Row("captures", f"the stream after each of 12 layers; {bench.models.describe('toy')}, batch 1 × 16 tokens")

    def raw() -> list[Tensor]:
        """What one writes by hand: a forward hook a layer that keeps a copy."""
        kept: list[Tensor] = []
        handles = [layer.register_forward_hook(lambda m, a, out: kept.append(out.clone())) for layer in layers]
        try:
            plain(lm, ids)
        finally:
            for handle in handles:
                handle.remove()
        return kept

    expected = torch.stack(raw())
    ours = lm.run(ids, capture=site).stack(site)
    same(row, "cutaway and raw hooks", relative(ours, expected), 0.0)
    for peer, made in bench.peer_values(row, "toy", "captures", ids).items():
        theirs = torch.stack([made[f"blocks.{layer}.hook_resid_post"] for layer in range(lm.n_layers)])
        same(row, f"{peer} and raw hooks", relative(theirs, expected))
    row.peak_bytes["HF with raw hooks"] = peak_over(raw)
    row.peak_bytes["cutaway"] = peak_over(lambda: lm.run(ids, capture=site))
    subjects: dict[str, Subject] = {
        "HF with raw hooks": lambda turn: timed(raw, 20),
        "cutaway": lambda turn: timed(lambda: lm.run(ids, capture=site), 20),
        **bench.peer_subjects("toy", "captures", ids, 20),
    }
    claims = [
        Claim("cutaway / HF with raw hooks", "cutaway", "HF with raw hooks", "<=", 1.15),
        Claim("TransformerLens / HF with raw hooks", "TransformerLens", "HF with raw hooks", ""),
        Claim("nnsight / HF with raw hooks", "nnsight", "HF with raw hooks", ""),
    ]
    bench.measure(row, subjects, 60, claims)
    return row


def sweep(bench: Bench, name: str, kind: str, length: int, step: int, per_turn: int, pairs: int) -> Row:
    """A whole sweep of ours, beside one forward per cell and TransformerLens on a share of the cells."""
    lm = bench.lm("small")
    task = PatchSweep(lm, kind, length, step)
    row = Row(name, f"{task.title}; {bench.models.describe('small')}, batch 1 × {length} tokens")
    groups = task.groups(per_turn)
    with_peer = length == 16 and "transformerlens" in bench.peers

    swept = task.ours()
    checked = len(groups) if name == "heads-16" and not bench.options.quick else 2
    cells = [cell for group in groups[:checked] for cell in group]
    chosen = swept.values[:, 0][[task.cells.index(cell) for cell in cells]]
    oracle = task.one_by_one(cells)
    same(row, f"cutaway and one forward per cell, {len(cells)} cells", relative(chosen, oracle))
    effect = (oracle - task.baseline()).abs().max().item()
    row.notes.append(f"largest effect of a cell {effect:.3g} of a metric of {oracle.abs().max().item():.3g}")
    row.peak_bytes["cutaway"] = peak_over(task.ours)
    row.peak_bytes["one forward per cell"] = peak_over(lambda: task.one_by_one(groups[0]))
    options = {"answers": list(task.answers)}
    if with_peer:
        theirs = bench.peer_values(
            row, "small", kind, task.ids, ["transformerlens"], options={**options, "cells": cells}
        )
        same(
            row,
            f"TransformerLens and one forward per cell, {len(cells)} cells",
            relative(theirs["TransformerLens"]["metric"], oracle),
        )

    def share(turn: int) -> list[tuple[int, int]]:
        return groups[turn % len(groups)]

    def by_peer(turn: int) -> float:
        cells = share(turn)
        asked = bench.ask(
            "transformerlens", "time", "small", kind, task.ids, repeats=1, options={**options, "cells": cells}
        )
        return asked["seconds"] * len(task.cells) / len(cells)

    def one_by_one(turn: int) -> float:
        cells = share(turn)
        return timed(lambda: task.one_by_one(cells)) * len(task.cells) / len(cells)

    subjects: dict[str, Subject] = {"cutaway": lambda turn: timed(task.ours), "one forward per cell": one_by_one}
    if with_peer:
        subjects["TransformerLens"] = by_peer
    first = length == 16
    claims = [
        Claim("one forward per cell / cutaway", "one forward per cell", "cutaway", ">=" if first else "", 5.0),
        Claim("TransformerLens / cutaway", "TransformerLens", "cutaway", ">=", 8.0),
        Claim("TransformerLens / one forward per cell", "TransformerLens", "one forward per cell", ""),
    ]
    bench.measure(row, subjects, pairs, claims)
    row.notes.append(
        f"{len(task.cells)} cells; the slow subjects run {per_turn} of them a turn, other ones each turn, scaled up; "
        "theirs without the clean run, ours with it"
    )
    flops = swept.flops
    found = next(one.value for one in row.verdicts if one.text == "one forward per cell / cutaway")
    rate, seconds = bench.models.matmul_rate(), median(row.seconds["cutaway"])
    row.notes.append(
        f"arithmetic alone allows {flops.bound:.2f} times (needed {flops.needed / 1e9:.0f}, done "
        f"{flops.run / 1e9:.0f}, one forward per cell {flops.plain / 1e9:.0f} GFLOP): {found / flops.bound:.0%} of "
        f"that bound; and {flops.needed / seconds / rate:.0%} of what this machine's matrix products allow "
        f"({rate / 1e9:.0f} GFLOP/s)"
    )
    row.notes += swept.notes
    return row


def pattern(bench: Bench) -> Row:
    lm = bench.lm("long")
    ids = tokens(lm, 1, 2048)
    site = "blocks.4.attn.pattern"
    row = Row("pattern", f"one layer's attention pattern; {bench.models.describe('long')}, batch 1 × 2048 tokens")
    run = lm.run(ids, capture=site)
    assert run.logits is not None
    same(row, "cutaway's logits and SDPA's", relative(run.logits, plain(lm, ids)))
    for peer, made in bench.peer_values(row, "long", "pattern", ids, ["transformerlens"], options={"layer": 4}).items():
        same(row, f"{peer}'s pattern and cutaway's", relative(made["pattern"], run[site]))
    del run
    row.peak_bytes["HF with SDPA"] = peak_over(lambda: plain(lm, ids))
    row.peak_bytes["cutaway"] = peak_over(lambda: lm.run(ids, capture=site))
    subjects: dict[str, Subject] = {
        "HF with SDPA": lambda turn: timed(lambda: plain(lm, ids)),
        "cutaway": lambda turn: timed(lambda: lm.run(ids, capture=site)),
    }
    if "transformerlens" in bench.peers:
        subjects["TransformerLens"] = lambda turn: bench.ask(
            "transformerlens", "time", "long", "pattern", ids, repeats=1, options={"layer": 4}
        )["seconds"]
    claims = [
        Claim("cutaway / HF with SDPA", "cutaway", "HF with SDPA", "<=", 1.6),
        Claim("TransformerLens / HF with SDPA", "TransformerLens", "HF with SDPA", ""),
    ]
    bench.measure(row, subjects, 30, claims)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three pairs a row, to see that everything runs")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"some rows: {', '.join(ROWS)}")
    parser.add_argument("--without-peers", action="store_true", help="do not ask for the peers")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the larger models; the toy has 1")
    options = parser.parse_args()
    wanted = [row for row in ROWS if not options.only or any(row.startswith(name) for name in options.only)]
    if not wanted:
        parser.error(f"no row is called {', '.join(options.only)}; there are {', '.join(ROWS)}")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        for name in bench.absent:
            print(f"peer absent: {name} (make parity builds it)", flush=True)
        rows = []
        for name in wanted:
            threads, make = ROWS[name]
            torch.set_num_threads(threads or options.threads)
            began = time.perf_counter()
            try:
                row = make(bench)
            except Exception as error:  # the other rows are still worth having; this one counts as missed
                row = Row(name, "failed")
                row.verdicts.append(Verdict(f"{type(error).__name__}: {error}", float("nan"), 0, 0, 1, "", False))
            row.notes.append(f"{torch.get_num_threads()} threads, {time.perf_counter() - began:.0f} s")
            rows.append(row)
            print(f"\n{row}", flush=True)
        for peer in bench.peers.values():
            peer.close()
    report(rows, bench, time.perf_counter() - start)
    missed = any(one.met is False for row in rows for one in row.verdicts)
    return 1 if missed or bench.absent else 0


def report(rows: Sequence[Row], bench: Bench, seconds: float) -> None:
    """The Markdown table and the JSON file."""
    options, absent = bench.options, bench.absent
    peers = ", ".join(f"{name} {number}" for name, number in bench.versions.items()) or "no peer"
    head = (
        f"{date.today()}, {processor()}, {os.cpu_count()} cores, {options.threads} threads (the toy 1); Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {version('transformers')}, cutaway "
        f"{version('cutaway')}; {peers}; {seconds / 60:.1f} minutes"
        + (", quick" if options.quick else "")
        + (f"; absent: {', '.join(absent)}" if absent else "")
    )
    print(f"\n{head}\n\n| row | what | found [95 %] | target | |\n|---|---|---|---|---|")
    for row in rows:
        for one in row.verdicts:
            said = {True: "met", False: "**not met**", None: ""}[one.met]
            print(f"| {row.name} | {one.text} | {one.figure} | {one.target} | {said} |")
    path = ROOT / "runs" / "bench" / "model_access.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"about": head, "rows": [row.to_json() for row in rows]})
    print(f"\nwritten to {path.relative_to(ROOT)}; memory at the end {resident('VmRSS') / 2**20:.0f} MiB")


def processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


ROWS: dict[str, tuple[int, Callable[[Bench], Row]]] = {
    "run-toy": (1, lambda bench: forward(bench, "run-toy", "toy", 1, 16, 20, 1.05)),
    "run-small": (0, lambda bench: forward(bench, "run-small", "small", 4, 128, 1, 1.01)),
    "captures": (1, captures),
    "heads-16": (0, lambda bench: sweep(bench, "heads-16", "heads", 16, 1, 24, 30)),
    "heads-64": (0, lambda bench: sweep(bench, "heads-64", "heads", 64, 2, 12, 6)),
    "heads-256": (0, lambda bench: sweep(bench, "heads-256", "heads", 256, 4, 6, 4)),
    "positions-16": (0, lambda bench: sweep(bench, "positions-16", "positions", 16, 1, 16, 30)),
    "positions-64": (0, lambda bench: sweep(bench, "positions-64", "positions", 64, 8, 12, 6)),
    "pattern": (0, pattern),
    "harvest": (0, harvesting.speed),  # last: from here on this process keeps the memory that it frees
    "harvest-memory": (1, harvesting.flat),
}


if __name__ == "__main__":
    sys.exit(main())
