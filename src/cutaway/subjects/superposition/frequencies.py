"""How often each feature of a made world is active: Zipf's law over a forest of parents and children."""

from dataclasses import dataclass

import numpy as np

from cutaway.artifacts.errors import CutawayError


@dataclass(frozen=True, eq=False)
class Forest:
    """Features 0 … n−1, parents before their children. A feature without parent is a root.

    `parent` [n] int64 (−1 for a root); `first_child`, `n_children` [n]: a feature's children are numbered in a row;
    `frequency` [n]: how often each is active; `conditional` [n]: the same given that its parent is.
    """

    parent: np.ndarray
    first_child: np.ndarray
    n_children: np.ndarray
    frequency: np.ndarray
    conditional: np.ndarray

    @property
    def roots(self) -> np.ndarray:
        """The features without a parent."""
        return np.flatnonzero(self.parent < 0)


def plant(n: int, trees: int, branching: int, depth: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parents [n], first child [n] and number of children [n] of a forest grown breadth first.

    `trees` roots, `branching` children each, down to `depth` levels of descendants or until the n features are used
    up; those left over are roots without children.
    """
    parent = np.full(n, -1, np.int64)
    first_child, n_children = np.zeros(n, np.int64), np.zeros(n, np.int64)
    level, used = np.arange(min(trees, n)), min(trees, n)
    for _ in range(depth):
        begin = used
        for feature in level:
            grown = min(branching, n - used)
            first_child[feature], n_children[feature] = used, grown
            parent[used : used + grown] = feature
            used += grown
        level = np.arange(begin, used)
    return parent, first_child, n_children


def zipf_forest(
    n: int,
    l0: float,
    *,
    exponent: float = 0.5,
    p_max: float = 0.4,
    p_min: float = 0.0,
    trees: int = 0,
    branching: int = 4,
    depth: int = 3,
    exclusive: bool = True,
    with_children: float = 0.9,
) -> Forest:
    """Frequencies that fall as rank^−exponent, scaled so that `l0` features are active on average.

    The rank is the feature's number: roots come first, then their children. A child cannot be active more often than
    its parent, nor mutually exclusive children together; so a child's frequency given its parent is the ratio of their
    Zipf weights, and where exclusive siblings' ratios sum to more than `with_children` they are scaled down to it. What
    comes out is `frequency`: exact, since nothing is dropped afterwards. Frequencies of roots are kept in
    [p_min, p_max]. Raises `CutawayError` when no scale gives `l0`.
    """
    if n < 1 or not 0 < l0 <= n:
        raise CutawayError(f"{l0} of {n} features cannot be active on average")
    if not 0 <= p_min <= p_max < 1:
        raise CutawayError(f"p_min = {p_min} and p_max = {p_max}: they must be in order and below 1")
    if not 0 < with_children <= 1 or branching < 1 or depth < 0 or trees < 0:
        raise CutawayError("with_children must be in (0, 1], branching at least 1, depth and trees not negative")
    parent, first_child, n_children = plant(n, trees, branching, depth)
    weight = np.arange(1, n + 1, dtype=np.float64) ** -exponent
    conditional = np.ones(n)
    born = parent >= 0
    conditional[born] = weight[born] / weight[parent[born]]
    if exclusive and born.any():
        total = np.bincount(parent[born], weights=conditional[born], minlength=n)
        conditional[born] *= np.minimum(1.0, with_children / total[parent[born]])
    conditional[born] = np.minimum(conditional[born], with_children)
    root, given_root = np.arange(n), np.ones(n)
    for child in np.flatnonzero(born):  # parents stand before their children
        root[child] = root[parent[child]]
        given_root[child] = given_root[parent[child]] * conditional[child]

    def frequencies(scale: float) -> np.ndarray:
        return np.clip(scale * weight[root], p_min, p_max) * given_root

    low, high = 0.0, p_max / weight.min()
    if not frequencies(low).sum() <= l0 <= frequencies(high).sum():
        raise CutawayError(
            f"no Zipf law with roots between {p_min} and {p_max} makes {l0:g} of {n} features active on average: it "
            f"can be {frequencies(low).sum():.3g} to {frequencies(high).sum():.3g}"
        )
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if frequencies(middle).sum() < l0 else (low, middle)
    p = frequencies(high)
    conditional[~born] = p[~born]
    return Forest(parent, first_child, n_children, p, conditional)
