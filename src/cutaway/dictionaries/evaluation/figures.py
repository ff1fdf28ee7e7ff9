"""Figures of a dictionary from per-row sums, with intervals that count rows and, where there are several, seeds.

Every ratio is one of sums over all tokens (dataset level), so long rows count more and no token's ratio can blow up.
Tokens of one row are not independent: rows are what is drawn anew. With S dictionaries that differ in their seed, the
interval is that over rows and Student's t interval over the seeds together: the root of the sum of squares of their
half widths. With two or three seeds it is wide, as it has to be; every seed's own value is kept beside it.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cutaway.artifacts.results import Control, Effect, Interval, interval_text
from cutaway.artifacts.statistics import mean_intervals, resampled_intervals, student_intervals, wilson_interval

_RESAMPLES = 1000

Tables = np.ndarray
"""Sums of several dictionaries by row: float64 [S, rows, columns]."""

Statistic = Callable[[np.ndarray], np.ndarray]
"""From summed columns [..., columns] to a figure [...]."""

RECONSTRUCTION = ("tokens", "active", "error", "variance", "cosine", "length", "written_length")
SPLICED = ("targets", "ce_clean", "ce_zero", "ce_mean", "ce_spliced", "kl_zero", "kl_mean", "kl")

# name: (what it is, units, what was done to the model)
NAMES = {
    "l0": ("active latents per token (L0)", "latents", "none"),
    "variance_explained": ("variance explained, 1 − Σ‖x − x̂‖² / Σ‖x − x̄‖² over all tokens", "share", "none"),
    "fvu": ("fraction of variance unexplained, Σ‖x − x̂‖² / Σ‖x − x̄‖² over all tokens", "share", "none"),
    "cosine": ("signed cosine of x and x̂, mean over tokens", "cosine", "none"),
    "norm_ratio": ("norm ratio, Σ‖x̂‖ / Σ‖x‖ over all tokens", "ratio", "none"),
    "ce_recovered_zero": ("cross-entropy recovered against zero ablation", "share", "zero ablation"),
    "ce_recovered_mean": ("cross-entropy recovered against mean ablation", "share", "mean ablation"),
    "ce_increase": ("rise of the cross-entropy with x̂ in place of x", "nats", "site set to the reconstruction"),
    "kl_recovered_zero": ("KL recovered against zero ablation", "share", "zero ablation"),
    "kl_recovered_mean": ("KL recovered against mean ablation", "share", "mean ablation"),
    "kl": ("KL(model ‖ model with x̂ in place of x)", "nats", "site set to the reconstruction"),
}


def figure_rows(effects: Iterable[tuple[str, Effect]]) -> list[dict[str, Any]]:
    """A flat row per effect: its name here, value, interval, n, units, and its first control."""
    found = []
    for name, one in effects:
        low, high = one.interval or (None, None)
        control = one.controls[0] if one.controls else None
        found.append(
            {
                "figure": name, "value": one.value, "low": low, "high": high, "n": one.n, "units": one.units,
                "control": control and control.name, "control_value": control and control.value,
            }
        )  # fmt: skip
    return found


def figure_line(effect: Effect) -> str:
    """An effect as a line of text: value, interval, units, controls."""
    beside = ", ".join(f"{control.name.split(',')[0]} {control.value:.4f}" for control in effect.controls)
    return f"{effect.name}: {effect.value:.4f} {interval_text(effect.interval, 4)} {effect.units}; {beside}"


def statistics_of(columns: Sequence[str]) -> dict[str, Statistic]:
    """The figures that can be made of some columns, by name."""
    at = {name: place for place, name in enumerate(columns)}

    def ratio(top: Callable[[Callable[[str], np.ndarray]], np.ndarray], bottom: str) -> Statistic:
        def statistic(sums: np.ndarray) -> np.ndarray:
            below = sums[..., at[bottom]]
            with np.errstate(divide="ignore", invalid="ignore"):
                return top(lambda name: sums[..., at[name]]) / below

        return statistic

    def recovered(measure: str, ablation: str, clean: str | None) -> Statistic:
        def statistic(sums: np.ndarray) -> np.ndarray:
            floor = sums[..., at[f"{measure}_{ablation}"]]
            best = 0.0 if clean is None else sums[..., at[clean]]
            found = sums[..., at["kl" if measure == "kl" else "ce_spliced"]]
            with np.errstate(divide="ignore", invalid="ignore"):
                return (floor - found) / (floor - best)

        return statistic

    found: dict[str, Statistic] = {}
    if "active" in at:
        found |= {
            "l0": ratio(lambda get: get("active"), "tokens"),
            "variance_explained": ratio(lambda get: get("variance") - get("error"), "variance"),
            "fvu": ratio(lambda get: get("error"), "variance"),
            "cosine": ratio(lambda get: get("cosine"), "tokens"),
            "norm_ratio": ratio(lambda get: get("written_length"), "length"),
        }
    if "targets" in at:
        found |= {
            "ce_recovered_zero": recovered("ce", "zero", "ce_clean"),
            "ce_recovered_mean": recovered("ce", "mean", "ce_clean"),
            "ce_increase": ratio(lambda get: get("ce_spliced") - get("ce_clean"), "targets"),
            "kl_recovered_zero": recovered("kl", "zero", None),
            "kl_recovered_mean": recovered("kl", "mean", None),
            "kl": ratio(lambda get: get("kl"), "targets"),
        }
    return found


def effect(
    name: str,
    trained: Tables,
    controls: Mapping[str, Tables],
    statistic: Statistic,
    *,
    of: str = "",
) -> tuple[Effect, tuple[float, ...]]:
    """One figure of S dictionaries beside the same figure of their controls, and each dictionary's own value.

    The value is the mean over the dictionaries. `of` is added to the figure's name ("at blocks.3.mlp.out").
    """
    label, units, ablation = NAMES[name]
    value, interval, each = summary(trained, statistic)
    stood_beside = []
    for control, tables in controls.items():
        other, other_interval, _ = summary(tables, statistic)
        stood_beside.append(Control(control, other, other_interval, tables.shape[1]))
    return (
        Effect(
            name=f"{label} {of}".strip(),
            value=value,
            n=trained.shape[1],
            interval=interval,
            controls=tuple(stood_beside),
            ablation=ablation,
            units=units,
        ),
        each,
    )


def summary(tables: Tables, statistic: Statistic, *, seed: int = 0) -> tuple[float, Interval, tuple[float, ...]]:
    """Mean over the dictionaries of a figure on all rows, its 95 % interval, and each dictionary's value.

    Fewer than two rows have no interval: (nan, nan).
    """
    each = statistic(tables.sum(1))
    n_rows = tables.shape[1]
    if n_rows < 2:
        return float(each.mean()), (float("nan"), float("nan")), tuple(map(float, each))
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(n_rows, np.full(n_rows, 1 / n_rows), size=_RESAMPLES).astype(np.float64)
    drawn = statistic(np.einsum("rn,snc->src", weights, tables))  # [S, resamples]
    ends = resampled_intervals(each.mean(), drawn.mean(0), weights / n_rows)
    return float(each.mean()), with_seeds(each, (float(ends[0]), float(ends[1]))), tuple(map(float, each))


def with_seeds(each: np.ndarray, ends: Interval) -> Interval:
    """The interval of the mean of S seeds' figures [S], from its interval for these very seeds (see the module)."""
    middle = float(each.mean())
    if len(each) == 1:
        return ends
    seeds = middle - float(student_intervals(each)[0])
    return middle - math.hypot(middle - ends[0], seeds), middle + math.hypot(ends[1] - middle, seeds)


