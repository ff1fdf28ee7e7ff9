"""What an edit makes of a value."""

from __future__ import annotations

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.model.edits.edit import Edit
from cutaway.model.edits.values import registered_function


def changed(edit: Edit, block: Tensor, value: Tensor | None) -> Tensor:
    """The edited value of a block [n, ...one token's value], computed in fp32 or wider and cast back.

    `value` is what set, mean, patch and resample put there, the direction that add adds or the noise, already
    broadcastable to the block. With a basis B of orthonormal rows only the change within its span happens:
    x + (e(x) - x) Bᵀ B.
    """
    if "basis" not in edit.tensors:
        return _whole(edit, block, value)
    basis = edit.tensors["basis"]
    wide = block.to(torch.promote_types(block.dtype, torch.promote_types(torch.float32, basis.dtype)))
    basis = basis.to(device=wide.device, dtype=wide.dtype)
    change = _whole(edit, wide, value) - wide
    return (wide + (change @ basis.T) @ basis).to(block.dtype)


def _whole(edit: Edit, block: Tensor, value: Tensor | None) -> Tensor:
    if edit.kind == "zero":
        return torch.zeros_like(block)
    if edit.kind in ("set", "mean", "patch", "resample"):
        assert value is not None
        return value.to(block.dtype).expand_as(block)
    if edit.kind == "scale":
        return block * edit.numbers["factor"]
    if edit.kind == "function":
        return _applied(edit, block)
    wide = block.to(torch.promote_types(block.dtype, torch.float32))

    def vector(name: str) -> Tensor:
        return edit.tensors[name].to(device=wide.device, dtype=wide.dtype)

    if edit.kind == "add":
        assert value is not None
        result = wide + edit.numbers["scale"] * value.to(wide.dtype)
    elif edit.kind == "noise":
        assert value is not None
        result = wide + edit.numbers["std"] * value.to(wide.dtype)
    elif edit.kind == "project_out":
        u = vector("direction")
        result = wide - (wide @ u)[..., None] * u
    elif edit.kind == "clamp":
        u = vector("direction")
        projection = wide @ u
        kept = projection.clamp(edit.numbers.get("minimum"), edit.numbers.get("maximum"))
        result = wide + (kept - projection)[..., None] * u
    else:
        x = wide - vector("offset") if "offset" in edit.tensors else wide
        activation = (x @ vector("encoder") + edit.numbers["bias"]).relu()
        activation = activation * (activation > edit.numbers.get("threshold", 0.0))
        result = wide + (edit.numbers["value"] - activation)[..., None] * vector("decoder")
    return result.to(block.dtype)


def _applied(edit: Edit, block: Tensor) -> Tensor:
    function = registered_function(edit.function) if isinstance(edit.function, str) else edit.function
    assert function is not None
    result = function(block.clone())  # it may write into what it is given
    if not isinstance(result, Tensor) or result.shape != block.shape:  # pyright: ignore[reportUnnecessaryIsInstance]
        got = f"a tensor of shape {list(result.shape)}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
        raise CutawayError(f"The function of '{edit}' returned {got}; it was given {list(block.shape)}.")
    if result.is_complex() or result.device.type == "meta" or result.layout is not torch.strided:
        raise CutawayError(
            f"The function of '{edit}' returned numbers that are complex, or a tensor that is sparse or on the meta "
            "device."
        )
    if not bool(torch.isfinite(result).all()):
        raise CutawayError(f"The function of '{edit}' returned NaN or infinity.")
    return result.to(device=block.device, dtype=block.dtype)
