"""Intervals and rank statistics that results are reported with."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike


def bootstrap_interval(
    values: "ArrayLike",
    statistic: Callable[["np.ndarray"], Any] | None = None,
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of independent examples (Efron 1979).

    `values` is [n] or [n, ...], one example a row; rows are drawn with replacement. `statistic` takes such an array and
    returns one number (default: the mean). Fewer than two examples have no interval: (nan, nan). The same seed gives
    the same interval.
    """
    import numpy as np

    rows = np.asarray(values, dtype=np.float64)
    n = len(rows)
    if n < 2:
        return float("nan"), float("nan")
    generator = np.random.default_rng(seed)
    measure = np.mean if statistic is None else statistic
    drawn = [float(measure(rows[generator.integers(0, n, n)])) for _ in range(n_resamples)]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_weights(n: int, n_resamples: int = 2000, seed: int = 0) -> "np.ndarray":
    """How much each of n examples counts in each resample, float64 [n_resamples, n]; rows sum to 1.

    Many means of the same examples are then one product, `weights @ values`.
    """
    import numpy as np

    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples) / n


def mean_intervals(values: "ArrayLike", n_resamples: int = 2000, seed: int = 0) -> "np.ndarray":
    """95 % percentile bootstrap intervals of many means over the same n examples: [..., n] -> float64 [2, ...].

    NaN below two examples.
    """
    import numpy as np

    kept = np.asarray(values, dtype=np.float64)
    n = kept.shape[-1]
    if n < 2:
        return np.full((2, *kept.shape[:-1]), np.nan)
    return np.quantile(kept @ bootstrap_weights(n, n_resamples, seed).T, [0.025, 0.975], axis=-1)


def wilson_interval(successes: int, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927): right also near 0 and 1, where the normal one is not.

    Without examples nothing is known: (0, 1). Raises `ValueError` unless 0 <= successes <= n.
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


def auroc(scores: "ArrayLike", labels: "ArrayLike") -> float:
    """Area under the ROC curve: P(a positive scores above a negative) + ½ P(they tie).

    `scores` [n], `labels` [n] of booleans. NaN when there is no positive or no negative: nothing can be ranked.
    """
    import numpy as np

    return float(auroc_columns(np.asarray(scores)[:, None], labels)[0])


def auroc_columns(scores: "ArrayLike", labels: "ArrayLike") -> "np.ndarray":
    """`auroc` of each column of `scores` [n, k] against the same `labels` [n]: float64 [k]."""
    import numpy as np
    from scipy.stats import rankdata

    table = np.asarray(scores)
    positive = np.asarray(labels, dtype=bool)
    if positive.shape != table.shape[:1]:
        raise ValueError(f"{table.shape[0]} scores but labels of shape {positive.shape}")
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if n_positive == 0 or n_negative == 0:
        return np.full(table.shape[1], np.nan)
    ranks = rankdata(table, axis=0)  # ties get their mean rank: the ½ of the definition
    u = ranks[positive].sum(axis=0) - n_positive * (n_positive + 1) / 2
    return u / (n_positive * n_negative)


def sign_flip_p(differences: "ArrayLike", *, n_draws: int = 9999, seed: int = 0) -> float:
    """Two-sided p of a mean difference of paired examples, by flipping signs (Fisher's randomisation test).

    `differences` [n]: under the null hypothesis each is as likely to have the other sign. Up to 2^n = 16,384 sign
    patterns (n = 14) are all counted, the observed one among them, so that p is exact; beyond, `n_draws` random ones
    are, with one added to both counts (Phipson & Smyth 2010), since a p of 0 cannot be had by sampling. NaN without
    examples. The smallest p of n examples is 2 / 2^n: below 6 examples nothing reaches 0.05.
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
