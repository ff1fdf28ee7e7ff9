"""What superposition looks like: norms, interference, and how many dimensions each feature has (Elhage et al. 2022)."""

import torch
from torch import Tensor

POLYTOPES: dict[str, float] = {
    "alone": 1.0,
    "tetrahedron": 3 / 4,
    "triangle": 2 / 3,
    "digon": 1 / 2,
    "pentagon": 2 / 5,
    "square antiprism": 3 / 8,
}
"""The polytopes that the paper found, by the dimensionality of each of their features: m_polytope / n_vertices."""


def feature_norms(W: Tensor) -> Tensor:
    """‖W_i‖, how strongly each feature is represented.

    Args:
        W: Weights [..., m, n]; a column is a feature's direction.

    Returns:
        The norms [..., n].
    """
    return W.norm(dim=-2)


def interference(W: Tensor) -> Tensor:
    """Σ_{j≠i} (Ŵ_i · W_j)²: how much of other features lies in a feature's direction.

    Args:
        W: Weights [..., m, n]; a column is a feature's direction.

    Returns:
        The interference [..., n]; 0 where W_i is 0.
    """
    return _shared(W) - W.square().sum(-2)


def dimensionality(W: Tensor) -> Tensor:
    """D_i = ‖W_i‖² / Σ_j (Ŵ_i · W_j)²: 1 for a direction of its own, ½ for one of an antipodal pair, 0 for none.

    Features in a tight frame of their subspace share its dimensions equally, so that Σ_i D_i is the number of
    dimensions in use.

    Args:
        W: Weights [..., m, n]; a column is a feature's direction.

    Returns:
        The dimensionalities [..., n].
    """
    shared = _shared(W)
    return W.square().sum(-2) / shared.clamp_min(torch.finfo(W.dtype).tiny) * (shared > 0)


def dimensions_per_feature(W: Tensor) -> Tensor:
    """D* = m / ‖W‖²_F: as many dimensions as each represented feature gets.

    Args:
        W: Weights [..., m, n]; a column is a feature's direction.

    Returns:
        One number for each model [...].
    """
    return W.shape[-2] / W.square().sum((-2, -1))


def nearest_polytope(D: Tensor, within: float = 0.04) -> list[str]:
    """The polytope whose features have about these dimensionalities.

    Args:
        D: Dimensionalities of features [n] (`dimensionality`).
        within: The largest difference from a polytope's own.

    Returns:
        For each feature a key of POLYTOPES, “none” below 3/16, or “other”.
    """
    names = list(POLYTOPES)
    ideal = torch.tensor([POLYTOPES[name] for name in names], dtype=D.dtype)
    gap, place = (D[:, None] - ideal).abs().min(1)
    return [
        "none" if d < 3 / 16 else names[p] if g <= within else "other"
        for d, g, p in zip(D.tolist(), gap.tolist(), place.tolist(), strict=True)
    ]


def _shared(W: Tensor) -> Tensor:
    """Σ_j (Ŵ_i · W_j)²: [..., n]."""
    unit = torch.nn.functional.normalize(W, dim=-2, eps=torch.finfo(W.dtype).tiny)
    return (unit.mT @ W).square().sum(-1)
