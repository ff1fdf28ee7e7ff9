"""A sparse autoencoder in NumPy, gradients by hand, and a slip that is copied from lesson to lesson.

python examples/sae_numpy.py

Data: 32 features as unit directions in 24 dimensions, three active at a time. The loss is the reconstruction's squared
error plus λ Σ z (Bricken et al. 2023; decoder rows of length 1). The slip adds λ·sign(W_enc) to the encoder's gradient
instead: that makes weights small and asks nothing of z, so L0 stays high and no feature is found, whatever λ
(0.002, 0.02 and 0.2 were tried).
"""

from typing import NamedTuple

import numpy as np


class Sae(NamedTuple):
    """z = ReLU((x − b_dec) W_enc + b_enc), x̂ = z W_dec + b_dec. W_enc [d, n], b_enc [n], W_dec [n, d], b_dec [d]."""

    W_enc: np.ndarray
    b_enc: np.ndarray
    W_dec: np.ndarray
    b_dec: np.ndarray


def encode(sae: Sae, x: np.ndarray) -> np.ndarray:
    return np.maximum((x - sae.b_dec) @ sae.W_enc + sae.b_enc, 0)


def loss_and_gradients(sae: Sae, x: np.ndarray, l1: float, slip: bool = False) -> tuple[float, Sae]:
    """The mean over the batch x [batch, d] of |x̂ − x|² + λ Σ z, and its gradients (with `slip`, the wrong ones)."""
    z, n = encode(sae, x), len(x)
    error = z @ sae.W_dec + sae.b_dec - x
    loss = ((error**2).sum() + l1 * z.sum()) / n
    d_out = 2 * error / n
    d_z = d_out @ sae.W_dec.T + (0 if slip else l1 / n)  # the penalty is on z ...
    d_pre = d_z * (z > 0)  # ... and reaches the weights through the open ReLUs only
    d_W_enc = (x - sae.b_dec).T @ d_pre + (l1 * np.sign(sae.W_enc) if slip else 0)
    return loss, Sae(d_W_enc, d_pre.sum(0), z.T @ d_out, d_out.sum(0) - d_pre.sum(0) @ sae.W_enc.T)


def train(x: np.ndarray, latents: int, l1: float, slip: bool = False, steps: int = 2000, rate: float = 3e-3) -> Sae:
    """Adam on random batches of 256; after each step the decoder's rows get length 1 again."""
    random = np.random.default_rng(0)
    W_dec = random.normal(size=(latents, x.shape[1]))
    W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
    sae = Sae(W_dec.T.copy(), np.zeros(latents), W_dec, x.mean(0))
    first, second = ([np.zeros_like(p) for p in sae] for _ in range(2))
    for step in range(1, steps + 1):
        _, gradients = loss_and_gradients(sae, x[random.integers(0, len(x), 256)], l1, slip)
        for p, g, m, v in zip(sae, gradients, first, second, strict=True):
            m += 0.1 * (g - m)
            v += 0.001 * (g * g - v)
            p -= rate * (1 - step / steps) * m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        sae.W_dec[:] /= np.linalg.norm(sae.W_dec, axis=1, keepdims=True)
    return sae


def data(n: int, features: np.ndarray, active: int = 3, seed: int = 0) -> np.ndarray:
    """Samples [n, d]: `active` features each, with strengths uniform on [0.5, 1.5]."""
    random = np.random.default_rng(seed)
    chosen = random.permuted(np.tile(np.arange(len(features)), (n, 1)), axis=1)[:, :active]
    return (random.uniform(0.5, 1.5, (n, active, 1)) * features[chosen]).sum(1)


if __name__ == "__main__":
    truth = np.random.default_rng(1).normal(size=(32, 24))
    truth /= np.linalg.norm(truth, axis=1, keepdims=True)
    x, fresh = data(20_000, truth), data(2_000, truth, seed=1)
    for name, l1, slip in (("penalty on z", 0.4, False), ("the slip", 0.02, True), ("no penalty", 0.0, False)):
        sae = train(x, 128, l1, slip)
        z = encode(sae, fresh)
        mse = ((z @ sae.W_dec + sae.b_dec - fresh) ** 2).sum(1).mean() / fresh.var(0).sum()
        found = ((truth @ sae.W_dec.T).max(1) > 0.9).sum()
        print(f"{name}: L0 {(z > 0).sum(1).mean():.1f} of 128 (3 are active), {found} of 32 features, error {mse:.3f}")
