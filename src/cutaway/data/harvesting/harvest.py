"""The activations of a model on a corpus, streamed into memory or into a folder of shards.

    store = harvest(lm, "texts/", "blocks.3.resid_post", out="activations/", tokens=1_000_000)

Each shard depends on the model, the corpus and the settings alone, not on which process wrote it, nor when: so a
harvest that was killed goes on where it stopped and ends with the same bytes, and under `torchrun` each process takes
its own shards. A shard is written under another name and renamed; a journal then says that it is there, and is the
truth.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.manifest import Manifest, ModelIdentity, code_version
from cutaway.artifacts.progress import Progress, duration
from cutaway.artifacts.run_folder import goes_on
from cutaway.data.corpus.corpus import Tokenizing, rows_hash
from cutaway.data.corpus.documents import TextSource, documents_of
from cutaway.data.corpus.rows import Packing, Reading, RowBatch, given_rows, row_batches, text_rows
from cutaway.data.corpus.separators import Marks
from cutaway.data.harvesting.hardware import keep_freed_memory
from cutaway.data.harvesting.journal import Folder, Memory, Written
from cutaway.data.harvesting.settings import Rules, Storage
from cutaway.data.harvesting.store import COLUMNS, DTYPES, Store
from cutaway.model.tokens import Tokens, pad_rows

_SHARD_BYTES = 1 << 28
_CONTEXT = 256
_CALIBRATION_TOKENS = 4096


class Harvesting(Tokenizing, Protocol):
    """What is needed of a language model here; `cutaway.model.LanguageModel` has it."""

    @property
    def pad_id(self) -> int | None: ...
    @property
    def d_vocab_in(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def run(self) -> Callable[..., Any]: ...
    @property
    def sites(self) -> Callable[[], Any]: ...
    @property
    def identity(self) -> Callable[[], ModelIdentity]: ...


TokenRows = Tensor | Tokens | Sequence[Sequence[int]]
"""Rows of token ids: int [n, p], lists, or `Tokens` with their mask."""


def harvest(
    lm: Harvesting,
    corpus: TextSource | TokenRows,
    sites: str | Sequence[str],
    *,
    out: str | Path | None = None,
    tokens: int | None = None,
    context: int | None = None,
    packing: Packing = "packed",
    rules: Rules | None = None,
    batch_rows: int = 16,
    storage: Storage | None = None,
) -> Store:
    """Run a corpus through a model up to the last of `sites` and keep what is there at every token that counts.

    The same call with the same `out` goes on with an unfinished folder and opens a finished one. Under `torchrun` (RANK
    and WORLD_SIZE) each process writes its share of the shards, and each returns the whole store when all are done.

    Args:
        lm: The model.
        corpus: A path, `hub:NAME`, texts in any iterable (it may be larger than memory), or rows of token ids (lists,
            int [n, p], or `Tokens`), which stay as they are. `documents_of` says how texts are read otherwise: from
            another field or split, or cut at a separator.
        sites: Sites or wildcards with one vector per token.
        out: The folder of the store; None keeps it in memory.
        tokens: Stop after so many tokens that `rules` keep (`high_norm` comes after it); None reads the whole corpus.
        context: Tokens per row; None is 256, or all that a smaller model reads.
        packing: "packed": documents are joined and cut into full rows; "document": each has its own row, and is cut at
            its end.
        rules: Which tokens are kept; without the first of a row and the beginning-of-text tokens if None.
        batch_rows: Rows per forward.
        storage: How values are stored; as the model computes them if None.

    Returns:
        The store, each vector with the token it belongs to.

    Raises:
        CutawayError: A site without one vector per token; a folder that holds something else; a corpus that is empty or
            not the one that the folder was begun with; values that are not finite or do not fit the dtype.

    Example:
        >>> lm = cutaway.load("atlas")
        >>> store = harvest(lm, ["The capital of France is Paris."], "blocks.3.resid_post")
        >>> store[0]["blocks.3.resid_post"].shape
        torch.Size([256])
    """
    rows = context, packing, batch_rows
    plan = _plan(lm, corpus, sites, tokens, rows, rules or Rules(), storage or Storage())
    keep_freed_memory()
    if out is None:
        memory = Memory()
        _fill(plan, memory, {})
        return memory.store(plan.sites, plan.header, plan.manifest)
    rank, world = _place_among_processes()
    with Folder(Path(out), plan.header, rank, world) as folder:
        if not folder.complete:
            if folder.done:
                goes_on(folder.path, sum(one.rows for one in folder.done.values()), plan.limit, "tokens")
            _fill(plan, folder, folder.done)
        return folder.finish(plan.manifest, storage is not None and storage.verify)


def _place_among_processes() -> tuple[int, int]:
    try:
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError as error:
        raise CutawayError("RANK and WORLD_SIZE in the environment must be numbers, as torchrun sets them") from error
    if not 0 <= rank < world:
        raise CutawayError(f"RANK={rank} is outside WORLD_SIZE={world}; unset both, or use torchrun")
    return rank, world


@dataclass(frozen=True, eq=False)
class _Plan:
    """All that determines the result."""

    lm: Harvesting
    sites: dict[str, tuple[int, ...]]  # as stored
    rules: Rules
    limit: int | None
    shard_tokens: int
    dtype: torch.dtype
    read: Callable[[Reading], Iterator[RowBatch]]
    size: int | None  # of the corpus in bytes
    given: str | None  # the hash of rows that were given
    header: dict[str, Any]

    def manifest(self, corpus_hash: str, documents: int) -> Manifest:
        settings = {**self.header["settings"], "documents": documents}
        model = ModelIdentity(**self.header["model"])
        return Manifest.create("activations", model=model, corpus_hash=corpus_hash, configuration=settings)


def _plan(
    lm: Harvesting,
    corpus: TextSource | TokenRows,
    sites: str | Sequence[str],
    tokens: int | None,
    rows: tuple[int | None, Packing, int],
    rules: Rules,
    storage: Storage,
) -> _Plan:
    context, packing, batch_rows = rows
    file_format, heads = storage.file_format, storage.heads
    stored = str(lm.dtype).removeprefix("torch.") if storage.dtype is None else storage.dtype
    stored = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}.get(stored, stored)
    if stored not in DTYPES:
        raise CutawayError(f"activations are stored as {', '.join(DTYPES)}; not as '{stored}'")
    if file_format not in ("safetensors", "parquet"):
        raise CutawayError(f"shards are safetensors or parquet, not '{file_format}'")
    if file_format == "parquet" and stored == "bfloat16":
        raise CutawayError("Parquet has no bfloat16: store float32 or float16, or use safetensors")
    if heads not in ("keep", "flatten"):
        raise CutawayError(f"heads is '{heads}'; it is 'keep' or 'flatten'")
    for name, number in (("tokens", tokens), ("batch_rows", batch_rows), ("shard_tokens", storage.shard_tokens)):
        if number is not None and number < 1:
            raise CutawayError(f"{name} is {number}; it must be 1 or more")
    context = min(_CONTEXT, lm.context_length) if context is None else context
    dims = token_shapes(lm, sites)
    shapes = {name: (_product(shape),) if heads == "flatten" else shape for name, shape in dims.items()}
    width = sum(map(_product, shapes.values())) * DTYPES[stored].itemsize
    size = storage.shard_tokens or max(1024, _SHARD_BYTES // width)
    pad = next((i for i in (lm.pad_id, lm.bos_id) if i is not None and i < lm.d_vocab_in), 0)
    given, separator = _given(corpus), None
    if given is None:
        documents = documents_of(cast(TextSource, corpus))
        separator = documents.separator
        text_rows(lm, documents, context, packing, Reading())  # so that what is wrong shows before any work
        source, fingerprint, total = documents.source, documents.fingerprint, documents.size

        def read(reading: Reading) -> Iterator[RowBatch]:
            return row_batches(text_rows(lm, documents, context, packing, reading), batch_rows, pad)
    else:
        ids, mask = given
        if bool((ids < 0).any()) or bool((ids >= lm.d_vocab_in).any()):
            raise CutawayError(f"Token ids must be between 0 and {lm.d_vocab_in - 1}, the vocabulary of {lm.name}.")
        source, fingerprint, total = "rows of token ids", rows_hash(ids), None

        def read(reading: Reading) -> Iterator[RowBatch]:
            reading.documents = len(ids)
            return row_batches(given_rows(ids, mask), batch_rows, pad)

    settings = {
        "sites": {name: list(shape) for name, shape in shapes.items()},
        "rules": asdict(rules),
        "rows": {"packing": packing, "context": context} if given is None else {"packing": "given"},
        "document_separator": separator,
        "batch_rows": batch_rows,
        "tokens": tokens,
        "dtype": stored,
        "shard_tokens": size,
        "format": file_format,
    }
    header = {
        "settings": settings,
        "model": asdict(lm.identity()),
        "source": source,
        "fingerprint": fingerprint,
        "version": code_version(),
    }
    return _Plan(
        lm=lm, sites=shapes, rules=rules, limit=tokens, shard_tokens=size, dtype=DTYPES[stored],
        read=read, size=total, given=fingerprint if given is not None else None, header=header,
    )  # fmt: skip


def _product(shape: Sequence[int]) -> int:
    product = 1
    for part in shape:
        product *= part
    return product


def _given(corpus: Any) -> tuple[Tensor, Tensor | None] | None:
    if isinstance(corpus, Tokens):
        return corpus.ids, corpus.mask
    if isinstance(corpus, (list, tuple)) and corpus and isinstance(corpus[0], (list, tuple)):
        if not all(row and all(type(i) is int for i in row) for row in corpus):
            raise CutawayError("rows of token ids are lists of one integer or more, not a mixture or anything else")
        return pad_rows(corpus, 0)
    if not isinstance(corpus, Tensor):
        return None
    if corpus.ndim != 2 or corpus.is_floating_point() or not corpus.numel():
        raise CutawayError(f"rows of token ids are integers [n, p]; got {list(corpus.shape)} of {corpus.dtype}")
    return corpus.long(), None


def token_shapes(lm: Harvesting, sites: str | Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Each site's shape at one token. Raises for sites that have no value of their own at each token."""
    table = lm.sites()
    shapes: dict[str, tuple[int, ...]] = {}
    for name in table.expand_all(sites):
        site = table[name]
        if site.dims.split()[:2] != ["b", "p"]:
            raise CutawayError(
                f"'{name}' is [{site.dims}], a number for each pair of tokens, which grows with the square of the "
                "context: a harvest keeps sites with one vector per token; capture patterns with lm.run"
            )
        shapes[name] = tuple(int(part) for part in site.shape[2:])
    if not shapes:
        raise CutawayError("a harvest needs at least one site, such as 'blocks.3.resid_post'")
    return shapes


