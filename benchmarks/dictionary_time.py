"""Time to quality: the held-out loss of each trainer along a training at its own defaults, and who is there first.

    python benchmarks/dictionary_time.py                    # 1,000 and 5,000 steps, one seed: about 40 minutes
    python benchmarks/dictionary_time.py --steps 1000 --methods cutaway sparsify

Speed alone says little: after as many steps trainers stand at different losses. Each method trains 256 → 4,096 latents,
TopK 32, batches of 1,024 of the same stored activations, with the learning rate, warm-up, decay, optimiser and start
that it has when nothing is said (ours without warm-up, its candidates chosen in bfloat16; a peer's warm-up of 1,000
steps is half of a training where that is shorter). For every peer the table has its loss at the
end, how long it took, and how long ours took to get there; ours is also trained from encoder rows of the length that
reconstructs best. The clock stands still while the loss is measured. Curves go to
runs/bench/dictionary_time.json, where trainings that are there are not done again.
"""

import argparse
import json
from typing import Any

from dictionary_peers import Request

from dictionaries import OUT, activations, built, run, version_of

OURS = {"low_precision": True, "decay": 0.3}
METHODS: dict[str, tuple[str, str, float, dict[str, Any]]] = {
    # environment, method, learning rate (of ours the trainer's default), options
    "cutaway": ("cutaway", "cutaway", 3e-3, {**OURS, "encoder_scale": 1.0}),
    "cutaway, encoder fitted": ("cutaway", "cutaway", 3e-3, {**OURS, "encoder_scale": "fit"}),
    "SAELens": ("saelens", "saelens", 3e-4, {"own": True, "fused": True, "autocast": True, "allocator": True}),
    "sparsify": ("sparsify", "sparsify", 0.0, {"own": True, "allocator": True}),
    "sparsify, Adam": ("sparsify", "sparsify", 0.0, {"own": True, "optimizer": "adam", "allocator": True}),
    "dictionary_learning": (
        "dictionary_learning", "dictionary_learning", 0.0,
        {"own": True, "fused": True, "autocast": True, "allocator": True},
    ),
}  # fmt: skip
BATCH = 1024


def trained(name: str, steps: int, seed: int) -> dict[str, Any]:
    """One training: the curve of its loss, and tokens per second."""
    environment, method, rate, options = METHODS[name]
    request = Request(
        method=method, data=str(activations(256)), d_sae=4096, k=32, batch=BATCH, steps=steps, learning_rate=rate,
        seed=seed, last=min(20, steps // 2), curve=max(1, steps // 50), options=options,
    )  # fmt: skip
    return run(environment, request)


def seconds_to(found: dict[str, Any], loss: float) -> float | None:
    """Seconds of training after which the loss is as low; None where it never is."""
    for step, value in sorted((int(step), value) for step, value in found["curve"].items()):
        if value <= loss:
            return step * BATCH / found["tokens_per_second"]
    return None


def show(found: dict[str, dict[str, Any]], steps: int) -> None:
    """The table of one length of training."""
    ours = found.get("cutaway")
    print(f"\n{steps:,} steps of {BATCH:,} tokens")
    print(f"{'':26}{'loss':>9}{'variance':>10}{'dead':>7}{'seconds':>9}{'ours gets there in':>20}")
    for name, one in found.items():
        took = steps * BATCH / one["tokens_per_second"]
        there = None if ours is None else seconds_to(ours, one["final_loss"])
        said = "" if name == "cutaway" else "never" if there is None else f"{there:.1f} ({took / there:.1f} x)"
        print(
            f"{name:26}{one['final_loss']:9.2f}{one['variance_explained']:10.4f}{one['dead']:7.1%}{took:9.1f}{said:>20}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[1000, 5000])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    path = OUT / "dictionary_time.json"
    kept: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    for peer in dict.fromkeys(METHODS[name][0] for name in options.methods):
        if peer != "cutaway":
            print(f"{peer} {version_of(peer)}" if built(peer) else f"peer absent: {peer} (make parity builds it)")
    for steps in options.steps:
        found: dict[str, dict[str, Any]] = {}
        for name in options.methods:
            if not built(METHODS[name][0]):
                continue
            key = f"{name}|{steps}|{options.seed}"
            if key not in kept:
                kept[key] = trained(name, steps, options.seed)
                path.write_text(json.dumps(kept, indent=1) + "\n")
            found[name] = kept[key]
        show(found, steps)


if __name__ == "__main__":
    main()
