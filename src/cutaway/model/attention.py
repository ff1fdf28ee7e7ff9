"""Attention internals through Hugging Face's AttentionInterface.

One function is registered once. A run that asks for rot_q, rot_k, scores or pattern in a layer makes that layer's
attention module alone read a private copy of its configuration that names this function; the model's configuration
object, which another model may share, is never written. Calls that do not belong to the asking run go to the base
kernel.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cutaway.artifacts.errors import CutawayError

if TYPE_CHECKING:
    from cutaway.model.execution import Execution

NAME = "cutaway"


def private_config(module: nn.Module) -> Any:
    """A copy of an attention module's configuration that selects our function and changes no shared object."""
    config: Any = copy.copy(module.config)
    object.__setattr__(config, "_attn_implementation_internal", NAME)
    if config._attn_implementation != NAME:
        raise CutawayError("This version of transformers keeps its attention setting elsewhere; use transformers 5.")
    config._cutaway_base = module.config
    return config


def base_kernel(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function that the module would call without us."""
    config: Any = getattr(module.config, "_cutaway_base", module.config)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise CutawayError(
            f"{type(module).__name__} does not dispatch through the attention interface of transformers."
        )
    return ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)


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


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """query [b H q h], key and value [b KV k h] -> z [b q H h] and the pattern."""
    from cutaway.model.execution import active

    execution = active()
    layer = None if execution is None else execution.attention_layers.get(id(module))
    if execution is None or layer is None:
        return base_kernel(module)(module, query, key, value, attention_mask, **options)
    return _observed(execution, layer, module, query, key, value, attention_mask, **options)


def _observed(
    execution: Execution,
    layer: int,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    prefix = f"blocks.{layer}.attn"
    query = execution.touch(f"{prefix}.rot_q", query.transpose(1, 2)).transpose(1, 2)
    # keys arrive with the cached ones in front, always unedited, so an edit of theirs is applied at every step
    key = execution.touch(f"{prefix}.rot_k", key.transpose(1, 2)).transpose(1, 2)
    if not execution.wants(f"{prefix}.scores", f"{prefix}.pattern"):
        return base_kernel(module)(module, query, key, value, attention_mask, **options)
    if options.get("s_aux") is not None or options.get("position_bias") is not None:
        raise CutawayError(f"Layer {layer} uses attention sinks or a position bias, whose pattern is not observed yet.")
    groups = query.shape[1] // key.shape[1]
    keys, values = (t.repeat_interleave(groups, 1) if groups > 1 else t for t in (key, value))
    scaling = options.get("scaling")
    scores = torch.matmul(query, keys.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    softcap = options.get("softcap")
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    seen = allowed(attention_mask, query.shape[2], key.shape[2], options.get("sliding_window"), query.device)
    lowest = torch.finfo(scores.dtype).min
    scores = execution.touch(f"{prefix}.scores", scores.masked_fill(~seen, -torch.inf))
    # the softmax of a row without any key (padding) stays finite, as in the eager kernels
    scores = scores.masked_fill(scores == -torch.inf, lowest)
    wide = torch.float32 if execution.lm.family.softmax_in_float else scores.dtype
    pattern = torch.softmax(scores, dim=-1, dtype=torch.promote_types(wide, scores.dtype)).to(query.dtype)
    pattern = execution.touch(f"{prefix}.pattern", pattern)
    dropped = nn.functional.dropout(pattern, p=options.get("dropout", 0.0), training=module.training)
    return torch.matmul(dropped, values).transpose(1, 2).contiguous(), pattern


def check_dispatch(model: PreTrainedModel, attention: nn.Module) -> None:
    """Refuse an attention module that does not dispatch through the interface or has no configuration of its own."""
    if not hasattr(attention, "config"):
        raise CutawayError(f"{type(model).__name__} is not supported: its attention modules carry no configuration.")
    base_kernel(attention)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, eager_mask)
