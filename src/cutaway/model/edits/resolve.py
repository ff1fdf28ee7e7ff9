"""From an edit's address (positions, rows, phase) to the cells of a batch that it touches, resolved once before a
run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.model.attached import Attached
from cutaway.model.edits.apply import changed
from cutaway.model.edits.edit import PATCHES, Edit, edit_list
from cutaway.model.edits.positions import NothingEdited, Places, named, named_new
from cutaway.model.edits.source import StoredSource
from cutaway.model.edits.values import generator, next_key, prefix_keys, row_key, token_noise
from cutaway.model.latents import flat
from cutaway.model.sites import Site
from cutaway.model.tokens import Tokens


def is_grid(name: str) -> bool:
    """Whether a site is a table of destinations and sources, whose heads come before its positions."""
    return name.endswith((".scores", ".pattern"))


@dataclass
class Resolved:
    """One edit at one site of one run: which cells it touches, and with what values.

    `ordinal` [b, total columns] numbers the touched columns of each row (-1: untouched), so that a value with one
    entry a position finds its entry. `source` holds the patched values [number of cells, ...] in row-major order of
    the cells, at scores and pattern with one entry per column of the run as keys. `keys[row]` has a random key for
    each token of a row that is given noise, `first` the column of each row's first real token.
    """

    index: int
    edit: Edit
    site: Site
    ordinal: Tensor
    value: Tensor | None
    source: Tensor | None
    everything: bool
    touched: Tensor
    sums: Tensor  # |delta|, |before|, |after|, count, values that were finite and no longer are
    keys: list[list[bytes]] = field(default_factory=list)
    first: list[int] = field(default_factory=list)

    def apply(self, x: Tensor, offset: int) -> Tensor:
        """x: the site's value with positions in dimension 1, columns `offset` onwards -> the edited value (a new
        tensor).
        """
        window = self.ordinal[:, offset : offset + x.shape[1]]
        selected = window >= 0
        if not bool(selected.any()):
            return x
        rows, columns = selected.nonzero(as_tuple=True)
        edit = self.edit
        whole = edit.heads is None and edit.neurons is None
        plain = self.everything and whole and self.value is None and self.source is None and edit.kind != "noise"
        block = x if plain else x[rows, columns]
        dictionary, heads = edit.dictionary, self.site.kind.has_heads
        held = block if dictionary is None else dictionary.encode(flat(block, heads))
        part = held if whole else self._addressed(held)
        values = self._values(part, held, rows, columns + offset, window[rows, columns], offset + x.shape[1])
        if self.site.name.endswith(".scores"):
            hidden = part == -torch.inf  # masked cells stay masked, whatever the edit does to the others
            new = changed(edit, part.masked_fill(hidden, 0.0), values).masked_fill(hidden, -torch.inf)
        else:
            new = changed(edit, part, values)
        self.touched[:, offset : offset + x.shape[1]] |= selected
        with torch.no_grad():
            finite = torch.isfinite(part) & torch.isfinite(new)  # scores hold -inf at masked cells
            before, after = part.double().where(finite, 0.0), new.double().where(finite, 0.0)
            count = finite.sum().double()
            lost = torch.isfinite(part).sum().double() - count
            parts = [(after - before).abs().sum(), before.abs().sum(), after.abs().sum(), count, lost]
            self.sums += torch.stack(parts).to(self.sums.device)
        if not whole:
            replaced = held.clone()
            if edit.neurons is None:
                replaced[..., list(edit.heads or ()), :] = new
            elif edit.heads is None:
                replaced[..., list(edit.neurons)] = new
            else:
                replaced[..., torch.tensor(edit.heads)[:, None], torch.tensor(edit.neurons)] = new
            new = replaced
        if dictionary is not None:  # what the dictionary does not explain stays as it is
            read = flat(block, heads)
            moved = dictionary.decode(new, read) - dictionary.decode(held, read)
            new = (block + moved.to(block).view(block.shape)).to(block.dtype)
        return new if plain else x.index_put((rows, columns), new)

    def read(self, ids: Tensor) -> None:
        """Take note of new tokens [b, columns] of a generation, on which their noise depends."""
        if self.edit.kind != "noise":
            return
        for keys, row in zip(self.keys, ids.tolist(), strict=True):
            for token in row if keys else ():
                keys.append(next_key(keys[-1], token))

    def _addressed(self, value: Tensor) -> Tensor:
        """The heads and neurons of [..., (heads,) width] that the edit names."""
        value = value if self.edit.heads is None else value[..., list(self.edit.heads), :]
        return value if self.edit.neurons is None else value[..., list(self.edit.neurons)]

    def _values(
        self, part: Tensor, block: Tensor, rows: Tensor, columns: Tensor, ordinals: Tensor, end: int
    ) -> Tensor | None:
        if self.edit.kind == "noise":
            return self._addressed(self._noise(block, rows.tolist(), columns.tolist(), end))
        if self.source is not None:
            return self._from_source(part, rows, columns, end)
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

    def _from_source(self, part: Tensor, rows: Tensor, columns: Tensor, end: int) -> Tensor:
        assert self.source is not None
        cells = torch.full(self.ordinal.shape, -1, dtype=torch.long, device=self.ordinal.device)
        r, c = (self.ordinal >= 0).nonzero(as_tuple=True)
        cells[r, c] = torch.arange(len(r), device=cells.device)
        taken = self.source[cells[rows, columns].to(self.source.device)].to(part.device)
        if is_grid(self.site.name):  # the keys that this forward sees end with its newest column
            taken = taken[..., end - part.shape[-1] : end]
        taken = self._addressed(taken)
        if taken.shape != part.shape:
            raise CutawayError(
                f"The source of '{self.edit}' has the shape {tuple(taken.shape[1:])} for one token, where "
                f"'{self.site.name}' has {tuple(part.shape[1:])}."
            )
        return taken

    def _noise(self, block: Tensor, rows: list[int], columns: list[int], end: int) -> Tensor:
        """Standard normal numbers in the shape of `block`, from each token's key."""
        drawn = torch.zeros(block.shape, dtype=torch.float32)
        for i, (row, column) in enumerate(zip(rows, columns, strict=True)):
            position = column - self.first[row]
            if not is_grid(self.site.name):
                drawn[i] = token_noise(self.keys[row][position], self.site.name, block.shape[1:])
                continue
            seen = token_noise(self.keys[row][position], self.site.name, (position + 1, block.shape[1]))
            start = self.first[row] - (end - block.shape[-1])  # the place of key 0 among those that are here
            low = max(start, 0)
            drawn[i, :, low : start + position + 1] = seen[low - start :].T
        return drawn.to(block.device)


