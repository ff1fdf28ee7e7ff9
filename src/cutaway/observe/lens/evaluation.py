"""How far a lens is from what the model says, layer by layer, on text that it was not trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.progress import Progress
from cutaway.artifacts.results import Control, Effect, figure_text
from cutaway.artifacts.statistics import bootstrap_interval, false_discovery, paired_t_p
from cutaway.draw.charts import Series, line_legend, line_svg
from cutaway.draw.page import Section, sections_html
from cutaway.draw.panels import table_html
from cutaway.draw.result import Result
from cutaway.draw.text import interval
from cutaway.model.language_model import LanguageModel
from cutaway.observe.lens.logit_lens import stream_sites
from cutaway.observe.lens.tuned_lens import TunedLens, lens_kl, lens_streams
from cutaway.observe.lens.view import short_site, without_first
from cutaway.observe.summaries import block, ends, spread

_ROWS_AT_ONCE = 8


@dataclass(frozen=True, eq=False, repr=False)
class LensEvaluation(Result):
    """Mean KL(final || lens) in nats per row of text: of the tuned lens, beside the logit lens (the control)."""

    title: ClassVar[str] = "A tuned lens on held-out text"

    model: str
    """The model's name."""
    layers: tuple[str, ...]
    """The L sites before the last layer's output, where both lenses are exact."""
    logit: Tensor
    """KL of the logit lens, float64 [L, n rows]."""
    tuned: Tensor
    """KL of the tuned lens, float64 [L, n rows]."""
    constant: Tensor
    """KL [n rows] of the best that needs no input at all, the mean of the model's answers over all these tokens: a
    lens above it reads nothing."""
    tokens: int
    """How many tokens were counted."""

    def summary(self) -> str:
        """KL of both lenses at eight layers or fewer."""
        effects = self.effects()
        lines = [f"KL(final ‖ lens) in nats, {self.model}, {self.logit.shape[1]} held-out rows, {self.tokens:,} tokens"]
        for i in spread(len(effects), 8):
            tuned, logit = effects[i], effects[i].controls[0]
            lines.append(f"  {self.layers[i]:<21} tuned {tuned.figure(2)}, logit lens {logit.figure(2)}")
        lines.append(f"  mean answer, no input: {float(self.constant.mean()):.2f}")
        return block(lines)

    def rows(self) -> list[dict[str, Any]]:
        """One row per layer: KL of both lenses with 95 % intervals, and the q of their difference."""
        found = []
        for layer, effect, q in zip(self.layers, self.effects(), self.q, strict=True):
            control = effect.controls[0]
            found.append(
                {"site": layer, "tuned": effect.value, **ends(effect.interval, "tuned_")}
                | {"logit": control.value, **ends(control.interval, "logit_")}
                | {"no_input": effect.controls[1].value, "q": q, "n": effect.n}
            )
        return found

    def drawing(self) -> Markup:
        """KL over the layers, with bands, and the table."""
        return sections_html([evaluation_section(self)])

    def effects(self) -> list[Effect]:
        """One result per layer: the tuned lens's KL, beside the logit lens's."""
        n = self.logit.shape[1]
        return [
            Effect(
                name=f"KL(final ‖ tuned lens) at {layer}",
                value=float(tuned.mean()),
                n=n,
                interval=bootstrap_interval(tuned.numpy()),
                controls=(
                    Control("logit lens", float(logit.mean()), bootstrap_interval(logit.numpy()), n),
                    Control("mean answer, no input", float(self.constant.mean()), None, n),
                ),
                ablation="none",
                units="nats",
            )
            for layer, tuned, logit in zip(self.layers, self.tuned, self.logit, strict=True)
        ]

    @property
    def q(self) -> tuple[float, ...]:
        """For each layer: the rate of false discoveries among all whose two lenses differ as surely (Student's t)."""
        return tuple(false_discovery(paired_t_p((self.logit - self.tuned).numpy())).tolist())

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "rows": self.logit.shape[1],
            "tokens": self.tokens,
            "effects": [effect.to_json() for effect in self.effects()],
            "mean_difference": [
                {"layer": layer, "value": float(gap.mean()), "interval": list(bootstrap_interval(gap.numpy())), "q": q}
                for layer, gap, q in zip(self.layers, self.logit - self.tuned, self.q, strict=True)
            ],
        }

    def __str__(self) -> str:
        n = self.logit.shape[1]
        lines = [
            f"KL(final ‖ lens) in nats, {self.model}, {n} held-out rows, {self.tokens:,} tokens [95 % over rows]",
            f"  {'':<22}{'logit lens':>24}{'tuned lens':>24}{'logit − tuned':>24}{'q':>9}",
        ]
        for layer, logit, tuned, q in zip(self.layers, self.logit, self.tuned, self.q, strict=True):
            cells = []
            for values in (logit, tuned, logit - tuned):
                cells.append(figure_text(float(values.mean()), bootstrap_interval(values.numpy())))
            lines.append(f"  {layer:<22}" + "".join(f"{cell:>24}" for cell in cells) + f"{q:>9.2g}")
        lines.append(f"  mean answer, no input: {float(self.constant.mean()):.3f}")
        return "\n".join(lines)


