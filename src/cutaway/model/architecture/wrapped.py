"""What other libraries put around a model or into it: adapters, offloading, quantisation, compilation, parallel copies.

`unwrap` finds the causal language model inside. `linear_map` gives a projection's weight as it acts, whatever computes
it: an adapter's change is in it, and a quantised weight is what the module makes of it. It is found by asking the
module, so no format is read here; a module that is not linear has no such matrix, and says so.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cutaway.artifacts.errors import CutawayError, NotSupported

_OUTSIDE = {
    "poly": "(POLY) mixes its skills by a task id that comes with each prompt",
    "xlora": "(XLORA) weighs its experts by a first pass of the model over the whole prompt",
    "shadow": "(SHADOW) has a second model run beside the blocks, which hand its state on",
    "adaption_prompt": "(ADAPTION_PROMPT) puts trained keys and values before those of the prompt",
    "lily": "(LILY) mixes its experts by the mean over all tokens at once, so that a token hangs on later ones",
}
"""Adapters of PEFT, by the package of their modules, that do not act token by token in the projections they are on."""

_INSIDE = ("base_layer", "original_module", "token_adapter")  # what PEFT calls the module that it wraps
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


def unwrap(model: Any) -> Any:
    """The model of transformers inside a PEFT model, a compiled one, or one for data parallelism; others as they are.

    A compiled model is run uncompiled, with a warning. Raises `CutawayError` where what the wrapper does would be lost:
    adapters that put tokens before the prompt or act elsewhere than in their modules, modules compiled in place,
    weights that are sharded.
    """
    seen = model
    while isinstance(seen, nn.Module) and not isinstance(seen, PreTrainedModel):
        library = type(seen).__module__.partition(".")[0]
        inner = None
        if isinstance(seen, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = seen.module
        elif "_orig_mod" in seen._modules:  # torch.compile
            inner = seen._orig_mod
            warnings.warn(
                "the model was compiled: cutaway runs it uncompiled, since compiled code does not call hooks",
                stacklevel=3,
            )
        elif library == "peft":
            inner = _inside_peft(seen)
        if not isinstance(inner, nn.Module):
            return seen
        seen = inner
    if isinstance(seen, nn.Module):
        _check_modules(seen)
    return seen


def _inside_peft(model: Any) -> Any:
    configurations = getattr(model, "peft_config", None) or {}
    active = getattr(model, "active_adapters", None)
    active = active() if callable(active) else active
    for name, configuration in configurations.items() if isinstance(configurations, dict) else ():
        if getattr(configuration, "is_prompt_learning", False) and (not active or name in active):
            kind = getattr(configuration.peft_type, "value", configuration.peft_type)
            raise NotSupported(
                f"The adapter '{name}' ({kind}) puts trained tokens before the prompt, which the model inside does not "
                "see; attach the base model, or use adapters of weights such as LoRA."
            )
    found = getattr(model, "get_base_model", None)
    return found() if callable(found) else getattr(model, "model", None)


def _check_modules(model: nn.Module) -> None:
    for name, module in model.named_modules():
        where = f"its module '{name}'" if name else "the model"
        if "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None:
            raise NotSupported(
                f"{where} was compiled in place, and compiled code does not call hooks: load the model anew and attach "
                "it before compiling."
            )
        if (why := _acts_outside(module)) is not None:
            raise NotSupported(
                f"The adapter at {where} {why}, which cutaway cannot follow: look into the base model (unload() of the "
                "PEFT model gives it), or use adapters of weights such as LoRA."
            )
        if "FullyShardedDataParallel" in type(module).__name__ or type(module).__name__.startswith("FSDP"):
            raise NotSupported(
                f"{where} holds only a shard of its weights (FSDP): load the model with device_map instead."
            )


def _acts_outside(module: nn.Module) -> str | None:
    """What an adapter does that a run of the model inside has no part in, or that mixes tokens and rows; or None."""
    # X-LoRA leaves the class of a module and replaces its forward; aLoRA is a variant of LoRA's own modules
    for owner in (module, getattr(module.__dict__.get("forward"), "__self__", None)):
        library, _, rest = type(owner).__module__.partition(".tuners.")
        if library == "peft" and (why := _OUTSIDE.get(rest.partition(".")[0])) is not None:
            return why
    for name, variant in (module.__dict__.get("lora_variant") or {}).items():
        if "alora" in type(variant).__name__.lower():
            return f"'{name}' (aLoRA) acts from where its invocation tokens stand in a prompt"
    return None


def innermost(module: nn.Module) -> nn.Module:
    """The model's own module inside an adapter's; others as they are."""
    while (name := next((name for name in _INSIDE if module._modules.get(name) is not None), None)) is not None:
        module = module.get_submodule(name)
    return module


def in_force(module: nn.Module) -> nn.Module:
    """The module that runs where an adapter trained a copy of one: the copy, or the model's own."""
    copies = module._modules.get("ln_tuning_layers", module._modules.get("modules_to_save"))
    if copies is None:
        return module
    settings: Any = module
    active = [] if settings.disable_adapters or getattr(module, "merged_adapters", ()) else settings.active_adapters
    found = next((copies._modules[name] for name in active if name in copies._modules), None)
    return innermost(module) if found is None else found


