"""The edits of a self-test, each with what must follow from it at the next sites.

Every site that can be edited is: what an edit there does is predicted from the model's own weights, so an edit that is
lost, lands elsewhere or is applied twice shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cutaway.model import edits as make
from cutaway.model.families import Norm, weight_matrix
from cutaway.model.sites import layer_of

if TYPE_CHECKING:
    from cutaway.model.language_model import LanguageModel

At = Callable[[str], Tensor]
"""A site's value, [b p ...] or [b H q k]; names without `blocks.` are of the layer under test."""
Verify = Callable[[At, At], Iterator[tuple[str, Tensor, Tensor, Tensor]]]
"""(values with the edit, values without) -> check, left, right, and the values whose scale counts."""
Case = tuple[make.Edit, Verify]


def projected(lm: LanguageModel, layer: int, x: Tensor) -> dict[str, Tensor]:
    """What the projections of a layer make of x [b p d]: q [b p H h], k and v [b p KV h]."""
    projections = lm.family.layers[layer].projections
    if projections.split is not None:
        return projections.split(projections.modules["qkv"](x))
    heads = {"q": lm.n_heads, "k": lm.n_kv_heads, "v": lm.n_kv_heads}
    return {name: projections.modules[name](x).unflatten(-1, (n, -1)) for name, n in heads.items()}


def activation(lm: LanguageModel, layer: int) -> Callable[[Tensor], Tensor] | None:
    """The activation function of a layer's MLP, where it can be found."""
    mlp = lm.family.layers[layer].mlp
    found = getattr(mlp, "act_fn", None) or getattr(mlp, "act", None)
    return found if callable(found) else None  # pyright: ignore[reportReturnType]


def layer_cases(lm: LanguageModel, layer: int, delta: Tensor, head: int, length: int) -> list[Case]:
    """Edits of every site of one layer, for rows of `length` tokens.

    delta holds at least d and h entries; `head` is edited where there are heads.
    """
    move = delta[: lm.d_model]
    return [
        *_stream_cases(lm, layer, move),
        *_norm_cases(lm, layer),
        *_attention_cases(lm, layer, delta, head, length),
        *_mlp_cases(lm, layer, move),
    ]


def _shift(site: str, full: str, move: Tensor, effect: Callable[[At], Tensor], what: str, *among: str) -> Case:
    """`among`: the sites whose values `effect` adds and subtracts, and which set the scale of its rounding."""

    def verify(new: At, old: At) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        was, size = effect(old), torch.cat([at(name) for at in (new, old) for name in among] or [effect(old)])
        yield f"δ at {site} moves {what} by δ", effect(new) - was, move.expand_as(was), size

    return make.add(full, move), verify


def _stream_cases(lm: LanguageModel, layer: int, move: Tensor) -> Iterator[Case]:
    family, b = lm.family, f"blocks.{layer}"

    def shift(site: str, *parts: str) -> Case:
        """δ at the site moves the first of the parts, less the others, by δ."""

        def effect(at: At) -> Tensor:
            first, *rest = map(at, parts)
            return first - torch.stack(rest).sum(0) if rest else first

        what = " - ".join(parts) if layer_of(parts[0]) is None else "the next resid_pre"
        return _shift(site, f"{b}.{site}", move, effect, what, *parts)

    yield shift("resid_pre", "resid_post", "attn.out", "mlp.out")
    if not family.parallel:
        yield shift("resid_mid", "resid_post", "mlp.out")
        yield shift("attn.out", "resid_mid")
    else:
        yield shift("attn.out", "resid_post", "mlp.out")
    yield shift("mlp.out", "resid_post")
    if layer + 1 < lm.n_layers:
        yield shift("resid_post", f"blocks.{layer + 1}.resid_pre")
    else:

        def last(new: At, old: At) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
            x = old("resid_post") + move
            wide, scale = family.ln_final.divide(x)
            yield "δ at resid_post: ln_final reads it", new("ln_final.normalized"), wide / scale, wide / scale

        yield make.add(f"{b}.resid_post", move), last


