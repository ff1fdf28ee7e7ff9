"""Single patches of a set of prompt pairs, measured together in one sweep.

A `PatchCell` names a part (a site, one head, one neuron) and where in the prompts it is patched. `PatchSetup` holds
what all cells of one question share: the two runs, the metric of both, what is put in place. Grids, single cells and
neuron sweeps are layouts of cells (`patching.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CutawayError, NoSuchSite, NotSupported
from cutaway.artifacts.results import Effect, interval_text
from cutaway.causal.ablations import Ablation, replacement_run
from cutaway.causal.accuracy import Criterion
from cutaway.causal.effects import effects_drawing
from cutaway.causal.metrics import (
    Metric,
    PatchDirection,
    Targets,
    differentiable,
    logit_difference,
    recovery,
    targets_of,
)
from cutaway.data.pairs import AlignedPairs
from cutaway.draw.result import Result
from cutaway.model.edits.edits import Edit, patch
from cutaway.model.edits.edits import set as set_value
from cutaway.model.forward.run import Run
from cutaway.model.language_model import LanguageModel
from cutaway.model.sites import Site, template_of
from cutaway.model.tokens import Tokens


@dataclass(frozen=True)
class PatchCell:
    """One part at one place: the whole value at a site, or some heads or neurons of it."""

    site: str
    """A site of the model, with its layer."""
    heads: tuple[int, ...] | None = None
    """Heads of it (key-value heads at k, v, rot_k); None: the whole value."""
    neurons: tuple[int, ...] | None = None
    """Entries of its last dimension; None: all."""
    at: str | None = None
    """The place in words; None: every token."""

    @property
    def part(self) -> str:
        """The part in words, such as "blocks.3.attn.z head 5"."""
        words = self.site
        for name, chosen in (("head", self.heads), ("neuron", self.neurons)):
            if chosen is not None:
                words += f" {name}{'s' if len(chosen) > 1 else ''} {', '.join(map(str, chosen))}"
        return words

    def __str__(self) -> str:
        return f"{self.part} at {'every token' if self.at is None else repr(self.at)}"


@dataclass(frozen=True, repr=False)
class PatchedCell(Result):
    """One cell with all that is known about it. `p`, `q` and `p_of_all` are NaN where the model cannot do the task."""

    title: ClassVar[str] = "Patched cell"

    layer: int
    """The cell's row in its grid."""
    column: str
    """Its column."""
    cell: PatchCell
    """The part and the place."""
    effect: Effect
    """The mean over pairs of each pair's share, beside its control."""
    p: float
    """Two-sided p of the sign-flip test of the pairs' shares against their controls, for this one cell."""
    q: float
    """The rate of false discoveries among all cells of the grid with a p as small."""
    p_of_all: float
    """The chance that any cell of the grid is as far off where there is nothing."""
    ratio_of_means: float
    """The means divided, over all n pairs: weighs pairs by how far their prompts differ."""

    def summary(self) -> str:
        """The share with interval and control, and the tests."""
        return str(self)

    def rows(self) -> list[dict[str, Any]]:
        """One row."""
        low, high = self.effect.interval or (None, None)
        control = self.effect.controls[0].value if self.effect.controls else None
        return [
            {
                "layer": self.layer, "column": self.column, "part": self.cell.part, "at": self.cell.at,
                "value": self.effect.value, "low": low, "high": high, "control": control, "n": self.effect.n,
                "p": self.p, "q": self.q, "p_of_all": self.p_of_all, "ratio_of_means": self.ratio_of_means,
            }
        ]  # fmt: skip

    def drawing(self) -> Markup:
        """The effect with its interval beside its control."""
        return effects_drawing([self.effect], self.title)

    def to_json(self) -> dict[str, Any]:
        """The cell, its tests and its effect."""
        return {
            "layer": self.layer,
            "column": self.column,
            "site": self.cell.site,
            "heads": self.cell.heads,
            "neurons": self.cell.neurons,
            "at": self.cell.at,
            "p": finite(self.p),
            "q": finite(self.q),
            "p_of_all": finite(self.p_of_all),
            "ratio_of_means": finite(self.ratio_of_means),
            "effect": self.effect.to_json(),
        }

    def __str__(self) -> str:
        effect = self.effect
        beside = "".join(f"{control.name} {control.value:.3f}, " for control in effect.controls)
        return (
            f"{effect.name}: {effect.value:.3f} {interval_text(effect.interval)}, {beside}"
            f"p {self.p:.2g}, q {self.q:.2g}, ratio of means {self.ratio_of_means:.3f}, n {effect.n}"
        )


