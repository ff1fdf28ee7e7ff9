"""What patching did: a grid of cells, layer × column, with the evidence for each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from markupsafe import Markup
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
from cutaway.causal.metrics import PatchDirection, ratio_of_means
from cutaway.causal.patching.cells import PatchCell, PatchedCell, finite
from cutaway.draw.heatmap import heatmap_html
from cutaway.draw.result import Result

Over = Literal["positions", "heads", "components", "neurons"]
Of = Literal["metric", "flips"]
LEAST_PAIRS = 8
"""Pairs that choosing a cell on one half and measuring it on the other needs; an interval over fewer is a guess."""
COLUMNS: dict[Over, str] = {
    "positions": "position",
    "heads": "head",
    "components": "part",
    "neurons": "neurons of the layer, the largest estimates first",
}
"""What the columns of a grid are, in words."""
_NEURON_COLUMNS = 8
_ROUNDING = 1e-5


@dataclass(frozen=True, eq=False, repr=False)
class PatchGrid(Result):
    """What patches do, layer × column, for n pairs.

    A share is of the difference between the two runs that one patch moves: denoising, (patched - corrupt) / (clean -
    corrupt); noising, (clean - patched) / (clean - corrupt). 0 leaves the run as it was, 1 turns it into the other.
    """

    title: ClassVar[str] = "Activation patching"

    model: str
    """Name of the model."""
    n_layers: int
    """Layers of the model."""
    site: str
    """With `{l}` where the layer stands."""
    over: Over
    """What the columns are."""
    direction: PatchDirection
    """What is put where."""
    ablation: str
    """What takes an activation's place, in words."""
    metric: str
    """Name of the metric."""
    layers: tuple[int, ...]
    """The layers patched, a row each."""
    columns: tuple[str, ...]
    """Names of the columns: positions or roles, heads, components or neurons."""
    cells: tuple[tuple[PatchCell, ...], ...]
    """What each cell patches, [layers][columns]."""
    at: str | None
    """The role or roles of every cell, where columns are no positions; None at every token."""
    patched: Tensor
    """The metric under each patch [layers, columns, n]."""
    values: Tensor
    """Shares [layers, columns, n]; NaN where a pair's two prompts hardly differ."""
    flips: Tensor
    """Where the source's answer becomes the most probable token (or, by the criterion "preferred", more probable than
    the other answer), bool [layers, columns, n]."""
    clean: Tensor
    """The metric of the clean run [n]."""
    corrupt: Tensor
    """The metric of the corrupt run [n]."""
    dropped: int
    """Pairs whose two prompts hardly differ."""
    tokens: tuple[str, ...]
    """The first clean prompt's tokens, where the columns are its positions."""
    control: str
    """What the control of each cell is."""
    random_values: Tensor
    """The control's shares [layers, columns, n]."""
    random_flips: Tensor
    """The control's flips [layers, columns, n]."""
    base_flips: Tensor
    """Which pairs are answered as the source is without a patch, bool [n]."""
    evaluation: str
    """What the pairs are."""
    unable: str = ""
    """That the model cannot do the task, "" where it can: then nothing has a p."""

    @property
    def n(self) -> int:
        """How many pairs were patched."""
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
        """95 % interval of the mean over pairs [2, layers, columns].

        Args:
            n_resamples: Draws of the bootstrap.
            seed: Of these draws.
        """
        kept = self.values[..., ~self.values.isnan().any(0).any(0)]
        return torch.from_numpy(mean_intervals(kept.double().numpy(), n_resamples, seed)).float()

    def is_output(self, layer: int) -> bool:
        """Whether the site at this layer is what the unembedding reads.

        Args:
            layer: One of `layers`.
        """
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
        """The six choices that a cell's effect depends on.

        Args:
            cell: One of `cells`.
        """
        granularity = "neuron" if cell.neurons is not None else "node"
        where = "all" if cell.at is None else cell.at
        return Choices(granularity, cell.part, self.ablation, where, self.direction, self.evaluation)

    def effect(
        self,
        layer: int,
        column: str,
        *,
        of: Of = "metric",
        pairs: Sequence[int] | None = None,
    ) -> Effect:
        """One cell as an effect beside its control.

        The control patches what nothing says should matter: a random other position of the same
        prompt (among those that can carry a difference: from the first token in which clean and corrupt differ on), or
        a random other head or neuron of the same layer, or the same component of another layer.

        Args:
            layer: One of `layers`.
            column: One of `columns`.
            of: What is moved: the share of the metric's difference, or the share of pairs that are answered as the
                source is ("flips").
            pairs: Those that it is measured on, by number; None: all.
        """
        i, j = self._place(layer, column)
        pick = torch.arange(self.n) if pairs is None else torch.as_tensor(list(pairs))
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
            choices=choices,
        )

    def evidence(self, layer: int, column: str) -> PatchedCell:
        """One cell with its effect, the p of its difference from the control, and the ratio of means.

        Args:
            layer: One of `layers`.
            column: One of `columns`.
        """
        i, j = self._place(layer, column)
        effect = self.effect(layer, column)
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

    def top(self, k: int = 10) -> list[PatchedCell]:
        """The k cells with the largest mean by size, largest first (the model's output itself is left out).

        The largest of many look larger than they are: `best` measures one on pairs that it was not chosen on.

        Args:
            k: How many.
        """
        return [self.evidence(self.layers[i], self.columns[j]) for i, j in self._largest(k)]

    def _largest(self, k: int) -> list[tuple[int, int]]:
        """Row and column of the k largest cells."""
        able = [layer for layer in self.layers if not self.is_output(layer)] or list(self.layers)
        rows = [self.layers.index(layer) for layer in able]
        sizes = self.mean[rows].abs().nan_to_num(-1.0)
        order = sizes.flatten().argsort(descending=True, stable=True)[:k].tolist()
        return [(rows[at // len(self.columns)], at % len(self.columns)) for at in order]

    def best(self, *, of: Of = "metric", layers: Sequence[int] | None = None) -> Effect:
        """The cell with the largest mean of what is asked for, chosen on every second pair, measured on the others.

        Choosing and measuring on the same pairs would flatter the largest of many cells. Needs at least 8 pairs.

        Args:
            of: What is moved, as in `effect`.
            layers: The candidates; None: all but the stream after the model's last layer, which at the last token
                hands over the answer itself.
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
        return self.effect(self.layers[rows[i]], self.columns[j], of=of, pairs=range(1, self.n, 2))

    def to_json(self) -> dict[str, Any]:
        """Means, intervals and tests by [layer][column]; the pairs' own values are not among them."""
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

    def summary(self) -> str:
        """What was measured, and the largest cells beside their controls (`print(grid)` has the whole table)."""
        lines = [
            self.headline(),
            *([f"  {self.unable}"] if self.unable else []),
            f"  largest cells, mean share of the {self.n - self.dropped} pairs [95 %]:",
        ]
        for i, j in self._largest(5):
            effect = self.effect(self.layers[i], self.columns[j])
            control = f", {self.control} {effect.controls[0].value:.2f}" if effect.controls else ""
            lines.append(f"  {self.cells[i][j]}: {effect.value:.2f} {interval_text(effect.interval, 2)}{control}")
        return "\n".join(lines)

    def rows(self) -> list[dict[str, Any]]:
        """One row per cell."""
        low, high = self.interval()
        control = self.random_values.nanmean(-1)
        tables = {
            "value": self.mean, "low": low, "high": high, "control": control, "p": self.p, "q": self.q,
            "p_of_all": self.p_of_all, "ratio_of_means": self.ratio_of_means, "flip_rate": self.flip_rate,
        }  # fmt: skip
        return [
            {
                "layer": layer,
                "column": column,
                "part": self.cells[i][j].part,
                "at": self.cells[i][j].at,
                **{name: finite(table[i, j].item()) for name, table in tables.items()},
                "n": self.n - self.dropped,
            }
            for i, layer in enumerate(self.layers)
            for j, column in enumerate(self.columns)
        ]

    def drawing(self) -> Markup:
        """The heatmap of shares, and of flips where a patch flips answers."""
        return Markup("").join([self.share_map(), *([self.flip_map()] if self.flips_more else [])])

    @property
    def flips_more(self) -> bool:
        """Whether some patch flips more answers than are flipped without one."""
        return float(self.flip_rate.max()) > float(self.base_flips.float().mean())

    def share_map(self) -> Markup:
        """A heatmap of mean shares, layer × column, the largest outlined."""
        values, cell_text = self._shown(self.mean), None
        if self.over == "neurons":
            cell_text = [
                [minus_text(f"{self._neurons(i, j)} {value or 0.0:.3f}") for j, value in enumerate(row)]
                for i, row in enumerate(values)
            ]
        known = [
            (abs(value), i, j)
            for i, row in enumerate(values)
            if not self.is_output(self.layers[i])
            for j, value in enumerate(row)
            if value is not None
        ]
        title = "share of the difference that a patch moves"
        return self._map(
            values, title, "share", scale="diverging", cell_text=cell_text, marks=[max(known)[1:]] if known else []
        )

    def flip_map(self) -> Markup:
        """A heatmap of the share of pairs whose answer flips, layer × column."""
        return self._map(self._shown(self.flip_rate), "share of pairs whose answer flips", "share of pairs")

    def _shown(self, values: Tensor) -> list[list[float | None]]:
        return _plain(values[:, :_NEURON_COLUMNS] if self.over == "neurons" else values)

    def _map(self, values: list[list[float | None]], title: str, units: str, **how: Any) -> Markup:
        return heatmap_html(
            rows=[f"L{layer}" for layer in self.layers], columns=list(self.columns[: len(values[0])]), values=values,
            title=title, units=units, row_axis="layer", column_axis=COLUMNS[self.over], **how,
        )  # fmt: skip

    def _neurons(self, i: int, j: int) -> str:
        return ",".join(f"N{neuron}" for neuron in self.cells[i][j].neurons or ())

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
        """Mean shares, a row per layer; for neurons, which differ from layer to layer, a line each."""
        if self.over == "neurons":
            shown = self.top(20)
            return "\n".join(f"  {one.cell.part:<40}{one.effect.value:>8.3f}" for one in shown)
        names = [column if len(column) <= 12 else f"{column[:11]}…" for column in self.columns]
        width = max(7, *(len(name) + 1 for name in names))
        lines = [" " * 6 + "".join(f"{name:>{width}}" for name in names)]
        for layer, row in zip(self.layers, self.mean.tolist(), strict=True):
            lines.append(f"  L{layer:<3} " + "".join(f"{value:>{width}.2f}" for value in row))
        return "\n".join(lines)


def minus_text(text: str) -> str:
    """Typographic minus signs, and none before a zero."""
    return re.sub(r"-(0\.0+)(?!\d)", r"\1", text).replace("-", "−")


def _plain(values: Tensor) -> list[list[float | None]]:
    return [[finite(value) for value in row] for row in values.tolist()]
