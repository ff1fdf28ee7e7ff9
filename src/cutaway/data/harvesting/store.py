"""Activations in shards, on disk or in memory, each vector with the token it belongs to.

    store = Store.open("activations/")
    store[5]["blocks.3.resid_post"]                  # [d], with .token, .document, .offset, .position, .row
    for batch in store.batches(4096, seed=0):        # all tokens in a shuffled order; start= enters anywhere
        batch["blocks.3.resid_post"]                 # [4096, d]

A store on disk is a folder: `manifest.json` and the shards, which are safetensors (mapped into memory, so only what is
read is loaded) or Parquet (decoded a shard at a time).
"""

import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, StrictInt, ValidationError
from torch import Tensor

from cutaway.artifacts.errors import BadFile, CutawayError, NoSuchSite
from cutaway.artifacts.files import parquet_errors, read_json, write_parquet, write_safetensors
from cutaway.artifacts.manifest import Manifest, file_hash
from cutaway.data.harvesting.permutation import Permutation

_KIND = "activations"
MANIFEST = "manifest.json"
COLUMNS = {
    "token": torch.int32,
    "document": torch.int64,
    "offset": torch.int32,
    "position": torch.int32,
    "row": torch.int64,
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_OPEN_SHARDS = 64
_DECODED_BYTES = 1 << 30


@dataclass(frozen=True, eq=False)
class Activations:
    """Vectors of n tokens (or of one, without the first dimension) and where each comes from; index it by site."""

    values: Mapping[str, Tensor]
    """By site [n, ...]."""
    token: Tensor
    """Token ids [n]."""
    document: Tensor
    """Numbers of documents [n]."""
    offset: Tensor
    """The token's place in its document [n]; -1 for a beginning-of-text that was put before a row."""
    position: Tensor
    """The token's place in the row that the model read [n]."""
    row: Tensor
    """Numbers of rows that the model read [n]."""

    def __getitem__(self, site: str) -> Tensor:
        return self.values[site]

    def __len__(self) -> int:
        return len(self.token)


@dataclass(frozen=True)
class Shard:
    """One file of a store; `rows` tokens, the file's size and SHA-256."""

    file: str
    rows: int
    bytes: int
    sha256: str


class _ShardRecord(BaseModel):
    file: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")  # never a path out of the folder
    rows: StrictInt = Field(ge=0)
    bytes: StrictInt = Field(ge=0)
    sha256: str


class _Record(BaseModel):
    """What `manifest.json` says beside what a harvest compares."""

    manifest: dict[str, Any]
    sites: dict[str, list[Annotated[StrictInt, Field(ge=0)]]]
    dtype: Literal["float32", "float16", "bfloat16"]
    format: Literal["safetensors", "parquet"]
    counts: dict[str, StrictInt | dict[str, StrictInt]]
    thresholds: dict[str, float]
    shards: list[_ShardRecord]


def _record(file: Path, info: Mapping[str, Any]) -> _Record:
    try:
        return _Record.model_validate(info)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadFile(f"{file} is damaged at {where}: {first['msg']}; take it from a backup") from error


class Store:
    """A set of activations that can be read anywhere. Make one with `harvest`, or `Store.open` a folder.

    An int gives one token, a slice or a list several (`Activations`); `len` is the number of tokens.

    Args:
        manifest: Model, corpus, settings.
        sites: By site, the shape of one token's value.
        dtype: "float32", "float16" or "bfloat16".
        counts: How many tokens were read, and how many each rule left out.
        thresholds: By site, the norm above which a token was left out, where that rule is on.
        shards: The files, or what stands in their place.
        read: Gives the tensors of a shard by its number.
        folder: Where the shards are; None in memory.
    """

    def __init__(
        self,
        *,
        manifest: Manifest,
        sites: Mapping[str, Sequence[int]],
        dtype: str,
        counts: Mapping[str, Any],
        thresholds: Mapping[str, float],
        shards: Sequence[Shard],
        read: Callable[[int], Mapping[str, Tensor]],
        folder: Path | None = None,
    ) -> None:
        self.manifest = manifest
        self.sites = {site: tuple(shape) for site, shape in sites.items()}
        self.dtype = DTYPES[dtype]
        self.counts = counts
        self.thresholds = thresholds
        self.shards = tuple(shards)
        self.folder = folder
        self._read = read
        self._bounds = np.cumsum([0, *(shard.rows for shard in self.shards)])

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = False) -> "Store":
        """The finished store in a folder.

        Args:
            folder: Where `harvest` wrote it.
            verify: Read every shard and compare its hash.

        Returns:
            The store; nothing but its manifest is in memory.

        Raises:
            BadFile: No store or an unfinished one there, a shard that is missing or was cut short; with `verify` also
                one that was changed.
        """
        folder = Path(folder)
        record = _record(folder / MANIFEST, read_manifest(folder))
        shards = [Shard(**shard.model_dump()) for shard in record.shards]
        width = sum(math.prod(shape) for shape in record.sites.values()) * DTYPES[record.dtype].itemsize
        for shard in shards:
            _check_size(folder, shard)
            # Parquet is compressed, but not by so much
            if shard.rows * (width + 28) > shard.bytes * (1 if record.format == "safetensors" else 1000):
                raise BadFile(f"{folder / MANIFEST} is damaged: {shard.file} cannot hold {shard.rows:,} tokens")
        reader = _Reader(folder, shards, record.sites, record.dtype, record.format)
        store = cls(
            manifest=Manifest.from_json(record.manifest),
            sites=record.sites,
            dtype=record.dtype,
            counts=record.counts,
            thresholds=record.thresholds,
            shards=shards,
            read=reader,
            folder=folder,
        )
        if verify:
            store.verify()
        return store

    def verify(self) -> None:
        """Read every shard of a store on disk and compare its hash; `BadFile` names the first that differs."""
        for shard in self.shards if self.folder is not None else ():
            assert self.folder is not None
            _check_size(self.folder, shard)
            if file_hash(self.folder / shard.file) != shard.sha256:
                raise BadFile(
                    f"{self.folder / shard.file} is not what was written: its SHA-256 differs; harvest again into "
                    "another folder, or take it from a backup"
                )

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def __getitem__(self, index: Any) -> Activations:
        """One token (an int), or several (a slice, or a list, array or tensor of ints)."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"the store has {len(self)} tokens, so there is no token {index}")
            one = self.take(np.asarray([index % len(self)]))
            return _map(one, lambda x: x[0])
        if isinstance(index, slice):
            return self.take(np.arange(*index.indices(len(self))))
        chosen = np.asarray(index.cpu() if isinstance(index, Tensor) else index, dtype=np.int64)
        if chosen.size and not (-len(self) <= chosen.min() and chosen.max() < len(self)):
            raise IndexError(f"the store has {len(self)} tokens, so there is no token {int(chosen.max())}")
        return self.take(chosen % max(1, len(self)))

    def take(self, index: np.ndarray, sites: Sequence[str] | None = None) -> Activations:
        """Some tokens in an order of one's own.

        Args:
            index: Their places, int [n], 0 ≤ index < len.
            sites: Which sites; all if None.

        Returns:
            The tokens in the order of `index`.
        """
        names = self._names(sites)
        out = {name: torch.empty((len(index), *self.sites[name]), dtype=self.dtype) for name in names}
        out |= {name: torch.empty(len(index), dtype=dtype) for name, dtype in COLUMNS.items()}
        where = np.searchsorted(self._bounds, index, side="right") - 1
        for number in np.unique(where):
            tensors = self._read(int(number))
            places = np.flatnonzero(where == number)
            places = places[np.argsort(index[places], kind="stable")]  # forward through the file
            local = torch.from_numpy(index[places] - self._bounds[number])
            at = torch.from_numpy(places)
            for name, tensor in out.items():
                tensor[at] = tensors[name][local]
        return Activations({name: out[name] for name in names}, **{name: out[name] for name in COLUMNS})

    def batches(
        self,
        size: int,
        *,
        sites: Sequence[str] | None = None,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> Iterator[Activations]:
        """All tokens once, some at a time; memory is that of a batch.

        The order is one permutation of the whole store, so batch t depends on t and the arguments alone.

        Args:
            size: Tokens per batch.
            sites: Which sites; all if None.
            seed: Of the order.
            epoch: Another order of the same seed.
            start: The batch to begin with.
            shuffle: False: in the order of the corpus.
            drop_last: Leave out the last batch where it is shorter.

        Returns:
            An iterator over batches.

        Raises:
            CutawayError: The size is below 1, or the store has no such site.
        """
        if size < 1:
            raise CutawayError(f"a batch of {size} tokens is none; give 1 or more")
        names = self._names(sites)
        order = Permutation(len(self), seed, epoch) if shuffle else None
        whole = len(self) // size if drop_last else -(-len(self) // size)
        for number in range(start, whole):
            places = np.arange(number * size, min((number + 1) * size, len(self)))
            yield self.take(places if order is None else order[places], names)

    def _names(self, sites: Sequence[str] | None) -> list[str]:
        names = list(self.sites) if sites is None else [sites] if isinstance(sites, str) else list(sites)
        if missing := [name for name in names if name not in self.sites]:
            raise NoSuchSite(f"the store has no site '{missing[0]}'; it has {', '.join(self.sites)}")
        return names

    def __repr__(self) -> str:
        model = "" if self.manifest.model is None else f" of {self.manifest.model.name}"
        shards = "1 shard" if len(self.shards) == 1 else f"{len(self.shards)} shards"
        lines = [f"Store: {len(self):,} tokens{model}, {str(self.dtype).removeprefix('torch.')}, {shards}"]
        lines += [f"  site    {site} {list(shape)}" for site, shape in self.sites.items()]
        numbers = {name.replace("_", " "): value for name, value in self.counts.items() if isinstance(value, int)}
        lines.append("  tokens  " + ", ".join(f"{name} {value:,}" for name, value in numbers.items()))
        for site, number in self.counts.get("high_norm_by_site", {}).items():
            above = self.thresholds.get(site, float("nan"))
            lines.append(f"  norm    above {above:.4g} at {site}: {number:,} tokens left out")
        return "\n".join(lines)


def _map(rows: Activations, change: Callable[[Tensor], Tensor]) -> Activations:
    values = {site: change(value) for site, value in rows.values.items()}
    return Activations(values, **{name: change(getattr(rows, name)) for name in COLUMNS})


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `manifest.json` of a finished store says; `CutawayError` when there is none."""
    if not os.path.isdir(folder):  # of os.path, since Path's own raises for names that are too long
        raise BadFile(f"{folder} is no folder of activations: there is no such folder")
    if not (folder / MANIFEST).exists():
        if any(folder.glob("journal-*.jsonl")):
            raise BadFile(f"{folder} holds a harvest that is not finished; run the same harvest again to go on")
        raise BadFile(f"{folder} is no folder of activations: it has no {MANIFEST}")
    info = read_json(folder / MANIFEST)
    manifest = info.get("manifest") if isinstance(info, dict) else None
    if not isinstance(manifest, dict) or manifest.get("kind") != _KIND:
        raise BadFile(f"{folder / MANIFEST} describes something else than activations")
    return info


