"""Attention modules that compute attention themselves instead of looking a function up.

Each adapter repeats what a module of transformers computes from its queries, keys and values on, in the same
operations, so that the result has the same bits, and shows what passes to the observing run. It shadows one attribute
of one module while a run asks for that layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cutaway.artifacts.errors import CutawayError
from cutaway.model.attention.kernels import Watch, visible
from cutaway.model.forward.current import active

Shown = Callable[..., Any]
"""(watch, module, the module's own arguments...) -> what the module's own method returns."""


class Observed(Protocol):
    """Which attribute of which module a run shadows to observe its attention, and with what."""

    @property
    def module(self) -> nn.Module: ...
    @property
    def attribute(self) -> str: ...
    def make(self) -> Callable[..., Any]: ...


@dataclass(frozen=True)
class Adapter:
    """Which attribute of which module a run shadows."""

    module: nn.Module
    attribute: str
    shown: Shown

    def make(self) -> Callable[..., Any]:
        """The shadow: `shown` in runs that ask for this module, the module's own method in all other calls."""
        module, own, shown = self.module, getattr(self.module, self.attribute), self.shown

        def observed(*args: Any, **kwargs: Any) -> Any:
            seen = watch(module)
            return own(*args, **kwargs) if seen is None else shown(seen, module, *args, **kwargs)

        return observed


def watch(module: nn.Module) -> Watch | None:
    """What the running execution, if it asks for this attention module, wants to see of it."""
    execution = active()
    layer = None if execution is None else execution.attention_layers.get(id(module))
    return None if layer is None else Watch(execution, f"blocks.{layer}.attn")


def _softmax(dtype: torch.dtype, logits: Tensor) -> Tensor:
    return F.softmax(logits, dim=-1).to(dtype)


def _softmax_in_float(dtype: torch.dtype, logits: Tensor) -> Tensor:
    return F.softmax(logits, dim=-1, dtype=torch.float32).to(dtype)


def _gpt_j(seen: Watch, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None):
    """`GPTJAttention._attn`: query, key, value [b H q h] -> z [b H q h], pattern."""
    query, key = seen.rotated(query, key)
    logits = torch.matmul(query.to(torch.float32), key.to(torch.float32).transpose(-1, -2)) / module.scale_attn
    if attention_mask is not None:
        logits = logits + attention_mask
    pattern = seen.weigh(logits, attention_mask, partial(_softmax, value.dtype))
    return torch.matmul(module.attn_dropout(pattern), value), pattern


def _codegen(seen: Watch, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None):
    """`CodeGenAttention._attn`: divides after the mask."""
    query, key = seen.rotated(query, key)
    logits = torch.matmul(query.to(torch.float32), key.to(torch.float32).transpose(-1, -2))
    if attention_mask is not None:
        logits = logits + attention_mask
    pattern = seen.weigh(logits / module.scale_attn, attention_mask, partial(_softmax, value.dtype))
    return torch.matmul(module.attn_dropout(pattern), value), pattern


def _gpt_neo(seen: Watch, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None):
    """`GPTNeoSelfAttention._attn`: no scale; its own causal or local mask beside the given one."""
    query, key = seen.rotated(query, key)
    logits = torch.matmul(query.to(torch.float32), key.to(torch.float32).transpose(-1, -2))
    n_queries, n_keys = logits.shape[-2:]
    own = module.bias[:, :, n_keys - n_queries : n_keys, :n_keys]
    lowest = torch.tensor(torch.finfo(logits.dtype).min, dtype=logits.dtype, device=logits.device)
    logits = torch.where(own, logits, lowest)
    mask = own
    if attention_mask is not None:
        logits = logits + attention_mask
        mask = own & visible(attention_mask)
    pattern = seen.weigh(logits, mask, partial(_softmax, value.dtype))
    return torch.matmul(module.attn_dropout(pattern), value), pattern


def _gpt_2_upcast(
    seen: Watch, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
):
    """`GPT2Attention._upcast_and_reordered_attn`, which its eager kernel is with `reorder_and_upcast_attn`."""
    query, key = seen.rotated(query, key)
    b, n_heads, n_queries, width = query.shape
    n_keys = key.shape[2]
    q, k = query.reshape(-1, n_queries, width), key.transpose(-1, -2).reshape(-1, width, n_keys)
    with torch.autocast(query.device.type, enabled=False):
        room = torch.empty(b * n_heads, n_queries, n_keys, dtype=torch.float32, device=query.device)
        logits = torch.baddbmm(room, q.float(), k.float(), beta=0, alpha=module.scaling)
    logits = logits.reshape(b, n_heads, n_queries, n_keys)
    if attention_mask is not None:
        logits = logits + attention_mask
    pattern = seen.weigh(logits, attention_mask, partial(_softmax, value.dtype))
    return torch.matmul(module.attn_dropout(pattern), value).transpose(1, 2), pattern


def _bloom(
    seen: Watch,
    module: Any,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Tensor | None,
    layer_past: Any = None,
    **_: Any,
):
    """`BloomAttention.forward`: ALiBi as the summand of the product."""
    query, key, value = module._reshape(module.query_key_value(hidden_states))
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    query, key = seen.rotated(query, key)
    b, n_heads, n_queries, width = query.shape
    q, k, v = (t.reshape(b * n_heads, -1, width) for t in (query, key, value))
    logits = alibi.baddbmm(batch1=q, batch2=k.transpose(-1, -2), beta=module.beta, alpha=module.inv_norm_factor)
    logits = logits.view(b, n_heads, n_queries, -1)
    if attention_mask is not None:
        logits = logits + attention_mask
    pattern = seen.weigh(logits, attention_mask, partial(_softmax_in_float, query.dtype))
    z = torch.bmm(module.attention_dropout(pattern).reshape(b * n_heads, n_queries, -1), v)
    written = module.dense(module._merge_heads(z))
    return residual + F.dropout(written, p=module.hidden_dropout, training=module.training), pattern


def _mpt(
    seen: Watch,
    module: Any,
    hidden_states: Tensor,
    position_bias: Tensor | None,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    **_: Any,
):
    """`MptAttention.forward`: its bool mask is True where a query may not look."""
    b, n_queries = hidden_states.shape[:2]
    qkv = module.Wqkv(hidden_states)
    if module.clip_qkv:
        qkv = qkv.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    query, key, value = (
        t.reshape(b, n_queries, module.n_heads, module.head_dim).transpose(1, 2) for t in qkv.chunk(3, dim=2)
    )
    cached = 0
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, module.layer_idx)
        cached = past_key_values.get_seq_length()
    query, key = seen.rotated(query, key)
    logits = torch.matmul(query, key.transpose(-1, -2)) * module.softmax_scale
    if position_bias is not None:
        start = (max(0, position_bias.size(1) - n_queries - cached), max(0, position_bias.size(2) - key.shape[-2]))
        logits = logits + position_bias[:, start[0] :, start[1] :]
    if attention_mask is not None:
        logits = logits.masked_fill(attention_mask, torch.finfo(query.dtype).min)
    pattern = seen.weigh(
        logits,
        None if attention_mask is None else ~attention_mask,
        lambda logits: F.softmax(logits.float(), dim=-1).to(value.dtype),
    )
    z = torch.matmul(F.dropout(pattern, p=module.attn_dropout_p, training=module.training), value)
    return module.out_proj(z.permute(0, 2, 1, 3).contiguous().view(b, n_queries, -1)), pattern


