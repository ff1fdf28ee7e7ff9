"""Normalisations: which one a module computes is found out by trying it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cutaway.artifacts.errors import CutawayError
from cutaway.model.architecture.wrapped import in_force, innermost, parameter_of

_EQUAL = 1e-7  # errors that differ by less are the same


@dataclass(frozen=True)
class Norm:
    """A norm: y = gain(center(x) / scale), scale = sqrt(mean(center(x)^2) + eps), computed in fp32 or wider.

    With its divisor left out and without its bias it is `linear`. `push` carries a change of its input forward,
    `pull` a direction of its output back: the two are each other's transpose.
    """

    module: nn.Module
    centered: bool
    eps: float
    offset: float  # Gemma stores the gain minus one
    gain_in_float: bool  # Gemma multiplies before the cast back, Llama after it

    @property
    def weight(self) -> Tensor | None:
        """The gain [d] in force now: an adapter may have one of its own, and be switched."""
        return parameter_of(in_force(self.module), "weight")

    @property
    def bias(self) -> Tensor | None:
        """The bias [d] in force now."""
        return parameter_of(in_force(self.module), "bias")

    def divide(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., d] -> centred x and its scale [..., 1], both in the dtype of the computation (fp32 or wider)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = self.center(wide)
        return wide, (wide.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def gain(self, normalized: Tensor, dtype: torch.dtype) -> Tensor:
        """The module's output for a normalised value [..., d]."""
        y = normalized if self.gain_in_float else normalized.to(dtype)
        if (weight := self.weight) is not None:
            weight = weight.to(y.dtype) if self.gain_in_float else weight
            y = y * (weight + self.offset if self.offset else weight)
        if (bias := self.bias) is not None:
            y = y + bias.to(y.dtype)
        return y.to(dtype)

    def center(self, x: Tensor) -> Tensor:
        """x [..., d] without its mean, where the norm takes it away."""
        return x - x.mean(-1, keepdim=True) if self.centered else x

    def times_gain(self, x: Tensor) -> Tensor:
        """x [..., d] times the gain, in the dtype of x."""
        if (weight := self.weight) is None:
            return x
        weight = weight.detach().to(x)
        return x * (weight + self.offset if self.offset else weight)

    def linear(self, x: Tensor) -> Tensor:
        """What the norm makes of x [..., d] but for its divisor and its bias: centred, times the gain."""
        return self.times_gain(self.center(x))

    def push(self, x: Tensor, scale: Tensor, normalized: Tensor, *, gain: bool = True) -> Tensor:
        """A small change x [..., d] of the norm's input, as it arrives at its output (or in front of its gain).

        `normalized` [..., d] is the value before the gain, `scale` [..., 1] its divisor: the Jacobian between centring
        and gain is (I - n n^T / d) / scale.
        """
        x = self.center(x)
        x = (x - normalized * (normalized * x).mean(-1, keepdim=True)) / scale
        return self.times_gain(x) if gain else x

    def pull(self, g: Tensor, scale: Tensor | None = None, normalized: Tensor | None = None) -> Tensor:
        """A direction or gradient g [..., d] at the norm's output, carried to its input.

        By the whole Jacobian (see `push`); without `normalized` with the divisor held fixed at `scale`; without either
        with the divisor left out, the transpose of `linear`.
        """
        g = self.times_gain(g)
        if normalized is not None:
            g = g - normalized * (normalized * g).mean(-1, keepdim=True)
        return self.center(g if scale is None else g / scale)


def probe_norm(module: nn.Module, d: int) -> Norm:
    """The norm that a module computes on the last dimension, of width d.

    Raises CutawayError, with the half of a sentence that says why, where it is neither a LayerNorm nor an RMS norm.
    """
    weight = parameter_of(in_force(module), "weight")
    if weight is not None and weight.shape != (d,):
        raise CutawayError(f"its norm {type(module).__name__} has a gain of another shape than the model's width")
    device = weight.device if weight is not None else torch.device("cpu")
    dtype = weight.dtype if weight is not None else torch.float32
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(4, d, generator=generator) * 3 + 1).to(device=device, dtype=dtype)
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 4e-2
    best: tuple[float, Norm] | None = None
    with torch.no_grad():
        expected = module(x).double()
        for norm in _candidates(module):
            wide, scale = norm.divide(x)
            y = norm.gain(wide / scale, dtype).double()
            error = float(((y - expected).abs() / (1 + expected.abs())).max())
            # bf16 and fp16 tell the two orders of cast and gain apart, fp32 does not: the first of equals is taken
            if error <= tolerance and (best is None or error < best[0] - _EQUAL):
                best = error, norm
            if best is not None and best[0] <= _EQUAL:
                break  # no other can be better
    if best is None:
        raise CutawayError(f"its norm {type(module).__name__} computes neither a LayerNorm nor an RMS norm")
    return best[1]


def _candidates(module: nn.Module) -> Iterator[Norm]:
    own = innermost(module)
    named = next((float(v) for n in ("eps", "variance_epsilon") if (v := getattr(own, n, None)) is not None), None)
    plain = isinstance(own, nn.LayerNorm)
    for eps in (1e-5, 1e-6) if named is None else (named,):
        for centered in (plain, not plain):
            for offset in (0.0, 1.0):
                # Gemma's offset comes with the wide gain; torch's own LayerNorm computes in fp32 throughout
                for wide in (True, False) if centered or offset else (False, True):
                    yield Norm(module, centered, eps, offset, wide)