def _check_size(folder: Path, shard: Shard) -> None:
    path = folder / shard.file
    if not path.is_file():
        raise BadFile(
            f"{path} is missing: the manifest lists it; harvest again into another folder, or take it from a backup"
        )
    if (size := path.stat().st_size) != shard.bytes:
        raise BadFile(
            f"{path} has {size:,} bytes instead of {shard.bytes:,}: it was cut short or replaced; harvest again into "
            "another folder, or take it from a backup"
        )


class _Reader:
    """Shards as tensors; the last ones read stay open (safetensors) or decoded (Parquet, up to a bound in bytes)."""

    def __init__(
        self, folder: Path, shards: Sequence[Shard], sites: Mapping[str, Sequence[int]], dtype: str, file_format: str
    ) -> None:
        self.folder, self.shards, self.sites, self.dtype, self.format = folder, shards, sites, dtype, file_format
        self._kept: OrderedDict[int, Mapping[str, Tensor]] = OrderedDict()

    def __call__(self, number: int) -> Mapping[str, Tensor]:
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        shard = self.shards[number]
        path = self.folder / shard.file
        tensors = _read_shard(path, self.format, self.sites, self.dtype)
        for name, shape in {**self.sites, **dict.fromkeys(COLUMNS, ())}.items():
            if name not in tensors or tensors[name].shape != (shard.rows, *shape):
                raise BadFile(f"{path} does not hold what the manifest says: '{name}' is missing or misshapen")
            if tensors[name].dtype != COLUMNS.get(name, DTYPES[self.dtype]):
                raise BadFile(f"{path} does not hold what the manifest says: '{name}' is {tensors[name].dtype}")
        limit = _OPEN_SHARDS if self.format == "safetensors" else max(1, _DECODED_BYTES // max(1, shard.bytes))
        while len(self._kept) >= limit:
            self._kept.popitem(last=False)
        self._kept[number] = tensors
        return tensors


def write_shard(
    path: Path, file_format: str, tensors: Mapping[str, Tensor], sites: Mapping[str, Sequence[int]]
) -> None:
    """Write one shard: tensors [n, ...] of every site and column."""
    if file_format == "safetensors":
        write_safetensors(path, tensors)
        return
    import pyarrow as pa

    columns: dict[str, Any] = {}
    for name, tensor in tensors.items():
        flat = pa.array(tensor.flatten().numpy())
        width = int(np.prod(sites[name])) if name in sites else 1
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, width) if name in sites else flat
    write_parquet(path, pa.table(columns))


