"""Scores of all edges of a model's graph: exact, EAP, EAP-IG, RelP, and what needs no gradient.

A scorer is a function `(lm, pairs, metric) -> EdgeScores`. The score of u -> v estimates how the metric changes when v,
in the run of the clean prompt, reads u as the corrupt prompt makes it, and everything else as it is.

The gradient scorers (Syed et al. 2023; Hanna et al. 2024) contract each source's change with the gradient at each
destination's input. Nothing is split for that: an ordinary forward keeps the heads as z, and the gradient at a head's
query, key or value input is that of the projection's output, carried through the projection and the norm in closed
form. All steps of an integrated gradient are rows of one batch, and the changes are contracted once, with the sum over
steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError, Misaligned
from cutaway.artifacts.progress import shown
from cutaway.causal.circuits.edge_gradients import EdgeGradients, Rules
from cutaway.causal.circuits.edge_scores import EdgeScores
from cutaway.causal.edge_graph import EdgeGraph
from cutaway.causal.metrics import Metric, PatchDirection, named_metric
from cutaway.causal.parts import (
    frozen,
    refuse_unreadable,
)
from cutaway.data.pairs import AlignedPairs, require_aligned
from cutaway.model.language_model import LanguageModel

_NO_GRADIENT = 1e-7
_ROUNDING = 1e-4  # of the metric's fall: scores all below this are a gradient of zero, rounded
_MEMORY = 400 * 2**20  # bytes that the graph of one batch may hold, about


@dataclass(frozen=True)
class GradientAt:
    """Where the gradient of edge scores is taken, and by which rules."""

    name: str = "attribution"
    """What the method is called in its result."""
    points: tuple[float, ...] = (1.0,)
    """On the line from the corrupt (0) to the clean embeddings (1); the gradient is their mean."""
    rules: Rules = "gradient"
    """The gradient as it is, or with the rules of layer-wise relevance propagation ("relp")."""


def eap(
    lm: LanguageModel,
    pairs: AlignedPairs,
    metric: str | Metric = "logit_difference",
    *,
    graph: EdgeGraph | None = None,
    columns: Tensor | None = None,
    direction: PatchDirection = "noise",
    keep_pairs: bool = True,
    batch_tokens: int | None = None,
) -> EdgeScores:
    """Edge attribution patching: the source's change times the gradient at the clean prompt.

    Args:
        lm: The model.
        pairs: n aligned pairs.
        metric: What is asked of the logits; it must have a gradient.
        graph: Whose edges are scored; None: `EdgeGraph.of(lm)`.
        columns: Of a graph with positions: the column that each token of a pair belongs to, int [n, p]
            (`position_columns`); None: the graph has none.
        direction: "noise" puts corrupt sources into the clean run, "denoise" clean ones into the corrupt run.
        keep_pairs: Whether each pair's scores are kept, which takes n times the memory of the mean.
        batch_tokens: Tokens of one batch, pairs times points; None: as many as about 400 MB hold.

    Raises:
        CutawayError: As `attribute_edges`.

    Source: Syed et al. 2023; https://arxiv.org/abs/2310.10348.
    """
    return attribute_edges(
        lm, pairs, metric, gradient=GradientAt("eap"), graph=graph, columns=columns, direction=direction,
        keep_pairs=keep_pairs, batch_tokens=batch_tokens,
    )  # fmt: skip


def eap_ig(
    lm: LanguageModel,
    pairs: AlignedPairs,
    metric: str | Metric = "logit_difference",
    *,
    steps: int = 5,
    graph: EdgeGraph | None = None,
    columns: Tensor | None = None,
    direction: PatchDirection = "noise",
    keep_pairs: bool = True,
    batch_tokens: int | None = None,
) -> EdgeScores:
    """EAP with integrated gradients over inputs.

    The gradient is the mean over `steps` points on the line from the corrupt to the clean embeddings, the corrupt end
    included and the clean end not.

    Args:
        lm: The model.
        pairs: n aligned pairs.
        metric: What is asked of the logits; it must have a gradient.
        steps: Points on the line, 1 or more.
        graph: Whose edges are scored; None: `EdgeGraph.of(lm)`.
        columns: Of a graph with positions: the column that each token of a pair belongs to, int [n, p]
            (`position_columns`); None: the graph has none.
        direction: "noise" puts corrupt sources into the clean run, "denoise" clean ones into the corrupt run.
        keep_pairs: Whether each pair's scores are kept, which takes n times the memory of the mean.
        batch_tokens: Tokens of one batch, pairs times points; None: as many as about 400 MB hold.

    Raises:
        CutawayError: As `attribute_edges`, and for no step.

    Source: Hanna et al. 2024; https://arxiv.org/abs/2403.17806.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise CutawayError(f"Integrated gradients need at least one step; got {steps}.")
    at = tuple(k / steps for k in range(steps))
    return attribute_edges(
        lm, pairs, metric, gradient=GradientAt(f"eap-ig ({steps} steps)", at), graph=graph, columns=columns,
        direction=direction, keep_pairs=keep_pairs, batch_tokens=batch_tokens,
    )  # fmt: skip


