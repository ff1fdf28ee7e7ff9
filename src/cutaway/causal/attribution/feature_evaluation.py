"""Does a feature circuit carry the answer? Every latent outside it is set to its mean, at every token.

    faithfulness = (m(circuit) − m(nothing)) / (m(model) − m(nothing))

with m the mean of the metric over the pairs, and "nothing" the run in which every latent is set to its mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError, Misaligned, NotSupported
from cutaway.artifacts.results import Choices, Control, Effect
from cutaway.artifacts.statistics import bootstrap_interval, ratio_intervals
from cutaway.causal.attribution.feature_circuits import FeatureCircuit
from cutaway.causal.attribution.latents import Features, features_of
from cutaway.causal.attribution.questions import Question, ask
from cutaway.causal.attribution.scores import Node
from cutaway.causal.metrics import Metric, logit_difference, targets_of
from cutaway.data.pairs import AlignedPairs, PromptPair, aligned
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.model.edits import edits
from cutaway.model.language_model import LanguageModel

Errors = Literal["circuit", "keep", "remove"]
Kept = Mapping[str, Tensor]  # by site, bool [columns, F + 1]


def feature_faithfulness(
    lm: LanguageModel,
    pairs: Sequence[PromptPair] | AlignedPairs,
    circuit: FeatureCircuit,
    dictionaries: Dictionary | Sequence[Dictionary],
    *,
    errors: Errors = "circuit",
    reference: Sequence[PromptPair] | AlignedPairs | None = None,
    metric: str | Metric = logit_difference,
    draws: int = 10,
    batch_rows: int = 64,
    seed: int = 0,
) -> Effect:
    """Faithfulness of a feature circuit on clean prompts; give others than those it was found on.

    The controls are circuits of as many latents at each site and position, drawn among those whose score is not 0,
    with the same errors; and the complement, in which the circuit alone is set to its mean.

    Args:
        lm: The model.
        pairs: n prompt pairs.
        circuit: The circuit; every latent outside it is set to its mean.
        dictionaries: Those that it was found with.
        errors: "circuit" keeps the errors among its nodes and sets the others to their mean, "keep" keeps all, also
            where nothing else is kept, "remove" none.
        reference: The pairs over whose prompts means of latents and errors are taken; None: `pairs`. Means are over all
            tokens, or position by position where the circuit was found so (then these pairs must be as long).
        metric: What is asked of the logits.
        draws: Random circuits to compare with.
        batch_rows: At most so many pairs in one forward.
        seed: Of the random circuits.

    Returns:
        The share of the metric that is left, 1 the whole model's, with 95 % intervals over pairs.

    Raises:
        CutawayError: A circuit of roles, prompts of another length, a model that the metric does not tell from one
            without latents.

    Source: Marks et al. 2024; https://arxiv.org/abs/2403.19647.
    """
    if errors not in ("circuit", "keep", "remove"):
        raise CutawayError(f"errors={errors!r} is not 'circuit', 'keep' or 'remove'")
    columns = circuit.scores.columns
    each = columns != (None,)
    if each and circuit.choices.positions != "each":
        raise NotSupported(
            "this circuit names roles and says nothing of the other tokens; find one with positions 'all' or 'each'"
        )
    ready, given = aligned(lm, pairs), aligned(lm, pairs if reference is None else reference)
    features = features_of(lm, dictionaries)
    if set(features) != set(circuit.scores.blocks):
        raise CutawayError(f"the circuit is of {', '.join(circuit.scores.blocks)}; give those dictionaries")
    question, source = (ask(lm, p, list(features), "noise", metric, "each" if each else "all") for p in (ready, given))
    if not len(question.columns) == len(source.columns) == len(columns):
        raise Misaligned(
            f"the circuit is of prompts of {len(columns)} tokens, these have {len(question.columns)} and those of the "
            f"means {len(source.columns)}"
        )
    means = _means(source, features, batch_rows)
    own = _kept(circuit, features, columns, errors)
    none = {site: torch.zeros_like(kept) for site, kept in own.items()}
    rest = {site: ~kept for site, kept in own.items()}
    if errors != "circuit":
        for mask in (*none.values(), *rest.values()):
            mask[:, -1] = errors == "keep"

    def measure(kept: Kept | None) -> np.ndarray:
        return _metric(question, features, means, kept, batch_rows)

    full, empty, inside, outside = (measure(kept) for kept in (None, none, own, rest))
    if abs(float(full.mean() - empty.mean())) < 1e-6:
        raise CutawayError(
            f"{question.metric_name} is the same with every latent at its mean; choose another metric, or dictionaries"
        )

    def effect(of: np.ndarray) -> tuple[float, tuple[float, float]]:
        low, high = ratio_intervals(of - empty, full - empty)
        return float((of - empty).mean() / (full - empty).mean()), (float(low), float(high))

    generator = np.random.default_rng(seed)
    random = np.array([effect(measure(_random(own, circuit, generator)))[0] for _ in range(draws)])
    value, interval = effect(inside)
    complement, its_interval = effect(outside)
    latents = sum(int(kept[:, :-1].sum()) for kept in own.values())
    controls = [Control("the complement", complement, its_interval, len(question))]
    if draws:
        controls.insert(
            0, Control("random circuits of as many latents", float(random.mean()), bootstrap_interval(random), draws)
        )
    return Effect(
        name=f"faithfulness of {latents} latents",
        value=value,
        n=len(question),
        interval=interval,
        controls=tuple(controls),
        ablation=f"mean of every latent outside the circuit; errors: {errors}",
        units=f"share of the {question.metric_name.replace('_', ' ')}",
        choices=Choices(
            granularity="latent",
            component=", ".join(features),
            ablation=f"mean{' by position' if each else ''}, errors: {errors}",
            positions="each" if each else "all",
            direction="complement",
            evaluation=f"{len(question)} clean prompts",
        ),
    )


def _kept(
    circuit: FeatureCircuit, features: Mapping[str, Features], columns: tuple[str | None, ...], errors: Errors
) -> dict[str, Tensor]:
    kept = {site: torch.zeros(len(columns), own.n, dtype=torch.bool) for site, own in features.items()}
    for one in circuit.nodes:
        node: Node = one.node
        unit = -1 if node.latent is None else node.latent
        kept[node.site][columns.index(node.at), unit] = True
    if errors != "circuit":
        for mask in kept.values():
            mask[:, -1] = errors == "keep"
    return kept


def _random(own: Kept, circuit: FeatureCircuit, generator: np.random.Generator) -> dict[str, Tensor]:
    """As many latents at each site and column, among those with a score."""
    drawn: dict[str, Tensor] = {}
    for site, kept in own.items():
        alive = circuit.scores.blocks[site][:, :-1].abs().sum(-1) > 0
        drawn[site] = torch.zeros_like(kept)
        drawn[site][:, -1] = kept[:, -1]
        for c in range(len(kept)):
            able = alive[c].nonzero()[:, 0].numpy()
            chosen = generator.permutation(able)[: int(kept[c, :-1].sum())]
            drawn[site][c, torch.from_numpy(chosen)] = True
    return drawn


def _means(question: Question, features: Mapping[str, Features], rows: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean activations and error of each site over both prompts: [columns, F] and [columns, d]."""
    sums: dict[str, list[Tensor]] = {}
    count = 0.0
    for part in question.parts(rows):
        for tokens in (part.base, part.source):
            run = part.lm.run(tokens, capture=list(features), logits=None)
            mask = tokens.mask.to(part.lm.device)[..., None]
            for site, own in features.items():
                new = [(value * mask).sum(0) for value in own.split(run[site])]
                new = new if part.into is not None else [value.sum(0, keepdim=True) for value in new]
                before = sums.get(site)
                sums[site] = new if before is None else [a + b for a, b in zip(before, new, strict=True)]
            count += float(len(tokens) if part.into is not None else tokens.mask.sum())
    return {site: (parts[0] / count, parts[1] / count) for site, parts in sums.items()}