def _read_shard(path: Path, file_format: str, sites: Mapping[str, Sequence[int]], dtype: str) -> Mapping[str, Tensor]:
    """The tensors of one shard; those of a safetensors file are mapped into memory, not read."""
    if file_format == "safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise BadFile(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    import pyarrow as pa
    import pyarrow.parquet

    found: dict[str, Tensor] = {}
    with parquet_errors(path):
        table = pyarrow.parquet.read_table(path)
        for name in table.column_names:
            column = table.column(name).combine_chunks()
            wide = name in sites
            kind = column.type.value_type if wide and pa.types.is_fixed_size_list(column.type) else column.type
            number = pa.types.is_floating(kind) if wide else pa.types.is_integer(kind)
            if not number or column.null_count or (name not in sites and name not in COLUMNS):
                raise BadFile(f"{path} does not hold what the manifest says: '{name}' is {column.type}")
            flat = column.flatten() if wide else column
            values = torch.from_numpy(np.array(flat.to_numpy(zero_copy_only=False)))
            if wide and len(values) != len(column) * int(np.prod(sites[name])):
                raise BadFile(f"{path} does not hold what the manifest says: '{name}' is misshapen")
            found[name] = values.to(DTYPES[dtype]).view(len(column), *sites[name]) if wide else values
    return found
