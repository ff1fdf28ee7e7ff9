"""Random weights and batches for tests, and how far two tensors are apart."""

import torch
from torch import Tensor

from cutaway.dictionaries.training.parameters import Parameters
from cutaway.dictionaries.training.rules import GatedRule, JumpReLURule, Rule

DOUBLE = torch.float64


def random_parameters(
    d_in: int,
    n_latents: int,
    rule: Rule,
    *,
    d_out: int | None = None,
    skip: bool = False,
    blocks: tuple[int, ...] = (),
    seed: int = 0,
    dtype: torch.dtype = DOUBLE,
) -> Parameters:
    """Decoder rows of different lengths, biases and thresholds at which some latents fire and many do not."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    width = d_in if d_out is None else d_out
    jumps, gated = isinstance(rule, JumpReLURule), isinstance(rule, GatedRule)
    return Parameters(
        encoder=normal(n_latents, d_in) / d_in**0.5,
        encoder_bias=normal(n_latents) * 0.3 - 0.2,
        decoder=normal(n_latents, width) / width**0.5 * (1 + 0.3 * normal(n_latents, 1)),
        decoder_bias=normal(width) * 0.5,
        threshold=normal(n_latents).abs() * 0.5 if jumps else None,
        gate_scale=normal(n_latents) * 0.3 if gated else None,
        magnitude_bias=normal(n_latents) * 0.3 if gated else None,
        skip=normal(width, d_in) / d_in**0.5 if skip else None,
        blocks=blocks,
    )


def batch(n: int, d: int, seed: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def apart(got: Tensor, expected: Tensor) -> float:
    """Relative distance; of what should be zero the absolute one."""
    assert got.shape == expected.shape
    size = expected.norm().item()
    return ((got - expected).norm().item()) / (size if size > 1e-12 else 1.0)
