"""Edits as data: what is patched, ablated, clamped, added or steered, and where.

An `Edit` is a small value. The constructors (`set`, `zero`, `mean`, `patch`, `add`, `scale`, `project_out`, `clamp`,
`clamp_latent`) take the same address: `positions` (None: every real token; an int or a list: those positions in each
row, 0 the row's first real token, -1 its last; a list of lists: row by row), `heads` (key-value heads at k, v,
rot_k), `rows`, and `phase` ("all", "prompt", "new", or (start, stop) counting new tokens). At scores and pattern a
position is a destination, and masked cells of scores stay masked. Edits at one site apply in list order.

A value broadcasts to each addressed token: shaped like one token's value at the site (trailing dimensions), or with a
leading dimension of one entry a position, or two leading dimensions [row, position] (of every column, as captures have
them, where no positions are named).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError

if TYPE_CHECKING:
    from cutaway.model.run import Run

Positions = int | Sequence[int] | Sequence[Sequence[int]] | None
Phase = Literal["all", "prompt", "new"] | tuple[int, int]
Kind = Literal["set", "zero", "mean", "patch", "add", "scale", "project_out", "clamp", "clamp_latent"]


class NothingEdited(CutawayError):
    """An edit that touched no value: the run that contains it would silently be an unedited one."""


@dataclass(frozen=True, eq=False)
class Edit:
    """One change at one site (or at every site a wildcard names). Make it with a constructor of this module."""

    kind: Kind
    site: str
    positions: Positions = None
    heads: tuple[int, ...] | None = None
    rows: tuple[int, ...] | None = None
    phase: Phase = "all"
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)
    numbers: dict[str, float] = field(default_factory=dict)
    source: Run | None = field(default=None, repr=False)
    source_positions: Positions = None
    source_rows: tuple[int, ...] | None = None

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

    def __str__(self) -> str:
        where = [f"positions {self.positions}"] if self.positions is not None else []
        where += [f"heads {list(self.heads)}"] if self.heads is not None else []
        where += [f"rows {list(self.rows)}"] if self.rows is not None else []
        where += [f"phase {self.phase}"] if self.phase != "all" else []
        numbers = [f"{name}={value:g}" for name, value in self.numbers.items()]
        return " ".join([self.kind, self.site, *numbers, *([f"({', '.join(where)})"] if where else [])])


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

    def __str__(self) -> str:
        heads = f", heads {list(self.heads)}" if self.heads is not None else ""
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


def _whole(value: Any, what: str) -> int:
    """A whole number: Python's, NumPy's, or a tensor of one."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise CutawayError(f"The edit's {what} are whole numbers; {value!r} is not one.") from error


def _listed(value: Any, what: str) -> list[Any]:
    if isinstance(value, Tensor) or hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise CutawayError(f"The edit's {what} are whole numbers, or a list of them; got {value!r}.")
    return list(value)


def _indices(value: int | Sequence[int] | None, what: str) -> tuple[int, ...] | None:
    if value is None:
        return None
    if hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0:
        return (_whole(value, what),)
    chosen = tuple(_whole(v, what) for v in _listed(value, what))
    if not chosen:
        raise NothingEdited(
            f"The edit's list of {what} is empty, so it would touch nothing; leave {what} out to mean all."
        )
    return chosen


def _tensor(value: Tensor | float | Sequence[float], what: str) -> Tensor:
    try:
        tensor = value.detach() if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CutawayError(f"The edit's {what} is a number or a tensor of numbers; got {value!r}.") from error
    if not bool(torch.isfinite(tensor).all()):
        raise CutawayError(f"The edit's {what} holds NaN or infinity.")
    return tensor


