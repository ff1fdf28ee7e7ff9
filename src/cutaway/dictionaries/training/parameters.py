"""What is trained, and what the values that say how have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor


class Plain:
    """A dataclass of plain values that is read from files: a field that it does not have is an error there."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}


Setting = str | int | float | bool | Path | Plain | Sequence[object] | Mapping[str, object] | None
"""The value of a field of a recipe or of a training configuration, or what stands for it in a file."""


@dataclass(frozen=True, eq=False)
class Parameters:
    """Encoder and decoder both hold one latent per row, which the sparse gradients need.

    `blocks` are the widths of the tensors that the decoder writes, more than one for a crosscoder.
    """

    encoder: Tensor  # E [F, d_in], W_encᵀ
    encoder_bias: Tensor  # b [F]
    decoder: Tensor  # D [F, d_out]
    decoder_bias: Tensor  # b_dec [d_out]
    threshold: Tensor | None = None  # θ [F], JumpReLU
    gate_scale: Tensor | None = None  # r_mag [F], Gated
    magnitude_bias: Tensor | None = None  # b_mag [F], Gated
    skip: Tensor | None = None  # W_skip [d_out, d_in]
    blocks: tuple[int, ...] = ()

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], blocks: tuple[int, ...] = ()) -> "Parameters":
        """From what `tensors` returns."""
        named: dict[str, Any] = dict(tensors)
        return cls(**named, blocks=blocks)

    def tensors(self) -> dict[str, Tensor]:
        """By name, in a fixed order; only those that there are."""
        named = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "blocks"}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def decoder_norms(self, how: str = "l2") -> Tensor:
        """Length of each latent's decoder [F]: "l2" of the whole row, "sum" of the lengths of its blocks."""
        if how == "sum" and len(self.blocks) > 1:
            parts: Sequence[Tensor] = self.decoder.split(list(self.blocks), dim=1)
            return torch.stack([torch.linalg.vector_norm(part, dim=1) for part in parts]).sum(0)
        return torch.linalg.vector_norm(self.decoder, dim=1)
