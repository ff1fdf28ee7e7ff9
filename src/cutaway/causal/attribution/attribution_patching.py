"""Attribution patching: what patching every node would do, from two forwards and one backward.

The score of a node is (a_source − a_base) · ∂m/∂a, the change of the metric m to first order when the node's value in
the base run is replaced by that of the source run (Nanda 2023; Syed et al. 2023; AtP of Kramár et al. 2024). Noising
patches the clean run from the corrupt one, denoising the corrupt run from the clean one; the gradient is taken in the
run that is patched. What is not linear on the way bends the estimate, so there are

    "atp"         the gradient at the base run
    "atp*"        with the softmax of queries and keys followed exactly, and GradDrop (`atp_star.py`)
    "relp"        the same passes with the rules of layer-wise relevance propagation (`relp.py`)
    "ig"          the gradient averaged over the line from a node's base to its source value
    "ig-inputs"   the gradient averaged over the line between the two prompts' embeddings

and every result is compared with exact patching of a random sample of its nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.progress import shown
from cutaway.causal.attribution.atp_star import atp_star
from cutaway.causal.attribution.questions import (
    Found,
    Positions,
    Question,
    ask,
    check_exactly,
    result_of,
    slope,
)
from cutaway.causal.attribution.relp import Attention, relp_rules
from cutaway.causal.attribution.scores import NodeScores
from cutaway.causal.metrics import Metric, PatchDirection, Targets, logit_difference
from cutaway.causal.parts import frozen, tiled
from cutaway.data.pairs import AlignedPairs, PromptPair, aligned
from cutaway.model.edits import edits
from cutaway.model.forward.run import Run
from cutaway.model.language_model import LanguageModel

Method = Literal["atp", "atp*", "relp", "ig", "ig-inputs"]
METHODS: tuple[Method, ...] = ("atp", "atp*", "relp", "ig", "ig-inputs")
NODES = ("blocks.*.attn.z", "blocks.*.mlp.out")


@dataclass(frozen=True)
class GradientOptions:
    """How a method of attribution patching takes its gradient; each option is of one method, the last two of all."""

    steps: int = 10
    """Of "ig" and "ig-inputs": points on the way (midpoint rule)."""
    path: Literal["site", "node"] = "site"
    """Of "ig": "site" moves all nodes of a site along together, its steps in one batch (Marks et al. 2024); "node"
    moves each alone: then scores tend to exact patching as steps grow, at more than its cost."""
    attention: Attention = "gradient"
    """Of "relp": the attention pattern is differentiated as it is ("gradient") or held ("detach"); see `relp_rules`."""
    grad_drop: bool = True
    """Of "atp*": whether the backward is repeated without each layer, which finds effects that cancel."""
    batch_rows: int = 64
    """At most so many rows in one backward."""
    seed: int = 0
    """Of the draw of nodes that are patched exactly."""


def attribution_patching(
    lm: LanguageModel,
    pairs: Sequence[PromptPair] | AlignedPairs,
    sites: str | Sequence[str] = NODES,
    *,
    method: Method = "atp",
    direction: PatchDirection = "noise",
    metric: str | Metric = logit_difference,
    positions: Positions = "all",
    check: int = 40,
    options: GradientOptions = GradientOptions(),
) -> NodeScores:
    """Score every node of `sites` for every pair.

    Args:
        lm: The model.
        pairs: n prompt pairs; those that do not align are refused.
        sites: Where nodes are, wildcards allowed. Sites with heads give a node per head (key-value heads at attn.k and
            attn.v), `mlp.post` and `mlp.pre` one per neuron, all others one.
        method: "atp" (the gradient at the base run), "atp*", "relp", "ig" or "ig-inputs".
        direction: "noise" patches the clean run from the corrupt one, "denoise" the corrupt run from the clean one.
        metric: What is asked of the logits; it must have a gradient.
        positions: "all" patches a node at every token at once, "each" makes it a node at each token position (of pairs
            of one length), and roles (`["city", "last"]`) one at each of these.
        check: Nodes that are drawn and patched exactly, to compare with; 0: none.
        options: How the gradient is taken.

    Returns:
        Scores in units of the metric, [columns, units, n] by site, and their agreement with exact patching.

    Raises:
        CutawayError: Sites without nodes (patterns, scales), positions that do not line up, a metric without a
            gradient, or whose gradient is zero where it is taken; RelP and AtP* where a model has what they do not
            define.

    Source: Nanda 2023; Syed et al. 2023, https://arxiv.org/abs/2310.10348; Kramár et al. 2024,
    https://arxiv.org/abs/2403.00745.

    Example:
        >>> lm = cutaway.load("atlas")
        >>> pairs = cutaway.data.readable_pairs(lm, cutaway.data.known_task("world indirect object"), 2)
        >>> scores = attribution_patching(lm, pairs, "blocks.*.attn.z", method="relp", check=0)
        >>> scores.scores.shape  # heads, pairs
        torch.Size([64, 2])
    """
    steps, path, attention, batch_rows = options.steps, options.path, options.attention, options.batch_rows
    if method not in METHODS:
        raise CutawayError(f"there is no method {method!r}; there are {', '.join(METHODS)}")
    if path not in ("site", "node"):
        raise CutawayError(f"path={path!r} is not 'site' or 'node'")
    for name, number, minimum in (("steps", steps, 1), ("check", check, 0), ("batch_rows", batch_rows, 1)):
        if type(number) is not int or number < minimum:
            raise CutawayError(f"{name} is {number!r}; give a whole number, {minimum} or more")
    ready = aligned(lm, pairs)
    question = ask(lm, ready, sites, direction, metric, positions)
    label: str = method
    with frozen(lm):
        if method == "atp*":
            found = atp_star(question, grad_drop=options.grad_drop, batch_rows=batch_rows)
            label += "" if options.grad_drop else " without GradDrop"
        elif method == "ig" and path == "node":
            found = _node_by_node(question, steps, batch_rows)
            label += f" by node ({steps} steps)"
        else:
            found = Found()
            for at in slopes(question, method, found, options):
                scores = at.part.contract(at.site, at.base, at.source, at.grad)
                found.add(at.part, at.site, scores, at.base, at.source)
            label += f" ({steps} steps)" if method in ("ig", "ig-inputs") else ""
            label += " (pattern held)" if method == "relp" and attention == "detach" else ""
    scores = result_of(question, label, found)
    if not check:
        return scores
    return replace(scores, agreement=check_exactly(question, scores, found, check, seed=options.seed))


@dataclass(frozen=True, eq=False)
class At:
    """One site in one part of a question: its values in both runs and the metric's gradient there [b, p, ...]."""

    part: Question
    site: str
    base: Tensor
    source: Tensor
    grad: Tensor


