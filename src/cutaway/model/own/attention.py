"""What passes through an attention module that is not one of transformers: seen while its own forward computes it.

The module is a program of its user's. It is run as it is; inside its forward the product of queries and keys, the
softmax of its scores and PyTorch's fused attention are recognised among the calls of torch, by the shapes that heads
give them. What a run edits there goes on through the module's own arithmetic. Only the fused attention is computed
anew where scores or pattern are asked for, which it never has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cutaway.artifacts.errors import CutawayError
from cutaway.model.attention.adapters import watch
from cutaway.model.attention.kernels import Watch

_PRODUCTS = ("matmul", "__matmul__", "bmm", "einsum")


@dataclass(frozen=True)
class OwnAttention:
    """How the attention of one module is observed: its forward, shadowed while a run asks for it."""

    module: nn.Module
    n_heads: int
    n_kv_heads: int
    causal: bool
    scale: float | None = None  # what queries times keys are multiplied by, where the description says it

    @property
    def attribute(self) -> str:
        return "forward"

    def make(self) -> Callable[..., Any]:
        """The shadow: the module's own forward, watched in runs that ask for it."""
        own = self.module.forward

        def observed(*args: Any, **kwargs: Any) -> Any:
            seen = watch(self.module)
            if seen is None:
                return own(*args, **kwargs)
            with _Watching(self, seen) as watching:
                result = own(*args, **kwargs)
            watching.check()
            return result

        return observed


