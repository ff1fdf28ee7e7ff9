"""A shuffled order of any number of things that can be entered anywhere, in bounded memory."""

import numpy as np

_TABLE = 1 << 20  # up to here the order is a table, drawn uniformly from all orders
_ROUNDS = 10
_ODD = np.uint64(0x9E3779B97F4A7C15)


class Permutation:
    """A one-to-one map of 0 ... n-1 onto itself that `seed` and `epoch` determine: `Permutation(n)[places]`.

    Up to a million things it is a table, so every order is equally likely. Beyond, a table would grow with the store,
    so it is a keyed Feistel network (Luby and Rackoff, 1988) on pairs of digits in mixed base, as used for encryption
    that preserves a format (Black and Rogaway, 2002): what falls outside 0 ... n-1 is mapped again until it does not.
    """

    def __init__(self, n: int, seed: int = 0, epoch: int = 0) -> None:
        if n < 0:
            raise ValueError(f"cannot order {n} things")
        self.n = n
        root = np.random.SeedSequence((seed, epoch))
        if n <= _TABLE:
            self._table = np.random.Generator(np.random.PCG64(root)).permutation(n)
        else:
            self._table = None
            self._low = int(np.ceil(np.sqrt(n)))
            self._high = -(-n // self._low)
            self._keys = root.generate_state(_ROUNDS, np.uint64)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """Where these places of the order lead, int64 [m]."""
        places = np.asarray(places, dtype=np.int64)
        if self._table is not None:
            return self._table[places]
        found = self._walk(places)
        while (outside := np.flatnonzero(found >= self.n)).size:
            found[outside] = self._walk(found[outside])
        return found

    def _walk(self, x: np.ndarray) -> np.ndarray:
        high, low = x // self._low, x % self._low
        for number, key in enumerate(self._keys):
            if number % 2:
                high = (high + (_mixed(low, key) % np.uint64(self._high)).astype(np.int64)) % self._high
            else:
                low = (low + (_mixed(high, key) % np.uint64(self._low)).astype(np.int64)) % self._low
        return high * self._low + low


def _mixed(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """A 64-bit hash of x under a key (the finaliser of SplitMix64)."""
    with np.errstate(over="ignore"):
        z = (x.astype(np.uint64) + key) * _ODD
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
