"""Which trained dictionaries find 1,024 known features in 128 dimensions? Ours, preset by preset, and SAELens'.

    python benchmarks/recovery.py                 # every method, L0 6 and 12, three seeds, 10 M samples
    python benchmarks/recovery.py --samples 2000000 --seeds 0 --l0 6 --methods "TopK" "SAELens matryoshka"

The world: 128 trees, Zipf 0.5 with p ≤ 0.4, mutually exclusive children, 25 correlated factors, magnitudes 5 → 4
(`cutaway.subjects.superposition.generator`); width 1,024. Every method sees the same samples, batch by batch, and is
judged on the same held-out ones by the same function, beside random directions and one logistic regression a feature.
Each run is a process of its own; SAELens' run in its environment (`make parity` builds it), where the generator and the
scores are imported from this checkout. Rows are appended to runs/bench/recovery.jsonl as they come, and a row that is
there is not measured again.
"""

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))  # SAELens' environment has no cutaway

WIDTH, BATCH = 1024, 1024
RESULTS = ROOT / "runs" / "bench" / "recovery.jsonl"
LEVELS = (32, 96, 224, 480, 1024)  # SAELens' matryoshka: the shares of our preset

# what sets the sparsity: k and l0 hold the asked L0; a coefficient is searched on runs half as long
OURS: dict[str, dict[str, Any]] = {
    "TopK": {"default": "topk"},
    "BatchTopK": {"default": "batchtopk"},
    "openai-topk": {"by": "k"},
    "batchtopk": {"by": "k"},
    "matryoshka": {"by": "k"},
    "sparsify": {"by": "k"},
    "gemma-scope-1": {"by": "l0"},
    "anthropic-2025": {"by": "l0"},
    "anthropic-2023": {"by": "sparsity"},
    "anthropic-2024": {"by": "sparsity"},
    "gated-2024": {"by": "sparsity"},
    "saprmarks": {"by": "sparsity"},
}
SAELENS = ("SAELens topk", "SAELens batchtopk", "SAELens matryoshka")


def generator_for(l0: int, seed: int):
    from cutaway.subjects.superposition.generator import FeatureGenerator, FeatureWorld

    return FeatureGenerator(
        FeatureWorld(
            1024, 128, l0=l0, exponent=0.5, p_max=0.4, trees=128, branching=4, depth=3, exclusive=True,
            factors=25, correlation=0.3, magnitude=(5, 4), spread=0.5, orthogonal_steps=100, seed=seed,
        )
    )  # fmt: skip


def fingerprint(generator: Any) -> str:
    """A hash of one batch: that two environments draw the same samples."""
    made = generator.batch(3, 64)
    return hashlib.sha256(made.features.numpy().tobytes() + made.x.mul(1e3).round().numpy().tobytes()).hexdigest()[:16]


