"""How a grid of patches is laid out: its cells, where each is patched, and the cells that are its controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError, Misaligned
from cutaway.causal.patching.cells import (
    PatchCell,
    PatchSetup,
    Places,
    every_layer,
    head_count,
    neuron_count,
)
from cutaway.data.pairs import AlignedPairs
from cutaway.model.language_model import LanguageModel
from cutaway.model.sites import template_of

COMPONENTS = ("attn.out", "mlp.out")
Rows = Sequence[tuple[int, str]]
"""(layer, canonical site name) of each row of a grid."""


@dataclass(frozen=True)
class Layout:
    """A grid before it is measured: cells and places by [layer][column], and cells that are controls.

    `drawn` has, for each layer, cells whose mean is the control of all its columns; where it is empty, the control of
    a cell is the mean of the others that `beside` names: in its row, or in its column.
    """

    columns: tuple[str, ...]
    cells: list[list[PatchCell]]
    places: list[Places | None]  # by column
    drawn: list[list[tuple[PatchCell, Places | None]]]
    beside: str
    control: str


def component_rows(lm: LanguageModel, layers: Sequence[int] | None) -> Rows:
    """Layers that have both attention and MLP outputs."""
    found = [dict(every_layer(lm, f"blocks.{{l}}.{part}", layers)) for part in COMPONENTS]
    return [(layer, name) for layer, name in found[0].items() if layer in found[1]]


def with_other_layers(lm: LanguageModel, rows: Rows, site: str) -> tuple[Rows, list[int]]:
    """Rows for every layer that has the site, since other layers are the control, and which of them were asked for."""
    if "{l}" not in site:
        return rows, list(range(len(rows)))
    wider = component_rows(lm, None) if "{attn,mlp}" in site else every_layer(lm, site, None)
    return wider, [wider.index(row) for row in rows]


# Layouts


def places_at(pairs: AlignedPairs, at: Sequence[str] | None, noise: bool) -> Places | None:
    """Where roles stand, all of them together, in the run that is patched and in its source."""
    if at is None:
        return None
    in_clean, in_corrupt = _of_roles(pairs, at)
    to, of = (in_clean, in_corrupt) if noise else (in_corrupt, in_clean)
    for one in to.T.tolist() if len(at) > 1 else ():
        if len(set(one)) < len(one):
            raise CutawayError(f"the roles {', '.join(at)} stand at one token in some pair; name it once")
    return Places(to.T, of.T)


def _of_roles(pairs: AlignedPairs, roles: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Positions [roles, n] in clean and in corrupt."""
    missing = [role for role in roles if role not in pairs.places]
    if missing:
        raise CutawayError(f"no position is named {missing[0]!r}; the pairs name {', '.join(pairs.places)}")
    places = torch.stack([pairs.places[role] for role in roles])
    return places[:, 0], places[:, 1]


def over_positions(
    setup: PatchSetup,
    rows: Rows,
    roles: Sequence[str] | None,
    heads: Sequence[int] | None,
    neurons: Sequence[int] | None,
    draws: int,
    seed: int,
    together: bool,
) -> Layout:
    pairs = setup.pairs
    names, in_clean, in_corrupt = _columns(pairs, roles)
    to, of = (in_clean, in_corrupt) if setup.noise else (in_corrupt, in_clean)
    part = {
        "heads": None if heads is None else tuple(heads),
        "neurons": None if neurons is None else tuple(neurons),
    }
    if together:
        places: list[Places | None] = [places_at(pairs, roles, setup.noise)]
        names = [" and ".join(names)]
    else:
        places = [Places(a[:, None], b[:, None]) for a, b in zip(to, of, strict=True)]
    cells = [[PatchCell(site, **part, at=name) for name in names] for _, site in rows]
    drawn: list[list[tuple[PatchCell, Places | None]]] = []
    if roles is not None:
        random = _random_positions(pairs, torch.cat([in_clean, in_corrupt]), draws, seed)
        elsewhere = [Places(one[:, None], one[:, None]) for one in random]
        drawn = [[(PatchCell(site, **part, at="a random position"), p) for p in elsewhere] for _, site in rows]
    return Layout(tuple(names), cells, places, drawn, "positions", "random position")


def over_heads(
    setup: PatchSetup,
    rows: Rows,
    heads: Sequence[int] | None,
    places: Places | None,
    where: str | None,
    draws: int,
    rng: np.random.Generator,
) -> Layout:
    n_heads = head_count(setup.lm.sites()[rows[0][1]]) or 0
    chosen = list(range(n_heads)) if heads is None else list(dict.fromkeys(heads))
    cells = [[PatchCell(site, heads=(head,), at=where) for head in chosen] for _, site in rows]
    drawn: list[list[tuple[PatchCell, Places | None]]] = []
    others = [head for head in range(n_heads) if head not in chosen]
    beside, control = "columns", "random other head"
    if n_heads == 1:
        beside, control = "layers", "the head of a random other layer"
    elif others:
        for _, site in rows:
            picked = rng.permutation(others)[:draws].tolist()
            drawn.append([(PatchCell(site, heads=(head,), at=where), places) for head in picked])
    prefix = "KV" if " KV" in setup.lm.sites()[rows[0][1]].dims else "H"
    return Layout(tuple(f"{prefix}{head}" for head in chosen), cells, [places] * len(chosen), drawn, beside, control)


