"""What files of dictionary_learning's autoencoders and of its crosscoders have in common."""

from pathlib import Path

import torch
from torch import Tensor

from cutaway.artifacts.errors import BadFile
from cutaway.artifacts.files import atomic_path
from cutaway.dictionaries.formats.reading import Source

CFG, WEIGHTS = "config.json", "ae.pt"


def normalisation(source: Source, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Mean, what x − mean is multiplied by, and what the output is divided by, each of `shape`; None if there is none.

    Stored are a mean, a standard deviation and one global scale per layer (arXiv 2504.02922's code), NaN when unused.
    """
    if "activation_mean" not in source:
        return None
    mean, std = source.tensors["activation_mean"], source.tensors.get("activation_std")
    if not isinstance(mean, Tensor) or not isinstance(std, Tensor) or mean.shape != shape or std.shape != shape:
        raise BadFile(f"{source.path}: activation_mean and activation_std are not both of shape {list(shape)}")
    if mean.isnan().any() or std.isnan().any():
        return None
    scale, rms = source.tensors.get("activation_global_scale"), source.number("target_rms", "of the normalisation")
    total = rms if rms is not None else 1.0
    one = total / std.square().sum(-1).add(1e-8).sqrt()
    if isinstance(scale, Tensor) and scale.shape == one.shape and torch.allclose(scale, one.to(scale), rtol=1e-3):
        source.take("activation_mean", "b_dec and b_enc", dims=len(shape))
        source.unused("activation_std", "its sum is in activation_global_scale")
        each = scale[..., None].expand(shape)
        return mean, each.clone(), each + 1e-8
    if isinstance(scale, Tensor) and not torch.allclose(scale, torch.ones_like(scale)):
        raise BadFile(f"{source.path}: activation_global_scale is not that of activation_std")
    source.take("activation_mean", "b_dec and b_enc", dims=len(shape))
    source.take("activation_std", "W_enc and W_dec", dims=len(shape))
    return mean, 1 / (std + 1e-8), 1 / (std + 1e-8)


def write_archive(path: Path, tensors: dict[str, Tensor]) -> None:
    """Named tensors as `torch.save` writes a state_dict: the format asks for it, and `weights_only` reads it."""
    with atomic_path(path) as temporary:
        torch.save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, temporary)
