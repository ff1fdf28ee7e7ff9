"""Which tokens of a row an edit names, as data: numbers, slices, a mask, or the place of a text.

Every form is a small hashable value that can be saved. It is resolved against the tokens of a run, row by row, into
positions that count the row's real tokens from 0.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.model.tokens import Tokens


class NothingEdited(CutawayError):
    """An edit that touched no value: the run that contains it would silently be an unedited one."""


@dataclass(frozen=True)
class AtToken:
    """Wherever a row's tokens read `text`, or hold the run of `ids`. Make it with `at_token`."""

    text: str | None
    ids: tuple[int, ...] | None
    occurrence: int | Literal["all"]
    missing: Literal["error", "skip"]

    def __str__(self) -> str:
        what = repr(self.text) if self.text is not None else f"ids {list(self.ids or ())}"
        return f"at {what}" + ("" if self.occurrence == -1 else f" (occurrence {self.occurrence})")


@dataclass(frozen=True)
class Columns:
    """The True cells of a mask over a batch of this shape: columns, row by row."""

    shape: tuple[int, int]
    chosen: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        return f"mask of {sum(map(len, self.chosen))} cells in {list(self.shape)}"


Positions = int | Sequence[int] | Sequence[Sequence[int]] | slice | Tensor | AtToken | None
"""What a caller may give. None: every real token; an int or a list: in each row; a list of lists: row by row; a slice:
of each row's tokens; a boolean tensor [b, p] in the layout of `lm.tokens(...)`; `at_token(...)`."""

PositionMap = Positions | Mapping[int, int] | Sequence[Mapping[int, int]]
"""Positions, or {to: from}, one for all rows or a list of one per touched row."""

Places = int | tuple[int, ...] | tuple[tuple[int, ...], ...] | slice | Columns | AtToken | None
"""The same as it is kept."""


def at_token(
    token: str | int | Sequence[int],
    occurrence: int | Literal["all"] = -1,
    *,
    missing: Literal["error", "skip"] = "error",
) -> AtToken:
    """Positions by what stands there, looked up in each row when the run is made (of a generation, in the prompt).

    Args:
        token: a text, whose last token is meant (as `Tokens.find` does it), or one or more ids, of which the last is.
        occurrence: which appearance, counted from 0, or back from -1, or "all".
        missing: a row without it is an error that names the row, or with "skip" is left untouched.

    Returns:
        What an edit takes as `positions=`.

    Raises:
        CutawayError: nothing to look for.

    Example:
        cutaway.zero("blocks.3.mlp.out", positions=cutaway.at_token(" Dallas"))
    """
    if isinstance(token, str):
        text, ids = token, None
    else:
        text = None
        ids = (whole(token, "token ids"),) if _is_number(token) else tuple(whole(i, "token ids") for i in listed(token))
    if not text and not ids:
        raise CutawayError("at_token needs a text or token ids to look for; got nothing.")
    if missing not in ("error", "skip"):
        raise CutawayError(f"missing={missing!r} is not 'error' or 'skip'.")
    if occurrence != "all":
        occurrence = whole(occurrence, "occurrence")
    return AtToken(text, ids, occurrence, missing)


def _is_number(value: Any) -> bool:
    return hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0


