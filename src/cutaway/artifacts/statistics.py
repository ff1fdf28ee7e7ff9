"""Intervals and rank statistics that results are reported with."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike


_FEWEST, _MOST = 4, 400
"""From how many examples on, and up to how many, an interval takes the skew of the values from resamples. Of fewer
there is too little to see it by, among more there is none left in the mean: Student's t does."""
_NARROWEST, _WIDEST = 0.9, 2.5


def bootstrap_interval(
    values: "ArrayLike",
    statistic: Callable[["np.ndarray"], Any] | None = None,
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> tuple[float, float]:
    """Studentised bootstrap interval of a statistic of independent examples (`mean_intervals` says how it is made).

    How much each example moves the statistic is fitted to the resamples; for more than a quarter as many examples as
    resamples, for which that is no fit, the interval is that of percentiles.

    Args:
        values: [n] or [n, ...], one example per row; rows are drawn with replacement.
        statistic: Takes such an array and returns one number that changes smoothly with the examples: a ratio, a
            correlation, an AUROC, no median. None: the mean.
        level: In how many cases the interval should hold the truth.
        n_resamples: How many resamples.
        seed: The same seed gives the same interval.
        bounds: The smallest and the largest value that the statistic can have.

    Returns:
        Both ends; (nan, nan) below two examples.
    """
    import numpy as np

    rows = np.asarray(values, dtype=np.float64)
    n = len(rows)
    if n < 2:
        return math.nan, math.nan
    if statistic is None:
        low, high = mean_intervals(rows.reshape(n, -1).mean(1), n_resamples, seed, level=level)
    else:
        drawn = np.random.default_rng(seed).integers(0, n, (n_resamples, n))
        found = np.array([float(statistic(rows[row])) for row in drawn])
        weights = np.stack([np.bincount(row, minlength=n) for row in drawn]) / n
        low, high = resampled_intervals(float(statistic(rows)), found, weights, level=level)
    return float(max(low, bounds[0])), float(min(high, bounds[1]))


def bootstrap_weights(n: int, n_resamples: int = 2000, seed: int = 0) -> "np.ndarray":
    """How much each of n examples counts in each resample, float64 [n_resamples, n]; rows sum to 1.

    Many means of the same examples are then one product, `weights @ values`.
    """
    import numpy as np

    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples) / n


def mean_intervals(values: "ArrayLike", n_resamples: int = 2000, seed: int = 0, *, level: float = 0.95) -> "np.ndarray":
    """Intervals of many means over the same n examples.

    The mean, less and more so many standard errors: as many as the mean of a resample is off by, in standard errors of
    that resample (the studentised bootstrap), which is more on the side of a skew. Each side is 0.9 to 2.5 times as
    wide as Student's t, which it is below 4 examples and beyond 400. Intervals called 95 % then hold the mean in 0.93
    to 0.97 of cases, for skewed values too, but for heavy skew among few examples (0.90 of 8 lognormal values with a
    deviation of 1 in the logarithm); `tests/artifacts/test_intervals.py` has the figures. Values that are all the same
    have an interval of width 0; of shares of yes and no take `wilson_interval`.

    Args:
        values: [..., n].
        n_resamples: How many resamples.
        seed: Of the resamples.
        level: In how many cases an interval should hold the truth.

    Returns:
        float64 [2, ...]; NaN below two examples.
    """
    import numpy as np

    kept = np.asarray(values, dtype=np.float64)
    return ratio_intervals(kept, np.ones(kept.shape[-1]), n_resamples, seed, level=level)