def _cells(
    edit: Edit, tokens: Tokens, rows: Sequence[int], n_new: int, layout: Tokens | None
) -> tuple[Tensor, list[int]]:
    """Ordinals of touched columns, int64 [b, p + n_new], -1 where untouched; and the rows that have any."""
    n_rows, width = tokens.ids.shape
    ordinal = torch.full((n_rows, width + n_new), -1, dtype=torch.long)
    new_phase = edit.phase not in ("all", "prompt")
    steps = edit.phase if isinstance(edit.phase, tuple) else (0, n_new)
    steps = (steps[0], min(steps[1], n_new))
    prompt: list[list[int]] = [[] for _ in rows]
    new: list[list[int]] = [[] for _ in rows]
    if not new_phase:
        prompt = named(edit.positions, tokens, rows, f"'{edit}'", layout)
    if edit.kind not in PATCHES and (new_phase or (edit.phase == "all" and edit.positions is None)) and n_new:
        new = named_new(edit.positions, steps, len(rows), f"'{edit}'")
    for i, row in enumerate(rows):
        first = int(tokens.first[row])
        columns = [first + p for p in prompt[i]] + [width + p for p in new[i]]
        ordinal[row, columns] = torch.arange(len(columns))
    if not bool((ordinal >= 0).any()):
        raise NothingEdited(f"'{edit}' touches no token of this run; check its positions, rows and phase.")
    return ordinal, [row for row in rows if bool((ordinal[row] >= 0).any())]


