"""Edge scores and circuits beside EAP-IG and TransformerLens: the same numbers, how much faster, in how much memory.

    python benchmarks/circuits.py --peer PATH           # the table and the plot (about half an hour, idle machine)
    python benchmarks/circuits.py --peer PATH --quick   # a tiny model, few turns: does everything run?
    python benchmarks/circuits.py --peer PATH --only eap_ig circuits

PATH is a checkout of EAP-IG (github.com/hannamw/EAP-IG); without it, or without an environment (`make parity` builds
them), that peer is absent and its rows are left out. The model is random, of GPT-2 small's shape, its matrices
`SPREAD` times as large as GPT-2's initial ones, so that heads attend to some tokens more than to others; nobody
processes its weights. A pair is two rows of random tokens that differ in three places, and two random answers.

A method works in a process of its own (circuit_peers.py), fresh for every row, with the same number of threads. Its
first run gives the numbers that are compared and the peak of its memory: of all that is resident, and above what was
resident with the model loaded. Then the methods run in turn; a ratio is the median over turns. The peer takes its
pairs in the batches with which it is fastest of those tried. `circuits` are the ten sizes of MIB, selected by EAP-IG's
scores and pruned: one circuit after the other in the peer, as it does it, all in one call in ours. Results go to
runs/bench/circuits.json, the plot to docs/images/circuits.svg. The exit code is 1 where a target was missed.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded; the workers inherit it

import torch
from circuit_peers import Load
from circuit_plot import Point, cost_svg
from paired import ROOT, Claim, Row, judged, relative, take_turns, verdict
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from torch import Tensor

from cutaway.artifacts.files import write_json, write_text
from cutaway.causal.edge_graph import EdgeGraph

SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Edges kept, as parts of all: those of MIB."""
SPREAD = 3.0
TITLES = {"cutaway": "cutaway", "eap_ig": "EAP-IG", "transformerlens": "TransformerLens"}
LENGTHS, DEPTHS = (8, 16, 32, 64, 128), (2, 4, 8, 12, 24)
COST_PAIRS, COST_LENGTH = 2, 16


@dataclass(frozen=True)
class Setting:
    """Shape of the model, n pairs of `length` tokens, steps of the integrated gradient."""

    n_layers: int = 12
    n_heads: int = 12
    d_model: int = 768
    d_vocab: int = 50_257
    n: int = 8
    length: int = 20
    steps: int = 5

    def __str__(self) -> str:
        shape = f"{self.n_layers} layers, {self.n_heads} heads, width {self.d_model}, {self.d_vocab:,} tokens"
        return f"{shape}; {self.n} pairs of {self.length} tokens; {self.steps} steps"


TINY = Setting(n_layers=2, n_heads=4, d_model=64, d_vocab=101, n=6, length=8, steps=3)