def ratio_intervals(
    above: "ArrayLike", below: "ArrayLike", n_resamples: int = 2000, seed: int = 0, *, level: float = 0.95
) -> "np.ndarray":
    """Intervals of ratios of sums over n examples, Σ above / Σ below.

    Made as those of means are, with the standard error of a ratio (each example's `above` less the ratio times its
    `below`).

    Args:
        above: Numerators [..., n].
        below: Denominators [..., n].
        n_resamples: How many resamples.
        seed: Of the resamples.
        level: In how many cases an interval should hold the truth.

    Returns:
        float64 [2, ...]; NaN below two examples, and where Σ below is 0 or a value is not finite.
    """
    import numpy as np

    a, b = np.broadcast_arrays(np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64))
    shape, n = a.shape[:-1], a.shape[-1]
    ends = np.full((2, math.prod(shape)), np.nan)
    if n < 2:
        return ends.reshape(2, *shape)
    a, b = a.reshape(-1, n).T, b.reshape(-1, n).T
    known = np.flatnonzero(np.isfinite(a.sum(0)) & np.isfinite(b.sum(0)) & (b.sum(0) != 0))
    if len(known) == 0:
        return ends.reshape(2, *shape)
    weights = bootstrap_weights(n, n_resamples, seed) if _FEWEST <= n <= _MOST else None
    with np.errstate(divide="ignore", invalid="ignore"):
        for part in np.split(known, range(256, len(known), 256)):  # [resamples, columns] at a time
            x, y = a[:, part], b[:, part]
            value = x.mean(0) / y.mean(0)
            moves, share = (x - value * y) / y.mean(0), y / y.mean(0)
            if weights is None:
                ends[:, part] = _student(value, moves, level)
                continue
            counts = weights @ share
            off = (weights @ moves) / counts
            # Σ of squares of what the examples move the resample's own ratio by
            squares = weights @ moves**2 - 2 * off * (weights @ (moves * share)) + off**2 * (weights @ share**2)
            ends[:, part] = _studentised(value, moves, off, squares / counts**2, level)
    return ends.reshape(2, *shape)


def resampled_intervals(
    value: "ArrayLike", resampled: "ArrayLike", weights: "np.ndarray", *, level: float = 0.95
) -> "np.ndarray":
    """Intervals of statistics that were measured on resamples: float64 [2, ...].

    `value` [...] is the statistic of all n examples, `resampled` [r, ...] that of the resamples in which the examples
    have `weights` [r, n] (rows sum to 1). How much an example moves the statistic is fitted by least squares; where
    there are fewer than 4 n resamples to fit it to, the interval is that of percentiles.
    """
    import numpy as np

    found = np.asarray(resampled, dtype=np.float64)
    shape, (r, n) = found.shape[1:], weights.shape
    flat, middle = found.reshape(r, -1), np.asarray(value, dtype=np.float64).reshape(-1)
    ends = np.full((2, flat.shape[1]), np.nan)
    some = np.isfinite(flat).any(0) & np.isfinite(middle)
    if not some.any():
        return ends.reshape(2, *shape)
    flat, middle = flat[:, some], middle[some]
    if r < 4 * n:
        ends[:, some] = np.nanquantile(flat, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return ends.reshape(2, *shape)
    off = np.where(np.isfinite(flat), flat - middle, 0.0)
    moves = np.linalg.lstsq(weights, off, rcond=None)[0]
    moves -= moves.mean(0)
    if n < _FEWEST:
        ends[:, some] = _student(middle, moves, level)
    else:
        squares = weights @ moves**2 - (weights @ moves) ** 2
        ends[:, some] = _studentised(middle, moves, np.where(np.isfinite(flat), off, np.nan), squares, level)
    return ends.reshape(2, *shape)


def student_intervals(values: "ArrayLike", *, level: float = 0.95) -> "np.ndarray":
    """Student's t intervals of means, [..., n] -> float64 [2, ...]; NaN below two values.

    For a handful of values that are themselves means, such as those of a few seeds.
    """
    import numpy as np

    kept = np.asarray(values, dtype=np.float64)
    n, mean = kept.shape[-1], kept.mean(-1)
    if n < 2:
        return np.full((2, *mean.shape), np.nan)
    moves = np.moveaxis(kept - mean[..., None], -1, 0).reshape(n, -1)
    return _student(mean.reshape(-1), moves, level).reshape(2, *mean.shape)


def _student(value: "np.ndarray", moves: "np.ndarray", level: float) -> "np.ndarray":
    """Student's t interval [2, k] of statistics [k] that n examples move by `moves` [n, k], which sum to 0."""
    import numpy as np
    from scipy.special import stdtrit

    n = len(moves)
    half = stdtrit(n - 1, (1 + level) / 2) * np.sqrt((moves**2).sum(0) / (n * (n - 1)))
    return np.stack([value - half, value + half])


def _studentised(
    value: "np.ndarray", moves: "np.ndarray", off: "np.ndarray", squares: "np.ndarray", level: float
) -> "np.ndarray":
    """The interval [2, k] of `mean_intervals` of statistics [k] that n examples move by `moves` [n, k]; `off` [r, k] is
    how far each resample lies from `value`, `squares` [r, k] the mean square of what examples move it by there.
    """
    import numpy as np
    from scipy.special import stdtrit

    n = len(moves)
    usual = stdtrit(n - 1, (1 + level) / 2)
    # a resample without spread is as far off as can be; rounding is no spread
    least = 1e-18 * (moves**2).max(0)
    far = np.divide(off, np.sqrt(np.maximum(squares, 0) / (n - 1)), out=np.sign(off) * 1e9, where=squares > least)
    far[np.abs(off) <= np.sqrt(least)] = 0.0
    low, high = np.nanquantile(far, [(1 - level) / 2, (1 + level) / 2], axis=0)
    error = np.sqrt((moves**2).sum(0) / (n * (n - 1)))
    below, above = (np.clip(side, _NARROWEST * usual, _WIDEST * usual) * error for side in (high, -low))
    return np.stack([value - below, value + above])


def median_interval(values: "ArrayLike", *, level: float = 0.95) -> tuple[float, float]:
    """Interval of a median between two of the values in order (Thompson 1936).

    Args:
        values: [n].
        level: In so many cases or more it holds the median. Of fewer than 6 values not even the smallest and the
            largest do so for 0.95; it is these two then.

    Returns:
        Both ends; NaN without values.
    """
    import numpy as np
    from scipy.stats import binom

    kept = np.sort(np.asarray(values, dtype=np.float64))
    n = len(kept)
    if n == 0:
        return math.nan, math.nan
    # with the place-th from either end it is missed where at most `place` values lie on one side of it
    missed = 2 * binom.cdf(np.arange(n), n, 0.5)
    place = max(0, int((missed <= 1 - level).sum()) - 1)
    return float(kept[place]), float(kept[n - 1 - place])


def wilson_interval(successes: int, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927): right also near 0 and 1, where the normal one is not.

    Args:
        successes: How many examples are successes.
        n: How many examples.
        level: In how many cases the interval should hold the truth.

    Returns:
        Both ends; without examples nothing is known: (0, 1).

    Raises:
        ValueError: Unless 0 <= successes <= n.

    Example:
        >>> "%.3f to %.3f" % wilson_interval(19, 20)
        '0.764 to 0.991'
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}")
    if n == 0:
        return 0.0, 1.0
    from statistics import NormalDist

    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / n
    middle = share + z * z / (2 * n)
    half = z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    denominator = 1 + z * z / n
    # the ends are exact where every example, or none, is a success; rounding would leave 0.9999999
    low = 0.0 if successes == 0 else (middle - half) / denominator
    high = 1.0 if successes == n else (middle + half) / denominator
    return low, high


