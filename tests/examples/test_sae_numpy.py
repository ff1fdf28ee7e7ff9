"""The autoencoder in NumPy has the gradients that torch finds, and its lesson holds."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "sae_numpy.py"
HERE = runpy.run_path(str(SCRIPT))


def small(seed: int = 0):
    random = np.random.default_rng(seed)
    return HERE["Sae"](*(random.normal(size=shape) for shape in ((5, 9), 9, (9, 5), 5))), random.normal(size=(7, 5))


def by_torch(sae, x, l1):
    tensors = [torch.tensor(p, requires_grad=True) for p in sae]
    W_enc, b_enc, W_dec, b_dec = tensors
    z = ((torch.tensor(x) - b_dec) @ W_enc + b_enc).relu()
    loss = (((z @ W_dec + b_dec - torch.tensor(x)) ** 2).sum() + l1 * z.abs().sum()) / len(x)
    loss.backward()
    return loss.item(), [p.grad.numpy() for p in tensors if p.grad is not None]


@pytest.mark.parametrize("l1", [0.0, 0.7])
def test_gradients_are_torch_s(l1: float):
    sae, x = small()
    loss, gradients = HERE["loss_and_gradients"](sae, x, l1)
    expected, by_autograd = by_torch(sae, x, l1)
    assert loss == pytest.approx(expected)
    for ours, theirs in zip(gradients, by_autograd, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_the_slip_differs_in_the_encoder_alone():
    sae, x = small(1)
    _, right = HERE["loss_and_gradients"](sae, x, 0.7)
    _, wrong = HERE["loss_and_gradients"](sae, x, 0.7, slip=True)
    _, none = by_torch(sae, x, 0.0)
    np.testing.assert_allclose(wrong.W_enc, none[0] + 0.7 * np.sign(sae.W_enc), atol=1e-12)
    assert not np.allclose(wrong.W_enc, right.W_enc)
    np.testing.assert_allclose(wrong.b_enc, none[1], atol=1e-12)  # nothing asks z to be small


def test_the_lesson(capsys: pytest.CaptureFixture[str]):
    runpy.run_path(str(SCRIPT), run_name="__main__")
    found = re.findall(r"(.+): L0 ([\d.]+) of 128 .*, (\d+) of 32 features", capsys.readouterr().out)
    l0 = {name: float(value) for name, value, _ in found}
    features = {name: int(n) for name, _, n in found}
    assert l0["penalty on z"] < 15
    assert features["penalty on z"] >= 28
    assert l0["the slip"] > 60 > l0["no penalty"] > l0["penalty on z"]
    assert features["the slip"] <= 3
