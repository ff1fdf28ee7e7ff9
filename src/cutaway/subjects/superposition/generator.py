"""Made activations whose features are known: sums of a few directions, at the cost of the features that are active.

    x = Σ_i a_i d_i + noise            a_i ≥ 0 (or signed), few of them not 0; d_i unit vectors in R^d

Which features are active follows a Zipf law over a forest (`frequencies.py`): a child only with its parent, and at most
one child of a parent where siblings exclude each other. Roots are correlated by a Gaussian copula of low rank: root i
hangs on one of r factors f_c ~ N(0, 1) with a loading ρ_i,

    root i is active  ⇔  ρ_i f_c(i) + √(1 − ρ_i²) ε_i > t_i = Φ⁻¹(1 − p_i)

so that its frequency is p_i, two roots of one factor have latent correlation ρ_i ρ_j, and others none.

Drawn literally that costs a Gaussian for every root and token. But given the factors the roots are independent, with
p_i(f) = Φ((ρ_i f − t_i) / √(1 − ρ_i²)), and a coin that shows heads with probability p is a Poisson event of rate
−log(1 − p) that happened at least once. So candidates are thrown with rates that are at least as high (a table: the
highest rate of the root over an interval of f) and kept with probability rate(f) / table: thinning, which is exact. A
token pays for r factors and about 1.3 candidates an active root; children are drawn from their parent's few.

Batch t depends on (seed, t) alone. Tests compare with the literal version.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from scipy.special import ndtr, ndtri
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.progress import Progress
from cutaway.subjects.superposition.frequencies import Forest, zipf_forest

_REACH = 5.0  # factors are cut off here: 6e-7 of the draws
_LEVELS = 64  # intervals of a factor, each with its table of rates


@dataclass(frozen=True)
class FeatureWorld:
    """What to make. Everything here changes the activations.

    Directions are random unit vectors. Frequencies follow Zipf's law over a forest of parents and children, and roots
    are correlated; `active` replaces all that by a number of features per token, any of them.

    Attributes:
        n: Features.
        d: Dimensions of the activations.
        l0: Features active per token on average; needed unless `active` is given.
        active: (min, max): each token has a uniform number of active features between the two, any of them; None is
            frequencies by Zipf's law.
        exponent: Frequencies fall as rank^-exponent; the rank is the feature's number.
        p_max: The highest frequency of a root.
        p_min: The lowest frequency of a root.
        trees: Roots that have children; 0 is none, so that features are independent but for their factors.
        branching: Children per parent.
        depth: Levels of descendants.
        exclusive: Whether at most one child of a parent is active at a time.
        with_children: The largest share of a parent's tokens on which its children are active: a child alone or,
            where they are exclusive, all together.
        factors: Gaussian factors by which roots are correlated; each root has one. 0 is no correlation.
        correlation: Size of a root's loading on its factor, with a random sign, in [0, 1): two roots of one factor have
            the latent correlation ± its square.
        magnitude: Mean size of an active feature, in units of its direction's length (1): of feature 0 and of the last,
            linear between.
        spread: Mean and standard deviation of the normal draw whose absolute value is the standard deviation of a
            feature's size. Sizes below 0 are turned positive, so that frequencies hold.
        signed: Whether each size has a random sign.
        noise: Standard deviation of what is added to every coordinate.
        orthogonal_steps: Steps of descent by which directions are moved apart; 0 leaves them as they are drawn.
        seed: Of the directions and of all draws.
    """

    n: int
    d: int
    l0: float = 0.0
    active: tuple[int, int] | None = None
    exponent: float = 0.5
    p_max: float = 0.4
    p_min: float = 0.0
    trees: int = 0
    branching: int = 4
    depth: int = 3
    exclusive: bool = True
    with_children: float = 0.9
    factors: int = 0
    correlation: float = 0.3
    magnitude: tuple[float, float] = (1.0, 1.0)
    spread: float = 0.0
    signed: bool = False
    noise: float = 0.0
    orthogonal_steps: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n < 1 or self.d < 1:
            raise CutawayError(f"{self.n} features in {self.d} dimensions: both must be at least 1")
        if self.active is not None and not 0 <= self.active[0] <= self.active[1] <= self.n:
            raise CutawayError(f"between {self.active[0]} and {self.active[1]} of {self.n} features cannot be active")
        if self.active is None and not self.l0:
            raise CutawayError("say how many features are active: l0= on average, or active=(lo, hi)")
        if not 0 <= self.correlation < 1 or self.factors < 0:
            raise CutawayError(
                f"correlation = {self.correlation} must be in [0, 1), factors = {self.factors} not negative"
            )
        if self.noise < 0 or self.spread < 0 or min(self.magnitude) <= 0:
            raise CutawayError("noise and spread must not be negative, magnitudes positive")


@dataclass(frozen=True, eq=False)
class Batch:
    """`x` [B, d] float32, and what it is made of: token b has `features[offsets[b]:offsets[b + 1]]` with `values`.

    A compressed sparse row matrix: `offsets` [B + 1], `features` int64 and `values` float32 [active]; features rise
    within a token, and no value is 0.
    """

    x: Tensor
    offsets: Tensor
    features: Tensor
    values: Tensor

    @property
    def tokens(self) -> Tensor:
        """The token of each active feature: int64 [active]."""
        return torch.repeat_interleave(torch.arange(len(self.x)), self.offsets.diff())

    def dense(self, n: int) -> Tensor:
        """The same as a matrix [B, n]."""
        values = torch.zeros(len(self.x), n)
        values[self.tokens, self.features] = self.values
        return values


@dataclass(frozen=True)
class FeatureGenerator:
    """Batches of a `FeatureWorld`; making one prepares directions and tables, which takes a moment for large worlds.

    Attributes:
        world: What to make.
        directions: The true direction of each feature, float32 unit vectors [n, d].

    Example:
        >>> generator = FeatureGenerator(FeatureWorld(n=32, d=8, l0=2.0))
        >>> generator.batch(0, 4).x.shape
        torch.Size([4, 8])
    """

    world: FeatureWorld
    directions: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "directions", self._directions())
        _ = self.forest, self._table

    @cached_property
    def forest(self) -> Forest:
        """Who is whose parent, and how often each feature is active."""
        w = self.world
        if w.active is not None:
            p = np.full(w.n, sum(w.active) / 2 / w.n)
            none = np.zeros(w.n, np.int64)
            return Forest(none - 1, none, none, p, p)
        return zipf_forest(
            w.n,
            w.l0,
            exponent=w.exponent,
            p_max=w.p_max,
            p_min=w.p_min,
            trees=w.trees,
            branching=w.branching,
            depth=w.depth,
            exclusive=w.exclusive,
            with_children=w.with_children,
        )

    @cached_property
    def means(self) -> np.ndarray:
        """Mean magnitude of each feature, [n]."""
        return np.linspace(*self.world.magnitude, self.world.n)

    @cached_property
    def spreads(self) -> np.ndarray:
        """Standard deviation of each feature's magnitude, [n]."""
        return np.abs(self._random(1).normal(self.world.spread, self.world.spread, self.world.n))

    @cached_property
    def loadings(self) -> tuple[np.ndarray, np.ndarray]:
        """(factor [roots], ρ [roots]) of each root: both random, ρ = ±`correlation`."""
        roots = self.forest.roots
        if not self.world.factors:
            return np.zeros(len(roots), np.int64), np.zeros(len(roots))
        random = self._random(2)
        signs = random.choice([-1.0, 1.0], len(roots))
        return random.integers(0, self.world.factors, len(roots)), self.world.correlation * signs

    def batch(self, number: int, size: int) -> Batch:
        """One batch of tokens; the same whenever it is asked for.

        Args:
            number: Which batch, from 0.
            size: Tokens.

        Returns:
            The activations [size, d] with the features that they are made of.
        """
        random = np.random.default_rng(np.random.SeedSequence((self.world.seed, 7, number)))
        token, feature = self._subsets(random, size) if self.world.active else self._active(random, size)
        values = self.means[feature] + self.spreads[feature] * random.standard_normal(len(feature))
        values = np.abs(values)
        if self.world.signed:
            values *= random.choice([-1.0, 1.0], len(values))
        offsets = np.zeros(size + 1, np.int64)
        np.cumsum(np.bincount(token, minlength=size), out=offsets[1:])
        features, weights = torch.from_numpy(feature), torch.from_numpy(values.astype(np.float32))
        x = torch.nn.functional.embedding_bag(
            features, self.directions, torch.from_numpy(offsets[:-1]), mode="sum", per_sample_weights=weights
        )
        if self.world.noise:
            x += self.world.noise * torch.from_numpy(random.standard_normal((size, self.world.d), np.float32))
        return Batch(x, torch.from_numpy(offsets), features, weights)

    def batches(self, size: int, start: int = 0) -> Iterator[Tensor]:
        """Endless activations [size, d], one batch after the other, for a training.

        Args:
            size: Tokens per batch.
            start: The number of the first batch.
        """
        number = start
        while True:
            yield self.batch(number, size).x
            number += 1

    def _active(self, random: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, features) that are active, in order of both."""
        keys = [self._roots(random, size)]
        for _ in range(self.world.depth):
            born = self._children(random, keys[-1])
            if not len(born):
                break
            keys.append(born)
        key = np.sort(np.concatenate(keys))
        return key // self.world.n, key % self.world.n

    def _roots(self, random: np.random.Generator, size: int) -> np.ndarray:
        """token · n + feature of the roots that are active, each once."""
        table, roots = self._table, self.forest.roots
        rho = self.loadings[1]
        if self.world.factors:
            f = np.clip(random.standard_normal((size, self.world.factors)), -_REACH, _REACH)
            level = np.minimum(((f + _REACH) * (_LEVELS / 2 / _REACH)).astype(np.int64), _LEVELS - 1)
            cell = level * self.world.factors + np.arange(self.world.factors)  # [size, factors]
        else:
            f, cell = np.zeros((size, 1)), np.zeros((size, 1), np.int64)
        thrown = random.poisson(table.total[cell]).ravel()
        where = np.repeat(np.arange(cell.size), thrown)  # token · factors + factor
        at = cell.ravel()[where]
        place = np.searchsorted(
            table.cumulative, table.start[at] + random.random(len(where)) * table.total[at], side="right"
        )
        place = np.minimum(place, table.last[at])  # rounding must not leave the cell
        root = table.root[place]
        r = rho[root]
        threshold = self._thresholds[root]
        rate = _rate((r * f.ravel()[where] - threshold) / np.sqrt(1 - r * r))
        kept = random.random(len(where)) * table.rate[place] < rate
        token = where[kept] // f.shape[1]
        return np.unique(token * self.world.n + roots[root[kept]])

    def _children(self, random: np.random.Generator, keys: np.ndarray) -> np.ndarray:
        """token · n + feature of the children of what is active."""
        forest, n = self.forest, self.world.n
        feature = keys % n
        keys, feature = keys[forest.n_children[feature] > 0], feature[forest.n_children[feature] > 0]
        base = keys - feature
        found = []
        drawn = random.random(len(keys))
        for turn in range(self.world.branching):
            there = turn < forest.n_children[feature]
            child = np.where(there, forest.first_child[feature] + turn, 0)
            chance = np.where(there, forest.conditional[child], 0.0)
            if self.world.exclusive:  # one number decides between the children and none
                chosen = (drawn >= 0) & (drawn < chance)
                drawn = np.where(chosen, -1.0, drawn - chance)
            else:
                chosen = random.random(len(keys)) < chance
            found.append(base[chosen] + child[chosen])
        return np.concatenate(found) if found else keys[:0]

    def _subsets(self, random: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
        """As many features as drawn, any of them: a uniform subset by Floyd's algorithm, row by row at once."""
        assert self.world.active is not None
        low, high = self.world.active
        n = self.world.n
        count = random.integers(low, high + 1, size)
        chosen = np.full((size, high), -1, np.int64)
        for turn in range(high):  # the set of size `count` is drawn from the top of a range that depends on it
            top = n - count + turn
            pick = random.integers(0, np.maximum(top, 0) + 1)
            taken = (chosen == pick[:, None]).any(1)
            chosen[:, turn] = np.where(turn < count, np.where(taken, top, pick), -1)
        key = np.sort((np.arange(size)[:, None] * n + chosen)[chosen >= 0])
        return key // n, key % n

    @cached_property
    def _thresholds(self) -> np.ndarray:
        return -ndtri(self.forest.frequency[self.forest.roots])

    @cached_property
    def _table(self) -> "_Table":
        """For each (level, factor) the roots of the factor with their highest rates over the level's interval."""
        factor, rho = self.loadings
        if self.world.active is not None:
            none, nothing = np.zeros(0), np.zeros(0, np.int64)
            return _Table(none, none, none, nothing, nothing, none)
        levels, factors = (_LEVELS, self.world.factors) if self.world.factors else (1, 1)
        edges = np.linspace(-_REACH, _REACH, levels + 1) if self.world.factors else np.zeros(2)
        order = np.argsort(factor, kind="stable")
        sizes = np.bincount(factor, minlength=factors)
        r, t = rho[order], self._thresholds[order]
        rates = np.concatenate(
            [_rate((np.maximum(r * edges[q], r * edges[q + 1]) - t) / np.sqrt(1 - r * r)) for q in range(levels)]
        )
        lengths = np.tile(sizes, levels)
        ends = np.cumsum(lengths)
        cumulative = np.cumsum(rates)
        before = np.concatenate(([0.0], cumulative))
        start, end = before[ends - lengths], before[ends]
        return _Table(cumulative, start, end - start, ends - 1, np.tile(order, levels), rates)

    def _directions(self) -> Tensor:
        # a stream that nobody else has: dictionaries and controls begin with random numbers from small seeds too, and
        # with the same ones they would begin at the truth (NumPy takes the seeds s and (s, 0) for the same)
        drawn = self._random(0).standard_normal((self.world.n, self.world.d))
        return pushed_apart(torch.from_numpy(drawn.astype(np.float32)), self.world.orthogonal_steps)

    def _random(self, what: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence((self.world.seed, what, 0xC0FFEE)))


