"""An edit as a value, and the receipt of what it did. The constructors are in `edits.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError, NotSupported
from cutaway.artifacts.manifest import json_hash
from cutaway.model.edits.positions import Places, Positions, indices, places, spelled
from cutaway.model.edits.record import Packed, places_record
from cutaway.model.edits.source import Source, stored_source
from cutaway.model.edits.values import EditFunction, name_of_function, orthonormal, plain_numbers
from cutaway.model.latents import Latents, edited_site, is_dictionary

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


@dataclass(frozen=True, eq=False)
class Edit:
    """One change at one site (or at every site a wildcard names). Make it with `cutaway.zero`, `patch`, `add`, …

    Two edits are equal when they do the same: kind, address, numbers and values bit for bit. Where a patch's values
    came from does not count, only what they are.

    Attributes:
        kind: the name of the constructor.
        site: the site or wildcard as it was given.
        positions: which tokens; None is every real token.
        heads: which heads; None is all.
        rows: which rows of the batch; None is all.
        phase: in a generation "all", "prompt", "new" or (start, stop) of new tokens.
        tensors: values, directions and the basis by name.
        numbers: scale, factor, bounds and the like by name.
        source: the run that a patch takes its values from; None where it is a tensor.
        source_positions: the tokens of the source that are taken; None is those of the same number.
        source_rows: the row of the source for each touched row; None is that of the same number.
        neurons: entries of the last dimension, or latents of `dictionary`; None is all.
        seed: of noise, or of rows that are drawn: one, or one per touched row.
        function: of a function edit, or the name under which it is registered.
        other_model: whether the source may be a run of other weights.
        dictionary: the dictionary whose latents are edited; None where the site's own values are.
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
    dictionary: Latents | None = field(default=None, repr=False)

    def within(self, basis: Tensor | None) -> Edit:
        """The same edit, of which only the part within the span of some vectors happens: x + P(e(x) - x).

        Args:
            basis: vectors [k, width] (or one, [width]) that do not depend on each other; they are made orthonormal.
                None leaves the edit as it is.

        Raises:
            CutawayError: vectors of another shape, that depend on each other, or with the edit naming `neurons`.

        Example:
            cutaway.zero("blocks.3.resid_post").within(direction)  # directional ablation
        """
        if basis is None:
            return self
        vectors = orthonormal(finite(tensor_of(basis, "basis"), "basis"))
        return replace(self, tensors={**self.tensors, "basis": vectors})

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
    def _key(self) -> tuple[str, int | None, int | None]:
        """What equality and hash go by; a function without a name, or a dictionary, is only equal to itself."""
        unnamed = callable(self.function) and name_of_function(self.function) is None
        dictionary = None if self.dictionary is None else id(self.dictionary)
        digest = json_hash(edit_record(self, Packed(), provenance=False))
        return digest, id(self.function) if unnamed else None, dictionary

    def digest(self) -> str:
        """SHA-256 (hex) of all that the edit does: the same in every process, also after saving and loading.

        Raises:
            CutawayError: for a function that is not registered by name.
            NotSupported: for an edit of a dictionary's latents.
        """
        if self.dictionary is not None:
            raise NotSupported(
                f"'{self}' holds a dictionary, which is not kept with edits; make it again from the dictionary, or use "
                "cutaway.clamp_latent, which can be saved."
            )
        if self._key[1] is not None:
            raise CutawayError(
                f"'{self}' holds a Python function, which is not data; register it with "
                "cutaway.register_edit_function(name) to save it by name."
            )
        return self._key[0]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Edit):
            return NotImplemented
        return self is other or self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __str__(self) -> str:
        where = [f"positions {spelled(self.positions)}"] if self.positions is not None else []
        where += [f"heads {list(self.heads)}"] if self.heads is not None else []
        units = "neurons" if self.dictionary is None else "latents"
        where += [f"{units} {_short(self.neurons)}"] if self.neurons is not None else []
        where += [f"rows {list(self.rows)}"] if self.rows is not None else []
        where += [f"phase {self.phase}"] if self.phase != "all" else []
        where += [f"within {len(self.tensors['basis'])} directions"] if "basis" in self.tensors else []
        numbers = [f"{name}={value:g}" for name, value in self.numbers.items()]
        if self.seed is not None:
            numbers.append(f"seed={_short(self.seed)}")
        if self.function is not None:
            name = self.function if isinstance(self.function, str) else getattr(self.function, "__name__", "function")
            numbers.append(name)
        site = self.site if self.dictionary is None else f"latents at {self.site}"
        return " ".join([self.kind, site, *numbers, *([f"({', '.join(where)})"] if where else [])])