def _places(value: Any) -> Positions:
    """Positions as plain numbers: one, one list for all rows, or one list a row."""
    if value is None:
        return None
    if hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0:
        return _whole(value, "positions")
    listed = _listed(value, "positions")
    if not listed:
        raise NothingEdited("The edit's list of positions is empty, so it would touch nothing.")
    nested = [isinstance(p, str) or (isinstance(p, Iterable) and getattr(p, "ndim", 1) > 0) for p in listed]
    return [  # type: ignore[return-value]
        [_whole(q, "positions") for q in _listed(p, "positions")] if inner else _whole(p, "positions")
        for p, inner in zip(listed, nested, strict=True)
    ]


def _make(kind: Kind, site: str, positions: Positions, heads, rows, phase: Phase, **parts) -> Edit:
    if not isinstance(site, str):
        raise CutawayError(f"An edit's site is a name such as 'blocks.3.resid_post'; got {site!r}.")
    for name, number in parts.get("numbers", {}).items():
        if not math.isfinite(number):
            raise CutawayError(f"The edit's {name} is {number}; give a finite number.")
    return Edit(kind, site, _places(positions), _indices(heads, "heads"), _indices(rows, "rows"), phase, **parts)


def set(
    site: str, value: Tensor | float, *, positions: Positions = None, heads=None, rows=None, phase: Phase = "all"
) -> Edit:
    """Replace the value at the site."""
    return _make("set", site, positions, heads, rows, phase, tensors={"value": _tensor(value, "value")})


def zero(site: str, *, positions: Positions = None, heads=None, rows=None, phase: Phase = "all") -> Edit:
    """Replace the value by zero (zero ablation)."""
    return _make("zero", site, positions, heads, rows, phase)


def mean(
    site: str, value: Tensor | float, *, positions: Positions = None, heads=None, rows=None, phase: Phase = "all"
) -> Edit:
    """Replace the value by its mean over a data set (mean ablation); `value` is that mean."""
    return _make("mean", site, positions, heads, rows, phase, tensors={"value": _tensor(value, "mean")})


def patch(
    site: str,
    source: Run | Tensor,
    *,
    source_positions: Positions = None,
    source_rows: int | Sequence[int] | None = None,
    positions: Positions = None,
    heads=None,
    rows=None,
    phase: Phase = "all",
) -> Edit:
    """Replace the value by the one of another run at the same site, or of a tensor shaped like the site (right
    padded).

    Row i takes row i of the source (its only row, if it has one; else `source_rows`, one a touched row). Positions
    match by number unless `source_positions` gives as many as `positions`. New tokens of a generation are never
    patched.
    """
    tensors, run = ({"value": source.detach()}, None) if isinstance(source, Tensor) else ({}, source)
    if not tensors and not hasattr(run, "tokens"):
        raise CutawayError(f"A patch takes its values from a run or a tensor; got {source!r}.")
    if source_positions is not None and positions is None:
        raise CutawayError("source_positions needs positions of the same number beside it.")
    return _make(
        "patch",
        site,
        positions,
        heads,
        rows,
        phase,
        tensors=tensors,
        source=run,
        source_positions=_places(source_positions),
        source_rows=_indices(source_rows, "source_rows"),
    )


def add(
    site: str,
    direction: Tensor,
    scale: float = 1.0,
    *,
    positions: Positions = None,
    heads=None,
    rows=None,
    phase: Phase = "all",
) -> Edit:
    """Add scale * direction (not normalised)."""
    tensors = {"direction": _tensor(direction, "direction")}
    return _make("add", site, positions, heads, rows, phase, tensors=tensors, numbers={"scale": float(scale)})


def scale(
    site: str, factor: float, *, positions: Positions = None, heads=None, rows=None, phase: Phase = "all"
) -> Edit:
    """Multiply the value by a factor."""
    return _make("scale", site, positions, heads, rows, phase, numbers={"factor": float(factor)})


def _unit(direction: Tensor) -> Tensor:
    direction = _tensor(direction, "direction").to(torch.promote_types(direction.dtype, torch.float32))
    if direction.ndim != 1:
        raise CutawayError(f"A direction is one vector; got a tensor of shape {tuple(direction.shape)}.")
    norm = direction.norm()
    if float(norm) == 0.0:
        raise CutawayError("The direction is the zero vector, so there is nothing to project on.")
    return direction / norm


