"""A toy model of superposition in NumPy, gradients by hand: five features, two dimensions (Elhage et al. 2022).

python examples/superposition_numpy.py
"""

from collections.abc import Iterable

import numpy as np


def loss_and_gradients(W: np.ndarray, b: np.ndarray, x: np.ndarray, importance: np.ndarray):
    """L = mean over the batch of Σ_i I_i (x_i − x̂_i)² with x̂ = ReLU(Wᵀ W x + b), and dL/dW, dL/db.

    W [m, n], b [n], x [batch, n], importance [n].
    """
    h = x @ W.T  # [batch, m]: what is left of x in m dimensions
    pre = h @ W + b
    error = np.maximum(pre, 0) - x
    loss = (importance * error**2).sum() / len(x)
    d_pre = 2 * importance * error * (pre > 0) / len(x)  # the ReLU lets gradients pass where it is open
    d_h = d_pre @ W.T
    return loss, h.T @ d_pre + d_h.T @ x, d_pre.sum(0)  # W is used twice: to read out, and to write h


def train(
    W: np.ndarray, b: np.ndarray, batches: Iterable[np.ndarray], importance: np.ndarray, steps: int, rate: float = 1e-2
):
    """Adam, with a rate that falls linearly to 0. Returns W and b."""
    W, b = W.copy(), b.copy()
    parameters = [W, b]
    first, second = ([np.zeros_like(p) for p in parameters] for _ in range(2))
    for step, x in zip(range(steps), batches, strict=False):
        _, *gradients = loss_and_gradients(W, b, x, importance)
        for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
            m += 0.1 * (g - m)
            v += 0.001 * (g * g - v)
            m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
            p -= rate * (1 - step / steps) * m_hat / (np.sqrt(v_hat) + 1e-8)
    return W, b


def batches(density: float, n: int, size: int, random: np.random.Generator):
    """Each feature is 0, or with probability `density` uniform on [0, 1]."""
    while True:
        yield random.random((size, n)) * (random.random((size, n)) < density)


if __name__ == "__main__":
    for density in (1.0, 0.3, 0.03):
        random = np.random.default_rng(0)
        start = random.normal(size=(2, 5)) * (2 / 7) ** 0.5
        W, b = train(start, np.zeros(5), batches(density, 5, 512, random), 0.9 ** np.arange(5), steps=2000)
        norms, unit = np.linalg.norm(W, axis=0), W / np.linalg.norm(W, axis=0)
        D = norms**2 / ((unit.T @ W) ** 2).sum(1)
        print(f"density {density}: {(norms > 0.5).sum()} of 5 features in 2 dimensions, each with {D.round(2)} of one")