def whole(value: Any, what: str) -> int:
    """A whole number: Python's, NumPy's, or a tensor of one."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError as error:
        raise CutawayError(f"The edit's {what} are whole numbers; {value!r} is not one.") from error


def listed(value: Any, what: str = "positions") -> list[Any]:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise CutawayError(f"The edit's {what} are whole numbers, or a list of them; got {value!r}.")
    return list(value)


def indices(value: int | Sequence[int] | None, what: str) -> tuple[int, ...] | None:
    """Heads, rows or neurons: one number or several, as a tuple; None means all."""
    if value is None:
        return None
    if _is_number(value):
        return (whole(value, what),)
    chosen = tuple(whole(v, what) for v in listed(value, what))
    if not chosen:
        raise NothingEdited(
            f"The edit's list of {what} is empty, so it would touch nothing; leave {what} out to mean all."
        )
    if len({*chosen}) != len(chosen):
        raise CutawayError(f"The edit's list of {what} names one twice: {list(chosen)}.")
    return chosen


def places(value: Any) -> Places:
    """Positions as they are kept. Raises CutawayError for what names none."""
    if value is None or isinstance(value, AtToken | Columns):
        return value
    if isinstance(value, slice):
        for part in (value.start, value.stop, value.step):
            if part is not None:
                whole(part, "positions")
        if value.step == 0:
            raise CutawayError("A slice of positions has the step 0.")
        return value
    if str(getattr(value, "dtype", "")).removeprefix("torch.") == "bool":
        return _columns(value)
    if _is_number(value):
        return whole(value, "positions")
    given = listed(value)
    if not given:
        raise NothingEdited("The edit's list of positions is empty, so it would touch nothing.")
    nested = [isinstance(p, str) or (isinstance(p, Iterable) and getattr(p, "ndim", 1) > 0) for p in given]
    if any(nested) and not all(nested):
        raise CutawayError("Positions are either numbers (the same in each row) or one list a row, not both.")
    if all(nested):
        return tuple(tuple(whole(q, "positions") for q in listed(p)) for p in given)
    return tuple(whole(p, "positions") for p in given)


def _columns(mask: Any) -> Columns:
    rows = mask.tolist()
    if mask.ndim != 2:
        raise CutawayError(
            f"A mask of positions has the shape [batch, position] of the run's tokens; got {list(mask.shape)}."
        )
    chosen = tuple(tuple(i for i, named in enumerate(row) if named) for row in rows)
    if not any(chosen):
        raise NothingEdited("The mask of positions is False everywhere, so the edit would touch nothing.")
    return Columns((len(rows), mask.shape[1]), chosen)


def position_map_places(positions: PositionMap) -> tuple[Any, Places]:
    """A position map -> positions and the source positions beside them; of plain positions, these and None."""
    listing = isinstance(positions, Sequence) and not isinstance(positions, str)
    entries: list[Any] = list(positions) if listing else [positions]  # type: ignore[arg-type]
    if not entries or not all(isinstance(entry, Mapping) for entry in entries):
        return positions, None
    if not listing and not entries[0]:
        raise NothingEdited("The position map is empty, so it would touch nothing.")
    rows = [[(whole(to, "position map"), whole(of, "position map")) for to, of in e.items()] for e in entries]
    to, of = (tuple(tuple(pair[i] for pair in row) for row in rows) for i in (0, 1))
    return (to, of) if listing else (to[0], of[0])


def several(value: int | Sequence[int], what: str) -> tuple[int, ...]:
    """A number or several, which may be equal."""
    if hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0:
        return (whole(value, what),)
    try:
        chosen = tuple(whole(v, what) for v in value)  # type: ignore[union-attr]
    except TypeError as error:
        raise CutawayError(f"The edit's {what} is a whole number, or one a row; got {value!r}.") from error
    if not chosen:
        raise CutawayError(f"The edit's list of {what} is empty; leave {what} out, or give one a row.")
    return chosen


def spelled(where: Places) -> str:
    """Positions as an edit prints them."""
    if isinstance(where, slice):
        parts = ["" if p is None else str(p) for p in (where.start, where.stop, where.step)]
        return "[" + ":".join(parts if where.step is not None else parts[:2]) + "]"
    if isinstance(where, tuple):
        return str([list(p) if isinstance(p, tuple) else p for p in where])
    return str(where)


def _count_from(position: int, length: int, what: str) -> int:
    """A position that may count from the end, as an index below `length`."""
    index = position + length if position < 0 else position
    if not 0 <= index < length:
        raise CutawayError(f"Position {position} is outside {what}, which has {length} tokens.")
    return index


def named(
    where: Places,
    tokens: Tokens,
    rows: Sequence[int],
    what: str,
    layout: Tokens | None = None,
    *,
    repeats: bool = False,
) -> list[list[int]]:
    """The positions of each of `rows`, counted from its first real token, in the order in which they are named.

    `layout` are the tokens as the caller padded them, in which a mask is read (those of the run itself by default).
    A position named twice is an error but for `repeats`, where they are what is read.
    """
    per_row = isinstance(where, tuple) and bool(where) and isinstance(where[0], tuple)
    if per_row and len(where) != len(rows):  # type: ignore[arg-type]
        raise CutawayError(f"{what}: {len(where)} lists for {len(rows)} rows; give one list a row.")  # type: ignore[arg-type]
    found = []
    for i, row in enumerate(rows):
        length = int(tokens.lengths[row])
        if where is None:
            chosen = list(range(length))
        elif isinstance(where, slice):
            chosen = list(range(length))[where]
        elif isinstance(where, AtToken):
            chosen = _matches(where, tokens, row, what)
        elif isinstance(where, Columns):
            chosen = _masked(where, layout or tokens, row, what)
        else:
            numbers: Any = (where,) if isinstance(where, int) else where[i] if per_row else where
            chosen = [_count_from(int(p), length, f"row {row}") for p in numbers]
        if len({*chosen}) != len(chosen) and not repeats:
            raise CutawayError(f"{what} names a position of row {row} twice.")
        found.append(chosen)
    return found


def named_new(where: Places, phase: tuple[int, int], n_rows: int, what: str) -> list[list[int]]:
    """Numbers of new tokens (0 is the first) that each of `n_rows` rows names within the steps [start, stop)."""
    start, stop = phase
    if where is None:
        return [list(range(start, stop))] * n_rows
    if isinstance(where, slice):
        if any(part is not None and part < 0 for part in (where.start, where.stop)):
            raise CutawayError(f"{what}: new tokens are counted from the first one, so a slice of them has no -1.")
        return [[i for i in list(range(stop))[where] if i >= start]] * n_rows
    if isinstance(where, AtToken | Columns):
        raise CutawayError(f"{what}: a mask or a token match addresses the prompt; new tokens have numbers or a slice.")
    per_row = isinstance(where, tuple) and bool(where) and isinstance(where[0], tuple)
    if per_row and len(where) != n_rows:  # type: ignore[arg-type]
        raise CutawayError(f"{what}: {len(where)} lists for {n_rows} rows; give one list a row.")  # type: ignore[arg-type]
    found = []
    for i in range(n_rows):
        numbers: Any = (where,) if isinstance(where, int) else where[i] if per_row else where  # type: ignore[index]
        if any(not start <= p < stop for p in numbers):
            raise CutawayError(
                f"{what}: new tokens are counted from the first one, and the steps of this phase are {start} to "
                f"{stop - 1}."
            )
        if len({*numbers}) != len(numbers):
            raise CutawayError(f"{what} names a new token of row {i} twice.")
        found.append(list(numbers))
    return found


def _matches(where: AtToken, tokens: Tokens, row: int, what: str) -> list[int]:
    if where.text is not None:
        ends = tokens.find_all(row, where.text)
    else:
        ids, wanted = tokens.row_ids(row), list(where.ids or ())
        n = len(wanted)
        ends = [i + n - 1 for i in range(len(ids) - n + 1) if ids[i : i + n] == wanted]
    if where.occurrence == "all" and ends:
        return ends
    if where.occurrence != "all" and -len(ends) <= where.occurrence < len(ends):
        return [ends[where.occurrence]]
    if where.missing == "skip":
        return []
    times = f" {len(ends)} times" if ends else ""
    raise CutawayError(
        f"{what}: row {row} {'has it only' if ends else 'does not have it'}{times}: {tokens.text(row)!r} "
        "(missing='skip' leaves such rows untouched)."
    )


def _masked(where: Columns, layout: Tokens, row: int, what: str) -> list[int]:
    if where.shape != tuple(layout.ids.shape):
        raise CutawayError(
            f"{what}: the mask has the shape {list(where.shape)}, but the tokens are {list(layout.ids.shape)}."
        )
    first, length = int(layout.first[row]), int(layout.lengths[row])
    chosen = [column - first for column in where.chosen[row]]
    if any(not 0 <= position < length for position in chosen):
        raise CutawayError(f"{what}: the mask names padding in row {row}; take it & tokens.mask.")
    return chosen
