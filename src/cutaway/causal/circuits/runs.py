"""Running circuits: every destination reads its own mixture of the clean and the ablated graph.

For a mask m of edges, destination v reads X + Σ_u m[u, v] · (current_u − ablated_u), where X is the stream in which
every source is ablated. Everything outside the circuit so carries the ablation, exactly, in one forward per circuit.
All circuits are rows of the same batches, the ablated run is made once, and only what a circuit has is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.progress import shown
from cutaway.artifacts.statistics import bootstrap_interval
from cutaway.causal.ablations import Ablation, ablation_of, replacement_run
from cutaway.causal.edge_graph import EdgeGraph
from cutaway.causal.metrics import Metric, named_metric, targets_of
from cutaway.causal.parts import (
    PARTS,
    Prefix,
    Reader,
    at_end,
    attention_of,
    by_query_head,
    first_column,
    forward,
    head_results,
    joined,
    keep_writes,
    mlp_entry,
    reader,
    refuse_unreadable,
    shared_prefix,
    start_of_stream,
    tiled,
)
from cutaway.data.pairs import AlignedPairs, require_aligned
from cutaway.draw.charts import Bar
from cutaway.draw.intervals import intervals_svg
from cutaway.draw.result import Result
from cutaway.draw.text import interval
from cutaway.model.architecture.norms import Norm
from cutaway.model.architecture.parts import Projection
from cutaway.model.forward.hooks import Hooks
from cutaway.model.forward.run import Run
from cutaway.model.language_model import LanguageModel
from cutaway.model.tokens import Tokens

_MEMORY = 500 * 2**20  # bytes that the changes of one tile may hold, about


@dataclass(frozen=True, eq=False, repr=False)
class CircuitRuns(Result):
    """The metric of n pairs under C circuits."""

    values: Tensor
    """Of every circuit, float32 [C, n], in units of the metric."""
    clean: Tensor
    """Of the untouched model [n]."""
    corrupt: Tensor
    """Of the model with every edge ablated [n]."""
    metric: str
    """What was asked of the logits."""
    ablation: str
    """What stands in place of an edge outside the circuit, in words."""

    title = "Runs of circuits"

    def _table(self) -> list[Bar]:
        """Means over pairs with 95 % intervals: of the model, of the ablated one, and of each circuit."""
        rows = {"the whole model": self.clean, "every edge ablated": self.corrupt}
        rows |= {f"circuit {i}": values for i, values in enumerate(self.values)}
        bars: list[Bar] = []
        for name, values in rows.items():
            low, high = bootstrap_interval(values.double().numpy())
            control = not name.startswith("circuit")
            bars.append({"label": name, "value": float(values.mean()), "low": low, "high": high, "control": control})
        return bars

    def summary(self) -> str:
        table = self._table()[:10]
        left = len(self.values) + 2 - len(table)
        return "\n".join(
            [
                f"{self.title}: {self.metric.replace('_', ' ')}, {self.ablation} ablation, n {len(self.clean)}",
                *(f"  {b['label']}: {interval(b['value'], b.get('low'), b.get('high'))}" for b in table),
                *([f"  … and {left} more"] if left else []),
            ]
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        names = ("values", "clean", "corrupt")
        return {
            "metric": self.metric, "ablation": self.ablation, **{name: getattr(self, name).tolist() for name in names}
        }  # fmt: skip

    def rows(self) -> list[dict[str, Any]]:
        """A circuit and pair per row."""
        return [
            {"circuit": i, "pair": j, "value": value, "clean": float(self.clean[j]), "corrupt": float(self.corrupt[j])}
            for i, values in enumerate(self.values.tolist())
            for j, value in enumerate(values)
        ]

    def drawing(self) -> Markup:
        return intervals_svg(groups=[self._table()], title=self.title, units=self.metric.replace("_", " "))


@dataclass
class Reference:
    """What every source writes when it is ablated, [n, t, ...].

    `heads` are head results before a post-norm, `attention` what attention then adds to the stream in all.
    """

    start: Tensor
    heads: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    mlp: list[Tensor] = field(default_factory=list)


def run_circuits(
    lm: LanguageModel,
    pairs: AlignedPairs,
    masks: Tensor,
    metric: str | Metric = "logit_difference",
    *,
    graph: EdgeGraph | None = None,
    ablation: Ablation | str = "resample",
    reference: Tokens | None = None,
    columns: Tensor | None = None,
    batch_tokens: int | None = None,
    label: str = "circuits",
) -> CircuitRuns:
    """The metric on the clean prompts when only a circuit's edges carry them.

    Positions and biases are no sources and stay. Masks are run as they are: prune them first (`EdgeGraph.prune`) where
    dangling edges are not meant.

    Args:
        lm: The model.
        pairs: n aligned pairs.
        masks: The edges that stay, bool [C, F, G] (or [C, P, F, G] with `columns`).
        metric: What is asked of the logits.
        graph: The graph that the masks are of; None: `EdgeGraph.of(lm)`.
        ablation: What all other edges carry: "resample" (the pair's corrupt prompt), "zero", a mean over `reference` or
            over both prompts of all pairs, ... (`Ablation`, or its kind).
        reference: The prompts that a mean is over.
        columns: Which of the graph's columns each token belongs to [n, p] (`position_columns`).
        batch_tokens: Tokens of one batch, circuits times pairs times positions; None: as many as about 500 MB hold.
        label: What the progress bar says.

    Returns:
        The metric of every circuit and pair, of the model, and of the wholly ablated model.

    Raises:
        CutawayError: Masks of another shape or with edges that are none, and what `replacement_run` raises.

    Source: Wang et al. 2023; https://arxiv.org/abs/2211.00593.
    """
    require_aligned(pairs)
    refuse_unreadable(lm)
    graph = EdgeGraph.of(lm) if graph is None else graph
    whole = (graph.n_layers, graph.n_heads, graph.parallel)
    if whole != (lm.n_layers, lm.n_heads, lm.family.parallel) or graph.kv not in (lm.n_heads, lm.n_kv_heads):
        raise CutawayError(f"This is the graph of another model than {lm.name}; take EdgeGraph.of(lm).")
    if masks.ndim != len(graph.shape) + 1:
        raise CutawayError(f"Masks of this graph have the shape [circuits, {', '.join(map(str, graph.shape))}].")
    if (graph.columns is None) != (columns is None):
        raise CutawayError("A graph with positions needs columns=, and a graph without them takes none.")
    masks = graph.check(masks.bool())
    ablation = ablation_of(ablation)
    name, measure = named_metric(metric)
    full = (masks | ~graph.real).flatten(1).all(1)
    some = (masks.flatten(1).any(1) & ~full).nonzero().flatten()  # neither the model itself nor nothing of it
    p, c = pairs.clean.ids.shape[1], max(1, len(some))
    size = 4 * lm.d_model * (graph.n_sources * c + 60 * lm.n_layers)
    tile = max(1, (batch_tokens or _MEMORY // size) // (p if batch_tokens is None else p * c))
    given = None if ablation.kind == "resample" else _given(lm, pairs, ablation, reference)
    values, clean, corrupt = [], [], []
    share, checked = True, False  # whether a prefix is taken over, and was seen to be right
    with torch.no_grad(), shown(label, len(pairs), "pairs", least=tile + 1) as advance:
        readers = [reader(lm, graph, layer) for layer in range(lm.n_layers)]
        for first in range(0, len(pairs), tile):
            rows = range(first, min(first + tile, len(pairs)))
            part = pairs[rows]
            at, prefix = 0, None
            if given is None:
                at = first_column(lm, part)
                if share and at:
                    prefix = shared_prefix(lm, part.clean, at, check=not checked)
                    share, checked = prefix is not None, True
                base = _written(lm, part.corrupt, at, prefix)
            else:
                base = _replaced(lm, given, part.clean, rows)
            plain = lm.run(part.clean, logits="last").last_logits
            targets = targets_of(part, plain).to(lm.device)
            here = None if columns is None else columns[first : first + tile]
            one = _Tile(lm, graph, readers, part, masks[some], base, at, here, prefix)
            clean.append(measure(plain, targets).float().cpu())
            corrupt.append(measure(one.ablated_logits(), targets).float().cpu())
            found = torch.where(full[:, None], clean[-1], corrupt[-1])  # of the trivial ones
            if len(some):
                logits = one.run().split(len(part))
                found[some] = torch.stack([measure(each, targets).float().cpu() for each in logits])
            values.append(found)
            advance(len(part))
    return CircuitRuns(torch.cat(values, 1), torch.cat(clean), torch.cat(corrupt), name, str(ablation))


def _written(lm: LanguageModel, tokens: Tokens, at: int, prefix: Prefix | None) -> Reference:
    """What every source writes for these tokens, from column `at` on."""
    found = keep_writes(lm, tokens, at if prefix is None else 0, prefix)
    start = start_of_stream(lm, tokens)[:, at:]
    base = Reference(start)
    for index in range(lm.n_layers):
        base.heads.append(head_results(lm, index, found.z[index]))
        base.attention.append(found.attention[index])
        base.mlp.append(found.mlp[index])
    return base


def _given(lm: LanguageModel, pairs: AlignedPairs, ablation: Ablation, reference: Tokens | None) -> Run:
    """What an ablation puts in every source's place at the clean prompts: z, MLP outputs, embeddings."""
    sites = ["embed", *(f"blocks.{layer}.{name}" for layer in range(lm.n_layers) for name in ("attn.z", "mlp.out"))]
    return replacement_run(lm, pairs, sites, ablation, into="clean", reference=reference)


def _replaced(lm: LanguageModel, given: Run, clean: Tokens, rows: range) -> Reference:
    """That of some of the pairs, as what every source writes. Positions and biases, which are no sources, stay."""
    width, wide = clean.ids.shape[1], torch.promote_types(lm.dtype, torch.float32)

    def pick(name: str) -> Tensor:
        return given[name][rows.start : rows.stop, :width].to(wide)

    own = lm.run(clean, capture=["embed", "blocks.0.resid_pre"], logits=None)
    base = Reference(own["blocks.0.resid_pre"].to(wide) - own["embed"].to(wide) + pick("embed"))
    for index in range(lm.n_layers):
        heads = head_results(lm, index, pick(f"blocks.{index}.attn.z"))
        base.heads.append(heads)
        base.attention.append(attention_of(lm.family.layers[index], heads.sum(0)))
        base.mlp.append(pick(f"blocks.{index}.mlp.out"))
    return base


class _Tile:
    """Some pairs under all circuits: rows are circuits × pairs, columns from `at` on are computed anew."""

    def __init__(
        self,
        lm: LanguageModel,
        graph: EdgeGraph,
        readers: Sequence[Reader],
        pairs: AlignedPairs,
        masks: Tensor,
        base: Reference,
        at: int,
        columns: Tensor | None,
        prefix: Prefix | None,
    ) -> None:
        self.lm, self.graph, self.readers, self.masks, self.base, self.at = lm, graph, readers, masks, base, at
        self.prefix, self.skip = prefix, at if prefix is None else 0  # columns of a forward that stay as they are
        self.tokens, self.n = pairs.clean, len(pairs)
        self.t = self.tokens.ids.shape[1] - at
        self.wide = torch.promote_types(lm.dtype, torch.float32)
        self.repeats = graph.kv // lm.n_kv_heads
        self.columns = None if columns is None else columns[:, at:]
        self.last = (self.tokens.last - at).to(lm.device)
        self.start = start_of_stream(lm, self.tokens)[:, at:].to(self.wide)
        self.posts = {i for i, layer in enumerate(lm.family.layers) if layer.ln1_post is not None}
        any_position = masks if graph.columns is None else masks.any(1)
        # sources that some destination reads, and where each is kept
        self.active = [circuit.any(1).nonzero().flatten() for circuit in any_position]
        self.place = []
        for active in self.active:
            place = torch.full((graph.n_sources,), -1)
            place[active] = torch.arange(len(active))
            self.place.append(place)
        self.any_position = any_position
        size = (self.n, self.t, lm.d_model)
        self.changes = [torch.empty(len(a), *size, dtype=self.wide, device=lm.device) for a in self.active]
        # the stream in which everything is ablated, before each reader
        x = self.base.start.to(self.wide).expand(size)
        self.before, self.between = [], []
        for index in range(lm.n_layers):
            self.before.append(x)
            mid = x + self.base.attention[index]
            self.between.append(x if lm.family.parallel else mid)
            x = mid + self.base.mlp[index]
        self.end = x
        self.parts: dict[str, Tensor] = {}

    def ablated_logits(self) -> Tensor:
        """Logits at the last position with every edge ablated [n, V]."""
        x = self.end[torch.arange(self.n, device=self.end.device), self.last]
        return self.lm.unembed(x.to(self.lm.dtype))

    def run(self) -> Tensor:
        """Logits at the last position [C · n, V]."""
        lm, hooks = self.lm, Hooks()
        for c, place in enumerate(self.place):
            if place[0] >= 0:
                self.changes[c][place[0]] = self.start - self.base.start
        for index, layer in enumerate(lm.family.layers):
            hooks.before(layer.module, lambda _, index=index: self._read(index))
            for projection in layer.projections:
                hooks.after(projection.module, lambda y, projection=projection: self._project(projection, y))
            hooks.before(layer.output, lambda z, index=index: self._wrote_heads(index, z))
            module, norm = mlp_entry(lm, index)
            hooks.before(module, lambda x, index=index, norm=norm: self._mlp(index, norm, x))
            hooks.after(
                layer.mlp_writer, lambda out, i=index, times=layer.mlp_multiplier: self._wrote_mlp(i, out, times)
            )
        at_end(lm, hooks, self._finish)
        tokens = tiled(self.tokens, len(self.masks))
        logits = forward(lm, tokens, hooks, ungrouped=self.repeats > 1, prefix=self.prefix)
        assert logits is not None
        return logits.to(self.wide)

    def _streams(self, c: int, sources: int, columns: Tensor, base: Tensor) -> Tensor:
        """What these destinations of circuit c read of the first so many sources [columns, n, t, d]."""
        mask, place = self.any_position[c], self.place[c]
        if not self.posts:
            read = (mask[:sources][:, columns].any(1) & (place[:sources] >= 0)).nonzero().flatten()
            return self._mix(c, read, columns) + base
        linear = torch.ones(sources, dtype=torch.bool)
        for layer in self.posts:
            linear[self.graph.head_sources(layer)] = False
        read = (mask[:sources][:, columns].any(1) & linear).nonzero().flatten()
        x = self._mix(c, read, columns) + base
        for layer in sorted(self.posts):
            heads = self.graph.head_sources(layer)
            if heads.stop > sources:
                continue
            read = mask[heads][:, columns].any(1).nonzero().flatten() + heads.start
            if len(read):
                mixed = self.base.heads[layer].sum(0) + self._mix(c, read, columns)
                x = x + attention_of(self.lm.family.layers[layer], mixed) - self.base.attention[layer]
        return x

    def _mix(self, c: int, sources: Tensor, columns: Tensor) -> Tensor:
        """Σ_u m[u, v] · change_u over these sources, [columns, n, t, d]."""
        size = (self.n, self.t, self.lm.d_model)
        if len(sources) == 0:
            return torch.zeros(1, *size, dtype=self.wide, device=self.lm.device)
        kept = self.place[c][sources]
        first, last = int(kept[0]), int(kept[-1]) + 1
        if len(kept) == last - first:
            changes = self.changes[c][first:last]
        else:
            changes = self.changes[c][kept]
        if self.columns is None:
            weight = self.masks[c][sources][:, columns].T.to(changes)
            return (weight @ changes.flatten(1)).view(-1, *size)
        weight = self.masks[c][:, sources][:, :, columns][self.columns].to(changes)  # [n, t, sources, columns]
        return torch.einsum("ntfg,fntd->gntd", weight, changes)

    def _read(self, index: int) -> None:
        """Queries, keys and values of a layer, [C · n, t, K, h] each, from each head's own stream."""
        graph, read, first = self.graph, self.readers[index], self.graph.attention_destinations(index).start
        wide, scale = read.divide(self.before[index])
        plain: dict[str, Tensor] = {}
        for part in PARTS:
            k = read.weights[part].shape[0]
            flat = wide.reshape(1, -1, wide.shape[-1]).expand(k, -1, -1)
            by = None if scale is None else scale.reshape(1, -1, 1)
            value = read.part(part, slice(None), flat, by).view(k, self.n, self.t, -1).permute(1, 2, 0, 3)
            plain[part] = value
        starts = {"q": first, "k": first + graph.n_heads, "v": first + graph.n_heads + graph.kv}
        self.parts = {part: value.repeat(len(self.masks), 1, 1, 1) for part, value in plain.items()}
        sources = graph.before_attention(index)
        for c in range(len(self.masks)):
            some = self.any_position[c][:sources, graph.attention_destinations(index)].any(0)
            columns = some.nonzero().flatten() + first
            if len(columns) == 0:
                continue
            wide, scale = read.divide(self._streams(c, sources, columns, self.before[index]))
            done = 0
            for part in PARTS:
                k = read.weights[part].shape[0]
                heads = columns[(columns >= starts[part]) & (columns < starts[part] + k)] - starts[part]
                if len(heads) == 0:
                    continue
                rows = slice(done, done + len(heads))
                by = None if scale is None else scale[rows].flatten(1, 2)
                value = read.part(part, heads, wide[rows].flatten(1, 2), by)
                value = value.view(len(heads), self.n, self.t, -1).permute(1, 2, 0, 3)
                self.parts[part][c * self.n : (c + 1) * self.n, :, heads] = value
                done += len(heads)

    def _project(self, projection: Projection, y: Tensor) -> Tensor:
        old = by_query_head(projection, y, self.repeats)
        new: dict[str, Tensor] = {}
        for part in projection.parts:
            value = self.parts[part].to(y.dtype)
            new[part] = torch.cat([old[part][:, : self.skip], value], 1) if self.skip else value
        return joined(projection, new, y, self.repeats)

    def _wrote_heads(self, index: int, z: Tensor) -> None:
        heads = self.graph.head_sources(index)
        by_head = z.unflatten(-1, (self.lm.n_heads, -1))[:, self.skip :].to(self.wide)
        w_o = self.lm.w_o(index).to(self.wide)
        times = 1.0 if index in self.posts else self.lm.family.layers[index].attn_multiplier
        for c, place in enumerate(self.place):
            kept = place[heads]
            which = (kept >= 0).nonzero().flatten()
            if len(which) == 0:
                continue
            own = by_head[c * self.n : (c + 1) * self.n, :, which].permute(2, 0, 1, 3).flatten(1, 2)
            result = torch.bmm(own, w_o[which]).view(len(which), self.n, self.t, -1)
            change = result - self.base.heads[index][which]
            first = int(kept[which[0]])
            self.changes[c][first : first + len(which)] = change if times == 1.0 else change * times

    def _mlp(self, index: int, norm: Norm | None, x: Tensor) -> Tensor:
        column = torch.tensor([self.graph.mlp_destination(index)])
        sources, base = self.graph.before_mlp(index), self.between[index]
        streams = [
            self._streams(c, sources, column, base)[0]
            if bool(self.any_position[c][:sources, column].any())
            else base.expand(self.n, -1, -1)
            for c in range(len(self.masks))
        ]
        new = torch.cat(streams)
        if norm is not None:
            wide, scale = norm.divide(new)
            new = norm.gain(wide / scale, new.dtype)
        new = new.to(x.dtype)
        if self.skip:
            kept = x.view(len(new), -1, x.shape[-1])
            new = torch.cat([kept[:, : self.skip], new], 1)
        return new.reshape(x.shape)

    def _wrote_mlp(self, index: int, out: Tensor, times: float) -> None:
        source = self.graph.mlp_source(index)
        values = out.reshape(len(self.masks) * self.n, -1, out.shape[-1])[:, self.skip :].to(self.wide)
        for c, place in enumerate(self.place):
            if place[source] >= 0:
                own = values[c * self.n : (c + 1) * self.n]
                self.changes[c][place[source]] = (own * times if times != 1.0 else own) - self.base.mlp[index]

    def _finish(self, x: Tensor) -> Tensor:
        """Only the last position of each row is read."""
        column, rows = torch.tensor([self.graph.n_destinations - 1]), torch.arange(self.n, device=x.device)
        new = x.clone()
        for c in range(len(self.masks)):
            if bool(self.any_position[c][:, -1].any()):
                stream = self._streams(c, self.graph.n_sources, column, self.end)[0]
            else:
                stream = self.end
            new[c * self.n + rows, self.last + self.skip] = stream[rows, self.last].to(x.dtype)
        return new
