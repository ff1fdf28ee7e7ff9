"""Sweeps against the slow obvious version: one plain run a cell, with every logit."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from subject import Subject, Subjects, close
from tiny import HEADS, LAYERS, D, V
from torch import Tensor

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.model.edits.edits import Edit, NothingEdited
from cutaway.model.forward.run import Run
from cutaway.model.language_model import LanguageModel
from cutaway.model.sweep import shortcuts
from cutaway.model.sweep import sweep as module
from cutaway.model.sweep.flops import cost
from cutaway.model.sweep.memory import available_bytes, out_of_memory
from cutaway.model.sweep.results import Sweep, SweepInterrupted
from cutaway.model.sweep.shortcuts import Entry
from cutaway.model.sweep.sweep import split
from cutaway.model.tokens import Tokens

Metric = Callable[[Tensor, Tokens], Tensor]


def two_logits(logits: Tensor, _tokens: Tokens) -> Tensor:
    """[n, V] -> [n, 2]"""
    return torch.stack([logits[:, 5] - logits[:, 9], logits[:, 11]], dim=-1)


def everywhere(logits: Tensor, _tokens: Tokens) -> Tensor:
    """[n, p, V] -> [n, p]"""
    return logits[..., 5] - logits[..., 9]


def one_run_a_cell(
    lm: LanguageModel, tokens: Tokens, cells: Sequence[Any], metric: Metric = two_logits, *, last: bool = True
) -> Tensor:
    found = []
    for cell in cells:
        logits = lm.run(tokens, edits=cell).logits
        assert logits is not None
        found.append(metric(logits[torch.arange(len(tokens)), tokens.last] if last else logits, tokens))
    return torch.stack(found)


def head_cells(lm: LanguageModel, source: Run) -> list[Edit]:
    return [
        cutaway.patch(f"blocks.{layer}.attn.z", source, heads=head)
        for layer in range(lm.n_layers)
        for head in range(lm.n_heads)
    ]


def random_cells(lm: LanguageModel, tokens: Tokens, n: int, seed: int) -> list[list[Edit]]:
    """Edits of two kinds at any site of any layer, at any position, one or two a cell."""
    rng = random.Random(seed)
    shortest = int(tokens.lengths.min())
    table = lm.sites()
    cells: list[list[Edit]] = []
    for _ in range(n):
        cell = []
        for _ in range(rng.choice([1, 1, 2])):
            site = rng.choice(table.present())
            address: dict[str, Any] = {
                "positions": rng.choice([None, rng.randrange(shortest), -1, [0, shortest - 1]]),
                "rows": rng.choice([None, rng.randrange(len(tokens))]),
            }
            if table[site].kind.has_heads:
                address["heads"] = rng.choice([None, 0, 1])
            width = table[site].shape[-1]
            if isinstance(width, int) and width > 1 and address.get("heads") is None and rng.random() < 0.5:
                cell.append(cutaway.add(site, torch.linspace(-1, 1, width), 0.5, **address))
            else:
                cell.append(cutaway.scale(site, 0.5, **address))
        cells.append(cell)
    return cells


# The same numbers


@pytest.mark.parametrize("side", ["right", "left"])
def test_any_edits_give_what_one_run_a_cell_gives(subject: Subject, side: str) -> None:
    lm = subject.lm
    for tokens, seed in ((subject.tokens(side), 0), (lm.tokens(subject.rows[0]), 1)):
        cells = random_cells(lm, tokens, 40, seed)
        found = lm.sweep(tokens, cells, two_logits)
        assert bool(found.done.all())
        close(found.values, one_run_a_cell(lm, tokens, cells), 2e-5)
        assert found.notes == ()
        assert found.prefix_reused


def test_every_site_of_every_layer_alone(subject: Subject) -> None:
    """Each site decides where a forward may enter, so each is tried, at the first, a middle and the last token."""
    lm, tokens = subject.lm, subject.lm.tokens(subject.rows[0])
    cells = [cutaway.scale(site, 0.5, positions=position) for site in lm.sites().present() for position in (0, 4, -1)]
    found = lm.sweep(tokens, cells, two_logits)
    close(found.values, one_run_a_cell(lm, tokens, cells), 2e-5)
    assert len(found.batches) < len(cells) / 2
    assert found.notes == ()


def test_a_metric_of_every_position(subject: Subject) -> None:
    for tokens in (subject.tokens(), subject.tokens("left"), subject.lm.tokens(subject.rows[0])):
        cells = random_cells(subject.lm, tokens, 12, 2)
        found = subject.lm.sweep(tokens, cells, everywhere, logits="all")
        wanted = one_run_a_cell(subject.lm, tokens, cells, everywhere, last=False)
        mask = tokens.mask.expand_as(wanted)  # what stands at padding is nobody's business
        close(found.values[mask], wanted[mask], 2e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox", "gemma3"])
def test_patching_every_head_and_every_position(of_family: Subjects, family: str) -> None:
    subject = of_family(family)
    lm, tokens = subject.lm, subject.lm.tokens(subject.rows[0])
    source = lm.run([(i + 7) % V for i in subject.rows[0]], capture=["blocks.*.attn.z", "blocks.*.resid_pre"])
    heads = head_cells(lm, source)
    found = lm.sweep(tokens, heads, two_logits)
    close(found.values, one_run_a_cell(lm, tokens, heads), 1e-5)
    assert {batch.entry.attention for batch in found.batches} == {"z"}
    assert [batch.entry.layer for batch in found.batches if batch.control] == [LAYERS - 1]
    grid = [
        cutaway.patch(f"blocks.{layer}.resid_pre", source, positions=p)
        for layer in range(LAYERS)
        for p in range(len(subject.rows[0]))
    ]
    found = lm.sweep(tokens, grid, two_logits, batch_rows=2)
    close(found.values, one_run_a_cell(lm, tokens, grid), 1e-5)
    assert {batch.start for batch in found.batches} >= {1, 3, 5, 7, 9}


def test_receipts_are_those_of_the_run(of_family: Subjects) -> None:
    subject = of_family("llama")
    tokens = subject.tokens()
    cells = random_cells(subject.lm, tokens, 10, 3)
    found = subject.lm.sweep(tokens, cells, two_logits)
    for index, cell in enumerate(cells):
        for mine, theirs in zip(found.receipts(index), subject.lm.run(tokens, edits=cell).receipts, strict=True):
            assert (mine.site, mine.rows, mine.positions, mine.heads, mine.n_tokens) == (
                *(theirs.site, theirs.rows, theirs.positions, theirs.heads, theirs.n_tokens),
            )
            assert mine.mean_abs_delta == pytest.approx(theirs.mean_abs_delta, rel=1e-4, abs=1e-6)


def test_cells_without_edits_are_the_base_and_nothing_else_changes(llama: LanguageModel) -> None:
    before = llama.run([5, 6, 7]).logits
    found = llama.sweep([5, 6, 7], [[], cutaway.zero("blocks.1.mlp.out")], two_logits)
    assert before is not None
    close(found.base, two_logits(before[:, -1], llama.tokens([5, 6, 7])))
    assert torch.equal(found.values[0], found.base)
    assert not torch.equal(found.values[1], found.base)
    after = llama.run([5, 6, 7]).logits
    assert after is not None
    assert torch.equal(before, after)
    assert all("forward" not in m.__dict__ and not m._forward_hooks for m in llama.hf.modules())


# Less work


def test_what_is_not_needed_is_not_run(of_family: Subjects) -> None:
    """Columns that each module sees: layers below the edit none, columns before it none, of the end only the last."""
    subject = of_family("llama")
    lm, names = subject.lm, subject.by_hand.names
    ran: list[tuple[str, tuple[int, ...]]] = []
    handles = []
    for layer in range(LAYERS):
        for part, end in ((names.attention, "o_proj"), (names.mlp, "down_proj")):

            def note(_m: Any, _args: Any, output: Tensor, name: str = f"{layer}.{part}") -> None:
                ran.append((name, tuple(output.shape[:2])))

            handles.append(subject.hf.get_submodule(f"{names.layers}.{layer}.{part}.{end}").register_forward_hook(note))
    rows = [[5, 6, 7, 8, 9, 10]]
    cells = [cutaway.scale("blocks.1.mlp.post", 0.5, positions=p) for p in (4, 5)]
    found = lm.sweep(rows, cells, two_logits)
    lm.sweep(rows, [cutaway.scale("blocks.1.resid_post", 0.5, positions=2)], two_logits)
    for handle in handles:
        handle.remove()
    base, rest, again = ran[: 2 * LAYERS], ran[2 * LAYERS : -2 * LAYERS - 2], ran[-2:]
    assert all(shape == (1, 6) for _, shape in base)
    assert again == [(f"2.{names.attention}", (2, 1)), (f"2.{names.mlp}", (2, 1))]
    # two cells and their control, in layer 1 without its attention, in the last layer at the last token alone
    assert rest == [(f"1.{names.mlp}", (3, 2)), (f"2.{names.attention}", (3, 1)), (f"2.{names.mlp}", (3, 1))]
    assert found.batches[0].start == 4


def test_the_arithmetic_is_counted(of_family: Subjects) -> None:
    lm = of_family("gpt2").lm
    counted = cost(lm)
    block = 4 * D * D + 8 * D * D
    assert counted.query[0] + counted.key_value[0] + counted.output[0] + counted.mlp[0] == block
    pairs = 10 * 11 // 2
    assert counted.plain(10) == LAYERS * (2 * block * 10 + 4 * D * pairs) + 2 * V * D * 10
    at = Entry(1, attention="z")
    one = 2 * (D * D + 8 * D * D) * 10  # layer 1 from its output projection on
    end = 2 * 3 * D * D * 10 + 4 * D * pairs + 2 * 9 * D * D  # layer 2: keys of all tokens, the rest of the last one
    assert counted.forward(at, 0, 10) == one + end + 2 * V * D
    assert counted.forward(at, 0, 10, least=True) == one + end + 2 * V * D - 2 * D * D * 9 - 4 * D * (pairs - 10)
    source = lm.run(list(range(3, 13)), capture="blocks.*.attn.z")
    found = lm.sweep(list(range(13, 23)), head_cells(lm, source), two_logits)
    assert found.flops.plain == LAYERS * HEADS * counted.plain(10)
    assert found.flops.needed < found.flops.run < found.flops.plain
    assert 0.5 < found.flops.share < 1
    assert f"{LAYERS * HEADS} cells" in str(found)


def test_batches_are_cut_where_the_sum_is_smallest() -> None:
    def total(starts: list[int], cuts: list[tuple[int, int]]) -> float:
        return sum(5 + (b - a) * (12 - starts[a]) * 2 for a, b in cuts)

    rng = random.Random(0)
    for _ in range(30):
        starts = sorted(rng.randrange(12) for _ in range(rng.randrange(1, 8)))
        most = rng.randrange(1, 5)
        cuts = split(starts, 12, most, 5, 2)
        assert [a for a, _ in cuts] == [0, *[b for _, b in cuts[:-1]]]
        assert cuts[-1][1] == len(starts)
        every = [
            [a for a in range(len(starts)) if a == 0 or bits >> (a - 1) & 1] for bits in range(2 ** (len(starts) - 1))
        ]
        ways = [list(zip(way, [*way[1:], len(starts)], strict=True)) for way in every]
        allowed = [total(starts, way) for way in ways if max(b - a for a, b in way) <= most]
        assert total(starts, cuts) == min(allowed)


# When a shortcut is wrong


@pytest.mark.parametrize("fault", ["prefix", "z", "slim", "stream"])
def test_a_wrong_shortcut_is_dropped_and_said(of_family: Subjects, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    subject = of_family("llama")
    lm, tokens = subject.lm, subject.lm.tokens(subject.rows[0])
    cells = [cutaway.scale(f"blocks.1.attn.{site}", 0.5, positions=p) for site in ("z", "q") for p in (3, 8)]
    wanted = one_run_a_cell(lm, tokens, cells)
    real_past, real_columns, real_argument = shortcuts.Base.past, shortcuts.Base.columns, shortcuts.on_input

    def past(self: Any, start: int, times: int, layer: int) -> Any:
        made = real_past(self, start, times, layer)
        last: Any = made.layers[-1]
        last.keys = last.keys * 1.5
        return made

    def columns(self: Any, value: Tensor, start: int, times: int) -> Tensor:
        wrong = any(value is v for v in (self.entering if fault == "z" else self.returned).values())
        return real_columns(self, value, start, times) * (1.5 if wrong else 1.0)

    def argument(module: Any, mine: Any, change: Any) -> Any:
        return real_argument(module, mine, lambda x: None if (y := change(x)) is None else y * 1.5)

    if fault == "prefix":
        monkeypatch.setattr(shortcuts.Base, "past", past)
    elif fault == "slim":
        monkeypatch.setattr(shortcuts, "on_input", argument)
    else:
        monkeypatch.setattr(shortcuts.Base, "columns", columns)
    found = lm.sweep(tokens, cells, two_logits)
    close(found.values, wanted, 2e-5)
    said = {"prefix": "no prefix", "z": "ran whole", "slim": "at every token", "stream": "no layer was skipped"}[fault]
    assert any(said in note and "control was off" in note for note in found.notes), found.notes


def test_an_edit_that_touches_nothing_or_fits_nowhere_is_refused(llama: LanguageModel) -> None:
    with pytest.raises(NothingEdited):
        llama.sweep([5, 6, 7], [cutaway.zero("blocks.1.mlp.out", phase="new")], two_logits)
    with pytest.raises(CutawayError, match="Position 3"):
        llama.sweep([5, 6, 7], [cutaway.zero("blocks.1.mlp.out", positions=3)], two_logits)
    with pytest.raises(CutawayError, match="at least one cell"):
        llama.sweep([5, 6, 7], [], two_logits)
    cell = cutaway.zero("blocks.1.mlp.out")
    metrics: list[Any] = [lambda x, _: x.sum(), lambda x, _: 3.0, lambda x, _: torch.zeros(2)]
    for wrong in metrics:
        with pytest.raises(CutawayError, match="metric"):
            llama.sweep([5, 6, 7], [cell], wrong)
    with pytest.raises(CutawayError, match="batch_rows"):
        llama.sweep([5, 6, 7], [cell], two_logits, batch_rows=0)
    with pytest.raises(CutawayError, match="'all' or 'last'"):
        llama.sweep([5, 6, 7], [cell], two_logits, logits="first")  # type: ignore[arg-type]


# Memory and interruptions


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Forwards of more than 3 rows run out of memory; the rows tried."""
    tried: list[int] = []
    real = shortcuts.call

    def call(lm: LanguageModel, tokens: Tokens, start: int, past: Any, times: int = 1) -> Any:
        tried.append(times * len(tokens))
        if tried[-1] > 3:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")
        return real(lm, tokens, start, past, times)

    monkeypatch.setattr(shortcuts, "call", call)
    return tried