def _falcon(
    seen: Watch,
    module: Any,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **_: Any,
):
    """`FalconAttention.forward`. Under SDPA the mask brings ALiBi with it; the eager kernel adds ALiBi once more."""
    b, n_queries = hidden_states.shape[:2]
    query, key, value = (t.transpose(1, 2) for t in module._split_heads(module.query_key_value(hidden_states)))
    if alibi is None:
        assert position_embeddings is not None
        cos, sin = (t.unsqueeze(1) for t in position_embeddings)
        query, key = (t * cos + _rotate_half(t) * sin for t in (query, key))
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    # the new decoder architecture repeats its keys for all heads before it turns them
    groups = key.shape[1] // module.num_kv_heads
    query, turned = seen.rotated(query, key[:, ::groups])
    if seen.live("rot_k"):
        key = turned.repeat_interleave(groups, 1)
    sdpa = module.config._attn_implementation == "sdpa" and not output_attentions
    causal = sdpa and module.is_causal and attention_mask is None and n_queries > 1
    dropout = partial(F.dropout, p=0.0 if alibi is None else module.attention_dropout.p, training=module.training)
    if sdpa and not seen.wants("scores", "pattern"):
        rate = module.attention_dropout.p if module.training and alibi is not None else 0.0
        z, pattern = F.scaled_dot_product_attention(query, key, value, attention_mask, rate, causal), None
    else:
        logits = query @ key.transpose(-1, -2)
        if alibi is None or sdpa:
            logits = logits / math.sqrt(module.head_dim)
        else:
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logits = (logits + alibi.view(b, module.num_heads, 1, -1)) * module.inv_norm_factor
        if causal:
            attention_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attention_mask, torch.finfo(query.dtype).min)
        elif attention_mask is not None:
            logits = logits + attention_mask
        pattern = seen.weigh(
            logits, attention_mask, lambda logits: F.softmax(logits, dim=-1, dtype=hidden_states.dtype)
        )
        z = dropout(pattern) @ value
    return module.dense(z.transpose(1, 2).reshape(b, n_queries, -1)), pattern


