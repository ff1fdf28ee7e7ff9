"""Many edits of the same prompts, one number each: a sweep of cells in batches that do as little as is exact.

A cell is a list of edits; its value is a metric of the edited run, as `lm.run(prompts, edits=cell)` would give it.
Cells that enter at the same layer run as one batch: the layers below are taken over from one unedited forward, columns
before the first edited one come from its keys and values, and only the last token is unembedded where the metric reads
no other. The first batch that takes a shortcut carries an unedited control: where that does not end as the unedited
forward did, the shortcut is dropped, and the result says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.progress import Progress
from cutaway.model.attached import Attached
from cutaway.model.edits.edit import Edit
from cutaway.model.edits.resolve import Resolved, edits_for, resolve
from cutaway.model.forward.execution import receipts_of
from cutaway.model.sites import Site
from cutaway.model.sweep.flops import Cost, Flops, cost
from cutaway.model.sweep.memory import available_bytes, out_of_memory
from cutaway.model.sweep.results import Batch, Sweep, SweepInterrupted
from cutaway.model.sweep.shortcuts import Base, Entry, entry, finish, pick, run_base, run_from
from cutaway.model.tokens import Tokens

Cell = Edit | Sequence[Edit]
Metric = Callable[[Tensor, Tokens], Tensor]
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 6e-3, torch.bfloat16: 4e-2}
_SECONDS_IN_SILENCE = 2.0
_SHARE_OF_MEMORY = 0.25
_UNEMBEDDED = 512  # rows at once
_KEPT_BYTES = 2**26  # sources of resolved edits above this are looked up again, batch by batch


@dataclass(frozen=True)
class _Plan:
    """One cell: its edits, where it can enter, and the first column that it changes."""

    index: int
    edits: tuple[Edit, ...]
    entry: Entry
    start: int
    source_bytes: int


class _AtSite:
    """The edits of several cells at one site of a batch, each on the rows of its own cell, as `Execution` takes
    edits.
    """

    def __init__(self, site: Site, cells: list[tuple[int, list[Resolved]]], n: int) -> None:
        self.site = site
        self.cells = cells
        self.n = n

    def apply(self, x: Tensor, offset: int) -> Tensor:
        blocks = list(x.split(self.n))
        for position, edits in self.cells:
            for edit in edits:
                blocks[position] = edit.apply(blocks[position], offset)
        return torch.cat(blocks)


def _resolve_cell(lm: Attached, edits: Sequence[Edit], tokens: Tokens) -> list[Resolved]:
    """A cell's edits at each of their sites. Raises CutawayError where one does not fit."""
    table = lm.sites()
    return [resolve(i, edit, table[name], tokens) for i, edit in enumerate(edits) for name in table.expand(edit.site)]


def _plan(lm: Attached, index: int, edits: tuple[Edit, ...], found: list[Resolved], last: bool) -> _Plan:
    columns = [(edit.ordinal >= 0).any(0).to(torch.uint8).argmax() for edit in found]
    held = sum(edit.source.numel() * edit.source.element_size() for edit in found if edit.source is not None)
    at = entry(lm, {edit.site.name for edit in found}, last)
    return _Plan(index, edits, at, min(int(column) for column in columns), held)


def split(starts: Sequence[int], width: int, most: int, overhead: float, unit: int) -> list[tuple[int, int]]:
    """Cut cells, sorted by the first column they need, into batches [a, b) of at most `most` cells.

    A batch runs every cell from its smallest column on. The cuts make the sum over batches of
    `overhead` + cells x columns x `unit` smallest (dynamic programming), all counted in columns of one prompt.
    """
    best = [0.0] + [float("inf")] * len(starts)
    cut = [0] * (len(starts) + 1)
    for b in range(1, len(starts) + 1):
        for a in range(max(0, b - most), b):
            total = best[a] + overhead + (b - a) * (width - starts[a]) * unit
            if total < best[b]:
                best[b], cut[b] = total, a
    found, b = [], len(starts)
    while b > 0:
        found.append((cut[b], b))
        b = cut[b]
    return found[::-1]


