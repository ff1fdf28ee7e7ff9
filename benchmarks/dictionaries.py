"""Training steps of a TopK dictionary a second: ours, a plain dense one, and SAELens', on the same activations.

    python benchmarks/dictionaries.py                     # every setting, three paired runs
    python benchmarks/dictionaries.py --settings 256,4096,32,512 --runs 5 --steps 60

SAELens runs in its own environment (`make parity` builds it) and is left out where that is absent. Each run is a fresh
process that takes the same batches in the same order; runs alternate, so that a busy moment hits all alike, and the
ratio is the median over the pairs. Variance explained is on activations held out. Results go to
runs/bench/dictionaries.json as well.
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ("256,4096,32,512", "768,4096,25,1024", "768,16384,32,2048")
RATE = 1e-3
METHODS = {
    "sparse step, bfloat16 candidates": ("low_precision", "cutaway"),
    "sparse step": ("sparse", "cutaway"),
    "dense autograd step": ("dense", "cutaway"),
    "SAELens 6.54": ("saelens", "saelens"),
}


def activations(d: int, n: int, seed: int):
    """Sums of about 12 of 4·d random directions, scaled so that the mean length is √d: [n, d]."""
    import torch

    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(4 * d, d, generator=generator), dim=1)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(0, 4 * d, (n, 12), generator=generator)
    strength = torch.rand(n, 12, generator=generator) + 0.5
    x = torch.nn.functional.embedding_bag(chosen, directions, per_sample_weights=strength, mode="sum")
    x += 0.02 * torch.randn(n, d, generator=generator)
    return x * d**0.5 / x.norm(dim=1).mean()


def worker(method: str, setting: str, steps: int) -> dict[str, float]:
    """Run the steps in this process: seconds (the first five not counted), variance explained, peak memory."""
    import torch

    d, n_latents, k, batch = map(int, setting.split(","))
    x, held = activations(d, steps * batch, 1), activations(d, 2048, 2)
    make = {"saelens": saelens, "dense": dense, "sparse": sparse, "low_precision": sparse}
    step, reconstruct = make[method](method, n_latents, k, batch, steps, x[:batch])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    for number, part in enumerate(x.split(batch)):
        if number == 5:
            start = time.perf_counter()
        step(part)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.no_grad():
        error = (held - reconstruct(held)).square().sum()
    return {
        "tokens_per_second": (steps - 5) * batch / seconds,
        "variance_explained": 1 - (error / (held - held.mean(0)).square().sum()).item(),
        "memory_mb": (peak - before) / 1024,
    }


def sparse(method: str, n_latents: int, k: int, batch: int, steps: int, first) -> tuple[Callable, Callable]:
    from cutaway.data.hardware import keep_freed_memory
    from cutaway.dictionaries.train import TrainConfig, Trainer

    keep_freed_memory()
    trainer = Trainer(_config(TrainConfig, n_latents, k, batch, steps, low_precision=method == "low_precision"), first)
    return trainer.step, lambda x: trainer.dictionary("site", {}, {})(x)


def dense(method: str, n_latents: int, k: int, batch: int, steps: int, first) -> tuple[Callable, Callable]:
    """The same step with the dense loss of the tests, autograd, and Adam as PyTorch picks it by default."""
    import torch

    from cutaway.data.hardware import keep_freed_memory
    from cutaway.dictionaries.step import Parameters
    from cutaway.dictionaries.train import TrainConfig, Trainer

    keep_freed_memory()
    place = ROOT / "tests" / "dictionaries" / "dense_oracle.py"
    spec = importlib.util.spec_from_file_location("dense_oracle", place)
    assert spec is not None
    assert spec.loader is not None
    oracle = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(oracle)
    trainer = Trainer(_config(TrainConfig, n_latents, k, batch, steps), first)
    leaves = {name: tensor.requires_grad_() for name, tensor in trainer.parameters.tensors().items()}
    adam = torch.optim.Adam(leaves.values(), lr=RATE)

    def step(x) -> None:
        reconstruction, auxiliary = oracle.dense_loss(Parameters(**leaves), x * trainer.scale, k)
        adam.zero_grad()
        (reconstruction + auxiliary).backward()
        decoder = leaves["decoder"]
        with torch.no_grad():
            assert decoder.grad is not None
            decoder.grad -= (decoder.grad * decoder).sum(1, keepdim=True) * decoder
            adam.step()
            decoder /= decoder.norm(dim=1, keepdim=True)

    return step, lambda x: trainer.dictionary("site", {}, {})(x)


def _config(kind, n_latents: int, k: int, batch: int, steps: int, **more):
    return kind(
        d_sae=n_latents, k=k, tokens=steps * batch, batch=batch, learning_rate=RATE, warmup=0, decay=0.0, **more
    )


def saelens(method: str, n_latents: int, k: int, batch: int, steps: int, first) -> tuple[Callable, Callable]:
    """SAELens' own trainer step, in its environment, with its defaults but for the learning rate."""
    from sae_lens.config import SAETrainerConfig  # pyright: ignore[reportMissingImports]
    from sae_lens.saes.topk_sae import (  # pyright: ignore[reportMissingImports]
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )
    from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore[reportMissingImports]

    cfg = TopKTrainingSAEConfig(d_in=first.shape[1], d_sae=n_latents, k=k)
    sae = TopKTrainingSAE(cfg)
    sae.b_dec.data = first.mean(0)
    options = SAETrainerConfig(
        total_training_samples=steps * batch, train_batch_size_samples=batch, lr=RATE, lr_end=RATE
    )
    trainer = SAETrainer(options, sae, data_provider=iter(()))

    def step(x) -> None:
        trainer._train_step(sae=sae, sae_in=x)
        trainer.n_training_steps += 1

    return step, sae


