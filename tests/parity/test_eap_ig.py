"""Our edge scores and circuit runs are EAP-IG's and TransformerLens', on small random models.

EAP-IG is a checkout, named by EAP_IG_CHECKOUT (`make parity PEER=PATH`). It gives each query head keys and values of
its own where they are shared between heads, as our graph does by itself.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from peer_models import HEADS, LAYERS, V, save
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from torch import Tensor

from cutaway.causal.edge_graph import EdgeGraph

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
N, STEPS = 6, 5
KINDS = ("gpt2", "llama")


@pytest.fixture(scope="module")
def circuits() -> Iterator[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    yield import_module("circuits")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def checkout() -> Path:
    folder = os.environ.get("EAP_IG_CHECKOUT")
    if not folder:
        pytest.skip("no checkout of EAP-IG is named by EAP_IG_CHECKOUT (make parity PEER=PATH)")
    return Path(folder).resolve()


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model's folder and pairs that differ in two places, of 9 tokens."""
    folder = tmp_path_factory.mktemp(request.param)
    save(request.param, folder / "model")
    generator = torch.Generator().manual_seed(1)
    clean = torch.randint(2, V, (N, 9), generator=generator)
    corrupt = clean.clone()
    corrupt[:, 2], corrupt[:, 5] = clean[:, 2] % (V - 3) + 2, (clean[:, 5] + 40) % (V - 2) + 2
    answer = torch.randint(2, V, (N,), generator=generator)
    pairs = {"clean": clean, "corrupt": corrupt, "answer": answer, "wrong": (answer + 7) % V}
    save_file(pairs, folder / "pairs.safetensors")
    return folder / "model", folder / "pairs.safetensors"


class Methods:
    """Ours and a peer's worker on one case; `scores` in the graph's order."""

    def __init__(self, circuits: Any, names: tuple[str, str], case: tuple[Path, Path], checkout: Path | None) -> None:
        model, pairs = case
        load = circuits.Load(str(model), str(pairs), 1, str(checkout or ""))
        self.circuits, self.graph = circuits, EdgeGraph(LAYERS, HEADS)
        self.workers = {name: circuits.Worker(name, load) for name in names}

    def values(self, name: str, task: str, **options: Any) -> dict[str, Tensor]:
        made = self.workers[name].first(task, options)[0]
        if "scores" in made and made["scores"].ndim == 2:
            made["scores"] = self.circuits.in_order(made["scores"], self.workers[name], self.graph)
        return made

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()


def close_to(ours: Tensor, theirs: Tensor, bound: float = 1e-4) -> None:
    assert ours.shape == theirs.shape
    assert (ours.double() - theirs.double()).abs().max() <= bound * theirs.double().abs().max()


@pytest.fixture(scope="module")
def eap_ig(circuits: Any, peer: Callable[[str], Path], checkout: Path, case: tuple[Path, Path]) -> Iterator[Methods]:
    peer("eap_ig")
    methods = Methods(circuits, ("cutaway", "eap_ig"), case, checkout)
    yield methods
    methods.close()


@pytest.mark.parametrize(("task", "options"), [("eap", {}), ("eap_ig", {"steps": STEPS})])
def test_edge_scores_are_the_peers(eap_ig: Methods, task: str, options: dict[str, Any]) -> None:
    """All edges, in batches of 4 and 2 pairs in the peer; and the metric of the untouched runs."""
    ours = eap_ig.values("cutaway", task, **options)
    theirs = eap_ig.values("eap_ig", task, **options, batch=4)
    real = eap_ig.graph.real
    assert not theirs["scores"][~real].any()
    assert theirs["scores"][real].abs().median() > 1e-3 * theirs["scores"].abs().max()
    close_to(ours["scores"], theirs["scores"])
    rho: Any = spearmanr(ours["scores"][real].numpy(), theirs["scores"][real].numpy())
    assert rho.statistic >= 0.9999
    for side in ("clean", "corrupt"):
        close_to(ours[side], theirs[side], 1e-5)


def test_steps_and_points_matter(eap_ig: Methods) -> None:
    """That the two agree says something: with another number of steps they do not."""
    five = eap_ig.values("eap_ig", "eap_ig", steps=STEPS, batch=N)["scores"]
    four = eap_ig.values("cutaway", "eap_ig", steps=STEPS - 1)["scores"]
    assert (five - four).abs().max() > 1e-2 * five.abs().max()


