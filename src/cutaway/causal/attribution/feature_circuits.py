"""Sparse feature circuits (Marks et al. 2024): latents and errors that carry an answer, and what each gives the next.

Nodes are those of `latents.py` whose mean |score| passes a threshold. The edge u -> v is how much of v's score u
is behind, along paths that meet no other dictionary:

    E(u, v) = (u(source) − u(base)) · ∂v/∂u · ∂m/∂v,

with the value of every other dictionary's site held as it is: latents and error of a site are all of its value, so
nothing passes a held site. The same with m itself in place of v gives what u does on no way through a later dictionary.
Over all nodes v of later sites, and m, the edges of u add up to its AtP score.

`circuit_faithfulness` runs a circuit: every latent outside it is set to its mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.progress import shown
from cutaway.artifacts.results import Choices, Interval, interval_text
from cutaway.causal.attribution.attribution_patching import GradientOptions
from cutaway.causal.attribution.latents import Features, LatentMethod, features_of, latent_attribution
from cutaway.causal.attribution.questions import Positions, Question, ask
from cutaway.causal.attribution.scores import Agreement, Node, NodeScores
from cutaway.causal.metrics import Metric, PatchDirection, Targets, logit_difference
from cutaway.causal.parts import frozen
from cutaway.data.pairs import AlignedPairs, PromptPair, aligned
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.draw.charts import Bar
from cutaway.draw.intervals import intervals_svg
from cutaway.draw.panels import table_html
from cutaway.draw.result import Result
from cutaway.model.edits import edits
from cutaway.model.edits.resolve import resolve
from cutaway.model.forward.execution import Execution, Span
from cutaway.model.language_model import LanguageModel

METRIC = -1  # where an edge ends that goes to the metric itself


@dataclass(frozen=True)
class FeatureNode:
    """A latent or an error of a feature circuit."""

    node: Node
    """The part of the model and its place."""
    score: float
    """Mean over the pairs, in units of the metric."""
    interval: Interval
    """95 % of that, bootstrap over pairs."""
    label: str | None = None
    """The latent in words."""
    q: float = float("nan")
    """The rate of false discoveries among all nodes with a score as sure (`NodeScores.q`)."""


@dataclass(frozen=True)
class FeatureEdge:
    """How much of a node's score another node is behind, past all other dictionaries."""

    upstream: int
    """Its number in `FeatureCircuit.nodes`."""
    downstream: int
    """The other's number, or `METRIC`: what reaches the metric itself."""
    weight: float
    """Mean over the pairs, in units of the metric."""


@dataclass(frozen=True)
class Thresholds:
    """Which nodes and edges a feature circuit keeps."""

    nodes: float = 0.1
    """Nodes with a mean |score| above this, in units of the metric."""
    edges: float = 0.01
    """Edges with a mean |weight| above this, in units of the metric."""
    max_nodes: int | None = 100
    """At most so many nodes, the strongest; None: all."""


