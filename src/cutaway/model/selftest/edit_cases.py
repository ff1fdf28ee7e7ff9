"""The edits of a self-test, each with what must follow from it at the next sites.

Every site that can be edited is: what an edit there does is predicted from the model's own weights, so an edit that is
lost, lands elsewhere or is applied twice shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cutaway.model.architecture.norms import Norm
from cutaway.model.architecture.parts import Family, Layer, weight_matrix
from cutaway.model.architecture.wrapped import router_parameters
from cutaway.model.attached import Attached
from cutaway.model.edits import edits as make
from cutaway.model.sites import layer_of

if TYPE_CHECKING:
    from cutaway.model.forward.run import Run

At = Callable[[str], Tensor]
"""A site's value, [b p ...] or [b H q k]; names without `blocks.` are of the layer under test."""
Verify = Callable[[At, At], Iterator[tuple[str, Tensor, Tensor, Tensor]]]
"""(values with the edit, values without) -> check, left, right, and the values whose scale counts."""
Case = tuple[make.Edit, Verify]


def wide_of(x: Tensor) -> Tensor:
    """In fp32, or wider if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def clipped(family: Family, x: Tensor) -> Tensor:
    """Queries, keys or values as attention gets them, where a model clips what it projected."""
    return x if family.qkv_clip is None else x.clamp(-family.qkv_clip, family.qkv_clip)


def projected(lm: Attached, layer: int, x: Tensor) -> dict[str, Tensor]:
    """What the projections of a layer make of x [b p d]: q [b p H h], k and v [b p KV h]."""
    found: dict[str, Tensor] = {}
    for projection in lm.family.layers[layer].projections:
        if projection.direct:
            found |= projection.split(projection.module(x))
    return found


def neurons(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """What an MLP computes of x [b p d] before its activation function: `pre`, and `pre_linear` if it is gated."""
    assert layer.mlp_in is not None
    if layer.mlp_fused:
        pre, linear = layer.mlp_in(x).chunk(2, -1)
        return pre, linear
    return layer.mlp_in(x), None if layer.mlp_linear is None else layer.mlp_linear(x)


def activation(lm: Attached, layer: int) -> Callable[[Tensor], Tensor] | None:
    """The activation function of a layer's MLP, where it can be found."""
    parts = lm.family.layers[layer]
    for owner in (parts.mlp, parts.module):
        for name in ("act_fn", "act", "activation_fn", "gelu_impl"):
            found: Any = getattr(owner, name, None)
            if callable(found):
                return found  # pyright: ignore[reportReturnType]
    return None


def layer_cases(lm: Attached, layer: int, delta: Tensor, head: int, length: int, base: Run) -> list[Case]:
    """Edits of every site of one layer, for rows of `length` tokens.

    delta holds at least d and h entries; `head` is edited where there are heads; `base` is the run without an edit.
    """
    move = delta[: lm.d_model]
    mixed = lm.family.layers[layer].experts is not None
    return [
        *_stream_cases(lm, layer, move),
        *_norm_cases(lm, layer),
        *_attention_cases(lm, layer, delta, head, length),
        *(_expert_cases(lm, layer, move, base) if mixed else _mlp_cases(lm, layer, move)),
    ]


def _shift(site: str, full: str, move: Tensor, effect: Callable[[At], Tensor], what: str, *among: str) -> Case:
    """`among`: the sites whose values `effect` adds and subtracts, and which set the scale of its rounding."""

    def verify(new: At, old: At) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        was, size = effect(old), torch.cat([at(name) for at in (new, old) for name in among] or [effect(old)])
        yield f"δ at {site} moves {what} by δ", effect(new) - was, move.expand_as(was), size

    return make.add(full, move), verify


def _stream_cases(lm: Attached, layer: int, move: Tensor) -> Iterator[Case]:
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
            if family.ln_final is None:
                wanted = family.read_out(x)[:, -1:]
                yield "δ at resid_post: logits follow", new("logits"), wanted, wanted
                return
            wide, scale = family.ln_final.divide(x)
            yield "δ at resid_post: ln_final reads it", new("ln_final.normalized"), wide / scale, wide / scale

        yield make.add(f"{b}.resid_post", move), last


def _norm_cases(lm: Attached, layer: int) -> Iterator[Case]:
    parts = lm.family.layers[layer]
    norms = (
        (parts.ln1, "ln1", "attn.in", 1.0),
        (parts.ln2, "ln2", "mlp.in", 1.0),
        (parts.ln1_post, "ln1_post", "attn.out", parts.attn_multiplier),
        (parts.ln2_post, "ln2_post", "mlp.out", parts.mlp_multiplier),
    )
    for norm, name, reader, times in norms:
        if norm is None:
            continue
        for part, factor, multiple in (("scale", 2.0, 0.5), ("normalized", 2.0, 2.0)):

            def follows(
                new: At, old: At, norm=norm, name=name, reader=reader, part=part, multiple=multiple, times=times
            ) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
                wanted = old(f"{name}.normalized") * multiple
                yield f"{name}.{part} doubled: {name}.normalized", new(f"{name}.normalized"), wanted, wanted
                gained = norm.gain(wanted, lm.dtype) * times
                yield f"{name}.{part} doubled: {reader} follows", new(reader), gained, gained

            yield make.scale(f"blocks.{layer}.{name}.{part}", factor), follows


