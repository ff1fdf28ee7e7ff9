"""Scores of every head with their controls, as values: what each kind means, and when a head carries its label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import NotSupported
from cutaway.artifacts.results import Control, Effect
from cutaway.artifacts.statistics import false_discovery, paired_t_p, ratio_intervals
from cutaway.draw.page import Section, sections_html
from cutaway.draw.result import Result
from cutaway.model.language_model import LanguageModel
from cutaway.observe.heads.maps import BALANCE, SHARE, head_map, meaning
from cutaway.observe.heads.report import Head, name
from cutaway.observe.summaries import block

THRESHOLDS: dict[str, float] = {
    "relative-position": 0.5,
    "absolute-position": 0.5,
    "induction-copying": 0.05,
    "copying": 0.5,
}
"""The least score that carries a label (0.1 where it is not here), beside the rule that it be above its control."""
THRESHOLD = 0.1


@dataclass(frozen=True, eq=False, repr=False)
class KindScores(Result):
    """One kind of score for every head, and the same head's control.

    NaN: the layer has no such value, or no row has its target in sight.
    """

    title: ClassVar[str] = "Attention heads of one kind"

    kind: str
    """The kind; it ends in " (text)" where it was read on the user's text."""
    score: Tensor
    """Mean over the sequences [L, H]."""
    low: Tensor
    """Lower end of its 95 % interval over sequences [L, H]."""
    high: Tensor
    """Upper end [L, H]."""
    control: Tensor
    """The same head's score where the kind says nothing [L, H]."""
    control_low: Tensor
    """Lower end of the control's interval [L, H]."""
    control_high: Tensor
    """Upper end [L, H]."""
    control_name: str
    """What the control is."""
    n: int
    """How many sequences."""
    destinations: int
    """How many tokens had a target, over all sequences."""
    uniform: Tensor | None = None
    """What attention spread evenly over all that is in sight would score [L]; None where that makes no sense."""
    units: str = "share of attention"
    """The score's units."""
    margin: float = 0.0
    """How far above its control a score must be to carry the label: 0 on random tokens, where nothing else explains
    it."""
    p: Tensor | None = None
    """p of the score against its control [L, H], two-sided (Student's t over sequences); None where there is none."""

    def summary(self) -> str:
        """The five strongest heads beside their controls."""
        kept = [head for head, _ in self.top(5)]
        labelled = len(self.heads())
        lines = [
            f"{self.kind}: {meaning(self.kind)}",
            f"  {self.n} sequences, {self.destinations:,} tokens with a target; control: {self.control_name}",
            f"  labelled: {labelled} of {self.score.numel()} heads",
        ]
        for head in kept:
            effect, q = self.effect(head), self.q_of(head)
            control = effect.controls[0]
            said = "" if q != q else f", q {q:.2g}"
            lines.append(f"  {name(head):<7}{effect.figure(2):<20} control {control.figure(2)}{said}")
        return block(lines)

    def rows(self) -> list[dict[str, Any]]:
        """One row per head: score and control with their intervals, p, q, and whether it carries the label."""
        carries, q = self.labelled(), self.q
        grids = ("score", "low", "high", "control", "control_low", "control_high")
        layers, heads = self.score.shape
        return [
            {"kind": self.kind, "layer": i, "head": j}
            | {grid: _known(getattr(self, grid)[i, j].item()) for grid in grids}
            | {"p": None if self.p is None else _known(self.p[i, j].item())}
            | {"q": None if q is None else _known(q[i, j].item()), "labelled": bool(carries[i, j])}
            for i in range(layers)
            for j in range(heads)
        ]

    def drawing(self) -> Markup:
        """A map of the heads, the labelled ones outlined."""
        return sections_html([kind_section(self)])

    @property
    def q(self) -> Tensor | None:
        """The rate of false discoveries among all heads of the model with a p as small [L, H]."""
        return None if self.p is None else torch.from_numpy(false_discovery(self.p.numpy()))

    def q_of(self, head: Head) -> float:
        """`q` of one head; NaN where there is none.

        Args:
            head: (layer, head).
        """
        return float("nan") if self.q is None else self.q[head].item()

    @property
    def threshold(self) -> float:
        """The least score that carries the label."""
        return THRESHOLDS.get(self.kind, THRESHOLD)

    @property
    def judged(self) -> bool:
        """Whether there are intervals to judge by: one sequence has none, and then no head carries a label."""
        return not bool(self.low.isnan().all())

    def labelled(self) -> Tensor:
        """Which heads carry the label [L, H]: the score is at least `threshold`, and the lower end of its interval lies
        above the upper end of its control's; and by `margin` above the control. A score without an interval (one
        sequence) labels nothing.
        """
        apart = (self.low > self.control_high) & (self.score - self.control >= self.margin)
        return (self.score >= self.threshold) & apart

    def heads(self) -> list[Head]:
        """The labelled heads, largest score first."""
        chosen = self.labelled()
        return [head for head, _ in self.top(self.score.numel()) if bool(chosen[head])]

    def top(self, k: int = 3) -> list[tuple[Head, float]]:
        """The heads with the largest score, largest first; heads without one are left out.

        Args:
            k: how many.

        Returns:
            ((layer, head), score), k of them at most.
        """
        values, flat = self.score.nan_to_num(-torch.inf).flatten().sort(descending=True, stable=True)
        kept = [(i, v) for i, v in zip(flat.tolist(), values.tolist(), strict=True) if v > -torch.inf][:k]
        return [(divmod(i, self.score.shape[1]), v) for i, v in kept]

    def effect(self, head: Head) -> Effect:
        """One head's score as a value with its evidence.

        Args:
            head: (layer, head).
        """
        controls = [
            Control(
                self.control_name,
                self.control[head].item(),
                _pair(self.control_low[head], self.control_high[head]),
                self.n,
            )
        ]
        if self.uniform is not None:
            controls.append(Control("even attention", self.uniform[head[0]].item()))
        return Effect(
            name=f"{self.kind} score of {name(head)}",
            value=self.score[head].item(),
            n=self.n,
            interval=_pair(self.low[head], self.high[head]),
            controls=tuple(controls),
            ablation="none",
            units=self.units,
        )

    def to_json(self) -> dict[str, Any]:
        """Everything as lists; NaN becomes None."""
        grids = ("score", "low", "high", "control", "control_low", "control_high")
        return {
            "kind": self.kind,
            "meaning": meaning(self.kind),
            "units": self.units,
            "n": self.n,
            "rows": self.destinations,
            "least": self.threshold,
            "margin": self.margin,
            "control_name": self.control_name,
            **{grid: _lists(getattr(self, grid)) for grid in grids},
            "p": None if self.p is None else _lists(self.p),
            "q": None if self.q is None else _lists(self.q),
            "uniform": None if self.uniform is None else _lists(self.uniform),
            "labelled": [list(head) for head in self.heads()],
        }

    def __str__(self) -> str:
        best = "  ".join(f"{name(head)} {value:.2f}" for head, value in self.top())
        return f"{self.kind}: {best} ({self.n} sequences, {self.destinations} rows; control: {self.control_name})"