def over_components(rows: Rows, places: Places | None, where: str | None, whole: bool) -> Layout:
    """Attention and MLP of each layer; with `whole` the one site that the rows name."""
    if whole:
        column = template_of(rows[0][1]).removeprefix("blocks.{l}.")
        cells = [[PatchCell(site, at=where)] for _, site in rows]
        return Layout((column,), cells, [places], [], "layers", "the same site in a random other layer")
    cells = [[PatchCell(f"blocks.{layer}.{part}", at=where) for part in COMPONENTS] for layer, _ in rows]
    control = "the same component in a random other layer"
    return Layout(COMPONENTS, cells, [places] * len(COMPONENTS), [], "layers", control)


def over_neurons(
    setup: PatchSetup,
    rows: Rows,
    neurons: Sequence[int] | None,
    top: int,
    places: Places | None,
    where: str | None,
    draws: int,
    rng: np.random.Generator,
) -> Layout:
    width = min(neuron_count(setup.lm.sites()[site]) or 0 for _, site in rows)
    cells, drawn = [], []
    asked = None if neurons is None else list(dict.fromkeys(neurons))
    every = top == 0 or top >= width if asked is None else len(asked) == width
    for _, site in rows:
        if asked is not None:
            chosen = asked
        elif every:
            chosen = list(range(width))
        else:
            chosen = setup.estimated(site, places).abs().argsort(descending=True, stable=True)[:top].tolist()
        cells.append([PatchCell(site, neurons=(neuron,), at=where) for neuron in chosen])
        if not every:
            others = np.setdiff1d(np.arange(width), chosen)
            picked = rng.permutation(others)[:draws].tolist()
            drawn.append([(PatchCell(site, neurons=(neuron,), at=where), places) for neuron in picked])
    same = neurons is not None or every
    columns = tuple(f"N{c.neurons[0]}" if same and c.neurons else f"#{i + 1}" for i, c in enumerate(cells[0]))
    return Layout(columns, cells, [places] * len(columns), drawn, "columns", "random other neuron")


def _columns(pairs: AlignedPairs, roles: Sequence[str] | None) -> tuple[list[str], Tensor, Tensor]:
    """Column names, and positions [columns, n] in clean and in corrupt."""
    if roles is not None:
        return list(roles), *_of_roles(pairs, roles)
    lengths = pairs.clean.lengths.cpu()
    if int(lengths.min()) != int(lengths.max()):
        raise Misaligned(
            f"the pairs are {int(lengths.min())} to {int(lengths.max())} tokens long, so their positions do not line "
            "up; name positions by role (roles=...), or give pairs of one template"
        )
    p = int(lengths[0])
    names = []
    for i in range(p):
        here = [row[i] for row in (*pairs.clean.strings, *pairs.corrupt.strings)]
        names.append(f"{i} {here[0].strip() or repr(here[0])}{'' if len(set(here)) == 1 else '*'}")
    grid = torch.arange(p)[:, None].expand(p, len(pairs))
    return names, grid, grid


# Controls


def _random_positions(pairs: AlignedPairs, columns: Tensor, draws: int, seed: int) -> Tensor:
    """For each draw and pair a position that is no column's [draws, n], from the first differing token on."""
    generator = np.random.default_rng(seed)
    first = pairs.first_difference().tolist()
    drawn = np.zeros((draws, len(pairs)), dtype=np.int64)
    for row, length in enumerate(pairs.clean.lengths.tolist()):
        own = set(columns[:, row].tolist())
        able = [i for i in range(first[row], length) if i not in own] or [i for i in range(length) if i not in own]
        drawn[:, row] = generator.choice(able, size=draws, replace=len(able) < draws) if able else -1
    return torch.from_numpy(drawn)


def by_layer(values: Tensor, layout: Layout) -> Tensor:
    """Mean of each layer's drawn controls [layers, 1, n] from all of them [controls, n]."""
    parts = values.split([len(row) for row in layout.drawn])
    return torch.stack([part.nanmean(0, keepdim=True) for part in parts])


def others(values: Tensor, dim: int) -> Tensor:
    """For each cell the mean of the others along a dimension: the expectation of one drawn at random, exactly."""
    known = ~values.isnan()
    total, count = values.nan_to_num(0.0).sum(dim, keepdim=True), known.sum(dim, keepdim=True)
    left = count - known.to(count.dtype)
    return ((total - values.nan_to_num(0.0)) / left).where(known & (left > 0), float("nan"))


def other_positions(values: Tensor, pairs: AlignedPairs) -> Tensor:
    """For each cell the mean over the pair's other positions from its first differing token on [layers, p, n].

    This is the expectation of patching one random other position, exactly, since every position was patched.
    """
    p = values.shape[1]
    able = torch.arange(p)[:, None] >= pairs.first_difference()[None]
    weight = able.to(values.dtype)
    total, count = (values * weight).nansum(1, keepdim=True), weight.sum(0)
    own = torch.where(able, values.nan_to_num(0.0), torch.zeros_like(values))
    left = count - weight
    mean = (total - own) / left.clamp(min=1)
    nothing = (left == 0) | values.isnan()
    return torch.where(nothing, torch.where(values.isnan(), values, torch.zeros_like(values)), mean)
