"""Parts of an edit as plain JSON: what `edits.json` holds, and what an edit's digest is of."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.model.edits.positions import AtToken, Columns, Places

FORMAT, VERSION = "cutaway-edits", 1
FILES = ("edits.json", "edits.safetensors")
_DTYPES = {
    str(dtype).removeprefix("torch.")
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip


def tensor_record(tensor: Tensor) -> dict[str, Any]:
    """A tensor by the hash of its content. Raises CutawayError for a dtype that cannot be saved."""
    dtype, shape = str(tensor.dtype).removeprefix("torch."), list(tensor.shape)
    if dtype not in _DTYPES:
        raise CutawayError(f"An edit's values of the type {dtype} cannot be saved; convert them to float32.")
    digest = hashlib.sha256(f"{dtype}{shape}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return {"hash": digest.hexdigest(), "dtype": dtype, "shape": shape}


class Packed:
    """Tensors gathered under the hash of their content while records are made."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def add(self, tensor: Tensor) -> dict[str, Any]:
        """The tensor's record, which finds it again here."""
        record = tensor_record(tensor)
        self.tensors.setdefault(record["hash"], tensor)
        return record


def places_record(where: Places) -> Any:
    """Positions as JSON holds them."""
    if isinstance(where, slice):
        return {"slice": [where.start, where.stop, where.step]}
    if isinstance(where, Columns):
        return {"shape": where.shape, "columns": where.chosen}
    return asdict(where) if isinstance(where, AtToken) else where