def _metric(
    question: Question,
    features: Mapping[str, Features],
    means: Mapping[str, tuple[Tensor, Tensor]],
    kept: Kept | None,
    rows: int,
) -> np.ndarray:
    """The metric of the clean prompts [n] with every node outside `kept` at its mean."""
    found: list[Tensor] = []
    for part in question.parts(rows):
        clean = part.lm.run(part.base, logits="last").last_logits
        logits = clean
        if kept is not None:
            put = [
                edits.function(site, _ablation(own, kept[site], *means[site], len(part), part.into is not None))
                for site, own in features.items()
            ]
            logits = part.lm.run(part.base, edits=put, logits="last").last_logits
        targets = targets_of(part.pairs, clean.float()).to(part.lm.device)
        found.append(part.metric(logits.float(), targets).float().cpu())
    return torch.cat(found).double().numpy()


def _ablation(
    own: Features, kept: Tensor, activations: Tensor, error: Tensor, b: int, each: bool
) -> Callable[[Tensor], Tensor]:
    """What an edit makes of the value of a site at its tokens [b · p, d]: with `each`, position by position."""
    latents, errors = kept[:, :-1].to(activations.device), kept[:, -1:].to(activations.device)

    def change(x: Tensor) -> Tensor:
        rows = x.unflatten(0, (b, -1)) if each else x  # [b, p, d] against [p, ...], or [tokens, d] against [1, ...]
        f, e = own.split(rows)
        new = own.dictionary.decode(torch.where(latents, f, activations)) + torch.where(errors, e, error)
        return new.view(x.shape).to(x.dtype)

    return change
