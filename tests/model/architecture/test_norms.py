"""What a norm does to changes and directions, against autograd through the module itself, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cutaway.model.architecture.norms import Norm, probe_norm

D = 12


class RMSNorm(nn.Module):
    """As in Llama, in whatever dtype it is given; with `offset` 1 as in Gemma."""

    def __init__(self, gain: bool, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(D)) if gain else None
        self.offset, self.eps = offset, 1e-6

    def forward(self, x: Tensor) -> Tensor:
        y = x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        return y if self.weight is None else y * (self.weight + self.offset)


class OffsetLayerNorm(nn.LayerNorm):
    """As in Nemotron: a LayerNorm whose gain is stored minus one."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.layer_norm(input, self.normalized_shape, self.weight + 1, self.bias, self.eps)


KINDS = {
    "rms": lambda: RMSNorm(True),
    "rms, no gain": lambda: RMSNorm(False),
    "rms, 1 + w": lambda: RMSNorm(True, 1.0),
    "layer norm": lambda: nn.LayerNorm(D),
    "layer norm, no bias": lambda: nn.LayerNorm(D, bias=False),
    "layer norm, no gain": lambda: nn.LayerNorm(D, elementwise_affine=False),
    "layer norm, 1 + w": lambda: OffsetLayerNorm(D),
}


@pytest.fixture(params=list(KINDS))
def norm(request: pytest.FixtureRequest) -> Norm:
    module = KINDS[request.param]().double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(D, generator=generator, dtype=torch.float64))
    found = probe_norm(module, D)
    assert found.centered == isinstance(module, nn.LayerNorm)
    assert found.offset == (1.0 if "1 + w" in request.param else 0.0)
    return found


def drawn(seed: int) -> Tensor:
    return torch.randn(3, 5, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.7


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-11)


def test_a_change_and_a_gradient_go_through_as_autograd_says(norm: Norm) -> None:
    x, change, g = drawn(0), drawn(1), drawn(2)
    wide, scale = norm.divide(x)
    forward = torch.func.jvp(norm.module, (x,), (change,))[1]
    close(norm.push(change, scale, wide / scale), forward)
    close(norm.pull(g, scale, wide / scale), torch.func.vjp(norm.module, x)[1](g)[0])
    in_front = torch.func.jvp(lambda x: norm.divide(x)[0] / norm.divide(x)[1], (x,), (change,))[1]
    close(norm.push(change, scale, wide / scale, gain=False), in_front)


def test_with_the_divisor_fixed_or_left_out_it_is_linear(norm: Norm) -> None:
    x, g = drawn(3), drawn(4)
    wide, scale = norm.divide(x)
    bias = 0.0 if norm.bias is None else norm.bias.detach()
    close(norm.linear(x) / scale + bias, norm.module(x).detach())
    vjp = torch.func.vjp(lambda x: norm.gain(norm.divide(x)[0] / scale, torch.float64), x)[1]
    close(norm.pull(g, scale), vjp(g)[0])
    # pull is the transpose of linear, and of push
    close((norm.linear(x) * g).sum(-1), (x * norm.pull(g)).sum(-1))
    n = wide / scale
    close((norm.push(x, scale, n) * g).sum(-1), (x * norm.pull(g, scale, n)).sum(-1))


def test_a_matrix_behind_a_norm_is_read_in_front_of_it_bit_for_bit(norm: Norm) -> None:
    matrix = drawn(5)[0].mT  # [d, 5]
    weight = norm.weight
    expected = matrix if weight is None else (weight.detach() + norm.offset)[:, None] * matrix
    expected = expected - expected.mean(-2, keepdim=True) if norm.centered else expected
    assert torch.equal(norm.pull(matrix.mT).mT, expected)
