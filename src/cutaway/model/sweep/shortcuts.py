"""What a forward with edits may take over from the unedited one of the same prompts.

Layers below the first edit return the stream that they returned before. In the first edited layer, attention and MLP
return what they returned before where no edit reaches them. Columns before the first edited one are not computed
again: their keys and values stand in the cache. In the last layer, only the last token goes through the output
projection and the MLP where nothing else is read. None of this changes a number beyond rounding, and a sweep checks
so with an unedited control (`sweep.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from cutaway.model.attached import Attached
from cutaway.model.forward.current import Replacement, Stop, active
from cutaway.model.forward.execution import Execution, Form, Span, form_of, in_form, passing
from cutaway.model.forward.hooks import on_input, on_output
from cutaway.model.sites import layer_of, template_of
from cutaway.model.tokens import Tokens

_STREAM = ("resid_post",)
_MLP_WRITES = ("mlp.out", "ln2_post.scale", "ln2_post.normalized")
_Z = ("attn.z", "attn.result")
_ATTENTION_WRITES = ("attn.out", "ln1_post.scale", "ln1_post.normalized")
_MLP_READS = ("resid_mid", "ln2.scale", "ln2.normalized", "mlp.in", "mlp.pre", "mlp.pre_linear", "mlp.post")
# what may be edited in the last layer where only the last token leaves its attention
_BEFORE_OUTPUT = (
    *("resid_pre", "ln1.scale", "ln1.normalized", "attn.in", "attn.q", "attn.k", "attn.v"),
    *("attn.rot_q", "attn.rot_k", "attn.scores", "attn.pattern", "attn.z"),
)
_OUTPUT = ("logits", "logits_precap")


@dataclass(frozen=True)
class Entry:
    """Where a forward enters: the first layer that is not taken over whole, and what of that layer is.

    `attention` is run, entered at its output projection ("z"), or taken over. `layer` is the number of layers where
    everything is. `last` says that only the last token is unembedded, `slim` that it alone leaves the last layer's
    attention, `defer` that nothing is edited behind the last layer, so that many forwards can be unembedded together.
    """

    layer: int
    attention: Literal["run", "z", "skip"] = "run"
    mlp: Literal["run", "skip"] = "run"
    block: Literal["run", "skip"] = "run"
    last: bool = True
    slim: bool = True
    defer: bool = True

    @property
    def inner(self) -> bool:
        """Whether a part of the first layer is taken over."""
        return "skip" in (self.attention, self.mlp, self.block) or self.attention == "z"

    def plain(self) -> Entry:
        """The same layer, all of it run."""
        return replace(self, attention="run", mlp="run", block="run")


def entry(lm: Attached, sites: Iterable[str], last: bool) -> Entry:
    """The latest point at which a forward that edits these sites can enter; `last`: only the last token is read."""
    sites = list(sites)
    layers = [layer_of(site) for site in sites]
    end = lm.n_layers - 1
    tails = {template_of(site).removeprefix("blocks.{l}.") for site, at in zip(sites, layers, strict=True) if at == end}
    outside = {site for site, at in zip(sites, layers, strict=True) if at is None}
    last = last and not outside & {*_OUTPUT}
    defer = last and not outside - {"embed", "pos_embed"}
    slim = defer and tails <= {*_BEFORE_OUTPUT}
    if outside & {"embed", "pos_embed"}:
        return Entry(0, last=last, slim=slim, defer=defer)
    if not any(at is not None for at in layers):
        return Entry(lm.n_layers, last=last, slim=slim, defer=defer)
    first = min(at for at in layers if at is not None)
    here = {
        template_of(site).removeprefix("blocks.{l}.") for site, at in zip(sites, layers, strict=True) if at == first
    }
    beyond_mlp = {*_STREAM, *_MLP_WRITES} | ({*_Z, *_ATTENTION_WRITES} if lm.family.parallel else set())
    beyond_attention = {*_STREAM, *_MLP_WRITES, *_ATTENTION_WRITES, *_MLP_READS}
    z = beyond_attention | {*_Z}
    layer = lm.family.layers[first]
    if _within(layer.attention, layer.attention_writer):  # the module adds to the stream by itself
        beyond_attention -= {*_ATTENTION_WRITES}
        z = set()
    if _within(layer.mlp, layer.mlp_writer):
        beyond_mlp -= {*_MLP_WRITES}
    return Entry(
        first,
        attention="skip" if here <= beyond_attention else "z" if here <= z else "run",
        mlp="skip" if here <= beyond_mlp else "run",
        block="skip" if here <= {*_STREAM} else "run",
        last=last,
        slim=slim,
        defer=defer,
    )


def _within(module: nn.Module, writer: nn.Module) -> bool:
    """Whether what is written to the stream leaves a module inside this one."""
    return writer is not module and any(part is writer for part in module.modules())


@dataclass
class Base:
    """The unedited forward of n prompts, and what it left for the others: on the modules' own terms."""

    tokens: Tokens
    logits: Tensor  # [n, 1, V], or [n, p, V]
    final: Tensor  # the stream behind the last layer at each row's last token [n, 1, d]
    returned: dict[nn.Module, Tensor] = field(default_factory=dict)
    entering: dict[nn.Module, Tensor] = field(default_factory=dict)
    forms: dict[nn.Module, Form] = field(default_factory=dict)
    cache: list[tuple[Tensor, Tensor]] | None = None
    no_cache: str = ""

    def columns(self, value: Tensor, start: int, times: int) -> Tensor:
        """[n, p, ...] -> the columns from `start` on, the prompts repeated [times * n, p - start, ...]."""
        n, width = self.tokens.ids.shape
        if value.shape[:2] != (n, width):  # a module that has all tokens in one dimension
            return self.columns(value.reshape(n, width, -1), start, times).flatten(0, 1)
        value = value[:, start:]
        if len(value) == 1:
            return value.expand(times, *value.shape[1:]).contiguous()
        return value.repeat(times, *[1] * (value.ndim - 1))

    def past(self, start: int, times: int, layer: int) -> DynamicCache:
        """A cache that holds the columns before `start`, in the layers from `layer` on (and the first, for length)."""
        assert self.cache is not None
        cache = DynamicCache()
        for index, (keys, values) in enumerate(self.cache):
            keys, values = keys[:, :, :start], values[:, :, :start]
            if index >= layer and len(keys) == 1:
                keys, values = (t.expand(times, *t.shape[1:]) for t in (keys, values))
            elif index >= layer:
                keys, values = (t.repeat(times, 1, 1, 1) for t in (keys, values))
            held = DynamicLayer()
            held.lazy_initialization(keys, values)
            held.keys, held.values = keys, values  # it grows by concatenation, so these stay as they are
            cache.layers.append(held)
        return cache

    def replacements(self, lm: Attached, at: Entry, start: int, times: int) -> dict[nn.Module, Replacement]:
        """What modules do instead of their forward, from column `start` on with the prompts repeated."""
        layers = lm.family.layers

        def again(module: nn.Module) -> Replacement:
            value = self.columns(self.returned[module], start, times)
            return lambda *_args, **_kwargs: in_form(value.clone(), self.forms[module])

        found: dict[nn.Module, Replacement] = {}
        for index in range(at.layer):
            module = layers[index].module
            found[module] = again(module) if index == at.layer - 1 else passing(self.forms[module])
        if at.block == "skip":
            found[layers[at.layer].module] = again(layers[at.layer].module)
            return found
        if at.attention == "skip":
            found[layers[at.layer].attention] = again(layers[at.layer].attention)
        elif at.attention == "z":
            layer = layers[at.layer]
            z = self.columns(self.entering[layer.output], start, times)
            form = self.forms[layer.attention]
            found[layer.attention] = lambda *_args, **_kwargs: in_form(layer.output(z), form)
        if at.mlp == "skip":
            found[layers[at.layer].mlp] = again(layers[at.layer].mlp)
        return found


