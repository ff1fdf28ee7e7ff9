"""Every head of a model, what it looks at, and what is lost without it: one call, one table.

A label says what a head's attention does on the data that the score is read on. It is given by a rule (`LABEL_RULE`),
and beside it stands what ablating that head alone costs, with other heads' ablation as control. Heads that stand in for
each other cost little alone and much together: `head_report` ablates groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.results import Control, Effect
from cutaway.artifacts.statistics import bootstrap_interval
from cutaway.data.tasks.tasks import ordinary_tokens
from cutaway.model.language_model import Inputs, LanguageModel
from cutaway.model.tokens import Tokens
from cutaway.observe.heads.ablation import HeadEffects, ablate_each_head, text_loss
from cutaway.observe.heads.circuits import copying_scores
from cutaway.observe.heads.kinds import KindScores, attention_layers
from cutaway.observe.heads.labels import (
    REPEATED,
    TEXT,
    HeadTable,
)
from cutaway.observe.heads.maps import ON_TEXT
from cutaway.observe.heads.report import Ablation, RunMetric, losses, repeated_tokens, second_half_loss
from cutaway.observe.heads.scores import repeated_scores
from cutaway.observe.heads.targets import TARGETS, retrieval_scores
from cutaway.observe.heads.text import text_scores

_ABLATED_ROWS, _ABLATED_TOKENS = 8, 64  # of a text that heads are scored on


def head_table(
    lm: LanguageModel,
    inputs: Inputs | None = None,
    metric: RunMetric = text_loss,
    *,
    needle: str | Tensor | Sequence[Sequence[int]] | None = None,
    on: Inputs | None = None,
    n: int = 8,
    length: int | None = None,
    ablations: Sequence[Ablation] = ("mean", "zero"),
    ablation_length: int = 24,
    seed: int = 0,
) -> HeadTable:
    """The taxonomy of a whole model: every head × every kind of score, labels, and what ablating each head costs.

    Scores are read on repeated random sequences (Olsson et al. 2022), copying on the weights; every head is then
    ablated alone, on other sequences, for the loss on the second copy.

    Args:
        lm: the model.
        inputs: prompts on which heads are ablated for `metric` too.
        metric: a run of these prompts to one number per row [b]; its attribute `units` says in what. By default the
            loss on the text.
        needle: adds the retrieval score on `inputs`: see `retrieval_scores`.
        on: prompts, or rows of token ids, to score heads on as well (`text_scores`; these kinds end in "(text)");
            without `inputs` the first 64 tokens of its first 8 rows stand for them.
        n: how many random sequences.
        length: tokens of one copy; 50, or what fits, if None.
        ablations: what stands in a head's place, () for no ablation.
        ablation_length: tokens of one copy of the sequences that heads are ablated on.
        seed: of the random tokens.

    Returns:
        Scores, labels and effects of every head.

    Raises:
        NotSupported: a model without attention patterns.
        CutawayError: a needle without inputs.

    Example:
        >>> table = head_table(cutaway.load("atlas"), n=4, length=24, ablation_length=10)  # doctest: +SKIP
        >>> table.labels((7, 3))  # doctest: +SKIP
        ('induction', 'induction-copying', 'copying')
    """
    if needle is not None and inputs is None:
        raise CutawayError("A needle needs prompts that hold it: give inputs too.")
    _, skipped = attention_layers(lm)
    kinds = repeated_scores(lm, n, length, seed)
    notes: list[str] = []
    try:
        kinds["copying"] = _copying(lm, seed)
    except CutawayError as error:  # latent attention: no matrix from the stream to the values
        notes.append(f"Copying is not measured: {error}")
    text = None if inputs is None else lm.tokens(inputs)
    if on is not None:
        scored = lm.tokens(on)
        kinds |= {scores.kind: scores for scores in text_scores(lm, scored).values()}
        if missing := [kind for kind in TARGETS if kind + ON_TEXT not in kinds]:
            notes.append(f"Nothing in the text to score by: {', '.join(missing)}.")
        if text is None:
            some = range(min(len(scored), _ABLATED_ROWS))
            text = lm.tokens([scored.row_ids(row)[:_ABLATED_TOKENS] for row in some])
    if needle is not None and text is not None:
        kinds["retrieval"] = retrieval_scores(lm, text, needle)
    effects: dict[str, dict[str, HeadEffects]] = {}
    t = (repeated_tokens(lm, 1, length).ids.shape[1] - 1) // 2
    if ablations:
        others = repeated_tokens(lm, n, min(ablation_length, t), seed + 1)
        effects[REPEATED] = ablate_each_head(lm, others, second_half_loss, ablations=ablations)
        if text is not None:
            effects[TEXT] = ablate_each_head(lm, text, metric, ablations=ablations, units=_units_of(metric))
    foreseen = repetition(lm, n, t, seed)
    return HeadTable(
        lm.name, lm.n_layers, lm.n_heads, kinds, effects, foreseen, skipped, notes=tuple(notes),
        random_loss=random_loss(lm, n, t, seed), even_loss=math.log(lm.d_vocab),
    )  # fmt: skip


def _units_of(metric: RunMetric) -> str:
    """What a metric says of its units."""
    return "nats of loss on the text" if metric is text_loss else getattr(metric, "units", "the metric")


def random_loss(lm: LanguageModel, n: int = 8, length: int | None = None, seed: int = 0) -> float:
    """Mean loss in nats on tokens drawn at random, none of them twice: the first copy of `repeated_tokens`.

    Args:
        lm: the model.
        n: how many random sequences.
        length: tokens of one copy; 50, or what fits, if None.
        seed: of the random tokens.
    """
    tokens = repeated_tokens(lm, n, length, seed)
    t = (tokens.ids.shape[1] - 1) // 2
    return float(losses(lm.run(tokens))[:, :t].mean())


def _copying(lm: LanguageModel, seed: int) -> KindScores:
    found = copying_scores(lm, seed=seed)
    low, high = (torch.full_like(found.score, end) for end in found.chance_interval)
    chance = torch.full_like(found.score, found.chance)
    return KindScores(
        "copying", found.score, found.score, found.score, chance, low, high, f"{found.draws} random heads",
        n=1, destinations=0, units="balance of eigenvalues", p=found.p,
    )  # fmt: skip


def repetition(lm: LanguageModel, n: int = 8, length: int | None = None, seed: int = 0) -> Effect:
    """How far the loss on the second copy lies below the loss on fresh random tokens in its place, in nats.

    The control is how far those fresh tokens' loss lies below that of the tokens before them: what position and a
    longer context do without any repetition. A model without induction has the two alike.

    Args:
        lm: the model.
        n: how many random sequences.
        length: tokens of one copy; 50, or what fits, if None.
        seed: of the random tokens.
    """
    repeated = repeated_tokens(lm, n, length, seed)
    t = (repeated.ids.shape[1] - 1) // 2
    ordinary = torch.tensor(ordinary_tokens(lm))
    generator = torch.Generator().manual_seed(seed + 1)
    rows = []
    for row in repeated.ids.cpu():
        left = ordinary[~torch.isin(ordinary, row)]
        left = left if len(left) >= t else ordinary  # too small a vocabulary: some come again by chance
        rows.append(torch.cat([row[: t + 1], left[torch.randperm(len(left), generator=generator)[:t]]]).tolist())
    fresh: Tokens = lm.tokens(rows)
    second, control = losses(lm.run(repeated)), losses(lm.run(fresh))
    later = slice(t + 1, None)  # from the second token of the second half on
    fall = (control[:, later].mean(-1) - second[:, later].mean(-1)).double().numpy()
    before = (control[:, 1:t].mean(-1) - control[:, later].mean(-1)).double().numpy()
    return Effect(
        name="fall of the loss on the second copy",
        value=float(fall.mean()),
        n=n,
        interval=bootstrap_interval(fall),
        controls=(
            Control("fresh random tokens beside the first half", float(before.mean()), bootstrap_interval(before), n),
        ),
        ablation="none",
        units="nats",
    )
