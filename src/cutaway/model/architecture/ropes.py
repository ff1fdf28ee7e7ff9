"""Rotary embeddings whose angles depend on the length of the text, and what may share a batch or a cache with them.

transformers looks at the largest position of a whole forward for two of its types. "longrope" turns every token by
other angles once that is above a limit, so that a short row beside a long one is not what it is alone, and keys that a
cache keeps from before the limit have the old angles. "dynamic" has angles of its own for each length above a limit,
and keeps those of the longest text it has read until a short one comes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cutaway.artifacts.errors import NotSupported


@dataclass(frozen=True)
class Ropes:
    """The lengths at which a model's rotary angles change.

    Texts longer than one of `switches` (tokens, ascending) are turned by other angles than those up to it. Above
    `stretches` (None: nowhere) the angles depend on what was read before. `rereads`: when a cached generation passes a
    switch, the model drops its cache and reads the whole text anew.
    """

    switches: tuple[int, ...]
    stretches: int | None
    rereads: bool

    def alike(self, length: int, other: int) -> bool:
        """Whether texts of these lengths, in tokens, are turned by the same angles."""
        return sum(length > limit for limit in self.switches) == sum(other > limit for limit in self.switches)

    def end(self, length: int, context: int) -> int:
        """The largest length up to `context` that is turned as texts of this length are."""
        limits = self.switches if self.stretches is None else (*self.switches, self.stretches)
        return min((limit for limit in limits if limit >= length), default=context)

    def check(self, name: str, lengths: Tensor) -> None:
        """Refuse rows (their `lengths` in tokens, [b]) that model `name` would not compute as it does each alone.

        Raises CutawayError: rows on both sides of a switch, rows above `stretches`.
        """
        shortest, longest = (int(end) for end in lengths.aminmax())
        if self.stretches is not None and longest > self.stretches:
            raise NotSupported(
                f"Above {self.stretches} tokens the rotary angles of {name} (dynamic) depend on the longest text that "
                f"it read before, so that no run can be repeated; this text has {longest}."
            )
        for limit in self.switches:
            if shortest <= limit < longest:
                raise NotSupported(
                    f"{name} turns texts of more than {limit} tokens by other rotary angles, the whole batch with its "
                    f"longest row: rows of {shortest} and {longest} tokens cannot be run together as each is alone; "
                    f"give those up to {limit} tokens and the longer ones apart."
                )

    def check_generation(self, name: str, lengths: Tensor, new: int, *, captured: bool, cached: bool) -> None:
        """Refuse to continue prompts (their `lengths` in tokens, [b]) by `new` tokens where that passes a switch and
        some row would not be what an uncached generation of it alone is.

        `captured`: the last new token is read too. `cached`: keys and values are kept. Raises CutawayError.
        """
        self.check(name, lengths)
        shortest, longest = (int(end) for end in lengths.aminmax())
        for limit in self.switches:
            if not longest <= limit < longest + new - (not captured):
                continue
            spare = limit - longest + (not captured)
            fewer = f"make at most {spare} new token{'s' if spare > 1 else ''}" if spare > 0 else ""
            start = f"{name} turns texts of more than {limit} tokens by other rotary angles, and"
            if shortest < longest:
                raise NotSupported(
                    f"{start} rows of {shortest} and {longest} tokens would not get there together; continue prompts "
                    f"of one length at a time{f', or {fewer}' if fewer else ''}."
                )
            if cached and not self.rereads:
                raise NotSupported(
                    f"{start} the keys in a cache would keep the old ones when the {longest} tokens of this prompt "
                    f"have become more; generate with use_cache=False{f', or {fewer}' if fewer else ''}."
                )


def find_ropes(model: nn.Module) -> Ropes | None:
    """The length-dependent rotary embeddings of a model, or None where its angles depend on the position alone."""
    switches: set[int] = set()
    stretches: set[int] = set()
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)
        settings: Any = getattr(getattr(module, "config", None), "rope_parameters", None)
        if not isinstance(settings, Mapping):
            continue
        if isinstance(kinds, str):
            kinds, settings = {"": kinds}, {"": settings}
        for layers, kind in kinds.items() if isinstance(kinds, Mapping) else ():
            if kind == "longrope":
                switches.add(int(settings[layers]["original_max_position_embeddings"]))
            elif "dynamic" in kind:
                stretches.add(int(module.original_max_seq_len))  # type: ignore[arg-type]
    if not switches and not stretches:
        return None
    return Ropes(tuple(sorted(switches)), min(stretches, default=None), _rereads(model, switches))


def _rereads(model: nn.Module, switches: set[int]) -> bool:
    """Whether the model's own `prepare_inputs_for_generation` drops the cache where its angles change."""
    prepare: Any = inspect.unwrap(getattr(type(model), "prepare_inputs_for_generation", _rereads))
    looks = "original_max_position_embeddings" in getattr(getattr(prepare, "__code__", None), "co_names", ())
    return looks and switches == {getattr(getattr(model, "config", None), "original_max_position_embeddings", None)}