class _Sweeper:
    """The state of one sweep: what is proven, what was dropped, what is done."""

    def __init__(
        self,
        lm: Attached,
        tokens: Tokens,
        cells: Sequence[tuple[Edit, ...]],
        metric: Metric,
        logits: Literal["all", "last"],
        batch_rows: int | None,
        limit_bytes: int | None,
    ) -> None:
        self.lm, self.tokens, self.metric, self.last = lm, tokens, metric, logits == "last"
        self.cost: Cost = cost(lm)
        self.notes: list[str] = []
        self.batches: list[Batch] = []
        self.proven: set[Any] = set()
        self.prefix_proven = lm.n_layers + 1  # the lowest layer from which keys and values were right
        self.allowed = {"prefix": True, "slim": True, "inner": True, "resume": True}
        self.spent = 0
        self.touched: list[tuple[Resolved, ...]] = [()] * len(cells)
        self.batch_rows = batch_rows
        self.limit = limit_bytes
        self.most = 2**31
        self.kept: dict[int, list[Resolved]] = {}
        self.pending: list[tuple[_Plan, Tensor]] = []
        self.plans: list[_Plan] = []
        self.needed = 0
        held = 0
        for index, edits in enumerate(cells):
            if not edits:
                continue
            found = _resolve_cell(lm, edits, tokens)
            plan = _plan(lm, index, edits, found, self.last)
            self.needed += self.cost.forward(plan.entry, plan.start, self.width, least=True) * self.n
            self.plans.append(plan)
            held += plan.source_bytes
            if held <= _KEPT_BYTES:
                self.kept[index] = found

    @property
    def n(self) -> int:
        return len(self.tokens)

    @property
    def width(self) -> int:
        return self.tokens.ids.shape[1]

    def run_base(self) -> Base:
        wants = any(plan.start > 0 for plan in self.plans)
        causal = not wants or self.lm.causal
        base = run_base(
            self.lm, self.tokens, {plan.entry for plan in self.plans}, last=self.last, cached=wants and causal
        )
        self.spent += self.cost.forward(Entry(0, last=self.last, slim=False), 0, self.width) * self.n
        if wants and base.cache is None:
            self.allowed["prefix"] = False
            reason = base.no_cache if causal else "attention is not causal"
            self.notes.append(f"no prefix was reused: {reason}")
        return base

    # Batches

    def bytes_per_cell(self, at: Entry, start: int) -> int:
        """What one more cell in a batch holds at once, from shapes: activations of a layer, the cache, logits."""
        lm, columns = self.lm, self.width - start
        layer = 8 * lm.d_model + 3 * lm.d_mlp + 4 * lm.n_heads * lm.d_head
        scores = 2 * lm.n_heads * self.width
        held = columns * (layer + scores) * lm.dtype.itemsize
        if start > 0:
            above = max(1, lm.n_layers - at.layer)
            held += 2 * above * lm.n_kv_heads * lm.d_head * self.width * lm.dtype.itemsize
        held += (1 if at.last else columns) * lm.d_vocab * (lm.dtype.itemsize + 4)
        return self.n * held

    def most_cells(self, at: Entry, start: int, free: int) -> int:
        """Cells in a batch: by memory, by the rows allowed, and on a CPU by what its caches like."""
        each = self.bytes_per_cell(at, start)
        if self.limit is not None and each > self.limit:
            raise CutawayError(
                f"One cell of this sweep needs about {each / 2**20:.1f} MiB, above limit_bytes "
                f"({self.limit / 2**20:.1f} MiB); use fewer or shorter prompts, or raise limit_bytes."
            )
        most = max(1, int((free if self.limit is None else self.limit) // each))
        if self.batch_rows is not None:
            most = min(most, max(1, self.batch_rows // self.n))
        if self.lm.device.type == "cpu":
            most = min(most, max(1, _CPU_COLUMNS // (self.n * (self.width - start))))
        return min(most, self.most)

    def planned(self, plans: Iterable[_Plan]) -> list[tuple[Entry, int, list[_Plan]]]:
        """The batches: cells of one entry, cut where a later column saves more than another forward costs."""
        groups: dict[Entry, list[_Plan]] = {}
        for plan in plans:
            groups.setdefault(plan.entry, []).append(plan)
        free = int(available_bytes(self.lm.device) * _SHARE_OF_MEMORY)
        cpu = self.lm.device.type == "cpu"
        overhead = (16 if cpu else 256) + (5e6 if cpu else 5e8) / max(1.0, self.cost.per_layer)
        batches = []
        for at in sorted(groups, key=lambda entry: entry.layer, reverse=True):
            group = sorted(groups[at], key=lambda plan: plan.start)
            starts = [plan.start if self.allowed["prefix"] else 0 for plan in group]
            most = self.most_cells(at, starts[0], free)
            for a, b in split(starts, self.width, most, overhead, self.n):
                batches.append((at, starts[a], group[a:b]))
        # a control costs least in the deepest layer, but keys and values are to be proven from the lowest on
        return [b for b in batches if b[1] == 0] + [b for b in batches[::-1] if b[1] > 0]

    def _weakened(self, at: Entry, start: int) -> tuple[Entry, int]:
        if not self.allowed["prefix"]:
            start = 0
        if not self.allowed["slim"]:
            at = replace(at, slim=False)
        if not self.allowed["inner"]:
            at = at.plain()
        if not self.allowed["resume"]:
            at = replace(at.plain(), layer=0)
        return at, start

    def _drop(self, at: Entry, start: int, reason: str) -> bool:
        """Give up the first shortcut that a batch used; False where there was none."""
        used = {"prefix": start > 0, "slim": at.slim, "inner": at.inner, "resume": at.layer > 0}
        said = {
            "prefix": "no prefix was reused",
            "slim": "the last layer ran at every token",
            "inner": "the first edited layer ran whole",
            "resume": "no layer was skipped",
        }
        for name, one in used.items():
            if one and self.allowed[name]:
                self.allowed[name] = False
                self.notes.append(f"{said[name]}: {reason}")
                return True
        return False

    def run(self, base: Base, at: Entry, start: int, plans: list[_Plan]) -> Iterator[tuple[_Plan, Tensor]]:
        """Run a batch, in halves where memory runs out; yields each cell with its metric."""
        waiting = [plans]
        while waiting:
            now = waiting.pop()
            problem = ""
            try:
                yield from self._checked(base, at, start, now)
                continue
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                problem = str(error)
            half = self._halve(len(now), problem)  # the failed forward's tensors are free again here
            waiting += [now[half:], now[:half]]

    def _checked(self, base: Base, at: Entry, start: int, plans: list[_Plan]) -> list[tuple[_Plan, Tensor]]:
        while True:
            at_now, start_now = self._weakened(at, start)
            shortcuts = self._shortcuts(at_now)
            control = not shortcuts <= self.proven or (start_now > 0 and at_now.layer < self.prefix_proven)
            try:
                out, found = self._forward(base, at_now, start_now, plans, control)
            except CutawayError:
                raise
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
                if out_of_memory(error) or not control or not self._drop(at_now, start_now, f"it raised {error}"):
                    raise
                continue
            if control:
                wrong = self._deviation(base, out[: self.n], at_now, start_now)
                if wrong and self._drop(at_now, start_now, wrong):
                    continue
                self.proven |= shortcuts
                if start_now > 0:
                    self.prefix_proven = min(self.prefix_proven, at_now.layer)
                out = out[self.n :]
            break
        self.batches.append(Batch(tuple(plan.index for plan in plans), at_now, start_now, control))
        times = len(plans) + control
        self.spent += times * self.n * self.cost.forward(at_now, start_now, self.width)
        results = []
        for i, plan in enumerate(plans):
            receipts_of(found[i], self.tokens.first)  # raises where an edit touched nothing
            self.touched[plan.index] = tuple(replace(edit, source=None, value=None) for edit in found[i])
            mine = out[i * self.n : (i + 1) * self.n]
            if at_now.defer:
                self.pending.append((plan, self._last(base.final, mine, start_now)[:, None]))
            else:
                results.append((plan, self.measure(base, mine, start_now)))
        return results

    def unembed(self, base: Base, *, all_of_it: bool) -> Iterator[tuple[_Plan, Tensor]]:
        """The metric of cells that ended behind the last layer, once there are enough of them, or all."""
        row = 2 * self.lm.d_vocab * (self.lm.dtype.itemsize + 4)
        free = int(available_bytes(self.lm.device) * _SHARE_OF_MEMORY) if self.limit is None else self.limit
        most = max(1, min(_UNEMBEDDED, free // row) // self.n)
        while self.pending and (all_of_it or len(self.pending) >= most):
            now = self.pending[:most]
            problem = ""
            try:
                logits = finish(self.lm, base, torch.cat([stream for _, stream in now]))
                for i, (plan, _) in enumerate(now):
                    yield plan, self.measure(base, logits[i * self.n : (i + 1) * self.n])
                del self.pending[: len(now)]
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                problem = str(error)
            if problem:
                most = self._halve(len(now), problem)

    def _halve(self, n: int, problem: str) -> int:
        """How many cells to try after `n` did not fit."""
        if self.lm.device.type == "cuda":
            torch.cuda.empty_cache()
        if n == 1:
            raise CutawayError(
                f"One cell of this sweep alone does not fit in memory ({problem.splitlines()[0]}); use fewer or "
                "shorter prompts."
            )
        half = n // 2
        self.most = min(self.most, half)
        self.notes.append(f"memory ran out with {n} cells in a batch, so they ran {half} at a time")
        return half

    def _shortcuts(self, at: Entry) -> set[Any]:
        """What a control has to prove, apart from the keys and values of a prefix."""
        layers = self.lm.family.layers
        used: set[Any] = {"stream"} if at.layer > 0 else set()
        if at.slim and at.layer < len(layers):
            used.add("slim")
        if at.inner:
            here = layers[at.layer]
            parts = (at.attention, type(here.attention)), (at.mlp, type(here.mlp)), (at.block, type(here.module))
            used |= {part for part in parts if part[0] != "run"}
        return used

    def _forward(
        self, base: Base, at: Entry, start: int, plans: list[_Plan], control: bool
    ) -> tuple[Tensor, list[list[Resolved]]]:
        found = [self.kept.get(plan.index) or _resolve_cell(self.lm, plan.edits, self.tokens) for plan in plans]
        by_site: dict[str, list[tuple[int, list[Resolved]]]] = {}
        sites: dict[str, Site] = {}
        for position, resolved in enumerate(found, start=int(control)):
            for edit in resolved:
                at_site = by_site.setdefault(edit.site.name, [])
                sites[edit.site.name] = edit.site
                if not at_site or at_site[-1][0] != position:
                    at_site.append((position, []))
                at_site[-1][1].append(edit)
        edits = [_AtSite(sites[name], cells, self.n) for name, cells in by_site.items()]
        return run_from(self.lm, base, at, start, len(plans) + control, edits), found

    def _deviation(self, base: Base, control: Tensor, at: Entry, start: int) -> str:
        """What is wrong with the unedited control, or nothing."""
        what, value = ("stream", base.final) if at.defer else ("logits", base.logits)
        wanted = self._last(value, value, 0).double()
        off = (self._last(value, control, start).double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)
        tolerance = _TOLERANCE.get(self.lm.dtype, 4e-2)
        return "" if float(off) <= tolerance else f"an unedited control was off by {float(off):.1e} of its {what}"

    def _last(self, unedited: Tensor, value: Tensor, start: int) -> Tensor:
        """[n, 1 or p - start, ...] -> [n, ...] at each row's last real token; `unedited` in rows that end before."""
        found = pick(value, (self.tokens.last - start).clamp(min=0))[:, 0]
        early = self.tokens.last < start
        if start == 0 or not bool(early.any()):
            return found
        return torch.where(early.to(found.device)[:, None], self._last(unedited, unedited, 0), found)

    def measure(self, base: Base, logits: Tensor, start: int = 0) -> Tensor:
        """The metric of one cell's logits [n, 1 or p - start, V]."""
        with torch.no_grad():
            if self.last:
                given = self._last(base.logits, logits, start)
            else:
                given = torch.cat([base.logits[:, :start], logits], dim=1) if start > 0 else logits
            value: Any = self.metric(given, self.tokens)
            if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != self.n:
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise CutawayError(
                    f"The metric of a sweep returns a tensor with one entry a prompt [{self.n}, ...]; got {shape}."
                )
            return value.detach().clone()

    def result(self, values: dict[int, Tensor], base: Tensor, n_cells: int, start: Sweep | None) -> Sweep:
        """Everything done so far, brought over to the CPU at once."""
        table = torch.full((n_cells, *base.shape), torch.nan, dtype=torch.promote_types(base.dtype, torch.float32))
        done = torch.zeros(n_cells, dtype=torch.bool)
        touched = list(self.touched)
        if start is not None:
            table[start.done] = start.values[start.done]
            done |= start.done
            touched = [mine or before for mine, before in zip(touched, start.touched, strict=True)]
        if values:
            table[list(values)] = torch.stack(list(values.values())).to("cpu", table.dtype)
            done[list(values)] = True
        return Sweep(
            tokens=self.tokens,
            values=table,
            base=base.to("cpu", table.dtype),
            done=done,
            batches=(*(() if start is None else start.batches), *self.batches),
            notes=tuple(dict.fromkeys((*(() if start is None else start.notes), *self.notes))),
            flops=Flops(
                self.spent + (0 if start is None else start.flops.run),
                self.needed,
                self.cost.plain(self.width) * self.n * len(self.plans),
            ),
            touched=tuple(touched),
        )


_CPU_COLUMNS = 1024  # rows of a matrix product beyond which a CPU gains nothing more


def sweep(
    lm: Attached,
    tokens: Tokens,
    cells: Sequence[Cell],
    metric: Metric,
    *,
    logits: Literal["all", "last"] = "last",
    batch_rows: int | None = None,
    limit_bytes: int | None = None,
    start: Sweep | None = None,
    label: str = "sweep",
) -> Sweep:
    """See `LanguageModel.sweep`."""
    if logits not in ("all", "last"):
        raise CutawayError(f"logits={logits!r} of a sweep is 'all' or 'last': what the metric reads.")
    if isinstance(cells, (Edit, str)) or not isinstance(cells, Iterable):
        raise CutawayError(f"cells= is a list of edits, or of lists of edits; got {cells!r}.")
    if not callable(metric):
        raise CutawayError(f"metric= is a function of the logits and the tokens; got {metric!r}.")
    for name, number in (("batch_rows", batch_rows), ("limit_bytes", limit_bytes)):
        if number is not None and type(number) is not int:
            raise CutawayError(f"{name} is a whole number; got {number!r}.")
    if start is not None and not isinstance(start, Sweep):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise CutawayError(f"start= is an earlier part of this sweep; got {start!r}.")
    if batch_rows is not None and batch_rows < 1:
        raise CutawayError(f"batch_rows is {batch_rows}; give a number of rows, 1 or more.")
    lists = [edits_for(lm, cell) for cell in cells]
    if not lists:
        raise CutawayError("A sweep needs at least one cell, a list of edits.")
    if start is not None and (len(start.done) != len(lists) or not torch.equal(start.tokens.ids, tokens.ids)):
        raise CutawayError("start= needs an earlier part of this sweep: the same prompts and as many cells.")
    sweeper = _Sweeper(lm, tokens, lists, metric, logits, batch_rows, limit_bytes)
    base = sweeper.run_base()
    unedited = sweeper.measure(base, base.logits)
    values: dict[int, Tensor] = {i: unedited for i, edits in enumerate(lists) if not edits}
    todo = [plan for plan in sweeper.plans if start is None or not bool(start.done[plan.index])]
    began, ran = time.monotonic(), len(lists) - len(todo)
    with ExitStack() as stack:
        progress: Progress | None = None
        try:
            batches = sweeper.planned(todo)
            while batches:
                at, column, plans = batches.pop(0)
                if len(plans) > sweeper.most:
                    batches[:0] = [
                        (at, plans[i].start if column else 0, plans[i : i + sweeper.most])
                        for i in range(0, len(plans), sweeper.most)
                    ]
                    continue
                for plan, value in sweeper.run(base, at, column, plans):
                    values[plan.index] = value
                for plan, value in sweeper.unembed(base, all_of_it=not batches):
                    values[plan.index] = value
                ran += len(plans)
                if progress is not None:
                    progress.advance(len(plans))
                elif time.monotonic() - began > _SECONDS_IN_SILENCE:
                    progress = stack.enter_context(Progress(label, total=len(lists), unit="cells"))
                    progress.advance(ran)
        except KeyboardInterrupt:
            raise SweepInterrupted(sweeper.result(values, unedited, len(lists), start)) from None
    return sweeper.result(values, unedited, len(lists), start)