def _norm_cases(lm: LanguageModel, layer: int) -> Iterator[Case]:
    parts = lm.family.layers[layer]
    norms = (
        (parts.ln1, "ln1", "attn.in"),
        (parts.ln2, "ln2", "mlp.in"),
        (parts.ln1_post, "ln1_post", "attn.out"),
        (parts.ln2_post, "ln2_post", "mlp.out"),
    )
    for norm, name, reader in norms:
        if norm is None:
            continue
        for part, factor, multiple in (("scale", 2.0, 0.5), ("normalized", 2.0, 2.0)):

            def follows(
                new: At, old: At, norm=norm, name=name, reader=reader, part=part, multiple=multiple
            ) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
                wanted = old(f"{name}.normalized") * multiple
                yield f"{name}.{part} doubled: {name}.normalized", new(f"{name}.normalized"), wanted, wanted
                gained = norm.gain(wanted, lm.dtype)
                yield f"{name}.{part} doubled: {reader} follows", new(reader), gained, gained

            yield make.scale(f"blocks.{layer}.{name}.{part}", factor), follows


def _attention_cases(lm: LanguageModel, layer: int, delta: Tensor, head: int, length: int) -> Iterator[Case]:
    parts, b = lm.family.layers[layer], f"blocks.{layer}.attn"
    move, narrow = delta[: lm.d_model], delta[: lm.d_head]
    groups = lm.n_heads // lm.n_kv_heads
    kv = head // groups
    mine = list(range(kv * groups, (kv + 1) * groups))
    others = [i for i in range(lm.n_heads) if i != head]

    def entry(new: At, old: At) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        for name, value in projected(lm, layer, old("attn.in") + move).items():
            yield f"δ at attn.in: attn.{name} follows", new(f"attn.{name}"), value, value

    yield make.add(f"{b}.in", move), entry

    def even(site: str, heads: list[int]) -> Verify:
        def verify(new: At, old: At) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
            found, seen = new("attn.pattern")[:, heads], old("attn.scores")[:, heads] > -torch.inf
            wanted = seen.to(found.dtype) / seen.sum(-1, keepdim=True)
            yield f"{site} at zero: even attention", found, wanted, found
            rest = [i for i in range(lm.n_heads) if i not in heads]
            if rest:
                was = old("attn.pattern")[:, rest]
                yield f"{site} at zero: other heads stay", new("attn.pattern")[:, rest], was, was

        return verify

    for part, chosen, heads in (
        ("q", head, [head]),
        ("k", kv, mine),
        ("rot_q", head, [head]),
        ("rot_k", kv, mine),
        ("scores", head, [head]),
    ):
        yield make.zero(f"{b}.{part}", heads=chosen), even(f"attn.{part} of one head", heads)

    def value(new: At, old: At) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        moved = new("attn.z")[:, :, mine] - old("attn.z")[:, :, mine]
        yield "δ at attn.v of one kv head moves its heads' attn.z by δ", moved, narrow.expand_as(moved), old("attn.z")

    yield make.add(f"{b}.v", narrow, heads=kv), value

    def first_only(new: At, old: At) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        v = old("attn.v")[:, :, kv]
        found = new("attn.z")[:, :, head]
        yield "attn.pattern set to the first token: attn.z is its attn.v", found, v[:, :1].expand_as(v), v

    first = torch.zeros(length, device=lm.device)
    first[0] = 1.0
    yield make.set(f"{b}.pattern", first, heads=head), first_only

    def without(new: At, old: At) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        was, now = old("attn.result"), new("attn.result")
        yield (
            "attn.z of one head at zero: its attn.result is zero",
            now[:, :, head],
            torch.zeros_like(was[:, :, 0]),
            was,
        )
        if others:
            yield "attn.z of one head at zero: other heads stay", now[:, :, others], was[:, :, others], was

    yield make.zero(f"{b}.z", heads=head), without

    def head_result(new: At, old: At) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        now, was = (_written(at, "attn.out", "ln1_post", parts.ln1_post) for at in (new, old))
        yield "δ at one head's attn.result moves what attention writes by δ", now - was, move.expand_as(now), was
        if others:
            was = old("attn.result")[:, :, others]
            yield "δ at one head's attn.result: other heads stay", new("attn.result")[:, :, others], was, was

    yield make.add(f"{b}.result", move, heads=head), head_result


