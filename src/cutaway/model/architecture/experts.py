"""The sites of a mixture of experts: what the router says, whom it chooses, what each expert writes.

The experts of a layer are one module, which is given tokens, the numbers of their experts and the weights of these.
What one expert writes is what that module returns when the weights of all others are zero; it is computed beside the
forward, only for the experts that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from cutaway.model.architecture.parts import Experts
from cutaway.model.architecture.wrapped import innermost
from cutaway.model.sites import template_of

if TYPE_CHECKING:
    from cutaway.model.forward.hooks import Installer

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


def _tap_logits(installer: Installer, router: nn.Module, name: str) -> None:
    """What the router's linear map gives, with what an adapter on it adds.

    An adapter on the router's weight makes products of its own before the router runs; one on a linear module of it
    adds to what that module gives.
    """
    own = router
    while hasattr(own, "parameter_name") and isinstance(inner := own._modules.get("base_layer"), nn.Module):
        own = inner
    adapted = next((m for m in own.modules() if innermost(m) is not m), None)
    if adapted is not None:
        installer.after(adapted, installer.at(name))
    else:
        installer.wrap(own, installer.at(name), OnFirstLinear)


def tap_experts(installer: Installer, experts: Experts, prefix: str) -> None:
    """Register what the sites of one mixture need."""
    ex = installer.ex
    logits, weights = f"{prefix}.router.logits", f"{prefix}.router.weights"
    if ex.wants(logits):
        _tap_logits(installer, experts.router, logits)
    chosen = wanted_experts({*ex.capture, *ex.edits}, prefix)
    if not chosen and not ex.wants(weights):
        return
    module, given = experts.module, list[tuple[Tensor, ...]]()

    def on_call(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not installer.mine():
            return None
        x, *routing = (*args, *kwargs.values())
        index, weight = sorted(routing, key=lambda t: t.is_floating_point())
        if ex.wants(weights):
            dense = torch.zeros(len(x), experts.n, dtype=weight.dtype, device=weight.device)
            dense = dense.scatter_add(1, index, weight)
            new = ex.touch(weights, installer.rows(dense))
            if ex.live(weights):  # then every expert may have a weight
                weight = new.view(dense.shape)
                index = torch.arange(experts.n, device=index.device).expand(len(x), -1)
        given[:] = [(x, index, weight)]
        return (x, index, weight), {}

    def on_return(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        if not installer.mine():
            return None
        x, index, weight = given.pop()
        changed = output
        for e in chosen:
            name = f"{prefix}.experts.{e}.out"
            mine = (index == e) & (weight != 0)
            tokens = mine.any(-1)
            alone = torch.zeros_like(output)
            if bool(tokens.any()):
                part = module.forward(x[tokens], index[tokens], weight[tokens].where(mine[tokens], 0.0))
                alone = alone.index_put((tokens.nonzero()[:, 0],), part.to(alone.dtype))
            value = installer.rows(alone)
            if ex.gradients:  # a step of its own in the graph, also of an expert that no token chose
                value = value.clone() if value.requires_grad else value.requires_grad_()
            new = ex.touch(name, value)
            if ex.gradients and name in ex.capture:
                changed = changed - alone + new.view(output.shape)
            elif new is not value:
                changed = changed + (new - value).view(output.shape)
        return None if changed is output else changed

    installer.handles.append(module.register_forward_pre_hook(on_call, with_kwargs=True))
    installer.handles.append(module.register_forward_hook(on_return))
