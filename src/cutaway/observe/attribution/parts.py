"""The parts of a logit difference: what each piece of a model writes along a direction of the unembedding.

`attribution.py` says what a share is and returns the result; here is how one is computed. Every share is one inner
product with a direction: ΔU is carried back through the frozen norms, instead of carrying each part forward, so nothing
of the size [parts, d_model] exists, no weight is folded or changed, and random directions, the controls, cost next to
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError, NotSupported
from cutaway.model.architecture.norms import Norm
from cutaway.model.architecture.parts import weight_matrix
from cutaway.model.architecture.wrapped import bias_of
from cutaway.model.edits.edits import Edit
from cutaway.model.forward.run import Run
from cutaway.model.language_model import LanguageModel
from cutaway.model.tokens import Tokens
from cutaway.observe.attribution.answers import Wrong, differences

By = Literal["component", "head", "neuron", "source"]
GRANULARITIES: tuple[By, ...] = ("component", "head", "neuron", "source")


@dataclass(frozen=True, eq=False)
class Group:
    """Parts of one kind in one layer. `values` float64 [b, 1 + K, n]: under ΔU, then under K random directions."""

    kind: str
    layer: int | None
    values: Tensor
    labels: tuple[str, ...] | None = None  # of the n parts, where numbers do not say enough

    def name(self, i: int) -> str:
        """What part i is called."""
        if self.labels is not None:
            return self.labels[i]
        at = "" if self.layer is None else f"L{self.layer} "
        if self.kind == "head":
            return f"L{self.layer}H{i}"
        return f"{at}neuron {i}" if self.kind == "neuron" else f"{at}{self.kind}"


_NEEDED: dict[By, tuple[str, ...]] = {
    "head": ("attn.z",),
    "neuron": ("mlp.post",),
    "source": ("attn.z", "attn.pattern", "attn.v"),
}


def splittable_layers(lm: LanguageModel, by: By) -> set[int]:
    """Layers that have the sites for splitting their attention or MLP this way; none by component."""
    absent, needed = _absent(lm), _NEEDED.get(by, ())
    return {
        layer
        for layer in range(lm.n_layers)
        if needed and all(absent[f"blocks.{layer}.{name}"] is None for name in needed)
    }


def _absent(lm: LanguageModel) -> dict[str, str | None]:
    """By site, why the model lacks it."""
    return {site.name: site.absent for site in lm.sites()}


def split_difference(
    lm: LanguageModel,
    tokens: Tokens,
    columns: Tensor,
    directions: Tensor,
    biases: Tensor,
    by: By,
    answers: list[int],
    wrongs: list[Wrong],
    *,
    edits: Sequence[Edit] = (),
    final_scale: Tensor | None = None,
) -> tuple[list[Group], Tensor, Tensor, list[str]]:
    """Groups of parts at `columns` [b], the model's difference before and after the softcap [b], and notes.

    `directions` and `biases` are what `difference_directions` gives. `edits` are in force during the run;
    `final_scale` [b, 1] freezes the final norm at another run's divisor, and then the parts sum to the difference that
    this divisor would give. Layers without the sites that `by` needs stay
    whole, and a note says so. Raises NotSupported when no layer has them, CutawayError when logits are not finite.
    """
    family = lm.family
    split = splittable_layers(lm, by)
    notes = _notes(lm, by, split)
    capped = family.final_softcap is not None
    last = not capped and torch.equal(columns, tokens.last.cpu())
    names = _captures(lm, by, split)
    captured = [*names, *(["logits_precap"] if capped else [])]
    run = lm.run(tokens, capture=captured, edits=edits, logits="last" if last else "all")
    rows = torch.arange(len(tokens))

    def here(value: Tensor) -> Tensor:
        return value[rows.to(value.device), columns.to(value.device)]

    after = (run.last_logits if last else here(run.all_logits)).double().cpu()
    before = here(run["logits_precap"]).double().cpu() if capped else after
    if not bool(torch.isfinite(before[rows, answers]).all()) or bool(before.isnan().any()):
        raise CutawayError(f"The logits of {lm.name} hold NaN or infinite values here, so there is nothing to split.")

    wide = torch.float32 if lm.device.type == "mps" else torch.float64
    final = family.ln_final
    g = directions.to(run.last_logits.device, wide)  # [b, K + 1, d]
    if final is not None:  # x·g = y·directions, where y is the norm of x without its bias, its scale frozen
        g = final.pull(g) / (here(run["ln_final.scale"]) if final_scale is None else final_scale).to(g)[:, None]

    def whole(name: str, kind: str, layer: int | None = None) -> list[Group]:
        return [Group(kind, layer, _dot(here(run[name]), g))] if name in run else []

    groups = whole("embed", "embedding") + whole("pos_embed", "positions")
    for layer in range(lm.n_layers):
        inside = f"blocks.{layer}."
        if by in ("head", "source") and layer in split:
            groups += _attention_parts(lm, run, layer, g, here, by)
        else:
            groups += whole(inside + "attn.out", "attention", layer)
        if by == "neuron" and layer in split:
            groups += _mlp_parts(lm, run, layer, g, here)
        else:
            groups += whole(inside + "mlp.out", "MLP", layer)
    final_bias = None if final is None else final.bias
    if final_bias is not None or bool(biases.any()):
        constants = biases
        if final_bias is not None:
            constants = constants + directions @ final_bias.detach().cpu().double()
        groups.append(Group("final biases", None, constants[..., None]))
    groups = [Group(x.kind, x.layer, x.values.detach().cpu().double(), x.labels) for x in groups]
    return groups, differences(before, answers, wrongs), differences(after, answers, wrongs), notes


def _notes(lm: LanguageModel, by: By, split: set[int]) -> list[str]:
    """Which layers could not be split; NotSupported when none can."""
    whole = [layer for layer in range(lm.n_layers) if layer not in split]
    if by == "component" or not whole:
        return []
    if not split:
        absent = _absent(lm)
        site = next(name for n in _NEEDED[by] if absent[name := f"blocks.0.{n}"] is not None)
        raise NotSupported(f"{lm.name} cannot be attributed by {by}: it has no '{site}' ({absent[site]}).")
    module = "MLP" if by == "neuron" else "attention"
    return [f"the {module} of layers {', '.join(map(str, whole))} has no {by}s to split it by, and is left whole"]


def _captures(lm: LanguageModel, by: By, split: set[int]) -> list[str]:
    """The sites that the shares are read from; those that a model does not have are left out."""
    names = ["ln_final.scale", "embed", "pos_embed"]
    for layer, parts in enumerate(lm.family.layers):
        attention, mlp = by in ("head", "source") and layer in split, by == "neuron" and layer in split
        inside = [*(_NEEDED[by] if layer in split else ())]
        inside += ["ln1_post.scale"] * bool(parts.ln1_post) if attention else ["attn.out"]
        inside += ["ln2_post.scale"] * bool(parts.ln2_post) if mlp else ["mlp.out"]
        names += [f"blocks.{layer}.{name}" for name in inside]
    absent = _absent(lm)
    return [name for name in names if absent[name] is None]


def _attention_parts(
    lm: LanguageModel, run: Run, layer: int, g: Tensor, here: Callable[[Tensor], Tensor], by: By
) -> list[Group]:
    """One layer's attention by head, or by head and source position, and its bias."""
    parts, inside, wide = lm.family.layers[layer], f"blocks.{layer}.", g.dtype
    multiplier = parts.attn_multiplier
    back, constant = _through(parts.ln1_post, run, inside + "ln1_post.scale", here, g, multiplier)
    # the direction in each head's own space: W_O back, [b, K + 1, H, h]
    pulled = torch.einsum("hed,bkd->bkhe", lm.w_o(layer).to(_product(lm)), back.to(_product(lm))).to(wide)
    if by == "head":
        z = here(run[inside + "attn.z"]).to(wide)
        groups = [Group("head", layer, torch.einsum("bkhe,bhe->bkh", pulled, z))]
    else:
        pattern = run[inside + "attn.pattern"].transpose(1, 2)  # [b, q, H, k]
        v = run[inside + "attn.v"].to(wide)
        v = v.repeat_interleave(pulled.shape[2] // v.shape[2], dim=2)  # query head h reads key-value head h // (H / KV)
        shares = torch.einsum("bkhe,bshe->bkhs", pulled, v) * here(pattern).to(wide)[:, None]
        # columns of padding get no attention, but their values may be anything
        shares = shares.masked_fill(~run.tokens.mask.to(shares.device)[:, None, None], 0.0)
        labels = tuple(
            f"L{layer}H{head} ← {label}" for head in range(pulled.shape[2]) for label in _source_labels(run.tokens)
        )
        groups = [Group("source", layer, shares.flatten(2), labels)]
    return groups + _bias("attention bias", layer, bias_of(parts.output), back, constant)


def _mlp_parts(lm: LanguageModel, run: Run, layer: int, g: Tensor, here: Callable[[Tensor], Tensor]) -> list[Group]:
    """One layer's MLP by neuron, and its bias."""
    parts, inside = lm.family.layers[layer], f"blocks.{layer}."
    multiplier = parts.mlp_multiplier
    back, constant = _through(parts.ln2_post, run, inside + "ln2_post.scale", here, g, multiplier)
    assert parts.mlp_out is not None  # a layer with mlp.post has one
    w_out = weight_matrix(parts.mlp_out).detach().to(_product(lm))
    pulled = (back.to(_product(lm)) @ w_out.T).to(g.dtype)  # [b, K + 1, m]
    neurons = Group("neuron", layer, pulled * here(run[inside + "mlp.post"]).to(g.dtype)[:, None])
    return [neurons, *_bias("MLP bias", layer, bias_of(parts.mlp_out), back, constant)]


def _source_labels(tokens: Tokens) -> list[str]:
    """A name for each column: its position, and its token where all rows have the same one."""
    labels = []
    for column in range(tokens.ids.shape[1]):
        seen = {
            tokens.strings[row][column - int(tokens.first[row])]
            for row in range(len(tokens))
            if bool(tokens.mask[row, column]) and tokens.strings[row]
        }
        labels.append(f"{column} {seen.pop()!r}" if len(seen) == 1 else f"position {column}")
    return labels


def _bias(kind: str, layer: int, bias: Tensor | None, back: Tensor, constant: Tensor | None) -> list[Group]:
    """What an output projection's bias, and the bias of a norm behind it, write whatever the input is."""
    if bias is None and constant is None:
        return []
    value = back.new_zeros(back.shape[:2])
    if bias is not None:
        value = value + back @ bias.detach().to(back)
    if constant is not None:
        value = value + constant
    return [Group(kind, layer, value[..., None])]


def _through(
    norm: Norm | None, run: Run, scale: str, here: Callable[[Tensor], Tensor], g: Tensor, multiplier: float
) -> tuple[Tensor, Tensor | None]:
    """Directions [b, K + 1, d] in front of what a module adds: of its multiplier and of a norm, its scale frozen.

    The second value is what the norm's own bias adds, [b, K + 1], if it has one.
    """
    g = g * multiplier if multiplier != 1.0 else g
    if norm is None:
        return g, None
    constant = None if norm.bias is None else g @ norm.bias.detach().to(g)
    return norm.pull(g) / here(run[scale]).to(g)[:, None], constant


def _dot(value: Tensor, g: Tensor) -> Tensor:
    """Shares [b, K + 1, 1] of vectors [b, d] under directions [b, K + 1, d]."""
    return torch.einsum("bd,bkd->bk", value.to(g.dtype), g)[..., None]


def _product(lm: LanguageModel) -> torch.dtype:
    """The dtype of products with whole weight matrices: a float64 copy of each would cost more than it gives."""
    return torch.promote_types(lm.dtype, torch.float32)


def difference_directions(
    lm: LanguageModel,
    answers: list[int],
    wrongs: list[Wrong],
    controls: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """ΔU and `controls` directions of random tokens as long, float64 [b, 1 + K, d], and what the unembedding's bias
    adds under each [b, 1 + K].

    A random direction is made as ΔU is: of a pair where there is a wrong answer, of one token where there is none.
    """
    generator = torch.Generator().manual_seed(seed)
    bias = bias_of(lm.family.unembed)
    factor = lm.family.logit_scale  # is in the output directions already
    bias = None if bias is None else bias.detach().double().cpu() * factor
    mean = None
    if "mean" in wrongs:
        step = max(1, (1 << 24) // lm.d_model)
        chunks = torch.arange(lm.d_vocab).split(step)
        mean = torch.stack([lm.output_directions(ids).double().sum(0).cpu() for ids in chunks]).sum(0) / lm.d_vocab

    def direction(answer: int, wrong: Wrong) -> tuple[Tensor, float]:
        u = lm.output_directions([answer])[0].double().cpu()
        b = 0.0 if bias is None else float(bias[answer])
        if wrong == "mean":
            assert mean is not None
            return u - mean, 0.0 if bias is None else b - float(bias.mean())
        if wrong is not None:
            u = u - lm.output_directions(wrong).double().cpu().mean(0)
            b = 0.0 if bias is None else b - float(bias[wrong].mean())
        return u, b

    directions, constants = [], []
    for answer, wrong in zip(answers, wrongs, strict=True):
        u, b = direction(answer, wrong)
        length = u.norm()
        if not bool(torch.isfinite(u).all()):
            raise CutawayError(f"The unembedding of {lm.name} holds NaN or infinite values.")
        row, offsets = [u], [b]
        for _ in range(controls):
            one, other = torch.randint(lm.d_vocab, (2,), generator=generator).tolist()
            v, c = direction(one, [other] if isinstance(wrong, list) else wrong)
            factor = float(length / v.norm()) if float(v.norm()) > 0 else 0.0
            row.append(v * factor)
            offsets.append(c * factor)
        directions.append(torch.stack(row))
        constants.append(torch.tensor(offsets, dtype=torch.float64))
    return torch.stack(directions), torch.stack(constants)


def dla_sum_errors(lm: LanguageModel) -> dict[str, float]:
    """By granularity, how far the parts miss the logit difference on two short random rows, relative to the largest.

    Granularities whose sites the model lacks in every layer are left out. Raises nothing for a large error: it is the
    measurement.
    """
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(lm.d_vocab_in, (n,), generator=generator).tolist() for n in (6, 4)]
    tokens = lm.tokens(rows)
    answers, wrong = torch.randint(lm.d_vocab, (2, 2), generator=generator).tolist()
    wrongs: list[Wrong] = [[w] for w in wrong]
    directions, biases = difference_directions(lm, answers, wrongs, 1, 0)
    errors: dict[str, float] = {}
    for by in GRANULARITIES:
        if by != "component" and not splittable_layers(lm, by):
            continue
        groups, total, _, _ = split_difference(lm, tokens, tokens.last.cpu(), directions, biases, by, answers, wrongs)
        values = torch.cat([group.values[:, 0] for group in groups], dim=1)
        scale = torch.maximum(values.abs().amax(1), total.abs()).clamp(min=1e-12)
        errors[by] = float(((values.sum(1) - total).abs() / scale).max())
    return errors