@dataclass(frozen=True, eq=False)
class _Table:
    """Rates of candidates. Entries are laid out by cell = (level, factor); `root` and `rate` are an entry's.

    `cumulative` [entries] of the rates; a cell's entries begin behind `start` [cells], sum to `total`, end at `last`.
    """

    cumulative: np.ndarray
    start: np.ndarray
    total: np.ndarray
    last: np.ndarray
    root: np.ndarray
    rate: np.ndarray


def _rate(z: np.ndarray) -> np.ndarray:
    """−log(1 − Φ(z)): the rate of a Poisson process that is not empty with probability Φ(z)."""
    return -np.log(ndtr(-z))


def pushed_apart(directions: Tensor, steps: int, rate: float = 1e-2) -> Tensor:
    """Unit vectors [n, d], moved by `steps` steps of Adam against the sum of their squared cosines.

    n ≤ d vectors become orthogonal; more than d spread out as evenly as they find.
    """
    directions = torch.nn.functional.normalize(directions, dim=1)
    if not steps:
        return directions
    free = directions.clone().requires_grad_()
    adam = torch.optim.Adam([free], lr=rate)
    d = directions.shape[1]
    large = directions.numel() > 1 << 20  # a minute for 16,384 in 768 dimensions
    with Progress("directions", total=steps, unit="steps") if large else nullcontext() as progress:
        for _ in range(steps):
            unit = torch.nn.functional.normalize(free, dim=1)
            # ‖UUᵀ‖² = ‖UᵀU‖²: the d × d side never needs all pairs
            gram = unit.T @ unit if d < len(unit) else unit @ unit.T
            adam.zero_grad()
            gram.square().sum().backward()
            adam.step()
            if progress is not None:
                progress.advance()
    return torch.nn.functional.normalize(free.detach(), dim=1)