def _written(at: At, out: str, name: str, norm: Norm | None) -> Tensor:
    """What a module returns before a norm that follows it."""
    return at(out) if norm is None else at(f"{name}.normalized") * at(f"{name}.scale")


def _mlp_cases(lm: LanguageModel, layer: int, move: Tensor) -> Iterator[Case]:
    parts, b = lm.family.layers[layer], f"blocks.{layer}.mlp"
    act = activation(lm, layer)

    def entry(new: At, old: At) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        x = old("mlp.in") + move
        wanted = parts.mlp_in(x)
        yield "δ at mlp.in: mlp.pre follows", new("mlp.pre"), wanted, wanted
        if parts.mlp_linear is not None:
            wanted = parts.mlp_linear(x)
            yield "δ at mlp.in: mlp.pre_linear follows", new("mlp.pre_linear"), wanted, wanted

    yield make.add(f"{b}.in", move), entry

    def gate(new: At, old: At) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        assert act is not None
        wanted = act(old("mlp.pre") + 1)
        wanted = wanted if parts.mlp_linear is None else wanted * old("mlp.pre_linear")
        yield "1 added to mlp.pre: mlp.post follows", new("mlp.post"), wanted, wanted

    if act is not None:
        yield make.add(f"{b}.pre", torch.ones(1)), gate

    def linear(new: At, old: At) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        wanted = 2 * old("mlp.post")
        yield "mlp.pre_linear doubled: mlp.post doubles", new("mlp.post"), wanted, wanted

    if parts.mlp_linear is not None:
        yield make.scale(f"{b}.pre_linear", 2.0), linear

    def neuron(new: At, old: At) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        now, was = (_written(at, "mlp.out", "ln2_post", parts.ln2_post) for at in (new, old))
        row = weight_matrix(parts.mlp_out).sum(0)
        yield (
            "1 added to mlp.post moves what the MLP writes by W_out's sum",
            now - was,
            row.expand_as(now),
            was,
        )

    yield make.add(f"{b}.post", torch.ones(1)), neuron


def end_cases(lm: LanguageModel, delta: Tensor) -> list[Case]:
    """Edits of the sites before the first layer and after the last. delta holds at least d and V entries."""
    family, move, bump = lm.family, delta[: lm.d_model], delta[: lm.d_vocab]
    cases = [_shift("embed", "embed", move, lambda at: at("blocks.0.resid_pre"), "the first resid_pre")]
    if family.pos_embed is not None:
        cases.append(_shift("pos_embed", "pos_embed", move, lambda at: at("blocks.0.resid_pre"), "the first resid_pre"))

    def halved(new: At, old: At) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        wanted = old("ln_final.normalized") / 2
        yield "ln_final.scale doubled halves ln_final.normalized", new("ln_final.normalized"), wanted, wanted

    def answered(new: At, old: At) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        logits = family.unembed(family.ln_final.gain(2 * old("ln_final.normalized"), lm.dtype))
        logits = logits if family.final_softcap is None else _capped(logits, family.final_softcap)
        yield "ln_final.normalized doubled: logits follow", new("logits"), logits, logits

    def capped(new: At, old: At) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        assert family.final_softcap is not None
        wanted = _capped(old("logits_precap") + bump, family.final_softcap)
        yield "δ at logits_precap: logits follow", new("logits"), wanted, wanted

    cases += [(make.scale("ln_final.scale", 2.0), halved), (make.scale("ln_final.normalized", 2.0), answered)]
    cases.append(_shift("logits", "logits", bump, lambda at: at("logits"), "logits"))
    if family.final_softcap is not None:
        cases.append((make.add("logits_precap", bump), capped))
    return cases


def _capped(logits: Tensor, cap: float) -> Tensor:
    return torch.tanh(logits / cap) * cap
