"""The oracle: every site read and changed by hooks written out by hand, on an eager copy of a Hugging Face model.

Nothing here comes from cutaway. Which module holds what is written down per family; what no module returns (the middle
of the stream, a norm's divisor, one head's result, the attention scores) is had by writing the layer, the norm, the
output projection or the attention function out again.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Names:
    """Where a family keeps its parts."""

    layers: str
    embed: str
    final: str
    attention: str
    mlp: str
    output: str
    ln1: str
    ln2: str
    pre: str
    down: str
    up: str | None = None
    ln1_post: str | None = None
    ln2_post: str | None = None
    head: str = "lm_head"
    one_plus: bool = False  # the norm's gain is stored minus one
    layer_norm: bool = False
    parallel: bool = False


_LLAMA = Names(
    layers="model.layers", embed="model.embed_tokens", final="model.norm", attention="self_attn", mlp="mlp",
    output="o_proj", ln1="input_layernorm", ln2="post_attention_layernorm", pre="gate_proj", down="down_proj",
    up="up_proj",
)  # fmt: skip
_GEMMA2 = Names(
    layers="model.layers", embed="model.embed_tokens", final="model.norm", attention="self_attn", mlp="mlp",
    output="o_proj", ln1="input_layernorm", ln2="pre_feedforward_layernorm", pre="gate_proj", down="down_proj",
    up="up_proj", ln1_post="post_attention_layernorm", ln2_post="post_feedforward_layernorm", one_plus=True,
)  # fmt: skip
_NEOX = Names(
    layers="gpt_neox.layers", embed="gpt_neox.embed_in", final="gpt_neox.final_layer_norm", attention="attention",
    mlp="mlp", output="dense", ln1="input_layernorm", ln2="post_attention_layernorm", pre="dense_h_to_4h",
    down="dense_4h_to_h", layer_norm=True, parallel=True,
)  # fmt: skip
_GPT2 = Names(
    layers="transformer.h", embed="transformer.wte", final="transformer.ln_f", attention="attn", mlp="mlp",
    output="c_proj", ln1="ln_1", ln2="ln_2", pre="c_fc", down="c_proj", layer_norm=True,
)  # fmt: skip
NAMES: dict[str, Names] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": replace(_LLAMA, one_plus=True),
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA2,
    "gpt2": _GPT2,
    "neox": _NEOX,
    "neox_sequential": replace(_NEOX, parallel=False),
}


def eager_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights and a configuration of their own, with eager attention."""
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    return other


def positions_of(mask: Tensor) -> Tensor:
    return (mask.long().cumsum(1) - 1).clamp(min=0)


