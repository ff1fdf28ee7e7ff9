"""Everything that determines a training of atlas, and the machine that it runs on, which does not."""

import math
from dataclasses import dataclass, field
from typing import Literal

from cutaway.subjects.atlas.tokenizer import VOCABULARY

WARMUP_STEPS = 200
LAST_RATE = 0.03  # of the peak, at the end of the cosine
PEAK_RATE = 2.5e-3
PEAK_ROWS = 128  # the batch that PEAK_RATE is for
ROWS_ON_CPU = 16  # where steps are slow and many are better
Optimizer = Literal["adamw", "muon"]


@dataclass(frozen=True)
class Shape:
    """The architecture: Llama with tied embeddings and as many key-value heads as heads."""

    d_model: int = 256
    layers: int = 8
    heads: int = 8
    d_mlp: int = 672
    vocabulary: int = VOCABULARY
    positions: int = 512


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the weights, given a corpus and a machine's arithmetic."""

    tokens: int
    seed: int = 0
    context: int = 256
    rows: int = PEAK_ROWS
    shape: Shape = field(default_factory=Shape)
    peak: float = PEAK_RATE
    optimizer: Optimizer = "adamw"
    """"muon" steps the layers' matrices by orthogonalised momentum, at AdamW's root mean square; the rest by AdamW."""
    reply_weight: float = 1.0
    """What a token of an assistant's reply weighs in the loss; any other weighs 1."""
    start: str | None = None
    """SHA-256 of the weights that training goes on from; None for random ones."""

    @property
    def steps(self) -> int:
        return max(1, round(self.tokens / (self.rows * self.context)))

    @property
    def warmup_steps(self) -> int:
        return max(1, min(WARMUP_STEPS, self.steps // 10))

    @property
    def highest_rate(self) -> float:
        """The learning rate at its peak: `peak` is for 128 rows, and it goes with the square root of the batch."""
        return self.peak * math.sqrt(self.rows / PEAK_ROWS)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then cosine to 3 % of the peak."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        cosine = (1 + math.cos(math.pi * step / self.steps)) / 2
        return self.highest_rate * warm * (LAST_RATE + (1 - LAST_RATE) * cosine)


@dataclass(frozen=True)
class Machine:
    """What a training runs on; it does not determine the weights beyond arithmetic."""

    device: str = "cpu"
    """Such as "cpu" or "cuda"."""
    processes: int | None = None
    """How many processes make the corpus; None is one per core."""
    compiled: bool = False
    """Whether the model is compiled with torch.compile."""
