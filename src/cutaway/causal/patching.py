"""Activation patching: where in the network, and at which token, is the answer decided?

Denoising runs the corrupt prompt and inserts clean activations: what suffices to bring the answer back? Noising runs
the clean prompt and inserts corrupt ones: what is needed to keep it? They are not symmetric (Zhang & Nanda 2023;
Heimersheim & Nanda 2024). The cells are one sweep (`lm.sweep`): they run in batches, from the patched layer and token
on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.results import Control, Effect
from cutaway.artifacts.statistics import bootstrap_interval, wilson_interval
from cutaway.causal.competence import Criterion
from cutaway.causal.metrics import METRICS, Metric, Targets, logit_difference, recovery
from cutaway.data.pairs import AlignedPairs, PromptPair, align
from cutaway.model.edits import Edit, patch
from cutaway.model.language_model import LanguageModel
from cutaway.model.run import Run
from cutaway.model.tokens import Tokens

Direction = Literal["denoise", "noise"]
RANDOM = "random position"


@dataclass(frozen=True)
class PatchGrid:
    """What patching one site does, layer × column, for n pairs.

    `values` [layers, columns, n] is the share of the difference between the two runs that one patch moves: denoising,
    (patched - corrupt) / (clean - corrupt); noising, (clean - patched) / (clean - corrupt). 0 leaves the run as it was,
    1 turns it into the other. NaN where a pair's denominator is too small to say (`dropped` counts those pairs).
    `flips` [layers, columns, n] is True where the source's answer becomes the most probable token or, by the criterion
    "preferred", more probable than the other answer. `layers` are those patched, out of the model's `n_layers`.
    """

    model: str
    n_layers: int
    site: str
    direction: Direction
    metric: str
    layers: tuple[int, ...]
    columns: tuple[str, ...]
    values: Tensor
    flips: Tensor
    clean: Tensor
    corrupt: Tensor
    dropped: int
    tokens: tuple[str, ...]
    random_values: Tensor = field(repr=False)
    random_flips: Tensor = field(repr=False)
    base_flips: Tensor = field(repr=False)

    @property
    def n(self) -> int:
        return int(self.values.shape[-1])

    @property
    def mean(self) -> Tensor:
        """Mean recovery [layers, columns] over the pairs that can be judged."""
        return self.values.nanmean(-1)

    @property
    def flip_rate(self) -> Tensor:
        """Share of pairs whose answer becomes the source's [layers, columns]."""
        return self.flips.float().mean(-1)

    def interval(self, n_resamples: int = 2000, seed: int = 0) -> Tensor:
        """95 % bootstrap interval of the mean over pairs [2, layers, columns]."""
        kept = self.values[..., ~self.values.isnan().any(0).any(0)].double().numpy()
        n = kept.shape[-1]
        if n < 2:
            return torch.full((2, *self.values.shape[:2]), float("nan"))
        drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples) / n
        return torch.from_numpy(np.quantile(kept @ drawn.T, [0.025, 0.975], axis=-1)).float()

    def is_output(self, layer: int) -> bool:
        """Whether the site at this layer is what the unembedding reads."""
        return layer == self.n_layers - 1 and self.site.endswith("resid_post")

    def _cell(self, layer: int, column: str) -> tuple[int, int]:
        if layer not in self.layers or column not in self.columns:
            raise CutawayError(
                f"this grid has no cell ({layer}, {column!r}); its layers are {self.layers[0]} to {self.layers[-1]}, "
                f"its columns {', '.join(repr(name) for name in self.columns)}"
            )
        return self.layers.index(layer), self.columns.index(column)

    def effect(
        self,
        layer: int,
        column: str,
        *,
        of: Literal["metric", "flips"] = "metric",
        command: str | None = None,
        rows: Sequence[int] | None = None,
    ) -> Effect:
        """One cell as an effect, beside patching a random other position of the same prompt in the same layer.

        `of` says what is moved: the share of the metric's difference, or the share of pairs that are answered as the
        source is ("flips"). The random position is drawn for each pair among those that can carry a difference:
        from the first token in which clean and corrupt differ, without the cells' own.
        """
        i, j = self._cell(layer, column)
        pick = torch.arange(self.n) if rows is None else torch.as_tensor(list(rows))
        name = f"{self.direction} {self.site.format(l=layer)} at {column!r}"
        ablation = f"patch from the {'clean' if self.direction == 'denoise' else 'corrupt'} run"
        if of == "flips":
            flips, untouched = self.flips[i, j, pick], self.base_flips[pick]
            random = self.random_flips[i, j, pick].float()
            right, before, n = int(flips.sum()), int(untouched.sum()), len(pick)
            return Effect(
                name=f"{name}: answers flipped",
                value=right / n,
                n=n,
                interval=wilson_interval(right, n),
                controls=(
                    Control(RANDOM, random.mean().item(), bootstrap_interval(random.numpy()), n),
                    Control("not patched", before / n, wilson_interval(before, n), n),
                ),
                ablation=ablation,
                units="share of pairs",
                command=command,
            )
        value, control = self.values[i, j, pick], self.random_values[i, j, pick]
        value, control = value[~value.isnan()], control[~control.isnan()]
        return Effect(
            name=name,
            value=value.mean().item(),
            n=len(value),
            interval=bootstrap_interval(value.numpy()),
            controls=(Control(RANDOM, control.mean().item(), bootstrap_interval(control.numpy()), len(control)),),
            ablation=ablation,
            units=f"share of the {self.metric.replace('_', ' ')} between the two runs",
            command=command,
        )

    def best(
        self,
        *,
        of: Literal["metric", "flips"] = "metric",
        layers: Sequence[int] | None = None,
        command: str | None = None,
    ) -> Effect:
        """The cell with the largest mean of what is asked for, chosen on every second pair, measured on the others.

        Choosing and measuring on the same pairs would report the luckiest of many cells. `layers` are the candidates
        (default: all but the stream after the model's last layer, which at the last token hands over the answer
        itself). Needs at least 8 pairs.
        """
        if self.n < 8:
            raise CutawayError(
                f"{self.n} pairs are too few to choose a cell on one half and measure it on the other; give 8"
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
            "direction": self.direction,
            "metric": self.metric,
            "layers": list(self.layers),
            "columns": list(self.columns),
            "tokens": list(self.tokens),
            "n": self.n,
            "dropped": self.dropped,
            "mean": self.mean.tolist(),
            "low": low.tolist(),
            "high": high.tolist(),
            "flip_rate": self.flip_rate.tolist(),
            "random_position": self.random_values.nanmean(-1).tolist(),
            "clean": self.clean.mean().item(),
            "corrupt": self.corrupt.mean().item(),
        }

    def __str__(self) -> str:
        width = max(7, *(len(column) + 1 for column in self.columns))
        head = (
            f"{self.direction} {self.site}, {self.metric}: clean {self.clean.mean():.2f}, corrupt "
            f"{self.corrupt.mean():.2f}, n {self.n}"
        )
        lines = [head, " " * 6 + "".join(f"{column:>{width}}" for column in self.columns)]
        for layer, row in zip(self.layers, self.mean.tolist(), strict=True):
            lines.append(f"  L{layer:<3} " + "".join(f"{value:>{width}.2f}" for value in row))
        return "\n".join(lines)