class _Buffer:
    """Room for one shard, filled in place and used again for the next but one."""

    def __init__(self, plan: _Plan) -> None:
        size = plan.shard_tokens if plan.limit is None else min(plan.shard_tokens, plan.limit)
        self.tensors = {name: torch.empty((size, *shape), dtype=plan.dtype) for name, shape in plan.sites.items()}
        self.tensors |= {name: torch.empty(size, dtype=dtype) for name, dtype in COLUMNS.items()}
        self.rows = 0
        self.high_norm: dict[str, int] = {}

    def add(self, name: str, values: Tensor) -> None:
        self.tensors[name][self.rows : self.rows + len(values)].copy_(values.reshape(-1, *self.tensors[name].shape[1:]))

    def take(self, name: str, values: Tensor, places: Tensor) -> None:
        """The values [b, p, ...] at `places` (int [n, 2]), without a copy in between where the buffer allows it."""
        room = self.tensors[name][self.rows : self.rows + len(places)]
        flat = (places[:, 0] * values.shape[1] + places[:, 1]).to(values.device)
        source = values.flatten(0, 1).reshape(-1, *room.shape[1:])
        if (source.dtype, source.device) == (room.dtype, room.device):
            torch.index_select(source, 0, flat, out=room)
        else:
            room.copy_(source.index_select(0, flat))

    def filled(self) -> dict[str, Tensor]:
        return {name: tensor[: self.rows] for name, tensor in self.tensors.items()}