def _needs(lm: Attached, entries: Iterable[Entry]) -> tuple[set[nn.Module], set[nn.Module]]:
    """Modules whose output, and modules whose input, forwards that enter there take over."""
    outputs: set[nn.Module] = set()
    inputs: set[nn.Module] = set()
    for at in entries:
        if at.layer > 0:
            outputs.add(lm.family.layers[at.layer - 1].module)
        if at.layer == lm.n_layers:
            continue
        layer = lm.family.layers[at.layer]
        if at.block == "skip":
            outputs.add(layer.module)
            continue
        if at.attention == "skip":
            outputs.add(layer.attention)
        if at.attention == "z":
            inputs.add(layer.output)
        if at.mlp == "skip":
            outputs.add(layer.mlp)
    return outputs, inputs


def run_base(lm: Attached, tokens: Tokens, entries: Iterable[Entry], *, last: bool, cached: bool) -> Base:
    """The unedited forward, with what forwards that enter at `entries` take over, and keys and values if `cached`."""
    base = Base(tokens, torch.empty(0), torch.empty(0))
    end = lm.family.layers[-1].module
    outputs, inputs = _needs(lm, entries)

    def watch(execution: Execution) -> Iterator[RemovableHandle]:
        def note(module: nn.Module, _args: Any, output: Any) -> None:
            if active() is execution:
                base.forms[module] = form_of(output)
                value = output[0] if isinstance(output, tuple) else output
                if module in outputs:
                    base.returned[module] = value.clone()
                if module is end:
                    base.final = pick(value, tokens.last).clone()

        def noting_input(module: nn.Module) -> Callable[[Tensor], None]:
            def note_input(x: Tensor) -> None:
                base.entering[module] = x.clone()

            return note_input

        for layer in lm.family.layers:
            for module in (layer.module, layer.attention, layer.mlp):
                yield module.register_forward_hook(note)
        for module in inputs:
            yield on_input(module, execution, noting_input(module))
        if last:
            yield on_input(lm.family.unembed, execution, lambda x: pick(x, tokens.last))

    def forward(past: DynamicCache | None) -> Tensor:
        execution = Execution(lm, (), (), tokens.mask, watch=watch)
        return execution.forward(lambda: call(lm, tokens, 0, past)).logits

    if cached:
        past = DynamicCache()
        try:
            base.logits = forward(past)
            base.cache, base.no_cache = _held(past, lm.n_layers, tokens)
            return base
        except (TypeError, ValueError, AttributeError, KeyError, IndexError, NotImplementedError) as error:
            base.no_cache = f"the model refuses a plain key-value cache ({type(error).__name__})"
    base.logits = forward(None)
    return base