def _pair(low: Tensor, high: Tensor) -> tuple[float, float] | None:
    return None if bool(low.isnan()) or bool(low == high) else (low.item(), high.item())


def _lists(values: Tensor) -> Any:
    """A tensor as nested lists, NaN as None."""
    if values.ndim > 1:
        return [_lists(row) for row in values]
    return [_known(value) for value in values.tolist()]


def _known(value: float) -> float | None:
    return None if value != value else value


def attention_layers(lm: LanguageModel, *sites: str) -> tuple[list[int], dict[int, str]]:
    """Layers that have these sites of attention (by default "pattern" and "z"), and why the others lack them.

    Raises NotSupported when no layer has them.
    """
    needed = {f"blocks.{{l}}.attn.{site}" for site in sites or ("pattern", "z")}
    absent = {
        site.layer: site.absent
        for site in lm.sites()
        if site.kind.name in needed and site.layer is not None and site.absent is not None
    }
    layers = [layer for layer in range(lm.n_layers) if layer not in absent]
    if not layers:
        raise NotSupported(f"{lm.name} has no attention heads to read in any layer: {next(iter(absent.values()))}.")
    return layers, absent


# Means over sequences ----------------------------------------------------------------------------------------------


def ratio_interval(above: Tensor, below: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ above / Σ below over sequences, and its 95 % interval (`artifacts.statistics.ratio_intervals`).

    Both are [n, ...]; NaN where Σ below is 0, and no interval (NaN) for fewer than two sequences.
    """
    above, below = above.double(), below.double().expand_as(above)
    low, high = ratio_intervals(above.movedim(0, -1).numpy(), below.movedim(0, -1).numpy())
    return above.sum(0) / below.sum(0), torch.from_numpy(low), torch.from_numpy(high)


def paired_p(above: Tensor, below: Tensor, control_above: Tensor, control_below: Tensor) -> Tensor:
    """Two-sided p of Σ above / Σ below against the control's ratio over the same sequences, all [n, ...].

    Student's t of what each sequence adds to the difference of the two ratios, to first order.
    """
    value, other = above.sum(0) / below.sum(0), control_above.sum(0) / control_below.sum(0)
    adds = (above - value * below) / below.mean(0) - (control_above - other * control_below) / control_below.mean(0)
    return torch.from_numpy(paired_t_p((adds + value - other).double().movedim(0, -1).numpy()))


class Sums:
    """Numerators and denominators of a score and of its control, one entry per sequence: [n, L, H]."""

    def __init__(self, n: int, lm: LanguageModel) -> None:
        shape = (n, lm.n_layers, lm.n_heads)
        self.above, self.below, self.control_above, self.control_below = (
            torch.zeros(shape, dtype=torch.float64) for _ in range(4)
        )
        self.uniform = torch.zeros(n, lm.n_layers, dtype=torch.float64)

    def scores(
        self, kind: str, control_name: str, units: str = "share of attention", even: bool = True, margin: float = 0.0
    ) -> KindScores:
        score, low, high = ratio_interval(self.above, self.below)
        control, control_low, control_high = ratio_interval(self.control_above, self.control_below)
        rows = self.below[:, :, 0]
        return KindScores(
            kind, score, low, high, control, control_low, control_high, control_name,
            n=len(self.above),
            destinations=int(rows.sum(0).max()),
            uniform=self.uniform.sum(0) / rows.sum(0) if even else None,
            units=units,
            margin=margin,
            p=paired_p(self.above, self.below, self.control_above, self.control_below),
        )  # fmt: skip


def kind_section(scores: KindScores) -> Section:
    """A map of one kind of score."""
    what = f"{meaning(scores.kind)}. Control: {scores.control_name}. Labelled heads are outlined."
    scale = BALANCE if scores.kind == "copying" else SHARE
    drawing = head_map(scores.score, scores.units, scores.kind, scale, scores.heads())
    return f"{scores.kind} heads", what, drawing
