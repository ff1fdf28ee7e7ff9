"""How much of a bare forward's speed a harvest keeps: pairs of the same batches, one after the other.

    python benchmarks/harvest.py [PAIRS]

The bare forward is the Hugging Face model's own, cut by an exception behind the same layer, on the same rows; the
harvest does all of its work, up to shards on a disk. Prints the median of bare / harvest over the pairs with its
quartiles: of the time that passed, and of the processor's time, which other programs on the machine do not disturb.
"""

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from cutaway.data.harvesting.harvest import harvest
from cutaway.data.harvesting.settings import Rules
from cutaway.model.language_model import LanguageModel, attach


class _Cut(Exception):
    pass


def gpt2_small() -> LanguageModel:
    """A random model of GPT-2 small's shape."""
    torch.manual_seed(0)
    return attach(GPT2LMHeadModel(GPT2Config()).eval(), name="gpt2-small-random")


Seconds = tuple[float, float]
"""On the clock, and of the processor, all threads together."""


def _now() -> Seconds:
    return time.perf_counter(), time.process_time()


def _since(begun: Seconds) -> Seconds:
    now = _now()
    return now[0] - begun[0], now[1] - begun[1]


def bare(lm: LanguageModel, rows: Tensor, layer: int, batch_rows: int) -> Seconds:
    """Seconds of the model's own forward up to and with `layer`, batch by batch."""

    def cut(*_: object) -> None:
        raise _Cut

    handle = lm.family.layers[layer].module.register_forward_hook(cut)
    try:
        begun = _now()
        with torch.no_grad():
            for part in rows.split(batch_rows):
                try:
                    lm.hf(input_ids=part, use_cache=False)
                except _Cut:
                    continue
        return _since(begun)
    finally:
        handle.remove()


def harvesting(lm: LanguageModel, rows: Tensor, layer: int, batch_rows: int, folder: Path) -> Seconds:
    """Seconds of a harvest of that layer's output into a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    begun = _now()
    harvest(
        lm,
        rows,
        f"blocks.{layer}.resid_post",
        out=folder,
        batch_rows=batch_rows,
        rules=Rules(bos="keep", first_position="keep"),
    )
    return _since(begun)


def ratios(
    lm: LanguageModel, *, pairs: int, layer: int = 5, batch_rows: int = 8, context: int = 128, batches: int = 3
) -> list[Seconds]:
    """bare / harvest in both kinds of seconds, once a pair; which of the two goes first alternates."""
    rows = torch.randint(0, lm.d_vocab, (batches * batch_rows, context), generator=torch.Generator().manual_seed(0))
    lm.identity()  # the hash of the weights, once for a model and not for each harvest
    found = []
    with tempfile.TemporaryDirectory() as place:
        for pair in range(-1, pairs):  # the first warms up
            if pair % 2:
                slow = harvesting(lm, rows, layer, batch_rows, Path(place) / "a")
                fast = bare(lm, rows, layer, batch_rows)
            else:
                fast = bare(lm, rows, layer, batch_rows)
                slow = harvesting(lm, rows, layer, batch_rows, Path(place) / "a")
            if pair >= 0:
                found.append((fast[0] / slow[0], fast[1] / slow[1]))
    return found


if __name__ == "__main__":
    values = ratios(gpt2_small(), pairs=int(sys.argv[1]) if len(sys.argv) > 1 else 30)
    for kind, numbers in zip(("on the clock", "of the processor's time"), zip(*values, strict=True), strict=True):
        low, median, high = statistics.quantiles(numbers, n=4)
        print(f"bare / harvest {median:.3f} {kind} (quartiles {low:.3f} to {high:.3f}, {len(numbers)} pairs)")
