"""The benchmark trains densely by equations and autograd alone; our sparse training ends in the same weights."""

from importlib import import_module
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return import_module("dictionary_peers"), import_module("dictionary_ours")


def data(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    features = torch.nn.functional.normalize(torch.randn(64, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    chosen = torch.randint(0, 64, (n, 5), generator=generator)
    return torch.nn.functional.embedding_bag(chosen, features, mode="sum") * 4 + 0.1


@pytest.mark.parametrize("selector", ["topk", "batchtopk", "jumprelu"])
def test_sparse_and_dense_end_alike(module, selector: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peers, ours = module
    request = peers.Request("cutaway", "", d_sae=256, k=5, batch=128, steps=40, selector=selector, learning_rate=2e-3)
    kept = ours.TrainConfig
    monkeypatch.setattr(ours, "TrainConfig", lambda **named: kept(**named, dead_after=1_024))  # so that AuxK has work
    methods = ours.sparse(request, data(128, 1)), ours.dense(request, data(128, 1))
    for number in range(request.steps):
        for method in methods:
            method.step(data(128, 1 + number))
    sparse, dense = (method.weights() for method in methods)
    for name, value in vars(dense).items():
        if value is not None:
            assert (getattr(sparse, name) - value).abs().max() <= 2e-3 * value.abs().max(), name
    held = data(512, 99)
    found, wanted = (peers.measure(weights, held, selector, 5) for weights in (sparse, dense))
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-3)
    assert found["l0"] == pytest.approx(wanted["l0"], rel=1e-2)
    before = peers.measure(ours.sparse(request, data(128, 1)).weights(), held, selector, 5)
    assert found["loss"] < 0.9 * before["loss"]


def test_the_measure_is_what_it_says(module) -> None:
    """By hand, a token at a time."""
    peers, _ = module
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (6, 10), "b_enc": (10,), "W_dec": (10, 6), "b_dec": (6,)}
    weights = peers.Weights(**{name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()})
    x = torch.randn(20, 6, generator=generator)
    loss, active, fired = 0.0, 0, set()
    for token in x:
        h = (token - weights.b_dec) @ weights.W_enc + weights.b_enc
        chosen = [i for i in h.argsort(descending=True)[:3].tolist() if h[i] > 0]
        written = weights.b_dec + sum(h[i] * weights.W_dec[i] for i in chosen)
        loss += (token - written).square().sum().item() / 20
        active += len(chosen)
        fired |= set(chosen)
    found = peers.measure(weights, x, "topk", 3)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["l0"] == active / 20
    assert found["dead"] == pytest.approx(1 - len(fired) / 10)