def _held(past: DynamicCache, n_layers: int, tokens: Tokens) -> tuple[list[tuple[Tensor, Tensor]] | None, str]:
    held = []
    for layer in past.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        full = all(isinstance(t, Tensor) and t.ndim == 4 and t.shape[-2] == tokens.ids.shape[1] for t in (keys, values))
        if type(layer) is not DynamicLayer or not full:
            return None, "a layer keeps something else than keys and values of every token"
        held.append((keys, values))
    if len(held) != n_layers:
        return None, "its layers share or lack keys and values"
    return held, ""


def call(lm: Attached, tokens: Tokens, start: int, past: DynamicCache | None, times: int = 1) -> Any:
    """The model's own forward on the columns from `start` on, each prompt `times` times."""
    keep = {"use_cache": False} if past is None else {"use_cache": True, "past_key_values": past}
    with torch.no_grad():
        return lm.hf(
            input_ids=tokens.ids[:, start:].repeat(times, 1),
            attention_mask=tokens.mask.long().repeat(times, 1),
            position_ids=tokens.position_ids[:, start:].repeat(times, 1),
            **keep,
        )


def pick(x: Tensor, columns: Tensor) -> Tensor:
    """[b, p, ...] -> [b, 1, ...], one column per row; tokens in one dimension [b * p, ...] stay as they are."""
    if x.ndim == 2 or x.shape[1] == 1:
        return x
    columns = columns.to(x.device)
    columns = columns.repeat(len(x) // len(columns))
    return x[torch.arange(len(x), device=x.device), columns][:, None]


def run_from(lm: Attached, base: Base, at: Entry, start: int, times: int, edits: Iterable[Any]) -> Tensor:
    """The prompts `times` times with edits, entering at `at` and column `start`.

    Returns logits [times * n, 1 or p - start, V], or, where the entry defers the unembedding, the stream behind the
    last layer at each row's last token [times * n, 1, d], for `finish`. Where a row ends before `start`, what it gives
    for its last token is meaningless. `edits` are as `Execution` takes them, over rows repeated as a whole (prompts 0
    to n - 1, then again).
    """
    family, tokens = lm.family, base.tokens
    last = (tokens.last - start).clamp(min=0)  # what a row that ends before `start` gives there, nobody reads
    streams: list[Tensor] = []

    def watch(execution: Execution) -> Iterator[RemovableHandle]:
        if at.slim and at.layer < lm.n_layers:
            for module in (family.layers[-1].output, family.layers[-1].mlp):
                yield on_input(module, execution, lambda x: pick(x, last))
        if at.last and not at.defer:
            yield on_input(family.unembed, execution, lambda x: pick(x, last))
        if at.defer:

            def leave(stream: Tensor) -> None:
                streams.append(pick(stream, last))
                raise Stop

            yield on_output(family.layers[-1].module, execution, leave)

    execution = Execution(
        lm,
        (),
        list(edits),
        tokens.mask.repeat(times, 1),
        span=Span(first_layer=at.layer),
        replace=base.replacements(lm, at, start, times),
        watch=watch,
    )
    past = base.past(start, times, at.layer) if start > 0 else None
    out = execution.forward(lambda: call(lm, tokens, start, past, times))
    return streams[0] if at.defer else execution.edit("logits", out.logits)


def finish(lm: Attached, base: Base, streams: Tensor) -> Tensor:
    """What the model makes of streams behind its last layer [m, 1, d]: logits [m, 1, V], by its own forward."""
    layers = lm.family.layers
    end = layers[-1].module
    instead = {layer.module: passing(base.forms[layer.module]) for layer in layers[:-1]}
    instead[end] = lambda *_args, **_kwargs: in_form(streams, base.forms[end])
    one = base.tokens.ids[:1, :1]
    mask = torch.ones_like(one, dtype=torch.bool)
    execution = Execution(lm, (), (), mask, span=Span(first_layer=lm.n_layers), replace=instead)
    tokens = Tokens(one, mask, ())
    return execution.forward(lambda: call(lm, tokens, 0, None, len(streams))).logits
