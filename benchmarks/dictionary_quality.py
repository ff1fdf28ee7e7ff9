"""Does the sparse step train dictionaries as good as the dense one? Trained to the end, on the same data, by each.

benchmarks/dictionaries.py --quality runs this. For each selector and seed there are four trainings from one start, on
the same batches: dense autograd, our step, the same with bfloat16 candidates, and dense autograd with the rows of each
batch in another order, which changes nothing but rounding. How far the last two end apart is how far apart two
equal methods end.
"""

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dictionary_peers import Request

WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {"fused": True}),
    "sparse": ("cutaway", {}),
    "bfloat16": ("cutaway", {"low_precision": True}),
    "shuffled": ("dense", {"fused": True, "shuffle": True}),
}
BOUND = 0.005  # of the final loss
RATE, DECAY = 3e-3, 0.3  # as the trainer's defaults


@dataclass(frozen=True)
class Plan:
    """What to train: every selector with every seed; `controls` seeds are trained shuffled too.

    No training is begun after `minutes`; what is there is compared, and a later call goes on.
    """

    d_sae: int
    k: int
    batch: int
    steps: int
    seeds: int
    controls: int
    selectors: tuple[str, ...]
    minutes: float


def quality(plan: Plan, data: Path, folder: Path, run: Callable[[str, Request], dict[str, Any]]) -> list[dict]:
    """Train what is not yet there, compare, print the tables; the rows of these.

    Every training is kept as a line of FOLDER/cells.jsonl with its weights beside, and used again by a later call that
    asks for the same: stop and go on at will.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = _kept(folder / "cells.jsonl")
    end = time.monotonic() + 60 * plan.minutes
    table: list[dict] = []
    commits: set[str] = set()
    for selector in plan.selectors:
        rows = []
        for seed in range(plan.seeds):
            cells: dict[str, dict[str, Any]] = {}
            for way in WAYS:
                if way == "shuffled" and seed >= plan.controls:
                    continue
                key = f"{selector}-{way}-{seed}-{plan.d_sae}-{plan.k}-{plan.batch}-{plan.steps}"
                if key not in done:
                    if time.monotonic() > end:
                        print(f"  {key}: not trained yet")
                        continue
                    request = _request(plan, selector, way, seed, data, folder / f"{key}.safetensors")
                    done[key] = {"key": key, "commit": _commit(), **run("cutaway", request)}
                    with (folder / "cells.jsonl").open("a") as lines:
                        lines.write(json.dumps(done[key]) + "\n")
                    speed = done[key]["tokens_per_second"]
                    print(f"  {key}: loss {done[key]['final_loss']:.4f}, {speed:,.0f} tokens/s", flush=True)
                cells[way] = done[key]
                commits.add(done[key]["commit"])
            if "dense" in cells:
                rows += _compared(selector, seed, cells, folder)
        if rows:
            _show(selector, plan, rows)
        table += rows
    if len(commits) > 1:
        print(f"these trainings are of {len(commits)} states of the code: {', '.join(sorted(commits))}")
    return table


def _request(plan: Plan, selector: str, way: str, seed: int, data: Path, save: Path) -> Request:
    method, options = WAYS[way]
    return Request(
        method=method,
        data=str(data),
        d_sae=plan.d_sae,
        k=plan.k,
        batch=plan.batch,
        steps=plan.steps,
        selector=selector,
        learning_rate=RATE,
        seed=seed,
        last=min(20, plan.steps // 2),
        curve=max(1, plan.steps // 50),
        save=str(save),
        options={**options, "decay": DECAY},
    )


def _kept(path: Path) -> dict[str, dict[str, Any]]:
    """The trainings so far by key; one whose weights are gone is trained again, as is a line that was cut short."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            cell = json.loads(line)
        except json.JSONDecodeError:
            continue
        if path.with_name(f"{cell['key']}.safetensors").exists():
            found[cell["key"]] = cell
    return found


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _compared(selector: str, seed: int, cells: dict[str, dict[str, Any]], folder: Path) -> list[dict]:
    """A row for each way: its figures, its loss over the dense one's, and its decoder beside the dense one's."""
    from safetensors.torch import load_file

    from cutaway.dictionaries.evaluation.stability import match_rows

    def decoder(way: str):
        return load_file(folder / f"{cells[way]['key']}.safetensors")["W_dec"]

    rows = []
    for way, cell in cells.items():
        row = {"selector": selector, "seed": seed, "way": way} | {
            name: cell[name] for name in ("final_loss", "l0", "dead", "variance_explained", "tokens_per_second")
        }
        if way != "dense":
            matched = match_rows(decoder("dense"), decoder(way), signed=True, matching="assignment")
            row["ratio"] = cell["final_loss"] / cells["dense"]["final_loss"]
            row["cosine"], row["same"] = matched.mean, matched.share_same
        rows.append(row)
    return rows


def _show(selector: str, plan: Plan, rows: Sequence[dict]) -> None:
    print(f"\n{selector}: 256 → {plan.d_sae:,}, k = {plan.k}, batch {plan.batch:,}, {plan.steps:,} steps; cosines are")
    print("signed, of decoder rows assigned one to one to those of the dense training of the same seed")
    columns = f"{'loss':>10}{'/ dense':>9}{'variance':>10}{'L0':>8}{'dead':>7}{'cosine':>8}{'> 0.7':>7}"
    print(f"{'seed':>4} {'step':<9}{columns}")
    for row in rows:
        beside = f"{row['ratio']:9.4f}" if "ratio" in row else f"{'':9}"
        decoders = f"{row['cosine']:8.3f}{row['same']:7.1%}" if "cosine" in row else ""
        print(
            f"{row['seed']:>4} {row['way']:<9}{row['final_loss']:10.4f}{beside}{row['variance_explained']:10.4f}"
            f"{row['l0']:8.2f}{row['dead']:7.1%}{decoders}"
        )
    for way in ("sparse", "bfloat16", "shuffled"):
        beside = [row for row in rows if row["way"] == way]
        if beside:
            ratios = [row["ratio"] for row in beside]
            within = "within" if all(abs(ratio - 1) <= BOUND for ratio in ratios) else "NOT within"
            loss, cosine = (sum(row[name] for row in beside) / len(beside) for name in ("ratio", "cosine"))
            print(
                f"{way}: loss / dense {loss:.4f} on average, {min(ratios):.4f} to {max(ratios):.4f} over {len(ratios)} "
                f"seed(s), {within} {BOUND:.1%} with every seed; cosine {cosine:.3f} on average"
            )
