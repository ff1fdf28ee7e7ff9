"""Relevance patching: layer-wise relevance propagation as gradients (Jafari et al. 2025; Achtibat et al. 2024).

Attribution patching follows the gradient, which a norm's denominator, a saturated activation and a product bend. RelP
keeps the two forwards and the one backward and replaces the local Jacobians by the rules of LRP. Each is a stop of the
gradient, so that the forward stays what it is:

    norm            y = g · c(x) / scale(x).detach() + b                     (the LN rule)
    activation      y = x · (f(x) / x).detach()                              (the identity rule)
    gated product   y = ½ (gate · (y / gate).detach() + up · (y / up).detach())      (half to each factor)
    attention       z = pattern.detach() · v                                 (the AH rule; only where asked)

With all four a model without biases is linear in its embedding at the point where it stands: embedding · gradient,
summed, is the logit itself.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from cutaway.artifacts.errors import CutawayError, NotSupported
from cutaway.model.architecture.norms import Norm
from cutaway.model.architecture.parts import Layer, Projection
from cutaway.model.forward.shadow import shadowed
from cutaway.model.language_model import LanguageModel

Attention = Literal["gradient", "detach"]

Hook = Callable[[nn.Module, tuple[Any, ...], Any], Any]

_active: ContextVar[object | None] = ContextVar("cutaway_relp", default=None)


def relp_refusal(lm: LanguageModel, *, attention: Attention = "gradient") -> str | None:
    """Why this model has no RelP, or None where it has."""
    if any(layer.experts is not None for layer in lm.family.layers):
        return "it has mixtures of experts, for whose router and experts' activations RelP defines no rule"
    if attention == "detach" and lm.family.latent:
        return "its keys are built of a latent part and a shared rotary part, so attention='detach' cannot be set there"
    return None


@contextmanager
def relp_rules(lm: LanguageModel, *, attention: Attention = "gradient") -> Iterator[None]:
    """Inside the block every forward of this thread (or task) with gradients has RelP's rules in its graph.

    The values of a forward stay bit for bit what they are. A norm's scale is no place for a gradient here: a run that
    captures a norm's `scale` or `normalized` with `grad=` undoes the rule there.

    Args:
        lm: The model.
        attention: "gradient" differentiates the attention pattern as it is, "detach" holds it fixed (the AH rule).

    Raises:
        NotSupported: Mixtures of experts, and with "detach" latent attention; in the forward, a norm of queries or keys
            whose denominator cannot be found.

    Source: Jafari et al. 2025; Achtibat et al. 2024, https://arxiv.org/abs/2402.05602.

    Example:
        >>> lm = cutaway.load("atlas")
        >>> with relp_rules(lm):
        ...     run = lm.run("Dallas is in", capture="embed", grad=lambda logits: logits[0, -1].max())
        >>> run.grads["embed"].shape
        torch.Size([1, 5, 256])
    """
    if attention not in ("gradient", "detach"):
        raise CutawayError(f"attention={attention!r} is not 'gradient' or 'detach'")
    if (reason := relp_refusal(lm, attention=attention)) is not None:
        raise NotSupported(f"RelP is not defined for {lm.name}: {reason}; use AtP or integrated gradients")
    mine = object()
    with ExitStack() as stack:
        hooks = _Hooks(mine, stack)
        for layer in lm.family.layers:
            hooks.enter(layer)
            for norm in (layer.ln1, layer.ln2, layer.ln1_post, layer.ln2_post):
                if norm is not None:
                    hooks.norm(norm)
            for module in (layer.q_norm, layer.k_norm):
                if module is not None:
                    hooks.inner_norm(module)
            hooks.mlp(layer)
            if attention == "detach":
                for projection in layer.projections:
                    hooks.hold(projection)
        if lm.family.ln_final is not None:
            hooks.norm(lm.family.ln_final)
        token = _active.set(mine)
        stack.callback(_active.reset, token)
        yield


def with_gradient_of(value: Tensor, surrogate: Tensor) -> Tensor:
    """`value`, to the bit, with the gradient of `surrogate` (of the same shape)."""
    return value.detach() + (surrogate - surrogate.detach()).to(value.dtype)


def share(whole: Tensor, part: Tensor) -> Tensor:
    """(whole / part).detach(), and 0 where that is no number."""
    return (whole.detach() / part.detach()).nan_to_num(0.0, 0.0, 0.0)


class _Hooks:
    """Registers what the rules need; `mine` tells the forwards of this block from those of others."""

    def __init__(self, mine: object, stack: ExitStack) -> None:
        self.mine = mine
        self.stack = stack
        self.late: list[tuple[nn.Module, Hook]] = []  # of the layer at hand
        self.handles: dict[nn.Module, RemovableHandle] = {}
        stack.callback(lambda: [handle.remove() for handle in self.handles.values()])

    def on(self) -> bool:
        return torch.is_grad_enabled() and _active.get() is self.mine

    def enter(self, layer: Layer) -> None:
        """Begin a layer. Its late hooks are registered whenever it is entered, so that they see, and cut off, what the
        hooks of the run at hand (which captures queries, or an activation's input) have let through.
        """
        self.late = late = []

        def hook(_module: nn.Module, _args: tuple[Any, ...]) -> None:
            if self.on():
                for module, change in late:
                    if module in self.handles:
                        self.handles[module].remove()
                    self.handles[module] = module.register_forward_hook(change)

        self.stack.callback(layer.module.register_forward_pre_hook(hook).remove)

    def hook(self, change: Callable[[tuple[Any, ...], Tensor], Tensor | None]) -> Hook:
        return lambda _module, args, output: change(args, output) if self.on() else None

    def norm(self, norm: Norm) -> None:
        def linear(args: tuple[Any, ...], output: Tensor) -> Tensor:
            wide, scale = norm.divide(args[0])
            return with_gradient_of(output, norm.gain(wide / scale.detach(), output.dtype))

        self.stack.callback(norm.module.register_forward_hook(self.hook(linear)).remove)

    def inner_norm(self, module: nn.Module) -> None:
        """A norm of queries or keys, of whatever shape: its denominators are found in what it computes."""
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self.on():
                return original(*args, **kwargs)
            with _DetachedDenominators() as seen:
                result = original(*args, **kwargs)
            if not seen.found:
                raise NotSupported(
                    f"RelP found no denominator in {type(module).__name__}, a norm of queries or keys; use AtP or "
                    "integrated gradients"
                )
            return result

        self.stack.enter_context(shadowed(module, "forward", lambda: forward))

    def mlp(self, layer: Layer) -> None:
        assert layer.mlp_in is not None
        assert layer.mlp_out is not None
        factors: list[Tensor] = []

        def note(_args: tuple[Any, ...], output: Tensor) -> None:
            factors.extend(output.chunk(2, -1) if layer.mlp_fused else [output])

        def before(_module: nn.Module, args: tuple[Any, ...]) -> Any:
            if not self.on():
                return None
            post, parts = args[0], list(factors)
            factors.clear()
            surrogate = sum((part * share(post, part) for part in parts), torch.zeros_like(post)) / len(parts)
            return (with_gradient_of(post, surrogate), *args[1:])

        self.late.append((layer.mlp_in, self.hook(note)))
        if layer.mlp_linear is not None and not layer.mlp_fused:
            self.late.append((layer.mlp_linear, self.hook(note)))
        self.stack.callback(layer.mlp_out.register_forward_pre_hook(before).remove)

    def hold(self, projection: Projection) -> None:
        """No gradient through queries and keys: then none reaches the pattern."""
        held = {"q", "k"} & {*projection.parts}
        if not held:
            return

        def detach(_args: tuple[Any, ...], output: Tensor) -> Tensor:
            if held == {*projection.parts}:
                return output.detach()
            parts = projection.split(output)
            parts = {part: value.detach() if part in held else value for part, value in parts.items()}
            return projection.join(parts, output).view(output.shape)

        self.late.append((projection.module, self.hook(detach)))


class _DetachedDenominators(TorchFunctionMode):
    """Inside the block, what a norm divides by has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.rsqrt, Tensor.rsqrt, torch.sqrt, Tensor.sqrt):
            self.found = True
            return result.detach()
        if func in (functional.layer_norm, functional.rms_norm):
            self.found = True
            return with_gradient_of(result, _linear_norm(func, *args, **(kwargs or {})))
        return result


def _linear_norm(
    func: Any,
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-5,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    wide = x - x.mean(dims, keepdim=True) if func is functional.layer_norm else x
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    y = wide / (wide.pow(2).mean(dims, keepdim=True) + eps).sqrt().detach()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias
