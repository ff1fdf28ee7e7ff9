"""What patching did: a grid of cells, layer × column, with the evidence for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.results import Choices, Control, Effect, interval_text
from cutaway.artifacts.statistics import (
    bootstrap_interval,
    false_discovery,
    mean_intervals,
    sign_flip_p_of_each,
    sign_flip_p_of_many,
    wilson_interval,
)
from cutaway.causal.metrics import ratio_of_means
from cutaway.causal.patching.cells import Direction, PatchCell

Over = Literal["positions", "heads", "components", "neurons"]
Of = Literal["metric", "flips"]
LEAST_PAIRS = 8
"""Pairs that choosing a cell on one half and measuring it on the other needs; an interval over fewer is a guess."""
_ROUNDING = 1e-5


@dataclass(frozen=True)
class PatchedCell:
    """One cell with all that is known about it.

    `effect.value` is the mean over pairs of each pair's share; `ratio_of_means` divides the means instead, over all n
    pairs, and weighs pairs by how far their prompts differ. `p` is the two-sided p of the sign-flip test of the pairs'
    shares against their controls, for this one cell; `q` is the rate of false discoveries among all cells with a p as
    small, `p_of_all` the chance that any cell is as far off where there is nothing. All three are NaN where the model
    cannot do the task.
    """

    layer: int
    column: str
    cell: PatchCell
    effect: Effect
    p: float
    q: float
    p_of_all: float
    ratio_of_means: float

    def to_json(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "column": self.column,
            "site": self.cell.site,
            "heads": self.cell.heads,
            "neurons": self.cell.neurons,
            "at": self.cell.at,
            "p": _finite(self.p),
            "q": _finite(self.q),
            "p_of_all": _finite(self.p_of_all),
            "ratio_of_means": _finite(self.ratio_of_means),
            "effect": self.effect.to_json(),
        }

    def __str__(self) -> str:
        effect = self.effect
        beside = "".join(f"{control.name} {control.value:.3f}, " for control in effect.controls)
        return (
            f"{effect.name}: {effect.value:.3f} {interval_text(effect.interval)}, {beside}"
            f"p {self.p:.2g}, q {self.q:.2g}, ratio of means {self.ratio_of_means:.3f}, n {effect.n}"
        )


@dataclass(frozen=True, eq=False)
class PatchGrid:
    """What patches do, layer × column, for n pairs.

    `values` [layers, columns, n] is the share of the difference between the two runs that one patch moves: denoising,
    (patched - corrupt) / (clean - corrupt); noising, (clean - patched) / (clean - corrupt). 0 leaves the run as it was,
    1 turns it into the other. NaN where a pair's denominator is too small to say (`dropped` counts those pairs).
    `patched` is the metric itself. `flips` [layers, columns, n] is True where the source's answer becomes the most
    probable token or, by the criterion "preferred", more probable than the other answer. `layers` are those patched,
    out of the model's `n_layers`; `columns` are positions or roles, heads, components or neurons, as `over` says, and
    `cells` [layers][columns] what each cell patches. `random_values` are the control of each cell, named by `control`.
    `unable` says that the model cannot do the task, "" where it can: then nothing has a p.
    """

    model: str
    n_layers: int
    site: str
    over: Over
    direction: Direction
    ablation: str
    metric: str
    layers: tuple[int, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[PatchCell, ...], ...] = field(repr=False)
    at: str | None
    patched: Tensor = field(repr=False)
    values: Tensor = field(repr=False)
    flips: Tensor = field(repr=False)
    clean: Tensor = field(repr=False)
    corrupt: Tensor = field(repr=False)
    dropped: int
    tokens: tuple[str, ...]
    control: str
    random_values: Tensor = field(repr=False)
    random_flips: Tensor = field(repr=False)
    base_flips: Tensor = field(repr=False)
    evaluation: str
    unable: str = ""

    @property
    def n(self) -> int:
        return int(self.values.shape[-1])

    @property
    def mean(self) -> Tensor:
        """Mean share [layers, columns] over the pairs that can be judged."""
        return self.values.nanmean(-1)

    @property
    def ratio_of_means(self) -> Tensor:
        """The share of the mean difference that is moved [layers, columns], over all pairs."""
        here, there = (self.clean, self.corrupt) if self.direction == "denoise" else (self.corrupt, self.clean)
        return ratio_of_means(self.patched, here, there)

    @property
    def flip_rate(self) -> Tensor:
        """Share of pairs whose answer becomes the source's [layers, columns]."""
        return self.flips.float().mean(-1)

    def interval(self, n_resamples: int = 2000, seed: int = 0) -> Tensor:
        """95 % interval of the mean over pairs [2, layers, columns]."""
        kept = self.values[..., ~self.values.isnan().any(0).any(0)]
        return torch.from_numpy(mean_intervals(kept.double().numpy(), n_resamples, seed)).float()

    def is_output(self, layer: int) -> bool:
        """Whether the site at this layer is what the unembedding reads."""
        return layer == self.n_layers - 1 and self.site.endswith("resid_post")

    def _place(self, layer: int, column: str) -> tuple[int, int]:
        if layer not in self.layers or column not in self.columns:
            shown = [repr(name) for name in self.columns[:40]] + ["…"] * (len(self.columns) > 40)
            raise CutawayError(
                f"this grid has no cell ({layer}, {column!r}); its layers are {self.layers[0]} to {self.layers[-1]}, "
                f"its columns {', '.join(shown)}"
            )
        return self.layers.index(layer), self.columns.index(column)

    def choices(self, cell: PatchCell) -> Choices:
        """The six choices that a cell's effect depends on."""
        granularity = "neuron" if cell.neurons is not None else "node"
        where = "all" if cell.at is None else cell.at
        return Choices(granularity, cell.part, self.ablation, where, self.direction, self.evaluation)

    def effect(
        self,
        layer: int,
        column: str,
        *,
        of: Of = "metric",
        command: str | None = None,
        rows: Sequence[int] | None = None,
    ) -> Effect:
        """One cell as an effect beside its control.

        `of` says what is moved: the share of the metric's difference, or the share of pairs that are answered as the
        source is ("flips"). The control patches what nothing says should matter: a random other position of the same
        prompt (among those that can carry a difference: from the first token in which clean and corrupt differ on), or
        a random other head or neuron of the same layer, or the same component of another layer. `rows` are the pairs
        that it is measured on (default: all).
        """
        i, j = self._place(layer, column)
        pick = torch.arange(self.n) if rows is None else torch.as_tensor(list(rows))
        cell = self.cells[i][j]
        name = f"{self.direction} {cell}"
        choices = self.choices(cell)
        what = "the clean" if self.direction == "denoise" else "the corrupt"
        ablation = f"patch from {what} run" if self.ablation == "resample" else f"{self.ablation} ablation"
        if of == "flips":
            flips, untouched = self.flips[i, j, pick], self.base_flips[pick]
            random = self.random_flips[i, j, pick].float()
            right, before, n = int(flips.sum()), int(untouched.sum()), len(pick)
            beside = Control(self.control, random.mean().item(), bootstrap_interval(random.numpy()), n)
            return Effect(
                name=f"{name}: answers flipped",
                value=right / n,
                n=n,
                interval=wilson_interval(right, n),
                controls=(
                    *(() if bool(random.isnan().any()) else (beside,)),
                    Control("not patched", before / n, wilson_interval(before, n), n),
                ),
                ablation=ablation,
                units="share of pairs",
                command=command,
                choices=choices,
            )
        value, control = self.values[i, j, pick], self.random_values[i, j, pick]
        value, control = value[~value.isnan()], control[~control.isnan()]
        mean, spread = control.mean().item(), bootstrap_interval(control.numpy())
        return Effect(
            name=name,
            value=value.mean().item(),
            n=len(value),
            interval=bootstrap_interval(value.numpy()),
            controls=(Control(self.control, mean, spread, len(control)),) if len(control) else (),
            ablation=ablation,
            units=f"share of the {self.metric.replace('_', ' ')} between the two runs",
            command=command,
            choices=choices,
        )

    def evidence(self, layer: int, column: str, *, command: str | None = None) -> PatchedCell:
        """One cell with its effect, the p of its difference from the control, and the ratio of means."""
        i, j = self._place(layer, column)
        effect = self.effect(layer, column, command=command)
        p, q, of_all, ratio = (grid[i, j].item() for grid in (self.p, self.q, self.p_of_all, self.ratio_of_means))
        return PatchedCell(layer, column, self.cells[i][j], effect, p, q, of_all, ratio)

    @cached_property
    def _differences(self) -> Tensor:
        """Shares minus their controls [layers, columns, n], NaN for pairs that cannot be judged, or without control."""
        difference = (self.values - self.random_values).double()
        # differences of rounding alone would have a small p
        return torch.where(difference.abs() <= _ROUNDING, torch.zeros_like(difference), difference)

    @cached_property
    def p(self) -> Tensor:
        """p of each cell's difference from its control, for that cell alone [layers, columns]."""
        if self.unable:
            return torch.full(self.values.shape[:2], torch.nan, dtype=torch.float64)
        found = sign_flip_p_of_each(self._differences.flatten(0, 1).numpy())
        return torch.from_numpy(found).view(self.values.shape[:2])

    @cached_property
    def q(self) -> Tensor:
        """The rate of false discoveries among all cells whose p is as small as this one's [layers, columns]."""
        return torch.from_numpy(false_discovery(self.p.numpy()))

    @cached_property
    def p_of_all(self) -> Tensor:
        """p of each cell's difference from its control, corrected for the number of cells [layers, columns]."""
        if self.unable:
            return torch.full(self.values.shape[:2], torch.nan, dtype=torch.float64)
        judged = ~self.values.isnan().all(0).all(0)
        found = sign_flip_p_of_many(self._differences[..., judged].flatten(0, 1).numpy())
        return torch.from_numpy(found).view(self.values.shape[:2])

    def top(self, k: int = 10, *, command: str | None = None) -> list[PatchedCell]:
        """The k cells with the largest mean by size, largest first (the model's output itself is left out).

        The largest of many look larger than they are: `best` measures one on pairs that it was not chosen on.
        """
        able = [layer for layer in self.layers if not self.is_output(layer)] or list(self.layers)
        rows = [self.layers.index(layer) for layer in able]
        sizes = self.mean[rows].abs().nan_to_num(-1.0)
        order = sizes.flatten().argsort(descending=True, stable=True)[:k].tolist()
        chosen = [(rows[at // len(self.columns)], at % len(self.columns)) for at in order]
        return [self.evidence(self.layers[i], self.columns[j], command=command) for i, j in chosen]

    def best(
        self,
        *,
        of: Of = "metric",
        layers: Sequence[int] | None = None,
        command: str | None = None,
    ) -> Effect:
        """The cell with the largest mean of what is asked for, chosen on every second pair, measured on the others.

        Choosing and measuring on the same pairs would report the luckiest of many cells. `layers` are the candidates
        (default: all but the stream after the model's last layer, which at the last token hands over the answer
        itself). Needs at least 8 pairs.
        """
        if self.n < LEAST_PAIRS:
            raise CutawayError(
                f"{self.n} pairs are too few to choose a cell on one half and measure it on the other; give "
                f"{LEAST_PAIRS}"
            )
        able = [layer for layer in self.layers if (layer in layers if layers else not self.is_output(layer))]
        rows = [self.layers.index(layer) for layer in able or self.layers]
        values = self.values if of == "metric" else self.flips.float()
        chosen = values[rows][..., 0::2].nanmean(-1).nan_to_num(-torch.inf)
        i, j = divmod(int(chosen.argmax()), len(self.columns))
        return self.effect(self.layers[rows[i]], self.columns[j], of=of, command=command, rows=range(1, self.n, 2))

    def to_json(self) -> dict[str, Any]:
        low, high = self.interval()
        return {
            "model": self.model,
            "site": self.site,
            "over": self.over,
            "direction": self.direction,
            "ablation": self.ablation,
            "metric": self.metric,
            "at": self.at,
            "evaluation": self.evaluation,
            "unable": self.unable,
            "layers": list(self.layers),
            "columns": list(self.columns),
            "cells": [[cell.part for cell in row] for row in self.cells],
            "tokens": list(self.tokens),
            "n": self.n,
            "dropped": self.dropped,
            "mean": _plain(self.mean),
            "low": _plain(low),
            "high": _plain(high),
            "ratio_of_means": _plain(self.ratio_of_means),
            "flip_rate": _plain(self.flip_rate),
            "control": self.control,
            "p": _plain(self.p),
            "q": _plain(self.q),
            "p_of_all": _plain(self.p_of_all),
            "control_mean": _plain(self.random_values.nanmean(-1)),
            "clean": self.clean.mean().item(),
            "corrupt": self.corrupt.mean().item(),
        }

    def headline(self) -> str:
        """What was measured, in one line."""
        where = "" if self.over == "positions" else f" at {'every token' if self.at is None else self.at}"
        ablation = "" if self.ablation == "resample" else f" ({self.ablation})"
        return (
            f"{self.direction} {self.site}{where}{ablation}, {self.metric}: clean {self.clean.mean():.2f}, corrupt "
            f"{self.corrupt.mean():.2f}, n {self.n}"
        )

    def __str__(self) -> str:
        return f"{self.headline()}\n" + (f"  {self.unable}\n" if self.unable else "") + self.table()

    def table(self) -> str:
        """Mean shares, a row a layer; for neurons, which differ from layer to layer, a line each."""
        if self.over == "neurons":
            shown = self.top(20)
            return "\n".join(f"  {one.cell.part:<40}{one.effect.value:>8.3f}" for one in shown)
        names = [column if len(column) <= 12 else f"{column[:11]}…" for column in self.columns]
        width = max(7, *(len(name) + 1 for name in names))
        lines = [" " * 6 + "".join(f"{name:>{width}}" for name in names)]
        for layer, row in zip(self.layers, self.mean.tolist(), strict=True):
            lines.append(f"  L{layer:<3} " + "".join(f"{value:>{width}.2f}" for value in row))
        return "\n".join(lines)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _plain(values: Tensor) -> list[list[float | None]]:
    return [[_finite(value) for value in row] for row in values.tolist()]
