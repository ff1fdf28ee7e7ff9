"""The algebra that every attached model must satisfy, on every layer.

The first forward captures every site of one short row and checks identities between sites (a sum that must hold, a
product that must come out). The second is a batch of the same row again and again, each with one edit at a site of one
layer, whose effect at the next sites is checked. Names, shapes and logits can all be right while a site is read from
the wrong place; sums cannot. Three more, of one or two rows, see whether the row is the same beside one far along in
the context, and whether attention looks back alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError, NotSupported
from cutaway.model.architecture.norms import probe_norm
from cutaway.model.architecture.wrapped import bias_of, named_weights, router_parameters
from cutaway.model.attached import Attached
from cutaway.model.edits.resolve import resolve
from cutaway.model.forward.execution import Execution, Span
from cutaway.model.own.attention import OwnAttention
from cutaway.model.own.module import PAGE, OwnModel
from cutaway.model.selftest.edit_cases import (
    At,
    Case,
    activation,
    clipped,
    end_cases,
    layer_cases,
    neurons,
    projected,
    wide_of,
)
from cutaway.model.selftest.result import Checks, SelfTest
from cutaway.model.tokens import Tokens

if TYPE_CHECKING:
    from cutaway.model.forward.run import Run

_LENGTH = 8


Equal = Callable[[str, Tensor, Tensor], None]


def _identities(lm: Attached, run: Run, layer: int, checks: Checks) -> None:
    parts, family, b = lm.family.layers[layer], lm.family, f"blocks.{layer}"

    def at(name: str) -> Tensor:
        return run[f"{b}.{name}"]

    def equal(check: str, left: Tensor, right: Tensor) -> None:
        checks.equal(check, layer, left, right)

    stream = at("resid_post")
    equal("resid_pre + attn.out + mlp.out = resid_post", at("resid_pre") + at("attn.out") + at("mlp.out"), stream)
    if not family.parallel:
        equal("resid_pre + attn.out = resid_mid", at("resid_pre") + at("attn.out"), at("resid_mid"))
    before_mlp = at("resid_pre") if family.parallel else at("resid_mid")
    for norm, name, x, module, multiplier in (
        (parts.ln1, "ln1", at("resid_pre"), "attn.in", 1.0),
        (parts.ln2, "ln2", before_mlp, "mlp.in", 1.0),
        (parts.ln1_post, "ln1_post", None, "attn.out", parts.attn_multiplier),
        (parts.ln2_post, "ln2_post", None, "mlp.out", parts.mlp_multiplier),
    ):
        if norm is None:
            if module.endswith(".in"):
                shared = family.parallel and name == "ln2"
                what = "attn.in" if shared else "resid_pre" if name == "ln1" else "resid_mid"
                equal(f"{what} = {module}, without a norm between", at(what), at(module))
            continue
        if x is not None:
            wide = norm.center(x.to(at(f"{name}.scale").dtype))
            equal(f"{name}.normalized * {name}.scale = its input", at(f"{name}.normalized") * at(f"{name}.scale"), wide)
        gained = norm.gain(at(f"{name}.normalized"), lm.dtype) * multiplier
        equal(f"gain({name}.normalized) = {module}", gained, at(module))
    _attention(lm, at, layer, equal)
    bias = bias_of(parts.output)
    written = at("attn.result").sum(2) + (0.0 if bias is None else bias)
    if parts.ln1_post is None:
        equal("sum of attn.result + bias = attn.out", written * parts.attn_multiplier, at("attn.out"))
    else:
        writes = at("ln1_post.normalized") * at("ln1_post.scale")
        equal(
            "sum of attn.result + bias = ln1_post.normalized * ln1_post.scale", parts.ln1_post.center(written), writes
        )
    if parts.experts is None:
        _mlp(lm, at, layer, equal)
    else:
        _experts(lm, at, layer, equal)
    if layer + 1 < lm.n_layers:
        equal("resid_post = the next resid_pre", stream, run[f"blocks.{layer + 1}.resid_pre"])


def _mlp(lm: Attached, at: At, layer: int, equal: Equal) -> None:
    parts = lm.family.layers[layer]
    pre, linear = neurons(parts, at("mlp.in"))
    equal("mlp.in W_in + bias = mlp.pre", pre, at("mlp.pre"))
    if linear is not None:
        equal("mlp.in W_up + bias = mlp.pre_linear", linear, at("mlp.pre_linear"))
    if (act := activation(lm, layer)) is not None:
        activated = act(at("mlp.pre"))
        equal(
            "act(mlp.pre) [* mlp.pre_linear] = mlp.post",
            activated if linear is None else activated * at("mlp.pre_linear"),
            at("mlp.post"),
        )
    assert parts.mlp_out is not None
    written = parts.mlp_out(at("mlp.post"))
    if parts.ln2_post is None:
        equal("mlp.post W_out + bias = mlp.out", written * parts.mlp_multiplier, at("mlp.out"))
    else:
        wide = at("ln2_post.normalized") * at("ln2_post.scale")
        equal("mlp.post W_out + bias = ln2_post.normalized * ln2_post.scale", parts.ln2_post.center(written), wide)


def _experts(lm: Attached, at: At, layer: int, equal: Equal) -> None:
    """What all experts write together is what their module returns, given the router's choice."""
    parts = lm.family.layers[layer]
    experts = parts.experts
    assert experts is not None
    x, weights = at("mlp.in"), at("mlp.router.weights")
    matrix, bias = router_parameters(experts.router)
    if matrix is not None and matrix.shape == (experts.n, lm.d_model):
        logits = wide_of(x) @ wide_of(matrix).T + (0.0 if bias is None else wide_of(bias))
        equal("mlp.in W_router + bias = mlp.router.logits", logits, at("mlp.router.logits"))
    chosen = [at(f"mlp.experts.{e}.out") for e in range(experts.n)]
    index = torch.arange(experts.n, device=x.device).expand(x.shape[0] * x.shape[1], -1)
    together = experts.module(x.flatten(0, 1), index, weights.flatten(0, 1)).view(x.shape)
    equal("sum of mlp.experts.{e}.out = the experts with mlp.router.weights", torch.stack(chosen).sum(0), together)
    if not experts.shared:
        written = at("mlp.out") / parts.mlp_multiplier
        if parts.ln2_post is not None:
            written = at("ln2_post.normalized") * at("ln2_post.scale")
            together = parts.ln2_post.center(together)
        equal("the experts with mlp.router.weights = what the MLP writes", together, written)


