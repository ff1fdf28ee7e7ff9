"""Does a circuit do what the model does? Faithfulness, alone and by size, beside circuits that should not.

f(C) = (m(C) - m(∅)) / (m(N) - m(∅)): m(C) is the metric with every edge outside C ablated, m(∅) with all edges, m(N)
with none. 1 is the whole model, 0 the ablated one; f can exceed 1 or be negative. The areas are those of the
Mechanistic Interpretability Benchmark (Mueller et al. 2025): CPR under f, CMD under |1 - f|, over ten shares of edges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.results import Choices, Control, Effect, Interval
from cutaway.artifacts.statistics import bootstrap_interval, bootstrap_weights, ratio_intervals, resampled_intervals
from cutaway.causal.circuits.baselines import By, Select, random_circuits, select_edges, sized_circuit
from cutaway.causal.circuits.stability import MIN_PAIRS
from cutaway.causal.edge_graph import EdgeGraph
from cutaway.causal.effects import Effects
from cutaway.causal.metrics import recovery
from cutaway.draw.charts import Series, line_legend, line_svg
from cutaway.draw.panels import fold, table_html
from cutaway.draw.text import interval

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
UNITS = "share of the metric's fall"
_RESAMPLES = 2000


class Runs(Protocol):
    """The metric of n pairs under C circuits: values [C, n], of the model [n], with every edge ablated [n]."""

    @property
    def values(self) -> Tensor: ...
    @property
    def clean(self) -> Tensor: ...
    @property
    def corrupt(self) -> Tensor: ...


RunCircuits = Callable[[Tensor], Runs]
"""From masks [C, ...] to what they give: `run_circuits` with everything else settled."""


@dataclass(frozen=True)
class MeasuredCircuits:
    """C circuits on n pairs, in float64: `values` [C, n], `clean` and `corrupt` [n], and f on R bootstrap draws of the
    pairs, `resampled` [R, C], where the pairs have `weights` [R, n]. The draws are the same for all circuits, so that
    these can be compared draw by draw.
    """

    values: Tensor
    clean: Tensor
    corrupt: Tensor
    resampled: Tensor
    weights: Tensor

    @property
    def n(self) -> int:
        return len(self.clean)

    @property
    def ratio(self) -> Tensor:
        """Ratio of means: f of the mean metric [C]."""
        return _ratio(self.values.mean(1), self.clean.mean(), self.corrupt.mean())

    def mean_of_ratios(self, circuit: int) -> tuple[Tensor, int]:
        """f of each pair that can be judged, and how many cannot, since ablation hardly changes their metric."""
        each, usable = recovery(self.values[circuit], self.clean, self.corrupt)
        return each[usable], int((~usable).sum())

    def interval(self, circuit: int) -> Interval:
        """95 % interval of f over pairs."""
        return self.interval_of(self.values[circuit])

    def interval_of(self, values: Tensor) -> Interval:
        """95 % interval of f over pairs, where a metric of `values` [n] takes the place of a circuit's."""
        low, high = ratio_intervals((values - self.corrupt).numpy(), (self.clean - self.corrupt).numpy())
        return float(low), float(high)

    def interval_over(self, value: float, drawn: Tensor) -> Interval:
        """95 % interval over pairs of a figure of several circuits, from its value on each of the draws [R]."""
        low, high = resampled_intervals(value, drawn.numpy(), self.weights.numpy())
        return float(low), float(high)

    def __getitem__(self, circuits: slice) -> MeasuredCircuits:
        return MeasuredCircuits(
            self.values[circuits], self.clean, self.corrupt, self.resampled[:, circuits], self.weights
        )


def measure(runs: Runs, *, resamples: int = _RESAMPLES, seed: int = 0) -> MeasuredCircuits:
    """f of each circuit with bootstrap draws of the pairs.

    Raises CutawayError for fewer than 8 pairs, or where the metric is the same with every edge ablated.
    """
    values, clean, corrupt = (t.double().cpu() for t in (runs.values, runs.clean, runs.corrupt))
    n = len(clean)
    if n < MIN_PAIRS:
        raise CutawayError(f"{n} pairs are too few for an interval; give {MIN_PAIRS} or more.")
    fall = float((clean - corrupt).mean())
    if abs(fall) < 1e-6 * max(1.0, float(clean.abs().max())):
        raise CutawayError(
            "With every edge ablated the mean metric is what it is in the whole model, so no circuit can be told from "
            "none: give pairs whose two prompts differ in the metric, or another metric or ablation."
        )
    weights = torch.from_numpy(bootstrap_weights(n, resamples, seed))
    resampled = _ratio(weights @ values.T, (weights @ clean)[:, None], (weights @ corrupt)[:, None])
    return MeasuredCircuits(values, clean, corrupt, resampled, weights)


