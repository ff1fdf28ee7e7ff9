"""Activation patching: which part of the network, and at which token, decides the answer?

Denoising runs the corrupt prompt and inserts clean activations: what suffices to bring the answer back? Noising runs
the clean prompt and takes activations away: what is needed to keep it? They are not symmetric (Zhang & Nanda 2023;
Heimersheim & Nanda 2024). A question is a grid of cells that are one sweep (`lm.sweep`): they run in batches, from the
patched layer and token on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cutaway.artifacts.errors import CutawayError, NotSupported
from cutaway.causal.ablations import Ablation, ablation_of
from cutaway.causal.accuracy import Criterion, TaskAccuracy, task_accuracy, unable
from cutaway.causal.metrics import Metric, PatchDirection, logit_difference, named_metric
from cutaway.causal.patching.cells import PatchedCell, PatchSetup, every_layer, head_count, neuron_count
from cutaway.causal.patching.grid import LEAST_PAIRS, Over, PatchGrid
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
from cutaway.data.pairs import AlignedPairs, PromptPair, aligned
from cutaway.model.language_model import LanguageModel
from cutaway.model.sites import layer_of, template_of
from cutaway.model.tokens import Tokens

_SITES: dict[Over, str] = {
    "positions": "blocks.{l}.resid_post",
    "heads": "blocks.{l}.attn.z",
    "components": "blocks.{l}.{attn,mlp}.out",
    "neurons": "blocks.{l}.mlp.post",
}
"""What is patched where no site is named."""


@dataclass(frozen=True)
class Parts:
    """Which parts a grid patches."""

    layers: Sequence[int] | None = None
    """The rows; None: every layer that has the site."""
    heads: Sequence[int] | None = None
    """Over heads, the columns (None: all); over positions, patch these heads alone."""
    neurons: Sequence[int] | None = None
    """Over neurons, the columns (None: the `top` of each layer); over positions, patch these alone."""
    top: int = 20
    """Neurons of each layer to measure where none are named, the largest by a first-order estimate (activation
    difference times gradient); 0 for all."""
    names: Sequence[str] | None = None
    """Your own names for the columns, one for each."""


@dataclass(frozen=True)
class PatchOptions:
    """What a patch is judged by, its controls, and what is known of the pairs."""

    criterion: Criterion = "top1"
    """When an answer has flipped: it is the most probable token ("top1"), or above the other answer ("preferred")."""
    draws: int | None = None
    """Random positions, heads or neurons that a control is the mean of, where the grid does not hold all others
    anyway; None: 3 in a grid, 8 for a single cell."""
    seed: int = 0
    """Of the controls."""
    batch_rows: int | None = 256
    """Rows of a forward; None: as many as fit."""
    reference: Tokens | None = None
    """Tokens whose mean a mean ablation takes, instead of the pairs' own."""
    evaluation: str = ""
    """What the pairs are, in words, for the record."""
    accuracy: TaskAccuracy | None = None
    """How well the model does the pairs, where that has been measured; else it is, by "preferred"."""
    force: bool = False
    """Go on where the model is right on less than 80 % of the pairs; nothing has a p-value then."""


_ALL_PARTS = Parts()
_OPTIONS = PatchOptions()


