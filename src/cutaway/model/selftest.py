"""The algebra that every attached model must satisfy, on every layer.

One forward captures everything and checks identities between sites (a sum that must hold, a product that must come
out). A second one holds a batch of short rows, each with one edit, and checks the edit's effect at the next site.
Names, shapes and logits can all be right while a site is read from the wrong place; sums cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.model import edits as make
from cutaway.model.families import weight_matrix
from cutaway.model.tokens import Tokens

if TYPE_CHECKING:
    from cutaway.model.language_model import LanguageModel
    from cutaway.model.run import Run

# Largest allowed |left - right| relative to the scale of the values compared.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}
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
        size = max(float(t.abs().max()) for t in ((left, right) if scale is None else (left, right, scale.double())))
        residual = float((left - right).abs().max()) / max(size, 1e-12)
        self.rows.append(Check(check, layer, residual if residual == residual else float("inf"), self.tolerance))


def _identities(lm: LanguageModel, run: Run, layer: int, checks: _Checks) -> None:
    parts, family, b = lm.family.layers[layer], lm.family, f"blocks.{layer}"

    def at(name: str) -> Tensor:
        return run[f"{b}.{name}"]

    def equal(check: str, left: Tensor, right: Tensor, scale: Tensor | None = None) -> None:
        checks.equal(check, layer, left, right, scale)

    stream = at("resid_post")
    equal("resid_pre + attn.out + mlp.out = resid_post", at("resid_pre") + at("attn.out") + at("mlp.out"), stream)
    if not family.parallel:
        equal("resid_pre + attn.out = resid_mid", at("resid_pre") + at("attn.out"), at("resid_mid"))
    before_mlp = at("resid_pre") if family.parallel else at("resid_mid")
    for norm, name, x, y in (
        (parts.ln1, "ln1", at("resid_pre"), at("attn.in")),
        (parts.ln2, "ln2", before_mlp, at("mlp.in")),
    ):
        wide, scale = at(f"{name}.normalized"), at(f"{name}.scale")
        centred = x.to(wide.dtype) - x.to(wide.dtype).mean(-1, keepdim=True) if norm.centered else x
        equal(f"{name}.normalized * {name}.scale = its centred input", wide * scale, centred)
        equal(f"gain({name}.normalized) = what the module reads", norm.gain(wide, y.dtype), y)
    groups = lm.n_heads // lm.n_kv_heads
    keys, values = (at(f"attn.{s}").repeat_interleave(groups, 2) for s in ("rot_k", "v"))
    pattern, scores = at("attn.pattern"), at("attn.scores")
    equal("softmax(scores) = pattern", scores.float().softmax(-1), pattern)
    equal("pattern rows sum to 1", pattern.float().sum(-1), torch.ones(pattern.shape[:-1], device=pattern.device))
    z = torch.einsum("bhqk,bkhe->bqhe", pattern, values)
    equal("pattern v = z", z, at("attn.z"))
    raw = torch.einsum("bqhe,bkhe->bhqk", at("attn.rot_q").float(), keys.float())
    seen = scores > -torch.inf
    slope = (raw[seen] * scores[seen].float()).sum() / raw[seen].square().sum()
    if getattr(parts.attention, "attn_logit_softcapping", None) is None:
        equal("scores are proportional to rot_q rot_k", slope * raw[seen], scores[seen])
    bias = parts.output.bias
    written = at("attn.result").sum(2) + (bias if isinstance(bias, Tensor) else 0.0)
    writes = at("attn.out") if parts.ln1_post is None else at("ln1_post.normalized") * at("ln1_post.scale")
    equal("sum of head results + bias = what attention writes", written, writes)
    w_out, b_out = weight_matrix(parts.mlp_out), parts.mlp_out.bias
    written = at("mlp.post") @ w_out + (b_out if isinstance(b_out, Tensor) else 0.0)
    writes = at("mlp.out") if parts.ln2_post is None else at("ln2_post.normalized") * at("ln2_post.scale")
    equal("mlp.post W_out + bias = what the MLP writes", written, writes)
    act = getattr(parts.mlp, "act_fn", None) or getattr(parts.mlp, "act", None)
    if callable(act):
        activated: Tensor = act(at("mlp.pre"))  # pyright: ignore[reportAssignmentType]
        equal(
            "act(mlp.pre) [* mlp.pre_linear] = mlp.post",
            activated if parts.mlp_linear is None else activated * at("mlp.pre_linear"),
            at("mlp.post"),
        )
    if layer + 1 < lm.n_layers:
        equal("resid_post = the next resid_pre", stream, run[f"blocks.{layer + 1}.resid_pre"])


Verify = Callable[[Callable[[str], Tensor], Callable[[str], Tensor]], Iterator[tuple[str, Tensor, Tensor, Tensor]]]


def _edit_checks(lm: LanguageModel, layer: int, delta: Tensor, head: int) -> Iterator[tuple[make.Edit, Verify]]:
    """Edits of one layer, each with what must follow. `new` and `old` give a site with and without the edit."""
    family, parts, b = lm.family, lm.family.layers[layer], f"blocks.{layer}"
    d, h = lm.d_model, lm.d_head
    move, narrow = delta[:d], delta[:h]

    def written(at: Callable[[str], Tensor], module: str, norm: str, post: object) -> Tensor:
        return at(f"{module}.out") if post is None else at(f"{norm}.normalized") * at(f"{norm}.scale")

    def shift(site: str, effect: Callable[[Callable[[str], Tensor]], Tensor], what: str) -> tuple[make.Edit, Verify]:
        def verify(new: Callable[[str], Tensor], old: Callable[[str], Tensor]) -> Iterator:
            yield f"δ at {site} moves {what} by δ", effect(new) - effect(old), move.expand_as(effect(new)), effect(old)

        return make.add(f"{b}.{site}", move), verify

    yield shift(
        "resid_pre", lambda at: at("resid_post") - at("attn.out") - at("mlp.out"), "resid_post - attn.out - mlp.out"
    )
    if not family.parallel:
        yield shift("resid_mid", lambda at: at("resid_post") - at("mlp.out"), "resid_post - mlp.out")
        yield shift("attn.out", lambda at: at("resid_mid"), "resid_mid")
    else:
        yield shift("attn.out", lambda at: at("resid_post") - at("mlp.out"), "resid_post - mlp.out")
    yield shift("mlp.out", lambda at: at("resid_post"), "resid_post")

    def head_result(new: Callable[[str], Tensor], old: Callable[[str], Tensor]) -> Iterator:
        now, was = (written(at, "attn", "ln1_post", parts.ln1_post) for at in (new, old))
        yield "δ at one head's result moves what attention writes by δ", now - was, move.expand_as(now), was

    yield make.add(f"{b}.attn.result", move, heads=head), head_result

    def head_z(new: Callable[[str], Tensor], old: Callable[[str], Tensor]) -> Iterator:
        others = [i for i in range(lm.n_heads) if i != head]
        yield (
            "z of one head at zero: its result is zero",
            new("attn.result")[:, :, head],
            torch.zeros(1, device=lm.device),
            old("attn.result"),
        )
        if others:
            yield (
                "z of one head at zero: other heads stay",
                new("attn.result")[:, :, others],
                old("attn.result")[:, :, others],
                old("attn.result"),
            )

    yield make.zero(f"{b}.attn.z", heads=head), head_z

    for norm, module in (("ln1", "attn"), ("ln2", "mlp")):

        def doubled(new: Callable[[str], Tensor], old: Callable[[str], Tensor], norm=norm, module=module) -> Iterator:
            half = old(f"{norm}.normalized") / 2
            yield f"{norm}.scale doubled halves {norm}.normalized", new(f"{norm}.normalized"), half, half
            gained = (parts.ln1 if norm == "ln1" else parts.ln2).gain(half, lm.dtype)
            yield f"{norm}.scale doubled: {module}.in follows", new(f"{module}.in"), gained, gained

        yield make.scale(f"{b}.{norm}.scale", 2.0), doubled

    def value(new: Callable[[str], Tensor], old: Callable[[str], Tensor]) -> Iterator:
        groups = lm.n_heads // lm.n_kv_heads
        mine = slice(head // groups * groups, (head // groups + 1) * groups)
        moved = new("attn.z")[:, :, mine] - old("attn.z")[:, :, mine]
        yield "δ at v of one kv head moves its heads' z by δ", moved, narrow.expand_as(moved), old("attn.z")

    yield make.add(f"{b}.attn.v", narrow, heads=head // (lm.n_heads // lm.n_kv_heads)), value

    def self_only(new: Callable[[str], Tensor], old: Callable[[str], Tensor]) -> Iterator:
        v = old("attn.v")[:, :, head // (lm.n_heads // lm.n_kv_heads)]
        yield "pattern set to the first token: z is its v", new("attn.z")[:, :, head], v[:, :1].expand_as(v), v

    first = torch.zeros(_LENGTH, device=lm.device)
    first[0] = 1.0
    yield make.set(f"{b}.attn.pattern", first, heads=head), self_only

    def silent(new: Callable[[str], Tensor], old: Callable[[str], Tensor]) -> Iterator:
        even = new("attn.pattern")[:, head]
        steps = torch.arange(1, _LENGTH + 1, device=lm.device, dtype=even.dtype)
        wanted = torch.ones_like(even).tril() / steps[:, None]
        if not bool((old("attn.scores")[:, head] > -torch.inf).equal(wanted.bool())):
            return  # a window hides some keys
        yield "rot_q of one head at zero: it attends evenly", even, wanted, even

    yield make.zero(f"{b}.attn.rot_q", heads=head), silent

    def neuron(new: Callable[[str], Tensor], old: Callable[[str], Tensor]) -> Iterator:
        now, was = (written(at, "mlp", "ln2_post", parts.ln2_post) for at in (new, old))
        row = weight_matrix(parts.mlp_out).sum(0)
        yield "1 at every neuron moves what the MLP writes by W_out's sum", now - was, row.expand_as(now), was

    yield make.add(f"{b}.mlp.post", torch.ones(1)), neuron


def run_selftest(lm: LanguageModel) -> SelfTest:
    """See `LanguageModel.selftest`."""
    with torch.no_grad():
        return _selftest(lm)


def _selftest(lm: LanguageModel) -> SelfTest:
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(0, lm.d_vocab, (1, _LENGTH), generator=generator)
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
    assert base.logits is not None
    for layer in range(lm.n_layers):
        _identities(lm, base, layer, checks)
    final = base[f"blocks.{lm.n_layers - 1}.resid_post"]
    checks.equal("unembed(last resid_post) = logits", None, lm.unembed(final), base.logits)
    _check_edits(lm, tokens, base, checks, generator)
    return SelfTest(lm.name, str(lm.dtype).removeprefix("torch."), tuple(checks.rows))


def _check_edits(lm: LanguageModel, tokens: Tokens, base: Run, checks: _Checks, generator: torch.Generator) -> None:
    cases = []
    for layer in range(lm.n_layers):
        size = base[f"blocks.{layer}.resid_pre"].float().std()
        delta = (torch.randn(max(lm.d_model, lm.d_head), generator=generator) * size.cpu()).to(lm.device, lm.dtype)
        for edit, verify in _edit_checks(lm, layer, delta, layer % lm.n_heads):
            cases.append((layer, edit, verify))
    edits = [replace(edit, rows=(row,)) for row, (_, edit, _) in enumerate(cases)]
    run = lm.run(tokens.repeat(len(cases)), capture=_observed_sites(lm), edits=edits, logits="last")
    for row, (layer, _, verify) in enumerate(cases):

        def new(name: str, layer: int = layer, row: int = row) -> Tensor:
            return run[f"blocks.{layer}.{name}"][row : row + 1]

        def old(name: str, layer: int = layer) -> Tensor:
            return base[f"blocks.{layer}.{name}"]

        for check, left, right, scale in verify(new, old):
            checks.equal(check, layer, left, right, scale)


def _observed_sites(lm: LanguageModel) -> list[str]:
    names = [
        "resid_mid",
        "resid_post",
        "attn.out",
        "attn.in",
        "attn.result",
        "attn.z",
        "attn.pattern",
        "mlp.out",
        "mlp.in",
    ]
    names += [f"{norm}.{part}" for norm in ("ln1", "ln2", "ln1_post", "ln2_post") for part in ("scale", "normalized")]
    return [f"blocks.*.{name}" for name in names if lm.family.absent(f"blocks.{{l}}.{name}") is None]