def test_batches_are_halved_when_memory_runs_out(of_family: Subjects, small_memory: list[int]) -> None:
    subject = of_family("gpt2")
    lm, tokens = subject.lm, subject.lm.tokens(subject.rows[0])
    cells = random_cells(lm, tokens, 30, 5)
    found = lm.sweep(tokens, cells, two_logits)
    close(found.values, one_run_a_cell(lm, tokens, cells), 2e-5)
    assert any("memory ran out" in note for note in found.notes)
    assert max(small_memory) > 3
    assert max(len(batch.cells) + batch.control for batch in found.batches) <= 3


def test_one_cell_that_does_not_fit_is_refused(of_family: Subjects, small_memory: list[int]) -> None:
    subject = of_family("gpt2")
    rows = [[5, 6, 7]] * 3
    with pytest.raises(CutawayError, match="alone does not fit in memory"):
        subject.lm.sweep(rows, [cutaway.zero("blocks.1.mlp.out")] * 2, two_logits)
    assert small_memory
    after = subject.lm.run(rows).logits
    assert after is not None


def test_other_errors_are_not_taken_for_a_lack_of_memory(llama: LanguageModel) -> None:
    def broken(_logits: Tensor, _tokens: Tokens) -> Tensor:
        raise RuntimeError("a fault of the metric")

    with pytest.raises(RuntimeError, match="a fault of the metric"):
        llama.sweep([5, 6, 7], [cutaway.zero("blocks.1.mlp.out")], broken)
    assert out_of_memory(MemoryError())
    assert out_of_memory(RuntimeError("CUDA out of memory."))
    assert not out_of_memory(RuntimeError("shapes"))
    assert available_bytes(torch.device("cpu")) > 2**20