def test_circuits_run_alike(eap_ig: Methods, tmp_path: Path) -> None:
    """Selected and pruned as the peer would: every size of MIB and pair; then random masks, which prune to less."""
    graph, worker = eap_ig.graph, eap_ig.workers["eap_ig"]
    scores = eap_ig.values("cutaway", "eap_ig", steps=STEPS)["scores"]
    sizes = [max(1, round(size * graph.n_edges)) for size in eap_ig.circuits.SIZES]
    drawn = torch.rand(3, *graph.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    masks = torch.stack([graph.prune(m) for m in [*(graph.top(scores, n) for n in sizes), *(drawn & graph.real)]])
    rows = eap_ig.circuits.places(graph.sources, worker.sources)
    columns = eap_ig.circuits.places(graph.destinations, worker.destinations)
    save_file({"masks": masks.to(torch.uint8)}, tmp_path / "ours")
    save_file({"masks": masks[:, rows][:, :, columns].to(torch.uint8).contiguous()}, tmp_path / "theirs")
    ours = eap_ig.values("cutaway", "circuits", masks=str(tmp_path / "ours"))["values"]
    theirs = eap_ig.values("eap_ig", "circuits", masks=str(tmp_path / "theirs"), batch=4)["values"]
    close_to(ours, theirs)
    spread = (theirs - theirs[len(sizes) - 1]).abs().amax(1)
    assert (spread[:6] > 0.01).all()  # circuits are not the whole model
    assert spread[len(sizes) :].min() > 0.01


def test_greedy_and_top_selection_are_the_peers(eap_ig: Methods, tmp_path: Path, checkout: Path) -> None:
    """The peer's own selection by the same scores keeps the same edges after pruning."""
    graph = eap_ig.graph
    scores = eap_ig.values("cutaway", "eap_ig", steps=STEPS)["scores"]
    sizes = [5, 20, 60, 150]
    save_file({"scores": scores.contiguous()}, tmp_path / "scores")
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1])\n"
        "from eap.graph import Graph; from safetensors.torch import load_file, save_file\n"
        f"made, shape = {{}}, dict(n_layers={LAYERS}, n_heads={HEADS}, parallel_attn_mlp=False, d_model=32)\n"
        f"for n in {sizes}:\n"
        "    for how in ('apply_topn', 'apply_greedy'):\n"
        "        graph = Graph.from_model(shape)\n"
        "        graph.scores[:] = load_file(sys.argv[2] + '/scores')['scores']\n"
        "        getattr(graph, how)(n, absolute=True, prune=True)\n"
        "        made[f'{how} {n}'] = graph.in_graph.to(torch.uint8)\n"
        "save_file(made, sys.argv[2] + '/chosen')\n"
    )
    python = eap_ig.circuits.ROOT / ".venvs" / "eap_ig" / "bin" / "python"
    command = [python, "-c", code, str(checkout / "src"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    for name, theirs in load_file(tmp_path / "chosen").items():
        how, n = name.split()
        choose = {"apply_topn": graph.top, "apply_greedy": graph.greedy}[how]
        assert torch.equal(graph.prune(choose(scores, int(n))), theirs.bool()), name


@pytest.fixture(scope="module")
def transformerlens(
    circuits: Any, peer: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Methods]:
    peer("transformerlens")
    folder = tmp_path_factory.mktemp("denoise")
    save("gpt2", folder / "model")
    setting = circuits.Setting(d_vocab=V, n=3, length=7)
    methods = Methods(
        circuits,
        ("cutaway", "transformerlens"),
        (folder / "model", circuits.make_pairs(setting, folder / "pairs.safetensors")),
        None,
    )
    yield methods
    methods.close()


def test_denoising_is_transformerlens_attribution(transformerlens: Methods) -> None:
    """Its edges and its nodes, positions summed, are ours; a node does what its edges do together."""
    graph = transformerlens.graph
    ours = transformerlens.values("cutaway", "edges")["scores"]
    close_to(ours, transformerlens.values("transformerlens", "edges")["scores"].float())
    worker = transformerlens.workers["transformerlens"]
    theirs = transformerlens.values("transformerlens", "nodes")["scores"]
    theirs = theirs[transformerlens.circuits.places(worker.sources, graph.sources)].float()
    close_to(transformerlens.values("cutaway", "nodes")["scores"], theirs)
    close_to(ours.sum(1), theirs)


@pytest.mark.slow
def test_the_benchmark_runs(peer: Callable[[str], Path], checkout: Path, tmp_path: Path) -> None:
    """On a tiny model speed says nothing, so only the numbers are asked for."""
    peer("eap_ig")
    command = [sys.executable, BENCHMARKS / "circuits.py", "--peer", checkout, "--quick", "--threads", "1"]
    command += ["--only", "eap_ig", "circuits", "cost", "--out", tmp_path / "c.json", "--picture", tmp_path / "c.svg"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    record = json.loads((tmp_path / "c.json").read_text())
    assert record["peer_commit"] in done.stdout
    verdicts = {(row["name"], one["text"]): one for row in record["rows"] for one in row["verdicts"]}
    assert verdicts["eap_ig", "Spearman"]["met"]
    assert verdicts["eap_ig", "max |Δ| / max |score|"]["met"]
    assert verdicts["circuits", "max |Δ| / max |value|, of every size and pair"]["met"]
    assert all(point["seconds"]["eap_ig"] > 0 for several in record["cost"].values() for point in several)
    assert (tmp_path / "c.svg").read_text().count("<svg") == 5
