"""Weighted cross-entropy of a linear output layer without ever holding all its logits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_CHUNK = 2048  # rows whose logits exist at a time


SoftmaxLoss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def softmax_loss(logits: Tensor, wanted: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Σ weight · −log softmax(logits)[wanted], and its gradient in the logits: weight · (p − onehot)."""
    wide = logits.float()
    log_sum = wide.logsumexp(-1, keepdim=True)
    loss = ((log_sum - wide.gather(-1, wanted[:, None])) * weights[:, None]).sum()
    hot = torch.arange(logits.shape[-1], device=logits.device) == wanted[:, None]
    return loss, (((wide - log_sum).exp() - hot.float()) * weights[:, None]).to(logits.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """Its gradients are formed chunk by chunk beside the value."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        dtype: torch.dtype,
        softmax: SoftmaxLoss,
    ) -> Tensor:
        narrow = weight.to(dtype)
        total = hidden.new_zeros((), dtype=torch.float32)
        d_hidden = torch.empty_like(hidden, dtype=torch.float32)
        d_weight = torch.zeros_like(weight, dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(targets), _CHUNK):
                rows = slice(start, start + _CHUNK)
                inputs = hidden[rows].to(dtype)
                loss, error = softmax(inputs @ narrow.T, targets[rows], weights[rows])
                total += loss
                d_hidden[rows] = error @ narrow
                d_weight += error.T @ inputs
        ctx.save_for_backward(d_hidden.to(hidden.dtype), d_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return gradients[0] * d_hidden, gradients[0] * d_weight, None, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    softmax: SoftmaxLoss = softmax_loss,
) -> Tensor:
    """Weighted sum of the cross-entropy, in nats, of logits hidden·weightᵀ.

    `hidden` [..., d], `weight` [V, d], `targets` int64 [...], `weights` float [...], one per target; where it is zero
    the target may be anything. Matrix products run in `dtype`; the softmax is in float32. `softmax` may be
    `softmax_loss` as `torch.compile` made it. Differentiable in `hidden` and `weight`. Memory is O(chunk·V), not
    O(n·V).
    """
    flat, wanted, counted = hidden.flatten(0, -2), targets.flatten().clamp_min(0), weights.flatten().float()
    return _LinearCrossEntropy.apply(flat, weight, wanted, counted, dtype, softmax)  # type: ignore[no-any-return]