def slopes(
    question: Question,
    method: Method,
    found: Found,
    options: GradientOptions,
) -> Iterator[At]:
    """The gradient that a method ("atp", "relp", "ig" by site, "ig-inputs") takes at every site of a question.

    The metric of both runs, and how steep it is, go to `found`.
    """
    if method == "ig":
        yield from _along_activations(question, options.steps, options.batch_rows, found)
    elif method == "ig-inputs":
        yield from _along_inputs(question, options.steps, options.batch_rows, found)
    else:
        yield from _at_the_base(question, method == "relp", options.attention, options.batch_rows, found)


def _at_the_base(question: Question, relp: bool, attention: Attention, batch_rows: int, found: Found) -> Iterator[At]:
    """AtP and RelP: the source's forward, and the base's forward and backward."""
    lm, names = question.lm, question.sites
    for part in question.parts(batch_rows):
        given = lm.run(part.source, capture=names, logits="last")
        other = given.last_logits
        kept: list[Targets] = []

        def judge(logits: Tensor, part: Question = part, other: Tensor = other, kept: list[Targets] = kept) -> Tensor:
            kept.append(part.targets(logits[:, 0].detach(), other))
            each = part.metric(logits[:, 0].float(), kept[0])
            found.steepest = max(found.steepest, slope(each, logits))
            return each

        with relp_rules(lm, attention=attention) if relp else nullcontext():
            run = lm.run(part.base, capture=names, logits="last", grad=judge)
        found.ends(part, kept[0], run.last_logits, other)
        for site in names:
            yield At(part, site, run[site], given[site], run.grads[site])


def _both(part: Question, names: Sequence[str], found: Found) -> tuple[Run, Run, Targets]:
    """Both ends of a path, and what the metric compares with."""
    base, given = (part.lm.run(tokens, capture=list(names), logits="last") for tokens in (part.base, part.source))
    targets = part.targets(base.last_logits, given.last_logits)
    found.ends(part, targets, base.last_logits, given.last_logits)
    return base, given, targets


def _midpoints(steps: int, like: Tensor) -> Tensor:
    """Points on the way [steps, 1, 1, ...], broadcastable to [steps, *like.shape]."""
    points = (torch.arange(steps, device=like.device) + 0.5) / steps
    return points.view(-1, *[1] * like.ndim)