def save_model(setting: Setting, folder: Path) -> Path:
    """The random model, written as transformers writes it, unless it is there."""
    where = folder / f"model-{setting.n_layers}-{setting.d_model}"
    if not where.exists():
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        config = GPT2Config(
            n_layer=setting.n_layers,
            n_head=setting.n_heads,
            n_embd=setting.d_model,
            vocab_size=setting.d_vocab,
            bos_token_id=0,
            eos_token_id=0,
        )
        model = GPT2LMHeadModel(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(SPREAD)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(where)
    return where


def make_pairs(setting: Setting, file: Path) -> Path:
    """Random pairs that differ in three places, one of them early."""
    generator = torch.Generator().manual_seed(1)
    clean = torch.randint(setting.d_vocab, (setting.n, setting.length), generator=generator)
    corrupt = clean.clone()
    for row in corrupt:
        places = torch.randperm(setting.length - 1, generator=generator)[:2].tolist()
        for place in {1, *places}:
            row[place] = (row[place] + torch.randint(1, setting.d_vocab, (), generator=generator)) % setting.d_vocab
    answer = torch.randint(setting.d_vocab, (setting.n,), generator=generator)
    other = torch.randint(1, setting.d_vocab, (setting.n,), generator=generator)
    save_file({"clean": clean, "corrupt": corrupt, "answer": answer, "wrong": (answer + other) % setting.d_vocab}, file)
    return file


def built(environment: str) -> bool:
    """Whether a peer's environment is there, built to the end."""
    return (ROOT / ".venvs" / environment / "requirements.txt").is_file()


class Worker:
    """One method in its environment, asked over pipes."""

    def __init__(self, name: str, load: Load) -> None:
        python = Path(sys.executable)
        environ = {**os.environ, "OMP_NUM_THREADS": str(load.threads)}
        if name == "cutaway":
            environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), environ.get("PYTHONPATH", "")])
        else:
            python = ROOT / ".venvs" / name / "bin" / "python"
            environ["PYTHONPATH"] = ""
        worker = Path(__file__).with_name("circuit_peers.py")
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed with the worker
        self._process = subprocess.Popen(
            [python, worker, name, json.dumps(asdict(load))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environ,
        )
        about = self._answer()
        self.version: str = about["version"]
        self.sources: list[str] = about["sources"]
        self.destinations: list[str] = about["destinations"]

    def ask(self, do: str, task: str, options: Mapping[str, Any], file: Path | None = None) -> dict[str, Any]:
        assert self._process.stdin is not None
        request = {"do": do, "task": task, "options": dict(options), "file": str(file)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def first(self, task: str, options: Mapping[str, Any] | None = None) -> tuple[dict[str, Tensor], dict[str, int]]:
        """What a task returns, and the bytes resident before it and at most meanwhile."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "values.safetensors"
            answer = self.ask("first", task, options or {}, file)
            return load_file(file), answer

    def seconds(self, task: str, options: Mapping[str, Any] | None = None) -> float:
        return self.ask("time", task, options or {})["seconds"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        self._process.wait(timeout=60)
        self._errors.seek(0)
        return f"it has ended\n{self._errors.read()[-3000:]}"

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Bench:
    """What the rows share: a folder for models and pairs, the peers at hand, options."""

    def __init__(self, folder: Path, checkout: Path | None, threads: int, turns: int) -> None:
        self.folder, self.checkout, self.threads, self.turns = folder, checkout, threads, turns
        there = {"eap_ig": checkout is not None and built("eap_ig"), "transformerlens": built("transformerlens")}
        self.peers = [name for name, here in there.items() if here]
        self.absent = [name for name, here in there.items() if not here]
        self.versions: dict[str, str] = {}

    def worker(self, name: str, setting: Setting) -> Worker:
        """A fresh process with the model and the pairs of a setting."""
        data = make_pairs(setting, self.folder / f"pairs-{setting.n}-{setting.length}.safetensors")
        load = Load(str(save_model(setting, self.folder)), str(data), self.threads, str(self.checkout or ""))
        worker = Worker(name, load)
        self.versions[name] = worker.version
        return worker


def places(found: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Where each of the wanted names is among those found."""
    index = {name: i for i, name in enumerate(found)}
    if set(index) != set(wanted):
        raise RuntimeError(f"the graphs differ: {sorted(set(index) ^ set(wanted))[:6]}")
    return [index[name] for name in wanted]


def in_order(scores: Tensor, worker: Worker, graph: EdgeGraph) -> Tensor:
    """A method's matrix with rows and columns in the graph's order, by name."""
    return scores[places(worker.sources, graph.sources)][:, places(worker.destinations, graph.destinations)]


def agreement(row: Row, ours: Tensor, theirs: Tensor) -> None:
    """Largest difference over the largest score, and the correlation of ranks: flat vectors of scores."""
    row.verdicts.append(judged("max |Δ| / max |score|", relative(ours, theirs), "<=", 1e-4))
    rho = float(spearmanr(ours.double().numpy(), theirs.double().numpy())[0])  # pyright: ignore[reportArgumentType]
    row.verdicts.append(judged("Spearman", rho, ">=", 0.9999))
    row.notes.append(
        f"{ours.numel():,} numbers, the largest {theirs.abs().max():.4g}, median {theirs.abs().median():.2g}"
    )


def memory(row: Row, peaks: Mapping[str, Mapping[str, int]], peer: str, relation: str = "<=") -> None:
    """Both ways of counting; the target, where there is one, is for what is needed above the loaded model."""
    above = {name: peak["most"] - peak["loaded"] for name, peak in peaks.items()}
    row.peak_bytes = {TITLES[name]: most for name, most in above.items()}
    row.verdicts.append(
        judged("peak memory above the loaded model, ours / theirs", above["cutaway"] / above[peer], relation, 0.5)
    )
    total = peaks["cutaway"]["most"] / peaks[peer]["most"]
    row.verdicts.append(judged("peak memory with model and libraries, ours / theirs", total, "", 0))
    whole = ", ".join(f"{TITLES[name]} {peak['most'] / 2**20:,.0f} MiB" for name, peak in peaks.items())
    row.notes.append(f"with model and libraries: {whole}")


def timed_row(
    bench: Bench, row: Row, workers: Mapping[str, Worker], tasks: Mapping[str, tuple[str, dict[str, Any]]], bound: float
) -> None:
    """Run the methods in turn and judge ours against the peer."""
    subjects = {TITLES[name]: lambda turn, w=worker, t=tasks[name]: w.seconds(*t) for name, worker in workers.items()}
    row.seconds = take_turns(subjects, bench.turns, warm_up=0)  # the first runs were the warm-up
    peer = next(title for title in subjects if title != TITLES["cutaway"])
    claim = Claim("times as fast", peer, TITLES["cutaway"], ">=", bound)
    row.verdicts.append(verdict(claim, row.seconds))


def fastest_batch(worker: Worker, task: str, options: dict[str, Any], n: int) -> dict[str, Any]:
    """The options with the batch in which the peer is fastest: of all pairs at once, a half, a quarter."""
    sizes = sorted({n, -(-n // 2), -(-n // 4)})
    taken = {size: worker.seconds(task, {**options, "batch": size}) for size in sizes}
    return {**options, "batch": min(taken, key=lambda size: taken[size])}


def logits_row(bench: Bench, setting: Setting) -> Row:
    """Whether it is one and the same model to all: logits at the last position of the clean prompts."""
    row = Row("logits", f"the same model to all; {setting}")
    with bench.worker("cutaway", setting) as ours:
        made = ours.first("logits")[0]["logits"]
    for peer in bench.peers:
        with bench.worker(peer, setting) as theirs:
            apart = relative(theirs.first("logits")[0]["logits"], made)
        row.verdicts.append(judged(f"{TITLES[peer]}: max |Δ| / max |logit|", apart, "<=", 1e-4))
    return row


def scores_row(bench: Bench, setting: Setting, task: str) -> Row:
    """Edge scores by gradient at one point or along the path of embeddings, both methods, every real edge."""
    titles = {"eap": "EAP", "eap_ig": f"EAP-IG-inputs, m = {setting.steps}"}
    row = Row(task, f"{titles[task]}; {setting}")
    graph = EdgeGraph(setting.n_layers, setting.n_heads)
    options = {"steps": setting.steps} if task == "eap_ig" else {}
    with bench.worker("eap_ig", setting) as theirs:  # not the one that is measured, which is fresh
        its = fastest_batch(theirs, task, options, setting.n)
    with bench.worker("cutaway", setting) as ours, bench.worker("eap_ig", setting) as theirs:
        made, peaks = {}, {}
        for worker, chosen in ((ours, options), (theirs, its)):
            made[worker.name], peaks[worker.name] = worker.first(task, chosen)
        matrices = [in_order(made[worker.name]["scores"], worker, graph)[graph.real] for worker in (ours, theirs)]
        agreement(row, *matrices)
        for side in ("clean", "corrupt"):
            found = [made[worker.name][side].mean() for worker in (ours, theirs)]
            row.notes.append(f"mean metric, {side}: {found[0]:.5f}, {found[1]:.5f}")
        memory(row, peaks, "eap_ig")
        row.notes.append(f"EAP-IG in batches of {its['batch']}")
        tasks = {"cutaway": (task, options), "eap_ig": (task, its)}
        timed_row(bench, row, {"cutaway": ours, "eap_ig": theirs}, tasks, 3.0)
    return row


def circuits_row(bench: Bench, setting: Setting) -> Row:
    """Ten circuits of growing size, corrupt activations outside."""
    row = Row("circuits", f"ten circuits, {SIZES[0]:.1%} to {SIZES[-1]:.0%} of the edges; {setting}")
    graph = EdgeGraph(setting.n_layers, setting.n_heads)
    with bench.worker("cutaway", setting) as worker:
        scores = worker.first("eap_ig", {"steps": setting.steps})[0]["scores"]
    masks = torch.stack([graph.prune(graph.top(scores, max(1, round(size * graph.n_edges)))) for size in SIZES])
    row.notes.append("edges after pruning: " + ", ".join(f"{int(mask.sum()):,}" for mask in masks))

    def options_of(worker: Worker) -> dict[str, Any]:
        """Tell a method the circuits, with rows and columns in its own order."""
        rows, columns = places(graph.sources, worker.sources), places(graph.destinations, worker.destinations)
        file = bench.folder / f"masks-{worker.name}.safetensors"
        save_file({"masks": masks[:, rows][:, :, columns].to(torch.uint8).contiguous()}, file)
        return {"masks": str(file)}

    with bench.worker("eap_ig", setting) as theirs:
        its = fastest_batch(theirs, "circuits", options_of(theirs), setting.n)
    with bench.worker("cutaway", setting) as ours, bench.worker("eap_ig", setting) as theirs:
        values, peaks = {}, {}
        for worker, options in ((ours, options_of(ours)), (theirs, its)):
            tensors, peaks[worker.name] = worker.first("circuits", options)
            values[worker.name] = tensors["values"]
        apart = relative(values["cutaway"], values["eap_ig"])
        row.verdicts.append(judged("max |Δ| / max |value|, of every size and pair", apart, "<=", 1e-4))
        means = values["cutaway"].mean(1).tolist()
        row.notes.append("mean metric by size: " + ", ".join(f"{mean:.3f}" for mean in means))
        row.notes.append(f"EAP-IG in batches of {its['batch']}")
        memory(row, peaks, "eap_ig", relation="")  # nothing was promised: ten circuits share a batch
        tasks = {"cutaway": ("circuits", options_of(ours)), "eap_ig": ("circuits", its)}
        timed_row(bench, row, {"cutaway": ours, "eap_ig": theirs}, tasks, 3.0)
    return row


def transformerlens_row(bench: Bench, setting: Setting, task: str) -> Row:
    """TransformerLens' own attribution patching (denoising, m = 1); it takes pairs one by one, so few of them."""
    row = Row(f"transformerlens-{task}", f"attribution patching of {task}, denoising; {setting}")
    graph = EdgeGraph(setting.n_layers, setting.n_heads)
    with bench.worker("cutaway", setting) as ours, bench.worker("transformerlens", setting) as theirs:
        mine, mine_peak = ours.first(task)
        its, its_peak = theirs.first(task)
        matrix = mine["scores"]
        if task == "edges":
            agreement(row, matrix[graph.real], in_order(its["scores"], theirs, graph)[graph.real])
        else:
            agreement(row, matrix, its["scores"][places(theirs.sources, graph.sources)])
        memory(row, {"cutaway": mine_peak, "transformerlens": its_peak}, "transformerlens")
        row.notes.append(f"TransformerLens takes a pair at a time, ours all {setting.n} at once")
        tasks = {"cutaway": (task, {}), "transformerlens": (task, {})}
        timed_row(bench, row, {"cutaway": ours, "transformerlens": theirs}, tasks, 3.0)
    if task == "nodes":
        with bench.worker("cutaway", setting) as ours:
            one = ours.first(task, {"batch": 1})[1]
            above = (one["most"] - one["loaded"]) / (its_peak["most"] - its_peak["loaded"])
            row.verdicts.append(judged("peak memory above the loaded model, both a pair at a time", above, "<=", 0.5))
            alone = min(ours.seconds(task, {"batch": 1}) for _ in range(bench.turns))
        fast = min(row.seconds[TITLES["transformerlens"]]) / alone
        row.verdicts.append(judged("times as fast, both a pair at a time, best of all runs", fast, "", 0))
    return row


def cost(bench: Bench, setting: Setting) -> Point:
    """Median seconds and peak memory above the loaded model of EAP-IG-inputs, ours and the peer's."""
    above: dict[str, float] = {}
    with bench.worker("cutaway", setting) as ours, bench.worker("eap_ig", setting) as theirs:
        asked = {"cutaway": {"steps": setting.steps}, "eap_ig": {"steps": setting.steps, "batch": setting.n}}
        for worker in (ours, theirs):
            peak = worker.first("eap_ig", asked[worker.name])[1]
            above[worker.name] = (peak["most"] - peak["loaded"]) / 2**20
        subjects = {w.name: lambda turn, w=w: w.seconds("eap_ig", asked[w.name]) for w in (ours, theirs)}
        taken = take_turns(subjects, min(2, bench.turns), warm_up=0)
    return Point(setting.length, setting.n_layers, {name: median(times) for name, times in taken.items()}, above)


def costs(bench: Bench, setting: Setting, quick: bool) -> dict[str, list[Point]]:
    """Cost at growing prompt length and depth."""
    found: dict[str, list[Point]] = {"length": [], "depth": []}
    base = replace(setting, n=COST_PAIRS)
    print(f"\ncost of EAP-IG-inputs; {base}\n{'':>24}{'seconds':>20}{'':>8}{'MiB':>22}")
    plans = [(name, value) for name, values in (("length", LENGTHS), ("depth", DEPTHS)) for value in values]
    for name, value in plans[::5] if quick else plans:
        at = replace(base, length=value) if name == "length" else replace(base, n_layers=value, length=COST_LENGTH)
        point = cost(bench, at)
        found[name].append(point)
        s, m = point.seconds, point.mebibytes
        print(
            f"{name:>12} {value:>4}       {s['cutaway']:10.3f}{s['eap_ig']:10.3f}{s['eap_ig'] / s['cutaway']:6.1f} ×"
            f"{m['cutaway']:11.1f}{m['eap_ig']:11.1f}{m['eap_ig'] / max(m['cutaway'], 1e-9):6.1f} ×",
            flush=True,
        )
    return found


def commit(checkout: Path) -> str:
    """The commit that a checkout is at, with a word where its files were changed."""
    git = ["git", "-C", str(checkout)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "src"], capture_output=True, text=True, check=True).stdout
    return head + (" with changes" if changed.strip() else "")


def markdown(rows: Sequence[Row]) -> str:
    """All verdicts as a table."""
    lines = ["| row | what | found | target | |", "|---|---|---|---|---|"]
    said = {True: "met", False: "NOT MET", None: ""}
    for row in rows:
        for one in row.verdicts:
            lines.append(f"| {row.name} | {one.text} | {one.figure} | {one.target} | {said[one.met]} |")
    return "\n".join(lines)


ROWS: dict[str, tuple[str, Callable[[Bench, Setting], Row]]] = {
    "logits": ("", logits_row),
    "eap": ("eap_ig", lambda bench, setting: scores_row(bench, setting, "eap")),
    "eap_ig": ("eap_ig", lambda bench, setting: scores_row(bench, setting, "eap_ig")),
    "circuits": ("eap_ig", circuits_row),
    "edges": ("transformerlens", lambda bench, setting: transformerlens_row(bench, setting, "edges")),
    "nodes": ("transformerlens", lambda bench, setting: transformerlens_row(bench, setting, "nodes")),
}
"""Rows by name, and the peer without which a row is left out."""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, metavar="PATH", help="a checkout of EAP-IG")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two turns")
    parser.add_argument(
        "--only", nargs="+", metavar="ROW", choices=[*ROWS, "cost"], help=f"of: {', '.join(ROWS)}, cost"
    )
    parser.add_argument("--turns", type=int, help="default: 5; 2 with --quick")
    parser.add_argument("--pairs", type=int, help=f"default: {Setting.n}")
    parser.add_argument("--length", type=int, help=f"tokens of a prompt; default: {Setting.length}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench" / "circuits.json")
    parser.add_argument("--picture", type=Path, help="default: docs/images/circuits.svg, and none with --quick")
    return parser


def main() -> int:
    parser = arguments()
    options = parser.parse_args()
    if options.peer is not None and not (options.peer / "src" / "eap" / "attribute.py").is_file():
        parser.error(f"{options.peer} is no checkout of EAP-IG: it has no src/eap/attribute.py")
    if unknown := set(options.only or ()) - {*ROWS, "cost"}:
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}, cost")
    setting = TINY if options.quick else Setting()
    setting = replace(setting, n=options.pairs or setting.n, length=options.length or setting.length)
    picture = options.picture or (None if options.quick else ROOT / "docs" / "images" / "circuits.svg")
    checkout = options.peer and options.peer.resolve()
    head = commit(checkout) if checkout else None
    rows: list[Row] = []
    points: dict[str, list[Point]] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), checkout, options.threads, options.turns or (2 if options.quick else 5))

        def keep() -> None:
            """What there is by now, so that a run that is stopped has its rows."""
            record = {
                "setting": asdict(setting), "threads": options.threads, "spread": SPREAD, "peer_commit": head,
                "versions": bench.versions, "absent": bench.absent, "rows": [row.to_json() for row in rows],
                "cost": {name: [asdict(point) for point in several] for name, several in points.items()},
            }  # fmt: skip
            write_json(options.out, record)

        print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {options.threads} threads")
        if head:
            print(f"EAP-IG at {head}")
        for name in bench.absent:
            why = "give --peer PATH, a checkout" if name == "eap_ig" and not checkout else "make parity builds it"
            print(f"peer absent: {TITLES[name]} ({why})", flush=True)
        for name, (peer, work) in ROWS.items():
            if (options.only and name not in options.only) or (peer and peer not in bench.peers):
                continue
            row = work(bench, replace(setting, n=min(setting.n, 4)) if peer == "transformerlens" else setting)
            rows.append(row)
            print(f"\n{row}", flush=True)
            keep()
        if "eap_ig" in bench.peers and (not options.only or "cost" in options.only):
            points = costs(bench, setting, options.quick)
            if picture:
                about = f"EAP-IG-inputs, m = {setting.steps}, {COST_PAIRS} pairs, GPT-2 small's width, "
                about += f"{options.threads} threads; depth at {COST_LENGTH} tokens"
                write_text(picture, cost_svg(points["length"], points["depth"], ("cutaway", "EAP-IG"), about))
                print(f"\n{picture} written")
        keep()
    versions = ", ".join(f"{TITLES[name]} {version}" for name, version in bench.versions.items() if name != "cutaway")
    print(f"\n{setting}; {options.threads} threads; {versions or 'no peer'}\n\n{markdown(rows)}")
    print(f"\nwritten to {options.out}")
    return 1 if any(one.met is False for row in rows for one in row.verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
