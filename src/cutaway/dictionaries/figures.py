"""Figures of a dictionary from per-row sums, with intervals that count rows and, where there are several, seeds.

Every ratio is one of sums over all tokens (dataset level), so long rows count more and no token's ratio can blow up.
Tokens of one row are not independent: rows are what is drawn anew. With S dictionaries that differ in their seed, seeds
are drawn as well, crossed with the rows: a draw's figure is m + √(S/(S−1)) · (mean of the drawn seeds − m), m being the
mean of all seeds on the drawn rows. The factor undoes the bias of a bootstrap of few; with two or three seeds the
interval is still a rough one, which is why every seed's own value is kept beside it.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from cutaway.artifacts.results import Control, Effect, Interval
from cutaway.artifacts.statistics import wilson_interval

RESAMPLES = 1000

Tables = np.ndarray
"""Sums of several dictionaries by row: float64 [S, rows, columns]."""

Statistic = Callable[[np.ndarray], np.ndarray]
"""From summed columns [..., columns] to a figure [...]."""

RECONSTRUCTION = ("tokens", "active", "error", "variance", "cosine", "length", "written_length")
SPLICED = ("targets", "ce_clean", "ce_zero", "ce_mean", "ce_spliced", "kl_zero", "kl_mean", "kl")

# name: (what it is, units, what was done to the model)
NAMES = {
    "l0": ("active latents a token (L0)", "latents", "none"),
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


def statistics_of(columns: Sequence[str]) -> dict[str, Statistic]:
    """The figures that can be made of some columns, by name."""
    at = {name: place for place, name in enumerate(columns)}

    def ratio(top: Callable[[Callable[[str], np.ndarray]], np.ndarray], bottom: str) -> Statistic:
        def statistic(sums: np.ndarray) -> np.ndarray:
            below = sums[..., at[bottom]]
            with np.errstate(divide="ignore", invalid="ignore"):
                return top(lambda name: sums[..., at[name]]) / below

        return statistic

    def recovered(measure: str, ablation: str, least: str | None) -> Statistic:
        def statistic(sums: np.ndarray) -> np.ndarray:
            floor = sums[..., at[f"{measure}_{ablation}"]]
            best = 0.0 if least is None else sums[..., at[least]]
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
    command: str | None = None,
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
            command=command,
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
    weights = generator.multinomial(n_rows, np.full(n_rows, 1 / n_rows), size=RESAMPLES).astype(np.float64)
    drawn = statistic(np.einsum("rn,snc->src", weights, tables))  # [S, resamples]
    low, high = (
        np.nanquantile(over_seeds(drawn, generator), [0.025, 0.975]) if np.isfinite(drawn).any() else (np.nan,) * 2
    )
    return float(each.mean()), (float(low), float(high)), tuple(map(float, each))


def over_seeds(drawn: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draws [S, R] of each dictionary's figure -> draws [R] of their mean, seeds drawn too (see the module)."""
    n_seeds, n_draws = drawn.shape
    middle = drawn.mean(0)
    if n_seeds == 1:
        return middle
    chosen = generator.integers(0, n_seeds, (n_seeds, n_draws))
    picked = np.take_along_axis(drawn, chosen, axis=0).mean(0)
    return middle + (n_seeds / (n_seeds - 1)) ** 0.5 * (picked - middle)


def share_effect(
    name: str,
    successes: Sequence[int],
    n: int,
    controls: Mapping[str, Sequence[int]],
    *,
    units: str = "share",
    command: str | None = None,
) -> tuple[Effect, tuple[float, ...]]:
    """A share of n latents that holds in each of several dictionaries, beside controls; and each one's own value.

    The interval is Wilson's for one dictionary; for several, latents (binomially) and seeds are drawn, and it is no
    narrower than Wilson's.
    """

    def measured(counts: Sequence[int]) -> tuple[float, Interval]:
        shares = np.array(counts) / n
        if len(counts) == 1:
            return float(shares[0]), wilson_interval(int(counts[0]), n)
        generator = np.random.default_rng(0)
        drawn = np.stack([generator.binomial(n, share, RESAMPLES) / n for share in shares])
        low, high = np.quantile(over_seeds(drawn, generator), [0.025, 0.975])
        # draws of a share of 0 or 1 do not vary, but what was not seen among n may still be
        least, most = wilson_interval(round(float(shares.mean()) * n), n)
        return float(shares.mean()), (float(min(max(0.0, low), least)), float(max(min(1.0, high), most)))

    value, interval = measured(successes)
    stood_beside = []
    for control, counts in controls.items():
        other, other_interval = measured(counts)
        stood_beside.append(Control(control, other, other_interval, n))
    found = Effect(name, value, n, interval, tuple(stood_beside), "none", units, command)
    return found, tuple(count / n for count in successes)


def mean_effect(
    name: str,
    values: Sequence[np.ndarray],
    controls: Mapping[str, Sequence[np.ndarray]],
    *,
    units: str,
    command: str | None = None,
) -> tuple[Effect, tuple[float, ...]]:
    """Mean over latents of a number each has, in each of several dictionaries, beside controls; and each's own mean.

    Latents that have none (NaN) are left out. Latents and seeds are drawn for the interval.
    """

    def measured(given: Sequence[np.ndarray]) -> tuple[float, Interval | None, int]:
        some = [each[np.isfinite(each)] for each in given]
        if not all(map(len, some)):
            return float("nan"), None, 0
        generator = np.random.default_rng(0)
        drawn = np.array([[generator.choice(one, len(one)).mean() for _ in range(300)] for one in some])
        low, high = np.quantile(over_seeds(drawn, generator), [0.025, 0.975])
        return float(np.mean([one.mean() for one in some])), (float(low), float(high)), len(some[0])

    value, interval, n = measured(values)
    beside = []
    for control, given in controls.items():
        other, other_interval, m = measured(given)
        beside.append(Control(control, other, other_interval, m))
    each = tuple(float(np.nanmean(one)) for one in values)
    return Effect(name, value, n, interval, tuple(beside), "none", units, command), each
