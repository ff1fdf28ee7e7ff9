"""The sites of a mixture of experts: what the router says, whom it chooses, what each expert writes.

The experts of a layer are one module, which is given tokens, the numbers of their experts and the weights of these.
What one expert writes is what that module returns when the weights of all others are zero; it is computed beside the
forward, only for the experts that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from cutaway.model.sites import template_of

_OUT = "mlp.experts.{e}.out"


class OnFirstLinear(TorchFunctionMode):
    """Inside the block, `change` sees and may replace the result of the first linear map: a router's logits."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change: Callable[[Tensor], Tensor] | None = change

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.change is not None and func in (functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__):
            change, self.change = self.change, None
            return change(result)
        return result


def wanted_experts(names: set[str], prefix: str) -> list[int]:
    """The numbers of the experts whose output is among these site names of the MLP `prefix` (blocks.3.mlp)."""
    inside = f"{prefix}.experts."
    return sorted(
        int(name[len(inside) :].split(".")[0])
        for name in names
        if name.startswith(inside) and template_of(name).endswith(_OUT)
    )
