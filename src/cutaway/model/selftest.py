"""The algebra that every attached model must satisfy, on every layer.

One forward captures everything and checks identities between sites (a sum that must hold, a product that must come
out). Then each layer runs alone on a batch of short rows, each with one edit, whose effect at the next sites is
checked. Names, shapes and logits can all be right while a site is read from the wrong place; sums cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.model.families import Norm
from cutaway.model.selftest_edits import Case, activation, end_cases, layer_cases, projected
from cutaway.model.tokens import Tokens

if TYPE_CHECKING:
    from cutaway.model.language_model import LanguageModel
    from cutaway.model.run import Run

# Largest allowed |left - right| relative to the scale of the values compared. Norms, rotary angles and softmaxes of
# transformers are computed in fp32 even in a float64 model.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}
_LENGTH = 8


@dataclass(frozen=True)
class Check:
    """One identity at one layer: `residual` is max |left - right| over the scale of the values, `ok` if within
    tolerance.
    """

    check: str
    layer: int | None
    residual: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.residual <= self.tolerance


@dataclass(frozen=True)
class SelfTest:
    """The result of a self-test; `rows` holds one `Check` an identity and layer."""

    model: str
    dtype: str
    rows: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(row.ok for row in self.rows)

    def failures(self) -> list[Check]:
        return [row for row in self.rows if not row.ok]

    def require(self) -> None:
        """Raise CutawayError naming the first failed check and its layer."""
        for row in self.failures():
            where = "" if row.layer is None else f" at layer {row.layer}"
            raise CutawayError(
                f"{self.model} fails its self-test{where}: {row.check} (residual {row.residual:.2g}, allowed "
                f"{row.tolerance:.2g}), so results on it would be wrong."
            )

    def __str__(self) -> str:
        names = list(dict.fromkeys(row.check for row in self.rows))
        lines = [f"{'check':<66} {'layers':>6} {'worst':>9} {'allowed':>9}"]
        for name in names:
            rows = [row for row in self.rows if row.check == name]
            worst = max(rows, key=lambda row: row.residual)
            mark = "" if all(row.ok for row in rows) else f"  FAILS at layer {worst.layer}"
            lines.append(f"{name:<66} {len(rows):>6} {worst.residual:>9.1e} {worst.tolerance:>9.1e}{mark}")
        verdict = "passed" if self.passed else f"FAILED ({len(self.failures())} of {len(self.rows)})"
        lines.append(f"self-test of {self.model} in {self.dtype}: {verdict}")
        return "\n".join(lines)


class _Checks:
    def __init__(self, lm: LanguageModel) -> None:
        self.tolerance = TOLERANCE.get(lm.dtype, 6e-3)
        self.rows: list[Check] = []

    def equal(self, check: str, layer: int | None, left: Tensor, right: Tensor, scale: Tensor | None = None) -> None:
        """Compare; the scale is the largest value compared, or the given one where a difference of large values is
        taken.
        """
        left, right = left.double(), right.double()
        if not left.numel():  # nothing is left to compare, as where all scores are NaN
            self.rows.append(Check(check, layer, float("inf"), self.tolerance))
            return
        size = max(float(t.abs().max()) for t in ((left, right) if scale is None else (left, right, scale.double())))
        residual = float((left - right).abs().max()) / max(size, 1e-12)
        self.rows.append(Check(check, layer, residual if residual == residual else float("inf"), self.tolerance))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _centred(norm: Norm | None, x: Tensor) -> Tensor:
    """What of a norm's input is left in normalized * scale."""
    return x - x.mean(-1, keepdim=True) if norm is not None and norm.centered else x


