"""AtP* (Kramár et al. 2024): attribution patching with two of its failures mended, and a bound on those that are left.

**Saturated attention.** A query or key moves the metric through a softmax, whose slope at a saturated row is no guide.
The QK fix follows the softmax exactly and only what comes after it to first order: with A the pattern,

    I(n) = Σ_qk (A(n patched) − A)_qk · ∂m/∂A_qk.

Patching a query changes its own row; every row is one more softmax, and one more forward gives all of them. Patching
the key of one position c changes a single logit in each row that sees c, by d. With A_c the weight of c before,

    A'_c = A_c e^d / (1 − A_c + A_c e^d),      I = Σ_q (A'_c − A_c)(g_c − ḡ),      ḡ = Σ_{j≠c} A_j g_j / (1 − A_c),

g = ∂m/∂A in that row: no row is computed again. Queries and the other keys are those of the base run. One key-value
head moves the rows of every query head of its group. The logits themselves come from the model's own forward, with the
source's keys put in and what attention writes put back, so a softcap, position biases, sinks and masks are in them.

**Cancellation.** Effects of both signs through later layers may cancel. GradDrop repeats the backward for each layer
with the gradient through what that layer writes set to zero, and takes Σ_l |I_l| / (L − 1), a size without a sign.

`missed_bound` says how large an effect nodes outside a chosen set may still have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CutawayError, Misaligned, NotSupported
from cutaway.artifacts.progress import shown
from cutaway.causal.attribution.questions import Found, Positions, Question, ask, exact_effects_of_sets, slope
from cutaway.causal.attribution.scores import Node, NodeScores
from cutaway.causal.metrics import Metric, logit_difference
from cutaway.data.pairs import AlignedPairs, PromptPair, aligned
from cutaway.draw.charts import Bar
from cutaway.draw.intervals import intervals_svg
from cutaway.draw.result import Result
from cutaway.model.edits import edits
from cutaway.model.forward.execution import Execution, Span
from cutaway.model.forward.run import Run
from cutaway.model.language_model import LanguageModel
from cutaway.model.sites import layer_of

_ROUNDING = 1e-4
_QUERIES, _KEYS = (".attn.q", ".attn.rot_q"), (".attn.k", ".attn.rot_k")


def atp_star(question: Question, *, grad_drop: bool = True, batch_rows: int = 64) -> Found:
    """Scores of every node of a question; see `attribution_patching` with method "atp*"."""
    lm = question.lm
    if grad_drop and lm.n_layers < 2:
        raise NotSupported(f"GradDrop leaves out one layer at a time, and {lm.name} has one; set grad_drop=False")
    inside = [site for site in question.sites if site.endswith((*_QUERIES, *_KEYS))]
    _refuse(question, inside)
    found = Found(magnitude=grad_drop)
    parts = list(question.parts(batch_rows))
    with shown("AtP*", len(parts), "parts") as advance:
        for part in parts:
            _part(part, inside, grad_drop, found)
            advance()
    return found


def _refuse(question: Question, inside: Sequence[str]) -> None:
    if not inside:
        return
    family = question.lm.family
    if question.into is not None and not torch.equal(question.into, question.taken):  # pyright: ignore[reportArgumentType]
        raise Misaligned(
            "a role stands at different positions of clean and corrupt, where queries and keys are turned by different "
            "angles; score attn.z instead, or use method='atp'"
        )
    for site in inside:
        layer = family.layers[layer_of(site) or 0]
        norm = layer.q_norm if site.endswith(".attn.q") else layer.k_norm if site.endswith(".attn.k") else None
        weight = getattr(norm, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 1 and weight.numel() > family.d_head:
            raise NotSupported(
                f"a norm over all heads stands behind '{site}', so that one head moves the others; score "
                f"'{site.replace('.attn.', '.attn.rot_')}'"
            )


def _part(part: Question, inside: list[str], grad_drop: bool, found: Found) -> None:
    lm, names = part.lm, part.sites
    layers = sorted({layer_of(site) or 0 for site in inside})
    patterns = [f"blocks.{layer}.attn.pattern" for layer in layers]
    writes = [f"blocks.{layer}.{part}.out" for layer in range(lm.n_layers) for part in ("attn", "mlp")]
    rotated = sorted({_rotated(site) for site in inside})
    given = lm.run(part.source, capture=list(dict.fromkeys([*names, *rotated])), logits="last")
    captured = lm.sites().expand_all([*names, *patterns, *writes])
    execution = Execution(lm, captured, (), part.base.mask, gradients=True, span=Span(last_only=True))
    with torch.enable_grad():
        out = execution.forward(
            lambda: lm.hf(
                input_ids=part.base.ids,
                attention_mask=part.base.mask.long(),
                position_ids=part.base.position_ids,
                use_cache=False,
            )
        )
        logits: Tensor = out.logits[:, 0]
        targets = part.targets(logits.detach(), given.last_logits)
        each = part.metric(logits.float(), targets)
        found.steepest = max(found.steepest, slope(each, logits))
    found.ends(part, targets, logits.detach(), given.last_logits)
    values = {name: execution.by_row(value.detach()) for name, value in execution.values.items()}
    moved = _pattern_changes(part, inside, given, values)
    dropped: list[int | None] = [None]

    def drop(layer: int | None) -> Callable[[Tensor], Tensor]:
        return lambda grad: torch.zeros_like(grad) if layer is not None and dropped[0] == layer else grad

    for name in writes:
        execution.values[name].register_hook(drop(layer_of(name)))
    total: dict[str, Tensor] = {}
    ways = list(range(lm.n_layers)) if grad_drop else [None]
    inputs = [execution.values[name] for name in [*names, *patterns]]
    for way in ways:
        dropped[0] = way
        grads = torch.autograd.grad(each.sum(), inputs, allow_unused=True, retain_graph=way != ways[-1])
        slopes = {
            name: torch.zeros_like(values[name]) if grad is None else execution.by_row(grad.detach())
            for name, grad in zip([*names, *patterns], grads, strict=True)
        }
        for site in names:
            if site in moved:
                scores = moved[site].score(part, site, slopes[f"blocks.{layer_of(site)}.attn.pattern"])
            else:
                scores = part.contract(site, values[site], given[site], slopes[site])
            if way is not None and site in (f"blocks.{way}.attn.out", f"blocks.{way}.mlp.out"):
                scores = torch.zeros_like(scores)
            total[site] = scores if way is None else total.get(site, 0) + scores.abs() / (lm.n_layers - 1)
    for site, scores in total.items():
        found.add(part, site, scores, values[site], given[site])


def _rotated(site: str) -> str:
    """Where the attention function receives what a query or key site gives."""
    return site if ".rot_" in site else site.replace(".attn.", ".attn.rot_")


@dataclass(frozen=True, eq=False)
class _Rows:
    """Changes of the pattern [b, H, q, k], in all rows and cells."""

    change: Tensor
    keys: bool  # of a patch of all keys at once, not of queries

    def score(self, part: Question, site: str, slopes: Tensor) -> Tensor:
        by_row = (self.change * slopes).sum(-1).transpose(1, 2)  # [b, q, H]
        if not self.keys:
            return part.at_columns(by_row)
        return _by_group(part, by_row).sum(1).T[None]


@dataclass(frozen=True, eq=False)
class Columns:
    """What each row [..., q, c] makes of a patch of the key c alone: its weight before and after, and the weight that
    it left to the others (a sink's share included).
    """

    before: Tensor
    after: Tensor
    rest: Tensor

    @classmethod
    def of(cls, scores: Tensor, new: Tensor, sink: Tensor) -> Columns:
        """From a row's logits [..., q, c], each column's new one, and what a sink takes of each row [..., q, 1]."""
        scores, new, sink = scores.double(), new.double(), sink.double()
        before = scores.softmax(-1) * (1 - sink)
        rest = _without_own(before) + sink
        hidden = scores == -torch.inf
        logit = scores.log_softmax(-1) + torch.log1p(-sink) - rest.log()
        after = torch.sigmoid(logit + torch.where(hidden, 0.0, new - scores))
        return cls(before, torch.where(hidden, 0.0, after), rest)

    def effects(self, slopes: Tensor) -> Tensor:
        """Σ_j (A' − A)_j g_j of each row and patched key [..., q, c], without computing any row again."""
        slopes = slopes.double()
        others = _without_own(self.before * slopes) / self.rest
        return (self.after - self.before) * (slopes - torch.where(self.rest > 0, others, 0.0))

    def score(self, part: Question, site: str, slopes: Tensor) -> Tensor:
        return part.at_columns(_by_group(part, self.effects(slopes).sum(2).transpose(1, 2)))


def _without_own(x: Tensor) -> Tensor:
    """The sum of each row's other entries, added up from both sides: 1 − A would lose what is left of a sure row."""
    before = torch.cat([torch.zeros_like(x[..., :1]), x[..., :-1].cumsum(-1)], -1)
    behind = torch.cat([x.flip(-1)[..., :-1].cumsum(-1).flip(-1), torch.zeros_like(x[..., :1])], -1)
    return before + behind


def _by_group(part: Question, values: Tensor) -> Tensor:
    """[b, p, H] -> [b, p, KV]: a key-value head moves every query head of its group."""
    return values.unflatten(-1, (part.lm.n_kv_heads, -1)).sum(-1)


def _pattern_changes(
    part: Question, inside: list[str], given: Run, values: dict[str, Tensor]
) -> dict[str, _Rows | Columns]:
    """What the pattern of each query and key site becomes when its nodes are patched."""
    if not inside:
        return {}
    lm = part.lm
    written = [f"blocks.{layer}.attn.out" for layer in range(lm.n_layers)]

    def grids(sites: list[str], kinds: Sequence[str]) -> dict[str, Tensor]:
        """Scores or patterns under the source's queries or keys, in a stream that stays the base's."""
        capture = [f"blocks.{layer_of(site)}.attn.{kind}" for site in sites for kind in kinds]
        patched = [edits.patch(site, given) for site in dict.fromkeys(map(_rotated, sites))]
        last = max(layer_of(site) or 0 for site in sites)
        restored = [edits.set(name, values[name]) for name in written[:last]]
        run = lm.run(part.base, capture=capture, edits=[*patched, *restored], logits=None)
        return {name: run[name] for name in capture}

    found: dict[str, _Rows | Columns] = {}
    queries, keys = ([s for s in inside if s.endswith(ends)] for ends in (_QUERIES, _KEYS))
    if queries:
        new = grids(queries, ["pattern"])
        for site in queries:
            name = f"blocks.{layer_of(site)}.attn.pattern"
            found[site] = _Rows(new[name].float() - values[name].float(), keys=False)
    if keys and part.into is None:
        new = grids(keys, ["pattern"])
        for site in keys:
            name = f"blocks.{layer_of(site)}.attn.pattern"
            found[site] = _Rows(new[name].float() - values[name].float(), keys=True)
    elif keys:
        new = grids(keys, ["scores"])
        plain = lm.run(part.base, capture=list(new), logits=None)
        for site in keys:
            name = f"blocks.{layer_of(site)}.attn.scores"
            taken = 1 - values[f"blocks.{layer_of(site)}.attn.pattern"].double().sum(-1, keepdim=True)
            sink = torch.where(taken > _ROUNDING, taken, 0.0)  # in most models there is none, only rounding
            found[site] = Columns.of(plain[name], new[name], sink)
    return found


# What may have been missed


@dataclass(frozen=True, repr=False)
class MissedBound(Result):
    """How large the effect of a node that was not verified may be."""

    value: float
    """No |effect| is above this, of all `nodes` nodes at once with confidence `level`."""
    estimate: float
    """The largest estimate among them."""
    node: Node
    """Whose estimate that is."""
    nodes: int
    """Nodes that were not verified."""
    verified: int
    """Nodes that were left out because their effects are known."""
    subsets: int
    """How many random halves of these nodes were patched together."""
    level: float
    """Confidence that the bound holds, from 0 to 1."""
    units: str
    """What the effects are in: a change of the metric."""

    title = "What may have been missed"

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "node": str(self.node)}

    def rows(self) -> list[dict[str, Any]]:
        return [self.to_json()]

    def drawing(self) -> Markup:
        bars: list[Bar] = [
            {"label": f"largest estimate: {self.node}", "value": self.estimate},
            {"label": f"no effect is larger ({self.level:.0%} confidence)", "value": self.value, "control": True},
        ]
        return intervals_svg(groups=[bars], title=self.title, units=self.units)

    def summary(self) -> str:
        return (
            f"no node of the {self.nodes} unverified has an effect above {self.value:.3f} ({self.units}; "
            f"{self.level:.0%} confidence, {self.subsets} random halves patched, {self.verified} nodes verified); the "
            f"largest estimate is {self.estimate:+.3f}, {self.node}"
        )


def missed_bound(
    lm: LanguageModel,
    pairs: Sequence[PromptPair] | AlignedPairs,
    scores: NodeScores,
    *,
    verified: Sequence[Node] | int = 20,
    positions: Positions = "all",
    metric: str | Metric = logit_difference,
    subsets: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> MissedBound:
    """Bound the effects of all nodes but the verified ones, by patching random halves of them exactly.

    Each subset holds every unverified node with probability ½ and is patched as a whole. The mean of the subsets with a
    node minus that of those without it estimates the node's effect, averaged over what else is patched; Welch's t gives
    its interval, here at a level at which all of them hold together (Bonferroni). That a node's effect amid others is
    its effect alone is an assumption.

    Args:
        lm: The model.
        pairs: The pairs to patch.
        scores: The nodes, and the direction of patching.
        verified: Nodes whose effects are known, or how many of the strongest are.
        positions: As the scores were asked with.
        metric: As the scores were asked with.
        subsets: Random halves, 20 or more.
        level: Confidence.
        seed: Of the halves.

    Raises:
        CutawayError: No node is left, or there are too few subsets.

    Source: the diagnostics of Kramár et al. 2024; https://arxiv.org/abs/2403.00745.
    """
    from scipy.stats import t as student

    if subsets < 20:
        raise CutawayError(f"{subsets} subsets are too few for a bound; give 20 or more")
    ready = aligned(lm, pairs)
    question = ask(lm, ready, list(scores.blocks), scores.direction, metric, positions)
    if question.columns != scores.columns or question.metric_name != scores.metric:
        raise CutawayError("these scores were asked with other positions or another metric; give the same to both")
    known = set(scores.top(verified) if isinstance(verified, int) else verified)
    left = [i for i, node in enumerate(scores.nodes) if node not in known]
    if not left:
        raise CutawayError("every node is verified, so none can have been missed")
    places = [
        (site, unit, column)
        for site, block in scores.blocks.items()
        for column in range(block.shape[0])
        for unit in range(block.shape[1])
    ]
    drawn = np.random.default_rng(seed).random((subsets, len(left))) < 0.5
    effects = exact_effects_of_sets(
        question, [_grouped([places[left[j]] for j in np.flatnonzero(row)]) for row in drawn], label="random halves"
    )
    y = effects.mean(-1).double().numpy()
    with_it, without = drawn.sum(0), (~drawn).sum(0)
    usable = (with_it > 1) & (without > 1)
    if not usable.all():
        raise CutawayError(f"{subsets} subsets are too few for {len(left)} nodes; give more")
    mean_in, mean_out = y @ drawn / with_it, y @ ~drawn / without
    var_in = ((y[:, None] - mean_in) ** 2 * drawn).sum(0) / (with_it - 1) / with_it
    var_out = ((y[:, None] - mean_out) ** 2 * ~drawn).sum(0) / (without - 1) / without
    error = np.sqrt(var_in + var_out)
    freedom = (var_in + var_out) ** 2 / np.maximum(
        var_in**2 / (with_it - 1) + var_out**2 / (without - 1), np.finfo(float).tiny
    )
    estimate = mean_in - mean_out
    width = student.ppf(1 - (1 - level) / (2 * len(left)), np.maximum(freedom, 1)) * error
    largest = int(np.abs(estimate).argmax())
    return MissedBound(
        value=float((np.abs(estimate) + width).max()),
        estimate=float(estimate[largest]),
        node=scores.nodes[left[largest]],
        nodes=len(left),
        verified=len(known),
        subsets=subsets,
        level=level,
        units=f"change of the {scores.metric.replace('_', ' ')}",
    )


def _grouped(nodes: Sequence[tuple[str, int, int]]) -> list[tuple[str, list[int], int]]:
    """Nodes as few patches: all units of one site and column together."""
    together: dict[tuple[str, int], list[int]] = {}
    for site, unit, column in nodes:
        together.setdefault((site, column), []).append(unit)
    return [(site, units, column) for (site, column), units in together.items()]
