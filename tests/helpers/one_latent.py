"""A dictionary of one latent, made of its vectors."""

import torch
from torch import Tensor

from cutaway.dictionaries.dictionary import Dictionary, JumpReLU, ReLU


def one_latent(
    site: str, encoder: Tensor, bias: float, decoder: Tensor, offset: Tensor | None = None, threshold: float = 0.0
) -> Dictionary:
    """relu above a threshold of (x - offset)·encoder + bias, written along the decoder."""
    return Dictionary(
        W_enc=encoder[:, None],
        b_enc=torch.tensor([bias]),
        W_dec=decoder[None],
        b_dec=torch.zeros_like(encoder) if offset is None else offset,
        selector=JumpReLU(torch.tensor([threshold])) if threshold else ReLU(),
        site=site,
        subtract_b_dec=offset is not None,
    )