def test_rows_and_bytes_bound_a_batch(llama: LanguageModel) -> None:
    rows = [[5, 6, 7, 8], [9, 10, 11, 12]]
    cells = [cutaway.scale("blocks.1.mlp.out", factor / 10) for factor in range(20)]
    wanted = llama.sweep(rows, cells, two_logits)
    few = llama.sweep(rows, cells, two_logits, batch_rows=8)
    assert [len(batch.cells) for batch in few.batches] == [4] * 5
    tight = llama.sweep(rows, cells, two_logits, limit_bytes=60_000)
    assert 1 <= max(len(batch.cells) for batch in tight.batches) < 20
    close(few.values, wanted.values)
    close(tight.values, wanted.values)
    with pytest.raises(CutawayError, match="limit_bytes"):
        llama.sweep(rows, cells, two_logits, limit_bytes=100)


def test_an_interrupted_sweep_goes_on(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [cutaway.scale(f"blocks.{layer}.mlp.out", 0.5, positions=p) for layer in range(3) for p in range(4)]
    whole = llama.sweep([5, 6, 7, 8], cells, two_logits)
    real, calls = module.finish, 0
    monkeypatch.setattr(module, "_UNEMBEDDED", 3)

    def finish(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "finish", finish)
    with pytest.raises(KeyboardInterrupt) as raised:
        llama.sweep([5, 6, 7, 8], cells, two_logits)
    assert isinstance(raised.value, SweepInterrupted)
    part: Sweep = raised.value.sweep
    n = int(part.done.sum())
    assert 0 < n < len(cells)
    assert bool(part.values[~part.done].isnan().all())
    assert "only" in str(part)
    close(part.values[part.done], whole.values[part.done])
    assert all("forward" not in m.__dict__ and not m._forward_hooks for m in llama.hf.modules())
    rest = llama.sweep([5, 6, 7, 8], cells, two_logits, start=part)
    assert bool(rest.done.all())
    close(rest.values, whole.values)
    assert sum(len(b.cells) for b in rest.batches) - sum(len(b.cells) for b in part.batches) == len(cells) - n
    assert [r.site for i in range(len(cells)) for r in rest.receipts(i)] == [cell.site for cell in cells]
    with pytest.raises(CutawayError, match="earlier part"):
        llama.sweep([5, 6, 7, 8], cells[:-1], two_logits, start=part)


def test_long_sweeps_show_their_progress(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cells = [cutaway.scale(f"blocks.{layer}.mlp.out", 0.5) for layer in range(3)]
    llama.sweep([5, 6], cells, two_logits, label="all layers")
    assert "all layers" not in capfd.readouterr().err
    monkeypatch.setattr(module, "_SECONDS_IN_SILENCE", 0.0)
    monkeypatch.delenv("CUTAWAY_QUIET", raising=False)
    llama.sweep([5, 6], cells, two_logits, label="all layers")
    assert "all layers: 3/3" in capfd.readouterr().err


def test_a_sweep_is_a_result(llama: LanguageModel) -> None:
    cells = [cutaway.zero(f"blocks.{layer}.mlp.out") for layer in range(llama.n_layers)]
    found = llama.sweep([[5, 6, 7], [8, 9, 10]], cells, lambda logits, tokens: logits[:, 5])
    assert len(repr(found).splitlines()) <= 12
    assert len(found.rows()) == len(cells) * 2
    assert found.rows()[3]["value"] == float(found.values[1, 1])
    assert found.to_json()["cells"] == len(cells)
    assert "<svg" in found.drawing()