def _ratio(m: Tensor, whole: Tensor, ablated: Tensor) -> Tensor:
    return (m - ablated) / (whole - ablated)


def middle(values: Tensor) -> Interval:
    """The middle 95 % of numbers, whatever their shape."""
    low, high = np.nanquantile(values.double().numpy(), [0.025, 0.975])
    return float(low), float(high)


def area(fractions: Sequence[float], heights: Tensor) -> Tensor:
    """Area under `heights` [..., k] over the k fractions by trapezoids, linear in the fraction.

    As the benchmark computes it: what lies below the first fraction is left out.
    """
    return torch.trapezoid(heights.double(), torch.tensor(fractions, dtype=torch.float64), dim=-1)


def cpr(fractions: Sequence[float], f: Tensor) -> Tensor:
    """Area under f [..., k]: higher is better; above 1 where small circuits exceed the model."""
    return area(fractions, f)


def cmd(fractions: Sequence[float], f: Tensor) -> Tensor:
    """Area under |1 - f| [..., k]: 0 is best."""
    return area(fractions, (1 - f).abs())


# one circuit beside others of its size


@dataclass(frozen=True, repr=False)
class Faithfulness(Effects):
    """f of a circuit on held-out pairs, as ratio of means and as mean of ratios, beside random and strong circuits."""

    title = "Faithfulness of a circuit"


@dataclass(frozen=True)
class BaselineCircuits:
    """What a circuit is compared with: random circuits [R, ...] and one ranked by magnitude, with at least its size."""

    random: Tensor
    magnitude: Tensor | None

    @property
    def masks(self) -> Tensor:
        return self.random if self.magnitude is None else torch.cat([self.random, self.magnitude[None]])


def baseline_circuits(
    graph: EdgeGraph, mask: Tensor, magnitude: Tensor | None, *, select: Select, draws: int = 20, seed: int = 0
) -> BaselineCircuits:
    """Random connected circuits with exactly as many edges, and the strongest edges (rounded up after pruning)."""
    n = int(mask.sum())
    strong = None if magnitude is None else sized_circuit(graph, magnitude, n, select=select, rounding="up")[0]
    return BaselineCircuits(random_circuits(graph, n, draws, seed=seed), strong)


def faithfulness(
    measured: MeasuredCircuits,
    baselines: BaselineCircuits,
    *,
    choices: Choices,
    search: float | None = None,
) -> Faithfulness:
    """f of the first circuit as ratio of means and as mean of ratios; the baselines follow it in `measured`.

    The interval of the random circuits is the spread of single circuits over draws of circuits and of pairs, so what
    lies above it is above 97.5 % of random circuits. `search` is f on the pairs by which the circuit was found.
    """
    draws = len(baselines.random)
    random = measured[slice(1, 1 + draws)]
    controls = [
        Control("random circuits of the same size", float(random.ratio.mean()), middle(random.resampled), draws)
    ]
    each, dropped = measured.mean_of_ratios(0)
    singles = [random.mean_of_ratios(i)[0] for i in range(draws)]
    means = torch.stack([one.mean() for one in singles])
    beside = [Control("random circuits of the same size", float(means.mean()), middle(means), draws)]
    if baselines.magnitude is not None:
        at, edges = 1 + draws, int(baselines.magnitude.sum())
        name = f"strongest edges ({edges:,})"
        controls.append(Control(name, float(measured.ratio[at]), measured.interval(at), measured.n))
        strong = measured.mean_of_ratios(at)[0]
        beside.append(Control(name, float(strong.mean()), _interval_of_mean(strong), len(strong)))
    if search is not None:
        controls.append(Control("the pairs it was found on", search))
    ablation = choices.ablation
    left = f", {dropped} pairs left out" if dropped else ""
    effects = (
        Effect(
            "faithfulness", float(measured.ratio[0]), measured.n, measured.interval(0), tuple(controls), ablation,
            UNITS, choices=choices,
        ),
        Effect(
            f"faithfulness, mean over pairs{left}", float(each.mean()), len(each), _interval_of_mean(each),
            tuple(beside), ablation, UNITS, choices=choices,
        ),
    )  # fmt: skip
    return Faithfulness(effects)