def _short(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    return str(list(numbers)) if len(numbers) <= 8 else f"[{', '.join(map(str, numbers[:6]))}, … {len(numbers)}]"


@dataclass(frozen=True)
class Receipt:
    """What one edit really changed at one site.

    Attributes:
        edit: the edit's number in the list that the run was given.
        kind: what it does.
        site: where, one site per receipt.
        layer: the site's layer; None for those outside the layers.
        rows: the touched rows.
        positions: the touched positions of each touched row, in the order of `rows`.
        heads: the heads that the edit names.
        n_tokens: number of touched tokens.
        mean_abs_delta: mean of |after - before| over the touched values, in the units of the site (or latents).
        mean_abs_before: mean of |before|.
        mean_abs_after: mean of |after|.
        neurons: the neurons, or latents, that the edit names.
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


def edit_record(edit: Edit, packed: Packed, *, provenance: bool) -> dict[str, Any]:
    """All that an edit does, as plain JSON that names its tensors by their hashes; `packed` gathers the tensors.

    With `provenance` also what model a patch's values came from. Raises CutawayError for values that cannot be saved.
    """
    source = None
    if edit.source is not None:
        asked = edit.positions if edit.source_positions is None else edit.source_positions
        kept = stored_source(edit.source, edit.site, asked, edit.source_rows, edit)
        source = {
            "ids": packed.add(kept.tokens.ids),
            "mask": packed.add(kept.tokens.mask),
            "strings": kept.tokens.strings,
            "values": {name: packed.add(value) for name, value in sorted(kept.values.items())},
            "rows": kept.rows,
            "columns": kept.columns,
            "model": asdict(edit.source.identity()) if provenance else None,
        }
    return {
        "kind": edit.kind,
        "site": edit.site,
        "positions": places_record(edit.positions),
        "heads": edit.heads,
        "neurons": edit.neurons,
        "rows": edit.rows,
        "phase": edit.phase,
        "tensors": {name: packed.add(tensor) for name, tensor in sorted(edit.tensors.items())},
        "numbers": {name: float(value) for name, value in sorted(edit.numbers.items())},
        "source": source,
        "source_positions": places_record(edit.source_positions),
        "source_rows": edit.source_rows,
        "seed": edit.seed,
        "function": name_of_function(edit.function) if callable(edit.function) else edit.function,
        "other_model": edit.other_model,
    }


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


def tensor_of(value: Tensor | float | Sequence[float], what: str) -> Tensor:
    """A snapshot of a value, so that an edit stays what it is."""
    try:
        given = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float32)
        return plain_numbers(given, what).detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise CutawayError(f"The edit's {what} is a number or a tensor of numbers; got {value!r}.") from error


def finite(tensor: Tensor, what: str) -> Tensor:
    """The tensor. Raises CutawayError where it holds NaN or infinity."""
    if not bool(torch.isfinite(tensor).all()):
        raise CutawayError(f"The edit's {what} holds NaN or infinity.")
    return tensor


_Numbers = int | Sequence[int] | None


def number(value: float, what: str) -> float:
    """A number as fp64. Raises CutawayError for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CutawayError(f"The edit's {what} is a number; got {value!r}.") from error


def made(
    kind: Kind,
    site: str | Latents,
    positions: Positions,
    heads: _Numbers,
    neurons: _Numbers,
    rows: _Numbers,
    phase: Phase,
    **parts: Any,
) -> Edit:
    """An edit of a kind, with its address as it was given; what a constructor returns."""
    dictionary = None
    if not isinstance(site, str):
        if not is_dictionary(site):
            raise CutawayError(
                f"An edit's site is a name such as 'blocks.3.resid_post', or a dictionary; got {site!r}."
            )
        if heads is not None:
            raise CutawayError("A dictionary reads all heads together, so an edit of its latents names none.")
        site, dictionary = edited_site(site), site
    return Edit(
        kind,
        site,
        places(positions),
        indices(heads, "heads"),
        indices(rows, "rows"),
        tuple(phase) if isinstance(phase, list) else phase,  # type: ignore[arg-type]
        neurons=indices(neurons, "neurons"),
        dictionary=dictionary,
        **parts,
    )


def unit(direction: Tensor) -> Tensor:
    """A direction [d] of length 1, in fp32 or wider. Raises CutawayError for the zero vector."""
    direction = finite(tensor_of(direction, "direction"), "direction")
    direction = direction.to(torch.promote_types(direction.dtype, torch.float32))
    if direction.ndim != 1:
        raise CutawayError(f"A direction is one vector; got a tensor of shape {tuple(direction.shape)}.")
    largest = float(direction.abs().max()) if direction.numel() else 0.0
    if largest == 0.0:
        raise CutawayError("The direction is the zero vector, so there is nothing to project on.")
    direction = direction / largest  # or the squares of very large or small entries are infinite or 0
    return direction / direction.norm()


def taken_from(source: Any, what: str) -> dict[str, Any]:
    """A patch's source as parts of an edit: a tensor of values, or a run."""
    if isinstance(source, Tensor):
        return {"tensors": {"value": tensor_of(source, "source")}}
    if not hasattr(source, "tokens"):
        raise CutawayError(f"A {what} takes its values from a run or a tensor; got {source!r}.")
    return {"source": source}
