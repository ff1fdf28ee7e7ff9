"""Which cells an edit's address names: against brute force, over many addresses and paddings."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.model.edits.edits import NothingEdited
from cutaway.model.edits.resolve import resolve
from cutaway.model.language_model import LanguageModel, attach
from cutaway.model.tokens import Tokens

SITE = "blocks.1.resid_post"
_lm: list[LanguageModel] = []


def small() -> LanguageModel:
    if not _lm:
        _lm.append(attach(tiny_model("llama")))
    return _lm[0]


@dataclass(frozen=True)
class Batch:
    """Rows of real tokens somewhere in a padded grid: right, left or in the middle."""

    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    width: int

    @property
    def tokens(self) -> Tokens:
        mask = torch.zeros(len(self.lengths), self.width, dtype=torch.bool)
        for row, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            mask[row, start : start + length] = True
        ids = torch.arange(mask.numel()).reshape(mask.shape) % 90 + 3
        return Tokens(ids, mask, tuple(tuple("x" * n) for n in self.lengths))


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    width = draw(st.integers(max(lengths), max(lengths) + 3))
    starts = [draw(st.integers(0, width - n)) for n in lengths]
    return Batch(tuple(lengths), tuple(starts), width)


@st.composite
def addresses(draw: st.DrawFn) -> tuple[Batch, list[int] | None, int | list[int] | list[list[int]] | None]:
    """A batch, rows in any order or None, and positions of a kind (from the start, from the end, row by row)."""
    batch = draw(batches())
    n = len(batch.lengths)
    rows = draw(st.none() | st.permutations(range(n)).flatmap(lambda p: st.integers(1, n).map(lambda k: list(p[:k]))))
    chosen = list(range(n)) if rows is None else rows
    shortest = min(batch.lengths[row] for row in chosen)
    kind = draw(st.sampled_from(["none", "one", "same", "each"]))
    if kind == "none":
        return batch, rows, None
    if kind == "one":
        return batch, rows, draw(st.integers(-shortest, shortest - 1))
    if kind == "same":  # counted from the start or from the end, so that no two are one in any row
        same = draw(st.lists(st.integers(0, shortest - 1), min_size=1, max_size=3, unique=True))
        return batch, rows, [p - shortest for p in same] if draw(st.booleans()) else same
    each = []
    for row in chosen:
        length = batch.lengths[row]
        some = draw(st.lists(st.integers(0, length - 1), max_size=3, unique=True))
        each.append([p if draw(st.booleans()) else p - length for p in some])
    return batch, rows, each


def brute_force(batch: Batch, rows: Sequence[int] | None, positions: object) -> dict[tuple[int, int], int]:
    """(row, column) -> the ordinal of the position that names it."""
    cells = {}
    for i, row in enumerate(range(len(batch.lengths)) if rows is None else rows):
        real = list(range(batch.starts[row], batch.starts[row] + batch.lengths[row]))
        if positions is None:
            wanted: Sequence[int] = range(len(real))
        elif isinstance(positions, int):
            wanted = [positions]
        else:
            assert isinstance(positions, list)
            wanted = positions[i] if isinstance(positions[0], list) else positions
        for ordinal, position in enumerate(wanted):
            cells[row, real[position]] = ordinal
    return cells


@settings(max_examples=150)
@given(addresses())
def test_cells_are_those_of_brute_force(given_address: tuple) -> None:
    batch, rows, positions = given_address
    expected = brute_force(batch, rows, positions)
    edit = cutaway.zero(SITE, rows=rows, positions=positions)
    if not expected:
        with pytest.raises(NothingEdited):
            resolve(0, edit, small().sites()[SITE], batch.tokens)
        return
    ordinal = resolve(0, edit, small().sites()[SITE], batch.tokens).ordinal
    for row in range(ordinal.shape[0]):
        for column in range(ordinal.shape[1]):
            assert ordinal[row, column] == expected.get((row, column), -1)


@settings(max_examples=40)
@given(addresses(), st.integers(0, 1000))
def test_values_go_to_their_cells(given_address: tuple, seed: int) -> None:
    """In a real run: one value a position of a row, and a patch from a tensor; untouched cells keep their bits."""
    batch, rows, positions = given_address
    cells = brute_force(batch, rows, positions)
    if not cells:
        return
    lm, tokens = small(), batch.tokens
    generator = torch.Generator().manual_seed(seed)
    clean = lm.run(tokens, capture=SITE, logits=None)[SITE]
    source = torch.randn(*clean.shape, generator=generator)  # as of a right-padded run
    patched = lm.run(tokens, edits=cutaway.patch(SITE, source, rows=rows, positions=positions), capture=SITE)
    n = max(cells.values()) + 1
    values = torch.randn(len(tokens), n, lm.d_model, generator=generator)
    put = lm.run(tokens, edits=cutaway.set(SITE, values, rows=rows, positions=positions), capture=SITE)
    for row in range(len(tokens)):
        for column in range(batch.width):
            if (row, column) not in cells:
                assert torch.equal(patched[SITE][row, column], clean[row, column])
                assert torch.equal(put[SITE][row, column], clean[row, column])
                continue
            assert torch.equal(patched[SITE][row, column], source[row, column - batch.starts[row]])
            captured = positions is None and n == batch.width  # a value in the form of a capture follows columns
            assert torch.equal(put[SITE][row, column], values[row, column if captured else cells[row, column]])
    (receipt,) = put.receipts
    touched = {
        (row, position + batch.starts[row])
        for row, of_row in zip(receipt.rows, receipt.positions, strict=True)
        for position in of_row
    }
    assert touched == {*cells}


@settings(max_examples=20)
@given(batches())
def test_a_captured_value_set_again_changes_nothing(batch: Batch) -> None:
    lm, tokens = small(), batch.tokens
    clean = lm.run(tokens, capture=SITE)
    again = lm.run(tokens, edits=cutaway.set(SITE, clean[SITE]))
    assert again.receipts[0].mean_abs_delta == 0
    assert torch.equal(again.logits[tokens.mask], clean.logits[tokens.mask])  # type: ignore[index]


@settings(max_examples=60)
@given(batches(), st.integers(0, 5), st.sampled_from(["all", "prompt", "new", (0, 2), (1, 9)]))
def test_phases_name_new_columns(batch: Batch, n_new: int, phase) -> None:
    tokens = batch.tokens
    expected = set()
    for row, (start, length) in enumerate(zip(batch.starts, batch.lengths, strict=True)):
        if phase in ("all", "prompt"):
            expected |= {(row, c) for c in range(start, start + length)}
        low, high = (0, n_new) if phase in ("all", "new") else (0, 0) if phase == "prompt" else phase
        expected |= {(row, batch.width + i) for i in range(low, min(high, n_new))}
    edit = cutaway.zero(SITE, phase=phase)
    if not expected:
        with pytest.raises(NothingEdited):
            resolve(0, edit, small().sites()[SITE], tokens, n_new)
        return
    found = (resolve(0, edit, small().sites()[SITE], tokens, n_new).ordinal >= 0).nonzero().tolist()
    assert {(r, c) for r, c in found} == expected


@settings(max_examples=60)
@given(batches(), st.integers(-7, 7), st.integers(0, 3))
def test_columns_of_positions(batch: Batch, position: int, row: int) -> None:
    tokens, row = batch.tokens, row % len(batch.lengths)
    length, start = batch.lengths[row], batch.starts[row]
    if -length <= position < length:
        assert tokens.column(row, position) == start + position % length
    else:
        with pytest.raises(CutawayError, match="outside row"):
            tokens.column(row, position)
    assert int(tokens.first[row]) == start
    assert int(tokens.last[row]) == start + length - 1
    assert tokens.position_ids[row, start : start + length].tolist() == list(range(length))
