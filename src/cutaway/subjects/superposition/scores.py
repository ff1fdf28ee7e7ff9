"""How well found directions and codes match the true features. Whether a cosine is signed or absolute is in every name.

Definitions follow SynthSAEBench (arXiv 2602.14687) where it has them: MCC by assignment, uniqueness, precision, recall
and F1 of each latent for the feature of the highest |cosine|, shrinkage as the ratio of lengths.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.statistics import bootstrap_interval
from cutaway.subjects.superposition.generator import FeatureGenerator

HELD_OUT = 1 << 40  # batches from this number on are for judging: no training comes so far

Code = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Activations [B, d] -> latents [B, F] and reconstruction [B, d]."""


@dataclass(frozen=True, eq=False)
class Matching:
    """`latent[j]` is assigned to `feature[j]` with `cosine[j]`: min(F, n) pairs, no latent or feature twice."""

    latent: np.ndarray
    feature: np.ndarray
    cosine: np.ndarray

    @property
    def mcc(self) -> float:
        """Mean correlation coefficient: the mean cosine of the pairs."""
        return float(self.cosine.mean())

    def recovered(self, above: float = 0.9) -> int:
        """How many features have a latent with a cosine above `above`."""
        return int((self.cosine > above).sum())


def cosines(found: Tensor, true: Tensor) -> Tensor:
    """Signed cosines of found [F, d] with true [n, d] directions: [F, n]; 0 for a row of zeros."""
    if found.ndim != 2 or true.ndim != 2 or found.shape[1] != true.shape[1]:
        raise CutawayError(f"directions of shapes {list(found.shape)} and {list(true.shape)} cannot be compared")
    unit = torch.nn.functional.normalize
    return unit(found.double(), dim=1) @ unit(true.double(), dim=1).T


def assign(found: Tensor, true: Tensor, *, signed: bool) -> Matching:
    """The one-to-one assignment of latents to features with the highest sum of cosines (Hungarian algorithm).

    found [F, d], true [n, d]. `signed=False` takes |cosine|.
    """
    table = cosines(found, true).numpy()
    table = table if signed else np.abs(table)
    latent, feature = linear_sum_assignment(table, maximize=True)
    return Matching(latent, feature, table[latent, feature])


def nearest(found: Tensor, true: Tensor, *, signed: bool) -> Tensor:
    """For each true direction the highest cosine with any found one, latents shared: [n]. Not evidence of recovery."""
    table = cosines(found, true)
    return (table if signed else table.abs()).amax(0)


def uniqueness(found: Tensor, true: Tensor) -> float:
    """Different features that latents are nearest to by |cosine|, as a share of the latents."""
    return len(cosines(found, true).abs().argmax(1).unique()) / len(found)


@dataclass(frozen=True)
class Scores:
    """How well latents match true features, on held-out tokens.

    Attributes:
        latents: Latents, F.
        features: True features, n.
        tokens: Held-out tokens.
        mcc_signed: Mean signed cosine of latents and features after one-to-one assignment.
        mcc_absolute: Mean |cosine| after one-to-one assignment.
        recovered: Features that are assigned a latent with a signed cosine above 0.9.
        nearest_signed: Mean over features of the highest signed cosine without assignment (high by chance where latents
            are many and dimensions few).
        uniqueness: Different features that latents are nearest to by |cosine|, as a share of the latents.
        precision: Mean over latents, each for the feature of its highest |cosine|; 0 for latents that are never active.
        recall: Mean over latents, likewise.
        f1: Mean over latents of the harmonic mean of the two.
        f1_interval: 95 % interval of `f1`, a bootstrap over latents.
        explained: Share of the variance that is explained: 1 − Σ‖x − x̂‖² / Σ‖x − x̄‖² over all tokens.
        shrinkage: Mean of ‖x̂‖ / ‖x‖.
        dead: Share of latents that are never active.
        l0: Active latents per token, mean.
        true_l0: Active features per token, mean.
    """

    latents: int
    features: int
    tokens: int
    mcc_signed: float
    mcc_absolute: float
    recovered: int
    nearest_signed: float
    uniqueness: float
    precision: float
    recall: float
    f1: float
    f1_interval: tuple[float, float]
    explained: float
    shrinkage: float
    dead: float
    l0: float
    true_l0: float

    def to_json(self) -> dict[str, Any]:
        """The scores as JSON."""
        return asdict(self)