def share_effect(
    name: str,
    successes: Sequence[int],
    n: int,
    controls: Mapping[str, Sequence[int]],
) -> tuple[Effect, tuple[float, ...]]:
    """A share of n latents that holds in each of several dictionaries, beside controls; and each one's own value.

    The interval is Wilson's; for several dictionaries, widened by their seeds.
    """

    def measured(counts: Sequence[int]) -> tuple[float, Interval]:
        shares = np.array(counts) / n
        if len(counts) == 1:
            return float(shares[0]), wilson_interval(int(counts[0]), n)
        low, high = with_seeds(shares, wilson_interval(round(float(shares.mean()) * n), n))
        return float(shares.mean()), (max(0.0, low), min(1.0, high))

    value, interval = measured(successes)
    stood_beside = []
    for control, counts in controls.items():
        other, other_interval = measured(counts)
        stood_beside.append(Control(control, other, other_interval, n))
    found = Effect(name, value, n, interval, tuple(stood_beside), "none", "share")
    return found, tuple(count / n for count in successes)


def mean_effect(
    name: str,
    values: Sequence[np.ndarray],
    controls: Mapping[str, Sequence[np.ndarray]],
    *,
    units: str,
) -> tuple[Effect, tuple[float, ...]]:
    """Mean over latents of a number each has, in each of several dictionaries, beside controls; and each's own mean.

    Latents that have none (NaN) are left out. The interval is over the latents of one dictionary, over several of them.
    """

    def measured(given: Sequence[np.ndarray]) -> tuple[float, Interval | None, int]:
        some = [each[np.isfinite(each)] for each in given]
        if not all(map(len, some)):
            return float("nan"), None, 0
        means = np.array([one.mean() for one in some])
        if len(some) > 1:  # how their means differ has the latents in it
            ends = student_intervals(means)
        else:
            ends = mean_intervals(some[0])
        return float(means.mean()), (float(ends[0]), float(ends[1])), len(some[0])

    value, interval, n = measured(values)
    beside = []
    for control, given in controls.items():
        other, other_interval, m = measured(given)
        beside.append(Control(control, other, other_interval, m))
    each = tuple(float(np.nanmean(one)) for one in values)
    return Effect(name, value, n, interval, tuple(beside), "none", units), each