def patch_grid(
    lm: LanguageModel,
    pairs: Sequence[PromptPair] | AlignedPairs,
    *,
    over: Over = "positions",
    site: str | None = None,
    roles: str | Sequence[str] | None = None,
    parts: Parts = _ALL_PARTS,
    direction: PatchDirection = "denoise",
    ablation: Ablation | str = "resample",
    metric: str | Metric = logit_difference,
    options: PatchOptions = _OPTIONS,
) -> PatchGrid:
    """Patch one part at a time, in every layer, and measure what share of the answer each moves.

    Activation patching as in Wang et al. 2022 (https://arxiv.org/abs/2211.00593); on the choices see Heimersheim &
    Nanda 2024 (https://arxiv.org/abs/2404.15255).

    Args:
        lm: The model.
        pairs: Prompt pairs, n of them.
        over: What the columns are: "positions" of the prompts, or `roles` of them; "heads" (key-value heads at k, v
            and rot_k); "components" (attention and MLP outputs); "neurons" (entries of the site's last dimension).
        site: Any site of `lm.sites()`, with `{l}` where the layer stands. Default: `resid_post` over positions,
            `attn.z` over heads, `mlp.post` over neurons; over components always `attn.out` and `mlp.out`.
        roles: Over positions: a column by each of these roles instead of by position; the pairs may then differ in
            length and layout, and a role may stand elsewhere in clean and corrupt. Over heads, components and neurons:
            the role or roles at which a part is patched, together. Default: every position, or every token.
        parts: Layers, heads, neurons, if not all.
        direction: Clean activations into the corrupt run ("denoise": what suffices?), or out of the clean run ("noise":
            what is needed?).
        ablation: What takes an activation's place; all but "resample" need "noise".
        metric: A name of `METRICS`, or a function `(logits [b, V], targets) -> [b]`.
        options: Criterion, controls, what is known of the pairs.

    Returns:
        The share that each cell moves [layers, columns, n], beside its control.

    Raises:
        Misaligned: Pairs that do not line up.
        CannotDoTask: The model is right on less than 80 % of the pairs.
        NoSuchSite: An unknown site, or one without `{l}`.
        CutawayError: Prompts that the metric cannot tell apart, an unknown role, head, layer, metric or ablation.

    Example:
        >>> lm = cutaway.load("atlas")
        >>> pairs = cutaway.data.readable_pairs(lm, cutaway.data.known_task("world indirect object"), 8)
        >>> options = PatchOptions(draws=1)
        >>> grid = patch_grid(lm, pairs, over="heads", roles="last", parts=Parts(layers=[6]), options=options)
        >>> grid.values.shape  # layers, heads, pairs
        torch.Size([1, 8, 8])
    """
    if over not in _SITES:
        raise CutawayError(f"over={over!r} is not one of {', '.join(_SITES)}")
    if over == "components" and site is not None:
        raise CutawayError("over components attn.out and mlp.out are patched; leave the site out, or name another grid")
    wanted = site or _SITES[over]
    rows = component_rows(lm, parts.layers) if over == "components" else every_layer(lm, wanted, parts.layers)
    return _measured(lm, pairs, rows, wanted, over, roles, parts, direction, ablation, metric, options)


def patch_cell(
    lm: LanguageModel,
    pairs: Sequence[PromptPair] | AlignedPairs,
    site: str,
    *,
    head: int | None = None,
    neuron: int | None = None,
    roles: str | Sequence[str] | None = None,
    direction: PatchDirection = "denoise",
    ablation: Ablation | str = "resample",
    metric: str | Metric = logit_difference,
    options: PatchOptions = _OPTIONS,
) -> PatchedCell:
    """Patch one part: a whole site, or one head or neuron of it.

    Args:
        lm: The model.
        pairs: Prompt pairs, 2 or more.
        site: The site with its layer (`blocks.3.attn.out`, `embed`).
        head: The one head to patch (a key-value head at k, v, rot_k).
        neuron: The one entry of the site's last dimension to patch.
        roles: The role or roles at which it is patched, together; None at every token.
        direction: See `patch_grid`.
        ablation: See `patch_grid`.
        metric: See `patch_grid`.
        options: See `patch_grid`.

    Returns:
        The cell's share. Its control patches random other heads or neurons of the layer; a whole site's, other
        positions where a role is named, else the same site in other layers.

    Raises:
        CutawayError: As `patch_grid`, and for fewer than 2 pairs, which have no interval.

    Example:
        >>> lm = cutaway.load("atlas")
        >>> pairs = cutaway.data.readable_pairs(lm, cutaway.data.known_task("world indirect object"), 4)
        >>> cell = patch_cell(lm, pairs, "blocks.6.attn.v", head=2, roles="last", direction="noise", ablation="mean")
        >>> cell.effect.n
        4
    """
    if head is not None and neuron is not None:
        raise CutawayError(f"a cell is head {head} or neuron {neuron} of {site!r}, not both; name one of the two")
    ready = aligned(lm, pairs)
    if len(ready) < 2:
        raise CutawayError(f"{len(ready)} pair is too few for an interval; give 2 at the least, {LEAST_PAIRS} or more")
    name = lm.sites().resolve(site)
    rows = [(layer_of(name) or 0, name)]
    over: Over = "heads" if head is not None else "neurons" if neuron is not None else "positions"
    if over == "positions" and roles is None:
        over = "components"
    parts = Parts(heads=None if head is None else [head], neurons=None if neuron is None else [neuron], top=1)
    chosen = replace(options, draws=8 if options.draws is None else options.draws)
    grid = _measured(
        lm, ready, rows, template_of(name), over, roles, parts, direction, ablation, metric, chosen, whole=True
    )
    return grid.evidence(grid.layers[0], grid.columns[0])