def _identities(lm: LanguageModel, run: Run, layer: int, checks: _Checks) -> None:
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
    for norm, name, x, module in (
        (parts.ln1, "ln1", at("resid_pre"), "attn.in"),
        (parts.ln2, "ln2", before_mlp, "mlp.in"),
        (parts.ln1_post, "ln1_post", None, "attn.out"),
        (parts.ln2_post, "ln2_post", None, "mlp.out"),
    ):
        if norm is None:
            continue
        if x is not None:
            wide = _centred(norm, x.to(at(f"{name}.scale").dtype))
            equal(f"{name}.normalized * {name}.scale = its input", at(f"{name}.normalized") * at(f"{name}.scale"), wide)
        equal(f"gain({name}.normalized) = {module}", norm.gain(at(f"{name}.normalized"), lm.dtype), at(module))
    _attention(lm, at, layer, equal)
    bias = parts.output.bias
    written = at("attn.result").sum(2) + (bias if isinstance(bias, Tensor) else 0.0)
    if parts.ln1_post is None:
        equal("sum of attn.result + bias = attn.out", written, at("attn.out"))
    else:
        writes = at("ln1_post.normalized") * at("ln1_post.scale")
        equal(
            "sum of attn.result + bias = ln1_post.normalized * ln1_post.scale",
            _centred(parts.ln1_post, written),
            writes,
        )
    equal("mlp.in W_in + bias = mlp.pre", parts.mlp_in(at("mlp.in")), at("mlp.pre"))
    if parts.mlp_linear is not None:
        equal("mlp.in W_up + bias = mlp.pre_linear", parts.mlp_linear(at("mlp.in")), at("mlp.pre_linear"))
    if (act := activation(lm, layer)) is not None:
        activated = act(at("mlp.pre"))
        equal(
            "act(mlp.pre) [* mlp.pre_linear] = mlp.post",
            activated if parts.mlp_linear is None else activated * at("mlp.pre_linear"),
            at("mlp.post"),
        )
    written = parts.mlp_out(at("mlp.post"))
    if parts.ln2_post is None:
        equal("mlp.post W_out + bias = mlp.out", written, at("mlp.out"))
    else:
        wide = at("ln2_post.normalized") * at("ln2_post.scale")
        equal("mlp.post W_out + bias = ln2_post.normalized * ln2_post.scale", _centred(parts.ln2_post, written), wide)
    if layer + 1 < lm.n_layers:
        equal("resid_post = the next resid_pre", stream, run[f"blocks.{layer + 1}.resid_pre"])


def _attention(
    lm: LanguageModel, at: Callable[[str], Tensor], layer: int, equal: Callable[[str, Tensor, Tensor], None]
) -> None:
    parts = lm.family.layers[layer]
    for name, value in projected(lm, layer, at("attn.in")).items():
        equal(f"attn.in W + bias = attn.{name}", value, at(f"attn.{name}"))
    for name in ("q", "k"):
        plain = at(f"attn.{name}")
        if lm.family.qk_norm:
            plain = getattr(parts.attention, f"{name}_norm")(plain)
        length, turned = _wide(plain).norm(dim=-1), _wide(at(f"attn.rot_{name}")).norm(dim=-1)
        factor = (length * turned).sum() / length.square().sum()  # some rotary embeddings bring a factor
        equal(f"attn.rot_{name} is attn.{name} turned: lengths stay", factor * length, turned)
    groups = lm.n_heads // lm.n_kv_heads
    keys, values = (at(f"attn.{s}").repeat_interleave(groups, 2) for s in ("rot_k", "v"))
    pattern, scores = at("attn.pattern"), at("attn.scores")
    equal("softmax(attn.scores) = attn.pattern", _wide(scores).softmax(-1), pattern)
    equal("attn.pattern rows sum to 1", _wide(pattern).sum(-1), torch.ones(pattern.shape[:-1], device=pattern.device))
    equal("attn.pattern attn.v = attn.z", torch.einsum("bhqk,bkhe->bqhe", pattern, values), at("attn.z"))
    raw = torch.einsum("bqhe,bkhe->bhqk", _wide(at("attn.rot_q")), _wide(keys))
    seen = scores > -torch.inf
    scaling, cap = (getattr(parts.attention, name, None) for name in ("scaling", "attn_logit_softcapping"))
    if not isinstance(scaling, float):  # then at least one factor for all cells
        scaling = (raw[seen] * _wide(scores[seen])).sum() / raw[seen].square().sum()
    raw = raw * scaling
    raw = raw if cap is None else torch.tanh(raw / cap) * cap
    equal("attn.rot_q attn.rot_k, scaled = attn.scores", raw[seen], scores[seen])
    by_head = torch.einsum("bphe,hed->bphd", at("attn.z"), lm.w_o(layer))
    equal("attn.z W_O by head = attn.result", by_head, at("attn.result"))


