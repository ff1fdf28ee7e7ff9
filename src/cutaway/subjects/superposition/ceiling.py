"""What a linear read-out can know: one logistic regression per feature, at once. The ceiling for a sparse encoder."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cutaway.artifacts.progress import Progress
from cutaway.artifacts.statistics import bootstrap_interval
from cutaway.subjects.superposition.generator import Batch, FeatureGenerator
from cutaway.subjects.superposition.scores import HELD_OUT, rates

_TRAINING = HELD_OUT >> 1  # the probe's batches: neither a dictionary's nor those that judge
_THRESHOLDS = np.linspace(-6, 4, 41)


@dataclass(frozen=True)
class Ceiling:
    """Means over features of the probes' scores on held-out tokens."""

    tokens_trained: int
    """Tokens that the probes were trained on."""
    tokens: int
    """Held-out tokens that they were judged on."""
    precision: float
    """Share of the tokens where a probe says its feature is active on which it is."""
    recall: float
    """Share of the tokens on which a feature is active where its probe says so."""
    f1: float
    """Harmonic mean of precision and recall."""
    f1_interval: tuple[float, float]
    """95 % interval of `f1`, a bootstrap over features."""

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON."""
        return asdict(self)


def linear_ceiling(
    generator: FeatureGenerator, *, steps: int = 2000, batch: int = 1024, tokens: int = 65_536, rate: float = 1e-2
) -> Ceiling:
    """Train P(feature i active | x) = σ(w_i · x + c_i) for all features by Adam on fresh batches, and judge it.

    The threshold of each probe is the one of 41 that has the highest F1 on `tokens` tokens of its own; F1 is then
    measured on others, the same that judge dictionaries. Features count alike, however rare.

    Args:
        generator: The activations and their features.
        steps: Steps of training.
        batch: Tokens per step.
        tokens: Tokens that choose the thresholds, and as many others that judge; whole batches, at least one.
        rate: The learning rate: kept for half of the steps, then it falls linearly to 0.

    Returns:
        The means over features.
    """
    W, c, scale = fit_probes(generator, steps=steps, batch=batch, rate=rate)
    n = generator.world.n
    thresholds = torch.from_numpy(_THRESHOLDS).float()

    def counts(start: int, at: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Hits and positives for every threshold [G, n], and how often each feature is there [n]."""
        hits, fires = (torch.zeros(len(at), n, dtype=torch.int64) for _ in range(2))
        there = torch.zeros(n, dtype=torch.int64)
        for step in range(max(1, tokens // batch)):
            made = generator.batch(start + step, batch)
            logits, truth = torch.addmm(c, made.x / scale, W), made.dense(n) != 0
            there += truth.sum(0)
            for g, threshold in enumerate(at):
                on = logits > threshold
                fires[g] += on.sum(0)
                hits[g] += (on & truth).sum(0)
        return hits.numpy(), fires.numpy(), there.numpy()

    hits, fires, there = counts(_TRAINING + steps, thresholds[:, None].expand(-1, n))
    f1 = np.stack([rates(h, f, there)[2] for h, f in zip(hits, fires, strict=True)])
    chosen = thresholds[torch.from_numpy(f1.argmax(0))]
    hits, fires, there = counts(HELD_OUT, chosen[None])
    precision, recall, f1 = rates(hits[0], fires[0], there)
    return Ceiling(
        tokens_trained=steps * batch,
        tokens=max(1, tokens // batch) * batch,
        precision=float(precision.mean()),
        recall=float(recall.mean()),
        f1=float(f1.mean()),
        f1_interval=bootstrap_interval(f1),
    )


@torch.no_grad()
def fit_probes(
    generator: FeatureGenerator, *, steps: int, batch: int = 1024, rate: float = 1e-2
) -> tuple[Tensor, Tensor, float]:
    """Weights [d, n], biases [n], and the scale x is divided by: logistic regression on `steps` fresh batches.

    Mean over the batch of the cross-entropy, summed over features. Its gradient σ(logit) − y needs no dense y: 1 is
    taken off where a feature is active.
    """
    d, n = generator.world.d, generator.world.n
    scale = generator.batch(_TRAINING - 1, batch).x.norm(dim=1).mean().item() / d**0.5
    p = torch.from_numpy(generator.forest.frequency).float().clamp(1e-6, 1 - 1e-6)
    W, c = torch.zeros(d, n), torch.log(p / (1 - p))
    adam = torch.optim.Adam([W, c], lr=rate, fused=True)
    with Progress("linear probes", total=steps, unit="steps") as progress:
        for step in range(steps):
            adam.param_groups[0]["lr"] = rate * min(1.0, 2 * (1 - step / steps))
            made: Batch = generator.batch(_TRAINING + step, batch)
            x = made.x / scale
            error = torch.addmm(c, x, W).sigmoid_()
            error[made.tokens, made.features] -= 1
            # divided by each feature's frequency, so that Adam's ε and noise treat rare features like others
            error /= batch * p
            W.grad, c.grad = x.T @ error, error.sum(0)
            adam.step()
            if step % 50 == 49:
                progress.advance(50)
    return W, c, scale
