"""The scorers by name: those of `gradient_scores.py`, and two that take no gradient.

`exact` runs the model once for every edge; the others estimate what it measures. `magnitude` says how strongly an edge
changes what its destination reads, whether or not the answer depends on it, and is what a circuit has to beat.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError, NotSupported
from cutaway.artifacts.progress import Progress
from cutaway.causal.circuits.edge_scores import EdgeScores, Scorer
from cutaway.causal.circuits.gradient_scores import (
    clean_corrupted,
    eap,
    eap_ig,
    exchanged,
    random_scores,
    relp,
)
from cutaway.causal.edge_graph import EdgeGraph
from cutaway.causal.metrics import Metric, PatchDirection, Targets, named_metric, targets_of
from cutaway.causal.parts import (
    PARTS,
    Reader,
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
    start_of_stream,
)
from cutaway.data.pairs import AlignedPairs
from cutaway.model.architecture.parts import Projection
from cutaway.model.forward.hooks import Hooks
from cutaway.model.language_model import LanguageModel


def _streams(lm: LanguageModel, graph: EdgeGraph) -> list[str]:
    """The sites of the streams that attention and the MLPs of each layer read, and the last."""
    mid = "resid_pre" if graph.parallel else "resid_mid"
    names = [f"blocks.{layer}.{part}" for layer in range(lm.n_layers) for part in ("resid_pre", mid)]
    return [*dict.fromkeys(names), f"blocks.{lm.n_layers - 1}.resid_post"]


def _source_changes(lm: LanguageModel, graph: EdgeGraph, pairs: AlignedPairs, first: int) -> Tensor:
    """other − base of what every source adds to the stream, [n, F, t, d], from column `first` on.

    A head in front of a norm adds what attention would add less without its change: exact for it alone.
    """
    base, other = (keep_writes(lm, tokens, first) for tokens in (pairs.clean, pairs.corrupt))
    start, end = (start_of_stream(lm, tokens)[:, first:] for tokens in (pairs.clean, pairs.corrupt))
    embed = end - start
    wide = torch.promote_types(lm.dtype, torch.float32)
    delta = torch.empty(len(pairs), graph.n_sources, *embed.shape[1:], dtype=wide, device=embed.device)
    delta[:, 0] = embed
    for index, layer in enumerate(lm.family.layers):
        heads = head_results(lm, index, other.z[index] - base.z[index])
        if layer.ln1_post is not None:
            whole = head_results(lm, index, base.z[index]).sum(0)
            heads = attention_of(layer, whole + heads) - base.attention[index]
        else:
            heads = heads * layer.attn_multiplier
        delta[:, graph.head_sources(index)] = heads.transpose(0, 1)
        delta[:, graph.mlp_source(index)] = other.mlp[index] - base.mlp[index]
    return delta


def exact(
    lm: LanguageModel,
    pairs: AlignedPairs,
    metric: str | Metric = "logit_difference",
    *,
    graph: EdgeGraph | None = None,
    direction: PatchDirection = "noise",
    edges: Tensor | None = None,
    keep_pairs: bool = True,
    batch_tokens: int = 4096,
) -> EdgeScores:
    """What each edge does to the metric: one forward per edge and pair, from the destination's layer on.

    Args:
        lm: The model.
        pairs: n aligned pairs.
        metric: What is asked of the logits.
        graph: Whose edges are measured, without columns; None: `EdgeGraph.of(lm)`.
        direction: "noise" puts corrupt sources into the clean run, "denoise" clean ones into the corrupt run.
        edges: Which are measured, bool [F, G]; the others get 0. None: all.
        keep_pairs: Whether each pair's scores are kept (n times the size of the mean).
        batch_tokens: Tokens of one batch.

    Raises:
        NotSupported: A graph with columns.
    """
    refuse_unreadable(lm)
    graph = EdgeGraph.of(lm) if graph is None else graph
    if graph.columns is not None:
        raise NotSupported("Exact scores do not keep positions apart; take a graph without columns.")
    wanted = graph.real if edges is None else graph.real & edges.bool()
    name, measure = named_metric(metric)
    given, n = (exchanged(pairs) if direction == "denoise" else pairs), len(pairs)
    per_pair = torch.zeros(n, *graph.shape)
    total, ends = int(wanted.sum()) * n, []
    per_batch = max(1, min(n, batch_tokens // (2 * given.clean.ids.shape[1])))
    with torch.no_grad(), Progress("exact edge scores", total=total, unit="runs") as progress:
        readers = [reader(lm, graph, layer) for layer in range(lm.n_layers)]
        for start in range(0, n, per_batch):
            rows = range(start, min(start + per_batch, n))
            one = _Exact(lm, graph, readers, given[rows], measure, direction, batch_tokens)
            ends.append(one.ends)
            for destination in range(graph.n_destinations):
                sources = wanted[:, destination].nonzero().flatten()
                for some, values in one.column(destination, sources):
                    per_pair[rows.start : rows.stop, some, destination] = values
                    progress.advance(values.numel())
    base, other = torch.cat(ends, 1)
    clean, corrupt = (other, base) if direction == "denoise" else (base, other)
    kept = per_pair if keep_pairs else None
    return EdgeScores(graph, per_pair.mean(0), kept, "exact", name, direction, n, clean, corrupt)


class _Exact:
    """A few pairs whose edges are patched one by one."""

    def __init__(
        self,
        lm: LanguageModel,
        graph: EdgeGraph,
        readers: list[Reader],
        pairs: AlignedPairs,
        measure: Metric,
        direction: PatchDirection,
        batch_tokens: int,
    ) -> None:
        self.lm, self.graph, self.readers, self.pairs, self.measure = lm, graph, readers, pairs, measure
        self.first = first_column(lm, pairs)
        self.repeats = graph.kv // lm.n_kv_heads
        self.run = lm.run(pairs.clean, capture=_streams(lm, graph), logits="last")
        other = lm.run(pairs.corrupt, logits="last").last_logits
        reference = self.run.last_logits if direction == "noise" else other
        self.targets = targets_of(pairs, reference).to(lm.device)
        both = torch.stack([measure(x, self.targets).cpu() for x in (self.run.last_logits, other)])
        self.ends, self.base = both.float(), both[0]  # differences are taken in the metric's own precision
        self.delta = _source_changes(lm, graph, pairs, self.first)
        self.rows = max(1, batch_tokens // (len(pairs) * pairs.clean.ids.shape[1]))

    def column(self, destination: int, sources: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For some of the sources at a time, the change of the metric [n, sources]."""
        layer, n = destination // self.graph.width, len(self.pairs)
        for start in range(0, len(sources), self.rows):
            some = sources[start : start + self.rows]
            if destination == self.graph.n_destinations - 1:
                logits = self._logits(some)
            elif destination == self.graph.mlp_destination(layer):
                logits = self._mlp(layer, some)
            else:
                logits = self._head(layer, destination - self.graph.attention_destinations(layer).start, some)
            # rows are sources × pairs
            here = self.targets[torch.arange(n, device=logits.device).repeat(len(some))]
            values = self.measure(logits, here).cpu().view(len(some), n)
            yield some, (values - self.base).T.float()

    def _changed(self, stream: Tensor, some: Tensor) -> Tensor:
        """The stream with one source's change in it, [sources · n, t, d]."""
        return (stream[:, self.first :] + self.delta[:, some].transpose(0, 1)).flatten(0, 1)

    def _forward(self, layer: int, hooks: Hooks, k: int, *, ungrouped: bool = False) -> Tensor:
        n = len(self.pairs)
        tokens = self.pairs.clean[list(range(n)) * k]
        stream = self.run[f"blocks.{layer}.resid_pre"].repeat(k, 1, 1)
        logits = forward(self.lm, tokens, hooks, first_layer=layer, stream=stream, ungrouped=ungrouped)
        assert logits is not None
        return logits

    def _logits(self, some: Tensor) -> Tensor:
        stream = self.run[f"blocks.{self.lm.n_layers - 1}.resid_post"]
        rows, last = torch.arange(len(self.pairs)), self.pairs.clean.last
        moved = stream[rows, last] + self.delta[rows, :, last - self.first][:, some].transpose(0, 1)
        return self.lm.unembed(moved.flatten(0, 1).to(self.lm.dtype))

    def _mlp(self, layer: int, some: Tensor) -> Tensor:
        mid = "resid_pre" if self.graph.parallel else "resid_mid"
        new = self._changed(self.run[f"blocks.{layer}.{mid}"], some)
        module, norm = mlp_entry(self.lm, layer)
        if norm is not None:
            wide, scale = norm.divide(new)
            new = norm.gain(wide / scale, new.dtype)

        def change(x: Tensor) -> Tensor:
            kept = x.reshape(len(new), -1, x.shape[-1])
            return torch.cat([kept[:, : self.first], new.to(x.dtype)], 1).view(x.shape)

        hooks = Hooks()
        hooks.before(module, change)
        return self._forward(layer, hooks, len(some))

    def _head(self, layer: int, which: int, some: Tensor) -> Tensor:
        heads, kv = self.graph.n_heads, self.graph.kv
        part = "q" if which < heads else "k" if which < heads + kv else "v"
        head = which if part == "q" else (which - heads) % kv
        read = self.readers[layer]
        wide, scale = read.divide(self._changed(self.run[f"blocks.{layer}.resid_pre"], some))
        value = wide @ read.weights[part][head]
        value = (value if scale is None else value / scale) + read.constants[part][head]
        hooks = Hooks()

        def project(projection: Projection, y: Tensor, here: bool) -> Tensor:
            parts = by_query_head(projection, y, self.repeats)
            if here and part in parts:
                parts[part] = parts[part].clone()
                parts[part][:, self.first :, head] = value.to(y.dtype)
            return joined(projection, parts, y, self.repeats)

        # the layers above only need their keys repeated
        for above in range(layer, layer + 1 if self.repeats == 1 else self.lm.n_layers):
            for projection in self.lm.family.layers[above].projections:
                hooks.after(projection.module, partial(project, projection, here=above == layer))
        return self._forward(layer, hooks, len(some), ungrouped=self.repeats > 1)


