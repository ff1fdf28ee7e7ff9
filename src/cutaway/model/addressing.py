"""From an edit's address (positions, rows, phase) to the cells of a batch that it touches, resolved once before a
run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.model.edits import Edit, NothingEdited, Positions, changed
from cutaway.model.sites import Site
from cutaway.model.tokens import Tokens


@dataclass
class Resolved:
    """One edit at one site of one run: which cells it touches, and with what values.

    `ordinal` [b, total columns] numbers the touched columns of each row (-1: untouched), so that a value with one
    entry a position finds its entry. `source` holds the patched values [number of cells, ...] in row-major order of
    the cells.
    """

    index: int
    edit: Edit
    site: Site
    ordinal: Tensor
    value: Tensor | None
    source: Tensor | None
    everything: bool
    touched: Tensor
    sums: Tensor  # |delta|, |before|, |after|, count

    def apply(self, x: Tensor, offset: int) -> Tensor:
        """x: the site's value with positions in dimension 1, columns `offset` onwards -> the edited value (a new
        tensor).
        """
        window = self.ordinal[:, offset : offset + x.shape[1]]
        selected = window >= 0
        if not bool(selected.any()):
            return x
        rows, columns = selected.nonzero(as_tuple=True)
        heads = self.edit.heads
        plain = self.everything and heads is None and self.value is None and self.source is None
        block = x if plain else x[rows, columns]
        part = block if heads is None else block[..., list(heads), :]
        values = self._values(part, rows, columns + offset, window[rows, columns])
        if self.site.name.endswith(".scores"):
            hidden = part == -torch.inf  # masked cells stay masked, whatever the edit does to the others
            new = changed(self.edit, part.masked_fill(hidden, 0.0), values).masked_fill(hidden, -torch.inf)
        else:
            new = changed(self.edit, part, values)
        self.touched[:, offset : offset + x.shape[1]] |= selected
        with torch.no_grad():
            finite = torch.isfinite(part) & torch.isfinite(new)  # scores hold -inf at masked cells
            before, after = part.double().where(finite, 0.0), new.double().where(finite, 0.0)
            parts = [(after - before).abs().sum(), before.abs().sum(), after.abs().sum(), finite.sum().double()]
            self.sums += torch.stack(parts).to(self.sums.device)
        if heads is not None:
            whole = block.clone()
            whole[..., list(heads), :] = new
            new = whole
        return new if plain else x.index_put((rows, columns), new)

    def _values(self, part: Tensor, rows: Tensor, columns: Tensor, ordinals: Tensor) -> Tensor | None:
        if self.source is not None:
            cells = torch.full(self.ordinal.shape, -1, dtype=torch.long, device=self.ordinal.device)
            r, c = (self.ordinal >= 0).nonzero(as_tuple=True)
            cells[r, c] = torch.arange(len(r), device=cells.device)
            taken = self.source[cells[rows, columns]].to(part.device)
            taken = taken if self.edit.heads is None else taken[..., list(self.edit.heads), :]
            if taken.shape != part.shape:
                raise CutawayError(
                    f"The source of '{self.edit}' has the shape {tuple(taken.shape[1:])} for one token, where "
                    f"'{self.site.name}' has {tuple(part.shape[1:])}."
                )
            return taken
        if self.value is None:
            return None
        value, tail = self.value.to(part.device), part.ndim - 1
        per_position = int(self.ordinal.max()) + 1
        lead = value.shape[: max(value.ndim - tail, 0)]
        if all(given in (1, size) for given, size in zip(value.shape[::-1], part.shape[:0:-1], strict=False)):
            if not lead:
                return value
            if len(lead) == 1 and lead[0] == per_position:
                return value[ordinals]
            if len(lead) == 2 and lead[0] == self.ordinal.shape[0]:
                if self.edit.positions is None and lead[1] == self.ordinal.shape[1]:
                    return value[rows, columns]  # the form in which captures come, whatever the padding
                if lead[1] == per_position:
                    return value[rows, ordinals]
        raise CutawayError(
            f"The value of '{self.edit}' has shape {tuple(value.shape)}, which fits neither one token's value "
            f"{tuple(part.shape[1:])}, nor one entry for each of {per_position} positions, nor [row, position]."
        )


def _position_lists(positions: Positions, rows: Sequence[int], what: str) -> list[list[int]]:
    """One list of positions for each of `rows`."""
    if isinstance(positions, int):
        return [[positions] for _ in rows]
    assert positions is not None
    if all(isinstance(p, int) for p in positions):
        return [[int(p) for p in positions] for _ in rows]  # type: ignore[arg-type]
    if any(isinstance(p, int) for p in positions):
        raise CutawayError(f"{what}: give either numbers (the same in each row) or one list a row, not both.")
    if len(positions) != len(rows):
        raise CutawayError(f"{what}: {len(positions)} lists for {len(rows)} rows; give one list a row.")
    return [[int(q) for q in p] for p in positions]  # type: ignore[union-attr]


def _cells(edit: Edit, tokens: Tokens, rows: Sequence[int], n_new: int) -> Tensor:
    """Ordinals of touched columns, int64 [b, p + n_new], -1 where untouched."""
    n_rows, width = tokens.ids.shape
    ordinal = torch.full((n_rows, width + n_new), -1, dtype=torch.long)
    start, stop = (0, n_new) if not isinstance(edit.phase, tuple) else edit.phase
    for i, row in enumerate(rows):
        first, length = int(tokens.first[row]), int(tokens.lengths[row])
        if edit.positions is not None:
            chosen = _position_lists(edit.positions, rows, str(edit))[i]
            if edit.phase not in ("all", "prompt"):
                raise CutawayError(f"'{edit}': positions address the prompt; leave them out to edit new tokens.")
            columns = [tokens.column(row, position) for position in chosen]
            if len({*columns}) != len(columns):
                raise CutawayError(f"'{edit}' names a position of row {row} twice.")
        else:
            prompt = list(range(first, first + length)) if edit.phase in ("all", "prompt") else []
            new = list(range(width + start, width + min(stop, n_new)))
            columns = prompt + (new if edit.phase != "prompt" and edit.kind != "patch" else [])
        ordinal[row, columns] = torch.arange(len(columns))
    if not bool((ordinal >= 0).any()):
        raise NothingEdited(f"'{edit}' touches no token of this run; check its positions, rows and phase.")
    return ordinal


def _patch_source(edit: Edit, site: Site, tokens: Tokens, rows: Sequence[int], ordinal: Tensor) -> Tensor:
    """The source's values at the touched cells, [number of cells, ...], in row-major order of the cells."""
    values = edit.tensors["value"] if edit.source is None else edit.source[site.name]
    source_tokens = None if edit.source is None else edit.source.tokens
    if values.ndim != len(site.shape):
        raise CutawayError(
            f"The source of '{edit}' has shape {tuple(values.shape)}, but '{site.name}' has the dimensions {site.dims}."
        )
    if site.dims == "b H q k":
        values = values.transpose(1, 2)
    if source_tokens is not None and values.shape[1] != source_tokens.ids.shape[1]:
        raise CutawayError(f"'{edit}': the source run holds '{site.name}' at its last position only.")
    if edit.source_rows is not None:
        if len(edit.source_rows) != len(rows):
            raise CutawayError(f"'{edit}': {len(edit.source_rows)} source rows for {len(rows)} rows.")
        from_row = dict(zip(rows, edit.source_rows, strict=True))
    elif len(values) == 1:
        from_row = dict.fromkeys(rows, 0)
    else:
        from_row = {row: row for row in rows}
    lists = None if edit.source_positions is None else _position_lists(edit.source_positions, rows, f"{edit} (source)")
    taken = []
    for i, row in sorted(enumerate(rows), key=lambda pair: pair[1]):
        origin = from_row[row]
        if not 0 <= origin < len(values):
            raise CutawayError(f"'{edit}': the source has {len(values)} rows, and row {row} asks for its row {origin}.")
        columns = (ordinal[row] >= 0).nonzero()[:, 0].tolist()
        first, length = int(tokens.first[row]), int(tokens.lengths[row])
        if lists is not None:
            if len(lists[i]) != len(columns):
                raise CutawayError(
                    f"'{edit}': {len(columns)} positions but {len(lists[i])} source positions in row {row}."
                )
            positions = [lists[i][int(ordinal[row, column])] for column in columns]
        else:
            positions = [column - first for column in columns]
            if source_tokens is not None and edit.positions is None and int(source_tokens.lengths[origin]) != length:
                raise CutawayError(
                    f"'{edit}': row {row} has {length} tokens and the source's row {origin} has "
                    f"{int(source_tokens.lengths[origin])}; name positions and source_positions."
                )
        for position in positions:
            column = position if source_tokens is None else source_tokens.column(origin, position)
            if not -values.shape[1] <= column < values.shape[1]:
                raise CutawayError(f"'{edit}': the source has no position {position}.")
            taken.append(values[origin, column])
    return torch.stack(taken).detach()


