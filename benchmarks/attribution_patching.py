"""How well does attribution patching estimate exact patching? AtP, AtP*, RelP and integrated gradients, on real models.

    python benchmarks/attribution_patching.py                                    # atlas
    python benchmarks/attribution_patching.py --models atlas shared/models/webtext-gpt2 --pairs 24

For each model the tasks that it does, and for each kind of node (heads' outputs, queries, keys, values, MLPs, neurons,
the stream position by position): every node, or a random sample of many, is patched exactly, noising, with the logit
difference; correlations are over nodes, of means over the pairs. Those in brackets are of means of the magnitudes of
each pair's change, which is all that AtP* with GradDrop gives. Nodes whose AtP score is 0 in every pair are left out
(in the stream: positions before the prompts differ). Seconds are of one run on this machine.
Prints Markdown tables, and appends rows to runs/bench/attribution_patching.jsonl.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

import cutaway  # noqa: E402
from cutaway.artifacts.errors import CutawayError  # noqa: E402
from cutaway.causal.attribution.atp_star import missed_bound  # noqa: E402
from cutaway.causal.attribution.attribution_patching import GradientOptions, attribution_patching  # noqa: E402
from cutaway.causal.attribution.questions import ask, exact_effects_of_sets  # noqa: E402
from cutaway.causal.attribution.scores import correlation  # noqa: E402
from cutaway.causal.task_results import try_tasks  # noqa: E402
from cutaway.data.pairs import AlignedPairs  # noqa: E402
from cutaway.data.tasks.tasks import TASKS  # noqa: E402
from cutaway.model.language_model import LanguageModel  # noqa: E402
from cutaway.tour.world_tasks import WORLD_TASKS  # noqa: E402

RESULTS = ROOT / "runs" / "bench" / "attribution_patching.jsonl"
NODES = {
    "heads (z)": ("blocks.*.attn.z", "all"),
    "queries": ("blocks.*.attn.q", "all"),
    "keys": ("blocks.*.attn.k", "all"),
    "values": ("blocks.*.attn.v", "all"),
    "MLPs": ("blocks.*.mlp.out", "all"),
    "neurons": ("blocks.*.mlp.post", "all"),
    "stream, by position": ("blocks.*.resid_pre", "each"),
}
LEAST = 8  # nodes, below which a correlation says nothing
METHODS: dict[str, dict[str, Any]] = {
    "AtP": {"method": "atp"},
    "AtP*, no GradDrop": {"method": "atp*", "options": GradientOptions(grad_drop=False)},
    "AtP*": {"method": "atp*"},
    "RelP": {"method": "relp"},
    "RelP, pattern held": {"method": "relp", "attention": "detach"},
    "IG inputs": {"method": "ig-inputs", "options": GradientOptions(10)},
    "IG": {"method": "ig", "options": GradientOptions(10)},
}


def spearman(a: Tensor, b: Tensor) -> float:
    from scipy.stats import rankdata

    return correlation(*(torch.from_numpy(rankdata(x.double().numpy())) for x in (a, b)))


def one_length(pairs: AlignedPairs) -> AlignedPairs:
    """The pairs of the commonest length."""
    lengths = pairs.clean.lengths.tolist()
    common = max(set(lengths), key=lengths.count)
    return pairs[[i for i, length in enumerate(lengths) if length == common]]


def measure(lm: LanguageModel, task: str, pairs: AlignedPairs, kind: str, most: int) -> list[dict[str, Any]]:
    """A row a method: correlations with exact patching of the same nodes."""
    site, positions = NODES[kind]
    if positions == "each":
        pairs = one_length(pairs)
    question = ask(lm, pairs, site, "noise", "logit_difference", positions)
    scored: dict[str, tuple[Tensor, bool, float]] = {}
    for name, options in METHODS.items():
        if "*" in name and kind not in ("queries", "keys", "heads (z)", "MLPs"):
            continue
        began = time.perf_counter()
        found = attribution_patching(lm, pairs, site, positions=positions, check=0, **options)  # pyright: ignore[reportArgumentType]
        scored[name] = found.scores, found.magnitude, time.perf_counter() - began
    first = attribution_patching(lm, pairs, site, positions=positions, check=0)  # pyright: ignore[reportArgumentType]
    places = [
        (s, [unit], column)
        for s, block in first.blocks.items()
        for column in range(block.shape[0])
        for unit in range(block.shape[1])
    ]
    alive = first.scores.abs().sum(-1).nonzero()[:, 0].numpy()  # where the two prompts have the same values both are 0
    chosen = np.sort(np.random.default_rng(0).permutation(alive)[:most])
    began = time.perf_counter()
    exact = exact_effects_of_sets(question, [[places[i]] for i in chosen])
    seconds = (time.perf_counter() - began) * len(places) / len(chosen)
    rows = []
    for name, (scores, magnitude, took) in scored.items():
        mine = scores[chosen]
        row = {
            "model": lm.name, "task": task, "nodes": kind, "method": name, "n_nodes": len(chosen), "pairs": len(pairs),
            "seconds": took, "exact_seconds": seconds,
            "size_pearson": correlation(mine.abs().mean(-1), exact.abs().mean(-1)),
            "size_spearman": spearman(mine.abs().mean(-1), exact.abs().mean(-1)),
        }  # fmt: skip
        if not magnitude:
            row |= {
                "pearson": correlation(mine.mean(-1), exact.mean(-1)),
                "spearman": spearman(mine.mean(-1), exact.mean(-1)),
            }
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One model and task: a row a kind of nodes, a column a method, Pearson / Spearman."""

    def cell(found: dict[str, Any] | None) -> str:
        if found is None:
            return "–"
        if found.get("pearson", 0.0) != found.get("pearson", 0.0):
            return "no gradient"
        if "pearson" in found:
            return f"{found['pearson']:.3f} / {found['spearman']:.3f}"
        return f"({found['size_pearson']:.3f} / {found['size_spearman']:.3f})"

    lines = ["| nodes | n | " + " | ".join(METHODS) + " |", "|---|---|" + "---|" * len(METHODS)]
    for kind in NODES:
        mine = {row["method"]: row for row in rows if row["nodes"] == kind}
        if mine and next(iter(mine.values()))["n_nodes"] >= LEAST:
            n = next(iter(mine.values()))["n_nodes"]
            lines.append(f"| {kind} | {n} | " + " | ".join(cell(mine.get(name)) for name in METHODS) + " |")
    seconds = {name: [row["seconds"] for row in rows if row["method"] == name] for name in METHODS}
    exact = {row["nodes"]: row["exact_seconds"] for row in rows}
    lines.append(
        "\nSeconds a kind of nodes: " + ", ".join(f"{k} {np.mean(v):.2f}" for k, v in seconds.items() if v) + "."
    )
    lines.append("Exact patching of all nodes: " + ", ".join(f"{kind} {s:.1f}" for kind, s in exact.items()) + ".")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["atlas"])
    parser.add_argument("--tasks", nargs="+", help="default: what the model does")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--most", type=int, default=300, help="nodes of one kind that are patched exactly")
    arguments = parser.parse_args()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.models:
        lm = cutaway.load(name)
        tasks = [*TASKS, *(WORLD_TASKS if name == "atlas" else ())]
        if arguments.tasks:
            tasks = [task for task in tasks if task.name in arguments.tasks]
        for tried in try_tasks(lm, tasks, n=arguments.pairs):
            if not tried.able or tried.pairs is None:
                print(f"\n{Path(lm.name).name}, {tried.task.name}: left out, {tried.reason}", flush=True)
                continue
            rows: list[dict[str, Any]] = []
            for kind in NODES:
                try:
                    rows += measure(lm, tried.task.name, tried.pairs, kind, arguments.most)
                except CutawayError as error:
                    print(f"{kind}: {error}")
            with RESULTS.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            print(f"\n{Path(lm.name).name}, {tried.task.name}, {len(tried.pairs)} pairs ({tried.accuracy})\n")
            print(table(rows), flush=True)
            heads = attribution_patching(lm, tried.pairs, "blocks.*.attn.z", check=0)
            print(f"\nHeads, by the AtP order: {missed_bound(lm, tried.pairs, heads, verified=12)}", flush=True)


if __name__ == "__main__":
    main()