@dataclass
class _Ring:
    """Two buffers: one is filled while a thread writes the other."""

    plan: _Plan
    sink: Memory | Folder
    executor: ThreadPoolExecutor
    free: list[_Buffer] = field(default_factory=list)
    open: _Buffer | None = None
    writing: Future[None] | None = None
    made: int = 0

    def current(self) -> _Buffer:
        if self.open is None:
            if not self.free and self.made == 2:
                self.wait()
            if not self.free:
                self.free.append(_Buffer(self.plan))
                self.made += 1
            self.open = self.free.pop()
            self.open.rows, self.open.high_norm = 0, {}
        return self.open

    def close(self, number: int, reading: Reading) -> None:
        """Hand the open buffer to the writer as shard `number`, once the one before is written."""
        buffer = self.current()
        self.open = None
        self.wait()
        facts = reading.documents, self.plan.given or reading.digest.hexdigest()

        def write() -> None:
            tensors = buffer.filled()
            _check_finite(tensors, self.plan)
            self.sink.write(number, tensors, Written(buffer.rows, buffer.high_norm, *facts))
            self.free.append(buffer)

        self.writing = self.executor.submit(write)

    def wait(self) -> None:
        if self.writing is not None:
            self.writing.result()
            self.writing = None


def _check_finite(tensors: dict[str, Tensor], plan: _Plan) -> None:
    for name in plan.sites:
        # a sum is many times faster, and finite only if all is; where it is not, it may have been too large itself
        total = tensors[name].sum(dtype=torch.float32)
        if not bool(torch.isfinite(total)) and not bool(torch.isfinite(tensors[name]).all()):
            stored = str(plan.dtype).removeprefix("torch.")
            raise CutawayError(
                f"'{name}' has values that are not finite as {stored}: the model gave them so, or they are beyond "
                f"{torch.finfo(plan.dtype).max:.4g}, the largest {stored}; store bfloat16 or float32"
            )