def sign_flip_p(differences: "ArrayLike", *, n_draws: int = 9999, seed: int = 0) -> float:
    """Two-sided p of a mean difference of paired examples, by flipping signs (Fisher's randomisation test).

    Up to 2^n = 16,384 sign patterns (n = 14) are all counted, the observed one among them, so that p is exact; beyond,
    random ones are, with one added to both counts (Phipson & Smyth 2010), since a p of 0 cannot be had by sampling. The
    smallest p of n examples is 2 / 2^n: below 6 examples nothing reaches 0.05.

    Args:
        differences: [n]; under the null hypothesis each is as likely to have the other sign.
        n_draws: How many random patterns.
        seed: Of the patterns.

    Returns:
        p; NaN without examples.
    """
    import numpy as np

    values = np.asarray(differences, dtype=np.float64)
    n = len(values)
    if n == 0 or not np.isfinite(values).all():
        return float("nan")
    observed = abs(values.sum())
    least = observed - 1e-9 * np.abs(values).sum()  # sums that differ by rounding alone count as equal
    if n <= 14:
        patterns = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return float(np.mean(np.abs((1 - 2 * patterns) @ values) >= least))
    generator = np.random.default_rng(seed)
    extreme, done = 0, 0
    while done < n_draws:
        k = min(2048, n_draws - done)
        signs = 1 - 2 * generator.integers(0, 2, (k, n))
        extreme += int((np.abs(signs @ values) >= least).sum())
        done += k
    return (extreme + 1) / (n_draws + 1)


