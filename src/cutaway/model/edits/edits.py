"""Edits as data: what is patched, ablated, clamped, added or steered, and where.

An `Edit` is a small value: it can be compared, hashed, printed, saved (`save_edits`) and used again. The constructors
(`set`, `zero`, `mean`, `patch`, `resample`, `add`, `noise`, `scale`, `project_out`, `clamp`, `clamp_latent`,
`function`) take the same address by keyword, see `Where`. At scores and pattern a position is a destination, and masked
cells of scores stay masked. Edits at one site apply in list order.

A value broadcasts to each addressed token: shaped like one token's value at the site (trailing dimensions), or with a
leading dimension of one entry a position, or two leading dimensions [row, position] (of every column, as captures have
them, where no positions are named).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypedDict, Unpack, get_args

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.model.edits.positions import (
    AtToken,
    NothingEdited,
    Places,
    Positions,
    at_token,
    indices,
    places,
    position_map_places,
    several,
    spelled,
)
from cutaway.model.edits.source import Source
from cutaway.model.edits.values import EditFunction, name_of_function, orthonormal, plain_numbers, registered_function

__all__ = ["AtToken", "Edit", "NothingEdited", "Positions", "Receipt", "at_token"]

Phase = Literal["all", "prompt", "new"] | tuple[int, int]
Kind = Literal[
    "set", "zero", "mean", "patch", "resample", "add", "noise", "scale", "project_out", "clamp", "clamp_latent",
    "function",
]  # fmt: skip
KINDS: tuple[str, ...] = get_args(Kind)
PATCHES = ("patch", "resample")
_TENSORS: dict[str, tuple[str, ...]] = {
    "set": ("value",),
    "mean": ("value",),
    "add": ("direction",),
    "project_out": ("direction",),
    "clamp": ("direction",),
    "clamp_latent": ("encoder", "decoder"),
}
_NUMBERS: dict[str, tuple[str, ...]] = {
    "add": ("scale",),
    "scale": ("factor",),
    "noise": ("std",),
    "clamp_latent": ("bias", "value"),
}


class Where(TypedDict, total=False):
    """An edit's address: which rows, tokens and parts of a site's value it touches.

    `positions`: None (every real token), an int or a list (in each row; 0 is the first real token, -1 the last), a
    list of lists (row by row), a slice, a boolean mask [b, p] in the layout of `lm.tokens(...)`, or `at_token(...)`.
    With the phase "new" or (start, stop), they number new tokens from 0, else those of the prompt.
    `heads`: key-value heads at k, v, rot_k. `neurons`: entries of the last dimension, at any site. `rows`: of the
    batch, or of the prompts. `phase`: "all", "prompt", "new", or (start, stop) of new tokens.
    `basis`: [k, width] vectors; only the part of the change within their span happens.
    """

    positions: Positions
    heads: int | Sequence[int] | None
    neurons: int | Sequence[int] | None
    rows: int | Sequence[int] | None
    phase: Phase
    basis: Tensor | None


@dataclass(frozen=True, eq=False)
class Edit:
    """One change at one site (or at every site a wildcard names). Make it with a constructor of this module.

    Two edits are equal when they do the same: kind, address, numbers and values bit for bit. Where a patch's values
    came from does not count, only what they are.
    """

    kind: Kind
    site: str
    positions: Places = None
    heads: tuple[int, ...] | None = None
    rows: tuple[int, ...] | None = None
    phase: Phase = "all"
    tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    numbers: Mapping[str, float] = field(default_factory=dict)
    source: Source | None = field(default=None, repr=False)
    source_positions: Places = None
    source_rows: tuple[int, ...] | None = None
    neurons: tuple[int, ...] | None = None
    seed: tuple[int, ...] | None = None
    function: EditFunction | str | None = None
    other_model: bool = False

    def __post_init__(self) -> None:
        phase = self.phase
        good = phase in ("all", "prompt", "new") or (
            isinstance(phase, tuple)
            and len(phase) == 2
            and all(isinstance(step, int) for step in phase)
            and 0 <= phase[0] < phase[1]
        )
        if not good:
            raise CutawayError(f"phase={phase!r} is not 'all', 'prompt', 'new' or (start, stop) of new tokens.")
        self._check_parts()

    def _check_parts(self) -> None:
        """What every constructor sees to, and a file may have wrong."""
        lacking = [n for n in _TENSORS.get(self.kind, ()) if n not in self.tensors]
        lacking += [n for n in _NUMBERS.get(self.kind, ()) if n not in self.numbers]
        lacking += ["minimum or maximum"] if self.kind == "clamp" and not self.numbers else []
        lacking += ["function"] if self.kind == "function" and self.function is None else []
        lacking += ["seed"] if self.kind == "noise" and self.seed is None else []
        if self.kind in PATCHES and ("value" in self.tensors) == (self.source is not None):
            lacking.append("source")
        if lacking:
            raise CutawayError(f"An edit of the kind '{self.kind}' lacks its {' and '.join(lacking)}.")
        for name, number in self.numbers.items():
            if not abs(number) <= torch.finfo(torch.float32).max:
                raise CutawayError(f"The edit's {name} is {number}; give a finite number, as fp32 holds them.")
        if self.numbers.get("std", 0.0) < 0:
            raise CutawayError(f"Noise has a standard deviation of 0 or more; got {self.numbers['std']}.")
        for name, tensor in self.tensors.items():
            if self.kind not in PATCHES and not bool(torch.isfinite(tensor).all()):
                raise CutawayError(f"The edit's {name} holds NaN or infinity.")
            if name in ("encoder", "decoder", "offset") and tensor.ndim != 1:
                raise CutawayError(f"The edit's {name} is one vector; got a tensor of shape {list(tensor.shape)}.")
        if "basis" in self.tensors and self.neurons is not None:
            raise CutawayError("An edit takes either neurons or a basis: single neurons are a basis of their own.")

    @cached_property
    def _key(self) -> tuple[str, int | None]:
        """What equality and hash go by; a function without a name is only equal to itself."""
        from cutaway.model.edits.files import digest_of

        unnamed = callable(self.function) and name_of_function(self.function) is None
        return digest_of(self), id(self.function) if unnamed else None

    def digest(self) -> str:
        """SHA-256 (hex) of all that the edit does: the same in every process, also after saving and loading.

        Raises CutawayError for a function that is not registered by name.
        """
        if self._key[1] is not None:
            raise self._unnamed()
        return self._key[0]

    def _unnamed(self) -> CutawayError:
        return CutawayError(
            f"'{self}' holds a Python function, which is not data; register it with "
            "cutaway.register_edit_function(name) to save it by name."
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Edit):
            return NotImplemented
        return self is other or self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __str__(self) -> str:
        where = [f"positions {spelled(self.positions)}"] if self.positions is not None else []
        where += [f"heads {list(self.heads)}"] if self.heads is not None else []
        where += [f"neurons {_short(self.neurons)}"] if self.neurons is not None else []
        where += [f"rows {list(self.rows)}"] if self.rows is not None else []
        where += [f"phase {self.phase}"] if self.phase != "all" else []
        where += [f"within {len(self.tensors['basis'])} directions"] if "basis" in self.tensors else []
        numbers = [f"{name}={value:g}" for name, value in self.numbers.items()]
        if self.seed is not None:
            numbers.append(f"seed={_short(self.seed)}")
        if self.function is not None:
            name = self.function if isinstance(self.function, str) else getattr(self.function, "__name__", "function")
            numbers.append(name)
        return " ".join([self.kind, self.site, *numbers, *([f"({', '.join(where)})"] if where else [])])


def _short(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    return str(list(numbers)) if len(numbers) <= 8 else f"[{', '.join(map(str, numbers[:6]))}, … {len(numbers)}]"


@dataclass(frozen=True)
class Receipt:
    """What one edit really changed at one site.

    `positions` are the touched positions of each touched row, in the order of `rows`; the means are over touched
    values, before and after this edit, in the units of the site.
    """

    edit: int
    kind: str
    site: str
    layer: int | None
    rows: tuple[int, ...]
    positions: tuple[tuple[int, ...], ...]
    heads: tuple[int, ...] | None
    n_tokens: int
    mean_abs_delta: float
    mean_abs_before: float
    mean_abs_after: float
    neurons: tuple[int, ...] | None = None

    def __str__(self) -> str:
        heads = f", heads {list(self.heads)}" if self.heads is not None else ""
        heads += f", neurons {_short(self.neurons)}" if self.neurons is not None else ""
        return (
            f"{self.kind} {self.site}: {self.n_tokens} tokens in {len(self.rows)} rows{heads}, mean |Δ| "
            f"{self.mean_abs_delta:.4g} (|before| {self.mean_abs_before:.4g}, |after| {self.mean_abs_after:.4g})"
        )


def edit_list(edits: Edit | Sequence[Edit] | None) -> tuple[Edit, ...]:
    """One edit, several, or none, as a tuple. Raises CutawayError for what is no edit."""
    if edits is None:
        return ()
    if isinstance(edits, Edit):
        return (edits,)
    found = tuple(edits) if isinstance(edits, Iterable) and not isinstance(edits, str) else (edits,)
    for edit in found:
        if not isinstance(edit, Edit):
            raise CutawayError(f"edits= takes edits such as cutaway.zero('blocks.3.mlp.out'); {edit!r} is none.")
    return found  # type: ignore[return-value]


def _tensor(value: Tensor | float | Sequence[float], what: str) -> Tensor:
    """A snapshot of a value, so that an edit stays what it is."""
    try:
        given = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float32)
        return plain_numbers(given, what).detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise CutawayError(f"The edit's {what} is a number or a tensor of numbers; got {value!r}.") from error


def _number(value: float, what: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CutawayError(f"The edit's {what} is a number; got {value!r}.") from error


def _make(kind: Kind, site: str, where: Where, *, tensors: Mapping[str, Tensor] | None = None, **parts: Any) -> Edit:
    if not isinstance(site, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise CutawayError(f"An edit's site is a name such as 'blocks.3.resid_post'; got {site!r}.")
    unknown = [name for name in where if name not in Where.__annotations__]
    if unknown:
        raise CutawayError(f"An edit has no '{unknown[0]}'; its address is made of {', '.join(Where.__annotations__)}.")
    held = dict(tensors or {})
    basis = where.get("basis")
    if basis is not None:
        held["basis"] = orthonormal(_finite(_tensor(basis, "basis"), "basis"))
    phase: Any = where.get("phase", "all")
    return Edit(
        kind,
        site,
        places(where.get("positions")),
        indices(where.get("heads"), "heads"),
        indices(where.get("rows"), "rows"),
        tuple(phase) if isinstance(phase, list) else phase,
        held,
        neurons=indices(where.get("neurons"), "neurons"),
        **parts,
    )


def _finite(tensor: Tensor, what: str) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise CutawayError(f"The edit's {what} holds NaN or infinity.")
    return tensor


def _unit(direction: Tensor) -> Tensor:
    direction = _finite(_tensor(direction, "direction"), "direction")
    direction = direction.to(torch.promote_types(direction.dtype, torch.float32))
    if direction.ndim != 1:
        raise CutawayError(f"A direction is one vector; got a tensor of shape {tuple(direction.shape)}.")
    largest = float(direction.abs().max()) if direction.numel() else 0.0
    if largest == 0.0:
        raise CutawayError("The direction is the zero vector, so there is nothing to project on.")
    direction = direction / largest  # or the squares of very large or small entries are infinite or 0
    return direction / direction.norm()


def set(site: str, value: Tensor | float, **where: Unpack[Where]) -> Edit:
    """Replace the value at the site."""
    return _make("set", site, where, tensors={"value": _tensor(value, "value")})


def zero(site: str, **where: Unpack[Where]) -> Edit:
    """Replace the value by zero (zero ablation)."""
    return _make("zero", site, where)


def mean(site: str, value: Tensor | float, **where: Unpack[Where]) -> Edit:
    """Replace the value by its mean over a data set (mean ablation); `value` is that mean."""
    return _make("mean", site, where, tensors={"value": _tensor(value, "mean")})


def patch(
    site: str,
    source: Source | Tensor,
    *,
    source_positions: Positions = None,
    source_rows: int | Sequence[int] | None = None,
    other_model: bool = False,
    **where: Unpack[Where],
) -> Edit:
    """Replace the value by the one of another run at the same site, or of a tensor shaped like the site (right
    padded).

    Row i takes row i of the source (its only row, if it has one; else `source_rows`, one a touched row). Positions
    match by number, those from the end by their number from the end, unless `source_positions` gives as many as
    `positions`; they take the same forms and are counted in the source's rows. At scores and pattern, keys match by
    number. New tokens of a generation are never patched.
    A run of other weights is refused unless `other_model`.
    """
    if source_positions is not None and where.get("positions") is None:
        raise CutawayError("source_positions needs positions of the same number beside it.")
    rows = _source_rows(source_rows)
    return _from_source("patch", site, source, places(source_positions), rows, None, other_model, where)


def resample(
    site: str,
    source: Source | Tensor,
    *,
    position_map: Mapping[int, int] | Sequence[Any] | None = None,
    source_rows: int | Sequence[int] | None = None,
    seed: int | Sequence[int] | None = None,
    other_model: bool = False,
    **where: Unpack[Where],
) -> Edit:
    """Replace the value by one taken elsewhere in a source (resample ablation), a run or a tensor shaped like the site.

    `position_map` {to: from} says which of the source's positions each position takes: a dict, or (to, from) pairs,
    for all rows, or a list of dicts, one a touched row. `seed` (a number, or one a touched row) draws for each row
    another row of the source that is long enough and has other tokens; the draw depends on the seed and the row's own
    tokens, not on the batch around it. Otherwise rows match as in `patch`.
    """
    if seed is not None and source_rows is not None:
        raise CutawayError("resample draws its source rows with a seed or takes source_rows, not both.")
    if position_map is not None and where.get("positions") is not None:
        raise CutawayError("position_map names the positions itself; leave positions= out.")
    if position_map is None and seed is None and source_rows is None:
        raise CutawayError("resample needs a position_map, source_rows, or a seed to draw rows with; else use patch.")
    origins: Places = None
    if position_map is not None:
        positions, origins = position_map_places(position_map)
        where = {**where, "positions": positions}  # type: ignore[typeddict-item]
    seeds = None if seed is None else several(seed, "seed")
    return _from_source("resample", site, source, origins, _source_rows(source_rows), seeds, other_model, where)


def _source_rows(value: int | Sequence[int] | None) -> tuple[int, ...] | None:
    return None if value is None else several(value, "source_rows")


def _from_source(
    kind: Kind,
    site: str,
    source: Any,
    origins: Places,
    source_rows: tuple[int, ...] | None,
    seed: tuple[int, ...] | None,
    other_model: bool,
    where: Where,
) -> Edit:
    if not isinstance(source, Tensor) and not hasattr(source, "tokens"):
        raise CutawayError(f"A {kind} takes its values from a run or a tensor; got {source!r}.")
    return _make(
        kind,
        site,
        where,
        tensors={"value": _tensor(source, "source")} if isinstance(source, Tensor) else {},
        source=None if isinstance(source, Tensor) else source,
        source_positions=origins,
        source_rows=source_rows,
        seed=seed,
        other_model=bool(other_model),
    )


def add(site: str, direction: Tensor, scale: float = 1.0, **where: Unpack[Where]) -> Edit:
    """Add scale * direction (not normalised)."""
    tensors = {"direction": _tensor(direction, "direction")}
    return _make("add", site, where, tensors=tensors, numbers={"scale": _number(scale, "scale")})


def noise(site: str, std: float, *, seed: int | Sequence[int] = 0, **where: Unpack[Where]) -> Edit:
    """Add gaussian noise of standard deviation `std`, in the units of the site.

    What a token gets depends on the seed, the site and the row's tokens up to it: the same alone or in a batch, cached
    or not, in a generation or in a run of its tokens. Two rows of the same tokens get the same noise; give one seed a
    touched row for several draws. At scores and pattern, keys after a token's own position get none.
    """
    seeds = several(seed, "seed")
    return _make("noise", site, where, numbers={"std": _number(std, "std")}, seed=seeds)


def scale(site: str, factor: float, **where: Unpack[Where]) -> Edit:
    """Multiply the value by a factor."""
    return _make("scale", site, where, numbers={"factor": _number(factor, "factor")})


def project_out(site: str, direction: Tensor, **where: Unpack[Where]) -> Edit:
    """Remove the component along a direction: x - (x·u)u with u the unit vector (directional ablation).

    `zero(site, basis=...)` removes several directions.
    """
    return _make("project_out", site, where, tensors={"direction": _unit(direction)})


def clamp(
    site: str,
    direction: Tensor,
    value: float | None = None,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    **where: Unpack[Where],
) -> Edit:
    """Set the projection x·u on a unit direction to `value`, or keep it between `minimum` and `maximum`."""
    if (value is None) == (minimum is None and maximum is None):
        raise CutawayError("clamp needs either a value, or a minimum, a maximum or both.")
    ends = (value, value) if value is not None else (minimum, maximum)
    low, high = (None if end is None else _number(end, "end") for end in ends)
    if low is not None and high is not None and low > high:
        raise CutawayError(f"clamp's minimum {low} is above its maximum {high}.")
    numbers = {k: v for k, v in (("minimum", low), ("maximum", high)) if v is not None}
    return _make("clamp", site, where, tensors={"direction": _unit(direction)}, numbers=numbers)


def clamp_latent(
    site: str,
    *,
    encoder: Tensor,
    bias: float,
    decoder: Tensor,
    value: float,
    offset: Tensor | None = None,
    threshold: float = 0.0,
    **where: Unpack[Where],
) -> Edit:
    """Set a dictionary latent to `value`, leaving what the dictionary does not explain as it is.

    x + (value - a) * decoder with a = relu(h)·1[h > threshold], h = (x - offset)·encoder + bias, the latent's
    activation before any selection among latents (top-k). All vectors are [d]; `value` is in the units of the latent.
    """
    tensors = {"encoder": _tensor(encoder, "encoder"), "decoder": _tensor(decoder, "decoder")}
    if offset is not None:
        tensors["offset"] = _tensor(offset, "offset")
    numbers = {"bias": _number(bias, "bias"), "value": _number(value, "value")}
    if threshold:
        numbers["threshold"] = _number(threshold, "threshold")
    return _make("clamp_latent", site, where, tensors=tensors, numbers=numbers)


def function(site: str, function: EditFunction | str, **where: Unpack[Where]) -> Edit:
    """Replace the touched values by what a Python function makes of them.

    It gets [n, ...one token's value] (heads and neurons as addressed) for the n touched tokens of one forward pass, and
    returns as many; it should treat each alone, for a batch and a cache split them. Gradients pass through it. Give a
    name of `register_edit_function` instead to be able to save the edit; a registered function is saved by its name.
    """
    if isinstance(function, str):
        registered_function(function)
    elif not callable(function):
        raise CutawayError(f"A function edit takes a Python function or a registered name; got {function!r}.")
    else:
        function = name_of_function(function) or function
    return _make("function", site, where, function=function)
