"""Training steps of a dictionary a second, and what they end in: ours, a plain dense one, and the field's trainers'.

    python benchmarks/dictionaries.py                      # the table (minutes; an idle machine)
    python benchmarks/dictionaries.py --settings 256,4096,32,1024,batchtopk --runs 5 --steps 60
    python benchmarks/dictionaries.py --settings 768,16384,32,2048 --steps 200 --runs 1 --curve --methods all-ours
    python benchmarks/dictionaries.py --quality --minutes 15   # sparse beside dense, trained to the end
    python benchmarks/dictionaries.py --quality --quality-steps 60 --seeds 1                # the same in a minute

The quality table takes about 45 minutes a selector (three seeds of 5,000 steps; a dense training alone takes 8); every
training is kept, so it can be stopped and goes on with the next call.

Every run is a fresh process (dictionary_peers.py) in the environment of its method, on the same stored activations
(runs/bench/activations-*.safetensors, written once), in the same batches and order. Runs take turns, so that a busy
moment hits all alike, and ratios are medians over the turns. `make parity` builds the peers' environments; a peer that
has none is printed as absent. Peers run with their defaults, but for width, k, batch and learning rate; a second row of
a peer has what makes it faster: fused Adam, bfloat16 autocast, an allocator that keeps freed memory as ours does (which
is the stronger baseline, though its products are rougher). Results go to runs/bench/dictionaries.json as well.

The loss is mean_b Σ_d (x − x̂)² on held-out activations, the mean over the last 20 steps; L0 and the share of dead
latents (none of 8,192 held-out tokens) are those of the end. `measure` takes all of it from the weights alone.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from dictionary_peers import Request
from dictionary_quality import Plan, quality

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "runs" / "bench"
HELD_OUT = 1 << 13
LAYER = 3


def stored(d: int) -> int:
    """Tokens to train on. At width 256 (537 MB) 5,000 steps of 1,024 pass over them ten times; else a quarter."""
    return 1 << 19 if d == 256 else 1 << 17


@dataclass(frozen=True)
class Row:
    """A method as the table has it; `selectors` are those that it can train. Some are run only when they are named."""

    name: str
    environment: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    selectors: tuple[str, ...] = ("topk", "batchtopk", "jumprelu")
    by_default: bool = True


_FAST = {"fused": True, "autocast": True, "allocator": True}
ROWS = (
    Row("cutaway, bfloat16 candidates", "cutaway", "cutaway", {"low_precision": True}),
    Row("cutaway", "cutaway", "cutaway"),
    Row("dense autograd", "cutaway", "dense"),
    Row("dense autograd, fast", "cutaway", "dense", _FAST),
    Row("SAELens", "saelens", "saelens"),
    Row("SAELens, fast", "saelens", "saelens", _FAST),
    Row("SAELens, sparse", "saelens", "saelens", {"sparse": True, "fused": True, "allocator": True}, ("topk",), False),
    Row("sparsify", "sparsify", "sparsify", selectors=("topk",)),
    Row("sparsify, Adam, fast", "sparsify", "sparsify", {"optimizer": "adam", "allocator": True}, ("topk",)),
    Row("dictionary_learning", "dictionary_learning", "dictionary_learning"),
    Row("dictionary_learning, fast", "dictionary_learning", "dictionary_learning", _FAST),
)
DENSE = "dense autograd"
DISTRIBUTIONS = {
    "saelens": "sae-lens", "sparsify": "eai-sparsify", "dictionary_learning": "dictionary-learning",
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """Width of the activations, latents, active latents, tokens a batch, and how latents are chosen."""

    d: int
    d_sae: int
    k: int
    batch: int
    selector: str = "topk"

    @classmethod
    def parse(cls, text: str) -> "Setting":
        """`D,F,K,BATCH` or `D,F,K,BATCH,SELECTOR`."""
        d, d_sae, k, batch, *selector = text.split(",")
        return cls(int(d), int(d_sae), int(k), int(batch), *selector)

    def __str__(self) -> str:
        return f"d = {self.d}, {self.d_sae:,} latents, k = {self.k}, batch {self.batch:,}, {self.selector}"


def activations(d: int) -> Path:
    """The file of the stored activations of width d, made where it is not there: x [n, d] and held [m, d].

    Width 256 is the shipped model's stream after layer 3, on text of its own world and the standard library's source;
    other widths are made. Scaled so that the mean length is √d, as every trainer here wants them.
    """
    path = OUT / f"activations-{d}.safetensors"
    if not path.exists():
        from cutaway.artifacts.files import write_safetensors

        print(f"making {path.relative_to(ROOT)}", flush=True)
        n = stored(d) + HELD_OUT
        x = _real(n) if d == 256 else _made(d, n)
        x *= d**0.5 / x.norm(dim=1).mean()
        write_safetensors(path, {"x": x[HELD_OUT:].contiguous(), "held": x[:HELD_OUT].contiguous()})
    return path


def _real(n: int):
    import torch

    import cutaway
    from cutaway.data.corpus.corpus import token_rows
    from cutaway.data.corpus.python_library import standard_library
    from cutaway.data.harvesting.activations import read_activations
    from cutaway.subjects.world.corpus import PARTS, documents

    texts = [text for part, about in PARTS.items() for text in documents(part, "bench", int(about.share * 1_000_000))]
    texts += [document.text for document in standard_library()]
    lm = cutaway.load("atlas")
    rows = token_rows(lm, texts, context=256, seed=0, limit=n // 240)
    x = read_activations(lm, rows, f"blocks.{LAYER}.resid_post")
    if len(x) < n:
        raise RuntimeError(f"{len(x):,} activations were harvested where {n:,} are needed")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[:n]]


def _made(d: int, n: int):
    """Sums of about 12 of 4·d random directions, with noise, around an offset: [n, d]."""
    import torch

    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(4 * d, d, generator=generator), dim=1)
    chosen = torch.randint(0, 4 * d, (n, 12), generator=generator)
    strength = torch.rand(n, 12, generator=generator) + 0.5
    x = torch.nn.functional.embedding_bag(chosen, directions, per_sample_weights=strength, mode="sum")
    return x + 0.02 * torch.randn(n, d, generator=generator) + 0.02 * torch.randn(d, generator=generator)


def built(environment: str) -> bool:
    """Whether a method's environment is there, built to the end."""
    return environment == "cutaway" or (ROOT / ".venvs" / environment / "requirements.txt").is_file()


