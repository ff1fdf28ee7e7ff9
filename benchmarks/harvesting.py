"""Rows of the benchmark about the harvest: its speed beside a bare forward, and its memory over many batches."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from paired import Claim, Row, Subject, judged, relative, same, timed
from peer_worker import resident
from torch import Tensor

from cutaway.data.harvesting.harvest import harvest
from cutaway.data.harvesting.settings import Rules, Storage
from cutaway.data.harvesting.store import Store
from cutaway.model.language_model import LanguageModel

if TYPE_CHECKING:
    from model_access import Bench

LAYER, ROWS, BATCHES, LENGTH = 3, 16, 32, 128  # long enough that opening and closing a store do not count
EVERYTHING = Rules(bos="keep", first_position="keep")


class _Cut(Exception):
    """Ends a forward where it is no longer needed."""


def cut_forward(lm: LanguageModel, ids: Tensor) -> Tensor:
    """What one writes by hand: a forward of transformers that ends after the layer, with its output."""
    kept: list[Tensor] = []

    def end(module: Any, args: Any, out: Tensor) -> None:
        kept.append(out)
        raise _Cut

    handle = lm.hf.model.layers[LAYER].register_forward_hook(end)  # pyright: ignore
    try:
        with torch.no_grad():
            lm.hf(input_ids=ids, use_cache=False)
    except _Cut:
        pass
    finally:
        handle.remove()
    return kept[0]


def speed(bench: Bench) -> Row:
    lm, site = bench.lm("long"), f"blocks.{LAYER}.resid_post"
    rows = torch.randint(2, lm.d_vocab, (ROWS * BATCHES, LENGTH), generator=torch.Generator().manual_seed(0))
    row = Row(
        "harvest",
        f"{rows.numel():,} tokens to the stream after layer {LAYER}, into memory, and into a folder of shards; "
        f"{bench.models.describe('long')}, batches of {ROWS} × {LENGTH} tokens",
    )
    numbers = itertools.count()

    def ours() -> Store:
        folder = bench.models.root / f"harvest-{next(numbers)}"
        return harvest(
            lm, rows, site, out=folder, rules=EVERYTHING, batch_rows=ROWS, storage=Storage(shard_tokens=1 << 13)
        )

    def into_memory() -> Store:
        return harvest(lm, rows, site, rules=EVERYTHING, batch_rows=ROWS)

    def one_after_another() -> None:
        for part in rows.split(ROWS):
            cut_forward(lm, part)

    def and_written() -> None:
        """The forward, and its output appended to one file: what the disk takes of a harvest's time anyhow."""
        file = bench.models.root / "written"
        with file.open("wb", buffering=0) as out:
            for part in rows.split(ROWS):
                out.write(memoryview(cut_forward(lm, part).numpy()).cast("B"))  # pyright: ignore[reportArgumentType]
            os.fsync(out.fileno())
        file.unlink()

    def measured(turn: int) -> float:
        seconds = timed(ours)
        for folder in bench.models.root.glob("harvest-*"):
            shutil.rmtree(folder)
        return seconds

    store = ours()
    expected = torch.cat([cut_forward(lm, part).flatten(0, 1) for part in rows.split(ROWS)])
    same(row, "harvest and the forward cut by hand", relative(store[:][site], expected), 0.0)
    subjects: dict[str, Subject] = {
        "HF, cut at the layer": lambda turn: timed(one_after_another),
        "HF, cut at the layer, and written": lambda turn: timed(and_written),
        "cutaway's harvest into memory": lambda turn: timed(into_memory),
        "cutaway's harvest": measured,
    }
    what = "tokens per second, harvest"
    claims = [
        Claim(f"{what} into memory / HF cut", "HF, cut at the layer", "cutaway's harvest into memory", ">=", 0.95),
        Claim(f"{what} into shards / HF cut", "HF, cut at the layer", "cutaway's harvest", ">=", 0.95),
        Claim(f"{what} into shards / HF cut and written", "HF, cut at the layer, and written", "cutaway's harvest", ""),
    ]
    bench.measure(row, subjects, 30, claims)
    return row


class _Watched:
    """A language model whose every run notes the memory of this process."""

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm
        self.seen: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lm, name)

    @property
    def run(self) -> Callable[..., Any]:
        self.seen.append(resident("VmRSS"))
        return self._lm.run


def flat(bench: Bench) -> Row:
    lm = bench.lm("toy")
    batches = 1000
    watched: Any = _Watched(lm)
    row = Row(
        "harvest-memory", f"resident memory over {batches} batches of 8 × 64 tokens; {bench.models.describe('toy')}"
    )
    rows = torch.randint(2, lm.d_vocab, (8 * batches, 64), generator=torch.Generator().manual_seed(0))
    folder = bench.models.root / "flat"
    sites = ["blocks.3.resid_post", "blocks.5.mlp.out"]
    row.seconds["cutaway's harvest"] = [
        timed(
            lambda: harvest(
                watched, rows, sites, out=folder, batch_rows=8, storage=Storage(shard_tokens=1 << 13), rules=EVERYTHING
            )
        )
    ]
    seen = np.array(watched.seen[-batches:], dtype=float)
    late = seen[len(seen) // 10 :]  # shards in flight fill their buffers first
    slope = float(np.polyfit(np.arange(len(late)), late, 1)[0])
    written = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    row.verdicts.append(
        judged("growth over the last nine tenths / resident", slope * len(late) / late.mean(), "<=", 0.01)
    )
    row.notes.append(
        f"{slope:.0f} bytes a batch; resident {late.min() / 2**20:.0f} to {late.max() / 2**20:.0f} MiB while "
        f"{written / 2**20:.0f} MiB were written"
    )
    shutil.rmtree(folder)
    return row