def _attention_cases(lm: Attached, layer: int, delta: Tensor, head: int, length: int) -> Iterator[Case]:
    parts, b = lm.family.layers[layer], f"blocks.{layer}.attn"
    move, narrow = delta[: lm.d_model], delta[: lm.family.d_value]
    sinks = getattr(parts.core, "sinks", None)
    groups = lm.n_heads // lm.n_kv_heads
    kv = head // groups
    mine = list(range(kv * groups, (kv + 1) * groups))
    others = [i for i in range(lm.n_heads) if i != head]

    def entry(new: At, old: At) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        for name, value in projected(lm, layer, old("attn.in") + move).items():
            yield f"δ at attn.in: attn.{name} follows", new(f"attn.{name}"), value, value

    yield make.add(f"{b}.in", move), entry

    def across(site: str) -> bool:
        """Whether a norm over all heads together follows, so that one head's edit reaches the others."""
        norm = {"attn.q": parts.q_norm, "attn.k": parts.k_norm}.get(site)
        weight = getattr(norm, "weight", None)
        return isinstance(weight, Tensor) and weight.ndim == 1 and weight.shape[0] != lm.d_head

    def even(site: str, heads: list[int]) -> Verify:
        def verify(new: At, old: At) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
            found, seen = new("attn.pattern")[:, heads], old("attn.scores")[:, heads] > -torch.inf
            n = seen.sum(-1, keepdim=True)
            if sinks is not None:  # one more place to look at, with a logit of its own
                n = n + wide_of(sinks)[heads].view(1, -1, 1, 1).exp()
            wanted = seen.to(found.dtype) / n
            if lm.family.alibi and site != "attn.scores":  # what is left is a slope times the distance
                left = wide_of(new("attn.scores")[:, heads])
                bend = (left[..., 2:] - 2 * left[..., 1:-1] + left[..., :-2]).masked_fill(~seen[..., 2:], 0.0)
                yield (
                    f"{site} of one head at zero: scores by distance",
                    bend,
                    torch.zeros_like(bend),
                    left.where(seen, 0),
                )
            else:
                yield f"{site} of one head at zero: even attention", found, wanted, found
            rest = [i for i in range(lm.n_heads) if i not in heads]
            if rest and not across(site):
                was = old("attn.pattern")[:, rest]
                yield f"{site} of one head at zero: other heads stay", new("attn.pattern")[:, rest], was, was

        return verify

    def only_bias(part: str, at_head: int, bias: Tensor) -> Verify:
        def verify(new: At, old: At) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
            length = wide_of(new(f"attn.rot_{part}")[:, :, at_head]).norm(dim=-1)
            wanted = wide_of(bias).norm().expand_as(length)
            yield f"attn.{part} of one head at zero: its norm's bias is left", length, wanted, wanted

        return verify

    for part, chosen, heads in (
        ("q", head, [head]),
        ("k", kv, mine),
        ("rot_q", head, [head]),
        ("rot_k", kv, mine),
        ("scores", head, [head]),
    ):
        if lm.family.absent(f"blocks.{{l}}.attn.{part}", layer) is not None:
            continue
        norm = {"q": parts.q_norm, "k": parts.k_norm}.get(part)
        bias = getattr(norm, "bias", None)
        check = even(f"attn.{part}", heads) if not isinstance(bias, Tensor) else only_bias(part, chosen, bias)
        yield make.zero(f"{b}.{part}", heads=chosen), check

    def value(new: At, old: At) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        moved = new("attn.z")[:, :, mine] - old("attn.z")[:, :, mine]
        yield "δ at attn.v of one kv head moves its heads' attn.z by δ", moved, narrow.expand_as(moved), old("attn.z")

    def no_value(new: At, old: At) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        z = new("attn.z")[:, :, mine]
        yield "attn.v of one kv head at zero: its heads' attn.z is zero", z, torch.zeros_like(z), old("attn.z")

    if sinks is None and lm.family.qkv_clip is None:
        yield make.add(f"{b}.v", narrow, heads=kv), value
    else:
        yield make.zero(f"{b}.v", heads=kv), no_value

    def first_only(new: At, old: At) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        v = clipped(lm.family, old("attn.v")[:, :, kv])
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
        now, was = (_written(at, "attn.out", parts.attn_multiplier, "ln1_post", parts.ln1_post) for at in (new, old))
        yield "δ at one head's attn.result moves what attention writes by δ", now - was, move.expand_as(now), was
        if others:
            was = old("attn.result")[:, :, others]
            yield "δ at one head's attn.result: other heads stay", new("attn.result")[:, :, others], was, was

    yield make.add(f"{b}.result", move, heads=head), head_result


