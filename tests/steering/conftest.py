"""A random dictionary for the small random Llama, and chat prompts of the shipped model."""

import pytest
import torch

from cutaway.dictionaries.dictionary import Dictionary, TopK

D, F = 32, 80


@pytest.fixture(scope="session")
def dictionary() -> Dictionary:
    generator = torch.Generator().manual_seed(1)
    decoder = torch.nn.functional.normalize(torch.randn(F, D, generator=generator), dim=1)
    return Dictionary(
        W_enc=decoder.T.contiguous(),
        b_enc=torch.zeros(F),
        W_dec=decoder,
        b_dec=0.1 * torch.randn(D, generator=generator),
        selector=TopK(4),
        site="blocks.1.resid_post",
    )