def finite(value: float) -> float | None:
    """The number, None where it is not finite."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Places:
    """Positions [n, k] of each pair that are patched, in the run (`to`) and in its source (`of`); -1: none."""

    to: Tensor
    of: Tensor


def head_count(site: Site) -> int | None:
    """Heads at a site (key-value heads at k, v, rot_k); None where it has none."""
    dims = site.dims.split()
    at = next((i for i, part in enumerate(dims) if part in ("H", "KV")), None)
    return None if at is None else int(site.shape[at])


def neuron_count(site: Site) -> int | None:
    """Entries of the last dimension of a site without heads; None where it counts heads or positions."""
    width = site.shape[-1]
    return int(width) if isinstance(width, int) and head_count(site) is None else None


class PatchSetup:
    """The pairs and runs that cells are measured on.

    `metric_clean`, `metric_corrupt` [n] are the metric of the two unpatched runs, `base_logits` [n, V] those of the run
    that is patched: the corrupt one denoising, the clean one noising.
    """

    def __init__(
        self,
        lm: LanguageModel,
        pairs: AlignedPairs,
        sites: Sequence[str],
        *,
        direction: PatchDirection,
        ablation: Ablation,
        metric: Metric,
        metric_name: str,
        criterion: Criterion,
        reference: Tokens | None = None,
    ) -> None:
        if direction not in ("denoise", "noise"):
            raise CutawayError(f"the direction {direction!r} is not 'denoise' or 'noise'")
        if direction == "denoise" and ablation.kind != "resample":
            raise NotSupported(
                f"denoising puts clean activations into the corrupt run, so there is no {ablation} in it; take "
                "direction 'noise', or the ablation 'resample'"
            )
        self.lm, self.pairs, self.direction, self.ablation = lm, pairs, direction, ablation
        self.metric, self.metric_name, self.criterion = metric, metric_name, criterion
        self.noise = direction == "noise"
        self.base: Tokens = pairs.clean if self.noise else pairs.corrupt
        other = pairs.corrupt if self.noise else pairs.clean
        # positions of a role in the other prompt count only where the value comes from there
        self.crosses = ablation.kind == "resample"
        self.given: Run = replacement_run(
            lm, pairs, sites, ablation, into="clean" if self.noise else "corrupt", reference=reference
        )
        self.base_logits, other_logits = _answers(lm, self.base), _answers(lm, other)
        clean, corrupt = (self.base_logits, other_logits) if self.noise else (other_logits, self.base_logits)
        self.targets: Targets = targets_of(pairs, clean)
        self.metric_clean, self.metric_corrupt = metric(clean, self.targets), metric(corrupt, self.targets)
        if not recovery(self.metric_clean, self.metric_clean, self.metric_corrupt)[1].any():
            raise CutawayError(
                f"the metric {metric_name} does not tell the clean prompts from the corrupt ones; choose another"
            )

    @property
    def n(self) -> int:
        return len(self.pairs)

    def shares(self, patched: Tensor) -> tuple[Tensor, Tensor]:
        """What share of the difference a patch moves [..., n] from the metric [..., n] under it, and who can be
        judged [n]: denoising (patched - corrupt) / (clean - corrupt), noising one minus that.
        """
        clean, corrupt = self.metric_clean, self.metric_corrupt
        return recovery(patched, corrupt, clean) if self.noise else recovery(patched, clean, corrupt)

    def flipped(self, logits: Tensor) -> Tensor:
        """Whether each row [n, V] is answered as the source is."""
        goal, other = (self.pairs.wrong, self.pairs.answer) if self.noise else (self.pairs.answer, self.pairs.wrong)
        towards, away = goal.to(logits.device), other.to(logits.device)
        if self.criterion == "top1":
            return logits.argmax(-1) == towards
        wanted, unwanted = (logits.gather(-1, ids[:, None])[:, 0] for ids in (towards, away))
        return wanted > unwanted

    def edits(self, cell: PatchCell, places: Places | None) -> list[Edit]:
        """The cell as edits of the run that is patched; none where no pair has such a place."""
        if places is None:
            if cell.neurons is not None:
                value = self.given[cell.site][..., list(cell.neurons)]
                return [set_value(cell.site, value, neurons=cell.neurons)]
            return [patch(cell.site, self.given, heads=cell.heads, neurons=cell.neurons)]
        to, of = places.to.tolist(), (places.of if self.crosses else places.to).tolist()
        rows = [row for row in range(self.n) if to[row][0] >= 0]
        if not rows:
            return []
        where, origins = [to[row] for row in rows], [of[row] for row in rows]
        if cell.neurons is not None:  # thousands of cells: take the few numbers out once, not through an address
            columns = self.given.tokens.first[rows].cpu()[:, None] + torch.tensor(origins)
            value = self.given[cell.site][torch.tensor(rows)[:, None], columns][..., list(cell.neurons)]
            return [set_value(cell.site, value, neurons=cell.neurons, rows=rows, positions=where)]
        return [
            patch(
                cell.site, self.given, heads=cell.heads, rows=rows, positions=where, source_rows=rows,
                source_positions=origins,
            )
        ]  # fmt: skip

    def measure(
        self, cells: Sequence[tuple[PatchCell, Places | None]], *, batch_rows: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The metric and whether the answer flips, for each cell and pair: [cells, n] each, in one sweep."""
        here = self.targets.to(self.lm.device)

        def judged(logits: Tensor, _tokens: Tokens) -> Tensor:
            logits = logits.float()
            return torch.stack([self.metric(logits, here).float(), self.flipped(logits).float()], dim=-1)

        edits = [self.edits(cell, places) for cell, places in cells]
        swept = self.lm.sweep(self.base, edits, judged, batch_rows=batch_rows, label="patching")
        metrics, flips = swept.values.unbind(-1)
        return metrics, flips > 0.5

    def estimated(self, site: str, places: Places | None) -> Tensor:
        """First-order estimate of what patching each entry of a site's last dimension moves [width]: the change of
        the activation times the metric's gradient, summed over the places, as a mean share over pairs (attribution
        patching, Nanda 2023). A metric without a gradient here is estimated by the logit difference.
        """
        run, metric = self._gradient(site)
        gradient = run.grads[site].float()
        rows = torch.arange(self.n)[:, None]
        if places is None:
            change = self.given[site].float() - run[site].float()
            moved = (change * gradient).where(self.base.mask.to(change.device)[..., None], 0.0).sum(1)
        else:
            to = self.base.first.cpu()[:, None] + places.to
            of = self.given.tokens.first.cpu()[:, None] + (places.of if self.crosses else places.to)
            change = self.given[site][rows, of].float() - run[site][rows, to].float()
            moved = (change * gradient[rows, to]).sum(1)
        whole = self.metric_clean - self.metric_corrupt if metric is self.metric else torch.ones(self.n)
        judged = self.shares(self.metric_clean)[1]
        return (moved.cpu() / whole[:, None])[judged].mean(0)

    def _gradient(self, site: str) -> tuple[Run, Metric]:
        """The run that is patched with the gradient at a site of its metric, or of the logit difference where that
        metric has none (a rank, a KL from the very run).
        """
        here = self.targets.to(self.lm.device)

        def run(metric: Metric) -> Run:
            return self.lm.run(
                self.base, capture=site, logits="last", grad=lambda logits: metric(logits[:, 0].float(), here)
            )

        if differentiable(self.metric):
            found = run(self.metric)
            if bool((found.grads[site].abs() > 1e-12).any()):
                return found, self.metric
        return run(logit_difference), logit_difference


def _answers(lm: LanguageModel, tokens: Tokens) -> Tensor:
    return lm.run(tokens, logits="last").last_logits.float().cpu()


def every_layer(lm: LanguageModel, site: str, layers: Sequence[int] | None) -> list[tuple[int, str]]:
    """(layer, canonical name) of a site with `{l}` in every layer that has it, or in the layers given.

    Raises `CutawayError` for a site without `{l}`, an unknown or absent site, and a layer that the model has not.
    """
    if "{l}" not in site:
        table = lm.sites()
        template = template_of(site)
        known = site in {one.name for one in table} and template != site
        how = f"write {template!r} and name the layer apart" if known else "write for example 'blocks.{l}.resid_post'"
        raise NoSuchSite(f"the site {site!r} names no layer to sweep; {how}")
    table = lm.sites()
    if layers is None:
        names = table.expand(site.replace("{l}", "*"))
        return [(int(name.split(".")[1]), name) for name in names]
    return [(layer, table.resolve(site.replace("{l}", str(layer)))) for layer in dict.fromkeys(layers)]
