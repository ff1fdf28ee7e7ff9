"""What is lost without each head: every head ablated alone, many of them in one batch.

A pattern is not a cause. The heads of one layer are ablated in the rows of one batch (`rows=`) that resumes at their
layer, so that the layers below are not run again and a model takes a few forwards per layer instead of one per head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CutawayError, NoSuchSite
from cutaway.artifacts.progress import Progress
from cutaway.artifacts.results import Control, Effect
from cutaway.artifacts.statistics import bootstrap_interval, false_discovery, paired_t_p
from cutaway.draw.page import Section, sections_html
from cutaway.draw.result import Result
from cutaway.draw.scale import Scale
from cutaway.model.edits.edits import Edit, mean, zero
from cutaway.model.forward.run import Run
from cutaway.model.language_model import Inputs, LanguageModel
from cutaway.model.tokens import Tokens, next_tokens
from cutaway.observe.heads.kinds import attention_layers, ratio_interval
from cutaway.observe.heads.maps import head_map
from cutaway.observe.heads.report import Ablation, Head, RunMetric, name, second_half_loss
from cutaway.observe.summaries import block, ends

BATCH_BYTES = 256 * 2**20
"""What one batch may hold of logits and of one layer's patterns."""


def text_loss(run: Run) -> Tensor:
    """Mean next-token loss in nats of each row, over its real tokens but the first.

    Args:
        run: with the logits of every token.

    Returns:
        [b].
    """
    logits = run.all_logits
    ids, mask = run.tokens.ids.to(logits.device), run.tokens.mask.to(logits.device)
    log_p = logits[:, :-1].float().log_softmax(-1)
    following, counted = next_tokens(ids, mask, log_p.shape[-1])
    loss = -log_p.gather(-1, following[..., None])[..., 0]
    return ((loss * counted).sum(-1) / counted.sum(-1).clamp(min=1)).cpu()


