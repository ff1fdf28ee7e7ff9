"""What direct logit attribution gives: the share of each part in a logit, beside other pairs of answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.results import Control, Effect, figure_text, interval_text
from cutaway.artifacts.statistics import bootstrap_interval
from cutaway.draw.charts import Bar, bars_html
from cutaway.draw.heatmap import heatmap_html
from cutaway.draw.page import Section, sections_html
from cutaway.draw.panels import figures_html, fold, table_html
from cutaway.draw.result import Result
from cutaway.draw.tokens import TokenRow, tokens_html
from cutaway.model.tokens import Tokens
from cutaway.observe.attribution.answers import (
    Wrong,
    differences,
)
from cutaway.observe.attribution.parts import (
    By,
    Group,
)
from cutaway.observe.summaries import block, ends

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}
"""How far the parts may miss the logit difference, relative to the largest part."""


_NOT_A_CAUSE = (
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
            share = figure_text(part.value, part.interval)
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
            "notes": [*self.notes, _NOT_A_CAUSE],
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
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes), f"  {_NOT_A_CAUSE}"])


def _headline(result: Attribution) -> str:
    n = len(result.total)
    compared = f"{result.answers[0]!r}" + (f" minus {result.wrong[0]}" if result.wrong[0] else "")
    what = f"logit of {compared}" if n == 1 else f"logit difference over {n} prompts (first: {compared})"
    return f"direct logit attribution by {result.by}, {result.model}: {what}"


_SHOWN = 20


def attribution_sections(result: Attribution, shown: int = _SHOWN) -> list[Section]:
    """Totals, the largest parts with their controls, and layer by layer drawings."""
    sections = [_totals(result), _parts(result, shown)]
    sections += _layers(result)
    if result.by == "source":
        sections.append(_sources(result))
    return sections


def compared(result: Attribution) -> str:
    """What was attributed, as a phrase."""
    n = len(result.total)
    words = f"the logit of {result.answers[0]!r}"
    if result.wrong[0]:
        words += f" minus {result.wrong[0]}" if result.wrong_ids[0] == "mean" else f" minus that of {result.wrong[0]}"
    return words if n == 1 else f"{words} (prompt 1 of {n})"


def _totals(result: Attribution) -> Section:
    mean = float(result.total.mean())
    detail = "mean over the prompts" if len(result.total) > 1 else "at the attributed position"
    what = "the model's difference" if result.wrong[0] else "the model's logit"
    items = [
        {"label": what, "value": mean, "detail": detail},
        {"label": "sum of the parts", "value": float(result.values.sum(1).mean()), "detail": "frozen norms"},
        {"label": "largest error", "value": float(result.error.abs().max()), "detail": "of the sum"},
    ]
    if result.softcap is not None:
        capped = float(result.total_capped.mean())
        items.append({"label": "after the softcap", "value": capped, "detail": f"tanh, {result.softcap:g}"})
    notes = " ".join([*(f"Note: {note}." for note in result.notes), _NOT_A_CAUSE])
    return ("The parts add up", notes, figures_html(items=items))  # type: ignore[arg-type]


def _parts(result: Attribution, shown: int) -> Section:
    parts = result.top(shown)
    bars: list[Bar] = []
    for part in parts:
        low, high = part.interval or (None, None)
        controls: list[Bar] = [{"label": "random pairs", "value": part.control}]
        bars.append({"label": part.name, "value": part.value, "low": low, "high": high, "controls": controls})
    cells = [[part.name, part.value, part.control, interval_text(part.control_range, to=True)] for part in parts]
    rest = float(result.values.mean(0).sum()) - sum(part.value for part in parts)
    left = result.values.shape[1] - len(parts)
    text = (
        f"Each part's share of {compared(result)}. The control is the same part's mean |share| for "
        f"{result.n_controls} random token pairs whose direction is as long: a part near its control writes much in "
        "every direction."
    )
    text += f" What is not shown ({left:,} {'part' if left == 1 else 'parts'}) adds {rest:+.3f}." if left else ""
    text += f" Intervals are over {len(result.total)} prompts." if len(result.total) > 1 else ""
    table = table_html(
        columns=("part", "share", "control: random pairs", "middle 95 %"), rows=cells, title="shares and controls"
    )
    return ("The largest shares", text, bars_html(items=bars, units="logits") + fold("As a table", table))


def _layers(result: Attribution) -> list[Section]:
    """A heatmap of layer by head, or of layer by attention and MLP."""
    kinds = {group.kind for group in result.groups}
    layers = sorted({group.layer for group in result.groups if group.layer is not None})
    values: list[list[float | None]] = []
    columns: list[str] = []
    if result.by == "head" and not result.notes:
        values = [row.tolist() for row in result.by_layer("head")]
        columns = [f"H{i}" for i in range(len(values[0]))]
    else:
        values = [[] for _ in layers]
    splits = {"head": ["head"], "source": ["source"], "neuron": ["attention", "neuron"], "component": []}[result.by]
    extra = [] if columns else splits
    extra = [*extra, *(k for k in ("attention", "attention bias", "MLP", "MLP bias") if k in kinds and k not in extra)]
    for row, layer in zip(values, layers, strict=True):
        row += [_of(result, kind, layer) for kind in extra]
    names = {"head": "heads", "source": "sources", "neuron": "neurons", "attention bias": "attn bias"}
    drawing = heatmap_html(
        rows=[f"L{layer}" for layer in layers],
        columns=[*columns, *(names.get(kind) or kind for kind in extra)],
        values=values,
        title="direct shares by layer",
        units="logits",
        scale="diverging",
    )
    about = "Direct shares by layer" + (": every head, and what else writes." if columns else ".")
    return [("Layer by layer", about, drawing)]


def _of(result: Attribution, kind: str, layer: int) -> float | None:
    found = [float(g.values[:, 0].mean(0).sum()) for g in result.groups if g.kind == kind and g.layer == layer]
    return sum(found) if found else None


def _sources(result: Attribution) -> Section:
    """The prompt, each token tinted by what attention brings from it."""
    rows: list[TokenRow] = []
    shares = result.by_source()
    for row in range(min(len(shares), 8)):
        first, words = int(result.tokens.first[row]), result.tokens.strings[row]
        values = shares[row, first : first + len(words)].tolist()
        shown: list[float | None] = [v if i <= result.position[row] else None for i, v in enumerate(values)]
        rows.append({"tokens": list(words), "values": shown, "label": f"prompt {row + 1}"})
    text = "What attention, in all heads and layers, writes directly into the difference from each token it reads."
    drawing = tokens_html(rows=rows, units="logits")
    if len(shares) == 1:
        text += " Below, layer by layer."
        drawing += _by_layer_and_source(result)
    return ("Where attention brings it from", text, drawing)


def _by_layer_and_source(result: Attribution) -> Markup:
    """Layer by source position of the first prompt, heads together, up to the attributed position."""
    words = result.tokens.strings[0][: result.position[0] + 1]
    first, width = int(result.tokens.first[0]), result.tokens.ids.shape[1]
    groups = [group for group in result.groups if group.kind == "source"]
    values = [
        group.values[0, 0].unflatten(0, (-1, width)).sum(0)[first : first + len(words)].tolist() for group in groups
    ]
    return heatmap_html(
        rows=[f"L{group.layer}" for group in groups],
        columns=list(words),
        values=values,
        title="direct share by layer and source token",
        units="logits",
        scale="diverging",
    )