def _measured(
    lm: LanguageModel,
    pairs: Sequence[PromptPair] | AlignedPairs,
    rows: Rows,
    site: str,
    over: Over,
    named: str | Sequence[str] | None,
    parts: Parts,
    direction: PatchDirection,
    ablation: Ablation | str,
    metric: str | Metric,
    options: PatchOptions,
    whole: bool = False,
) -> PatchGrid:
    ready = aligned(lm, pairs)
    choice, (name, measure) = ablation_of(ablation), named_metric(metric)
    rng = np.random.default_rng(options.seed)
    draws = 3 if options.draws is None else options.draws
    roles = [named] if isinstance(named, str) else named
    _check(lm, rows, over, parts, roles)
    single = over == "heads" and head_count(lm.sites()[rows[0][1]]) == 1
    keep = list(range(len(rows)))
    if over == "components" or single:  # other layers are the control
        rows, keep = with_other_layers(lm, rows, site)
    at = None if over == "positions" else roles
    places = places_at(ready, at, direction == "noise")
    used = [site_name for _, site_name in rows]
    if over == "components" and not whole:
        used = [f"blocks.{layer}.{part}" for layer, _ in rows for part in COMPONENTS]
    setup = PatchSetup(
        lm, ready, used, direction=direction, ablation=choice, metric=measure, metric_name=name,
        criterion=options.criterion, reference=options.reference,
    )  # fmt: skip
    about = options.evaluation or f"{len(ready)} prompt pairs"
    cannot = unable(
        options.accuracy or task_accuracy(lm, ready), lm.name, about, force=options.force,
        so="What moves an answer that a model does not give means nothing; force it (--force) if you must, or take "
        "only the pairs that it answers rightly (--only-right).",
    )  # fmt: skip
    where = None if at is None else " and ".join(at)
    if over == "positions":
        layout = over_positions(setup, rows, roles, parts.heads, parts.neurons, draws, options.seed, whole)
    elif over == "heads":
        layout = over_heads(setup, rows, parts.heads, places, where, draws, rng)
    elif over == "components":
        layout = over_components(rows, places, where, whole)
    else:
        layout = over_neurons(setup, rows, parts.neurons, parts.top, places, where, draws, rng)
    columns = layout.columns
    names = parts.names
    if names is not None:
        if len(names) != len(columns) or len(set(names)) != len(names):
            raise CutawayError(f"{len(names)} names were given for {len(columns)} columns; give each its own")
        columns = tuple(names)

    flat = [(cell, layout.places[j]) for row in layout.cells for j, cell in enumerate(row)]
    extra = [one for row in layout.drawn for one in row]
    metrics, flips = setup.measure([*flat, *extra], batch_rows=options.batch_rows)
    shares, usable = setup.shares(metrics)
    shape = (len(rows), len(columns), len(ready))
    values, flipped = shares[: len(flat)].view(shape), flips[: len(flat)].view(shape)
    if layout.drawn:
        control = by_layer(shares[len(flat) :], layout).expand(shape)
        control_flips = by_layer(flips[len(flat) :].float(), layout).expand(shape)
    elif layout.beside == "positions":
        control, control_flips = other_positions(values, ready), other_positions(flipped.float(), ready)
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
        clean=setup.metric_clean,
        corrupt=setup.metric_corrupt,
        dropped=int((~usable).sum()),
        tokens=ready.clean.strings[0] if over == "positions" and roles is None else (),
        control=layout.control,
        random_values=control[keep],
        random_flips=control_flips[keep],
        base_flips=setup.flipped(setup.base_logits),
        evaluation=about,
        unable=cannot,
    )


def _check(lm: LanguageModel, rows: Rows, over: Over, parts: Parts, roles: Sequence[str] | None) -> None:
    """What was chosen, heads and neurons against the sites, before anything is run."""
    if not rows:
        raise CutawayError("no layer is named; name one, or leave layers out for all")
    heads, neurons = parts.heads, parts.neurons
    for name, given in (("roles", roles), ("heads", heads), ("neurons", neurons)):
        if given is not None and not given:
            raise CutawayError(f"{name} is empty; name some, or leave it out for all")
    if parts.top < 0:
        raise CutawayError(f"top={parts.top} is no number of neurons; give 1 or more, or 0 for all")
    for _, name in rows:
        site = lm.sites()[name]
        n_heads = head_count(site)
        if (over == "heads" or heads is not None) and n_heads is None:
            raise NotSupported(f"{name!r} ({site.dims}) has no heads; patch them at attn.z, q, k, v, scores or pattern")
        for head in heads or ():
            if not 0 <= head < (n_heads or 0):
                kind = "key-value heads" if " KV" in site.dims else "heads"
                raise CutawayError(f"{name!r} has no head {head}; its {kind} are 0 to {(n_heads or 0) - 1}")
        width = neuron_count(site)
        if (over == "neurons" or neurons is not None) and width is None:
            raise NotSupported(f"{name!r} ({site.dims}) has no neurons; patch them at mlp.post")
        for neuron in neurons or ():
            if not 0 <= neuron < (width or 0):
                raise CutawayError(f"{name!r} has no neuron {neuron}; its neurons are 0 to {(width or 0) - 1}")
