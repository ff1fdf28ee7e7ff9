"""How queries, keys and values lie in what a projection, or one for all three, writes."""

from functools import partial

import torch
from torch import Tensor, nn

from cutaway.model.architecture.parts import Projection


def by_heads(module: nn.Module, part: str, n: int, direct: bool = True) -> Projection:
    """A projection of "q", "k" or "v" alone, n heads one behind the other."""
    return Projection(module, (part,), partial(_split_heads, part=part, n=n), partial(_join_heads, part=part), direct)


def in_turn(module: nn.Module, n_heads: int, n_kv: int) -> Projection:
    """All queries, then all keys, then all values."""
    return Projection(module, tuple("qkv"), partial(_split_in_turn, n_heads=n_heads, n_kv=n_kv), _join_in_turn)


def by_groups(module: nn.Module, n_heads: int, n_kv: int) -> Projection:
    """The queries, the key and the value of one key-value head after those of another."""
    return Projection(module, tuple("qkv"), partial(_split_groups, n_heads=n_heads, n_kv=n_kv), _join_groups)


def codegen(module: nn.Module, n_heads: int) -> Projection:
    """That of CodeGen."""
    return Projection(module, tuple("qkv"), partial(_split_codegen, n_heads=n_heads), _join_codegen)


def latent_values(module: nn.Module, n_heads: int, width: int) -> Projection:
    """The values, of this width, in what a latent state is expanded to."""
    layout = {"n_heads": n_heads, "width": width}
    return Projection(module, ("v",), partial(_split_latent, **layout), partial(_join_latent, **layout), direct=False)


def _split_heads(y: Tensor, part: str, n: int) -> dict[str, Tensor]:
    return {part: y.unflatten(-1, (n, -1))}


def _join_heads(parts: dict[str, Tensor], _: Tensor, part: str) -> Tensor:
    return parts[part].flatten(-2)


def _split_in_turn(y: Tensor, n_heads: int, n_kv: int) -> dict[str, Tensor]:
    q, k, v = y.unflatten(-1, (n_heads + 2 * n_kv, -1)).split((n_heads, n_kv, n_kv), -2)
    return {"q": q, "k": k, "v": v}


def _join_in_turn(parts: dict[str, Tensor], _: Tensor) -> Tensor:
    return torch.cat([parts["q"], parts["k"], parts["v"]], dim=-2).flatten(-2)


def _split_groups(y: Tensor, n_heads: int, n_kv: int) -> dict[str, Tensor]:
    groups = y.unflatten(-1, (n_kv, n_heads // n_kv + 2, -1))
    return {"q": groups[..., :-2, :].flatten(-3, -2), "k": groups[..., -2, :], "v": groups[..., -1, :]}


def _join_groups(parts: dict[str, Tensor], _: Tensor) -> Tensor:
    q = parts["q"].unflatten(-2, (parts["k"].shape[-2], -1))
    return torch.cat([q, parts["k"].unsqueeze(-2), parts["v"].unsqueeze(-2)], dim=-2).flatten(-3)


_CODEGEN_CORES = 4  # its projection was laid out for four accelerators: each holds q, v and k of its heads


def _split_codegen(y: Tensor, n_heads: int) -> dict[str, Tensor]:
    cores = y.unflatten(-1, (_CODEGEN_CORES, 3, n_heads // _CODEGEN_CORES, -1))
    return {part: cores[..., i, :, :].flatten(-3, -2) for i, part in enumerate("qvk")}


def _join_codegen(parts: dict[str, Tensor], _: Tensor) -> Tensor:
    cores = [parts[part].unflatten(-2, (_CODEGEN_CORES, -1)) for part in "qvk"]
    return torch.stack(cores, dim=-3).flatten(-4)


def _split_latent(y: Tensor, n_heads: int, width: int) -> dict[str, Tensor]:
    """Values out of what a latent state is expanded to: [b p n], or [b 1 p n] as a cache keeps it."""
    y = y.squeeze(1) if y.ndim == 4 else y
    return {"v": y.unflatten(-1, (n_heads, -1))[..., -width:]}


def _join_latent(parts: dict[str, Tensor], y: Tensor, n_heads: int, width: int) -> Tensor:
    rows = y.squeeze(1) if y.ndim == 4 else y
    return torch.cat([rows.unflatten(-1, (n_heads, -1))[..., :-width], parts["v"]], -1).flatten(-2).view(y.shape)