@torch.no_grad()
def score_dictionary(
    directions: Tensor, code: Code, generator: FeatureGenerator, *, tokens: int = 65_536, batch: int = 1024
) -> Scores:
    """Judge latents on held-out batches of a generator.

    Args:
        directions: The decoder's rows [F, d]; their lengths do not matter.
        code: A function from activations [B, d] to latent activations [B, F] and the reconstruction [B, d].
        generator: The activations and their features.
        tokens: Held-out tokens; whole batches, at least one.
        batch: Tokens per batch.

    Returns:
        The scores. Those of `random_code` are the control.

    Raises:
        CutawayError: Directions of another dimension than the generator's.
    """
    true = generator.directions
    F, n = len(directions), len(true)
    best = cosines(directions, true).abs().argmax(1)
    hits, fires, there = (torch.zeros(size, dtype=torch.int64) for size in (F, F, n))
    total = torch.zeros(true.shape[1], dtype=torch.float64)
    squares = errors = ratio = active = 0.0
    steps = max(1, tokens // batch)
    for step in range(steps):
        made = generator.batch(HELD_OUT + step, batch)
        latents, written = code(made.x)
        on, truth = latents != 0, made.dense(n) != 0
        hits += (on & truth[:, best]).sum(0)
        fires += on.sum(0)
        there += truth.sum(0)
        x = made.x.double()
        total += x.sum(0)
        squares += x.square().sum().item()
        errors += (x - written.double()).square().sum().item()
        length = made.x.norm(dim=1)
        ratio += (written.norm(dim=1) / length.clamp_min(1e-6))[length > 1e-6].mean().item()
        active += len(made.features) / batch
    count = steps * batch
    precision, recall, f1 = rates(hits.numpy(), fires.numpy(), there[best].numpy())
    signed = assign(directions, true, signed=True)
    return Scores(
        latents=F,
        features=n,
        tokens=count,
        mcc_signed=signed.mcc,
        mcc_absolute=assign(directions, true, signed=False).mcc,
        recovered=signed.recovered(),
        nearest_signed=nearest(directions, true, signed=True).mean().item(),
        uniqueness=uniqueness(directions, true),
        precision=float(precision.mean()),
        recall=float(recall.mean()),
        f1=float(f1.mean()),
        f1_interval=bootstrap_interval(f1),
        explained=1 - errors / (squares - total.square().sum().item() / count),
        shrinkage=ratio / steps,
        dead=(fires == 0).double().mean().item(),
        l0=fires.sum().item() / count,
        true_l0=active / steps,
    )


def random_code(latents: int, k: int, generator: FeatureGenerator, seed: int = 0) -> tuple[Tensor, Code]:
    """The control: random unit directions [F, d], of which the k largest positive products with x − x̄ are active.

    One gain for all activations is fitted by least squares; x̄ is the mean of a held-out batch. Directions that overlap
    would else add up to too much.

    Args:
        latents: Directions, F.
        k: Latents active per token at most.
        generator: The activations that the gain and the mean are taken from.
        seed: Of the directions.

    Returns:
        The directions, and the function from activations [B, d] to latent activations [B, F] and the reconstruction
        [B, d].

    Raises:
        CutawayError: k is below 1 or above F.
    """
    d = generator.world.d
    if not 1 <= k <= latents:
        raise CutawayError(f"k = {k} latents cannot be active out of {latents}")
    drawn = torch.randn(latents, d, generator=torch.Generator().manual_seed(seed))
    directions = torch.nn.functional.normalize(drawn, dim=1)
    sample = generator.batch(HELD_OUT - 1, 4096).x
    mean = sample.mean(0)

    def activations(x: Tensor) -> Tensor:
        products = (x - mean) @ directions.T
        values, places = products.topk(k, dim=1)
        return torch.zeros_like(products).scatter(1, places, values.relu())

    written, centred = activations(sample) @ directions, sample - mean
    gain = ((written * centred).sum() / written.square().sum().clamp_min(1e-12)).item()

    def code(x: Tensor) -> tuple[Tensor, Tensor]:
        latents = gain * activations(x)
        return latents, latents @ directions + mean

    return directions, code


COLUMNS: tuple[str, ...] = (
    "MCC ±",
    "MCC |·|",
    "recovered",
    "nearest ±",
    "unique",
    "precision",
    "recall",
    "F1",
    "variance",
    "shrink",
    "dead",
    "L0",
)
"""Heads of the columns of `score_rows`, the name's left out."""


def score_row(scores: Scores) -> list[str]:
    """The cells under COLUMNS."""
    s = scores
    return [
        f"{s.mcc_signed:.3f}",
        f"{s.mcc_absolute:.3f}",
        f"{s.recovered} of {s.features}",
        f"{s.nearest_signed:.3f}",
        f"{s.uniqueness:.3f}",
        f"{s.precision:.3f}",
        f"{s.recall:.3f}",
        f"{s.f1:.3f}",
        f"{s.explained:.3f}",
        f"{s.shrinkage:.3f}",
        f"{s.dead:.3f}",
        f"{s.l0:.2f}",
    ]


def score_rows(named: Mapping[str, Scores]) -> Sequence[list[str]]:
    """A table's rows: the name before the cells under COLUMNS.

    Args:
        named: The scores, each under its row's name.
    """
    return [[name, *score_row(scores)] for name, scores in named.items()]


def rates(hits: np.ndarray, fires: np.ndarray, there: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 from counts of true positives, of positives found, and there; 0 where undefined."""

    def share(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.divide(a, b, out=np.zeros(len(a)), where=b > 0)

    # F1 = 2 TP / (2 TP + FP + FN)
    return share(hits, fires), share(hits, there), share(2 * hits, fires + there)
