"""How fast the library is beside a plain transformers forward, on this machine.

    python benchmarks/run.py [MODEL]

Each row runs the same batch; `times` compares with the plain forward. Medians of repeated runs, taken in turn so that a
busy moment hits all rows alike. Results go to runs/bench/speed.json as well.
"""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
BATCH, LENGTH, REPEATS = 8, 128, 7


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def start_up() -> dict[str, float]:
    """Median seconds until the help is printed and until the package is imported, in a fresh interpreter."""

    def once(*command: str) -> float:
        return seconds(lambda: subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL))

    return {
        "python -c pass": median(once("-c", "pass") for _ in range(5)),
        "import cutaway": median(once("-c", "import cutaway") for _ in range(5)),
        "cutaway --help": median(once("-m", "cutaway", "--help") for _ in range(5)),
    }


def forward(model: str) -> dict[str, float]:
    """Median seconds of a forward, plain and through `lm.run` with more and more to do."""
    import torch

    import cutaway

    lm = cutaway.load(model)
    length = min(LENGTH, lm.context_length)
    ids = torch.randint(0, lm.d_vocab, (BATCH, length), generator=torch.Generator().manual_seed(0)).to(lm.device)
    rows = ids.tolist()
    middle = lm.n_layers // 2

    def plain() -> object:
        with torch.no_grad():
            return lm.hf(input_ids=ids, use_cache=False).logits

    subjects: dict[str, Callable[[], object]] = {
        "plain forward of transformers": plain,
        "lm.run": lambda: lm.run(rows, bos=False),
        "lm.run, capture the stream of every layer": lambda: lm.run(rows, bos=False, capture="blocks.*.resid_post"),
        "lm.run, capture every attention pattern": lambda: lm.run(rows, bos=False, capture="blocks.*.attn.pattern"),
        "lm.run, one edit in the middle": lambda: lm.run(
            rows, bos=False, edits=[cutaway.scale(f"blocks.{middle}.resid_post", 0.5)]
        ),
        "lm.run, stop after the middle": lambda: lm.run(
            rows, bos=False, capture=f"blocks.{middle}.resid_post", logits=None
        ),
    }
    taken: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(REPEATS + 1):
        for name, run in subjects.items():
            taken[name].append(seconds(run))
    return {name: median(times[1:]) for name, times in taken.items()}  # the first round warms up


def main(model: str) -> None:
    """Print the table and write it as JSON."""
    import torch

    from cutaway.artifacts.files import write_json

    starts, forwards = start_up(), forward(model)
    plain = forwards["plain forward of transformers"]
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    print(f"torch {torch.__version__}, {model}, batch {BATCH} x {LENGTH} tokens\n")
    for name, value in starts.items():
        print(f"{name:<45} {value * 1000:8.0f} ms")
    print()
    for name, value in forwards.items():
        print(f"{name:<45} {value * 1000:8.1f} ms  {value / plain:5.2f} times")
    path = ROOT / "runs" / "bench" / "speed.json"
    write_json(path, {"model": model, "batch": BATCH, "length": LENGTH, "start": starts, "forward": forwards})
    print(f"\nwritten to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "atlas")
