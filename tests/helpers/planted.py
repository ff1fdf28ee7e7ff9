"""Activations made of a known sparse dictionary, so that what was learned can be compared with what is true."""

import torch
from torch import Tensor


def planted(d: int, n_features: int, n_tokens: int, active: float, seed: int) -> tuple[Tensor, Tensor]:
    """Unit features [F, d] and activations [n, d]: each feature is on with chance active/F, with strength 1 to 2."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.nn.functional.normalize(torch.randn(n_features, d, generator=generator), dim=1)
    on = torch.rand(n_tokens, n_features, generator=generator) < active / n_features
    strength = on * (1 + torch.rand(n_tokens, n_features, generator=generator))
    offset = 3 * torch.randn(d, generator=generator)
    noise = 0.01 * torch.randn(n_tokens, d, generator=generator)
    return features, strength @ features + offset + noise


def mean_max_cosine(found: Tensor, true: Tensor) -> float:
    """For each row of `true` [m, d] the largest signed cosine with a row of `found` [F, d]; their mean."""
    unit = torch.nn.functional.normalize
    return (unit(true.float(), dim=1) @ unit(found.float(), dim=1).T).amax(1).mean().item()