def _source_values(edit: Edit, site: Site) -> tuple[Tensor, Tokens | None, dict[int, int], dict[int, int]]:
    """A source's values at a site with destinations in dimension 1, its tokens, and where its rows and columns are."""
    source = edit.source
    if isinstance(source, StoredSource):
        if site.name not in source.values:
            raise CutawayError(f"The stored source of '{edit}' holds no values of '{site.name}'.")
        values = source.values[site.name]
        rows = {row: i for i, row in enumerate(source.rows)}
        return values, source.tokens, rows, {column: i for i, column in enumerate(source.columns)}
    values = edit.tensors["value"] if source is None else source[edit.dictionary or site.name]  # type: ignore[index]
    dims = site.dims if edit.dictionary is None else "b p latents"
    if values.ndim != len(dims.split()):
        raise CutawayError(
            f"The source of '{edit}' has shape {tuple(values.shape)}, but '{site.name}' has the dimensions {dims}."
        )
    if is_grid(site.name):
        values = values.transpose(1, 2)
    tokens = None if source is None else source.tokens
    if tokens is not None and values.shape[1] != tokens.ids.shape[1]:
        raise CutawayError(f"'{edit}': the source run holds '{site.name}' at its last position only.")
    return values, tokens, {i: i for i in range(len(values))}, {i: i for i in range(values.shape[1])}


def _patch_source(
    edit: Edit, site: Site, tokens: Tokens, rows: Sequence[int], touched: Sequence[int], ordinal: Tensor
) -> Tensor:
    """The source's values at the touched cells, [number of cells, ...], in row-major order of the cells.

    At scores and pattern the last dimension has one entry per column of the run, keys matched by number.
    """
    values, source_tokens, held_rows, held_columns = _source_values(edit, site)
    n_source = len(values) if source_tokens is None else len(source_tokens)
    from_row = _source_rows(edit, tokens, rows, touched, ordinal, source_tokens, n_source, values.shape[1])
    origins: dict[int, list[int]] | None = None
    read = edit.source_positions
    if read is None and source_tokens is not None and _from_the_end(edit.positions):
        read = edit.positions  # -1 of a row is -1 of its source, however long each is
    if read is not None:
        origins = _source_positions(edit, read, rows, touched, from_row, source_tokens, values.shape[1])
    taken = []
    for row in sorted(touched):
        origin = from_row[row]
        columns = (ordinal[row] >= 0).nonzero()[:, 0].tolist()
        first, length = int(tokens.first[row]), int(tokens.lengths[row])
        if origins is not None:
            if len(origins[row]) != len(columns):
                raise CutawayError(
                    f"'{edit}': {len(columns)} positions but {len(origins[row])} source positions in row {row}."
                )
            positions = [origins[row][int(ordinal[row, column])] for column in columns]
        else:
            positions = [column - first for column in columns]
            whole = edit.positions is None and edit.seed is None
            if source_tokens is not None and whole and int(source_tokens.lengths[origin]) != length:
                raise CutawayError(
                    f"'{edit}': row {row} has {length} tokens and the source's row {origin} has "
                    f"{int(source_tokens.lengths[origin])}; name positions and source_positions."
                )
        for position in positions:
            column = position if source_tokens is None else source_tokens.column(origin, position)
            if source_tokens is None and column < 0:
                column += values.shape[1]
            if column not in held_columns or origin not in held_rows:
                raise CutawayError(f"'{edit}': the source has no position {position}.")
            value = values[held_rows[origin], held_columns[column]]
            if is_grid(site.name):
                value = _keys_by_number(value, site, source_tokens, origin, first, ordinal.shape[1])
            taken.append(value)
    return torch.stack(taken).detach()


def _keys_by_number(
    value: Tensor, site: Site, source_tokens: Tokens | None, origin: int, first: int, width: int
) -> Tensor:
    """A row of scores or pattern [H, source columns] as it stands in the run's columns [H, width]."""
    start = 0 if source_tokens is None else int(source_tokens.first[origin])
    n = min(value.shape[-1] - start, width - first)
    there = value.new_full((*value.shape[:-1], width), -torch.inf if site.name.endswith(".scores") else 0.0)
    there[..., first : first + n] = value[..., start : start + n]
    return there