def resolve(index: int, edit: Edit, site: Site, tokens: Tokens, n_new: int = 0, repeat: int = 1) -> Resolved:
    """Resolve an edit at one site for a run over `tokens` (and `n_new` new tokens), each row repeated `repeat` times.

    Raises CutawayError where the address or the value does not fit the run.
    """
    n_rows = len(tokens)
    rows = list(range(n_rows)) if edit.rows is None else list(edit.rows)
    if len({*rows}) != len(rows) or (edit.heads is not None and len({*edit.heads}) != len(edit.heads)):
        raise CutawayError(f"'{edit}' names a row or a head twice.")
    for row in rows:
        if not 0 <= row < n_rows:
            raise CutawayError(f"'{edit}' asks for row {row}, but the run has {n_rows} rows (0 to {n_rows - 1}).")
    if edit.heads is not None:
        if not site.kind.has_heads:
            raise CutawayError(f"'{edit}' names heads, but '{site.name}' ({site.dims}) has none.")
        n = int(site.shape[1 if site.dims == "b H q k" else 2])
        for head in edit.heads:
            if not 0 <= head < n:
                kind = "key-value heads" if " KV" in site.dims else "heads"
                raise CutawayError(f"'{edit}' asks for head {head}, but '{site.name}' has {n} {kind} (0 to {n - 1}).")
    width = site.shape[-1]
    for name in ("direction", "encoder", "decoder", "offset"):
        vector = edit.tensors.get(name)
        fits = (width, 1) if edit.kind == "add" else (width,)
        if vector is not None and vector.ndim == 1 and isinstance(width, int) and vector.shape[0] not in fits:
            raise CutawayError(
                f"'{edit}': the {name} has {vector.shape[0]} entries, but '{site.name}' is {width} wide."
            )
    ordinal = _cells(edit, tokens, rows, n_new)
    source = _patch_source(edit, site, tokens, rows, ordinal) if edit.kind == "patch" else None
    value = edit.tensors.get("value", edit.tensors.get("direction") if edit.kind == "add" else None)
    device = tokens.ids.device
    ordinal = ordinal.to(device)
    if repeat > 1:
        ordinal = ordinal.repeat_interleave(repeat, 0)
        if source is not None:
            blocks = source.split((ordinal[::repeat] >= 0).sum(1).tolist())
            source = torch.cat([block for block in blocks for _ in range(repeat)])
    return Resolved(
        index=index,
        edit=edit,
        site=site,
        ordinal=ordinal,
        value=None if edit.kind == "patch" else value,
        source=source,
        everything=bool((ordinal >= 0).all()),
        touched=torch.zeros(ordinal.shape, dtype=torch.bool, device=device),
        sums=torch.zeros(4, dtype=torch.float64, device=device),
    )
