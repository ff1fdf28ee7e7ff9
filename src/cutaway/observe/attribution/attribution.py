"""Direct logit attribution: what each part of a model writes into a logit difference, on the weights as they are.

The stream before the final norm is a sum of what embeddings, heads, MLPs and biases wrote. With the scale s of the
final norm frozen at the value that it had, the logit is linear in that sum, so every part c has a share: for a
LayerNorm ((c - mean c) / s · w)·ΔU, for an RMS norm (c / s · w)·ΔU (Gemma's gain is 1 + w), and the constants
b_ln·ΔU + Δb_U beside them, where ΔU is the unembedding of the answer minus that of the wrong answer (Elhage et al.
2021). Where a model normalises what a module writes (Gemma 2 and 3, OLMo 2), a head or neuron passes through that norm
with its own frozen scale. The parts sum to the model's logit difference before a final softcap; that sum is checked in
every call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cutaway.artifacts.errors import CutawayError, NotSupported
from cutaway.model.language_model import Inputs, LanguageModel
from cutaway.observe.attribution.answers import (
    Answer,
    WrongAnswer,
    answer_ids,
    in_words,
    prompt_ids,
    wrong_ids,
)
from cutaway.observe.attribution.parts import (
    GRANULARITIES,
    By,
    difference_directions,
    split_difference,
)
from cutaway.observe.attribution.results import TOLERANCE, Attribution


def attribute(
    lm: LanguageModel,
    inputs: Inputs,
    answer: Answer,
    wrong: WrongAnswer = None,
    *,
    position: int | Sequence[int] = -1,
    by: By = "component",
    controls: int = 16,
    seed: int = 0,
    bos: bool | None = None,
) -> Attribution:
    """Split the logit difference answer - wrong at one position of each prompt into the parts that wrote it.

    Direct logit attribution, the final norm's scale frozen (Elhage et al. 2021, "A mathematical framework for
    transformer circuits"). The parts sum to the model's own difference before a softcap; that is checked in every call.

    Args:
        lm: the model.
        inputs: a prompt, or b of them: text, ids, Tokens.
        answer: a token, or one per prompt: an id (422, "#422"), or the text by which one token continues the prompt.
        wrong: None (the answer's logit alone), a token, several tokens (their mean), one of these per prompt, or "mean"
            (the mean over the vocabulary). A text that happens to be "mean" can be given by its id.
        position: token position whose next token is predicted, counted from each prompt's first real token; or one per
            prompt.
        by: "component" (embeddings, each attention and MLP, biases), "head", "neuron" (attention whole), or "source"
            (each head's result split over the positions that it reads).
        controls: number of random token pairs that the same parts are measured with, their direction as long as ΔU.
        seed: of the random pairs.
        bos: whether a beginning-of-text token stands before each text; the tokenizer's own habit if None.

    Returns:
        The shares of every part and prompt.

    Raises:
        NotSupported: a granularity whose sites the model lacks, and parts that do not sum to the model's logit
            difference (the model does something that its sites do not account for).
        CutawayError: an answer that is not one token, a position outside a prompt, logits that are NaN.

    Example:
        >>> prompt = "The capital of the state containing Dallas is"
        >>> attribute(cutaway.load("atlas"), prompt, " Austin", by="head")
        direct logit attribution by head, atlas
          logit of ' Austin'
        ...
    """
    if by not in GRANULARITIES:
        raise CutawayError(f"by={by!r} is not one of {', '.join(GRANULARITIES)}.")
    if controls < 1:
        raise CutawayError(f"controls={controls}: at least one random token pair is needed beside a share.")
    tokens = lm.tokens(inputs, bos=bos)
    positions = [position] * len(tokens) if isinstance(position, int) else [int(p) for p in position]
    if len(positions) != len(tokens):
        raise CutawayError(f"{len(positions)} positions for {len(tokens)} prompts; give one, or one per prompt.")
    columns = torch.tensor([tokens.column(row, place) for row, place in enumerate(positions)])
    before = prompt_ids(tokens, positions)
    answers, wrongs = answer_ids(lm, answer, before), wrong_ids(lm, wrong, before)
    directions, biases = difference_directions(lm, answers, wrongs, controls, seed)
    result = split_difference(lm, tokens, columns, directions, biases, by, answers, wrongs)
    groups, total, capped, notes = result
    first = tokens.first.cpu()
    attribution = Attribution(
        model=lm.name,
        by=by,
        tokens=tokens,
        position=tuple((columns - first).tolist()),
        answers=tuple(lm.token_strings(answers)),
        wrong=tuple(in_words(lm, w) for w in wrongs),
        answer_ids=tuple(answers),
        wrong_ids=tuple(wrongs),
        groups=tuple(groups),
        total=total,
        total_capped=capped,
        softcap=lm.family.final_softcap,
        n_controls=controls,
        seed=seed,
        notes=tuple(notes),
    )
    allowed = TOLERANCE.get(lm.dtype, 4e-2)
    if not attribution.relative_error <= min(10 * allowed, 0.1):  # NaN is refused too
        raise NotSupported(
            f"The parts by {by} of {lm.name} miss its logit difference by {attribution.relative_error:.1e} of their "
            f"size (allowed {allowed:.0e}): the model adds something that its sites do not account for, so its "
            f"attribution is not shown. `cutaway check {lm.loaded_from}` says where."
        )
    return attribution