def _source_rows(
    edit: Edit,
    tokens: Tokens,
    rows: Sequence[int],
    touched: Sequence[int],
    ordinal: Tensor,
    source_tokens: Tokens | None,
    n_source: int,
    source_width: int,
) -> dict[int, int]:
    """Which row of the source each touched row takes."""
    if edit.source_rows is not None:
        if len(edit.source_rows) != len(rows):
            raise CutawayError(f"'{edit}': {len(edit.source_rows)} source rows for {len(rows)} rows.")
        from_row = dict(zip(rows, edit.source_rows, strict=True))
    elif edit.seed is not None:
        from_row = {}
        for row, seed in zip(rows, _seeds(edit, rows), strict=True):
            if row not in touched:
                continue
            furthest = int((ordinal[row] >= 0).nonzero().max()) - int(tokens.first[row]) + 1
            own = tokens.row_ids(row)
            fit = [
                i
                for i in range(n_source)
                if (source_width if source_tokens is None else int(source_tokens.lengths[i]))
                >= (1 if edit.source_positions is not None else furthest)
                and (i != row if source_tokens is None else source_tokens.row_ids(i) != own)
            ]
            if not fit:
                raise CutawayError(
                    f"'{edit}': the source has no other row that is long enough for row {row}, of {len(own)} tokens; "
                    "name positions that every row has, or give it more rows."
                )
            from_row[row] = fit[int(generator(row_key(seed, own), "resample").integers(len(fit)))]
    elif n_source == 1:
        from_row = dict.fromkeys(rows, 0)
    else:
        from_row = {row: row for row in rows}
    for row in touched:
        if not 0 <= from_row[row] < n_source:
            raise CutawayError(
                f"'{edit}': the source has {n_source} rows, and row {row} asks for its row {from_row[row]}."
            )
    return from_row


def _from_the_end(where: Places) -> bool:
    if isinstance(where, slice):
        return any(part is not None and part < 0 for part in (where.start, where.stop))
    return isinstance(where, int | tuple)


def _source_positions(
    edit: Edit,
    where: Places,
    rows: Sequence[int],
    touched: Sequence[int],
    from_row: dict[int, int],
    source_tokens: Tokens | None,
    source_width: int,
) -> dict[int, list[int]]:
    """The positions in its source row that each touched row takes, in the order of its own."""
    what = f"'{edit}' (source)"
    if source_tokens is None:  # a tensor: its rows are full
        mask = torch.ones(len(rows), source_width, dtype=torch.bool)
        there = Tokens(mask.long(), mask, ((),) * len(rows))
        found = named(_plain_places(where, what), there, range(len(rows)), what, repeats=True)
        return {row: found[i] for i, row in enumerate(rows) if row in touched}
    chosen = [from_row.get(row, 0) for row in rows]
    if isinstance(where, tuple) and where and isinstance(where[0], tuple):
        if len(where) != len(rows):
            raise CutawayError(f"{what}: {len(where)} lists for {len(rows)} rows; give one list a row.")
        by_row: Any = where
        return {
            row: named((by_row[i],), source_tokens, [chosen[i]], what, repeats=True)[0]
            for i, row in enumerate(rows)
            if row in touched
        }
    return {
        row: named(where, source_tokens, [chosen[i]], what, repeats=True)[0]
        for i, row in enumerate(rows)
        if row in touched
    }


def _plain_places(where: Places, what: str) -> Places:
    if isinstance(where, int | tuple | slice):
        return where
    raise CutawayError(f"{what}: a tensor has no tokens; name its positions by number.")


def _seeds(edit: Edit, rows: Sequence[int]) -> tuple[int, ...]:
    """The seed of each addressed row."""
    seeds = edit.seed or (0,)
    if len(seeds) not in (1, len(rows)):
        raise CutawayError(f"'{edit}': {len(seeds)} seeds for {len(rows)} rows; give one, or one a row.")
    return seeds * len(rows) if len(seeds) == 1 else seeds