def _attention(lm: Attached, at: At, layer: int, equal: Equal) -> None:
    parts, family = lm.family.layers[layer], lm.family
    for name, value in projected(lm, layer, at("attn.in")).items():
        equal(f"attn.in W + bias = attn.{name}", value, at(f"attn.{name}"))
    for name in ("q",) if family.latent else ("q", "k"):
        turned = wide_of(at(f"attn.rot_{name}"))
        norm = parts.q_norm if name == "q" else parts.k_norm
        if family.qk_norm_last and norm is not None and isinstance(norm.weight, Tensor):
            turned = turned / wide_of(norm.weight)
        # a norm's module may want heads first, last, or in one dimension with their width: the one that fits is right
        residuals = []
        for plain in _queries_or_keys(lm, layer, name, at(f"attn.{name}")):
            length = turned.norm(dim=-1)
            factor = (plain * length).sum() / plain.square().sum()  # some rotary embeddings bring a factor
            residuals.append((factor * plain, length))
        left, right = min(residuals, key=lambda pair: float((pair[0] - pair[1]).abs().max()))
        equal(f"attn.rot_{name} is attn.{name} turned: lengths stay", left, right)
    groups = lm.n_heads // lm.n_kv_heads
    keys = at("attn.rot_k").repeat_interleave(lm.n_heads // at("attn.rot_k").shape[2], 2)
    values = clipped(family, at("attn.v")).repeat_interleave(groups, 2)
    pattern, scores = at("attn.pattern"), at("attn.scores")
    sinks = getattr(parts.core, "sinks", None)
    if sinks is None:
        equal("softmax(attn.scores) = attn.pattern", wide_of(scores).softmax(-1), pattern)
        total = wide_of(pattern).sum(-1)
        equal("attn.pattern rows sum to 1", total, torch.ones_like(total))
    else:
        sink = wide_of(sinks).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        whole = torch.cat([wide_of(scores), sink], -1).softmax(-1)
        equal("softmax(attn.scores, sink) = attn.pattern and the sink's share", whole[..., :-1], pattern)
    equal("attn.pattern attn.v = attn.z", torch.einsum("bhqk,bkhe->bqhe", pattern, values), at("attn.z"))
    raw = torch.einsum("bqhe,bkhe->bhqk", wide_of(at("attn.rot_q")), wide_of(keys))
    seen = scores > -torch.inf
    own = parts.observed if isinstance(parts.observed, OwnAttention) else None
    scaling, cap = (getattr(parts.core, name, None) for name in ("scaling", "attn_logit_softcapping"))
    scaling = scaling if own is None else own.scale
    if not family.alibi:
        fitted = float((raw[seen] * wide_of(scores[seen])).sum() / raw[seen].square().sum())
        if not isinstance(scaling, float):  # then at least one factor for all cells
            scaling = fitted
        elif own is None and abs(fitted - 1.0) < abs(
            fitted - scaling
        ):  # some scale the queries before attention gets them
            scaling = 1.0
        raw = raw * scaling
        raw = raw if cap is None else torch.tanh(raw / cap) * cap
        equal("attn.rot_q attn.rot_k, scaled = attn.scores", raw[seen], scores[seen])
    else:
        _alibi(lm, raw, wide_of(scores), equal)
    by_head = torch.einsum("bphe,hed->bphd", at("attn.z"), lm.w_o(layer))
    equal("attn.z W_O by head = attn.result", by_head, at("attn.result"))


def _alibi(lm: Attached, raw: Tensor, scores: Tensor, equal: Equal) -> None:
    """What the scores hold beside scaled products is a slope of each head times the distance."""
    length = scores.shape[-1]
    place = torch.arange(length, device=scores.device, dtype=scores.dtype)
    row, distance = place[:, None].expand(length, length), place[:, None] - place[None]
    seen = scores[0, 0] > -torch.inf
    predicted = torch.zeros_like(scores)
    for head in range(lm.n_heads):
        terms = torch.stack([raw[0, head], distance, row, torch.ones_like(row)], -1).double()
        fit = torch.linalg.lstsq(terms[seen].cpu(), scores[0, head][seen].double().cpu()[:, None]).solution
        predicted[0, head] = (terms @ fit.to(terms.device))[..., 0].to(scores.dtype)
    left, right = (x.masked_fill(~seen, 0.0) for x in (predicted, scores))
    equal("attn.rot_q attn.rot_k, scaled, less slope * distance = attn.scores", left, right)


def _queries_or_keys(lm: Attached, layer: int, name: str, value: Tensor) -> list[Tensor]:
    """The lengths [b p H] that rotated queries or keys have to have, for each way to call a QK-norm."""
    parts = lm.family.layers[layer]
    norm = parts.q_norm if name == "q" else parts.k_norm
    value = clipped(lm.family, value)
    if norm is None:
        return [wide_of(value).norm(dim=-1)]
    if lm.family.qk_norm_last:  # a rotation leaves the length that the norm divides by
        x, scale = probe_norm(norm, value.shape[-1]).divide(value)
        return [(x / scale).norm(dim=-1)]
    found = []
    for call in (
        lambda: norm(value),
        lambda: norm(value.transpose(1, 2)).transpose(1, 2),
        lambda: norm(value.flatten(-2)).view(value.shape),
    ):
        try:
            normed = call()
        except (RuntimeError, ValueError, IndexError):  # the module wants another shape
            continue
        if normed.shape == value.shape:
            found.append(wide_of(normed).norm(dim=-1))
    return found


def _ends(lm: Attached, run: Run, checks: Checks) -> None:
    """Identities before the first layer and after the last."""
    start, final = run["blocks.0.resid_pre"], run[f"blocks.{lm.n_layers - 1}.resid_post"]
    if not lm.family.has_positions:
        checks.equal("embed = the first resid_pre", None, run["embed"], start)
    else:
        checks.equal("embed + pos_embed = the first resid_pre", None, run["embed"] + run["pos_embed"], start)
    norm = lm.family.ln_final
    if norm is None:
        unembedded, what = lm.family.unembed(final), "the last resid_post"
    else:
        normalized, what = run["ln_final.normalized"], "gain(ln_final.normalized)"
        wide = norm.center(final.to(normalized.dtype))
        checks.equal(
            "ln_final.normalized * ln_final.scale = the last resid_post", None, normalized * run["ln_final.scale"], wide
        )
        unembedded = lm.family.unembed(norm.gain(normalized, lm.dtype))
    if lm.family.final_softcap is not None:
        precap = unembedded * lm.family.logit_scale
        checks.equal(f"{what} W_U = logits_precap", None, precap, run["logits_precap"])
        unembedded = run["logits_precap"] / lm.family.logit_scale
        checks.equal("softcap(logits_precap) = logits", None, lm.family.finish(unembedded), run["logits"])
    else:
        logits = lm.family.finish(unembedded)
        checks.equal(f"{what} W_U = logits", None, logits, run["logits"])
    checks.equal("logits as captured = logits as returned", None, run["logits"], run.all_logits)
    checks.equal("unembed(last resid_post) = logits", None, lm.unembed(final), run.all_logits)


def run_selftest(lm: Attached) -> SelfTest:
    """See `LanguageModel.selftest`."""
    for name, weights in named_weights(lm.hf):
        if weights.is_floating_point() and not bool(torch.isfinite(weights).all()):
            raise CutawayError(f"The weights of {lm.name} hold NaN or infinity (first: {name}); they are damaged.")
    with torch.no_grad():
        return _selftest(lm)


def verify(lm: Attached) -> None:
    """Refuse a model that does not add up: for model types that the test bed does not hold.

    Raises CutawayError with the first check that fails.
    """
    try:
        test = run_selftest(lm)
    except CutawayError as error:
        if not isinstance(lm.hf, OwnModel):
            raise
        raise _not_supported(lm, str(error).removesuffix(".")) from error
    except Exception as error:  # what a model of unknown build raises when its parts are not where they are looked for
        raise _not_supported(lm, f"its parts do not fit together ({type(error).__name__}: {error})") from error
    failed = test.failures()
    if failed:
        where = "" if failed[0].layer is None else f" at layer {failed[0].layer}"
        raise _not_supported(
            lm,
            f"it fails {len(failed)} of {len(test.checks)} checks, the first{where}: {failed[0].check} (residual "
            f"{failed[0].residual:.2g}, allowed {failed[0].tolerance:.2g})",
        )


def _not_supported(lm: Attached, reason: str) -> CutawayError:
    if isinstance(lm.hf, OwnModel):
        return CutawayError(f"{lm.architecture} is not as described: {reason} ({PAGE}).")
    return NotSupported(f"{lm.architecture} is not supported: {reason}.")


def _selftest(lm: Attached) -> SelfTest:
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(0, lm.d_vocab_in, (1, min(_LENGTH, lm.context_length)), generator=generator)
    tokens = lm.tokens(Tokens(row, torch.ones_like(row, dtype=torch.bool), lm.spelled(row.tolist())))
    checks = Checks(lm.dtype)
    base = lm.run(tokens, capture=lm.sites().present(), limit_bytes=2**62)
    _ends(lm, base, checks)
    if isinstance(lm.hf, OwnModel):  # what its attention is observed by is ours, not the module's author's
        unseen = lm.run(tokens)
        checks.equal("logits of a run that captures = of one that does not", None, base.all_logits, unseen.all_logits)
    for layer in range(lm.n_layers):
        _identities(lm, base, layer, checks)
    _edits(lm, tokens, base, checks, generator)
    return SelfTest(lm.name, str(lm.dtype).removeprefix("torch."), tuple(checks.rows), _notes_on(lm))


def _notes_on(lm: Attached) -> tuple[str, ...]:
    """What sets limits to batches and caches of this model, a sentence each."""
    notes = []
    if lm.hf.training:
        notes.append(
            "The model is in training mode: with dropout each run draws anew, and attn.pattern attn.v is not attn.z; "
            "call eval()."
        )
    if not lm.causal:
        notes.append(
            "Attention is not causal: each token changes what is computed at those before it, so texts are generated "
            "without a cache, no prefix is shared, and logits do not foretell the next token of the text they read."
        )
    if lm.ropes is not None:
        notes += [
            f"Rotary angles depend on the length: texts of more than {limit} tokens are turned by others, so they "
            "share no batch with shorter ones."
            for limit in lm.ropes.switches
        ]
        if lm.ropes.stretches is not None:
            notes.append(
                f"Above {lm.ropes.stretches} tokens rotary angles depend on the longest text read before: longer texts "
                "are refused."
            )
    return tuple(notes)


def _beside(lm: Attached, tokens: Tokens, site: str) -> tuple[Tensor, Tensor]:
    """A site's value at the tokens of a row [1, p], run alone, and run beside one that stands at the end of the context
    (or of the lengths that have the same rotary angles): what one row is must not hang on the others, nor, where
    attention is not causal, on padding.
    """
    n = tokens.ids.shape[1]
    end = lm.context_length if lm.ropes is None else lm.ropes.end(n, lm.context_length)
    # a mask may mean a kernel that rounds otherwise, and a module of the user's may take none
    padded = not lm.causal and "attention_mask" in getattr(lm.hf, "takes", ("attention_mask",))
    width = min(n + _LENGTH // 2, end) if padded else n
    ids = tokens.ids[0, torch.arange(width, device=tokens.ids.device) % n].repeat(2, 1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, n:] = False
    places = Tokens(ids, mask, ()).position_ids.clone()
    places[1] += end - width if end < 2**31 else 0  # a context without a limit has no end
    execution = Execution(lm, (site,), (), mask, span=Span(stop=True))
    execution.forward(lambda: lm.hf(input_ids=ids, attention_mask=mask.long(), position_ids=places, use_cache=False))
    return lm.run(tokens, capture=site, logits=None)[site], execution.values[site][:1, :n]


@dataclass(frozen=True)
class _Batch:
    """Cases whose effects are looked at in the same sites: one row each, from `start` on."""

    layer: int | None
    start: int
    cases: Sequence[Case]
    observed: Sequence[str]


def _edits(lm: Attached, tokens: Tokens, base: Run, checks: Checks, generator: torch.Generator) -> None:
    """One forward of a batch of rows: the first without an edit, each other with one."""
    batches: list[_Batch] = []
    ends = ["logits"] if lm.family.ln_final is None else ["ln_final.scale", "ln_final.normalized"]
    end = 1
    for layer in range(lm.n_layers):
        size = max(float(base[f"blocks.{layer}.{part}"].float().std()) for part in ("resid_pre", "resid_post"))
        delta = torch.randn(max(lm.d_model, lm.d_head, lm.family.d_value), generator=generator) * size
        cases = layer_cases(lm, layer, delta.to(lm.device, lm.dtype), layer % lm.n_heads, tokens.ids.shape[1], base)
        observed = [site.name for site in lm.sites() if site.layer == layer and site.absent is None]
        after = layer + 1 < lm.n_layers
        observed += [f"blocks.{layer + 1}.resid_pre"] if after else ends
        batches.append(_Batch(layer, end, cases, observed))
        end += len(cases)
    delta = torch.randn(max(lm.d_model, lm.d_vocab), generator=generator).to(lm.device, lm.dtype)
    observed = ["embed", "blocks.0.resid_pre", *ends, *(["logits"] if lm.family.ln_final is not None else [])]
    observed += [name for name in ("pos_embed", "logits_precap") if lm.family.absent(name) is None]
    batches.append(_Batch(None, end, end_cases(lm, delta), observed))
    end += len(batches[-1].cases)

    edits = [replace(edit, rows=(batch.start + i,)) for batch in batches for i, (edit, _) in enumerate(batch.cases)]
    many = tokens.repeat(end)
    table = lm.sites()
    wanted: dict[str, list[_Batch]] = {}
    for batch in batches:
        for name in batch.observed:
            wanted.setdefault(name, []).append(batch)
    kept = {
        name: slice(min(b.start for b in users), max(b.start + len(b.cases) for b in users))
        for name, users in wanted.items()
    }
    last_stream = f"blocks.{lm.n_layers - 1}.resid_post"
    kept[last_stream] = slice(0, kept[last_stream].stop)  # the row without an edit as well
    resolved = [resolve(i, edit, table[edit.site], many) for i, edit in enumerate(edits)]
    execution = Execution(lm, table.expand_all(kept), resolved, many.mask, span=Span(last_only=True))
    execution.rows_of = kept
    out = execution.forward(
        lambda: lm.hf(
            input_ids=many.ids, attention_mask=many.mask.long(), position_ids=many.position_ids, use_cache=False
        )
    )
    execution.touch("logits", out.logits)
    values = execution.values
    alone, beside = _beside(lm, tokens, last_stream)  # by the kernels of a run that looks into no attention
    in_batch, by_itself = torch.cat([values[last_stream][:1], beside]), torch.cat([base[last_stream], alone])
    checks.equal("a row of a batch without an edit = the row alone", None, in_batch, by_itself)
    for batch in batches:
        for i, (_, verify_case) in enumerate(batch.cases):
            row = batch.start + i

            def new(name: str, row: int = row, layer: int | None = batch.layer) -> Tensor:
                full = _full(name, layer)
                return values[full][row - kept[full].start : row - kept[full].start + 1]

            def old(name: str, layer: int | None = batch.layer) -> Tensor:
                value = base[_full(name, layer)]
                return value[:, -1:] if name.startswith("logits") else value

            for check, left, right, scale in verify_case(new, old):
                checks.equal(check, batch.layer, left, right, scale)


def _full(name: str, layer: int | None) -> str:
    return name if layer is None or name.startswith(("blocks.", "ln_final.", "logits")) else f"blocks.{layer}.{name}"
