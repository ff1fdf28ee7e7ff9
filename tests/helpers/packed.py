"""A linear layer as libraries that quantise to 4 bits make them."""

import torch
from torch import Tensor, nn


class Packed4Bit(nn.Module):
    """A linear layer as quantising libraries make them: two weights a byte, with a scale a row."""

    def __init__(self, linear: nn.Linear, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.in_features, self.out_features, self.compute_dtype = linear.in_features, linear.out_features, compute_dtype
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 7
        levels = (linear.weight.detach() / scale).round().clamp(-8, 7).to(torch.int16).flatten() + 8
        self.weight = nn.Parameter((levels[::2] * 16 + levels[1::2]).to(torch.uint8)[:, None], requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def dense(self) -> Tensor:
        levels = torch.stack([self.weight[:, 0] // 16, self.weight[:, 0] % 16], dim=-1).view(self.out_features, -1)
        return (levels.float() - 8) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.to(self.compute_dtype), self.dense().to(self.compute_dtype), self.bias).to(
            x.dtype
        )
