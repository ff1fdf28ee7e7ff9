"""One batch of pairs for edge scores: what each source changes, and the gradient at each destination's input.

All steps of an integrated gradient are rows of one batch; a backward contracts changes with gradients layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError, NotSupported
from cutaway.causal.attribution.relp import relp_rules
from cutaway.causal.edge_graph import EdgeGraph
from cutaway.causal.metrics import Metric, PatchDirection, Targets, targets_of
from cutaway.causal.parts import (
    PARTS,
    Reader,
    Writes,
    at_end,
    by_query_head,
    first_column,
    forward,
    head_results,
    joined,
    mlp_entry,
    note_writes,
    reader,
    shared_prefix,
    start_of_stream,
    tiled,
)
from cutaway.data.pairs import AlignedPairs
from cutaway.model.architecture.parts import Projection
from cutaway.model.forward.hooks import Hooks
from cutaway.model.language_model import LanguageModel
from cutaway.model.tokens import Tokens

Rules = Literal["gradient", "relp"]


@dataclass
class _Layer:
    """What the backward pass of one layer needs, [steps · n, t, ...]."""

    normalized: Tensor | None = None
    scale: Tensor | None = None
    read: dict[str, Tensor] = field(default_factory=dict)
    grads: dict[str, Tensor] = field(default_factory=dict)


class EdgeGradients:
    """One batch of pairs: its forwards, the sources' changes, and a backward that contracts them layer by layer."""

    def __init__(
        self, lm: LanguageModel, graph: EdgeGraph, measure: Metric, name: str, at: tuple[float, ...], rules: Rules
    ) -> None:
        self.lm, self.graph, self.measure, self.name, self.at, self.rules = lm, graph, measure, name, at, rules
        self.repeats = graph.kv // lm.n_kv_heads
        self.wide = torch.promote_types(lm.dtype, torch.float32)
        self.may_share, self.checked = True, False  # whether a prefix is taken over, and was seen to be right
        self.readers = [reader(lm, graph, layer) for layer in range(lm.n_layers)]

    def batch(
        self, pairs: AlignedPairs, columns: Tensor | None, direction: PatchDirection
    ) -> tuple[Tensor, Tensor, float]:
        """Scores [n, ...], the metric of the clean and the corrupt run [2, n], the largest |d metric / d logit|."""
        lm, n = self.lm, len(pairs)
        self.first = first_column(lm, pairs)
        self.columns = None if columns is None else columns[:, self.first :]
        self.prefix = None
        if self.may_share and self.first:
            self.prefix = shared_prefix(lm, pairs.clean, self.first, check=not self.checked)
            self.may_share, self.checked = self.prefix is not None, True
        self.skip = 0 if self.prefix is not None else self.first  # columns of a forward that are not looked at
        base, other = start_of_stream(lm, pairs.clean), start_of_stream(lm, pairs.corrupt)
        points = torch.cat([other + point * (base - other) for point in self.at])
        points = points[:, self.first - self.skip :].contiguous().requires_grad_()
        ends = {1.0: pairs.clean, 0.0: pairs.corrupt}
        missing = [end for end in ends if end not in self.at]
        written: dict[float, Writes] = {end: Writes() for end in ends}
        logits: dict[float, Tensor] = {}
        if missing:
            tokens = _stacked([ends[end] for end in missing])
            hooks = Hooks()
            ends_at = {end: slice(i * n, (i + 1) * n) for i, end in enumerate(missing)}
            note_writes(lm, hooks, ends_at, self.skip, written)
            with torch.no_grad():
                found = forward(lm, tokens, hooks, prefix=self.prefix)
            assert found is not None
            logits.update({end: found[i * n : (i + 1) * n] for i, end in enumerate(missing)})
        hooks, rows = Hooks(), {end: slice(i * n, (i + 1) * n) for i, end in enumerate(self.at) if end in ends}
        note_writes(lm, hooks, rows, self.skip, written)
        layers = [_Layer() for _ in range(lm.n_layers)]
        scores = torch.zeros(n, *self.graph.shape)
        self._listen(hooks, layers, scores, n)
        tokens = tiled(pairs.clean, len(self.at))
        with torch.enable_grad(), relp_rules(lm) if self.rules == "relp" else nullcontext():
            hooks.before(lm.family.layers[0].module, lambda _: points)
            found = forward(lm, tokens, hooks, ungrouped=self.repeats > 1, prefix=self.prefix)
            assert found is not None
            logits.update({end: found[where].detach() for end, where in rows.items()})
            # in the direction "denoise" pairs are exchanged, and what the metric calls clean is the other run
            reference = logits[1.0] if direction == "noise" else logits[0.0]
            targets = targets_of(pairs, reference.to(self.wide)).to(lm.device)
            each = self.measure(found.to(self.wide), _repeated(targets, len(self.at)))
            if not each.requires_grad:
                raise NotSupported(f"{self.name} has no gradient; use logit_difference, or score edges exactly.")
            if not bool(torch.isfinite(each).all()):
                raise CutawayError(f"{self.name} is NaN or infinite on some pairs, so it has no gradient.")
            (slope,) = torch.autograd.grad(each.sum(), found)
            self.delta = self._changes(written, base, other)
            torch.autograd.grad(found, points, slope)
        both = torch.stack([self.measure(logits[end].to(self.wide), targets).detach().float().cpu() for end in ends])
        del self.delta
        return scores / len(self.at), both, float(slope.abs().max())

    def _changes(self, written: dict[float, Writes], base: Tensor, other: Tensor) -> Tensor:
        """corrupt − clean of every source, float [n, F, t, d]."""
        n, t, d = len(base), base.shape[1] - self.first, base.shape[2]
        delta = torch.empty(n, self.graph.n_sources, t, d, dtype=self.wide, device=base.device)
        delta[:, 0] = (other - base)[:, self.first :]
        clean, corrupt = written[1.0], written[0.0]
        for index, layer in enumerate(self.lm.family.layers):
            heads = head_results(self.lm, index, corrupt.z.pop(index) - clean.z.pop(index))
            if layer.ln1_post is not None:
                normalized, scale = clean.post[index]
                heads = layer.ln1_post.push(heads, scale, normalized)
            if layer.attn_multiplier != 1.0:
                heads = heads * layer.attn_multiplier
            delta[:, self.graph.head_sources(index)] = heads.transpose(0, 1)
            delta[:, self.graph.mlp_source(index)] = corrupt.mlp.pop(index) - clean.mlp.pop(index)
        return delta

    def _listen(self, hooks: Hooks, layers: list[_Layer], scores: Tensor, n: int) -> None:
        """Hooks that see what each layer reads, and the gradient there in the backward pass."""
        lm, family = self.lm, self.lm.family
        for index, layer in enumerate(family.layers):
            now = layers[index]
            if layer.ln1 is not None:

                def on_norm(x: Tensor, now: _Layer = now, norm: Any = layer.ln1) -> None:
                    wide, scale = norm.divide(x.detach()[:, self.skip :])
                    now.normalized, now.scale = wide / scale, scale

                hooks.before(layer.ln1.module, on_norm)
            for projection in layer.projections:
                hooks.after(projection.module, partial(self._on_projection, projection, index, now, scores, n))
            module, norm = mlp_entry(lm, index)

            def on_mlp(x: Tensor, index: int = index, now: _Layer = now, norm: Any = norm) -> Tensor:
                def on_gradient(g: Tensor) -> None:
                    g = g if g.ndim == 3 else g.view(n * len(self.at), -1, g.shape[-1])  # tokens in one dimension
                    g = g[:, self.skip :].to(self.wide)
                    if norm is not None:
                        g = norm.pull(g, now.scale, None if self.rules == "relp" else now.normalized)
                    sources, column = self.graph.before_mlp(index), self.graph.mlp_destination(index)
                    self._contract(g.unflatten(0, (-1, n)).sum(0)[:, None], sources, slice(column, column + 1), scores)

                return _branch(x, on_gradient)

            hooks.before(module, on_mlp)

        def on_logits(x: Tensor) -> Tensor:
            def on_gradient(g: Tensor) -> None:
                g = g[:, self.skip :].to(self.wide).unflatten(0, (-1, n)).sum(0)[:, None]
                last = self.graph.n_destinations - 1
                self._contract(g, self.graph.n_sources, slice(last, last + 1), scores)

            return _branch(x, on_gradient)

        at_end(lm, hooks, on_logits)

    def _on_projection(
        self, projection: Projection, index: int, now: _Layer, scores: Tensor, n: int, y: Tensor
    ) -> Tensor | None:
        """Wait for the gradient of a projection's output; give keys and values to each query head where asked."""
        parts, new = by_query_head(projection, y, self.repeats), None
        if self.repeats > 1 and projection.parts != ("q",):
            y = new = joined(projection, parts, y, self.repeats)
        for part in projection.parts:
            now.read[part] = parts[part].detach()[:, self.skip :]

        def on_gradient(g: Tensor) -> None:
            part = projection.parts[0]
            split = {part: g.unflatten(-1, parts[part].shape[-2:])} if new is not None else projection.split(g)
            now.grads.update({part: split[part][:, self.skip :].to(self.wide) for part in projection.parts})
            if len(now.grads) == len(PARTS):
                self._attention(index, now, scores, n)

        y.register_hook(on_gradient)
        return new

    def _attention(self, index: int, now: _Layer, scores: Tensor, n: int) -> None:
        """Gradients at the inputs of a layer's queries, keys and values, and their contraction."""
        read: Reader = self.readers[index]
        m, t, d = len(self.at), next(iter(now.grads.values())).shape[1], self.lm.d_model
        scale = None if now.scale is None else now.scale.view(m, n, t, 1, 1)
        pulled, along = [], []
        for part in PARTS:
            g = now.grads.pop(part).unflatten(0, (m, n))  # [m, n, t, K, h]
            if scale is not None:
                g = g / scale
                if self.rules == "gradient":
                    value = now.read.pop(part).unflatten(0, (m, n)).to(self.wide) - read.constants[part]
                    along.append((g * value).sum(-1) / d)
            summed = g.sum(0).permute(2, 0, 1, 3).flatten(1, 2)  # [K, n · t, h]
            pulled.append(torch.bmm(summed, read.weights[part].transpose(1, 2)))
        both = torch.cat(pulled) if read.norm is None else read.norm.center(torch.cat(pulled))
        both = both.view(-1, n, t, d).transpose(0, 1)  # [n, g, t, d]
        if along:
            assert now.normalized is not None
            weight = torch.cat(along, -1).permute(1, 2, 3, 0)  # [n, t, g, m]
            direction = now.normalized.view(m, n, t, d).permute(1, 2, 0, 3)
            both = both - (weight @ direction).transpose(1, 2)
        now.normalized = now.normalized if self.lm.family.parallel else None
        now.read.clear()
        self._contract(both, self.graph.before_attention(index), self.graph.attention_destinations(index), scores)

    def _contract(self, g: Tensor, sources: int, columns: slice, scores: Tensor) -> None:
        """Changes of the first so many sources times gradients g [n, destinations, t, d], into the scores."""
        delta = self.delta[:, :sources]
        if self.columns is None:
            product = torch.bmm(delta.flatten(2), g.reshape(len(g), g.shape[1], -1).transpose(1, 2))
            scores[:, :sources, columns] = product.cpu()
            return
        product = torch.einsum("nftd,ngtd->ntfg", delta, g).float().cpu()
        for row, where in enumerate(self.columns):
            into = scores[row, :, :sources, columns]
            scores[row, :, :sources, columns] = into.index_add(0, where, product[row])


def _branch(x: Tensor, on_gradient: Callable[[Tensor], None]) -> Tensor:
    """The same tensor as a step of its own in the graph, whose gradient is that of this reader alone."""
    y = x.view_as(x)
    y.register_hook(on_gradient)
    return y


def _stacked(parts: Sequence[Tokens]) -> Tokens:
    if len(parts) == 1:
        return parts[0]
    strings = tuple(row for part in parts for row in part.spelled)
    return Tokens(torch.cat([part.ids for part in parts]), torch.cat([part.mask for part in parts]), strings)


def _repeated(targets: Targets, times: int) -> Targets:
    return targets[torch.arange(len(targets.answer)).repeat(times)]
