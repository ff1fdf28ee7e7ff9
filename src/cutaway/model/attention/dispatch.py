"""Attention internals, in the layers that a run asks for.

Most models look their attention function up by a name in their configuration. A run that asks for rot_q, rot_k, scores
or pattern in a layer makes that layer's attention module alone read a private copy of its configuration whose name
finds our function; the model's configuration object, which another model may share, is never written. Modules that
compute attention themselves have adapters (`attention_adapters.py`). Calls that do not belong to the asking run go to
the base kernel.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cutaway.artifacts.errors import CutawayError
from cutaway.model.attention import adapters
from cutaway.model.attention.adapters import Observed
from cutaway.model.attention.kernels import Eager, Watch, find_kernel

NAME = "cutaway"


class _Name(str):
    """A module's own attention setting in its text and in every comparison, ours where a function is looked up.

    Some modules also read the setting to decide what to compute before the call.
    """

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return other == NAME if type(other) is str and other == NAME else str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(NAME)


def private_config(module: nn.Module) -> Any:
    """A copy of an attention module's configuration that selects our function and changes no shared object."""
    config: Any = copy.copy(module.config)
    object.__setattr__(config, "_attn_implementation_internal", _Name(_implementation(module)))
    if config._attn_implementation != NAME:
        raise CutawayError("This version of transformers keeps its attention setting elsewhere; use transformers 5.")
    config._cutaway_base = module.config
    return config


def _eager(module: nn.Module) -> Eager:
    """The eager kernel of a module that dispatches. Raises CutawayError for one that does not."""
    forward: Any = inspect.unwrap(type(module).forward)
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    kernels = [name for name in names if name.endswith("eager_attention_forward")]
    if "ALL_ATTENTION_FUNCTIONS" not in names or len(kernels) != 1 or not hasattr(module, "config"):
        raise CutawayError(
            f"{type(module).__name__} does not dispatch through the attention interface of transformers."
        )
    return forward.__globals__[kernels[0]]


def _implementation(module: nn.Module) -> str:
    config: Any = getattr(module.config, "_cutaway_base", module.config)
    return config._attn_implementation or "eager"


def base_kernel(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function that the module would call without us."""
    return ALL_ATTENTION_FUNCTIONS.get_interface(_implementation(module), _eager(module))


def allowed(mask: Tensor | None, n_queries: int, n_keys: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys a query may attend to, bool [b or 1, 1, q, k], from any of the mask forms a kernel is given."""
    if mask is not None and mask.ndim == 4:
        return mask[..., :n_keys] if mask.dtype == torch.bool else mask[..., :n_keys] > torch.finfo(mask.dtype).min / 2
    queries = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]
    keys = torch.arange(n_keys, device=device)[None]
    seen = keys <= queries
    if window is not None:
        seen = seen & (keys > queries - window)
    seen = seen[None, None]
    return seen if mask is None else seen & mask[:, None, None, :n_keys].bool()


def _mask(module: nn.Module, mask: Any, query: Tensor, key: Tensor, options: dict[str, Any]) -> Tensor | None:
    """A mask of whatever form the base kernel is given, as numbers to add or as bool, or None where all is seen."""
    base = _implementation(module)
    if not (mask is None or isinstance(mask, Tensor)) or not (base in ("eager", "sdpa") or "flash" in base):
        raise CutawayError(
            f"What the attention kernel '{base}' computes is not known here; load the model with "
            "attn_implementation='sdpa' or 'eager' to see scores and patterns."
        )
    n_queries, n_keys = query.shape[2], key.shape[2]
    if mask is not None and mask.ndim == 4:
        return mask[..., :n_keys]
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if mask is None and (base == "eager" or not causal):
        return None
    if mask is not None and not causal:
        return mask[:, None, None, :n_keys].bool()
    # SDPA is given no mask where its causal one is all there is, so no window counts
    window = None if base == "sdpa" else options.get("sliding_window")
    return allowed(mask, n_queries, n_keys, window, query.device)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """query [b H q h], key and value [b KV k h] -> z [b q H h] and the pattern."""
    watch = adapters.watch(module)
    if watch is None:
        return base_kernel(module)(module, query, key, value, attention_mask, **options)
    return _observed(watch, module, query, key, value, attention_mask, **options)


def _observed(
    watch: Watch,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    query, key = watch.rotated(query, key)
    if not watch.wants("scores", "pattern"):
        seen: Any = _Ungrouped(module) if watch.execution is not None and watch.execution.ungrouped else module
        return base_kernel(module)(seen, query, key, value, attention_mask, **options)
    kernel = find_kernel(module, _eager(module))
    mask = _mask(module, attention_mask, query, key, options)
    shown = _implementation(module) == "eager"  # the others return no weights
    z, pattern = kernel.attend(watch, module, query, key, value, mask, own=not shown, **options)
    return z, pattern if shown else None


class _Ungrouped:
    """An attention module in the eyes of a kernel that is given as many keys as queries."""

    num_key_value_groups = 1

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def check_dispatch(model: PreTrainedModel, attention: nn.Module, observed: Observed | None = None) -> None:
    """Refuse an attention module whose scores and pattern would not be those that it computes, with the reason."""
    try:
        if observed is None and adapters.find(attention) is None:
            find_kernel(attention, _eager(attention))
    except CutawayError as error:
        raise CutawayError(f"{type(model).__name__} is not supported: {error}") from error


def switches(
    attention: nn.Module, observed: Observed | None = None
) -> Iterator[tuple[nn.Module, str, Callable[[], Any]]]:
    """What to shadow on which module so that a layer's attention is observed: attributes and makers of their values."""
    adapter = observed or adapters.find(attention)
    if adapter is None:
        yield attention, "config", lambda: private_config(attention)
    else:
        yield adapter.module, adapter.attribute, adapter.make


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, eager_mask)
