"""Weights under TransformerLens' names as a plain module of torch, with its description.

    weights = safetensors.torch.load_file("model.safetensors")     # embed.W_E, blocks.0.attn.W_Q, ...
    module, description = cutaway.from_weights(weights, act_fn="relu")
    lm = cutaway.attach(module, description=description)

The dictionary is what a `HookedTransformer`, or a model written after it, saves: one matrix per head, [H, d, h] for
W_Q, W_K and W_V, [H, h, d] for W_O. What it does not say is given by the names that TransformerLens' configuration has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cutaway.artifacts.errors import CutawayError
from cutaway.model.own.module import PAGE, Description

Activation = Literal["relu", "gelu", "gelu_new", "silu"]
Normalization = Literal["LN", "LNPre", "RMS", "RMSPre"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
_NAME = re.compile(
    r"(?:embed\.)?(W_E)|(?:pos_embed\.)?(W_pos)|(?:unembed\.)?([Wb]_U)|(ln_final\.[wb])|blocks\.\d+\.(.+)"
)
_BLOCK = re.compile(r"attn\.(?:_?[Wb]_[KV]|[Wb]_[QO])|mlp\.(?:[Wb]_in|[Wb]_out|W_gate)|ln[12]\.[wb]")
_BUFFERS = re.compile(r"attn\.(?:mask|IGNORE)")


class PlainAttention(nn.Module):
    """Softmax attention with a projection each for queries, keys, values and what is written."""

    def __init__(self, heads: int, kv: int, scale: float, causal: bool, parts: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        self.heads, self.kv, self.scale, self.causal = heads, kv, scale, causal
        self.q, self.k, self.v, self.o = (parts[name] for name in "qkvo")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (n, -1)).transpose(1, 2)
            for project, n in ((self.q, self.heads), (self.k, self.kv), (self.v, self.kv))
        )
        k, v = (t.repeat_interleave(self.heads // self.kv, 1) for t in (k, v))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, scale=self.scale)
        return self.o(z.transpose(1, 2).flatten(-2))


class PlainMlp(nn.Module):
    """act(x W_in) W_out, or act(x W_gate) * (x W_in) through W_out."""

    def __init__(
        self, act: Callable[[Tensor], Tensor], into: nn.Linear, out: nn.Linear, gate: nn.Linear | None
    ) -> None:
        super().__init__()
        self.act, self.up, self.out, self.gate = act, into, out, gate

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x)
        return self.out(hidden)


class RmsNorm(nn.Module):
    """x / sqrt(mean x^2 + eps), times a gain if there is one."""

    def __init__(self, weight: Tensor | None, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = None if weight is None else nn.Parameter(weight), eps

    def forward(self, x: Tensor) -> Tensor:
        y = x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        return y if self.weight is None else y * self.weight


class PlainBlock(nn.Module):
    """Attention and MLP, each with a norm in front or none."""

    def __init__(self, attention: nn.Module, mlp: nn.Module, ln1: nn.Module | None, ln2: nn.Module | None) -> None:
        super().__init__()
        self.attn, self.mlp, self.ln1, self.ln2 = attention, mlp, ln1, ln2

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x if self.ln1 is None else self.ln1(x))
        return x + self.mlp(x if self.ln2 is None else self.ln2(x))


class PlainTransformer(nn.Module):
    """Token ids [b, p] to logits [b, p, V]."""

    def __init__(
        self,
        embed: nn.Embedding,
        positions: Tensor | None,
        blocks: list[PlainBlock],
        ln_final: nn.Module | None,
        unembed: nn.Linear,
    ) -> None:
        super().__init__()
        self.embed, self.positions = embed, None if positions is None else nn.Parameter(positions)
        self.blocks, self.ln_final, self.unembed = nn.ModuleList(blocks), ln_final, unembed

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x if self.positions is None else x + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.unembed(x if self.ln_final is None else self.ln_final(x))


def from_weights(
    weights: Mapping[str, Tensor],
    *,
    act_fn: Activation = "gelu_new",
    normalization_type: Normalization | None = None,
    eps: float = 1e-5,
    attn_scale: float | None = None,
    attention_dir: Literal["causal", "bidirectional"] = "causal",
    n_ctx: int | None = None,
) -> tuple[PlainTransformer, Description]:
    """The model that a dictionary of TransformerLens' weights describes, and its description for `attach`.

    Weights are copied. A model without MLPs gets some of one neuron that write nothing.

    Args:
        weights: by TransformerLens' names ("W_E", "blocks.0.attn.W_Q", …), as its `state_dict()` has them.
        act_fn: activation function of the MLPs.
        normalization_type: needed where norms have no weights of their own ("LNPre", "RMSPre"). Otherwise it is seen:
            gains and biases are "LN", gains alone "RMS", neither is no norm.
        eps: of the norms.
        attn_scale: divides the scores; None is the square root of the head's width.
        attention_dir: "causal", or "bidirectional".
        n_ctx: how many tokens it reads; needed where there is no W_pos.

    Returns:
        A module and its description, which `cutaway.attach(module, description=description)` takes.

    Raises:
        CutawayError: a missing or unknown weight, or shapes that do not fit (rotary positions, experts and norms after
            a part have other names, and are not made here).

    Example:
        module, description = cutaway.from_weights(torch.load("model.pth"), act_fn="relu")
    """
    named = _named(weights)
    if act_fn not in _ACTIVATIONS:
        raise _wrong(f"act_fn is one of {', '.join(_ACTIVATIONS)}, not {act_fn!r}")
    if attention_dir not in ("causal", "bidirectional"):
        raise _wrong(f"attention_dir is 'causal' or 'bidirectional', not {attention_dir!r}")
    embedding, unembedding, positions = named.need("W_E", 2), named.need("W_U", 2), named.get("W_pos", 2)
    n_layers = named.layers()
    first = named.need("blocks.0.attn.W_Q", 3)
    heads, d, width = first.shape
    kv = len(named.need("blocks.0.attn.W_K", 3))
    context = n_ctx if n_ctx is not None else len(positions) if positions is not None else None
    if context is None:
        raise _wrong("there is no W_pos, so say how many tokens it reads: n_ctx=")
    scale = (width**0.5 if attn_scale is None else attn_scale) ** -1
    causal, act = attention_dir == "causal", _ACTIVATIONS[act_fn]
    blocks = []
    for layer in range(n_layers):
        at = f"blocks.{layer}."
        parts = {
            part.lower(): _linear(_in(named.need(f"{at}attn.W_{part}", 3)), named.get(f"{at}attn.b_{part}", 2))
            for part in "QKV"
        }
        parts["o"] = _linear(named.need(f"{at}attn.W_O", 3).flatten(0, 1), named.get(f"{at}attn.b_O", 1))
        into, out, gate = (named.get(f"{at}mlp.W_{part}", 2) for part in ("in", "out", "gate"))
        if (into is None) != (out is None):
            raise _wrong(f"it has one of {at}mlp.W_in and {at}mlp.W_out, and not the other")
        into, out = (
            (embedding.new_zeros(d, 1), embedding.new_zeros(1, d)) if into is None or out is None else (into, out)
        )
        mlp = PlainMlp(
            act,
            _linear(into, named.get(f"{at}mlp.b_in", 1)),
            _linear(out, named.get(f"{at}mlp.b_out", 1)),
            None if gate is None else _linear(gate, None),
        )
        norms = (_norm(named, f"{at}{name}", normalization_type, d, eps) for name in ("ln1", "ln2"))
        blocks.append(PlainBlock(PlainAttention(heads, kv, scale, causal, parts), mlp, *norms))
    final = _norm(named, "ln_final", normalization_type, d, eps)
    embed = nn.Embedding.from_pretrained(embedding.clone(), freeze=False)
    module = PlainTransformer(embed, positions, blocks, final, _linear(unembedding, named.get("b_U", 1))).eval()
    named.all_used()
    described = Description(
        n_heads=heads,
        n_kv_heads=kv,
        context=context,
        q="attn.q",
        k="attn.k",
        v="attn.v",
        output="attn.o",
        mlp_in="mlp.up",
        mlp_out="mlp.out",
        mlp_gate=None if blocks[0].mlp.gate is None else "mlp.gate",
        norm1=None if blocks[0].ln1 is None else "ln1",
        norm2=None if blocks[0].ln2 is None else "ln2",
        final_norm=None if final is None else "ln_final",
        scale=scale,
        causal=causal,
    )
    return module, described


def _wrong(reason: str) -> CutawayError:
    return CutawayError(f"These weights make no model: {reason} ({PAGE}).")


class _Weights:
    """Weights by one spelling of their names, and which of them were asked for."""

    def __init__(self, found: dict[str, Tensor]) -> None:
        self.found, self.left = found, {*found}

    def get(self, name: str, dims: int) -> Tensor | None:
        value = self.found.get(name)
        self.left.discard(name)
        if value is not None and value.ndim != dims:
            raise _wrong(f"{name} has the shape {list(value.shape)}, and {dims} dimensions are wanted")
        return None if value is None else value.detach().clone()

    def need(self, name: str, dims: int) -> Tensor:
        value = self.get(name, dims)
        if value is None:
            raise _wrong(f"it has no {name} (first: {', '.join(list(self.found)[:4])})")
        return value

    def layers(self) -> int:
        numbers = {int(name.split(".")[1]) for name in self.found if name.startswith("blocks.")}
        if not numbers or numbers != {*range(len(numbers))}:
            raise _wrong(f"its blocks are numbered {sorted(numbers)}, and not from 0 on without a gap")
        return len(numbers)

    def all_used(self) -> None:
        if self.left:
            raise _wrong(f"{min(self.left)} has no place beside the others")


def _named(weights: Mapping[str, Tensor]) -> _Weights:
    """The weights without masks and other buffers, each under its shortest name."""
    if not isinstance(weights, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise _wrong(f"they are a dict of tensors by name, not a {type(weights).__name__}")
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        match = _NAME.fullmatch(str(name))
        inside = match.group(5) if match else None
        if inside is not None and _BUFFERS.fullmatch(inside):
            continue
        if match is None or (inside is not None and not _BLOCK.fullmatch(inside)):
            raise _wrong(f"{name} is none of the names that are known (embed.W_E, blocks.0.attn.W_Q, mlp.W_in, ...)")
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise _wrong(f"{name} is not a tensor of real numbers")
        short = next((group for group in match.groups()[:4] if group is not None), str(name))
        short = short.replace("attn._", "attn.")  # TransformerLens' spelling of keys and values that heads share
        if short in found:
            raise _wrong(f"{short} is there twice")
        found[short] = value
    return _Weights(found)


def _in(by_head: Tensor) -> Tensor:
    """[H, d, h] as one matrix [d, H * h]."""
    return by_head.transpose(0, 1).flatten(1)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """x @ weight + bias as a module; the weight is [in, out], a bias may be by head."""
    made = nn.Linear(*weight.shape, bias=bias is not None, dtype=weight.dtype)
    bias = None if bias is None else bias.flatten()
    if bias is not None and len(bias) != weight.shape[1]:
        raise _wrong(f"a bias of {len(bias)} numbers stands beside a matrix that writes {weight.shape[1]}")
    with torch.no_grad():
        made.weight.copy_(weight.T)
        if bias is not None:
            made.bias.copy_(bias)
    return made


def _norm(named: _Weights, name: str, kind: Normalization | None, d: int, eps: float) -> nn.Module | None:
    weight, bias = named.get(f"{name}.w", 1), named.get(f"{name}.b", 1)
    if kind is None and weight is None:
        return None
    centred = kind in ("LN", "LNPre") if kind is not None else bias is not None
    if not centred:
        return RmsNorm(weight, eps)
    made = nn.LayerNorm(d, eps, elementwise_affine=weight is not None, bias=bias is not None)
    with torch.no_grad():
        for own, given in ((made.weight, weight), (made.bias, bias)):
            if given is not None:
                own.copy_(given)
    return made.to(weight.dtype) if weight is not None else made