def _answers(run: Run) -> Tensor:
    assert run.logits is not None
    return run.logits[:, 0].float().cpu()


def _columns(pairs: AlignedPairs, roles: Sequence[str] | None) -> tuple[list[str], Tensor, Tensor]:
    """Column names, and the positions patched [columns, n] in the run and in its source (clean coordinates first)."""
    if roles is not None:
        missing = [role for role in roles if role not in pairs.places]
        if missing:
            raise CutawayError(f"no position is named {missing[0]!r}; the pairs name {', '.join(pairs.places)}")
        places = torch.stack([pairs.places[role] for role in roles])
        return list(roles), places[:, 0], places[:, 1]
    lengths = pairs.clean.lengths.cpu()
    if int(lengths.min()) != int(lengths.max()):
        raise CutawayError(
            f"the pairs are {int(lengths.min())} to {int(lengths.max())} tokens long, so their positions do not line "
            "up; name positions by role (roles=...), or give pairs of one template"
        )
    p = int(lengths[0])
    names = []
    for i in range(p):
        here = {row[i] for row in (*pairs.clean.strings, *pairs.corrupt.strings)}
        names.append(f"{i} {here.pop()}" if len(here) == 1 else f"{i} ·")
    grid = torch.arange(p)[:, None].expand(p, len(pairs))
    return names, grid, grid