def _interval_of_mean(values: Tensor) -> Interval | None:
    n = len(values)
    if n < MIN_PAIRS:
        return None
    return bootstrap_interval(values.numpy())


# by size


@dataclass(frozen=True)
class SizeSeries:
    """f at each size: `edges` after pruning, `value`, and the 95 % interval from `low` to `high`; of random circuits
    the middle 95 % of them over draws of the pairs."""

    name: str
    edges: tuple[float, ...]
    value: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    control: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SizeSeries:
        numbers = (tuple(map(float, data[key])) for key in ("edges", "value", "low", "high"))
        return cls(data["name"], *numbers, control=data["control"])


@dataclass(frozen=True, repr=False)
class SizeCurve(Effects):
    """f of circuits of every size, and the areas CPR and CMD, beside the strongest edges and random circuits."""

    fractions: tuple[float, ...]
    """Shares of the graph's edges that were asked for [K]."""
    series: tuple[SizeSeries, ...]
    """One curve of K sizes each: the circuit's edges, the strongest edges, random circuits."""

    title = "Faithfulness by size"

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "fractions": list(self.fractions), "curve": [s.to_json() for s in self.series]}

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "circuits": one.name, "control": one.control, "fraction": fraction, "edges": one.edges[i],
                "value": one.value[i], "low": one.low[i], "high": one.high[i],
            }
            for one in self.series
            for i, fraction in enumerate(self.fractions)
        ]  # fmt: skip

    def drawing(self) -> Markup:
        series: list[Series] = [
            {
                "name": one.name, "x": [max(1.0, edges) for edges in one.edges], "y": one.value, "low": one.low,
                "high": one.high, "control": one.control,
            }
            for one in self.series
        ]  # fmt: skip
        chart = line_svg(
            series=series, title=self.title, x_label="edges after pruning", y_label="faithfulness", log_x=True
        )
        cells = [
            [f"{100 * fraction:g} %"]
            + [f"{interval(one.value[i], one.low[i], one.high[i])} ({int(one.edges[i]):,})" for one in self.series]
            for i, fraction in enumerate(self.fractions)
        ]
        columns = ["of the edges", *(f"{one.name} (edges)" for one in self.series)]
        table = fold("As a table", table_html(columns=columns, rows=cells, title="By size"))
        return chart + line_legend(series) + table + super().drawing()


@dataclass(frozen=True)
class SizePlan:
    """The circuits of a size curve: masks of K sizes by the scores, signed, absolute, by magnitude, and at random."""

    fractions: tuple[float, ...]
    masks: Tensor  # [(3 + magnitude + draws) * K, ...]
    magnitude: bool
    draws: int


def plan_sizes(
    graph: EdgeGraph,
    scores: Tensor,
    magnitude: Tensor | None,
    *,
    select: Select = "greedy",
    by: By = "absolute",
    fractions: Sequence[float] = FRACTIONS,
    draws: int = 5,
    seed: int = 0,
) -> SizePlan:
    """As many edges as each fraction of the graph, rounded down but at least one, are asked for and pruned.

    The benchmark's areas take the highest edges: by signed scores for CPR, absolute ones for CMD. The curve itself is
    of the circuits as they are selected otherwise. Random circuits have as many edges as these after pruning.
    """
    sizes = [max(1, int(fraction * graph.n_edges)) for fraction in fractions]
    ours = [select_edges(graph, scores, size, select, by) for size in sizes]
    masks = [*ours]
    masks += [select_edges(graph, scores, size, "top", "signed") for size in sizes]
    masks += [select_edges(graph, scores, size, "top", "absolute") for size in sizes]
    if magnitude is not None:
        masks += [select_edges(graph, magnitude, size, select, "absolute") for size in sizes]
    drawn = [random_circuits(graph, int(mask.sum()) or 1, draws, seed=seed + i) for i, mask in enumerate(ours)]
    masks += [one[draw] for draw in range(draws) for one in drawn]
    return SizePlan(tuple(fractions), torch.stack(masks), magnitude is not None, draws)


