"""What the parts of a graph write and read in one forward, for the edge engines.

Heads are kept as z and multiplied with W_O when they are needed; what a head reads is computed from a stream by the
layer's norm and its own columns of the projection, so the forward itself stays the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from cutaway.artifacts.errors import CutawayError
from cutaway.causal.edge_graph import EdgeGraph
from cutaway.data.pairs import AlignedPairs
from cutaway.model.architecture.norms import Norm
from cutaway.model.architecture.parts import Layer, Projection
from cutaway.model.architecture.wrapped import bias_of
from cutaway.model.forward.current import Stop
from cutaway.model.forward.execution import Execution, Span
from cutaway.model.forward.hooks import Hooks
from cutaway.model.language_model import LanguageModel
from cutaway.model.sweep.shortcuts import Base, run_base
from cutaway.model.tokens import Tokens

PARTS = ("q", "k", "v")


@dataclass(frozen=True)
class Reader:
    """How one layer's heads read a stream x: part = (center(x) / scale(x)) · weight + constant.

    `weights[part]` [K, d, h] have the norm's gain folded in, `constants[part]` [K, h] hold biases; K is the number of
    destinations of that part in the graph.
    """

    norm: Norm | None
    weights: dict[str, Tensor]
    constants: dict[str, Tensor]

    def divide(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Centred x [..., d] and its scale [..., 1] (None without a norm)."""
        if self.norm is None:
            return x, None
        wide, scale = self.norm.divide(x)
        return wide, scale

    def part(self, part: str, heads: slice | Tensor, wide: Tensor, scale: Tensor | None) -> Tensor:
        """One part [k, m, h] of k heads, each from its own stream: `wide` [k, m, d] and `scale` [k, m, 1]."""
        product = torch.bmm(wide, self.weights[part][heads])
        if scale is not None:
            product = product / scale
        return product + self.constants[part][heads][:, None]


