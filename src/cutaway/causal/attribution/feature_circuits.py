"""Sparse feature circuits (Marks et al. 2024): latents and errors that carry an answer, and what each gives the next.

Nodes are those of `latent_scores.py` whose mean |score| passes a threshold. The edge u -> v is how much of v's score u
is behind, along paths that meet no other dictionary:

    E(u, v) = (u(source) − u(base)) · ∂v/∂u · ∂m/∂v,

with the value of every other dictionary's site held as it is: latents and error of a site are all of its value, so
nothing passes a held site. The same with m itself in place of v gives what u does on no way through a later dictionary.
Over all nodes v of later sites, and m, the edges of u add up to its AtP score.

`circuit_faithfulness` runs a circuit: every latent outside it is set to its mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.progress import shown
from cutaway.artifacts.results import Choices, Interval, interval_text
from cutaway.causal.attribution.latents import Features, LatentMethod, features_of, latent_attribution
from cutaway.causal.attribution.questions import Positions, Question, ask
from cutaway.causal.attribution.relp import Attention
from cutaway.causal.attribution.scores import Agreement, Direction, Node, NodeScores
from cutaway.causal.metrics import Metric, Targets, logit_difference
from cutaway.causal.parts import frozen
from cutaway.data.pairs import AlignedPairs, PromptPair, align
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.model.edits import edits
from cutaway.model.edits.resolve import resolve
from cutaway.model.forward.execution import Execution
from cutaway.model.language_model import LanguageModel

METRIC = -1  # where an edge ends that goes to the metric itself


@dataclass(frozen=True)
class FeatureNode:
    """A latent or an error: its mean score over the pairs, the 95 % interval of that, and what is known of it.

    `q` is the rate of false discoveries among all nodes with a score as sure (`NodeScores.q`).
    """

    node: Node
    score: float
    interval: Interval
    label: str | None = None
    q: float = float("nan")


@dataclass(frozen=True)
class FeatureEdge:
    """From one node to another by their numbers in `FeatureCircuit.nodes`, or to the metric (`METRIC`)."""

    upstream: int
    downstream: int
    weight: float


@dataclass(frozen=True, eq=False)
class FeatureCircuit:
    """Nodes and edges above their thresholds, strongest first, and all the scores that they are taken from."""

    nodes: tuple[FeatureNode, ...]
    edges: tuple[FeatureEdge, ...]
    scores: NodeScores = field(repr=False)
    node_threshold: float
    edge_threshold: float
    left_out: int

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

    def __str__(self) -> str:
        s = self.scores
        lines = [
            f"feature circuit of {s.model}, {s.method}, {s.direction}, {s.metric.replace('_', ' ')}, n {s.n}: "
            f"{len(self.nodes)} nodes above {self.node_threshold:g}"
            + (f", {len(self.edges)} edges above {self.edge_threshold:g}" if self.edges else "")
            + (f" ({self.left_out} weaker nodes left out)" if self.left_out else "")
        ]
        lines.append(f"  {self.agreement or 'not compared with exact patching (check=0)'}")
        for one in self.nodes[:12]:
            said = f"  “{one.label}”" if one.label else ""
            q = "–" if one.q != one.q else f"{one.q:.2g}"
            lines.append(f"  {one.score:+8.3f}  {interval_text(one.interval, signed=True)}  q {q}  {one.node}{said}")
        if len(self.nodes) > 12:
            lines.append(f"  … and {len(self.nodes) - 12} more nodes")
        for edge in self.edges[:8]:
            end = "the metric" if edge.downstream == METRIC else str(self.nodes[edge.downstream].node)
            lines.append(f"  {edge.weight:+8.3f}  {self.nodes[edge.upstream].node} → {end}")
        return "\n".join(lines)


def feature_circuit(
    lm: LanguageModel,
    pairs: Sequence[PromptPair] | AlignedPairs,
    dictionaries: Dictionary | Sequence[Dictionary],
    *,
    method: LatentMethod = "ig",
    direction: Direction = "noise",
    metric: str | Metric = logit_difference,
    positions: Positions = "all",
    steps: int = 10,
    attention: Attention = "gradient",
    node_threshold: float = 0.1,
    edge_threshold: float = 0.01,
    most_nodes: int = 100,
    labels: Mapping[tuple[str, int], str] | None = None,
    check: int = 40,
    batch_rows: int = 64,
    seed: int = 0,
) -> FeatureCircuit:
    """Score all latents and errors, keep those with a mean |score| above `node_threshold` (in units of the metric; at
    most the `most_nodes` strongest), and score the edges between them.

    `labels` maps (site, latent) to words. Edges are at the base run, with gradients as they are, whatever method scored
    the nodes. One backward a kept node. Raises CutawayError as `latent_attribution`, and where no node passes.
    """
    aligned = align(lm, pairs)
    scores = latent_attribution(
        lm, aligned, dictionaries, method=method, direction=direction, metric=metric, positions=positions, steps=steps,
        attention=attention, check=check, batch_rows=batch_rows, seed=seed,
    )  # fmt: skip
    bare = strongest_nodes(scores, node_threshold, most_nodes, labels)
    chosen = [one.node for one in bare.nodes]
    features = features_of(lm, dictionaries)
    question = ask(lm, aligned, list(features), direction, metric, positions)
    question = replace(question, units=dict.fromkeys(features, "latent"))
    weights = edge_scores(question, features, chosen, batch_rows=batch_rows).mean(-1)
    found = [
        FeatureEdge(u, v if v < len(chosen) else METRIC, float(weights[u, v]))
        for u, v in (weights.abs() > edge_threshold).nonzero().tolist()
    ]
    edges = tuple(sorted(found, key=lambda edge: -abs(edge.weight)))
    return replace(bare, edges=edges, edge_threshold=edge_threshold)


def strongest_nodes(
    scores: NodeScores,
    threshold: float = 0.0,
    most: int | None = None,
    labels: Mapping[tuple[str, int], str] | None = None,
) -> FeatureCircuit:
    """The nodes with a mean |score| above a threshold, at most so many, as a circuit without edges.

    Raises CutawayError where no node passes.
    """
    mean = scores.mean
    strong = [i for i in mean.abs().argsort(descending=True).tolist() if float(mean[i].abs()) > threshold]
    if not strong:
        raise CutawayError(
            f"no node has a mean score above {threshold:g}; the largest is {float(mean.abs().max()):.3g}"
        )
    chosen = strong[:most]
    nodes = [scores.nodes[i] for i in chosen]
    named = labels or {}
    return FeatureCircuit(
        nodes=tuple(
            FeatureNode(
                node,
                float(mean[i]),
                (low, high),
                None if node.latent is None else named.get((node.site, node.latent)),
                float(scores.q[i]),
            )
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
    execution = Execution(
        lm, capture, resolved, tokens.mask, stop=read is not None, gradients=True, last_only=read is None
    )
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