def size_curve(plan: SizePlan, measured: MeasuredCircuits, *, choices: Choices) -> SizeCurve:
    """The curves of a plan's circuits, and CPR and CMD beside those of magnitudes and of random circuits."""
    k = len(plan.fractions)
    edges = plan.masks.flatten(1).sum(1).double()
    blocks = [slice(i * k, (i + 1) * k) for i in range(len(plan.masks) // k)]
    ours, signed, absolute = blocks[:3]
    strong = blocks[3] if plan.magnitude else None
    random = blocks[4:] if plan.magnitude else blocks[3:]
    series = [_series("the circuit's edges", measured, edges, ours)]
    if strong is not None:
        series.append(_series("strongest edges", measured, edges, strong, control=True))
    ratios = torch.stack([measured.ratio[block] for block in random])  # [draws, k]
    resampled = torch.stack([measured.resampled[:, block] for block in random], 1)  # [R, draws, k]
    ends = [middle(resampled[..., i]) for i in range(k)]
    series.append(
        SizeSeries(
            "random circuits", tuple(edges[random[0]].tolist()), tuple(ratios.mean(0).tolist()),
            tuple(low for low, _ in ends), tuple(high for _, high in ends), True,
        )
    )  # fmt: skip
    effects = []
    for name, function, block in (("CPR", cpr, signed), ("CMD", cmd, absolute)):
        chance = function(plan.fractions, resampled)
        controls = [
            Control("random circuits", float(function(plan.fractions, ratios).mean()), middle(chance), plan.draws)
        ]
        if strong is not None:
            value = float(function(plan.fractions, measured.ratio[strong]))
            drawn = function(plan.fractions, measured.resampled[:, strong])
            controls.append(Control("strongest edges", value, measured.interval_over(value, drawn), measured.n))
        value = float(function(plan.fractions, measured.ratio[block]))
        drawn = function(plan.fractions, measured.resampled[:, block])
        what = "area under f" if name == "CPR" else "area under |1 − f|"
        effects.append(
            Effect(
                name,
                value,
                measured.n,
                measured.interval_over(value, drawn),
                tuple(controls),
                choices.ablation,
                what,
                choices=choices,
            )
        )
    return SizeCurve(tuple(effects), plan.fractions, tuple(series))


def _series(name: str, measured: MeasuredCircuits, edges: Tensor, block: slice, *, control: bool = False) -> SizeSeries:
    ends = [measured.interval(i) for i in range(block.start, block.stop)]
    return SizeSeries(
        name,
        tuple(edges[block].tolist()),
        tuple(measured.ratio[block].tolist()),
        tuple(low for low, _ in ends),
        tuple(high for _, high in ends),
        control,
    )


# the smallest circuit that is faithful enough


def smallest_faithful(
    run: RunCircuits,
    graph: EdgeGraph,
    scores: Tensor,
    target: float,
    *,
    select: Select = "greedy",
    by: By = "absolute",
    max_edges: int | None = None,
    steps: int = 12,
    rounds: int = 3,
) -> tuple[Tensor, int, float]:
    """The smallest circuit with f of at least `target`: its mask, how many edges were asked for, and its f.

    Sizes are tried on a grid with equal factors, then on finer ones below the first that reaches the target, each grid
    in one pass. Larger circuits can be less faithful; what counts is the first size tried that reaches it. Raises
    CutawayError where no size up to `max_edges` edges (default: half the graph's) does.
    """
    if not 0 < target <= 1:
        raise CutawayError(f"A faithfulness to reach lies above 0 and up to 1; got {target}.")
    max_edges = max(2, graph.n_edges // 2) if max_edges is None else max_edges
    low, high = 1, max_edges
    best: tuple[Tensor, int, float] | None = None
    highest = -float("inf")
    for _ in range(rounds):
        sizes = sorted({round(size) for size in np.geomspace(low, high, steps)})
        masks = torch.stack([select_edges(graph, scores, size, select, by) for size in sizes])
        runs = run(masks)
        f = _ratio(runs.values.double().mean(1), runs.clean.double().mean(), runs.corrupt.double().mean())
        highest = max(highest, float(f.max()))
        reached = (f >= target).nonzero().flatten().tolist()
        if not reached:
            break
        first = reached[0]
        best = (masks[first], sizes[first], float(f[first]))
        low = sizes[first - 1] + 1 if first else sizes[0]
        high = sizes[first]
        if low >= high:
            break
    if best is None:
        raise CutawayError(
            f"No circuit of up to {max_edges:,} edges reaches a faithfulness of {target:g} (the best has "
            f"{highest:.2f}): ask for less, allow more edges, or take another scorer."
        )
    return best