def run(method: str, environment: str, setting: str, steps: int) -> dict[str, float]:
    python = Path(sys.executable) if environment == "cutaway" else ROOT / ".venvs" / environment / "bin" / "python"
    command = [python, __file__, "--worker", method, "--settings", setting, "--steps", str(steps)]
    environ = {"OMP_WAIT_POLICY": "passive", **os.environ}  # as the command line does, for all alike
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    if done.returncode:
        raise SystemExit(f"{method} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=SETTINGS, metavar="D,F,K,BATCH")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(options.worker, options.settings[0], options.steps)))
        return
    methods = {
        name: how
        for name, how in METHODS.items()
        if how[1] == "cutaway" or (ROOT / ".venvs" / how[1] / "bin" / "python").exists()
    }
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {options.runs} runs", flush=True)
    results = []
    for setting in options.settings:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
        for _ in range(options.runs):
            for name, (method, environment) in methods.items():
                found[name].append(run(method, environment, setting, options.steps))
        d, n_latents, k, batch = setting.split(",")
        print(f"\nd = {d}, {n_latents} latents, k = {k}, batch {batch}, {options.steps} steps")
        print(f"{'':34}{'tokens/s':>10}{'ratio':>8}{'variance':>10}{'MB':>7}")
        for name, runs in found.items():
            speeds = [one["tokens_per_second"] for one in runs]
            base = [one["tokens_per_second"] for one in found["dense autograd step"]]
            row = {
                "setting": setting,
                "method": name,
                "tokens_per_second": median(speeds),
                "ratio_to_dense": median(a / b for a, b in zip(speeds, base, strict=True)),
                "variance_explained": median(one["variance_explained"] for one in runs),
                "memory_mb": median(one["memory_mb"] for one in runs),
            }
            results.append(row)
            print(
                f"{name:34}{row['tokens_per_second']:10,.0f}{row['ratio_to_dense']:8.2f}"
                f"{row['variance_explained']:10.4f}{row['memory_mb']:7,.0f}",
                flush=True,
            )
    target = ROOT / "runs" / "bench" / "dictionaries.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