class ByHand:
    """A copy of a model on which sites are read and changed by hand."""

    def __init__(self, family: str, model: PreTrainedModel) -> None:
        self.names = NAMES[family]
        self.family = family
        self.model = eager_copy(model)
        self._untouched: dict[Any, Tensor] = {}
        config: Any = self.model.config
        self.n_heads: int = config.num_attention_heads
        self.n_kv: int = getattr(config, "num_key_value_heads", None) or self.n_heads
        self.layers = list(self.model.get_submodule(self.names.layers).children())
        self.eps = float(
            next(v for n in ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps") if (v := getattr(config, n, None)))
        )

    def forward(self, ids: Tensor, mask: Tensor, **options: Any) -> Any:
        return self.model(
            input_ids=ids, attention_mask=mask.long(), position_ids=positions_of(mask), use_cache=False, **options
        )

    def logits(self, ids: Tensor, mask: Tensor, changes: Mapping[str, Change]) -> Tensor:
        """Logits [b, p, V] with each site's value replaced by what its function returns."""
        with torch.no_grad(), self.changed(changes):
            return self.forward(ids, mask).logits

    def untouched(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits of the plain model, remembered."""
        key = (tuple(ids.flatten().tolist()), tuple(mask.flatten().tolist()))
        if key not in self._untouched:
            self._untouched[key] = self.logits(ids, mask, {})
        return self._untouched[key]

    def values(self, ids: Tensor, mask: Tensor, sites: list[str]) -> dict[str, Tensor]:
        """The values at the sites."""
        seen: dict[str, Tensor] = {}

        def keep(site: str) -> Change:
            def change(x: Tensor) -> Tensor:
                seen[site] = x.detach().clone()
                return x

            return change

        self.logits(ids, mask, {site: keep(site) for site in sites})
        return seen

    def gradients(
        self,
        ids: Tensor,
        mask: Tensor,
        sites: list[str],
        metric: Callable[[Tensor], Tensor],
        changes: Mapping[str, Change] | None = None,
    ) -> dict[str, Tensor]:
        """d metric(logits) / d site, by autograd through the hooks."""
        changes = changes or {}
        seen: dict[str, Tensor] = {}

        def keep(site: str) -> Change:
            def change(x: Tensor) -> Tensor:
                seen[site] = changes[site](x) if site in changes else x
                return seen[site]

            return change

        with (
            torch.enable_grad(),
            self.changed({s: keep(s) for s in sites} | {s: c for s, c in changes.items() if s not in sites}),
        ):
            value = metric(self.forward(ids, mask).logits).sum()
            found = torch.autograd.grad(value, [seen[site] for site in sites])
        return dict(zip(sites, found, strict=True))

    # The hooks

    @contextmanager
    def changed(self, changes: Mapping[str, Change]) -> Iterator[None]:
        """Put the functions in place, and take them away."""
        with ExitStack() as stack:
            inner: dict[int, dict[str, Change]] = {}
            norms: dict[str, dict[str, Change]] = {}
            for site, change in changes.items():
                match = re.fullmatch(r"blocks\.(\d+)\.(.+)", site)
                layer, part = (int(match[1]), match[2]) if match else (None, site)
                if part.startswith("ln"):
                    norms.setdefault(site.rsplit(".", 1)[0], {})[part.rsplit(".", 1)[1]] = change
                elif part in ("attn.rot_q", "attn.rot_k", "attn.scores", "attn.pattern"):
                    assert layer is not None
                    inner.setdefault(layer, {})[part[5:]] = change
                else:
                    stack.callback(self._place(layer, part, change))
            for prefix, pair in norms.items():
                stack.callback(self._norm(prefix, pair))
            if inner:
                stack.callback(self._attention(inner))
            yield

    def _norm_module(self, prefix: str) -> nn.Module:
        if prefix == "ln_final":
            return self.model.get_submodule(self.names.final)
        _, layer, which = prefix.split(".")
        return self.layers[int(layer)].get_submodule(getattr(self.names, which))

    def _norm(self, prefix: str, pair: dict[str, Change]) -> Callable[[], None]:
        module, names = self._norm_module(prefix), self.names
        weight, bias = module.weight, getattr(module, "bias", None)

        def forward(x: Tensor) -> Tensor:
            centred = x - x.mean(-1, keepdim=True) if names.layer_norm else x
            scale = ((centred**2).mean(-1, keepdim=True) + self.eps) ** 0.5
            if "scale" in pair:
                scale = pair["scale"](scale)
            normalized = centred / scale
            if "normalized" in pair:
                normalized = pair["normalized"](normalized)
            assert isinstance(weight, Tensor)
            y = normalized * (1 + weight if names.one_plus else weight)
            return y if bias is None else y + bias  # type: ignore[operator]

        return _shadow(module, forward)

    def _place(self, layer: int | None, part: str, change: Change) -> Callable[[], None]:
        names, model = self.names, self.model
        if layer is None:
            if part == "pos_embed":
                return _after(model.get_submodule("transformer.wpe"), change)
            if part == "embed":
                if self.family == "gpt2":
                    return _after(model.get_submodule(names.embed), change)
                return _before(self.layers[0], change)
            if part == "logits_precap":
                return _after(model.get_submodule(names.head), change)
            assert part == "logits", part
            return _after_logits(model, change)
        block = self.layers[layer]
        attention, mlp = block.get_submodule(names.attention), block.get_submodule(names.mlp)
        output = attention.get_submodule(names.output)
        heads = _by_head(change, self.n_heads)
        if part in ("attn.q", "attn.k", "attn.v"):
            return self._projection(attention, part[-1], change)
        match part:
            case "resid_pre":
                return _before(block, change)
            case "resid_post":
                return _after(block, change)
            case "resid_mid":
                return self._middle(block, change)
            case "attn.in":
                return _before(attention, change)
            case "attn.z":
                return _before(output, heads)
            case "attn.result":
                return self._result(output, change)
            case "attn.out":
                return _after(block.get_submodule(names.ln1_post) if names.ln1_post else attention, change)
            case "mlp.in":
                return _before(mlp, change)
            case "mlp.pre":
                return _after(mlp.get_submodule(names.pre), change)
            case "mlp.pre_linear":
                assert names.up is not None
                return _after(mlp.get_submodule(names.up), change)
            case "mlp.post":
                return _before(mlp.get_submodule(names.down), change)
            case "mlp.out":
                return _after(block.get_submodule(names.ln2_post) if names.ln2_post else mlp, change)
        raise AssertionError(part)

    def _projection(self, attention: nn.Module, which: str, change: Change) -> Callable[[], None]:
        n = self.n_heads if which == "q" else self.n_kv
        if self.family == "gpt2":  # [q of all heads, k of all heads, v of all heads]

            def thirds(x: Tensor) -> Tensor:
                parts = list(x.chunk(3, -1))
                i = "qkv".index(which)
                parts[i] = _by_head(change, n)(parts[i])
                return torch.cat(parts, -1)

            return _after(attention.get_submodule("c_attn"), thirds)
        if self.family.startswith("neox"):  # head by head: q, k, v

            def interleaved(x: Tensor) -> Tensor:
                per_head = x.unflatten(-1, (n, -1))
                parts = list(per_head.chunk(3, -1))
                i = "qkv".index(which)
                parts[i] = change(parts[i])
                return torch.cat(parts, -1).flatten(-2)

            return _after(attention.get_submodule("query_key_value"), interleaved)
        return _after(attention.get_submodule(f"{which}_proj"), _by_head(change, n))

    def _result(self, output: nn.Module, change: Change) -> Callable[[], None]:
        weight = output.weight
        assert isinstance(weight, Tensor)
        matrix = weight if self.family == "gpt2" else weight.T  # [H * h, d]
        by_head = matrix.unflatten(0, (self.n_heads, -1))
        bias = output.bias

        def forward(flat: Tensor) -> Tensor:
            z = flat.unflatten(-1, (self.n_heads, -1))
            result = torch.stack([z[:, :, i] @ by_head[i] for i in range(self.n_heads)], 2)
            total = change(result).sum(2)
            return total if bias is None else total + bias  # type: ignore[operator]

        return _shadow(output, forward)

    def _middle(self, block: nn.Module, change: Change) -> Callable[[], None]:
        """The layer's forward written out, with the stream changed between attention and MLP."""
        names = self.names
        assert not names.parallel
        attention, mlp = block.get_submodule(names.attention), block.get_submodule(names.mlp)

        def through(module_name: str | None, x: Tensor) -> Tensor:
            return x if module_name is None else block.get_submodule(module_name)(x)

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.family == "gpt2":  # block(hidden, past, mask, encoder, ...), the rest by name
                kwargs = {"past_key_values": args[0] if args else None, "attention_mask": args[1]} | kwargs
            normed = through(names.ln1, hidden_states)
            written = attention(hidden_states=normed, **kwargs)[0]
            middle = change(hidden_states + through(names.ln1_post, written))
            return middle + through(names.ln2_post, mlp(through(names.ln2, middle)))

        return _shadow(block, forward)

    def _attention(self, inner: dict[int, dict[str, Change]]) -> Callable[[], None]:
        """The attention function written out, in place of the one of the model's file."""
        attentions = {id(self.layers[i].get_submodule(self.names.attention)): c for i, c in inner.items()}
        home: Any = sys.modules[type(self.layers[0].get_submodule(self.names.attention)).__module__]
        original = home.eager_attention_forward

        def written_out(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
        ) -> Any:
            changes = attentions.get(id(module))
            if changes is None:
                return original(module, query, key, value, attention_mask, **options)

            def at(name: str, x: Tensor) -> Tensor:
                return changes[name](x) if name in changes else x

            query = at("rot_q", query.transpose(1, 2)).transpose(1, 2)
            key = at("rot_k", key.transpose(1, 2)).transpose(1, 2)
            group = self.n_heads // self.n_kv
            scaling = options.get("scaling")
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            per_head = []
            for head in range(self.n_heads):  # head h reads key-value head h // group
                per_head.append(query[:, head] @ key[:, head // group].transpose(1, 2) * scaling)
            scores = torch.stack(per_head, 1)
            cap = options.get("softcap")
            if cap is not None:
                scores = cap * torch.tanh(scores / cap)
            assert attention_mask is not None
            hidden = attention_mask < -1e30
            scores = at("scores", scores.masked_fill(hidden, -torch.inf))
            safe = scores.masked_fill(scores == -torch.inf, torch.finfo(scores.dtype).min)
            pattern = at("pattern", torch.softmax(safe, -1))
            z = torch.stack([pattern[:, h] @ value[:, h // group] for h in range(self.n_heads)], 2)
            return z, pattern

        home.eager_attention_forward = written_out

        def restore() -> None:
            home.eager_attention_forward = original

        return restore


def _by_head(change: Change, n: int) -> Change:
    return lambda flat: change(flat.unflatten(-1, (n, -1))).flatten(-2)


def _before(module: nn.Module, change: Change) -> Callable[[], None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return module.register_forward_pre_hook(hook, with_kwargs=True).remove


def _after(module: nn.Module, change: Change) -> Callable[[], None]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return module.register_forward_hook(hook).remove


def _after_logits(model: nn.Module, change: Change) -> Callable[[], None]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        output.logits = change(output.logits)
        return output

    return model.register_forward_hook(hook).remove


def _shadow(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    module.__dict__["forward"] = forward
    return lambda: module.__dict__.pop("forward")