def evaluate_lens(lm: LanguageModel, lens: TunedLens, rows: Tensor) -> LensEvaluation:
    """Measure logit lens and tuned lens on text that the lens was not trained on.

    Each row's first token and BOS are left out, as in training.

    Args:
        lm: the model.
        lens: a tuned lens of this model.
        rows: token ids [n, p], two rows or more.

    Returns:
        The KL of both lenses per layer and row.

    Raises:
        CutawayError: a lens of another model, and fewer than two rows, which have no interval.
    """
    lens.check(lm)
    if len(rows) < 2:
        raise CutawayError("A lens is judged on two held-out rows or more; give more text.")
    rows = rows.to(lm.device)
    sites = stream_sites(lm)[:-1]
    sums = torch.zeros(2, len(sites), len(rows), dtype=torch.float64)
    counts = torch.zeros(len(rows), dtype=torch.float64)
    entropy = torch.zeros(len(rows), dtype=torch.float64)
    mass = torch.zeros(len(rows), lm.d_vocab)
    with Progress("judging the lens", total=len(rows), unit="rows") as progress, torch.no_grad():
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            piece = rows[start : start + _ROWS_AT_ONCE]
            for row, streams, final in lens_streams(lm, piece):
                where = row.cpu() + start
                counts.index_add_(0, where, torch.ones(len(where), dtype=torch.float64))
                p = final.exp()
                surprise = torch.where(p > 0, p * final, torch.zeros((), device=p.device)).sum(-1)
                entropy.index_add_(0, where, surprise.double().cpu())
                mass.index_add_(0, where, p.cpu())
                for i, (site, stream) in enumerate(zip(sites, streams, strict=True)):
                    for which, read in enumerate((stream, lens.translate(site, stream))):
                        kl = lens_kl(lm.unembed(read).float().log_softmax(-1), final)
                        sums[which, i].index_add_(0, where, kl.double().cpu())
            progress.advance(len(piece))
    mean = (mass.sum(0).double() / counts.sum()).clamp(min=1e-30)
    constant = (entropy - mass.double() @ mean.log()) / counts
    logit, tuned = sums / counts
    names = ("embed", *sites[1:])
    return LensEvaluation(lm.name, names, logit, tuned, constant, int(counts.sum()))


def evaluation_section(found: LensEvaluation) -> Section:
    """Logit lens (the control) and tuned lens on held-out text, with intervals over its rows."""
    layers = list(range(len(found.layers)))
    effects = found.effects()
    tuned: Series = {
        "name": "tuned lens",
        "x": layers,
        "y": [effect.value for effect in effects],
        "low": [_end(effect.interval, 0) for effect in effects],
        "high": [_end(effect.interval, 1) for effect in effects],
    }
    controls = [effect.controls[0] for effect in effects]
    logit: Series = {
        "name": "logit lens",
        "x": layers,
        "y": [control.value for control in controls],
        "low": [_end(control.interval, 0) for control in controls],
        "high": [_end(control.interval, 1) for control in controls],
        "control": True,
    }
    constant: Series = {
        "name": "mean answer, no input",
        "x": layers,
        "y": [float(found.constant.mean())] * len(layers),
        "control": True,
    }
    series = [tuned, logit, constant]
    rows = [
        [short_site(layer), *(_interval(one) for one in (effect, effect.controls[0])), f"{q:.2g}"]
        for layer, effect, q in zip(found.layers, effects, found.q, strict=True)
    ]
    table = table_html(columns=("", "tuned lens", "logit lens", "q of the difference"), rows=rows, title="KL by layer")
    note = ""
    if len(layers) > 2:
        series = [without_first(one) for one in series]
        note = " The embedding, where the logit lens is far off, is in the table alone."
    text = (
        f"Mean KL(final ‖ lens) on {found.logit.shape[1]} rows ({found.tokens:,} tokens) that the lens was not trained "
        f"on; bands are 95 % intervals over rows.{note}"
    )
    drawing = line_svg(series=series, title="KL by layer", x_label="layers passed", y_label="KL(final ‖ lens), nats")
    figure = Markup(f'<div style="max-width:620px">{drawing}{line_legend(series)}</div>')
    return ("On held-out text", text, figure + table)


def _interval(one: Effect | Control) -> str:
    low, high = one.interval or (None, None)
    return interval(one.value, low, high)


def _end(interval: tuple[float, float] | None, which: int) -> float | None:
    return None if interval is None else interval[which]
