"""Eight kinds of dictionaries trained on one live model, killed at random moments; run by test_killed_training.py.

    python killed_training.py FOLDER SEED

Writes FOLDER/whole by an undisturbed run and FOLDER/killed by one that is killed again and again. Prints what happened
as JSON.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from cutaway.dictionaries.training import api
from cutaway.dictionaries.training.recipe import Recipe
from cutaway.model.language_model import LanguageModel, attach

STEPS, BATCH, KILLS = 60, 64, 3
STREAM, OTHER = "blocks.1.resid_post", "blocks.0.attn.z"


def tiny_model() -> LanguageModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    return attach(LlamaForCausalLM(config).eval(), name="tiny")


def of(preset: str, reads: Any, writes: Any = (), **options: Any) -> dict[str, Any]:
    from cutaway.dictionaries.training.presets import preset as make

    width = 32 * (len(reads) if isinstance(reads, list) else 1)
    given = {"d_sae": 64, "tokens": STEPS * BATCH, "batch": BATCH, "dead_after": 400, "calibrate": 512, "sample": 128}
    config = make(preset, d_in=width, **{**given, **options}).to_json()
    return {"reads": reads, "writes": writes, "config": config}


def training() -> api.Training:
    mlp = ("blocks.2.mlp.in", "blocks.2.mlp.out")
    dictionaries = {
        "topk": of("openai-topk", STREAM, k=2, d_sae=256, dead_after=200),
        "batchtopk": of("batchtopk", STREAM, k=4, tokens=(STEPS - 20) * BATCH),  # it ends before the others
        "matryoshka": of("matryoshka", OTHER, k=4),
        "jumprelu": of("gemma-scope-1", STREAM, seed=1),
        "tanh": of("anthropic-2025", OTHER),
        "gated": of("gated-2024", STREAM),
        "resampling": of("anthropic-2023", STREAM, sparsity=20.0),
        "transcoder": of("skip-transcoder", *mlp, k=4),
        "crosscoder": of("crosscoder-2024", [STREAM, OTHER]),
    }
    recipe = Recipe.of(
        {"dictionaries": dictionaries, "high_norm": 1.6, "passes": 2, "buffer_tokens": 500, "context": 12}
    )
    rows = torch.randint(2, 61, (130, 12), generator=torch.Generator().manual_seed(1))
    rows[:, 0] = 0
    return api.prepare(recipe, tiny_model(), rows)


def start(call: Callable[[], object]) -> int:
    """Begin `call` in a forked process, which inherits what was imported."""
    if child := os.fork():
        return child
    code = 1
    try:
        call()
        code = 0
    finally:
        os._exit(code)


def steps_done(folder: Path) -> int:
    """Steps of all checkpoints together."""
    total = 0
    for path in folder.glob("checkpoints/*/trainer.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += int((file.metadata() or {})["steps_done"])
    return total


def main(folder: Path, seed: int) -> None:
    torch.set_num_threads(1)
    made = training()

    def run(name: str, checkpoints: float, pause: float) -> None:
        batches = made.source.batches

        def slowly(size: int, start: int = 0) -> Iterator[Mapping[str, Tensor]]:
            for batch in batches(size, start):
                time.sleep(pause)
                yield batch

        made.source.batches = slowly  # type: ignore[method-assign]
        api.run(made, folder / name, seconds_between_checkpoints=checkpoints)

    def killed() -> None:  # so slowly that there is time to kill it, on a quick machine too
        run("killed", 0.15, 0.04)

    begun = time.monotonic()
    assert os.waitpid(start(lambda: run("whole", 1e9, 0.0)), 0)[1] == 0
    seconds = time.monotonic() - begun
    chance = random.Random(seed)
    stops: list[int] = []
    patience = 1.0
    while len([stop for stop in stops if stop]) < KILLS:
        child = start(killed)
        time.sleep((0.4 + 0.7 * chance.random()) * patience)
        os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1] == 0:  # it had ended before
            break
        if not (folder / "killed" / "checkpoints").exists() and (folder / "killed" / "manifest.json").exists():
            break
        done = steps_done(folder / "killed")
        # with other work beside it a run may not get to its first step; then the next one gets more time
        patience = 1.0 if not stops or done > stops[-1] else 1.4 * patience
        stops.append(done)
    assert os.waitpid(start(killed), 0)[1] == 0  # finished, whatever the last kill left
    print(json.dumps({"stops": stops, "seconds": seconds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