def _ends(lm: LanguageModel, run: Run, checks: _Checks) -> None:
    """Identities before the first layer and after the last."""
    start, final = run["blocks.0.resid_pre"], run[f"blocks.{lm.n_layers - 1}.resid_post"]
    if lm.family.pos_embed is None:
        checks.equal("embed = the first resid_pre", None, run["embed"], start)
    else:
        checks.equal("embed + pos_embed = the first resid_pre", None, run["embed"] + run["pos_embed"], start)
    norm, normalized = lm.family.ln_final, run["ln_final.normalized"]
    wide = _centred(norm, final.to(normalized.dtype))
    checks.equal(
        "ln_final.normalized * ln_final.scale = the last resid_post", None, normalized * run["ln_final.scale"], wide
    )
    logits, cap = lm.family.unembed(norm.gain(normalized, lm.dtype)), lm.family.final_softcap
    if cap is not None:
        checks.equal("gain(ln_final.normalized) W_U = logits_precap", None, logits, run["logits_precap"])
        logits = torch.tanh(run["logits_precap"] / cap) * cap
        checks.equal("softcap(logits_precap) = logits", None, logits, run["logits"])
    else:
        checks.equal("gain(ln_final.normalized) W_U = logits", None, logits, run["logits"])
    assert run.logits is not None
    checks.equal("logits as captured = logits as returned", None, run["logits"], run.logits)
    checks.equal("unembed(last resid_post) = logits", None, lm.unembed(final), run.logits)


def run_selftest(lm: LanguageModel) -> SelfTest:
    """See `LanguageModel.selftest`."""
    for name, weights in lm.hf.named_parameters():
        if weights.is_floating_point() and not bool(torch.isfinite(weights).all()):
            raise CutawayError(f"The weights of {lm.name} hold NaN or infinity (first: {name}); they are damaged.")
    with torch.no_grad():
        return _selftest(lm)


def _selftest(lm: LanguageModel) -> SelfTest:
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(0, lm.d_vocab, (1, min(_LENGTH, lm.context_length)), generator=generator)
    tokens = lm.tokens(Tokens(row, torch.ones_like(row, dtype=torch.bool), (tuple(lm.token_strings(row[0])),)))
    checks = _Checks(lm)
    plain = lm.hf(
        input_ids=tokens.ids, attention_mask=tokens.mask.long(), position_ids=tokens.position_ids, use_cache=False
    ).logits
    untouched = lm.run(tokens)
    assert untouched.logits is not None
    exact = 0.0 if torch.equal(plain, untouched.logits) else float("inf")
    checks.rows.append(Check("nothing captured or edited: logits are bit-equal", None, exact, 0.0))
    base = lm.run(tokens, capture=lm.sites().present())
    _ends(lm, base, checks)
    for layer in range(lm.n_layers):
        _identities(lm, base, layer, checks)
        size = max(float(base[f"blocks.{layer}.{part}"].float().std()) for part in ("resid_pre", "resid_post"))
        delta = torch.randn(max(lm.d_model, lm.d_head), generator=generator) * size
        cases = layer_cases(lm, layer, delta.to(lm.device, lm.dtype), layer % lm.n_heads, row.shape[1])
        observed = [site.name for site in lm.sites() if site.layer == layer and site.absent is None]
        after = layer + 1 < lm.n_layers
        observed += [f"blocks.{layer + 1}.resid_pre"] if after else ["ln_final.scale", "ln_final.normalized"]
        _check_edits(lm, tokens, base, checks, layer, cases, observed)
    delta = torch.randn(max(lm.d_model, lm.d_vocab), generator=generator)
    observed = ["embed", "blocks.0.resid_pre", "ln_final.scale", "ln_final.normalized", "logits"]
    observed += [name for name in ("pos_embed", "logits_precap") if lm.family.absent(name) is None]
    _check_edits(lm, tokens, base, checks, None, end_cases(lm, delta.to(lm.device, lm.dtype)), observed)
    return SelfTest(lm.name, str(lm.dtype).removeprefix("torch."), tuple(checks.rows))


def _check_edits(
    lm: LanguageModel,
    tokens: Tokens,
    base: Run,
    checks: _Checks,
    layer: int | None,
    cases: Sequence[Case],
    observed: Sequence[str],
) -> None:
    """One row for each case, from the layer's own stream to the last site that is looked at."""
    edits = [replace(edit, rows=(row,)) for row, (edit, _) in enumerate(cases)]
    run = lm.run(tokens.repeat(len(cases)), capture=observed, edits=edits, logits=None, resume=base)
    for row, (_, verify) in enumerate(cases):

        def new(name: str, row: int = row) -> Tensor:
            return run[_full(name, layer)][row : row + 1]

        def old(name: str) -> Tensor:
            return base[_full(name, layer)]

        for check, left, right, scale in verify(new, old):
            checks.equal(check, layer, left, right, scale)


def _full(name: str, layer: int | None) -> str:
    return name if layer is None or name.startswith(("blocks.", "ln_final.")) else f"blocks.{layer}.{name}"