def _gradients(
    part: Question, site: str, values: Tensor, names: Sequence[str], targets: Targets, found: Found, resume: Run | None
) -> Run:
    """The metric's gradients where a site [times, b, p, ...] takes each of these values."""
    times, b = values.shape[:2]
    here = targets[torch.arange(b, device=targets.answer.device).repeat(times)]

    def judge(logits: Tensor) -> Tensor:
        each = part.metric(logits[:, 0].float(), here)
        found.steepest = max(found.steepest, slope(each, logits))
        return each

    edit = edits.set(site, values.flatten(0, 1))
    tokens = tiled(part.base, times)
    return part.lm.run(tokens, capture=list(names), edits=[edit], logits="last", grad=judge, resume=resume)


def _along_inputs(question: Question, steps: int, batch_rows: int, found: Found) -> Iterator[At]:
    """Gradients at every node, averaged while the embedding moves from the base's to the source's."""
    names = question.sites
    for part in question.parts(batch_rows // steps):
        base, given, targets = _both(part, list(dict.fromkeys(["embed", *names])), found)
        start, end = base["embed"], given["embed"]
        values = start + _midpoints(steps, start).to(start.dtype) * (end - start)
        run = _gradients(part, "embed", values, names, targets, found, None)
        for site in names:
            yield At(part, site, base[site], given[site], run.grads[site].float().unflatten(0, (steps, -1)).mean(0))


def _along_activations(question: Question, steps: int, batch_rows: int, found: Found) -> Iterator[At]:
    """Gradients at each site, averaged while it moves from its base to its source value."""
    names = question.sites
    streams = [f"blocks.{layer}.resid_pre" for layer in range(question.lm.n_layers)]
    parts = list(question.parts(batch_rows // steps))
    with shown("integrated gradients", len(parts), "parts") as advance:
        for part in parts:
            base, given, targets = _both(part, names, found)
            # layers below the site are not run again
            stream = question.lm.run(tiled(part.base, steps), capture=streams, logits=None)
            for site in names:
                start = base[site]
                move = part.change(site, start, given[site]).to(start.dtype)
                values = start + _midpoints(steps, start).to(start.dtype) * move
                run = _gradients(part, site, values, [site], targets, found, stream)
                yield At(part, site, start, given[site], run.grads[site].float().unflatten(0, (steps, -1)).mean(0))
            advance()


def _node_by_node(question: Question, steps: int, batch_rows: int) -> Found:
    """Integrated gradients where each node moves alone."""
    names, found = question.sites, Found()
    rows = max(1, batch_rows // steps)
    parts = list(question.parts(rows))
    with shown("integrated gradients", len(parts), "parts") as advance:
        for part in parts:
            base, given, targets = _both(part, names, found)
            for site in names:
                start, end = base[site], given[site]
                scores = _one_by_one(part, site, start, end, steps, targets, found, max(1, rows // len(part)))
                found.add(part, site, scores, start, end)
            advance()
    return found


def _one_by_one(
    part: Question,
    site: str,
    start: Tensor,
    end: Tensor,
    steps: int,
    targets: Targets,
    found: Found,
    at_once: int,
) -> Tensor:
    """Scores [columns, units, b] of a site's nodes, each moved alone; `at_once` of them in one batch."""
    move = part.change(site, start, end).to(start.dtype)
    shape = part.contract(site, start, end, torch.zeros_like(start)).shape
    scores = torch.zeros(shape)
    nodes = [(column, unit) for column in range(shape[0]) for unit in range(shape[1])]
    for first in range(0, len(nodes), at_once):
        some = nodes[first : first + at_once]
        moves = torch.stack([_alone(part, site, move, column, unit) for column, unit in some])
        points = _midpoints(steps, move)[:, None].to(start.dtype)
        values = (start + points * moves).flatten(0, 1)  # steps, nodes
        run = _gradients(part, site, values, [site], targets, found, None)
        grads = run.grads[site].float().unflatten(0, (steps, len(some), -1)).mean(0)
        for grad, (column, unit) in zip(grads, some, strict=True):
            scores[column, unit] = part.contract(site, start, end, grad)[column, unit].cpu()
    return scores


def _alone(part: Question, site: str, move: Tensor, column: int, unit: int) -> Tensor:
    """The move [b, p, ...] of one node of a site: of one unit at one column."""
    alone = torch.zeros_like(move)
    kind = part.units[site]
    index = (slice(None), slice(None)) if part.into is None else part.cells_of(column, move.device)
    if kind == "site":
        alone[index] = move[index]
    elif kind == "head":
        alone[(*index, unit)] = move[(*index, unit)]
    else:
        alone[(*index, ..., unit)] = move[(*index, ..., unit)]
    return alone