def reader(lm: LanguageModel, graph: EdgeGraph, layer: int) -> Reader:
    """The reader of one layer, in fp32 or wider."""
    parts, norm = lm.family.layers[layer], lm.family.layers[layer].ln1
    dtype = torch.promote_types(lm.dtype, torch.float32)
    weights: dict[str, Tensor] = {}
    constants: dict[str, Tensor] = {}
    bias = None if norm is None else norm.bias
    by_part = {"q": lm.w_q, "k": lm.w_k, "v": lm.w_v}
    with torch.no_grad():
        for part in PARTS:
            projection = parts.projection(part)
            assert projection is not None  # EdgeGraph.of has looked
            w = by_part[part](layer).to(dtype)  # [H or KV, d, h]
            w = w if norm is None else norm.times_gain(w.transpose(-1, -2)).transpose(-1, -2)
            at = torch.zeros(1, 1, lm.d_model, dtype=lm.dtype, device=lm.device) if bias is None else bias[None, None]
            constant = projection.split(projection.module(at.to(lm.dtype)))[part][0, 0].to(dtype)
            if part != "q" and (each := graph.kv // w.shape[0]) > 1:
                w, constant = w.repeat_interleave(each, 0), constant.repeat_interleave(each, 0)
            weights[part], constants[part] = w.contiguous(), constant
    return Reader(norm, weights, constants)


def head_results(lm: LanguageModel, layer: int, z: Tensor) -> Tensor:
    """What each head writes, before a post-norm and without the bias: z [b, p, H, h] -> [H, b, p, d]."""
    b, p, heads, width = z.shape
    w_o = lm.w_o(layer).to(z.dtype)
    return torch.bmm(z.permute(2, 0, 1, 3).reshape(heads, b * p, width), w_o).view(heads, b, p, -1)


def attention_of(layer: Layer, heads: Tensor) -> Tensor:
    """What attention adds to the stream when its heads' results sum to this: with its bias, behind a post-norm."""
    bias = bias_of(layer.output)
    out = heads if bias is None else heads + bias.to(heads)
    if layer.ln1_post is not None:
        wide, scale = layer.ln1_post.divide(out)
        out = layer.ln1_post.gain(wide / scale, out.dtype)
    return out * layer.attn_multiplier


def by_query_head(projection: Projection, y: Tensor, repeats: int) -> dict[str, Tensor]:
    """A projection's output by part [..., K, h]; each shared key and value `repeats` times, once a query head."""
    parts = projection.split(y)
    return {
        part: value.repeat_interleave(repeats, dim=-2) if repeats > 1 and part != "q" else value
        for part, value in parts.items()
    }


def joined(projection: Projection, parts: dict[str, Tensor], y: Tensor, repeats: int) -> Tensor:
    """What stands in the place of a projection's output y; with repeated keys it is wider than y."""
    if repeats > 1 and projection.parts != ("q",):
        (part,) = projection.parts  # EdgeGraph.of has looked: keys and values have a module each
        return parts[part].flatten(-2)
    return projection.join(parts, y)


def first_column(lm: LanguageModel, pairs: AlignedPairs) -> int:
    """The first column in which some pair's prompts differ: nothing before it can carry a difference.

    That is the first of all (0) where attention is not causal.
    """
    if not lm.causal:
        return 0
    return int((pairs.clean.ids != pairs.corrupt.ids).any(0).int().argmax())


@dataclass(frozen=True)
class Prefix:
    """Columns that both prompts of every pair share, whose keys and values are computed once."""

    columns: int
    base: Base

    def past(self, rows: int, repeats: int) -> DynamicCache:
        """The cache for so many rows, all prompts again and again; `repeats` gives each head of a group its own."""
        base = self.base
        if repeats > 1:
            assert base.cache is not None
            cache = [(k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)) for k, v in base.cache]
            base = replace(base, cache=cache)
        return base.past(self.columns, rows // len(base.tokens), 0)


def shared_prefix(lm: LanguageModel, clean: Tokens, columns: int, *, check: bool = True) -> Prefix | None:
    """The first so many columns of these prompts, or None where there are none or the model keeps no plain cache.

    With `check`, what is computed behind it is compared with a whole forward of the first prompt, and the prefix is
    refused where they differ.
    """
    if columns == 0 or not bool(clean.mask[:, :columns].all()) or not lm.causal:
        return None
    if lm.ropes is not None and not lm.ropes.alike(columns, clean.longest):
        return None
    with torch.no_grad():
        front = Tokens.whole(clean.ids[:, :columns], ())
        base = run_base(lm, front, (), last=True, cached=True)
        if base.cache is None:
            return None
        if not check:
            return Prefix(columns, base)
        one = clean[:1]
        whole = forward(lm, one, Hooks())
        first = replace(base, tokens=front[:1], cache=[(k[:1], v[:1]) for k, v in base.cache])
        behind = forward(lm, one, Hooks(), prefix=Prefix(columns, first))
    assert whole is not None
    assert behind is not None
    error = (whole - behind).abs().max() / whole.abs().max().clamp(min=1e-9)
    allowed = 1e-4 if lm.dtype in (torch.float32, torch.float64) else 2e-2
    return Prefix(columns, base) if bool(error < allowed) else None


def forward(
    lm: LanguageModel,
    tokens: Tokens,
    hooks: Hooks,
    *,
    first_layer: int = 0,
    stream: Tensor | None = None,
    ungrouped: bool = False,
    prefix: Prefix | None = None,
) -> Tensor | None:
    """Logits at each row's last real token [b, V] of a forward under these hooks; None where one raised `Stop`.

    With a `prefix` only the columns behind it are computed, and hooks see no others.
    """
    start = 0 if prefix is None else prefix.columns
    execution = Execution(
        lm,
        (),
        (),
        tokens.mask[:, start:],
        span=Span(first_layer, stream, start, last_only=True),
        watch=hooks,
        ungrouped=ungrouped,
    )
    repeats = lm.n_heads // lm.n_kv_heads if ungrouped else 1
    keep: dict[str, Any] = {"use_cache": False}
    if prefix is not None:
        keep = {"use_cache": True, "past_key_values": prefix.past(len(tokens), repeats)}
    out = execution.forward(
        lambda: lm.hf(
            input_ids=tokens.ids[:, start:],
            attention_mask=tokens.mask.long(),
            position_ids=tokens.position_ids[:, start:],
            **keep,
        )
    )
    return None if out is None else out.logits[:, 0]


def start_of_stream(lm: LanguageModel, tokens: Tokens) -> Tensor:
    """What enters the first layer [b, p, d]."""
    kept: list[Tensor] = []
    hooks = Hooks()

    def keep(x: Tensor) -> None:
        kept.append(x.detach().clone())
        raise Stop

    hooks.before(lm.family.layers[0].module, keep)
    with torch.no_grad():
        forward(lm, tokens, hooks)
    return kept[0]


@dataclass
class Writes:
    """What each layer wrote, by layer: z [b, t, H, h], attention and MLP as added to the stream [b, t, d], and the
    value and scale of a norm behind attention.
    """

    z: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, Tensor] = field(default_factory=dict)
    mlp: dict[int, Tensor] = field(default_factory=dict)
    post: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