def embedding_rows(module: nn.Module) -> Tensor:
    """The rows of a token embedding as they act, [V, d], without a scale that some families multiply them by.

    Of a plain embedding its parameter itself; one in an adapter is asked for all tokens each time.
    """
    own: Any = innermost(module)
    if own is module:
        found = parameter_of(module, "weight")
        assert found is not None
        return found
    with torch.no_grad():
        rows = module.forward(torch.arange(own.num_embeddings, device=device_of(module)))
        scale = getattr(own, "embed_scale", None)  # PEFT applies it too
        return rows if scale is None else rows / scale


def router_parameters(router: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """A router's weight [E, d] as it acts, and its bias, where it has such parameters itself.

    Adapters on the parameter count: they say what they add.
    """
    own = innermost(router)
    if own is not router and not hasattr(router, "parameter_name"):  # a linear module in an adapter
        return (linear_map(router).T, bias_of(router)) if no_matrix(router) is None else (None, None)
    found, bias = parameter_of(own, "weight"), parameter_of(own, "bias")
    layer: Any = router
    while layer is not own and found is not None:
        if getattr(layer, "parameter_name", None) != "weight":
            return None, None
        if not layer.disable_adapters and not layer.merged:
            for name in layer.active_adapters:
                if name in layer.lora_A:
                    found = found + layer.get_delta_weight(name).reshape(found.shape)
        layer = layer.base_layer
    return found, bias


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: the device of its parameters, or that to which accelerate brings them."""
    parameter = next(module.parameters(), None)
    if parameter is not None and parameter.device.type != "meta":
        return parameter.device
    place = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return torch.device("cpu" if place is None else place)


def parameter_of(module: nn.Module, name: str) -> Tensor | None:
    """A module's parameter, or None; one that accelerate keeps elsewhere is fetched.

    Raises `CutawayError` for a parameter on the meta device that is kept nowhere.
    """
    found = getattr(module, name, None)
    if not isinstance(found, Tensor) or found.device.type != "meta":
        return found if isinstance(found, Tensor) else None
    kept = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    if kept is None:
        raise CutawayError(
            f"its {type(module).__name__} has its weights on the meta device, where there are no numbers"
        )
    return kept[name].to(device_of(module))


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A model's parameters; those that accelerate keeps elsewhere fetched one by one, quantised ones as their parts."""
    for name, found in model.named_parameters():
        if found.device.type == "meta":
            owner, _, part = name.rpartition(".")
            fetched = parameter_of(model.get_submodule(owner), part)
            assert fetched is not None
            yield name, fetched
        else:
            yield from ((name, part) for part in _stored(found))


def _stored(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor of another library is made of."""
    if type(tensor) in (Tensor, nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for part in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
        yield from _stored(getattr(tensor, part))


def is_plain(module: nn.Module) -> bool:
    """Whether a projection is nothing but its weight, a matrix of real numbers, and a bias."""
    weight = module.__dict__.get("_parameters", {}).get("weight")
    if weight is None or type(weight) not in (nn.Parameter, Tensor) or hasattr(module, "base_layer"):
        return False
    if not weight.is_floating_point() or weight.itemsize < 2 or weight.ndim != 2:
        return False
    width = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return None in width or tuple(weight.shape) == (width[1], width[0])


def no_matrix(module: nn.Module) -> str | None:
    """Why a projection has no weight matrix that says what it does, or None if it has one."""
    if is_plain(module):
        return None
    width = _width_in(module)
    if width is None:
        return f"{type(module).__name__} does not say how many numbers it reads"
    dtype = _dtype_in(module)
    try:
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(4, width, generator=generator).to(device=device_of(module), dtype=dtype)
            a, b, both, none = _ask(module, torch.stack([x[0], x[1] * 3, x[0] + x[1] * 3, x[0] * 0]))
    except Exception as error:  # a kernel of another library may raise anything
        return f"{type(module).__name__} cannot be asked for it ({' '.join(str(error).split())[:80]})"
    wide = [v.double() - none.double() for v in (a, b, both)]
    error = float((wide[0] + wide[1] - wide[2]).abs().max() / wide[2].abs().max().clamp(min=1e-30))
    if error <= _TOLERANCE.get(dtype, 6e-2):
        return None
    if any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in module.modules()):
        return f"{type(module).__name__} is not linear while it trains (dropout): call eval() first"
    return f"{type(module).__name__} is not linear: it rounds what it reads too, so no matrix says what it does"


def linear_map(module: nn.Module) -> Tensor:
    """The weight of a projection as it acts, [in, out], in the dtype it computes in.

    A plain weight is the parameter itself (transposed). Any other is asked for, with as many rows as the projection
    reads: adapters and quantised weights cost about the forward of that many tokens each time, and nothing is kept,
    since adapters change. Raises `CutawayError` with the reason where there is no such matrix.
    """
    if is_plain(module):
        weight = parameter_of(module, "weight")
        assert weight is not None
        return weight if type(module).__name__ == "Conv1D" else weight.T
    if (reason := no_matrix(module)) is not None:
        raise NotSupported(f"This projection has no weight matrix: {reason}.")
    width = _width_in(module)
    assert width is not None
    with torch.no_grad():
        eye = torch.eye(width, dtype=_dtype_in(module), device=device_of(module))
        asked = _ask(module, torch.cat([eye, eye[:1] * 0]))
        return asked[:-1] - asked[-1]


def bias_of(module: nn.Module) -> Tensor | None:
    """What a projection adds, [out], or None; of one that is not plain, what it makes of zeros, if it is anything."""
    width = None if is_plain(module) else _width_in(module)
    if width is None:
        return parameter_of(module, "bias")
    with torch.no_grad():
        found = _ask(module, torch.zeros(1, width, dtype=_dtype_in(module), device=device_of(module)))[0]
    return found if bool(found.any()) else None


def _ask(module: nn.Module, x: Tensor) -> Tensor:
    """The module's answer, without the hooks on it: they belong to a run."""
    answer = module.forward(x[None])
    return (answer[0] if isinstance(answer, tuple) else answer)[0]


def _width_in(module: nn.Module) -> int | None:
    """How many numbers a projection reads."""
    for owner in (module, innermost(module)):
        width = getattr(owner, "in_features", None)
        if width is None and type(owner).__name__ == "Conv1D":
            width = getattr(owner, "nx", None)
        if isinstance(width, int):
            return width
    return None


def _dtype_in(module: nn.Module) -> torch.dtype:
    """In what a projection reads its input: its bias, its compute dtype or a real weight tells."""
    named = getattr(module, "compute_dtype", None)
    if isinstance(named, torch.dtype):
        return named
    base = innermost(module)
    for name in ("bias", "weight"):
        found = getattr(base, name, None)
        if isinstance(found, Tensor) and found.is_floating_point() and found.itemsize >= 2:
            return found.dtype
    return next((p.dtype for p in module.parameters() if p.is_floating_point() and p.itemsize >= 2), torch.float32)