@dataclass(frozen=True, eq=False, repr=False)
class HeadEffects(Result):
    """How much a metric changes when each head alone is ablated."""

    title: ClassVar[str] = "What is lost without each head"

    model: str
    """The model's name."""
    change: Tensor
    """Each row's change [L, H, b]; NaN where a head was not ablated."""
    base: Tensor
    """The metric of the untouched model [b]."""
    ablation: str
    """"mean" or "zero"."""
    units: str
    """The metric's units."""

    def summary(self) -> str:
        """The eight heads whose ablation changes the metric by the largest mean."""
        kept = sorted(self._measured(), key=lambda head: -abs(self.mean[head].item()))[:8]
        control = self.others([h for h in self._measured() if h not in kept], "mean of the other heads")
        lines = [
            f"{self.ablation} ablation of each head of {self.model}, alone, on {len(self.base)} rows",
            f"  change in {self.units}; {self.base.mean().item():.3f} untouched",
        ]
        for head in kept:
            effect = self.effect(head, None)
            lines.append(f"  {name(head):<7}{effect.figure(3)}")
        return block([*lines, *([] if control is None else [f"  {control.name}: {control.value:.3f}"])])

    def rows(self) -> list[dict[str, Any]]:
        """One row per head that was ablated: mean change, 95 % interval over rows, q."""
        effects = {head: self.effect(head, None) for head in self._measured()}
        return [
            {"layer": head[0], "head": head[1], "ablation": self.ablation, "change": effect.value}
            | {**ends(effect.interval), "q": self.q[head].item(), "n": effect.n, "units": self.units}
            for head, effect in effects.items()
        ]

    def drawing(self) -> Markup:
        """A map of the heads."""
        return sections_html([effects_section(self)])

    def _measured(self) -> list[Head]:
        return [(i, j) for i, j in (~self.mean.isnan()).nonzero().tolist()]

    @cached_property
    def intervals(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean change over rows and its 95 % interval over rows, each [L, H]."""
        return ratio_interval(self.change.movedim(-1, 0), torch.ones(len(self.base), 1, 1))

    @property
    def mean(self) -> Tensor:
        """Mean change over rows [L, H]."""
        return self.change.mean(-1)

    @cached_property
    def q(self) -> Tensor:
        """The rate of false discoveries [L, H] among all heads whose change is as sure (Student's t over rows)."""
        return torch.from_numpy(false_discovery(paired_t_p(self.change.double().numpy())))

    def others(self, heads: Sequence[Head], label: str) -> Control | None:
        """The same ablation of other heads, each alone: their mean, with an interval over heads.

        Args:
            heads: (layer, head) pairs.
            label: the control's name.

        Returns:
            The control, None where none of these heads was ablated.
        """
        values = [v for v in (self.mean[head].item() for head in heads) if v == v]
        if not values:
            return None
        interval = bootstrap_interval(values) if len(values) > 1 else None
        return Control(label, sum(values) / len(values), interval, len(values))

    def effect(self, head: Head, others: Control | None) -> Effect:
        """One head's effect beside that of other heads.

        Args:
            head: (layer, head).
            others: what `others` gives.
        """
        value, low, high = (part[head].item() for part in self.intervals)
        untouched = Control("not ablated", 0.0, None, len(self.base))
        return Effect(
            name=f"ablate {name(head)}",
            value=value,
            n=len(self.base),
            interval=None if low != low else (low, high),
            controls=(untouched,) if others is None else (others, untouched),
            ablation=f"{self.ablation} ablation",
            units=self.units,
        )

    def to_json(self) -> dict[str, Any]:
        values = self.mean.tolist()
        return {
            "ablation": self.ablation,
            "units": self.units,
            "n": len(self.base),
            "base": self.base.mean().item(),
            "mean": [[None if v != v else v for v in row] for row in values],
            "q": [[None if v != v else v for v in row] for row in self.q.tolist()],
        }


def ablate_each_head(
    lm: LanguageModel,
    inputs: Inputs,
    metric: RunMetric = second_half_loss,
    *,
    ablations: Sequence[Ablation] = ("mean", "zero"),
    heads: Sequence[Head] | None = None,
    units: str = "nats of loss on the second copy",
    batch_bytes: int = BATCH_BYTES,
) -> dict[str, HeadEffects]:
    """The change of a metric when each head alone is ablated.

    Several heads of a layer share a batch; the result is that of one forward per head, but for the kernels' rounding.

    Args:
        lm: the model.
        inputs: the prompts.
        metric: a run of exactly these prompts, with their logits, to one number per row [b].
        ablations: "mean" puts the head's mean z over the real tokens of `inputs` in its place, "zero" puts zero.
        heads: (layer, head) pairs; all if None.
        units: of the metric.
        batch_bytes: what one batch may hold of logits and of one layer's patterns.

    Returns:
        The effects, by ablation.

    Raises:
        NoSuchSite: a head that the model has not.
        CutawayError: a metric that is not one number per row.
    """
    tokens = lm.tokens(inputs)
    layers, _ = attention_layers(lm)
    chosen = [(layer, head) for layer in layers for head in range(lm.n_heads)] if heads is None else list(heads)
    for layer, head in chosen:
        if layer not in layers or not 0 <= head < lm.n_heads:
            raise NoSuchSite(
                f"{lm.name} has no head {name((layer, head))}; it has {lm.n_heads} in each of the layers {layers}."
            )
    base = lm.run(tokens, capture=["blocks.*.resid_pre", "blocks.*.attn.z"], logits="all")
    means = {layer: base[f"blocks.{layer}.attn.z"][tokens.mask].mean(0) for layer in layers}
    before = _measured(metric, base)
    shape = (lm.n_layers, lm.n_heads, len(tokens))
    change = {ablation: torch.full(shape, torch.nan, dtype=torch.float64) for ablation in ablations}
    b, p = tokens.ids.shape
    row_bytes = 4 * p * (lm.d_vocab + 2 * lm.n_heads * p + 8 * lm.d_model)
    at_once = max(1, batch_bytes // (b * row_bytes))
    with Progress("ablating heads", total=len(chosen) * len(change), unit="heads") as progress:
        for layer in sorted({layer for layer, _ in chosen}):
            cells = [(ablation, head) for ablation in change for at, head in chosen if at == layer]
            for start in range(0, len(cells), at_once):
                part = cells[start : start + at_once]
                edits = [
                    _edit(layer, head, ablation, means, range(i * b, (i + 1) * b))
                    for i, (ablation, head) in enumerate(part)
                ]
                source = _tiled(base, f"blocks.{layer}.resid_pre", len(part))
                run = lm.run(source.tokens, edits=edits, logits="all", resume=source)
                for i, (ablation, head) in enumerate(part):
                    rows = slice(i * b, (i + 1) * b)
                    seen = replace(run, tokens=tokens, logits=run.all_logits[rows], receipts=(run.receipts[i],))
                    change[ablation][layer, head] = _measured(metric, seen) - before
                progress.advance(len(part))
    return {a: HeadEffects(lm.name, values, before, a, units) for a, values in change.items()}


def _edit(layer: int, head: int, ablation: str, means: dict[int, Tensor], rows: Sequence[int]) -> Edit:
    site = f"blocks.{layer}.attn.z"
    if ablation == "zero":
        return zero(site, heads=head, rows=list(rows))
    if ablation == "mean":
        return mean(site, means[layer][[head]], heads=head, rows=list(rows))
    raise CutawayError(f"ablation={ablation!r} is not 'mean' or 'zero'.")


def _tiled(run: Run, site: str, times: int) -> Run:
    """The run as if its batch had been given several times over, holding one site: something to resume from."""
    order = list(range(len(run.tokens))) * times
    tokens: Tokens = run.tokens[order]
    return replace(run, tokens=tokens, logits=None, captured={site: run[site].repeat(times, 1, 1)})


def _measured(metric: RunMetric, run: Run) -> Tensor:
    values = metric(run)
    if not isinstance(values, Tensor) or values.shape != (len(run.tokens),):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise CutawayError("The metric of an ablation returns one number for each row of the run, as a tensor.")
    return values.detach().double().cpu()


def effects_section(effects: HeadEffects, behaviour: str = "", same: Sequence[HeadEffects] = ()) -> Section:
    """A map of what each head's ablation changes, on one scale with `same`, others in the same units."""
    heading = f"{effects.ablation.capitalize()} ablation" + (f": {behaviour}" if behaviour else "")
    what = f"Change in {effects.units} when that head alone is ablated, mean over {len(effects.base)} rows."
    means = [one.mean for one in same or [effects]]
    reach = max(float(mean[~mean.isnan()].abs().max()) for mean in means) or 1.0
    units = "nats" if effects.units.startswith("nats") else effects.units
    return heading, what, head_map(effects.mean, units, heading, Scale(-reach, reach, True))
