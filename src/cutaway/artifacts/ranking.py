"""The area under the ROC curve, of one score or of many at once, with ties, weights and separate parts."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike


class Ranking:
    """Scores in order, from which the AUROC for any labels and weights takes one sum along them.

    Args:
        scores: [n].
        part: To which of the `parts` each score belongs [n]: columns of a table, folds, latents. Scores are ranked
            within their part; without it all are of one.
        parts: How many parts there are; some may hold no score.
    """

    def __init__(self, scores: "ArrayLike", part: "ArrayLike | None" = None, parts: int = 1) -> None:
        import numpy as np

        values = np.asarray(scores)
        group = np.zeros(len(values), dtype=np.int64) if part is None else np.asarray(part)
        self.order = np.lexsort((values, group))
        values, group = values[self.order], group[self.order]
        self.parts = parts
        new_part, new_tie = np.ones((2, len(values)), dtype=bool)
        new_part[1:] = group[1:] != group[:-1]
        new_tie[1:] = new_part[1:] | (values[1:] != values[:-1])
        self._ties = np.flatnonzero(new_tie)  # where each run of equal scores begins
        self._starts = np.flatnonzero(new_part)  # where each part begins that has any scores
        self._some = group[self._starts]
        self._first = np.searchsorted(self._ties, self._starts)  # its first run
        self._first_of = np.repeat(self._first, np.diff(self._first, append=len(self._ties)))

    def sums(self, values: "np.ndarray") -> "np.ndarray":
        """Σ over each part: [..., n] -> float64 [..., parts]."""
        return self._of_parts(values[..., self.order], self._starts)

    def won(self, positive: "np.ndarray", negative: "np.ndarray") -> "np.ndarray":
        """Σ of positive × negative over pairs of one part in which the positive's score is above, ties for a half.

        `positive` and `negative` [..., n] are how much each example counts as one -> float64 [..., parts].
        """
        import numpy as np

        if not len(self.order):
            return np.zeros((*positive.shape[:-1], self.parts))
        up, down = (np.add.reduceat(side[..., self.order], self._ties, axis=-1) for side in (positive, negative))
        below = down.cumsum(-1) - down
        below -= below[..., self._first_of]
        return self._of_parts(up * (below + down / 2), self._first)

    def _of_parts(self, values: "np.ndarray", starts: "np.ndarray") -> "np.ndarray":
        import numpy as np

        out = np.zeros((*values.shape[:-1], self.parts))
        if len(starts):
            out[..., self._some] = np.add.reduceat(values, starts, axis=-1)
        return out


def auroc(scores: "ArrayLike", labels: "ArrayLike", weights: "ArrayLike | None" = None) -> float:
    """Area under the ROC curve: P(a positive scores above a negative) + ½ P(they tie).

    Args:
        scores: [n].
        labels: Booleans [n].
        weights: How much each example counts [n]; 1 each if not given.

    Returns:
        NaN when there is no positive or no negative: nothing can be ranked.

    Example:
        >>> auroc([0.1, 0.4, 0.4, 0.9], [False, False, True, True])
        0.875
    """
    import numpy as np

    return float(auroc_columns(np.asarray(scores)[:, None], labels, weights)[0])


def auroc_columns(scores: "ArrayLike", labels: "ArrayLike", weights: "ArrayLike | None" = None) -> "np.ndarray":
    """`auroc` of each column of a table, under one labelling or many.

    Args:
        scores: [n, k].
        labels: Booleans [..., n].
        weights: How much each example counts [..., n]; 1 each if not given.

    Returns:
        float64 [..., k]; NaN where there is no positive or no negative, and for a column that holds NaN.

    Raises:
        ValueError: as many labels as scores are needed.
    """
    import numpy as np

    table = np.asarray(scores)
    n, k = table.shape
    label = np.asarray(labels, dtype=bool)
    if label.shape[-1:] != (n,):
        raise ValueError(f"{n} scores but labels of shape {label.shape}")
    weight = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    positive, negative = weight * label, weight * ~label
    ranking = Ranking(table.T.reshape(-1), np.repeat(np.arange(k), n), k)
    tiled = [np.tile(side, k) for side in (positive, negative)]
    pairs = (positive.sum(-1) * negative.sum(-1))[..., None]
    found = ranking.won(*tiled) / np.where(pairs > 0, pairs, np.nan)
    return np.where(np.isnan(table).any(0), np.nan, found)