def clean_corrupted(
    lm: LanguageModel,
    pairs: AlignedPairs,
    metric: str | Metric = "logit_difference",
    *,
    graph: EdgeGraph | None = None,
    columns: Tensor | None = None,
    direction: PatchDirection = "noise",
    keep_pairs: bool = True,
    batch_tokens: int | None = None,
) -> EdgeScores:
    """The mean of the gradients at the clean and at the corrupt prompt.

    Args:
        lm: The model.
        pairs: n aligned pairs.
        metric: What is asked of the logits; it must have a gradient.
        graph: Whose edges are scored; None: `EdgeGraph.of(lm)`.
        columns: Of a graph with positions: the column that each token of a pair belongs to, int [n, p]
            (`position_columns`); None: the graph has none.
        direction: "noise" puts corrupt sources into the clean run, "denoise" clean ones into the corrupt run.
        keep_pairs: Whether each pair's scores are kept, which takes n times the memory of the mean.
        batch_tokens: Tokens of one batch, pairs times points; None: as many as about 400 MB hold.

    Raises:
        CutawayError: As `attribute_edges`.

    Source: Hanna et al. 2024; https://arxiv.org/abs/2403.17806.
    """
    return attribute_edges(
        lm, pairs, metric, gradient=GradientAt("clean-corrupted", (1.0, 0.0)), graph=graph, columns=columns,
        direction=direction, keep_pairs=keep_pairs, batch_tokens=batch_tokens,
    )  # fmt: skip


def relp(
    lm: LanguageModel,
    pairs: AlignedPairs,
    metric: str | Metric = "logit_difference",
    *,
    graph: EdgeGraph | None = None,
    columns: Tensor | None = None,
    direction: PatchDirection = "noise",
    keep_pairs: bool = True,
    batch_tokens: int | None = None,
) -> EdgeScores:
    """EAP with the rules of layer-wise relevance propagation in the backward pass (see `relp_rules`).

    Args:
        lm: The model.
        pairs: n aligned pairs.
        metric: What is asked of the logits; it must have a gradient.
        graph: Whose edges are scored; None: `EdgeGraph.of(lm)`.
        columns: Of a graph with positions: the column that each token of a pair belongs to, int [n, p]
            (`position_columns`); None: the graph has none.
        direction: "noise" puts corrupt sources into the clean run, "denoise" clean ones into the corrupt run.
        keep_pairs: Whether each pair's scores are kept, which takes n times the memory of the mean.
        batch_tokens: Tokens of one batch, pairs times points; None: as many as about 400 MB hold.

    Raises:
        CutawayError: As `attribute_edges`.

    Source: Jafari et al. 2025.
    """
    return attribute_edges(
        lm, pairs, metric, gradient=GradientAt("relp", rules="relp"), graph=graph, columns=columns, direction=direction,
        keep_pairs=keep_pairs, batch_tokens=batch_tokens,
    )  # fmt: skip


def random_scores(
    lm: LanguageModel, pairs: AlignedPairs, metric: str | Metric = "logit_difference", *, seed: int = 0
) -> EdgeScores:
    """Scores drawn uniformly from [0, 1): what a circuit of this size is worth by chance."""
    graph = EdgeGraph.of(lm)
    values = torch.rand(graph.shape, generator=torch.Generator().manual_seed(seed)) * graph.real
    name, _ = named_metric(metric)
    nothing = torch.full((len(pairs),), float("nan"))
    return EdgeScores(graph, values, None, "random", name, "noise", len(pairs), nothing, nothing)