def _written(at: At, out: str, multiplier: float, name: str, norm: Norm | None) -> Tensor:
    """What a module returns before a norm or a multiplier that follows it."""
    return at(out) / multiplier if norm is None else at(f"{name}.normalized") * at(f"{name}.scale")


def _mlp_cases(lm: Attached, layer: int, move: Tensor) -> Iterator[Case]:
    parts, b = lm.family.layers[layer], f"blocks.{layer}.mlp"
    act = activation(lm, layer)

    def entry(new: At, old: At) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        wanted, linear = neurons(parts, old("mlp.in") + move)
        yield "δ at mlp.in: mlp.pre follows", new("mlp.pre"), wanted, wanted
        if linear is not None:
            yield "δ at mlp.in: mlp.pre_linear follows", new("mlp.pre_linear"), linear, linear

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
        now, was = (_written(at, "mlp.out", parts.mlp_multiplier, "ln2_post", parts.ln2_post) for at in (new, old))
        assert parts.mlp_out is not None
        row = weight_matrix(parts.mlp_out).sum(0)
        yield (
            "1 added to mlp.post moves what the MLP writes by W_out's sum",
            now - was,
            row.expand_as(now),
            was,
        )

    yield make.add(f"{b}.post", torch.ones(1)), neuron


def _expert_cases(lm: Attached, layer: int, move: Tensor, base: Run) -> Iterator[Case]:
    parts, b = lm.family.layers[layer], f"blocks.{layer}.mlp"
    assert parts.experts is not None
    weights = base[f"{b}.router.weights"].flatten(0, 1)
    most = int((weights != 0).sum(0).argmax())
    least = int((weights != 0).sum(0).argmin())

    def entry(new: At, old: At) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        assert matrix is not None
        wanted = wide_of(old("mlp.in") + move) @ wide_of(matrix).T
        wanted = wanted if bias is None else wanted + wide_of(bias)
        yield "δ at mlp.in: mlp.router.logits follow", new("mlp.router.logits"), wanted, wanted

    matrix, bias = router_parameters(parts.experts.router)
    if matrix is not None and matrix.shape == (parts.experts.n, lm.d_model):
        yield make.add(f"{b}.in", move), entry

    def without(new: At, old: At) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        now, was = (_written(at, "mlp.out", parts.mlp_multiplier, "ln2_post", parts.ln2_post) for at in (new, old))
        gone = old(f"mlp.experts.{most}.out")
        gone = gone if parts.ln2_post is None else parts.ln2_post.center(gone)
        yield "mlp.experts.{e}.out of one expert at zero: what the MLP writes lacks it", was - now, gone, was

    yield make.zero(f"{b}.experts.{most}.out"), without

    def doubled(new: At, old: At) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        found, wanted = new(f"mlp.experts.{most}.out"), 2 * old(f"mlp.experts.{most}.out")
        yield "mlp.router.weights doubled: mlp.experts.{e}.out doubles", found, wanted, wanted

    yield make.scale(f"{b}.router.weights", 2.0), doubled

    def preferred(new: At, old: At) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        chosen = (new("mlp.router.weights")[..., least] > 0).float()
        yield "mlp.router.logits of one expert raised: it is chosen", chosen, torch.ones_like(chosen), chosen + 1

    raised = torch.full((parts.experts.n,), -1e3, device=lm.device)
    raised[least] = 1e3
    yield make.add(f"{b}.router.logits", raised), preferred


def end_cases(lm: Attached, delta: Tensor) -> list[Case]:
    """Edits of the sites before the first layer and after the last. delta holds at least d and V entries."""
    family, move, bump = lm.family, delta[: lm.d_model], delta[: lm.d_vocab]
    cases = [_shift("embed", "embed", move, lambda at: at("blocks.0.resid_pre"), "the first resid_pre")]
    if family.has_positions:
        cases.append(_shift("pos_embed", "pos_embed", move, lambda at: at("blocks.0.resid_pre"), "the first resid_pre"))

    def halved(new: At, old: At) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        wanted = old("ln_final.normalized") / 2
        yield "ln_final.scale doubled halves ln_final.normalized", new("ln_final.normalized"), wanted, wanted

    def answered(new: At, old: At) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        assert family.ln_final is not None
        logits = family.finish(family.unembed(family.ln_final.gain(2 * old("ln_final.normalized"), lm.dtype)))[:, -1:]
        yield "ln_final.normalized doubled: logits follow", new("logits"), logits, logits

    def capped(new: At, old: At) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        wanted = family.finish((old("logits_precap") + bump) / family.logit_scale)
        yield "δ at logits_precap: logits follow", new("logits"), wanted, wanted

    if family.ln_final is not None:
        cases += [(make.scale("ln_final.scale", 2.0), halved), (make.scale("ln_final.normalized", 2.0), answered)]
    cases.append(_shift("logits", "logits", bump, lambda at: at("logits"), "logits"))
    if family.final_softcap is not None:
        cases.append((make.add("logits_precap", bump), capped))
    return cases
