"""How new tokens are chosen, as a value."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cutaway.artifacts.errors import CutawayError


@dataclass(frozen=True)
class Decoding:
    """What is seldom changed about a generation: `lm.generate(prompt, decoding=cutaway.Decoding(top_p=0.9))`."""

    top_k: int | None = None
    """Sample among the k most probable tokens; None is all."""
    top_p: float | None = None
    """Sample among the most probable tokens that together have this probability; None is all."""
    num_beams: int = 1
    """Beams of a search at temperature 0; 1 is none. Beams take no edits of single rows and are not captured."""
    use_cache: bool = True
    """Keep keys and values of earlier tokens; without, every step reads the whole text again, with the same result."""
    limit_bytes: int | None = None
    """Bound on what the captures may hold; None is 4 GiB."""


DECODING = Decoding()


@dataclass(frozen=True)
class Settings:
    """What `LanguageModel.generate` takes beside prompts and edits; see there."""

    max_new_tokens: int = 40
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    num_return_sequences: int = 1
    num_beams: int = 1
    use_cache: bool = True
    stop: str | Sequence[str] = ()
    capture: str | Sequence[str] | None = None
    limit_bytes: int | None = None

    def __post_init__(self) -> None:
        whole = ("max_new_tokens", "seed", "num_return_sequences", "num_beams", "top_k")
        for name in (*whole, "temperature", "top_p"):
            value = getattr(self, name)
            kind = numbers.Integral if name in whole else numbers.Real
            given = isinstance(value, kind) and not isinstance(value, bool)
            if given or (value is None and name in ("top_k", "top_p")):
                continue
            raise CutawayError(f"{name} is a {'whole ' if name in whole else ''}number; got {value!r}.")
        if self.max_new_tokens < 1 or self.num_return_sequences < 1 or not self.temperature >= 0:
            raise CutawayError(
                "max_new_tokens and num_return_sequences are at least 1, and temperature is not negative."
            )
        if not math.isfinite(self.temperature):
            raise CutawayError("The temperature is a finite number.")
        if self.num_beams < 1:
            raise CutawayError("num_beams is at least 1.")
        if self.num_beams > 1 and (self.temperature > 0 or self.capture is not None):
            raise CutawayError(
                "Beams are neither sampled nor captured: they trade places as they go; leave out temperature and "
                "capture, and run the tokens of the result to look inside."
            )
        if self.num_return_sequences > self.num_beams and self.temperature == 0:
            raise CutawayError(
                "Greedy decoding gives the same text every time; set a temperature for several sequences, or num_beams "
                "of as many."
            )
        if (self.top_k is not None and self.top_k < 1) or (self.top_p is not None and not 0 < self.top_p <= 1):
            raise CutawayError("top_k is at least 1, and top_p lies between 0 and 1.")
        if not isinstance(self.stop, Iterable) or any(not isinstance(s, str) or not s for s in self.stops):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise CutawayError(f"stop= is a text at which to stop, or several; got {self.stop!r}.")

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