def magnitude(
    lm: LanguageModel,
    pairs: AlignedPairs,
    metric: str | Metric = "logit_difference",
    *,
    graph: EdgeGraph | None = None,
    batch_rows: int = 8,
) -> EdgeScores:
    """How strongly each edge changes what its destination reads, relative to what it reads: no gradient, no answer.

    ‖change of the query (key, value, MLP input, last stream) if only this source changed‖ / ‖its clean value‖, to first
    order, in the mean over positions and pairs.

    Args:
        lm: The model.
        pairs: n aligned pairs.
        metric: Of the two untouched runs; the scores do not depend on it.
        graph: Whose edges are scored, without columns; None: `EdgeGraph.of(lm)`.
        batch_rows: At most so many pairs in one forward.
    """
    refuse_unreadable(lm)
    graph = EdgeGraph.of(lm) if graph is None else graph
    if graph.columns is not None:
        raise NotSupported("Magnitudes do not keep positions apart; take a graph without columns.")
    name, measure = named_metric(metric)
    kept: list[Tensor] = []
    ends: list[Tensor] = []
    with torch.no_grad():
        readers = [reader(lm, graph, layer) for layer in range(lm.n_layers)]
        for start in range(0, len(pairs), batch_rows):
            part = pairs[range(start, min(start + batch_rows, len(pairs)))]
            ends.append(_ends(lm, part, measure))
            kept.append(_magnitudes(lm, graph, readers, part))
    per_pair = torch.cat(kept) * graph.real
    clean, corrupt = torch.cat(ends, 1)
    return EdgeScores(graph, per_pair.mean(0), per_pair, "magnitude", name, "noise", len(pairs), clean, corrupt)


