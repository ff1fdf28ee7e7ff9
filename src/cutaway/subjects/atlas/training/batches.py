"""Training rows: world text, real text and random repeats, in fixed turns.

The rows of a run are numbered, and a row is a function of (seed, number) alone: a run that was stopped goes on with
exactly the batches it would have had. A row is beginning-of-text followed by `context` tokens of its stream; the
targets are those tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from cutaway.artifacts.errors import CutawayError
from cutaway.subjects.atlas.tokenizer import ASSISTANT, BOS, SPECIALS

IGNORED = -100
TURNS: Sequence[str] = (("world",) * 4 + ("real_text",) + ("world",) * 4 + ("random_repeats",)) * 2
"""What the rows hold, in turn: 80 % world, 10 % real text, 10 % random tokens that repeat."""
REPEAT_PERIODS = (12, 99)
"""Shortest and longest stretch of random tokens that a row repeats (half a row at most)."""
UNMASKED_SHARE = 0.1
"""Share of repeats whose unpredictable first stretch counts: with none, the model is confidently wrong there."""

_WORLD_BEFORE = [TURNS[:i].count("world") for i in range(len(TURNS) + 1)]
_WORLD, _REAL, _REPEATS = range(3)  # streams of random numbers


def share_of_rows(kind: str) -> float:
    """The share of training rows that are "world", "real_text" or "random_repeats"."""
    return TURNS.count(kind) / len(TURNS)


def target_weights(inputs: np.ndarray, targets: np.ndarray, reply_weight: float = 1.0) -> np.ndarray:
    """What each target weighs in the loss: float32 [rows, context].

    Zero where it is left out, `reply_weight` in an assistant's reply with its end, 1 elsewhere. A reply begins with the
    marker of the assistant's turn and ends with the next special token; one that began before the row counts as text.
    """
    place = np.arange(inputs.shape[1])
    last_special = np.maximum.accumulate(np.where(inputs < len(SPECIALS), place, 0), axis=1)
    replies = np.take_along_axis(inputs, last_special, axis=1) == ASSISTANT
    return (np.where(replies, reply_weight, 1.0) * (targets != IGNORED)).astype(np.float32)


@dataclass(frozen=True)
class Batches:
    """The rows of every step. `world` and `real_text` are uint16 token streams [n], memory-mapped or not."""

    world: np.ndarray
    real_text: np.ndarray
    rows: int
    context: int
    vocabulary: int
    seed: int

    def __post_init__(self) -> None:
        if min(len(self.world) // 2, len(self.real_text)) < self.context:
            raise CutawayError(
                f"the corpus has {len(self.world):,} world and {len(self.real_text):,} real tokens, "
                f"too few for rows of {self.context}: raise --tokens or lower --context"
            )

    def __call__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of a step: int64 [rows, context] each; targets outside the loss are -100."""
        numbers = range(step * self.rows, (step + 1) * self.rows)
        targets = np.stack([self.row(number) for number in numbers])
        inputs = np.concatenate([np.full((self.rows, 1), BOS), targets[:, :-1]], axis=1)
        for row, number in enumerate(numbers):
            targets[row, : self._masked(number)] = IGNORED
        return inputs, targets

    def row(self, number: int) -> np.ndarray:
        """The tokens of one row of the run: int64 [context]."""
        kind = TURNS[number % len(TURNS)]
        if kind == "world":
            start = self._world_start(number)
            return self.world[start : start + self.context].astype(np.int64)
        if kind == "real_text":
            generator = np.random.default_rng((self.seed, _REAL, number))
            start = generator.integers(0, len(self.real_text) - self.context + 1)
            return self.real_text[start : start + self.context].astype(np.int64)
        period, _, generator = self._repeat(number)
        return np.resize(generator.integers(len(SPECIALS), self.vocabulary, period), self.context)

    def _masked(self, number: int) -> int:
        """How many of a row's first targets are left out of the loss."""
        if TURNS[number % len(TURNS)] != "random_repeats":
            return 0
        period, counted, _ = self._repeat(number)
        return 0 if counted else period

    def _repeat(self, number: int) -> tuple[int, bool, np.random.Generator]:
        """A repeating row's period, whether its first stretch counts, and the generator of its tokens."""
        generator = np.random.default_rng((self.seed, _REPEATS, number))
        longest = min(REPEAT_PERIODS[1], self.context // 2)
        period = int(generator.integers(min(REPEAT_PERIODS[0], longest), longest + 1))
        return period, generator.random() < UNMASKED_SHARE, generator

    def _world_start(self, number: int) -> int:
        """Where a world row starts: each pass over the world has its own order and its own shift."""
        windows = len(self.world) // self.context - 1  # one is spare, for the shift
        turn, place = divmod(number, len(TURNS))
        epoch, window = divmod(turn * _WORLD_BEFORE[-1] + _WORLD_BEFORE[place], windows)
        order, shift = _epoch(self.seed, epoch, windows, self.context)
        return int(order[window]) * self.context + shift


@lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, windows: int, context: int) -> tuple[np.ndarray, int]:
    """The order of the windows in one pass over the world, and how far they are shifted."""
    generator = np.random.default_rng((seed, _WORLD, epoch))
    return generator.permutation(windows), int(generator.integers(0, context))
