"""Activation patching: which part of the network, and at which token, decides the answer?

Denoising runs the corrupt prompt and inserts clean activations: what suffices to bring the answer back? Noising runs
the clean prompt and takes activations away: what is needed to keep it? They are not symmetric (Zhang & Nanda 2023;
Heimersheim & Nanda 2024). A question is a grid of cells that are one sweep (`lm.sweep`): they run in batches, from the
patched layer and token on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cutaway.artifacts.errors import CutawayError
from cutaway.causal.ablations import Ablation, ablation_of
from cutaway.causal.competence import Competence, Criterion, competence, unable
from cutaway.causal.metrics import Metric, logit_difference, named_metric
from cutaway.causal.patching.cells import Direction, PatchBench, every_layer, head_count, neuron_count
from cutaway.causal.patching.grid import LEAST_PAIRS, Over, PatchedCell, PatchGrid
from cutaway.causal.patching.layouts import (
    COMPONENTS,
    Rows,
    by_layer,
    component_rows,
    other_positions,
    others,
    over_components,
    over_heads,
    over_neurons,
    over_positions,
    places_at,
    with_other_layers,
)
from cutaway.data.pairs import AlignedPairs, PromptPair, align
from cutaway.model.language_model import LanguageModel
from cutaway.model.sites import layer_of, template_of
from cutaway.model.tokens import Tokens

__all__ = ["LEAST_PAIRS", "Direction", "Over", "PatchGrid", "PatchedCell", "patch_cell", "patch_grid"]

SITES: dict[Over, str] = {
    "positions": "blocks.{l}.resid_post",
    "heads": "blocks.{l}.attn.z",
    "components": "blocks.{l}.{attn,mlp}.out",
    "neurons": "blocks.{l}.mlp.post",
}
"""What is patched where no site is named."""


def patch_grid(
    lm: LanguageModel,
    pairs: Sequence[PromptPair] | AlignedPairs,
    *,
    site: str | None = None,
    over: Over = "positions",
    direction: Direction = "denoise",
    ablation: Ablation | str = "resample",
    metric: str | Metric = logit_difference,
    roles: Sequence[str] | None = None,
    at: str | Sequence[str] | None = None,
    heads: Sequence[int] | None = None,
    neurons: Sequence[int] | None = None,
    top: int = 20,
    names: Sequence[str] | None = None,
    criterion: Criterion = "top1",
    layers: Sequence[int] | None = None,
    draws: int = 3,
    batch_rows: int | None = 256,
    seed: int = 0,
    reference: Tokens | None = None,
    evaluation: str = "",
    ability: Competence | None = None,
    force: bool = False,
) -> PatchGrid:
    """Patch one part at a time, in every layer, and measure what share of the answer each moves.

    Parameters:
        site: has `{l}` where the layer stands; any site of `lm.sites()`. Default: `resid_post` over positions, `attn.z`
            over heads, `mlp.post` over neurons; over components always `attn.out` and `mlp.out`.
        over: what the columns are. "positions" of the prompts, or `roles` of them; "heads" (key-value heads at k, v
            and rot_k); "components"; "neurons": the entries of the site's last dimension.
        direction, ablation: see the module and `Ablation`; all but "resample" need "noise".
        metric: a name of `METRICS`, or a function `(logits [b, V], targets) -> [b]`.
        roles: columns by role (`["city", "last"]`) instead of by position. Without them all pairs must be equally long;
            with them they may differ in length and layout, and a role may stand elsewhere in clean and corrupt.
        at: over heads, components and neurons: the role or roles at which a part is patched, together. Default: at
            every token.
        heads: over heads, the columns; over positions, patch these heads alone.
        neurons: over neurons, the columns; over positions, patch these alone. Without them the `top` neurons of each
            layer by a first-order estimate (activation difference times gradient) are measured, all if `top` is 0.
        names: your own names for the columns. criterion: when an answer has flipped (see `PatchGrid`).
        layers: default all that have the site. draws: random positions, heads or neurons a control is the mean of,
            where the grid does not hold all others anyway.
        reference: tokens whose mean a mean ablation takes, instead of the pairs' own.
        evaluation: what the pairs are, in words, for the record.
        ability: how well the model does the pairs, where that has been measured; else it is, by "preferred".
        force: go on where the model is right on less than 80 % of the pairs; the grid has no p-values then.

    Raises `CutawayError`: pairs that do not line up, prompts that the metric cannot tell apart, a task that the model
    cannot do, an unknown site, role, head, layer, metric or ablation, a site without `{l}`.
    """
    if over not in SITES:
        raise CutawayError(f"over={over!r} is not one of {', '.join(SITES)}")
    if over == "components" and site is not None:
        raise CutawayError("over components attn.out and mlp.out are patched; leave the site out, or name another grid")
    wanted = site or SITES[over]
    rows = component_rows(lm, layers) if over == "components" else every_layer(lm, wanted, layers)
    return _measured(
        lm, pairs, rows, wanted, over, direction=direction, ablation=ablation, metric=metric, roles=roles,
        at=[at] if isinstance(at, str) else at, heads=heads, neurons=neurons, top=top, names=names,
        criterion=criterion, draws=draws, batch_rows=batch_rows, seed=seed, reference=reference, evaluation=evaluation,
        ability=ability, force=force,
    )  # fmt: skip


def patch_cell(
    lm: LanguageModel,
    pairs: Sequence[PromptPair] | AlignedPairs,
    site: str,
    *,
    head: int | None = None,
    neuron: int | None = None,
    at: str | Sequence[str] | None = None,
    direction: Direction = "denoise",
    ablation: Ablation | str = "resample",
    metric: str | Metric = logit_difference,
    criterion: Criterion = "top1",
    draws: int = 8,
    seed: int = 0,
    reference: Tokens | None = None,
    evaluation: str = "",
    force: bool = False,
) -> PatchedCell:
    """Patch one part: a whole site (`blocks.3.attn.out`, `embed`), one head or one neuron of it, at a role or several
    (`at`) or at every token. Its control patches `draws` random other heads or neurons of the layer; a whole site's,
    other positions where a role is named, else the same site in other layers.

    Raises `CutawayError` as `patch_grid` does, and for fewer than 2 pairs, which have no interval.
    """
    if head is not None and neuron is not None:
        raise CutawayError(f"a cell is head {head} or neuron {neuron} of {site!r}, not both; name one of the two")
    aligned = align(lm, pairs)
    if len(aligned) < 2:
        raise CutawayError(
            f"{len(aligned)} pair is too few for an interval; give 2 at the least, {LEAST_PAIRS} or more"
        )
    name = lm.sites().resolve(site)
    roles = [at] if isinstance(at, str) else at
    rows = [(layer_of(name) or 0, name)]
    over: Over = "heads" if head is not None else "neurons" if neuron is not None else "positions"
    if over == "positions" and roles is None:
        over = "components"
    grid = _measured(
        lm, aligned, rows, template_of(name), over, direction=direction, ablation=ablation, metric=metric,
        roles=roles if over == "positions" else None, at=None if over == "positions" else roles,
        heads=None if head is None else [head], neurons=None if neuron is None else [neuron], top=1, names=None,
        criterion=criterion, draws=draws, batch_rows=256, seed=seed, reference=reference, evaluation=evaluation,
        force=force, whole=True,
    )  # fmt: skip
    return grid.evidence(grid.layers[0], grid.columns[0])


def _measured(
    lm: LanguageModel,
    pairs: Sequence[PromptPair] | AlignedPairs,
    rows: Rows,
    site: str,
    over: Over,
    *,
    direction: Direction,
    ablation: Ablation | str,
    metric: str | Metric,
    roles: Sequence[str] | None,
    at: Sequence[str] | None,
    heads: Sequence[int] | None,
    neurons: Sequence[int] | None,
    top: int,
    names: Sequence[str] | None,
    criterion: Criterion,
    draws: int,
    batch_rows: int | None,
    seed: int,
    reference: Tokens | None,
    evaluation: str,
    ability: Competence | None = None,
    force: bool = False,
    whole: bool = False,
) -> PatchGrid:
    aligned = align(lm, pairs)
    choice, (name, measure) = ablation_of(ablation), named_metric(metric)
    rng = np.random.default_rng(seed)
    _check(lm, rows, over, heads, neurons, roles, at, top)
    single = over == "heads" and head_count(lm.sites()[rows[0][1]]) == 1
    keep = list(range(len(rows)))
    if over == "components" or single:  # other layers are the control
        rows, keep = with_other_layers(lm, rows, site)
    places = places_at(aligned, at, direction == "noise")
    used = [site_name for _, site_name in rows]
    if over == "components" and not whole:
        used = [f"blocks.{layer}.{part}" for layer, _ in rows for part in COMPONENTS]
    bench = PatchBench(
        lm, aligned, used, direction=direction, ablation=choice, metric=measure, metric_name=name,
        criterion=criterion, reference=reference,
    )  # fmt: skip
    about = evaluation or f"{len(aligned)} prompt pairs"
    cannot = unable(
        ability or competence(lm, aligned), lm.name, about, force=force,
        so="What moves an answer that a model does not give means nothing; force it (--force) if you must, or take "
        "only the pairs that it answers rightly (--only-right).",
    )  # fmt: skip
    where = None if at is None else " and ".join(at)
    if over == "positions":
        layout = over_positions(bench, rows, roles, heads, neurons, draws, seed, whole)
    elif over == "heads":
        layout = over_heads(bench, rows, heads, places, where, draws, rng)
    elif over == "components":
        layout = over_components(rows, places, where, whole)
    else:
        layout = over_neurons(bench, rows, neurons, top, places, where, draws, rng)
    columns = layout.columns
    if names is not None:
        if len(names) != len(columns) or len(set(names)) != len(names):
            raise CutawayError(f"{len(names)} names were given for {len(columns)} columns; give each its own")
        columns = tuple(names)

    flat = [(cell, layout.places[j]) for row in layout.cells for j, cell in enumerate(row)]
    extra = [one for row in layout.drawn for one in row]
    metrics, flips = bench.measure([*flat, *extra], batch_rows=batch_rows)
    shares, usable = bench.shares(metrics)
    shape = (len(rows), len(columns), len(aligned))
    values, flipped = shares[: len(flat)].view(shape), flips[: len(flat)].view(shape)
    if layout.drawn:
        control = by_layer(shares[len(flat) :], layout).expand(shape)
        control_flips = by_layer(flips[len(flat) :].float(), layout).expand(shape)
    elif layout.beside == "positions":
        control, control_flips = other_positions(values, aligned), other_positions(flipped.float(), aligned)
    else:
        dim = 1 if layout.beside == "columns" else 0
        control, control_flips = others(values, dim), others(flipped.float(), dim)
    return PatchGrid(
        model=lm.name,
        n_layers=lm.n_layers,
        site=site,
        over=over,
        direction=direction,
        ablation=str(choice),
        metric=name,
        layers=tuple(rows[i][0] for i in keep),
        columns=columns,
        cells=tuple(tuple(layout.cells[i]) for i in keep),
        at=where,
        patched=metrics[: len(flat)].view(shape)[keep],
        values=values[keep],
        flips=flipped[keep],
        clean=bench.metric_clean,
        corrupt=bench.metric_corrupt,
        dropped=int((~usable).sum()),
        tokens=aligned.clean.strings[0] if over == "positions" and roles is None else (),
        control=layout.control,
        random_values=control[keep],
        random_flips=control_flips[keep],
        base_flips=bench.flipped(bench.base_logits),
        evaluation=about,
        unable=cannot,
    )


def _check(
    lm: LanguageModel,
    rows: Rows,
    over: Over,
    heads: Sequence[int] | None,
    neurons: Sequence[int] | None,
    roles: Sequence[str] | None,
    at: Sequence[str] | None,
    top: int,
) -> None:
    """What was chosen, heads and neurons against the sites, before anything is run."""
    if not rows:
        raise CutawayError("no layer is named; name one, or leave layers out for all")
    for name, given in (("roles", roles), ("heads", heads), ("neurons", neurons), ("at", at)):
        if given is not None and not given:
            raise CutawayError(f"{name} is empty; name some, or leave it out for all")
    if top < 0:
        raise CutawayError(f"top={top} is no number of neurons; give 1 or more, or 0 for all")
    for _, name in rows:
        site = lm.sites()[name]
        n_heads = head_count(site)
        if (over == "heads" or heads is not None) and n_heads is None:
            raise CutawayError(f"{name!r} ({site.dims}) has no heads; patch them at attn.z, q, k, v, scores or pattern")
        for head in heads or ():
            if not 0 <= head < (n_heads or 0):
                kind = "key-value heads" if " KV" in site.dims else "heads"
                raise CutawayError(f"{name!r} has no head {head}; its {kind} are 0 to {(n_heads or 0) - 1}")
        width = neuron_count(site)
        if (over == "neurons" or neurons is not None) and width is None:
            raise CutawayError(f"{name!r} ({site.dims}) has no neurons; patch them at mlp.post")
        for neuron in neurons or ():
            if not 0 <= neuron < (width or 0):
                raise CutawayError(f"{name!r} has no neuron {neuron}; its neurons are 0 to {(width or 0) - 1}")