def note_writes(
    lm: LanguageModel, hooks: Hooks, rows: Mapping[float, slice], first: int, written: Mapping[float, Writes]
) -> None:
    """Note what heads (as z), attention and MLPs write in some rows of a forward, from column `first` on."""
    if not rows:
        return
    dtype = torch.promote_types(lm.dtype, torch.float32)

    def by_row(x: Tensor, rows: int) -> Tensor:
        """[b, p, d], also where an MLP has all tokens in one dimension."""
        return x if x.ndim == 3 else x.view(rows, -1, x.shape[-1])

    for index, layer in enumerate(lm.family.layers):
        seen: list[int] = [0]  # rows of the forward at hand

        def on_z(flat: Tensor, index: int = index, seen: list[int] = seen) -> None:
            seen[0] = flat.shape[0]
            for end, where in rows.items():
                z = flat.detach()[where, first:].to(dtype)
                written[end].z[index] = z.unflatten(-1, (lm.n_heads, -1)).clone()

        def on_attention(out: Tensor, index: int = index, times: float = layer.attn_multiplier) -> None:
            for end, where in rows.items():
                written[end].attention[index] = out.detach()[where, first:].to(dtype).clone() * times

        def on_mlp(
            out: Tensor, index: int = index, times: float = layer.mlp_multiplier, seen: list[int] = seen
        ) -> None:
            for end, where in rows.items():
                written[end].mlp[index] = by_row(out, seen[0]).detach()[where, first:].to(dtype).clone() * times

        hooks.before(layer.output, on_z)
        hooks.after(layer.attention_writer, on_attention)
        hooks.after(layer.mlp_writer, on_mlp)
        if layer.ln1_post is not None:

            def on_post(x: Tensor, index: int = index, norm: Norm = layer.ln1_post) -> None:
                for end, where in rows.items():
                    wide, scale = norm.divide(x.detach()[where, first:])
                    written[end].post[index] = (wide / scale, scale)

            hooks.before(layer.ln1_post.module, on_post)


def keep_writes(lm: LanguageModel, tokens: Tokens, first: int, prefix: Prefix | None = None) -> Writes:
    """What every layer writes for these tokens, from column `first` on (of those that are computed)."""
    hooks, found = Hooks(), Writes()
    note_writes(lm, hooks, {0.0: slice(0, len(tokens))}, first, {0.0: found})
    with torch.no_grad():
        forward(lm, tokens, hooks, prefix=prefix)
    return found


@contextmanager
def frozen(lm: LanguageModel) -> Iterator[None]:
    """No parameter asks for a gradient inside the block, so that no activation is kept for one."""
    asking = [parameter for parameter in lm.hf.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def tiled(tokens: Tokens, times: int) -> Tokens:
    """All rows, then all rows again."""
    return tokens[list(range(len(tokens))) * times] if times > 1 else tokens


def mlp_entry(lm: LanguageModel, layer: int) -> tuple[nn.Module, Norm | None]:
    """The module whose first argument is the stream that an MLP reads, and no norm; or, with one norm for attention and
    MLP, the MLP itself and the norm in front of it.
    """
    parts = lm.family.layers[layer]
    if parts.ln2 is not None:
        return parts.ln2.module, None
    return parts.mlp, parts.ln1 if lm.family.parallel else None


def at_end(lm: LanguageModel, hooks: Hooks, change: Callable[[Tensor], Tensor | None]) -> None:
    """Let `change` see, and replace, the stream [b, p, d] that the final norm reads, or the unembedding without one."""
    if lm.family.ln_final is not None:
        hooks.before(lm.family.ln_final.module, change)
    else:
        hooks.after(lm.family.layers[-1].module, change)


def refuse_unreadable(lm: LanguageModel) -> None:
    """CutawayError where an output projection has no matrix to split by head."""
    for site in lm.sites():
        if site.kind.name == "blocks.{l}.attn.result" and site.absent is not None:
            raise CutawayError(f"The heads of {lm.name} cannot be told apart: {site.absent}.")
