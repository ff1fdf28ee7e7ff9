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
from typing import Any, ClassVar

import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CutawayError, NotSupported
from cutaway.artifacts.results import Control, Effect, interval_text
from cutaway.artifacts.statistics import bootstrap_interval
from cutaway.draw.page import sections_html
from cutaway.draw.result import Result
from cutaway.model.language_model import Inputs, LanguageModel
from cutaway.model.tokens import Tokens
from cutaway.observe.attribution.answers import (
    Answer,
    Wrong,
    WrongAnswer,
    answer_ids,
    differences,
    in_words,
    prompt_ids,
    wrong_ids,
)
from cutaway.observe.attribution.parts import (
    GRANULARITIES,
    By,
    Group,
    difference_directions,
    split_difference,
)
from cutaway.observe.summaries import block, ends, with_interval

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}
"""How far the parts may miss the logit difference, relative to the largest part."""

NOT_A_CAUSE = (
    "A share is what a part writes directly, the final scale frozen. It is not what the answer would lose without the "
    "part: later layers read it, and may make up for it."
)


@dataclass(frozen=True)
class Part:
    """One part's share of a logit difference."""

    name: str
    """What the part is called, such as "L3H7"."""
    kind: str
    """What it is, such as "head" or "MLP"."""
    layer: int | None
    """Its layer, None for embeddings and final biases."""
    index: int
    """Its number among the parts of its kind in its layer."""
    value: float
    """Mean share over the prompts, in logits."""
    interval: tuple[float, float] | None
    """Its 95 % interval over prompts, None for one prompt."""
    control: float
    """Mean |share| of the same part for random token pairs whose direction is as long as ΔU."""
    control_range: tuple[float, float]
    """The middle 95 % of these."""


@dataclass(frozen=True, eq=False, repr=False)
class Attribution(Result):
    """The shares of a logit difference, prompt by prompt. `print` writes the table, `repr` a summary of it."""

    title: ClassVar[str] = "Direct logit attribution"

    model: str
    """The model's name."""
    by: By
    """How finely it was split."""
    tokens: Tokens
    """The b prompts."""
    position: tuple[int, ...]
    """The position of each prompt whose next token is the answer."""
    answers: tuple[str, ...]
    """The answers, as text."""
    wrong: tuple[str, ...]
    """What they were compared with, in words."""
    answer_ids: tuple[int, ...]
    """The answers' ids."""
    wrong_ids: tuple[Wrong, ...]
    """What they were compared with, as ids."""
    groups: tuple[Group, ...]
    """The parts, by kind and layer."""
    total: Tensor
    """The model's own difference before a softcap, float64 [b]."""
    total_capped: Tensor
    """The same after the softcap [b]."""
    softcap: float | None
    """The model's final softcap, if it has one."""
    n_controls: int
    """How many random token pairs."""
    seed: int
    """Of these."""
    notes: tuple[str, ...] = ()
    """What could not be split."""

    def summary(self) -> str:
        """The largest parts beside random token pairs, and the model's own difference."""
        head, what = _headline(self).split(": ", 1)
        lines = [head, f"  {what}"]
        for part in self.top(7):
            share = with_interval(part.value, part.interval, 3)
            lines.append(f"  {part.name:<24}{share:<24} random pairs {part.control:.3f}")
        n = self.values.shape[1]
        lines.append(f"  sum of {n:,} parts {float(self.values.sum(1).mean()):.3f}")
        lines.append(f"  the model {float(self.total.mean()):.3f}, largest error {float(self.error.abs().max()):.1e}")
        return block(lines)

    def rows(self) -> list[dict[str, Any]]:
        """One row per part, largest first: share, interval, control."""
        return [
            {"part": part.name, "kind": part.kind, "layer": part.layer, "index": part.index, "share": part.value}
            | {**ends(part.interval), "control": part.control, **ends(part.control_range, "control_")}
            for part in self.top()
        ]

    def drawing(self) -> Markup:
        """The largest shares with their controls, and layer by layer."""
        from cutaway.observe.attribution.view import attribution_sections

        return sections_html(attribution_sections(self))

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
        """The attributed logit difference in other logits at the same place.

        Args:
            logits: [b, V].

        Returns:
            [b].
        """
        return differences(logits, self.answer_ids, self.wrong_ids)

    def ranked(self) -> list[int]:
        """Numbers of the parts by the size of their mean share over the prompts, largest first."""
        return self.values.mean(0).abs().argsort(descending=True, stable=True).tolist()

    def locate(self, number: int) -> tuple[Group, int]:
        """The group of a part, and its index in it.

        Args:
            number: in the order of `values`.
        """
        for group in self.groups:
            n = group.values.shape[-1]
            if number < n:
                return group, number
            number -= n
        raise IndexError(number)

    def part(self, number: int) -> Part:
        """A part with its interval and control.

        Args:
            number: in the order of `values`.
        """
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
        """The parts with the largest mean share over the prompts by size, largest first.

        Args:
            k: how many; all if None.
        """
        return [self.part(number) for number in self.ranked()[:k]]

    def by_layer(self, kind: str) -> Tensor:
        """Mean shares of a kind that every layer has equally many of.

        Args:
            kind: such as "head".

        Returns:
            [layers, n].

        Raises:
            CutawayError: not every layer has such parts.
        """
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

    def effect(self, part: Part) -> Effect:
        """A part as a result beside its control.

        Args:
            part: one of this attribution.
        """
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
        )

    def to_json(self, top: int | None = None) -> dict[str, Any]:
        """Totals, errors, and parts, each with interval and control.

        Args:
            top: how many parts; all if None.
        """
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
        """The largest parts as text, with what is left over, the sum and its error.

        Args:
            k: how many parts.
        """
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
            f"attribution is not shown. `cutaway check {lm.name}` says where."
        )
    return attribution