def work(method: str, l0: int, seed: int, samples: int, rate: float | None) -> dict[str, Any]:
    """Train and judge one method in this process."""
    generator = generator_for(l0, seed)
    about: dict[str, Any] = {}
    if method == "linear probes":
        from cutaway.subjects.superposition.ceiling import linear_ceiling

        start = time.perf_counter()
        scores = linear_ceiling(generator, steps=max(1, min(samples // BATCH, 4000)), batch=BATCH).to_json()
        return {"scores": scores, "seconds": time.perf_counter() - start, "samples_hash": fingerprint(generator)}
    from cutaway.subjects.superposition.scores import random_code, score_dictionary

    if method == "random directions":
        directions, code = random_code(WIDTH, l0, generator, seed + 1)
    elif method in SAELENS:
        directions, code, about = saelens(method, generator, l0, seed, samples, rate or 3e-4)
    else:
        directions, code, about = ours(method, generator, l0, seed, samples, rate)
    scores = score_dictionary(directions, code, generator).to_json()
    return {"scores": scores, "seconds": 0.0, "samples_hash": fingerprint(generator), **about}


def ours(method: str, generator: Any, l0: int, seed: int, samples: int, rate: float | None):
    from dataclasses import replace

    from cutaway.data.harvesting.hardware import keep_freed_memory
    from cutaway.dictionaries.evaluation.recovery import SITE, Made, code_of
    from cutaway.dictionaries.training.config import TrainConfig
    from cutaway.dictionaries.training.jobs import Job, train_jobs
    from cutaway.dictionaries.training.rules import BatchTopKRule, TopKRule

    keep_freed_memory()
    how = OURS[method]

    def config(tokens: int, sparsity: float | None = None) -> TrainConfig:
        common: dict[str, Any] = {"d_sae": WIDTH, "tokens": tokens, "batch": BATCH, "seed": seed}
        if "default" in how:
            rule = TopKRule(l0) if how["default"] == "topk" else BatchTopKRule(l0)
            made = TrainConfig(selector=rule, **common)
        else:
            from cutaway.dictionaries.training.presets import preset

            value = {"k": l0, "l0": float(l0), "sparsity": sparsity}[how["by"]]
            made = preset(method, d_in=128, **common, **{how["by"]: value})
        return made if rate is None else replace(made, learning_rate=rate)

    def trained(chosen: TrainConfig):
        return train_jobs(Made(generator), {"": Job(chosen, (SITE,))}, label=method)[""].dictionary

    sparsity = None
    if how.get("by") == "sparsity":
        sparsity = coefficient_for(l0, lambda value: active(trained(config(samples // 2, value)), generator))
    start = time.perf_counter()
    dictionary = trained(config(samples, sparsity))
    about = {"seconds": time.perf_counter() - start, "coefficient": sparsity}
    return dictionary.W_dec, code_of(dictionary), about


def active(dictionary: Any, generator: Any) -> float:
    """Latents active on a token, on samples of no training."""
    from cutaway.subjects.superposition.scores import HELD_OUT

    return (dictionary.encode(generator.batch(HELD_OUT - 2, 4096).x) != 0).float().sum(1).mean().item()


def coefficient_for(l0: float, measure: Callable[[float], float], tries: int = 6) -> float:
    """The coefficient at which a run has the wanted L0: bisection of its logarithm, from 0.003 to 30."""
    low, high = 0.003, 30.0
    for _ in range(tries):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if measure(middle) > l0 else (low, middle)
    return (low * high) ** 0.5


def saelens(method: str, generator: Any, l0: int, seed: int, samples: int, rate: float):
    """SAELens' own trainer with its defaults but for the rate, and its decay over the last third."""
    import torch
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]
    from sae_lens.config import LoggingConfig, SAETrainerConfig  # pyright: ignore[reportMissingImports]
    from sae_lens.saes import batchtopk_sae, matryoshka_batchtopk_sae, topk_sae  # pyright: ignore[reportMissingImports]
    from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore[reportMissingImports]

    torch.manual_seed(seed)
    common = {"d_in": 128, "d_sae": WIDTH, "k": l0}
    if method == "SAELens topk":
        sae = topk_sae.TopKTrainingSAE(topk_sae.TopKTrainingSAEConfig(**common))
    elif method == "SAELens batchtopk":
        sae = batchtopk_sae.BatchTopKTrainingSAE(batchtopk_sae.BatchTopKTrainingSAEConfig(**common))
    else:
        matryoshka = matryoshka_batchtopk_sae
        options = matryoshka.MatryoshkaBatchTopKTrainingSAEConfig(**common, matryoshka_widths=list(LEVELS))
        sae = matryoshka.MatryoshkaBatchTopKTrainingSAE(options)
    steps = samples // BATCH
    options = SAETrainerConfig(
        total_training_samples=steps * BATCH,
        train_batch_size_samples=BATCH,
        lr=rate,
        lr_end=rate / 10,
        lr_decay_steps=steps // 3,
        logger=LoggingConfig(log_to_wandb=False, eval_every_n_wandb_logs=2**31 - 1),
        n_batches_for_norm_estimate=1,
    )

    start = time.perf_counter()
    SAETrainer(options, sae, data_provider=generator.batches(BATCH)).fit()
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        finished = SAE.load_from_disk(folder)

    def code(x: Any) -> tuple[Any, Any]:
        latents = finished.encode(x)
        return latents, finished.decode(latents)

    return finished.W_dec.detach(), code, {"seconds": seconds}


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("method", "l0", "seed", "samples", "rate"))


def measured() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def run(method: str, l0: int, seed: int, samples: int, rate: float | None) -> dict[str, Any]:
    """One run in a process of its own."""
    python = ROOT / ".venvs" / "saelens" / "bin" / "python" if method in SAELENS else Path(sys.executable)
    asked = json.dumps({"method": method, "l0": l0, "seed": seed, "samples": samples, "rate": rate})
    environ = {"OMP_WAIT_POLICY": "passive", **os.environ, "CUTAWAY_QUIET": "1"}
    done = subprocess.run(
        [python, __file__, "--worker", asked], capture_output=True, text=True, check=False, env=environ
    )
    if done.returncode:
        raise SystemExit(f"{method} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]], l0: int, samples: int) -> str:
    """Means over seeds, with the lowest and highest F1."""
    chosen = [row for row in rows if row["l0"] == l0 and row["samples"] == samples]
    names = list(dict.fromkeys((row["method"], row["rate"]) for row in chosen))
    lines = [
        f"L0 {l0}, {samples:,} samples",
        f"{'':36}{'seeds':>6}{'F1 [min, max]':>24}{'MCC ±':>8}{'found':>7}",
    ]
    lines[-1] += f"{'prec.':>8}{'recall':>8}{'var.':>8}{'dead':>7}{'L0':>7}{'s':>7}"
    for name, rate in names:
        some = [row for row in chosen if (row["method"], row["rate"]) == (name, rate)]
        scores = [row["scores"] for row in some]
        f1 = [one["f1"] for one in scores]
        cells = f"{len(some):6d}{mean(f1):10.3f} [{min(f1):.3f}, {max(f1):.3f}]"
        if "mcc_signed" in scores[0]:
            values = {field: mean(one[field] for one in scores) for field in scores[0] if field != "f1_interval"}
            cells += f"{values['mcc_signed']:8.3f}{values['recovered']:7.0f}{values['precision']:8.3f}"
            cells += f"{values['recall']:8.3f}{values['explained']:8.3f}{values['dead']:7.3f}{values['l0']:7.2f}"
        else:
            cells += (
                f"{'':15}{mean(one['precision'] for one in scores):8.3f}{mean(one['recall'] for one in scores):8.3f}"
            )
            cells += " " * 22
        label = name if rate is None else f"{name}, rate {rate:g}"
        lines.append(f"{label:36}{cells}{mean(row['seconds'] for row in some):7.0f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ["random directions", "linear probes", *OURS, *SAELENS]
    parser.add_argument("--methods", nargs="+", default=every, choices=every)
    parser.add_argument("--l0", nargs="+", type=int, default=[6, 12])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument(
        "--rates", nargs="+", type=float, default=[None], help="learning rates; each method's own if not given"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        asked = json.loads(options.worker)
        print(json.dumps({**asked, **work(**asked)}))
        return
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    there = {key(row) for row in measured()}
    for seed, l0, method, rate in itertools.product(options.seeds, options.l0, options.methods, options.rates):
        asked = {"method": method, "l0": l0, "seed": seed, "samples": options.samples, "rate": rate}
        if key(asked) in there:
            continue
        if method in SAELENS and not (ROOT / ".venvs" / "saelens" / "bin" / "python").exists():
            print(f"{method}: its environment is not built (make parity)", file=sys.stderr)
            continue
        row = run(**asked)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"seed {seed}, L0 {l0}, {method}: F1 {row['scores']['f1']:.3f}, {row['seconds']:.0f} s", flush=True)
    rows = measured()
    hashes: dict[tuple[int, int], set[str]] = {}
    for row in rows:
        hashes.setdefault((row["l0"], row["seed"]), set()).add(row["samples_hash"])
    assert all(len(found) == 1 for found in hashes.values()), "methods saw different samples"
    for l0 in options.l0:
        print("\n" + table(rows, l0, options.samples))


if __name__ == "__main__":
    main()