def sign_flip_p_of_many(differences: "ArrayLike", *, n_draws: int = 1999, seed: int = 0) -> "np.ndarray":
    """`sign_flip_p` of each of c means, corrected for their number: float64 [c].

    `differences` [c, n]: c measurements of the same n examples, whose signs are flipped together. A mean is held
    against the largest of all of them under each pattern, each divided by the root of its sum of squares, which no
    flip changes (Westfall & Young 1993), so the chance that any is below 0.05 where there is nothing is 0.05. Up to
    2^11 patterns are all counted. NaN in a row makes its p NaN and leaves the others as they are.
    """
    import numpy as np

    table = np.asarray(differences, dtype=np.float64)
    n = table.shape[1]
    result = np.full(len(table), np.nan)
    known = np.isfinite(table).all(1)
    if n == 0 or not known.any():
        return result
    values = table[known]
    size = np.sqrt((values**2).sum(1, keepdims=True))
    scaled = np.divide(values, size, out=np.zeros_like(values), where=size > 0)
    observed = np.abs(scaled.sum(1)) - 1e-9
    exact = n <= 11
    if exact:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = 1 - 2 * np.random.default_rng(seed).integers(0, 2, (n_draws, n))
    largest = np.sort(np.concatenate([np.abs(part @ scaled.T).max(1) for part in np.array_split(signs, 16)]))
    extreme = len(largest) - np.searchsorted(largest, observed, side="left")
    result[known] = extreme / len(signs) if exact else (extreme + 1) / (len(signs) + 1)
    return result


def sign_flip_p_of_each(differences: "ArrayLike", *, n_draws: int = 9999, seed: int = 0) -> "np.ndarray":
    """`sign_flip_p` of each of c means, not corrected for their number (`false_discovery` does): float64 [c].

    `differences` [c, n]; a row is tested on its values that are not NaN, and is NaN where there are none.
    """
    import numpy as np

    table = np.asarray(differences, dtype=np.float64)
    result = np.full(len(table), np.nan)
    known = ~np.isnan(table)
    patterns, group = np.unique(known, axis=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        rows = np.flatnonzero(group.reshape(-1) == number)
        values = table[rows][:, pattern]
        n = values.shape[1]
        if n == 0:
            continue
        least = np.abs(values.sum(1)) - 1e-9 * np.abs(values).sum(1)
        exact = n <= 14
        if exact:
            every = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        else:
            # the draws of `sign_flip_p`
            generator, sizes = np.random.default_rng(seed), [2048] * (n_draws // 2048) + [n_draws % 2048]
            every = np.concatenate([1 - 2 * generator.integers(0, 2, (k, n)) for k in sizes if k])
        size = max(1, 2**22 // len(every))
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            extreme = (np.abs(every @ values[part].T) >= least[part]).sum(0)
            result[rows[part]] = extreme / len(every) if exact else (extreme + 1) / (len(every) + 1)
    return result


def paired_t_p(differences: "ArrayLike") -> "np.ndarray":
    """Two-sided p of Student's t test of each mean difference.

    For scans of few examples: that of sign flips is 2 / 2^n at the least, too coarse to correct for many tests.

    Args:
        differences: [..., n].

    Returns:
        float64 [...]; where all differences are the same 1 if they are 0, else 0. NaN below two examples and where a
        value is NaN.
    """
    import numpy as np
    from scipy.special import stdtr

    values = np.asarray(differences, dtype=np.float64)
    n = values.shape[-1]
    if n < 2:
        return np.full(values.shape[:-1], np.nan)
    mean, error = values.mean(-1), values.std(-1, ddof=1) / n**0.5
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * stdtr(n - 1, -np.abs(mean) / error)
    return np.where((error == 0) & (mean == 0), 1.0, p)


def false_discovery(p: "ArrayLike") -> "np.ndarray":
    """q of each p: the smallest rate of false discoveries at which it is still one (Benjamini & Hochberg 1995).

    Of all tests with q at most 0.05, one in twenty is expected to be false, for tests that are independent or lean the
    same way. It is the smallest p' · tests / (tests with at most p') of all p' >= p.

    Args:
        p: Of any shape; NaN is no test: it stays NaN and does not count.

    Returns:
        float64 of the shape of `p`.
    """
    import numpy as np

    values = np.asarray(p, dtype=np.float64)
    q = np.full(values.shape, np.nan)
    known = ~np.isnan(values)
    found = values[known]
    order = np.argsort(found, kind="stable")
    ranked = found[order] * len(found) / np.arange(1, len(found) + 1)
    least = np.minimum.accumulate(ranked[::-1])[::-1]
    kept = np.empty_like(found)
    kept[order] = least
    q[known] = np.minimum(kept, 1.0)
    return q
