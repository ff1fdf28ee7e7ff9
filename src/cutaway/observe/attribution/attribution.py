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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.results import Control, Effect, interval_text
from cutaway.artifacts.statistics import bootstrap_interval
from cutaway.model.language_model import LanguageModel
from cutaway.model.tokens import Tokens
from cutaway.observe.attribution.answers import Wrong, answer_ids, differences, in_words, prompt_ids, wrong_ids
from cutaway.observe.attribution.parts import (
    GRANULARITIES,
    By,
    Group,
    difference_directions,
    dla_sum_error,
    dla_sum_errors,
    split_difference,
)

__all__ = ["Attribution", "Part", "attribute", "dla_sum_error", "dla_sum_errors"]

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}
"""How far the parts may miss the logit difference, relative to the largest part."""

NOT_A_CAUSE = (
    "A share is what a part writes directly, the final scale frozen. It is not what the answer would lose without the "
    "part: later layers read it, and may make up for it."
)


@dataclass(frozen=True)
class Part:
    """One part's share, the mean over the prompts, with its interval (None for one prompt).

    `control` is the mean |share| of the same part for random token pairs whose direction is as long as ΔU, and
    `control_range` the middle 95 % of it. `kind`, `layer` and `index` say where in the model it is.
    """

    name: str
    kind: str
    layer: int | None
    index: int
    value: float
    interval: tuple[float, float] | None
    control: float
    control_range: tuple[float, float]


@dataclass(frozen=True, eq=False)
class Attribution:
    """The shares of a logit difference, prompt by prompt.

    `total` float64 [b] is the model's own difference before a softcap, `total_capped` after it; `position` the token
    position of each row; `answers` and `wrong` what was compared, in words. `notes` say what could not be split.
    """

    model: str
    by: By
    tokens: Tokens
    position: tuple[int, ...]
    answers: tuple[str, ...]
    wrong: tuple[str, ...]
    answer_ids: tuple[int, ...]
    wrong_ids: tuple[Wrong, ...]
    groups: tuple[Group, ...]
    total: Tensor
    total_capped: Tensor
    softcap: float | None
    n_controls: int
    seed: int
    notes: tuple[str, ...] = ()

    @property
    def values(self) -> Tensor:
        """All shares, float64 [b, parts]."""
        return torch.cat([group.values[:, 0] for group in self.groups], dim=1)

    @property
    def error(self) -> Tensor:
        """Sum of the parts minus the model's logit difference before the softcap [b]."""
        return self.values.sum(1) - self.total

    @property
    def relative_error(self) -> float:
        """The largest |error| relative to the largest part or total of its row."""
        scale = torch.maximum(self.values.abs().amax(1), self.total.abs()).clamp(min=1e-12)
        return float((self.error.abs() / scale).max())

    @property
    def names(self) -> list[str]:
        """Every part, in the order of `values`."""
        return [group.name(i) for group in self.groups for i in range(group.values.shape[-1])]

    def difference(self, logits: Tensor) -> Tensor:
        """The attributed logit difference in other logits at the same place, [b, V] -> [b]."""
        return differences(logits, self.answer_ids, self.wrong_ids)

    def ranked(self) -> list[int]:
        """Numbers of the parts by the size of their mean share over the prompts, largest first."""
        return self.values.mean(0).abs().argsort(descending=True, stable=True).tolist()

    def locate(self, number: int) -> tuple[Group, int]:
        """The group of a part of `values`, and its index in it."""
        for group in self.groups:
            n = group.values.shape[-1]
            if number < n:
                return group, number
            number -= n
        raise IndexError(number)

    def part(self, number: int) -> Part:
        """Part `number` of `values`, with its interval and control."""
        group, index = self.locate(number)
        shares = group.values[:, :, index]
        random = shares[:, 1:].mean(0).abs()
        low, high = torch.quantile(random, torch.tensor([0.025, 0.975], dtype=random.dtype)).tolist()
        rows = shares[:, 0].numpy()
        return Part(
            name=group.name(index),
            kind=group.kind,
            layer=group.layer,
            index=index,
            value=float(shares[:, 0].mean()),
            interval=bootstrap_interval(rows) if len(rows) > 1 else None,
            control=float(random.mean()),
            control_range=(low, high),
        )

    def top(self, k: int | None = None) -> list[Part]:
        """The k parts with the largest mean share over the prompts by size, largest first; all without k."""
        return [self.part(number) for number in self.ranked()[:k]]

    def by_layer(self, kind: str) -> Tensor:
        """Mean shares of a kind that every layer has equally many of, such as "head": [layers, n]."""
        found = [group.values[:, 0].mean(0) for group in self.groups if group.kind == kind]
        if not found or len({len(values) for values in found}) > 1:
            raise CutawayError(f"This attribution by {self.by} has no “{kind}” parts in every layer.")
        return torch.stack(found)

    def by_source(self) -> Tensor:
        """What attention brings from each position, summed over heads and layers: [b, p]; needs by="source"."""
        found = [group.values[:, 0] for group in self.groups if group.kind == "source"]
        if not found:
            raise CutawayError('There are no source positions here; attribute with by="source".')
        width = self.tokens.ids.shape[1]
        return torch.stack([values.unflatten(-1, (-1, width)).sum(1) for values in found]).sum(0)

    def effect(self, part: Part, command: str | None = None) -> Effect:
        """A part as a result beside its control."""
        return Effect(
            name=f"direct share of {part.name}",
            value=part.value,
            n=len(self.total),
            interval=part.interval,
            controls=(
                Control(
                    "mean |share| for random token pairs, direction of the same length",
                    part.control,
                    part.control_range,
                    self.n_controls,
                ),
            ),
            ablation="none",
            units="logit difference",
            command=command,
        )

    def to_json(self, top: int | None = None) -> dict[str, Any]:
        """Totals, errors, and the `top` parts (all without it), each with interval and control."""
        parts = self.top(top)
        data: dict[str, Any] = {
            "model": self.model,
            "by": self.by,
            "prompts": [self.tokens.text(row) for row in range(len(self.tokens))],
            "tokens": [list(row) for row in self.tokens.strings],
            "position": list(self.position),
            "answer": list(self.answers),
            "wrong": list(self.wrong),
            "total": self.total.tolist(),
            "total_after_softcap": self.total_capped.tolist(),
            "softcap": self.softcap,
            "sum_of_parts": self.values.sum(1).tolist(),
            "error": self.error.tolist(),
            "relative_error": self.relative_error,
            "n_parts": self.values.shape[1],
            "parts": [vars(part) for part in parts],
            "rest": float(self.values.mean(0).sum()) - sum(part.value for part in parts),
            "control": {"random_token_pairs": self.n_controls, "seed": self.seed},
            "notes": [*self.notes, NOT_A_CAUSE],
        }
        if self.by == "source":
            data["by_source"] = self.by_source().tolist()
        return data

    def __str__(self) -> str:
        return self.table()

    def table(self, k: int = 16) -> str:
        """The k largest parts as text, with what is left over, the sum and its error."""
        parts, n = self.top(k), len(self.total)
        lines = [_headline(self)]
        lines.append(f"  {'part':<34}{'share':>9}{'95 % interval':>20}{'random pairs':>14}")
        for part in parts:
            spread = "" if part.interval is None else interval_text(part.interval)
            lines.append(f"  {part.name:<34}{part.value:>9.3f}{spread:>20}{part.control:>14.3f}")
        rest = float(self.values.mean(0).sum()) - sum(part.value for part in parts)
        left = self.values.shape[1] - len(parts)
        if left:
            lines.append(f"  {f'the other {left:,}':<34}{rest:>9.3f}")
        lines.append(f"  {'sum':<34}{float(self.values.sum(1).mean()):>9.3f}")
        model = f"  {'the model' + (' before its softcap' if self.softcap else ''):<34}{float(self.total.mean()):>9.3f}"
        lines.append(f"{model}   error {float(self.error.abs().max()):.1e}")
        if self.softcap:
            capped = float(self.total_capped.mean())
            lines.append(f"  {f'the model after its softcap of {self.softcap:g}':<34}{capped:>9.3f}")
        if n > 1:
            lines.append(f"  means over {n} prompts; intervals by bootstrap over them")
        lines.append(
            f"  random pairs: mean |share| of the same part for {self.n_controls} random token pairs, direction of the "
            "same length"
        )
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes), f"  {NOT_A_CAUSE}"])