def run(environment: str, request: Request) -> dict[str, Any]:
    """One training run in a fresh process."""
    python = Path(sys.executable) if environment == "cutaway" else ROOT / ".venvs" / environment / "bin" / "python"
    environ = {"OMP_WAIT_POLICY": "passive", **os.environ}  # as the command line does, for all alike
    environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "WANDB_MODE": "disabled"}
    if environment != "cutaway":
        environ["PYTHONPATH"] = ""
    if request.options.get("allocator"):  # what `keep_freed_memory` asks the C library for
        environ |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1)}
        environ |= {"MALLOC_TOP_PAD_": str(64 << 20)}
    command = [python, Path(__file__).with_name("dictionary_peers.py"), json.dumps(asdict(request))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    if done.returncode:
        raise RuntimeError(f"{request.method} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def version_of(environment: str) -> str:
    """The version that a peer's environment holds."""
    code = f"from importlib.metadata import version; print(version({DISTRIBUTIONS[environment]!r}))"
    python = ROOT / ".venvs" / environment / "bin" / "python"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def compare(setting: Setting, rows: Sequence[Row], runs: int, steps: int, rate: float, curve: bool) -> list[dict]:
    """Run every method in turns on one setting; print and return its rows of the table."""
    path = activations(setting.d)
    found: dict[str, list[dict[str, Any]]] = {row.name: [] for row in rows}
    for turn in range(runs):
        for row in rows[:: 1 if turn % 2 == 0 else -1]:
            request = Request(
                method=row.method,
                data=str(path),
                d_sae=setting.d_sae,
                k=setting.k,
                batch=setting.batch,
                steps=steps,
                selector=setting.selector,
                learning_rate=rate,
                last=min(20, steps // 2),
                curve=max(1, steps // 20) if curve else 0,
                options=row.options,
            )
            if row.name not in found:
                continue
            try:
                found[row.name].append(run(row.environment, request))
            except RuntimeError as error:
                if row.environment == "cutaway":
                    raise
                print(f"{row.name} is left out, since it failed: {str(error).strip().splitlines()[-1]}", flush=True)
                del found[row.name]
    print(f"\n{setting}, {steps} steps, {runs} turns; ratio to {DENSE if DENSE in found else rows[0].name}")
    print(f"{'':30}{'tokens/s':>10}{'ratio':>7}{'range':>13}{'MB':>7}{'loss':>10}{'variance':>10}{'L0':>8}{'dead':>7}")
    base = [one["tokens_per_second"] for one in found.get(DENSE, found[rows[0].name])]
    table = []
    for name, several in found.items():
        ratios = [one["tokens_per_second"] / other for one, other in zip(several, base, strict=True)]
        middle = {
            key: median(one[key] for one in several)
            for key in ("tokens_per_second", "memory_mb", "final_loss", "variance_explained", "l0", "dead")
        }
        entry = {"setting": asdict(setting), "method": name, "steps": steps, "runs": runs, "ratios": ratios}
        table.append({**entry, **middle, "ratio": median(ratios), "curve": several[0]["curve"]})
        spread = f"{min(ratios):.2f}–{max(ratios):.2f}"
        print(
            f"{name:30}{middle['tokens_per_second']:10,.0f}{median(ratios):7.2f}{spread:>13}{middle['memory_mb']:7,.0f}"
            f"{middle['final_loss']:10.3f}{middle['variance_explained']:10.4f}{middle['l0']:8.2f}{middle['dead']:7.1%}",
            flush=True,
        )
    if curve and DENSE in found:
        for row in table:
            if row["method"].startswith("cutaway"):
                dense = found[DENSE][0]["curve"]
                apart = max(abs(loss / dense[step] - 1) for step, loss in row["curve"].items())
                print(f"loss of {row['method']} along the way: at most {apart:.2%} from {DENSE}")
    ours = [row for row in table if row["method"].startswith("cutaway")]
    others = [row for row in table if row not in ours]
    if ours and others:
        best, rival = (max(group, key=lambda row: row["ratio"]) for group in (ours, others))
        print(f"{best['method']} takes {best['ratio'] / rival['ratio']:.2f} × the tokens of {rival['method']}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=["256,4096,32,1024", "768,16384,32,2048"])
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help=f"of: all-ours; {'; '.join(row.name for row in ROWS)}"
    )
    parser.add_argument("--runs", type=int, default=3, help="turns")
    parser.add_argument("--steps", type=int, help="default: 40, and 8 where there are 16,384 latents or more")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--curve", action="store_true", help="measure the loss all along (into the JSON file)")
    parser.add_argument("--quality", action="store_true", help="train to the end, sparse and dense, and compare")
    parser.add_argument("--quality-steps", type=int, default=5000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--control-seeds", type=int, default=1, help="seeds that are trained densely twice")
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="begin no training after that; the next call goes on"
    )
    parser.add_argument("--selectors", nargs="+", default=["topk"], help="of: topk, batchtopk, jumprelu")
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    if options.quality:
        plan = Plan(
            d_sae=4096,
            k=32,
            batch=1024,
            steps=options.quality_steps,
            seeds=options.seeds,
            controls=options.control_seeds,
            selectors=tuple(options.selectors),
            minutes=options.minutes,
        )
        table = quality(plan, activations(256), OUT / "quality", run)
        (OUT / "dictionary_quality.json").write_text(json.dumps(table, indent=1) + "\n")
        return
    named = options.methods or [row.name for row in ROWS if row.by_default]
    if "all-ours" in named:
        named += [row.name for row in ROWS if row.environment == "cutaway"]
    chosen = [row for row in ROWS if row.name in named]
    if not chosen:
        parser.error(f"no such method; there are {'; '.join(row.name for row in ROWS)}")
    for peer in dict.fromkeys(row.environment for row in chosen if row.environment != "cutaway"):
        print(f"{peer} {version_of(peer)}" if built(peer) else f"peer absent: {peer} (make parity builds it)")
    table = []
    for setting in map(Setting.parse, options.settings):
        rows = [row for row in chosen if built(row.environment) and setting.selector in row.selectors]
        steps = options.steps or (40 if setting.d_sae < 16_384 else 8)
        table += compare(setting, rows, options.runs, steps, options.learning_rate, options.curve)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "dictionaries.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