def project_out(
    site: str, direction: Tensor, *, positions: Positions = None, heads=None, rows=None, phase: Phase = "all"
) -> Edit:
    """Remove the component along a direction: x - (x·u)u with u the unit vector (directional ablation)."""
    return _make("project_out", site, positions, heads, rows, phase, tensors={"direction": _unit(direction)})


def clamp(
    site: str,
    direction: Tensor,
    value: float | None = None,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    positions: Positions = None,
    heads=None,
    rows=None,
    phase: Phase = "all",
) -> Edit:
    """Set the projection x·u on a unit direction to `value`, or keep it between `minimum` and `maximum`."""
    if (value is None) == (minimum is None and maximum is None):
        raise CutawayError("clamp needs either a value, or a minimum, a maximum or both.")
    low, high = (value, value) if value is not None else (minimum, maximum)
    if low is not None and high is not None and low > high:
        raise CutawayError(f"clamp's minimum {low} is above its maximum {high}.")
    numbers = {k: float(v) for k, v in (("minimum", low), ("maximum", high)) if v is not None}
    return _make("clamp", site, positions, heads, rows, phase, tensors={"direction": _unit(direction)}, numbers=numbers)


def clamp_latent(
    site: str,
    *,
    encoder: Tensor,
    bias: float,
    decoder: Tensor,
    value: float,
    offset: Tensor | None = None,
    positions: Positions = None,
    heads=None,
    rows=None,
    phase: Phase = "all",
) -> Edit:
    """Set a dictionary latent to `value`, leaving what the dictionary does not explain as it is.

    x + (value - a) * decoder with a = relu((x - offset)·encoder + bias), the latent's activation before any selection
    among latents (top-k). All vectors are [d]; `value` is in the units of the latent.
    """
    tensors = {"encoder": _tensor(encoder, "encoder"), "decoder": _tensor(decoder, "decoder")}
    if offset is not None:
        tensors["offset"] = _tensor(offset, "offset")
    numbers = {"bias": float(bias), "value": float(value)}
    return _make("clamp_latent", site, positions, heads, rows, phase, tensors=tensors, numbers=numbers)


def changed(edit: Edit, block: Tensor, value: Tensor | None) -> Tensor:
    """The edited value of a block [n, ...one token's value], computed in fp32 or wider and cast back.

    `value` is what set, mean and patch put there, already broadcastable to the block.
    """
    if edit.kind == "zero":
        return torch.zeros_like(block)
    if edit.kind in ("set", "mean", "patch"):
        assert value is not None
        return value.to(block.dtype).expand_as(block)
    if edit.kind == "scale":
        return block * edit.numbers["factor"]
    wide = block.to(torch.promote_types(block.dtype, torch.float32))

    def vector(name: str) -> Tensor:
        return edit.tensors[name].to(device=wide.device, dtype=wide.dtype)

    if edit.kind == "add":
        assert value is not None
        result = wide + edit.numbers["scale"] * value.to(wide.dtype)
    elif edit.kind == "project_out":
        u = vector("direction")
        result = wide - (wide @ u)[..., None] * u
    elif edit.kind == "clamp":
        u = vector("direction")
        projection = wide @ u
        kept = projection.clamp(edit.numbers.get("minimum"), edit.numbers.get("maximum"))
        result = wide + (kept - projection)[..., None] * u
    elif edit.kind == "clamp_latent":
        x = wide - vector("offset") if "offset" in edit.tensors else wide
        activation = (x @ vector("encoder") + edit.numbers["bias"]).relu()
        result = wide + (edit.numbers["value"] - activation)[..., None] * vector("decoder")
    else:
        raise CutawayError(f"Unknown kind of edit: {edit.kind!r}.")
    return result.to(block.dtype)