def attribute_edges(
    lm: LanguageModel,
    pairs: AlignedPairs,
    metric: str | Metric = "logit_difference",
    *,
    gradient: GradientAt = GradientAt(),
    graph: EdgeGraph | None = None,
    columns: Tensor | None = None,
    direction: PatchDirection = "noise",
    keep_pairs: bool = True,
    batch_tokens: int | None = None,
) -> EdgeScores:
    """s(u, v) = Σ_t (corrupt − clean)_u[t] · g_v[t], g the mean gradient of the metric at v's input.

    Cost: one forward and backward per point, and a forward for each end that is no point. Where attention has a norm
    behind it (Gemma 2), a head's change is carried through that norm at the clean prompt to first order.

    Args:
        lm: The model.
        pairs: n aligned pairs.
        metric: What is asked of the logits; it must have a gradient.
        gradient: Where the gradient is taken.
        graph: Whose edges are scored; it may group key-value heads, or name positions. None: `EdgeGraph.of(lm)`.
        columns: Of a graph with positions: which of its columns each token of a pair belongs to [n, p]
            (`position_columns`).
        direction: "noise" puts corrupt sources into the clean run, "denoise" clean ones into the corrupt run.
        keep_pairs: Whether each pair's scores are kept (n times the size of the mean).
        batch_tokens: Tokens of one batch, pairs times points; None: as many as about 400 MB hold.

    Raises:
        CutawayError: A metric without a gradient, or whose gradient is zero at all points.
    """
    at, method = gradient.points, gradient.name
    require_aligned(pairs)
    refuse_unreadable(lm)
    graph = EdgeGraph.of(lm) if graph is None else graph
    if (graph.columns is None) != (columns is None):
        raise CutawayError("A graph with positions needs columns=, and a graph without them takes none.")
    name, measure = named_metric(metric)
    engine = EdgeGradients(lm, graph, measure, name, at, gradient.rules)
    if direction == "denoise":
        pairs = exchanged(pairs)
    p = pairs.clean.ids.shape[1]
    tokens = batch_tokens or max(p * len(at), _MEMORY // _bytes_per_token(lm))
    rows = max(1, tokens // (p * len(at)))
    values = torch.zeros(graph.shape)
    kept: list[Tensor] = []
    ends: list[Tensor] = []
    flat = True
    with frozen(lm), shown(f"{method} scores", len(pairs), "pairs", least=rows + 1) as advance:
        for first in range(0, len(pairs), rows):
            part = pairs[range(first, min(first + rows, len(pairs)))]
            here = None if columns is None else columns[first : first + rows]
            scores, both, largest = engine.batch(part, here, direction)
            flat &= largest < _NO_GRADIENT
            ends.append(both)
            values += scores.sum(0)
            if keep_pairs:
                kept.append(scores)
            advance(len(part))
    ends_of_all = torch.cat(ends, 1)
    fall = float((ends_of_all[0] - ends_of_all[1]).double().mean().abs())
    if flat or float(values.abs().max()) / len(pairs) < _ROUNDING * fall:
        where = "the clean prompts" if at == (1.0,) and direction == "noise" else "all the points it was taken at"
        raise CutawayError(
            f"The gradient of {name} is zero at {where}, so it scores no edge; use logit_difference, or integrated "
            "gradients (eap-ig), which leave that point."
        )
    clean, corrupt = ends_of_all
    if direction == "denoise":
        clean, corrupt = corrupt, clean
    per_pair = torch.cat(kept) if keep_pairs else None
    return EdgeScores(graph, values / len(pairs), per_pair, method, name, direction, len(pairs), clean, corrupt)


def position_columns(pairs: AlignedPairs, roles: Sequence[str] | None = None) -> tuple[tuple[str, ...], Tensor]:
    """Names of columns and which of them each token belongs to [n, p]: roles and "other", or every position.

    Args:
        pairs: n aligned pairs.
        roles: Each a column that stands for its position in the clean prompt; None: every position is one.

    Raises:
        Misaligned: Without roles, pairs of different lengths.
        CutawayError: A role that the pairs do not name.
    """
    n, p = pairs.clean.ids.shape
    if roles is None:
        lengths = pairs.clean.lengths
        if int(lengths.min()) != int(lengths.max()):
            raise Misaligned("The pairs have different lengths, so their positions do not line up; name roles.")
        return tuple(str(i) for i in range(p)), torch.arange(p).expand(n, p)
    columns = torch.full((n, p), len(roles))
    for i, role in enumerate(roles):
        if role not in pairs.places:
            raise CutawayError(f"no position is named {role!r}; the pairs name {', '.join(pairs.places)}")
        columns[torch.arange(n), pairs.places[role][0] + pairs.clean.first.cpu()] = i
    return (*roles, "other"), columns


def exchanged(pairs: AlignedPairs) -> AlignedPairs:
    """The same with clean and corrupt prompts exchanged, the answers left as they are."""
    places = {role: where.flip(0) for role, where in pairs.places.items()}
    return replace(pairs, clean=pairs.corrupt, corrupt=pairs.clean, places=places)


def _bytes_per_token(lm: LanguageModel) -> int:
    """What autograd keeps for one token, about: some forty numbers of the stream's width a layer."""
    return lm.n_layers * 4 * (24 * lm.d_model + 8 * (lm.d_mlp or 4 * lm.d_model))