def _random_positions(pairs: AlignedPairs, columns: Tensor, draws: int, seed: int) -> Tensor:
    """For each draw and pair a position that is no column's [draws, n], from the first differing token on."""
    generator = np.random.default_rng(seed)
    first = pairs.first_difference().tolist()
    drawn = np.zeros((draws, len(pairs)), dtype=np.int64)
    for row, length in enumerate(pairs.clean.lengths.tolist()):
        own = set(columns[:, row].tolist())
        able = [i for i in range(first[row], length) if i not in own] or [i for i in range(length) if i not in own]
        drawn[:, row] = generator.choice(able, size=draws, replace=len(able) < draws) if able else -1
    return torch.from_numpy(drawn)


def patch_grid(
    lm: LanguageModel,
    pairs: Sequence[PromptPair] | AlignedPairs,
    *,
    site: str = "blocks.{l}.resid_post",
    direction: Direction = "denoise",
    metric: str | Metric = logit_difference,
    roles: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    criterion: Criterion = "top1",
    layers: Sequence[int] | None = None,
    draws: int = 3,
    batch_rows: int = 256,
    seed: int = 0,
) -> PatchGrid:
    """Patch one site at every layer and position (or role) from the other prompt's run.

    `site` has `{l}` where the layer stands: resid_pre, resid_mid, resid_post, attn.out, mlp.out. Without `roles`, all
    pairs must be equally long and the columns are token positions; with roles (`["city", "last"]`), they may differ in
    length and layout, and a role may even stand at different positions of clean and corrupt. `names` are names of
    your own for the columns. `metric` is a name ("logit_difference", "probability", "kl") or a function
    `(logits [b, V], targets) -> [b]`. `criterion` says when an answer has flipped (see `PatchGrid`). The control
    patches `draws` random other positions a pair.

    Raises `CutawayError` for pairs that do not line up, or prompts that the metric cannot tell apart.
    """
    if "{l}" not in site:
        raise CutawayError(f"the site {site!r} names no layer to sweep; write for example 'blocks.{{l}}.resid_post'")
    aligned = pairs if isinstance(pairs, AlignedPairs) else align(lm, pairs)
    name, measure = _metric(metric)
    n, depth = len(aligned), list(range(lm.n_layers)) if layers is None else list(layers)
    noise = direction == "noise"
    base, source = (aligned.clean, aligned.corrupt) if noise else (aligned.corrupt, aligned.clean)
    columns, in_clean, in_corrupt = _columns(aligned, roles)
    if names is not None:
        if len(names) != len(columns) or len(set(names)) != len(names):
            raise CutawayError(f"{len(names)} names were given for {len(columns)} columns; give each its own")
        columns = list(names)
    to, frm = (in_clean, in_corrupt) if noise else (in_corrupt, in_clean)
    if roles is not None:
        drawn = _random_positions(aligned, torch.cat([in_clean, in_corrupt]), draws, seed)
        to, frm = torch.cat([to, drawn]), torch.cat([frm, drawn])

    given = lm.run(source, capture=[site.format(l=layer) for layer in depth], logits="last")
    source_logits = _answers(given)
    base_logits = _answers(lm.run(base, logits="last"))
    clean_logits = base_logits if noise else source_logits
    targets = Targets(aligned.answer, aligned.wrong, clean_logits)
    m_base, m_source = measure(base_logits, targets), measure(source_logits, targets)
    goal, other = (aligned.wrong, aligned.answer) if noise else (aligned.answer, aligned.wrong)

    def flipped(logits: Tensor) -> Tensor:
        """Whether each row [n, V] is answered as the source is."""
        towards, away = goal.to(logits.device), other.to(logits.device)
        if criterion == "top1":
            return logits.argmax(-1) == towards
        wanted, unwanted = (logits.gather(-1, ids[:, None])[:, 0] for ids in (towards, away))
        return wanted > unwanted

    here = Targets(*(t.to(lm.device) for t in (targets.answer, targets.wrong, targets.clean)))

    def judged(logits: Tensor, _tokens: Tokens) -> Tensor:
        """Metric and flip of each row [n, 2]."""
        logits = logits.float()
        return torch.stack([measure(logits, here), flipped(logits).float()], dim=-1)

    def cell(layer: int, at: list[int], of: list[int]) -> list[Edit]:
        rows = [row for row in range(n) if at[row] >= 0]
        if not rows:
            return []
        places, origins = [[at[row]] for row in rows], [[of[row]] for row in rows]
        name = site.format(l=layer)
        return [patch(name, given, rows=rows, positions=places, source_rows=rows, source_positions=origins)]

    cells = [cell(layer, at, of) for layer in depth for at, of in zip(to.tolist(), frm.tolist(), strict=True)]
    swept = lm.sweep(base, cells, judged, batch_rows=batch_rows, label="patching")
    metrics, flips = swept.values.view(len(depth), len(to), n, 2).unbind(-1)
    flips = flips > 0.5
    values, usable = recovery(metrics, m_source, m_base)
    if not usable.any():
        raise CutawayError(f"the metric {name} does not tell the clean prompts from the corrupt ones; choose another")
    k = len(columns)
    if roles is not None:
        shown, control = values[:, :k], values[:, k:].nanmean(1, keepdim=True).expand(-1, k, -1)
        flip, control_flip = flips[:, :k], flips[:, k:].float().mean(1, keepdim=True).expand(-1, k, -1)
    else:
        shown, flip = values, flips
        control, control_flip = _others(values, aligned), _others(flips.float(), aligned)
    return PatchGrid(
        model=lm.name,
        n_layers=lm.n_layers,
        site=site,
        direction=direction,
        metric=name,
        layers=tuple(depth),
        columns=tuple(columns),
        values=shown,
        flips=flip,
        clean=m_base if noise else m_source,
        corrupt=m_source if noise else m_base,
        dropped=int((~usable).sum()),
        tokens=aligned.clean.strings[0] if roles is None else (),
        random_values=control,
        random_flips=control_flip,
        base_flips=flipped(base_logits),
    )


def _metric(metric: str | Metric) -> tuple[str, Metric]:
    if callable(metric):
        return getattr(metric, "__name__", "metric"), metric
    if metric not in METRICS:
        raise CutawayError(f"no metric is called {metric!r}; there are {', '.join(METRICS)}, or give a function")
    return metric, METRICS[metric]


def _others(values: Tensor, pairs: AlignedPairs) -> Tensor:
    """For each cell the mean over the pair's other positions from its first differing token on [layers, p, n].

    This is the expectation of patching one random other position, exactly, since every position was patched.
    """
    p = values.shape[1]
    able = torch.arange(p)[:, None] >= pairs.first_difference()[None]
    weight = able.to(values.dtype)
    total, count = (values * weight).nansum(1, keepdim=True), weight.sum(0)
    own = torch.where(able, values.nan_to_num(0.0), torch.zeros_like(values))
    left = count - weight
    mean = (total - own) / left.clamp(min=1)
    nothing = (left == 0) | values.isnan()
    return torch.where(nothing, torch.where(values.isnan(), values, torch.zeros_like(values)), mean)
