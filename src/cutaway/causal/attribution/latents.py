"""Attribution patching of dictionary latents: the nodes of sparse feature circuits (Marks et al. 2024).

A dictionary writes the value of its site as x = Σ_i f_i d_i + b + ε, with ε what it leaves unexplained. Nodes are the
latents and the error of each site. With g = ∂m/∂x,

    I(f_i) = (f_i(source) − f_i(base)) · d_i·g,        I(ε) = (ε(source) − ε(base))·g,

so that latents and error of a site add up to (x(source) − x(base))·g, the site's own score, exactly: the dictionary is
never put in place of what the model computes. g is that of AtP, RelP, or integrated gradients: moving all f and ε along
together moves x along the line between its two values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError, NotSupported
from cutaway.causal.attribution.attribution_patching import GradientOptions, slopes
from cutaway.causal.attribution.questions import Found, Positions, Question, ask, check_exactly, result_of
from cutaway.causal.attribution.scores import NodeScores
from cutaway.causal.metrics import Metric, PatchDirection, logit_difference
from cutaway.causal.parts import frozen
from cutaway.data.pairs import AlignedPairs, PromptPair, aligned
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.model.edits import edits
from cutaway.model.language_model import LanguageModel

LatentMethod = Literal["atp", "relp", "ig"]


@dataclass(frozen=True, eq=False)
class Features:
    """A dictionary at its site in a model."""

    site: str
    dictionary: Dictionary

    @property
    def n(self) -> int:
        """Nodes of the site: latents and, behind them, the error."""
        return self.dictionary.d_sae + 1

    @property
    def directions(self) -> Tensor:
        """d_i: [F, d]."""
        return self.dictionary.W_dec

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., d] -> activations [..., F] and error [..., d]; differentiable, and x is their sum exactly."""
        wide = x.to(self.directions.dtype)
        activations = self.dictionary.encode(wide)
        return activations, wide - self.dictionary.decode(activations)

    def scores(self, base: Tensor, source: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """I of every node at some tokens [..., d] -> [..., F + 1], and whether the node differs there."""
        (f0, e0), (f1, e1) = self.split(base), self.split(source)
        g = grad.to(f0.dtype)
        df, de = f1 - f0, e1 - e0
        scores = torch.cat([df * (g @ self.directions.T), (de * g).sum(-1, keepdim=True)], -1)
        return scores, torch.cat([df != 0, (de != 0).any(-1, keepdim=True)], -1)

    def changes(self, base: Tensor, source: Tensor, unit: int) -> Tensor:
        """What patching one node adds to x, at some tokens: [..., d] -> [..., d]."""
        (f0, e0), (f1, e1) = self.split(base), self.split(source)
        if unit == self.dictionary.d_sae:
            return e1 - e0
        return (f1 - f0)[..., unit, None] * self.directions[unit]


def features_of(lm: LanguageModel, dictionaries: Dictionary | Sequence[Dictionary]) -> dict[str, Features]:
    """Dictionaries by site, in the order of the forward pass.

    Raises CutawayError: none, two at one site, one that is no autoencoder of a value of the model's width, that belongs
    to other weights, or whose input or output is scaled token by token (then its output is no sum of directions).
    """
    given = [dictionaries] if isinstance(dictionaries, Dictionary) else list(dictionaries)
    if not given:
        raise CutawayError("no dictionary was given; load one with cutaway.dictionaries.load")
    found: dict[str, Features] = {}
    for dictionary in given:
        if dictionary.kind != "sae" or dictionary.input_norm is not None:
            why = "scales its input token by token" if dictionary.kind == "sae" else f"is a {dictionary.kind}"
            raise NotSupported(
                f"{dictionary!r} {why}; latents and error of a site add up to its value only for an autoencoder of it"
            )
        weights = dictionary.model.get("weight_hash")
        if weights and weights != lm.identity().weight_hash:
            raise CutawayError(
                f"{dictionary!r} belongs to {dictionary.model.get('id')} with weights {str(weights)[:8]}, not to "
                f"{lm.name}"
            )
        site = lm.sites()[lm.sites().resolve(dictionary.site)]
        if site.dims.split() != ["b", "p", "d"] or dictionary.d_in != lm.d_model:
            raise NotSupported(
                f"{dictionary!r} reads {dictionary.d_in} numbers of '{site.name}'; latents are scored where a site "
                f"holds the model's width, {lm.d_model}"
            )
        if site.name in found:
            raise CutawayError(f"two dictionaries read '{site.name}'; give one a site")
        dtype = torch.promote_types(lm.dtype, torch.float32)
        found[site.name] = Features(site.name, dictionary.to(lm.device, dtype))
    return {name: found[name] for name in sorted(found, key=lm.sites().order)}


def latent_attribution(
    lm: LanguageModel,
    pairs: Sequence[PromptPair] | AlignedPairs,
    dictionaries: Dictionary | Sequence[Dictionary],
    *,
    method: LatentMethod = "ig",
    direction: PatchDirection = "noise",
    metric: str | Metric = logit_difference,
    positions: Positions = "all",
    check: int = 40,
    options: GradientOptions = GradientOptions(),  # noqa: B008, frozen
) -> NodeScores:
    """Score every latent of every dictionary, and every error, for every pair.

    Exact patching of a latent moves x by (f_i(source) − f_i(base)) d_i and leaves everything else of the site as it is.

    Args:
        lm: The model.
        pairs: n prompt pairs.
        dictionaries: Autoencoders of sites that hold the model's width, one per site.
        method: "ig" (moving all latents and the error along together), "atp" or "relp".
        direction: "noise" patches the clean run from the corrupt one, "denoise" the corrupt run from the clean one.
        metric: What is asked of the logits; it must have a gradient.
        positions: "all" tokens at once, "each" position, or roles; as in `attribution_patching`.
        check: Nodes that are drawn and patched exactly, to compare with; 0: none.
        options: How the gradient is taken; `path` is "site" here.

    Returns:
        Scores in units of the metric, by site [columns, latents + 1, n]: behind the latents stands the error.

    Raises:
        CutawayError: As `attribution_patching` and `features_of`.

    Source: Marks et al. 2024; https://arxiv.org/abs/2403.19647.
    """
    if method not in ("atp", "relp", "ig"):
        raise CutawayError(f"there is no method {method!r} for latents; there are atp, relp and ig")
    if options.path != "site":
        raise NotSupported("latents of a site are moved along together (path='site'); path='node' is not for them")
    if type(options.steps) is not int or options.steps < 1:
        raise CutawayError(f"steps is {options.steps!r}; give a whole number, 1 or more")
    features = features_of(lm, dictionaries)
    ready = aligned(lm, pairs)
    question = ask(lm, ready, list(features), direction, metric, positions)
    question = replace(question, units=dict.fromkeys(features, "latent"))
    found = Found()
    with frozen(lm), torch.no_grad():
        for at in slopes(question, method, found, options):
            scores, moved = _by_column(at.part, features[at.site], at.base, at.source, at.grad)
            found.scores.setdefault(at.site, []).append(scores.float().cpu())
            before = found.moved.get(at.site)
            found.moved[at.site] = moved.cpu() if before is None else before | moved.cpu()
    label = f"{method} of latents{f' ({options.steps} steps)' if method == 'ig' else ''}"
    result = result_of(question, label, found)
    if not check:
        return result
    agreement = check_exactly(
        question, result, found, check, seed=options.seed, exact=lambda nodes: _exact_latents(question, features, nodes)
    )
    return replace(result, agreement=agreement)


def _by_column(part: Question, features: Features, base: Tensor, source: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [columns, F + 1, b] and whether a node differs in any pair [columns, F + 1]."""
    if part.into is None:
        scores, moved = features.scores(base, source, grad)
        mask = part.base.mask.to(scores.device)[..., None]
        return (scores * mask).sum(1).T[None], (moved & mask).any(1).any(0)[None]
    into, taken, rows = part.cells()
    scores, moved = features.scores(base[rows, into], source[rows, taken], grad[rows, into])
    return scores.transpose(1, 2), moved.any(1)


def _exact_latents(
    question: Question, features: Mapping[str, Features], nodes: Sequence[tuple[str, int, int]]
) -> Tensor:
    """How the metric really changes [nodes, n] when each node (site, unit, column) is patched: one sweep."""
    lm, used = question.lm, list(dict.fromkeys(site for site, _, _ in nodes))
    base, given = (lm.run(tokens, capture=used, logits="last") for tokens in (question.base, question.source))
    targets = question.targets(base.last_logits, given.last_logits)
    cells: list[edits.Edit] = []
    for site, unit, column in nodes:
        x0, x1 = base[site], given[site]
        value = x0.clone()
        if question.into is None:
            value += features[site].changes(x0, x1, unit).to(value.dtype)
        else:
            into, taken, rows = question.cells()
            change = features[site].changes(x0[rows, into[column]], x1[rows, taken[column]], unit)
            value[rows, into[column]] += change.to(value.dtype)
        cells.append(edits.set(site, value))
    swept = lm.sweep(question.base, cells, question.judged(targets), label="exact patching of latents")
    return swept.values - swept.base