def _rotate_half(x: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat((-right, left), dim=-1)


def _xglm(
    seen: Watch,
    module: Any,
    hidden_states: Tensor,
    key_value_states: Tensor | None = None,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    **_: Any,
):
    """`XGLMAttention.forward` without cross-attention; rot_q is shown before the scale, as elsewhere."""
    if key_value_states is not None:
        raise CutawayError("Cross-attention of XGLM is not observed; run it without encoder states.")
    b, n_queries = hidden_states.shape[:2]
    query, key, value = (
        project(hidden_states).view(b, n_queries, -1, module.head_dim).transpose(1, 2)
        for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    if past_key_values is not None:
        cache = getattr(past_key_values, "self_attention_cache", past_key_values)
        key, value = cache.update(key, value, module.layer_idx)
    query, key = seen.rotated(query, key)
    q, k, v = (t.reshape(b * module.num_heads, -1, module.head_dim) for t in (query * module.scaling, key, value))
    logits = torch.bmm(q, k.transpose(1, 2)).view(b, module.num_heads, n_queries, -1)
    if attention_mask is not None:
        lowest = torch.full((), torch.finfo(logits.dtype).min, device=logits.device)
        logits = torch.max(logits + attention_mask, lowest)
    wide = torch.float32 if logits.dtype == torch.float16 else logits.dtype
    pattern = seen.weigh(logits, attention_mask, lambda logits: F.softmax(logits, dim=-1, dtype=wide).to(value.dtype))
    weights = F.dropout(pattern, p=module.dropout, training=module.training)
    z = torch.bmm(weights.reshape(b * module.num_heads, n_queries, -1), v)
    z = z.view(b, module.num_heads, n_queries, module.head_dim).transpose(1, 2).reshape(b, n_queries, -1)
    return module.out_proj(z), pattern


_ADAPTERS: dict[str, tuple[str, Shown]] = {
    "GPTJAttention": ("_attn", _gpt_j),
    "CodeGenAttention": ("_attn", _codegen),
    "GPTNeoSelfAttention": ("_attn", _gpt_neo),
    "BloomAttention": ("forward", _bloom),
    "MptAttention": ("forward", _mpt),
    "FalconAttention": ("forward", _falcon),
    "XGLMAttention": ("forward", _xglm),
}


def find(attention: nn.Module) -> Adapter | None:
    """The adapter of an attention module of transformers; None for a module that needs none, or has none.

    Raises CutawayError where a setting of the module makes it compute something else.
    """
    module, kind = attention, type(attention)
    if not kind.__module__.startswith("transformers."):
        return None
    if kind.__name__ == "GPTNeoAttention":
        assert isinstance(attention.attention, nn.Module)
        module, kind = attention.attention, type(attention.attention)
    if kind.__name__ == "GPT2Attention":
        upcast = getattr(module, "reorder_and_upcast_attn", False)
        config: Any = getattr(module.config, "_cutaway_base", module.config)
        if not (upcast and config._attn_implementation == "eager"):
            return None
        return Adapter(module, "_upcast_and_reordered_attn", _gpt_2_upcast)
    if kind.__name__ not in _ADAPTERS:
        return None
    if kind.__name__ == "BloomAttention" and getattr(module, "pretraining_tp", 1) > 1 and module.slow_but_exact:
        raise CutawayError("BLOOM's slow_but_exact slices are not followed; set slow_but_exact=False.")
    attribute, shown = _ADAPTERS[kind.__name__]
    if attribute == "forward" and "_old_forward" in module.__dict__:
        attribute = "_old_forward"  # accelerate has put its own forward in front, which moves weights and inputs
    return Adapter(module, attribute, shown)