def _headline(result: Attribution) -> str:
    n = len(result.total)
    compared = f"{result.answers[0]!r}" + (f" minus {result.wrong[0]}" if result.wrong[0] else "")
    what = f"logit of {compared}" if n == 1 else f"logit difference over {n} prompts (first: {compared})"
    return f"direct logit attribution by {result.by}, {result.model}: {what}"


def attribute(
    lm: LanguageModel,
    inputs: Any,
    answer: str | int | Sequence[str | int],
    wrong: Any = None,
    *,
    position: int | Sequence[int] = -1,
    by: By = "component",
    controls: int = 16,
    seed: int = 0,
    bos: bool | None = None,
) -> Attribution:
    """Split the logit difference answer - wrong at one position of each prompt into the parts that wrote it.

    Parameters:
        inputs: a prompt, or b of them (text, ids, Tokens).
        answer: a token, or one a prompt: an id (422, "#422"), or the text by which one token continues the prompt.
        wrong: None (the answer's logit alone), a token, several tokens (their mean), one of these a prompt, or "mean"
            (the mean over the vocabulary). A text that happens to be "mean" can be given by its id.
        position: token position whose next token is predicted, counted from each row's first real token; or one a row.
        by: "component" (embeddings, each attention and MLP, biases), "head", "neuron" (attention whole), or "source"
            (each head's result split over the positions that it reads).
        controls: number of random token pairs that the same parts are measured with, their direction as long as ΔU.

    Raises CutawayError: an answer that is not one token, a position outside a prompt, logits that are NaN, a
    granularity whose sites the model lacks, and parts that do not sum to the model's logit difference within
    `TOLERANCE` (the model does something that its sites do not account for).
    """
    if by not in GRANULARITIES:
        raise CutawayError(f"by={by!r} is not one of {', '.join(GRANULARITIES)}.")
    if controls < 1:
        raise CutawayError(f"controls={controls}: at least one random token pair is needed beside a share.")
    tokens = lm.tokens(inputs, bos=bos)
    positions = [position] * len(tokens) if isinstance(position, int) else [int(p) for p in position]
    if len(positions) != len(tokens):
        raise CutawayError(f"{len(positions)} positions for {len(tokens)} prompts; give one, or one a prompt.")
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
        raise CutawayError(
            f"The parts by {by} of {lm.name} miss its logit difference by {attribution.relative_error:.1e} of their "
            f"size (allowed {allowed:.0e}): the model adds something that its sites do not account for, so its "
            f"attribution is not shown. `cutaway check {lm.name}` says where."
        )
    return attribution