def _ends(lm: LanguageModel, pairs: AlignedPairs, measure: Metric) -> Tensor:
    clean, corrupt = (lm.run(tokens, logits="last").last_logits for tokens in (pairs.clean, pairs.corrupt))
    targets: Targets = targets_of(pairs, clean).to(lm.device)
    return torch.stack([measure(x, targets).float().cpu() for x in (clean, corrupt)])


def _magnitudes(lm: LanguageModel, graph: EdgeGraph, readers: list[Reader], pairs: AlignedPairs) -> Tensor:
    first = first_column(lm, pairs)
    run = lm.run(pairs.clean, capture=_streams(lm, graph), logits=None)
    delta = _source_changes(lm, graph, pairs, first)
    real = pairs.clean.mask[:, first:].to(delta)
    scores = torch.zeros(len(pairs), *graph.shape)

    def mean(changes: Tensor, value: Tensor) -> Tensor:
        """changes [n, f, t, k], value [n, t, k]: the mean ratio over real tokens [n, f, k]."""
        ratio = changes / value.clamp(min=1e-12)[:, None]
        return ((ratio * real[:, None, :, None]).sum(2) / real.sum(1).clamp(min=1)[:, None, None]).cpu()

    for layer, read in enumerate(readers):
        n = graph.before_attention(layer)
        wide, scale = read.divide(run[f"blocks.{layer}.resid_pre"][:, first:])
        for part, offset in zip(PARTS, (0, graph.n_heads, graph.n_heads + graph.kv), strict=True):
            w = read.weights[part]
            heads = slice(graph.attention_destinations(layer).start + offset, None)
            heads = slice(heads.start, heads.start + w.shape[0])
            normalized = wide if scale is None else wide / scale
            value = torch.einsum("ntd,kdh->ntkh", normalized, w).norm(dim=-1)
            # W has the gain already
            moved = delta[:, :n]
            if read.norm is not None and scale is not None:
                moved = read.norm.push(moved, scale[:, None], normalized[:, None], gain=False)
            change = torch.stack([(moved @ head).norm(dim=-1) for head in w], -1)
            scores[:, :n, heads] = mean(change, value)
        mid = "resid_pre" if graph.parallel else "resid_mid"
        n, column = graph.before_mlp(layer), graph.mlp_destination(layer)
        value = run[f"blocks.{layer}.{mid}"][:, first:].norm(dim=-1, keepdim=True)
        scores[:, :n, column] = mean(delta[:, :n].norm(dim=-1, keepdim=True), value)[..., 0]
    value = run[f"blocks.{lm.n_layers - 1}.resid_post"][:, first:].norm(dim=-1, keepdim=True)
    rows, last = torch.arange(len(pairs)), pairs.clean.last - first
    ratio = delta[rows, :, last].norm(dim=-1) / value[rows, last].clamp(min=1e-12)
    scores[:, :, -1] = ratio.cpu()
    return scores


SCORERS: dict[str, Scorer] = {
    "eap-ig": eap_ig,
    "eap": eap,
    "relp": relp,
    "clean-corrupted": clean_corrupted,
    "exact": exact,
    "magnitude": magnitude,
    "random": random_scores,
}


def named_scorer(name: str) -> Scorer:
    """The scorer of that name; CutawayError with the names there are."""
    if name not in SCORERS:
        raise CutawayError(f"no scorer is called {name!r}; there are {', '.join(SCORERS)}")
    return SCORERS[name]