def _fill(plan: _Plan, sink: Memory | Folder, done: dict[int, Written]) -> None:
    """Run what is missing: every shard that is this process's and not in `done`."""
    lm, size = plan.lm, plan.shard_tokens
    reading = Reading(marks=Marks(lm.tokenizer, plan.header["source"]))
    thresholds = _thresholds(plan) if sink.thresholds is None else sink.thresholds
    sink.begin(thresholds)
    counts = {"read": 0, "padding": 0, "first_position": 0, "bos": 0, "beyond_limit": 0}
    total = closed = 0
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cutaway-harvest")
    ring = _Ring(plan, sink, executor)
    begun, names = time.monotonic(), list(plan.sites)
    with Progress("harvesting", _to_do(plan, sink, done), unit="tokens") as progress:
        try:
            for batch in plan.read(reading):
                keep, found = plan.rules.keep(batch, lm.bos_id)
                for name, number in found.items():
                    counts[name] += number
                places = keep.nonzero()
                if plan.limit is not None:
                    counts["beyond_limit"] += max(0, len(places) - (plan.limit - total))
                    places = places[: plan.limit - total]
                first, total = total, total + len(places)
                touched = range(first // size, -(-total // size)) if total > first else range(0)
                missing = [shard for shard in touched if sink.mine(shard) and shard not in done]
                values = lm.run(batch.tokens().to(lm.device), capture=names, logits=None) if missing else None
                for shard in touched:
                    if shard in missing:
                        part = places[max(0, shard * size - first) : (shard + 1) * size - first]
                        _add(ring.current(), plan, batch, part, values, thresholds)
                        progress.advance(len(part), note=_left(begun, plan, reading))
                    if total >= (shard + 1) * size:
                        closed = shard + 1
                        _close(shard, ring, sink, done, reading, shard in missing)
                if plan.limit is not None and total >= plan.limit:
                    break
            if total > closed * size:
                _close(closed, ring, sink, done, reading, sink.mine(closed) and closed not in done)
                closed += 1
            ring.wait()
        finally:
            executor.shutdown(wait=True)
    if not total:
        raise CutawayError(f"{plan.header['source']} has no token that the rules keep; nothing was harvested")
    counts["beyond_context"] = reading.truncated_tokens
    digest = plan.given or reading.digest.hexdigest()
    sink.end(closed, {**counts, "kept": total}, digest, reading.documents)


def _close(
    shard: int, ring: _Ring, sink: Memory | Folder, done: dict[int, Written], reading: Reading, missing: bool
) -> None:
    if missing:
        ring.close(shard, reading)
    elif shard in done and (done[shard].documents, done[shard].prefix) != (
        reading.documents,
        ring.plan.given or reading.digest.hexdigest(),
    ):
        raise CutawayError(
            f"the corpus is not the one that {sink.name} was begun with (it differs before document "
            f"{reading.documents}); name another folder"
        )


def _to_do(plan: _Plan, sink: Memory | Folder, done: dict[int, Written]) -> int | None:
    """Tokens that this process has to run, where that is known beforehand."""
    if plan.limit is None or plan.limit > 1_000_000 * plan.shard_tokens:  # no corpus has so many
        return None
    ends = range(0, plan.limit, plan.shard_tokens)
    sizes = {number: min(plan.shard_tokens, plan.limit - begin) for number, begin in enumerate(ends)}
    return sum(size for number, size in sizes.items() if sink.mine(number) and number not in done)


def _left(begun: float, plan: _Plan, reading: Reading) -> str | None:
    """How long it still takes, where that is only known from how much of the corpus was read."""
    if plan.limit is not None or not plan.size or not reading.bytes:
        return None
    share = min(1.0, reading.bytes / plan.size)
    return f"{share:.0%} of the corpus, {duration((time.monotonic() - begun) * (1 - share) / share)} left"


def _add(
    buffer: _Buffer, plan: _Plan, batch: RowBatch, places: Tensor, values: Any, thresholds: dict[str, float]
) -> None:
    """Put the tokens at `places` (int [n, 2]) of a batch into a shard's buffer."""
    if thresholds:
        high = torch.zeros(len(places), dtype=torch.bool)
        for name in plan.sites:
            value = values[name][places.to(values[name].device).unbind(1)]
            above = (value.flatten(1).float().norm(dim=1) > thresholds[name]).cpu()
            buffer.high_norm[name] = buffer.high_norm.get(name, 0) + int(above.sum())
            high |= above
        places = places[~high]
    row, column = places.unbind(1)
    for name in plan.sites:
        buffer.take(name, values[name], places)
    columns = {
        "token": batch.ids[row, column],
        "document": batch.document[row, column],
        "offset": batch.offset[row, column],
        "position": column,
        "row": row + batch.first_row,
    }
    for name, value in columns.items():
        buffer.add(name, value)
    buffer.rows += len(places)


def _thresholds(plan: _Plan) -> dict[str, float]:
    """The norm above which a token is left out, for each site; empty without that rule."""
    if plan.rules.high_norm is None:
        return {}
    norms: dict[str, list[Tensor]] = {name: [] for name in plan.sites}
    seen = 0
    for batch in plan.read(Reading()):
        keep = plan.rules.keep(batch, plan.lm.bos_id)[0].to(plan.lm.device)
        values = plan.lm.run(batch.tokens().to(plan.lm.device), capture=list(plan.sites), logits=None)
        for name, found in norms.items():
            found.append(values[name][keep.to(values[name].device)].flatten(1).float().norm(dim=1).cpu())
        seen += int(keep.sum())
        if seen >= _CALIBRATION_TOKENS:
            break
    if not seen:
        raise CutawayError(f"{plan.header['source']} has no token that the rules keep; nothing was harvested")
    return {name: plan.rules.high_norm * float(torch.cat(found).median()) for name, found in norms.items()}
