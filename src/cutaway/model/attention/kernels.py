"""From queries, keys and values to scores, weights and z, in the arithmetic of the model's own eager kernel.

transformers defines an `eager_attention_forward` in each model file. They differ in a few things (the dtype of the
softmax, attention sinks, ...), which `find_kernel` finds out by trying: what it returns reproduces the model's own
function bit for bit on random inputs in fp32, bf16 and fp16, or the model is refused.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cutaway.artifacts.errors import CutawayError
from cutaway.model.forward.current import Observation

Eager = Callable[..., tuple[Tensor, Tensor]]
_UNDERSTOOD = {"dropout", "scaling", "softcap", "position_bias", "sinks", "sliding_window", "is_causal"}


_KEYS = 37


@dataclass(frozen=True)
class Watch:
    """One layer's attention in one execution: what is edited and captured there. Without one, nothing is."""

    execution: Observation | None = None
    prefix: str = ""

    def wants(self, *parts: str) -> bool:
        return self.execution is not None and self.execution.wants(*(f"{self.prefix}.{part}" for part in parts))

    def live(self, part: str) -> bool:
        return self.execution is not None and self.execution.live(f"{self.prefix}.{part}")

    def touch(self, part: str, value: Tensor, *, own: bool = False) -> Tensor:
        return value if self.execution is None else self.execution.touch(f"{self.prefix}.{part}", value, own=own)

    def rotated(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """query [b H q h] and key [b KV k h] after the edits of rot_q and rot_k.

        Keys arrive with the cached ones in front, always unedited, so an edit of theirs is applied at every step.
        """
        if self.wants("rot_q"):
            query = self.touch("rot_q", query.transpose(1, 2)).transpose(1, 2)
        if self.wants("rot_k"):
            key = self.touch("rot_k", key.transpose(1, 2)).transpose(1, 2)
        return query, key

    def weigh(
        self, logits: Tensor, mask: Tensor | None, softmax: Callable[[Tensor], Tensor], *, own: bool = False
    ) -> Tensor:
        """The weights [b H q k] of a kernel's logits, masked as the kernel masks them.

        `mask` only says which cells those are: bool (True where a query may look) or added numbers, broadcastable.
        `softmax` may write into the logits that it is given. `own`: nobody else will see the weights.
        """
        if self.wants("scores"):
            seen = visible(mask)
            hidden = None if seen is None else ~seen
            scores = logits if hidden is None else logits.masked_fill(hidden, -torch.inf)
            scores = self.touch("scores", scores, own=hidden is not None)
            if self.live("scores"):  # masked cells keep the kernel's number: rows without any key stay finite
                logits = torch.where(scores == -torch.inf, logits, scores)
        return self.touch("pattern", softmax(logits), own=own)


def visible(mask: Tensor | None) -> Tensor | None:
    """The cells that a mask leaves, as bool."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask > torch.finfo(mask.dtype).min / 2


@dataclass(frozen=True)
class Kernel:
    """What an eager kernel does between the projections and z."""

    takes: frozenset[str]  # the options that it reads: softcap, position_bias, sinks
    own_sinks: bool  # reads module.sinks
    scale: Literal["query", "head_dim"]  # whose width^-1/2 it takes where no scaling is given
    sinks: Literal["joined", "gate"]  # another column of the softmax, or a gate on z that amounts to the same
    softmax_in_float: bool
    shifted: bool  # the row's maximum is subtracted before the softmax, in the dtype of the scores
    product_in_float: bool

    def attend(
        self,
        watch: Watch,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        own: bool = False,
        scaling: float | None = None,
        dropout: float = 0.0,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """query [b H q h], key and value [b KV k h] -> z [b q H h] and the pattern [b H q k].

        `mask` is bool (True where a query may look) or numbers to add, broadcastable to [b H q k]. `own`: the caller
        keeps the pattern to itself, so that a capture need not copy it.
        """
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        factor: Any = scaling  # a number, of some models a tensor
        if factor is None:
            factor = (query.shape[-1] if self.scale == "query" else module.head_dim) ** -0.5
        lowest = torch.finfo(query.dtype).min
        if self.product_in_float:
            wide = torch.promote_types(query.dtype, torch.float32)
            query, key = query.to(wide), key.to(wide)
        logits = torch.matmul(query, key.transpose(2, 3))
        logits = logits * factor if isinstance(factor, Tensor) else logits.mul_(factor)
        softcap, bias = (options.get(name) if name in self.takes else None for name in ("softcap", "position_bias"))
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        if bias is not None:
            logits = logits + bias
        logits = _masked(logits, mask, lowest)
        sinks = module.sinks if self.own_sinks else options.get("sinks") if "sinks" in self.takes else None
        if sinks is not None and sinks.ndim == 1:
            sinks = sinks.reshape(1, -1, 1, 1)
        if sinks is not None and self.sinks == "gate":
            return self._gated(watch, module, logits, mask, value, sinks, dropout)
        pattern = watch.weigh(logits, mask, lambda logits: self._softmax(logits, sinks).to(value.dtype), own=own)
        dropped = nn.functional.dropout(pattern, p=dropout, training=module.training)
        return torch.matmul(dropped, value).transpose(1, 2).contiguous(), pattern

    def _softmax(self, logits: Tensor, sinks: Tensor | None) -> Tensor:
        if sinks is not None:
            logits = torch.cat([logits, sinks.expand(*logits.shape[:-1], 1)], dim=-1)
        if self.shifted:
            logits = logits - logits.max(dim=-1, keepdim=True).values
        wide = torch.promote_types(torch.float32, logits.dtype) if self.softmax_in_float else logits.dtype
        # on a CPU, memory for another grid costs more than the softmax itself
        grad = torch.is_grad_enabled() and logits.requires_grad
        room = logits if logits.dtype == wide and not grad and logits.device.type == "cpu" else None
        weights = torch.softmax(logits, dim=-1, dtype=wide, out=room)
        return weights if sinks is None else weights[..., :-1]

    def _gated(
        self,
        watch: Watch,
        module: Any,
        logits: Tensor,
        mask: Tensor | None,
        value: Tensor,
        sinks: Tensor,
        dropout: float,
    ) -> tuple[Tensor, Tensor]:
        """Sinks as a gate on z. The pattern is the weights times the gate, so that pattern v = z; in the kernel's order
        of multiplication where nobody changes it.
        """
        weights, gate = logits, logits

        def softmax(logits: Tensor) -> Tensor:
            nonlocal weights, gate
            gate = (torch.logsumexp(logits, dim=-1, keepdim=True) - sinks).float().sigmoid().to(value.dtype)
            weights = self._softmax(logits, None).to(value.dtype)
            return weights * gate

        pattern = watch.weigh(logits, mask, softmax)
        plain = not watch.live("pattern")
        weights = weights if plain else pattern
        z = torch.matmul(nn.functional.dropout(weights, p=dropout, training=module.training), value)
        return (z * gate if plain else z).transpose(1, 2).contiguous(), weights


def _masked(logits: Tensor, mask: Tensor | None, lowest: float) -> Tensor:
    """Add a mask as the eager kernels do; a bool one stands for 0 and the lowest number. Writes into `logits`."""
    if mask is None:
        return logits
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=logits.dtype, device=mask.device).masked_fill_(~mask, lowest)
    return logits.add_(mask) if torch.promote_types(logits.dtype, mask.dtype) == logits.dtype else logits + mask


def find_kernel(module: nn.Module, eager: Eager) -> Kernel:
    """What the eager function of an attention module computes. Raises CutawayError where it is none of the known."""
    return _found(eager, isinstance(getattr(module, "sinks", None), Tensor))


class _StandIn:
    """What an eager function may read of its module; remembers what it read."""

    def __init__(self, **values: Any) -> None:
        self.values = {"training": False, **values}
        self.read: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self.values:
            raise AttributeError(f"it reads module.{name}")
        self.read.add(name)
        return self.values[name]


@lru_cache(maxsize=256)
def _found(eager: Eager, has_sinks: bool) -> Kernel:
    where = f"{eager.__module__}.{eager.__name__}"
    parameters = list(inspect.signature(eager).parameters.values())
    options = {p.name for p in parameters[5:] if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    if unknown := options - _UNDERSTOOD:
        raise CutawayError(f"{where} has options that are not understood: {', '.join(sorted(unknown))}.")
    takes = frozenset(options & {"softcap", "position_bias", "sinks"})
    try:
        with torch.no_grad():
            own = _StandIn(head_dim=8, num_key_value_groups=1, sinks=torch.ones(4) if has_sinks else None)
            *doubles, mask = _sample(torch.float64, 4)
            _, weights = _run(eager, own, (*doubles, torch.zeros_like(mask)), {})
            # short floats do not tell the dtype of the softmax on every device: it rounds only at its end
            in_float = torch.equal(weights, weights.float().double())
            groups = 2 if "num_key_value_groups" in own.read else 1
            trials = [
                (sample, extra, _StandIn(head_dim=8, num_key_value_groups=groups, sinks=sinks if has_sinks else None))
                for dtype in (torch.bfloat16, torch.float16, torch.float32)
                for sample, sinks in [(_sample(dtype, 4 // groups), _random((4,), dtype, 3))]
                for extra in _extras(parameters, takes, dtype)
            ]
            wanted = [_run(eager, module, sample, extra) for sample, extra, module in trials]
            for scale, sinks, shifted, product in itertools.product(
                ("query", "head_dim"), ("joined", "gate"), (False, True), (False, True)
            ):
                kernel = Kernel(takes, "sinks" in own.read, scale, sinks, in_float, shifted, product)
                if all(
                    _same(kernel, module, sample, extra, result)
                    for (sample, extra, module), result in zip(trials, wanted, strict=True)
                ):
                    return kernel
    except (AttributeError, TypeError, RuntimeError, ValueError, KeyError) as error:
        raise CutawayError(f"{where} does not run on queries, keys and values alone: {error}.") from error
    raise CutawayError(f"{where} computes attention in none of the ways that are understood.")


def _random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _sample(dtype: torch.dtype, kv: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries [2 4 5 16], keys, narrower values, and a mask that hides all keys from one query."""
    query, key, value = (
        _random((2, n, length, width), dtype, seed) * 2
        for seed, (n, length, width) in enumerate(((4, 5, 16), (kv, _KEYS, 16), (kv, _KEYS, 12)))
    )
    hidden = _random((2, 1, 5, _KEYS), torch.float32, 5) > 0.5
    hidden[0, 0, 0] = True
    return query, key, value, torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)


def _extras(parameters: list[inspect.Parameter], takes: frozenset[str], dtype: torch.dtype) -> list[dict[str, Any]]:
    values = {
        "softcap": 1.5,
        "position_bias": _random((2, 4, 5, _KEYS), dtype, 6),
        "sinks": _random((2, 4, 5, 1), dtype, 7),
    }
    given: list[dict[str, Any]] = [{"scaling": 0.37}]
    given += [{"scaling": 0.37, name: values[name]} for name in sorted(takes)]
    if any(p.name == "scaling" and p.default is None for p in parameters):
        given.append({"scaling": None})
    return given


def _run(eager: Eager, module: Any, sample: tuple[Tensor, ...], extra: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return eager(module, *sample, **{"scaling": 0.37, **extra})


def _same(kernel: Kernel, module: Any, sample: tuple[Tensor, ...], extra: dict[str, Any], wanted: Any) -> bool:
    query, key, value, mask = sample
    found = kernel.attend(Watch(), module, query, key, value, mask, **extra)
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, wanted, strict=True))
