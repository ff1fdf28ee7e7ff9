"""Cross-entropy of a linear output layer without ever holding all its logits."""

from typing import Any

import torch
from torch import Tensor

from cutaway.subjects.atlas.training.batches import IGNORED

_CHUNK = 2048  # rows whose logits exist at a time


class _LinearCrossEntropy(torch.autograd.Function):
    """Σ −log softmax(h·Wᵀ)[target]. Its gradients are formed chunk by chunk beside the value: d logits = p − onehot."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        narrow = weight.to(dtype)
        total = hidden.new_zeros((), dtype=torch.float32)
        d_hidden = torch.empty_like(hidden, dtype=torch.float32)
        d_weight = torch.zeros_like(weight, dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(targets), _CHUNK):
                rows = slice(start, start + _CHUNK)
                inputs, wanted = hidden[rows].to(dtype), targets[rows, None]
                logits = (inputs @ narrow.T).float()
                log_sum = logits.logsumexp(-1, keepdim=True)
                total += (log_sum - logits.gather(-1, wanted)).sum()
                error = logits.sub_(log_sum).exp_()
                error.scatter_add_(-1, wanted, torch.full_like(error[:, :1], -1.0))
                error = error.to(dtype)
                d_hidden[rows] = error @ narrow
                d_weight += error.T @ inputs
        ctx.save_for_backward(d_hidden.to(hidden.dtype), d_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return gradients[0] * d_hidden, gradients[0] * d_weight, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Summed cross-entropy, in nats, of logits hidden·weightᵀ.

    `hidden` [..., d], `weight` [V, d], `targets` int64 [...]; targets of -100 are left out. Matrix products run in
    `dtype`; the softmax is in float32. Differentiable in `hidden` and `weight`. Memory is O(chunk·V), not O(n·V).
    """
    flat, wanted = hidden.flatten(0, -2), targets.flatten()
    counted = wanted != IGNORED
    return _LinearCrossEntropy.apply(flat[counted], weight, wanted[counted], dtype)  # type: ignore[no-any-return]