@dataclass(frozen=True, eq=False, repr=False)
class FeatureCircuit(Result):
    """Nodes and edges above their thresholds, strongest first, and all the scores that they are taken from."""

    nodes: tuple[FeatureNode, ...]
    """The latents and errors that are kept, strongest first."""
    edges: tuple[FeatureEdge, ...]
    """The edges that are kept, strongest first."""
    scores: NodeScores
    """The scores of all latents and errors."""
    node_threshold: float
    """Nodes have a mean |score| above this, in units of the metric."""
    edge_threshold: float
    """Edges have a mean |weight| above this, in units of the metric; infinite where no edges were asked for."""
    left_out: int
    """Nodes above the threshold beyond the largest number that is kept."""

    title = "Feature circuit"

    @property
    def agreement(self) -> Agreement | None:
        """How the scores agree with exact patching of a sample of nodes."""
        return self.scores.agreement

    @property
    def choices(self) -> Choices:
        return self.scores.choices

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.scores.model,
            "method": self.scores.method,
            "metric": self.scores.metric,
            "direction": self.scores.direction,
            "n": self.scores.n,
            "choices": self.choices.to_json(),
            "agreement": None if self.agreement is None else self.agreement.to_json(),
            "node_threshold": self.node_threshold,
            "edge_threshold": self.edge_threshold if self.edge_threshold != float("inf") else None,
            "left_out": self.left_out,
            "nodes": [
                {
                    "site": one.node.site,
                    "latent": one.node.latent,
                    "error": one.node.error,
                    "at": one.node.at,
                    "score": one.score,
                    "interval": [None if end != end else end for end in one.interval],
                    "q": None if one.q != one.q else one.q,
                    "label": one.label,
                }
                for one in self.nodes
            ],
            "edges": [
                {"from": e.upstream, "to": "metric" if e.downstream == METRIC else e.downstream, "weight": e.weight}
                for e in self.edges
            ],
        }

    def with_labels(self, labels: Mapping[tuple[str, int], str]) -> FeatureCircuit:
        """The same circuit with words for its latents, by (site, latent).

        Args:
            labels: Words by (site, latent); latents that are not among them get none.
        """
        named = [
            one if one.node.latent is None else replace(one, label=labels.get((one.node.site, one.node.latent)))
            for one in self.nodes
        ]
        return replace(self, nodes=tuple(named))

    def rows(self) -> list[dict[str, Any]]:
        """An edge per row, from a node to another or to the metric; a node without edges is a row of its own."""
        rows = [self._row(edge.upstream, self._end(edge), edge.weight) for edge in self.edges]
        joined = {edge.upstream for edge in self.edges} | {edge.downstream for edge in self.edges}
        return rows + [self._row(i, None, None) for i in range(len(self.nodes)) if i not in joined]

    def _row(self, number: int, to: str | None, weight: float | None) -> dict[str, Any]:
        one = self.nodes[number]
        return {
            "from": str(one.node), "label": one.label, "score": one.score, "low": one.interval[0],
            "high": one.interval[1], "q": one.q, "to": to, "weight": weight,
        }  # fmt: skip

    def _end(self, edge: FeatureEdge) -> str:
        return "the metric" if edge.downstream == METRIC else str(self.nodes[edge.downstream].node)

    def drawing(self) -> Markup:
        """The strongest nodes with their 95 % intervals, and the strongest edges as a table."""
        bars: list[Bar] = [
            {
                "label": f"{one.node}{f' “{one.label}”' if one.label else ''}", "value": one.score,
                "low": one.interval[0], "high": one.interval[1],
            }
            for one in self.nodes[:24]
        ]  # fmt: skip
        units = self.scores.metric.replace("_", " ")
        drawn = intervals_svg(groups=[bars], title=f"{self.title} of {self.scores.model}", units=units)
        cells = [[str(self.nodes[e.upstream].node), self._end(e), e.weight] for e in self.edges[:40]]
        return drawn + table_html(columns=["from", "to", "weight"], rows=cells, title="Edges")

    def summary(self) -> str:
        s = self.scores
        lines = [
            f"feature circuit of {s.model}, {s.method}, {s.direction}, {s.metric.replace('_', ' ')}, n {s.n}: "
            f"{len(self.nodes)} nodes above {self.node_threshold:g}"
            + (f", {len(self.edges)} edges above {self.edge_threshold:g}" if self.edges else "")
            + (f" ({self.left_out} weaker nodes left out)" if self.left_out else "")
        ]
        lines.append(f"  {self.agreement or 'not compared with exact patching (check=0)'}")
        for one in self.nodes[:6]:
            said = f"  “{one.label}”" if one.label else ""
            q = "–" if one.q != one.q else f"{one.q:.2g}"
            lines.append(f"  {one.score:+8.3f}  {interval_text(one.interval, signed=True)}  q {q}  {one.node}{said}")
        if len(self.nodes) > 6:
            lines.append(f"  … and {len(self.nodes) - 6} more nodes")
        for edge in self.edges[:3]:
            lines.append(f"  {edge.weight:+8.3f}  {self.nodes[edge.upstream].node} → {self._end(edge)}")
        return "\n".join(lines)


