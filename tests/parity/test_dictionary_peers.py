"""The peers' runs of the benchmark: their own trainers take the steps, and what they hand over is what they learned."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

D, K = 24, 4
WORKER = Path(__file__).resolve().parents[2] / "benchmarks" / "dictionary_peers.py"


@pytest.mark.parametrize(
    ("method", "selector"),
    [("saelens", "topk"), ("sparsify", "topk"), ("dictionary_learning", "topk"), ("saelens", "batchtopk")],
)
def test_a_peer_learns_with_its_own_trainer(
    tmp_path: Path, peer: Callable[[str], Path], method: str, selector: str
) -> None:
    python = peer(method)
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(48, D, generator=generator), dim=1)
    chosen = torch.randint(0, 48, (4_096, K), generator=generator)
    x = torch.nn.functional.embedding_bag(chosen, features, mode="sum") * 3
    save_file({"x": x[:3_072].contiguous(), "held": x[3_072:].contiguous()}, tmp_path / "x.safetensors")
    request = {
        "method": method, "data": str(tmp_path / "x.safetensors"), "d_sae": 96, "k": K, "batch": 256, "steps": 120,
        "selector": selector, "learning_rate": 3e-3, "last": 5, "curve": 20, "options": {"optimizer": "adam"},
    }  # fmt: skip
    done = subprocess.run([python, WORKER, json.dumps(request)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3_000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["curve"]) == {"1", *map(str, range(20, 120, 20)), *map(str, range(116, 121))}
    assert found["final_loss"] < 0.8 * found["curve"]["1"]
    assert found["variance_explained"] > 0.2
    assert K / 2 < found["l0"] <= K
    assert found["tokens_per_second"] > 0