def _check_parts(edit: Edit, site: Site) -> None:
    """Heads, neurons and vectors against the site."""
    if edit.heads is not None:
        if not site.kind.has_heads:
            raise CutawayError(f"'{edit}' names heads, but '{site.name}' ({site.dims}) has none.")
        n = int(site.shape[1 if is_grid(site.name) else 2])
        for head in edit.heads:
            if not 0 <= head < n:
                kind = "key-value heads" if " KV" in site.dims else "heads"
                raise CutawayError(f"'{edit}' asks for head {head}, but '{site.name}' has {n} {kind} (0 to {n - 1}).")
    width = site.shape[-1] if edit.dictionary is None else edit.dictionary.d_sae
    unit = "neuron" if edit.dictionary is None else "latent"
    if edit.neurons is not None:
        if not isinstance(width, int):
            raise CutawayError(f"'{edit}' names neurons, but the last dimension of '{site.name}' counts positions.")
        for neuron in edit.neurons:
            if not 0 <= neuron < width:
                raise CutawayError(
                    f"'{edit}' asks for {unit} {neuron}, but '{site.name}' has {width} (0 to {width - 1})."
                )
        width = len(edit.neurons)
    basis = edit.tensors.get("basis")
    if basis is not None and basis.shape[1] != width:
        raise CutawayError(f"'{edit}': the basis has {basis.shape[1]} entries, but '{site.name}' is {width} wide.")
    for name in ("direction", "encoder", "decoder", "offset"):
        vector = edit.tensors.get(name)
        fits = (width, 1) if edit.kind == "add" else (width,)
        if vector is not None and vector.ndim == 1 and isinstance(width, int) and vector.shape[0] not in fits:
            raise CutawayError(
                f"'{edit}': the {name} has {vector.shape[0]} entries, but '{site.name}' is {width} wide."
            )


def edits_for(lm: Attached, edits: Edit | Sequence[Edit] | None) -> tuple[Edit, ...]:
    """The edits of a run of `lm`. Raises CutawayError for a patch whose source is a run of another model."""
    found = edit_list(edits)
    for edit in found:
        source = edit.source
        if source is None or edit.other_model:
            continue
        same = getattr(source, "site_table", None) is lm.sites()
        if same and getattr(source, "weights", None) in (None, lm.weights_state()):
            continue
        theirs, ours = source.identity(), lm.identity()
        if theirs.weight_hash != ours.weight_hash:
            raise CutawayError(
                f"The source of '{edit}' is a run of another model ({theirs.id}, weights {theirs.weight_hash[:8]}) "
                f"than {ours.id} ({ours.weight_hash[:8]}); say other_model=True if that is meant."
            )
    return found


def resolve(
    index: int,
    edit: Edit,
    site: Site,
    tokens: Tokens,
    n_new: int = 0,
    repeat: int = 1,
    layout: Tokens | None = None,
) -> Resolved:
    """Resolve an edit at one site for a run over `tokens` (and `n_new` new tokens), each row repeated `repeat` times.

    `layout` are the tokens as the caller padded them, in which a mask is read (`tokens` by default). Raises
    CutawayError where the address or the value does not fit the run.
    """
    n_rows = len(tokens)
    rows = list(range(n_rows)) if edit.rows is None else list(edit.rows)
    for row in rows:
        if not 0 <= row < n_rows:
            raise CutawayError(f"'{edit}' asks for row {row}, but the run has {n_rows} rows (0 to {n_rows - 1}).")
    _check_parts(edit, site)
    ordinal, touched = _cells(edit, tokens, rows, n_new, layout)
    patching = edit.kind in PATCHES
    source = _patch_source(edit, site, tokens, rows, touched, ordinal) if patching else None
    value = edit.tensors.get("value", edit.tensors.get("direction") if edit.kind == "add" else None)
    keys: list[list[bytes]] = [[] for _ in range(n_rows)]
    if edit.kind == "noise":
        for row, seed in zip(rows, _seeds(edit, rows), strict=True):
            keys[row] = prefix_keys(seed, tokens.row_ids(row))
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
        value=None if patching else value,
        source=source,
        everything=bool((ordinal >= 0).all()),
        touched=torch.zeros(ordinal.shape, dtype=torch.bool, device=device),
        sums=torch.zeros(5, dtype=torch.float64, device=device),
        keys=[list(of_row) for of_row in keys for _ in range(repeat)],
        first=[int(first) for first in tokens.first for _ in range(repeat)],
    )
