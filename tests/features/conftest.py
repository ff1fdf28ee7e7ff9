"""A random dictionary for the middle layer of the small random Llama, and rows of token ids."""

import pytest
import torch

from cutaway.dictionaries.dictionary import Dictionary, TopK

D, F, K = 32, 24, 3


@pytest.fixture(scope="session")
def dictionary() -> Dictionary:
    generator = torch.Generator().manual_seed(1)
    decoder = torch.nn.functional.normalize(torch.randn(F, D, generator=generator), dim=1)
    return Dictionary(
        W_enc=decoder.T.contiguous() + 0.1 * torch.randn(D, F, generator=generator),
        b_enc=0.05 * torch.randn(F, generator=generator),
        W_dec=decoder,
        b_dec=0.1 * torch.randn(D, generator=generator),
        selector=TopK(K),
        site="blocks.1.resid_post",
    )


@pytest.fixture(scope="session")
def rows() -> torch.Tensor:
    ids = torch.randint(2, 61, (30, 14), generator=torch.Generator().manual_seed(2))
    ids[:, 0] = 0
    return ids