def feature_circuit(
    lm: LanguageModel,
    pairs: Sequence[PromptPair] | AlignedPairs,
    dictionaries: Dictionary | Sequence[Dictionary],
    *,
    method: LatentMethod = "ig",
    direction: PatchDirection = "noise",
    metric: str | Metric = logit_difference,
    positions: Positions = "all",
    thresholds: Thresholds = Thresholds(),
    check: int = 40,
    options: GradientOptions = GradientOptions(),  # noqa: B008, frozen
) -> FeatureCircuit:
    """Score all latents and errors, keep the strong ones, and score the edges between them.

    Edges are at the base run, with gradients as they are, whatever method scored the nodes. One backward per kept node.
    `FeatureCircuit.with_labels` gives latents their words.

    Args:
        lm: The model.
        pairs: n prompt pairs.
        dictionaries: Autoencoders of sites that hold the model's width, one per site.
        method: How nodes are scored; see `latent_attribution`.
        direction: "noise" patches the clean run from the corrupt one, "denoise" the corrupt run from the clean one.
        metric: What is asked of the logits; it must have a gradient.
        positions: "all" tokens at once, "each" position, or roles.
        thresholds: Which nodes and edges are kept.
        check: Nodes that are drawn and patched exactly, to compare with; 0: none.
        options: How the gradient is taken.

    Raises:
        CutawayError: As `latent_attribution`, and where no node passes its threshold.

    Source: Marks et al. 2024; https://arxiv.org/abs/2403.19647.
    """
    ready = aligned(lm, pairs)
    scores = latent_attribution(
        lm, ready, dictionaries, method=method, direction=direction, metric=metric, positions=positions, check=check,
        options=options,
    )  # fmt: skip
    bare = strongest_nodes(scores, thresholds.nodes, thresholds.max_nodes)
    chosen = [one.node for one in bare.nodes]
    features = features_of(lm, dictionaries)
    question = ask(lm, ready, list(features), direction, metric, positions)
    question = replace(question, units=dict.fromkeys(features, "latent"))
    weights = edge_scores(question, features, chosen, batch_rows=options.batch_rows).mean(-1)
    found = [
        FeatureEdge(u, v if v < len(chosen) else METRIC, float(weights[u, v]))
        for u, v in (weights.abs() > thresholds.edges).nonzero().tolist()
    ]
    edges = tuple(sorted(found, key=lambda edge: -abs(edge.weight)))
    return replace(bare, edges=edges, edge_threshold=thresholds.edges)


def strongest_nodes(scores: NodeScores, threshold: float = 0.0, max_nodes: int | None = None) -> FeatureCircuit:
    """The nodes with a mean |score| above a threshold as a circuit without edges.

    Args:
        scores: From `latent_attribution`.
        threshold: In units of the metric.
        max_nodes: At most so many, the strongest; None: all.

    Raises:
        CutawayError: No node passes.
    """
    mean = scores.mean
    strong = [i for i in mean.abs().argsort(descending=True).tolist() if float(mean[i].abs()) > threshold]
    if not strong:
        raise CutawayError(
            f"no node has a mean score above {threshold:g}; the largest is {float(mean.abs().max()):.3g}"
        )
    chosen = strong[:max_nodes]
    nodes = [scores.nodes[i] for i in chosen]
    return FeatureCircuit(
        nodes=tuple(
            FeatureNode(node, float(mean[i]), (low, high), q=float(scores.q[i]))
            for node, i, (low, high) in zip(nodes, chosen, scores.interval(nodes).tolist(), strict=True)
        ),
        edges=(),
        scores=scores,
        node_threshold=threshold,
        edge_threshold=float("inf"),
        left_out=len(strong) - len(chosen),
    )


# Edges