class _Watching(TorchFunctionMode):
    """Recognises the steps of attention among the calls inside the block."""

    def __init__(self, about: OwnAttention, seen: Watch) -> None:
        super().__init__()
        self.about, self.seen = about, seen
        assert seen.execution is not None
        self.rows, self.length = seen.execution.mask.shape
        self.compared = self.weighed = False

    def refuse(self, reason: str) -> CutawayError:
        return CutawayError(f"the attention module {type(self.about.module).__name__} {reason}")

    def check(self) -> None:
        """Raise where something that was asked for did not pass."""
        if not self.weighed and self.seen.wants("scores", "pattern"):
            raise self.refuse(
                "calls neither F.scaled_dot_product_attention nor softmax over the last of [batch, heads, queries, "
                "keys], so its scores and pattern cannot be seen; use one of them"
            )
        if not self.compared and self.seen.wants("rot_q", "rot_k"):
            raise self.refuse(
                "does not multiply queries and keys by @, torch.matmul, torch.bmm or torch.einsum, heads before "
                "positions, so what it compares cannot be seen; use one of them, or F.scaled_dot_product_attention"
            )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name == "scaled_dot_product_attention":
            return self.fused(func, *args, **kwargs)
        if name == "softmax":
            return self.softmax(func, *args, **kwargs)
        if name in _PRODUCTS and not (self.compared or self.weighed) and self.seen.wants("rot_q", "rot_k"):
            return self.product(func, name, args, kwargs)
        return func(*args, **kwargs)

    def by_head(self, x: Any, heads: tuple[int, ...]) -> Tensor | None:
        """[b, heads, ...] of a tensor that is so, or [b * heads, ...]; None for any other."""
        if not isinstance(x, Tensor):
            return None
        if x.ndim == 3 and x.shape[0] % self.rows == 0:
            x = x.unflatten(0, (self.rows, -1))
        return x if x.ndim == 4 and x.shape[0] == self.rows and x.shape[1] in heads else None

    def product(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Queries and keys on their way into the scores."""
        if name == "einsum":
            return self.einsum(func, args, kwargs)
        left: Any
        right: Any
        left, right = (args[0], args[1]) if len(args) > 1 else (args[0] if args else None, kwargs.get("other"))
        query = self.by_head(left, (self.about.n_heads,))
        key = self.by_head(right, (self.about.n_heads, self.about.n_kv_heads))
        if query is None or key is None or query.shape[2] != self.length or key.shape[3] != self.length:
            return func(*args, **kwargs)
        new_query, new_key = self.rotated(query, key.transpose(-1, -2))
        return func(new_query.reshape(left.shape), new_key.transpose(-1, -2).reshape(right.shape), **_rest(kwargs))

    def einsum(self, func: Any, args: Any, kwargs: Any) -> Any:
        equation, *operands = args
        operands = operands[0] if operands and isinstance(operands[0], (list, tuple)) else operands
        inputs, _, out = str(equation).replace(" ", "").partition("->")
        letters = inputs.split(",")
        plain = len(operands) == 2 and len(out) == 4 and all(len({*of}) == len(of) == 4 for of in letters)
        if not plain or "." in inputs:
            return func(*args, **kwargs)
        b, h, q, k = out
        shared = [c for c in letters[0] if c in letters[1] and c not in out]
        first = 0 if q in letters[0] else 1
        wanted = ({b, h, q, *shared}, {b, h, k, *shared})
        if len(shared) != 1 or tuple({*letters[i]} for i in (first, 1 - first)) != wanted:
            return func(*args, **kwargs)
        orders = ((b, h, q, shared[0]), (b, h, k, shared[0]))
        query, key = (
            operands[i].permute([letters[i].index(c) for c in order])
            for i, order in zip((first, 1 - first), orders, strict=True)
        )
        if query.shape[:3] != (self.rows, self.about.n_heads, self.length) or key.shape[2] != self.length:
            return func(*args, **kwargs)
        news = self.rotated(query, key)
        back = {
            i: new.permute([order.index(c) for c in letters[i]])
            for i, order, new in zip((first, 1 - first), orders, news, strict=True)
        }
        return func(equation, back[0], back[1], **kwargs)

    def rotated(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [b H q h] and keys [b KV k h], or of all heads, after the edits; in the shapes they came in."""
        self.compared = True
        times = key.shape[1] // self.about.n_kv_heads  # keys that were repeated for the heads that share them
        query, new = self.seen.rotated(query, key[:, ::times] if times > 1 else key)
        if times > 1:
            new = new.repeat_interleave(times, 1) if self.seen.live("rot_k") else key
        return query, new

    def softmax(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """The scores on their way into the pattern."""
        given = args[0] if args else kwargs.pop("input", None)
        scores = self.by_head(given, (self.about.n_heads,))
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        if scores is None or scores.shape[2:] != (self.length, self.length):
            return func(given, *args[1:], **kwargs)
        if dim not in (-1, given.ndim - 1):
            return func(given, *args[1:], **kwargs)
        if self.weighed:
            raise self.refuse("computes two patterns in one forward, and a head has one; give each a module")
        self.weighed = True
        pattern = self.seen.weigh(
            scores,
            self.visible(scores),
            lambda logits: func(logits.reshape(given.shape), *args[1:], **kwargs).reshape(scores.shape),
        )
        return pattern.reshape(given.shape)

    def visible(self, scores: Tensor) -> Tensor:
        """Where a query may look: not at what the module hid from it, nor, where that is declared, at later tokens."""
        seen = scores > torch.finfo(scores.dtype).min / 2
        if self.about.causal:
            seen = seen & torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        return seen

    def fused(
        self,
        func: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """`F.scaled_dot_product_attention`, written out where scores or pattern are asked for."""
        heads = self.about.n_heads
        if self.by_head(query, (heads,)) is None or query.shape[2] != self.length or query.ndim != 4:
            raise self.refuse(
                f"gives F.scaled_dot_product_attention queries of shape {list(query.shape)}, and not [batch, {heads} "
                f"heads, {self.length} positions, width]"
            )
        query, key = self.rotated(query, key)
        if not self.seen.wants("scores", "pattern"):
            return func(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        self.weighed = True
        key, value = (t.repeat_interleave(heads // t.shape[1], 1) if t.shape[1] != heads else t for t in (key, value))
        scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            scores = scores + attn_mask
        seen = self.visible(scores)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            seen = seen & attn_mask
        if is_causal:
            seen = seen & torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        hidden = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        pattern = self.seen.weigh(hidden, seen, lambda logits: F.softmax(logits, -1).to(value.dtype))
        return F.dropout(pattern, dropout_p) @ value


def _rest(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != "other"}
