"""Harvests in processes of their own, killed at random moments or sharing the work; run by test_killed.py.

    python killed.py FOLDER SEED

Writes FOLDER/whole by an uninterrupted harvest, FOLDER/killed by one that is killed again and again, and FOLDER/shared
by two processes of which one is killed. Prints what happened as JSON.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cutaway.data.harvesting.harvest import harvest
from cutaway.data.harvesting.settings import Rules, Storage
from cutaway.model.language_model import LanguageModel, attach

SITES = ["blocks.1.resid_post", "blocks.0.attn.z"]


def tiny_model() -> LanguageModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    return attach(LlamaForCausalLM(config).eval(), name="tiny")


def start(call: Any, **environment: str) -> int:
    """Begin `call` in a forked process, which inherits what was imported."""
    if child := os.fork():
        return child
    code = 1
    try:
        os.environ.update(environment)
        call()
        code = 0
    finally:
        os._exit(code)


def main(folder: Path, seed: int) -> None:
    torch.set_num_threads(1)
    lm = tiny_model()
    rows = torch.randint(2, 61, (600, 12), generator=torch.Generator().manual_seed(1))
    rows[:, 0] = 0

    def run(name: str) -> None:
        harvest(
            lm,
            rows,
            SITES,
            out=folder / name,
            batch_rows=8,
            storage=Storage(shard_tokens=250),
            rules=Rules(high_norm=1.5),
        )

    begun = time.monotonic()
    assert os.waitpid(start(lambda: run("whole")), 0)[1] == 0
    seconds = time.monotonic() - begun
    chance = random.Random(seed)

    kills, left_over, before, patience = 0, 0, 0, 1.0
    while True:
        child = start(lambda: run("killed"))
        time.sleep(seconds * (0.05 + 0.2 * chance.random()) * patience)
        os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1] == 0:  # it had ended before
            break
        kills += 1
        left_over += len(list((folder / "killed").glob(".*.tmp")))
        done = len(list((folder / "killed").glob("shard-*")))
        # opening a harvest may take longer than the time it was given; then the next one gets more
        patience, before = (1.0 if done > before else 1.3 * patience), done
        if (folder / "killed" / "manifest.json").exists():
            break

    first = start(lambda: run("shared"), RANK="0", WORLD_SIZE="2")
    second = start(lambda: run("shared"), RANK="1", WORLD_SIZE="2")
    time.sleep(seconds * 0.3)
    os.kill(second, signal.SIGKILL)
    os.waitpid(second, 0)
    time.sleep(seconds)
    waiting = os.waitpid(first, os.WNOHANG)[0] == 0  # for the shards that the other owes
    second = start(lambda: run("shared"), RANK="1", WORLD_SIZE="2")
    codes = [os.waitpid(second, 0)[1], os.waitpid(first, 0)[1] if waiting else None]
    print(json.dumps({"kills": kills, "left over": left_over, "waiting": waiting, "codes": codes, "seconds": seconds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
