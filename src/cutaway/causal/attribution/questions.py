"""What attribution patching is asked: which nodes, of which pairs, judged by what; and exact patching of some of them.

A `Question` holds what all methods share. `scores.py` holds what they answer with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError, Misaligned, NotSupported
from cutaway.artifacts.results import Choices
from cutaway.causal.attribution.scores import Agreement, NodeScores, Unit, node_of
from cutaway.causal.metrics import Metric, PatchDirection, Targets, differentiable, named_metric, targets_of
from cutaway.data.pairs import AlignedPairs
from cutaway.model.edits import edits
from cutaway.model.edits.edits import Edit
from cutaway.model.forward.run import Run
from cutaway.model.language_model import LanguageModel
from cutaway.model.sites import Site, template_of
from cutaway.model.tokens import Tokens

Positions = Literal["all", "each"] | Sequence[str]
_FLAT = 1e-6  # where no logit moves it by more, a metric has no slope; KL at its own point has 1e-8


@dataclass(frozen=True, eq=False)
class Question:
    """Nodes, pairs, direction and metric. `into` and `taken` [columns, n] are the positions that are patched in the
    base run and read in the source run; None where every token is.
    """

    lm: LanguageModel
    pairs: AlignedPairs
    units: Mapping[str, Unit]
    direction: PatchDirection
    metric_name: str
    metric: Metric
    positions: str
    columns: tuple[str | None, ...]
    into: Tensor | None
    taken: Tensor | None

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def sites(self) -> list[str]:
        return list(self.units)

    @property
    def base(self) -> Tokens:
        """The prompts that are patched."""
        return self.pairs.clean if self.direction == "noise" else self.pairs.corrupt

    @property
    def source(self) -> Tokens:
        """The prompts whose values are put in."""
        return self.pairs.corrupt if self.direction == "noise" else self.pairs.clean

    def parts(self, rows: int) -> Iterator[Question]:
        """The same question of a few pairs at a time."""
        for first in range(0, len(self), max(1, rows)):
            some = range(first, min(first + max(1, rows), len(self)))
            into, taken = (None if t is None else t[:, first : some.stop] for t in (self.into, self.taken))
            yield replace(self, pairs=self.pairs[some], into=into, taken=taken)

    def targets(self, base_logits: Tensor, source_logits: Tensor) -> Targets:
        """What the metric compares with, from the logits [b, V] of the two runs."""
        clean = base_logits if self.direction == "noise" else source_logits
        return targets_of(self.pairs, clean.float()).to(self.lm.device)

    def change(self, site: str, base: Tensor, source: Tensor) -> Tensor:
        """source − base of a site [b, p, ...] at the positions that are patched, 0 elsewhere; in the base's columns."""
        if self.into is None or self.taken is None:
            mask = self.base.mask.to(base.device)
            return (source - base).float() * mask.view(*mask.shape, *[1] * (base.ndim - 2))
        into, taken, rows = self.cells(base.device)
        moved = torch.zeros_like(base, dtype=torch.float32)
        for to, of in zip(into, taken, strict=True):
            moved[rows, to] = (source[rows, of] - base[rows, to]).float()
        return moved

    def contract(self, site: str, base: Tensor, source: Tensor, grad: Tensor) -> Tensor:
        """Σ over a node's values of (source − base) · grad: [columns, units, b] of one site's values [b, p, ...]."""
        if self.into is None or self.taken is None:
            return self.by_unit(site, self.change(site, base, source) * grad.float()).sum(1).T[None]
        into, taken, rows = self.cells(base.device)
        product = (source[rows, taken] - base[rows, into]).float() * grad[rows, into].float()
        return self.by_unit(site, product).transpose(1, 2)

    def at_columns(self, values: Tensor) -> Tensor:
        """Values by token and unit [b, p, units] as [columns, units, b]."""
        if self.into is None:
            mask = self.base.mask.to(values.device)
            return (values * mask[..., None]).sum(1).T[None]
        into, _, rows = self.cells(values.device)
        return values[rows, into].transpose(1, 2)

    def by_unit(self, site: str, values: Tensor) -> Tensor:
        """[x, y, ...] -> [x, y, units], summed over the values of a unit."""
        unit = self.units[site]
        if unit == "neuron":
            return values
        return values.sum(-1) if unit == "head" else values.flatten(2).sum(-1, keepdim=True)

    def cells(self, device: torch.device | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Columns of the two runs that hold the positions [columns, b], and rows [b]."""
        assert self.into is not None
        assert self.taken is not None
        device = self.lm.device if device is None else device
        into = self.into.to(device) + self.base.first.to(device)
        taken = self.taken.to(device) + self.source.first.to(device)
        return into, taken, torch.arange(into.shape[1], device=device)

    def cells_of(self, column: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows [b] and columns [b] of the base run that one column of this question patches."""
        into, _, rows = self.cells(device)
        return rows, into[column]

    def edit(self, site: str, units: Sequence[int] | None, column: int, given: Run) -> Edit:
        """The patch of some units of a site (None: all) at one column, from a run of the source prompts."""
        of, where, origins = self.units[site], {}, {}
        chosen = None if units is None or of == "site" else list(units)
        if self.into is not None and self.taken is not None:
            where = {"positions": [[int(i)] for i in self.into[column]], "rows": list(range(len(self)))}
            origins = {"source_positions": [[int(i)] for i in self.taken[column]], "source_rows": where["rows"]}
        if of == "neuron" and chosen is not None:  # the numbers themselves: quicker than an address, for many neurons
            value = given[site][..., chosen]
            if self.taken is not None:
                rows = torch.arange(len(self))
                value = value[rows, self.taken[column] + self.source.first.cpu()][:, None]
            return edits.set(site, value, neurons=chosen, **where)
        if of == "head" and chosen is not None:
            where["heads"] = chosen
        return edits.patch(site, given, **origins, **where)

    def judged(self, targets: Targets):
        """The metric as a sweep wants it."""
        return lambda logits, _tokens: self.metric(logits.float(), targets).float()


@dataclass(eq=False)
class Found:
    """Scores by site [columns, units, n], whether a unit differs at all there [columns, units], and the metric of the
    two runs [n]; collected over the parts of a question.
    """

    scores: dict[str, list[Tensor]] = field(default_factory=dict)
    moved: dict[str, Tensor] = field(default_factory=dict)
    base: list[Tensor] = field(default_factory=list)
    source: list[Tensor] = field(default_factory=list)
    steepest: float = 0.0
    magnitude: bool = False
    notes: list[str] = field(default_factory=list)

    def ends(self, question: Question, targets: Targets, base_logits: Tensor, source_logits: Tensor) -> None:
        """Note the metric of the two runs, from their logits [b, V]."""
        with torch.no_grad():
            self.base.append(question.metric(base_logits.float(), targets).float().cpu())
            self.source.append(question.metric(source_logits.float(), targets).float().cpu())

    def add(self, question: Question, site: str, scores: Tensor, base: Tensor, source: Tensor) -> None:
        """Note the scores of one site of one part."""
        self.scores.setdefault(site, []).append(scores.float().cpu())
        moved = question.by_unit(site, question.change(site, base, source).abs())
        if question.into is None:
            here = (moved > 0).any(1).any(0)[None]
        else:
            here = (question.at_columns(moved) > 0).any(-1)
        before = self.moved.get(site)
        self.moved[site] = here.cpu() if before is None else before | here.cpu()


def ask(
    lm: LanguageModel,
    pairs: AlignedPairs,
    sites: str | Sequence[str],
    direction: PatchDirection,
    metric: str | Metric,
    positions: Positions,
) -> Question:
    """Check what is asked. Raises CutawayError for what cannot be answered; see `attribution_patching`."""
    if direction not in ("noise", "denoise"):
        raise CutawayError(f"the direction {direction!r} is not 'denoise' or 'noise'")
    name, measure = named_metric(metric)
    if not differentiable(metric):
        raise NotSupported(f"{name} is a count and has no gradient; use logit_difference, or patch exactly")
    table = lm.sites()
    units: dict[str, Unit] = {site: _unit_of(table[site]) for site in table.expand_all(sites)}
    if not units:
        raise CutawayError("no site was named whose nodes are to be scored, such as 'blocks.*.attn.z'")
    into: Tensor | None = None
    taken: Tensor | None = None
    columns: tuple[str | None, ...] = (None,)
    if positions == "each":
        columns, into = _each(pairs)
        taken = into
    elif positions != "all":
        roles = [positions] if isinstance(positions, str) else list(positions)
        missing = [role for role in roles if role not in pairs.places]
        if missing or not roles:
            asked = repr(missing[0]) if missing else "nothing"
            raise CutawayError(f"no position is named {asked}; the pairs name {', '.join(pairs.places)}")
        places = torch.stack([pairs.places[role] for role in roles])
        clean, corrupt = places[:, 0], places[:, 1]
        into, taken = (clean, corrupt) if direction == "noise" else (corrupt, clean)
        columns = tuple(roles)
    said = positions if isinstance(positions, str) else ", ".join(positions)
    return Question(lm, pairs, units, direction, name, measure, said, columns, into, taken)


def _unit_of(site: Site) -> Unit:
    """What a node is at a site. Raises CutawayError where nodes make no sense."""
    dims = site.dims.split()
    if dims[:2] == ["b", "p"] and not (site.name.startswith("ln") or ".ln" in site.name or "router" in site.name):
        if len(dims) == 4:
            return "head"
        if dims[2] == "m":
            return "neuron"
        if dims[2] == "d":
            return "site"
    raise NotSupported(
        f"'{site.name}' has no nodes to score; take embed, resid_pre, resid_mid, resid_post, attn.out, mlp.out, heads "
        "at attn.q, attn.k, attn.v, attn.z or neurons at mlp.post"
    )


def _each(pairs: AlignedPairs) -> tuple[tuple[str, ...], Tensor]:
    lengths = pairs.clean.lengths.cpu()
    if int(lengths.min()) != int(lengths.max()):
        raise Misaligned(
            f"the pairs are {int(lengths.min())} to {int(lengths.max())} tokens long, so their positions do not line "
            "up; name positions by role, or give pairs of one template"
        )
    names = []
    for i in range(int(lengths[0])):
        here = {row[i] for row in (*pairs.clean.strings, *pairs.corrupt.strings)}
        names.append(f"{i} {here.pop()}" if len(here) == 1 else f"{i} ·")
    return tuple(names), torch.arange(len(names))[:, None].expand(-1, len(pairs))


def result_of(question: Question, method: str, found: Found) -> NodeScores:
    """The scores of all parts as one result. Raises CutawayError where no part had a gradient."""
    if found.steepest < _FLAT:
        where = "the point it is taken at"
        if question.direction == "noise":
            where = "the clean prompts, where it is smallest" if question.metric_name == "kl" else "the clean prompts"
        raise CutawayError(
            f"the gradient of {question.metric_name} is zero at {where}, so {method} scores no node; use "
            "logit_difference, or integrated gradients (method='ig' or 'ig-inputs'), which leave that point"
        )
    kinds = sorted({"node" if unit == "site" else unit for unit in question.units.values()})
    what = list(dict.fromkeys(template_of(site).removeprefix("blocks.{l}.") for site in question.sites))
    return NodeScores(
        model=question.lm.name,
        method=method,
        direction=question.direction,
        metric=question.metric_name,
        blocks={site: torch.cat(parts, -1) for site, parts in found.scores.items()},
        units=dict(question.units),
        columns=question.columns,
        base=torch.cat(found.base),
        source=torch.cat(found.source),
        choices=Choices(
            granularity=" and ".join(kinds),
            component=", ".join(what),
            ablation=f"resample, estimated by {method}",
            positions=question.positions,
            direction=question.direction,
            evaluation=f"{len(question)} prompt pairs",
        ),
        magnitude=found.magnitude,
        notes=(*found.notes, *_rounding(question.lm)),
    )


def exact_effects_of_sets(
    question: Question,
    sets: Sequence[Sequence[tuple[str, Sequence[int] | None, int]]],
    *,
    label: str = "exact patching",
) -> Tensor:
    """How the metric really changes [sets, n] when all nodes of a set are patched together; an empty set changes 0."""
    lm = question.lm
    used = sorted({site for nodes in sets for site, _, _ in nodes}, key=lm.sites().order)
    given = lm.run(question.source, capture=used, logits="last")
    base = lm.run(question.base, logits="last")
    targets = question.targets(base.last_logits, given.last_logits)
    cells = [[question.edit(site, units, column, given) for site, units, column in nodes] for nodes in sets]
    swept = lm.sweep(question.base, cells, question.judged(targets), label=label)
    return swept.values - swept.base


def _rounding(lm: LanguageModel) -> tuple[str, ...]:
    if lm.dtype.itemsize > 2:
        return ()
    name = str(lm.dtype).removeprefix("torch.")
    return (
        f"in {name} the effect of a small node is lost in rounding; load with dtype='float32' to compare such nodes",
    )


Exact = Callable[[Sequence[tuple[str, int, int]]], Tensor]
"""Nodes as (site, unit, column) -> how the metric really changes [nodes, n] when each is patched."""


def check_exactly(
    question: Question, scores: NodeScores, found: Found, n: int, *, seed: int = 0, exact: Exact | None = None
) -> Agreement:
    """Patch n nodes exactly, drawn among those that the two prompts give different values."""
    places = [(s, unit, column) for s, moved in found.moved.items() for column, unit in moved.nonzero().tolist()]
    order = np.random.default_rng(seed).permutation(len(places))[: min(n, len(places))]
    drawn = [places[i] for i in sorted(order.tolist())]
    if not drawn:
        return Agreement((), torch.zeros(0), torch.zeros(0), 0, "magnitude" if scores.magnitude else "signed")
    if exact is None:
        change = exact_effects_of_sets(question, [[(site, [unit], column)] for site, unit, column in drawn])
    else:
        change = exact(drawn)
    mean = change.abs().mean(-1) if scores.magnitude else change.mean(-1)
    estimated = torch.stack([scores.blocks[site][column, unit].mean() for site, unit, column in drawn])
    nodes = tuple(
        node_of(site, question.units[site], unit, scores.blocks[site].shape[1], question.columns[column])
        for site, unit, column in drawn
    )
    return Agreement(nodes, estimated, mean, len(places), "magnitude" if scores.magnitude else "signed")


def slope(each: Tensor, logits: Tensor) -> float:
    """The largest |d metric / d logit| of a metric [b] of these logits."""
    if not each.requires_grad:
        raise NotSupported("the metric has no gradient in the logits; use logit_difference, or patch exactly")
    (found,) = torch.autograd.grad(each.sum(), logits, retain_graph=True)
    return float(found.abs().max())
