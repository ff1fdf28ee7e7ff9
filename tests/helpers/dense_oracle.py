"""The plain, slow training step: dense codes, PyTorch's autograd. What the sparse step must equal."""

import torch
from torch import Tensor

from cutaway.dictionaries.training.parameters import Parameters


def dense_loss(
    parameters: Parameters, x: Tensor, k: int, dead: Tensor | None = None, aux_k: int = 0, aux_coefficient: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(reconstruction, auxiliary) as the equations at the head of `step.py` say, dense."""
    h = (x - parameters.decoder_bias) @ parameters.encoder.T + parameters.encoder_bias
    a = torch.zeros_like(h).scatter(1, h.topk(k, dim=1).indices, 1.0) * h.relu()
    residual = x - (a @ parameters.decoder + parameters.decoder_bias)
    reconstruction = residual.square().sum(1).mean()
    if dead is None or not len(dead):
        return reconstruction, x.new_zeros(())
    only_dead = torch.full_like(h, -torch.inf)
    only_dead[:, dead] = h[:, dead]
    kept = only_dead.topk(min(aux_k, len(dead)), dim=1).indices
    a_dead = torch.zeros_like(h).scatter(1, kept, 1.0) * h.relu()
    auxiliary = (a_dead @ parameters.decoder - residual.detach()).square().sum(1).mean()
    return reconstruction, aux_coefficient * auxiliary


def dense_gradients(parameters: Parameters, x: Tensor, k: int, **auxiliary) -> tuple[Tensor, Tensor, Parameters]:
    """The two losses and the gradients of their sum."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in parameters.tensors().items()}
    reconstruction, extra = dense_loss(Parameters.of(leaves), x, k, **auxiliary)
    gradients = torch.autograd.grad(reconstruction + extra, list(leaves.values()))
    return reconstruction.detach(), extra.detach(), Parameters.of(dict(zip(leaves, gradients, strict=True)))