def edge_scores(
    question: Question, features: Mapping[str, Features], nodes: Sequence[Node], *, batch_rows: int = 64
) -> Tensor:
    """E [nodes, nodes + 1, n] from each node (row) to each node of a later site, and behind them to the metric."""
    by_site = {site: [i for i, node in enumerate(nodes) if node.site == site] for site in features}
    out = torch.zeros(len(nodes), len(nodes) + 1, len(question))
    done = 0
    parts = list(question.parts(batch_rows))
    with frozen(question.lm), shown("edges", len(parts) * (len(nodes) + 1), "nodes", least=100) as advance:
        for part in parts:
            rows = slice(done, done + len(part))
            done += len(part)
            sites = list(features)
            base, given = (part.lm.run(t, capture=sites, logits="last") for t in (part.base, part.source))
            targets = part.targets(base.last_logits, given.last_logits)
            whole = part.lm.run(part.base, capture=sites, logits="last", grad=_judge(part, targets))
            changes = _Changes(part, features, nodes, base, given)
            held = {site: base[site] for site in sites}
            for site in sites:
                before = [s for s in sites[: sites.index(site)] if by_site[s]]
                ends = by_site[site]
                if before and ends:
                    starts, value = _direct(part, {s: held[s] for s in sites[: sites.index(site)]}, site)
                    with torch.enable_grad():
                        activations, error = features[site].split(value)
                        slopes = whole.grads[site].to(error.dtype)
                        for v in ends:
                            score = _end(part, features[site], nodes[v], activations, error, slopes)
                            grads = torch.autograd.grad(
                                score, [starts[s] for s in before], allow_unused=True, retain_graph=v != ends[-1]
                            )
                            for s, grad in zip(before, grads, strict=True):
                                if grad is not None:
                                    for u in by_site[s]:
                                        out[u, v, rows] = changes.along(u, grad).float().cpu()
                for _ in ends:
                    advance()
            starts, logits = _direct(part, held, None)
            with torch.enable_grad():
                each = part.metric(logits[:, 0].float(), targets)
                grads = torch.autograd.grad(each.sum(), list(starts.values()), allow_unused=True)
            for s, grad in zip(starts, grads, strict=True):
                if grad is not None:
                    for u in by_site[s]:
                        out[u, -1, rows] = changes.along(u, grad).float().cpu()
            advance()
    return out


def _judge(part: Question, targets: Targets) -> Callable[[Tensor], Tensor]:
    return lambda logits: part.metric(logits[:, 0].float(), targets)


class _Changes:
    """What a patch of each node adds to its site, at the tokens where it stands."""

    def __init__(self, part: Question, features: Mapping[str, Features], nodes: Sequence[Node], base: Any, given: Any):
        self.moves: list[Tensor] = []
        for node in nodes:
            own, x0, x1 = features[node.site], base[node.site], given[node.site]
            unit = own.dictionary.d_sae if node.latent is None else node.latent
            if part.into is None:
                mask = part.base.mask.to(x0.device)[..., None]
                move = own.changes(x0, x1, unit) * mask
            else:
                into, taken, rows = part.cells()
                c = part.columns.index(node.at)
                move = torch.zeros_like(x0, dtype=own.directions.dtype)
                move[rows, into[c]] = own.changes(x0[rows, into[c]], x1[rows, taken[c]], unit)
            self.moves.append(move)

    def along(self, node: int, grad: Tensor) -> Tensor:
        """Σ move · grad of each row [b]."""
        return (self.moves[node] * grad.view(self.moves[node].shape).to(self.moves[node].dtype)).flatten(1).sum(1)


def _end(part: Question, own: Features, node: Node, activations: Tensor, error: Tensor, slopes: Tensor) -> Tensor:
    """A node's value times the metric's slope in it, summed over its tokens and rows; only the value has a gradient."""
    if node.latent is None:
        value = (error * slopes).sum(-1)
    else:
        value = activations[..., node.latent] * (slopes @ own.directions[node.latent])
    if part.into is None:
        return (value * part.base.mask.to(value.device)).sum()
    into, _, rows = part.cells()
    return value[rows, into[part.columns.index(node.at)]].sum()


def _direct(part: Question, held: Mapping[str, Tensor], read: str | None) -> tuple[dict[str, Tensor], Tensor]:
    """A forward in which the value of each held site [b, p, d] starts anew: those values, and the one at `read` (or the
    logits, None), which depends on each of them only past the others.
    """
    lm, tokens = part.lm, part.base
    resolved = [
        resolve(i, edits.set(name, value), lm.sites()[name], tokens) for i, (name, value) in enumerate(held.items())
    ]
    capture = [*held] if read is None else [*held, read]
    span = Span(stop=read is not None, last_only=read is None)
    execution = Execution(lm, capture, resolved, tokens.mask, span=span, gradients=True)
    with torch.enable_grad():
        out = execution.forward(
            lambda: lm.hf(
                input_ids=tokens.ids,
                attention_mask=tokens.mask.long(),
                position_ids=tokens.position_ids,
                use_cache=False,
            )
        )
        starts = {name: execution.values[name] for name in held}
        return starts, out.logits if read is None else execution.by_row(execution.values[read])
