"""Where a harvest puts its shards, and how it knows after any interruption which of them are whole.

A folder has one journal for each process, `journal-RANK.jsonl`: what is harvested, then a line for each shard once it
lies under its name, then how many there are. When the journals together say that nothing is missing they become
`manifest.json`, and are removed.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Self

from pydantic import BaseModel, Field, StrictInt
from torch import Tensor

from cutaway.artifacts.errors import BadFile, CutawayError
from cutaway.artifacts.files import clear_leftovers, disk_errors, make_folder, parse_json, plain, write_json
from cutaway.artifacts.manifest import Manifest, file_hash
from cutaway.data.harvesting.store import MANIFEST, Shard, Store, read_manifest, write_shard

_SHARD = re.compile(r"^\.?shard-(\d+)\.(safetensors|parquet)(\.[0-9a-f]+\.tmp)?$")
_LONGEST_SILENCE = 3600.0
_QUICKLY_HASHED = 1 << 30  # bytes: a second or two
MakeManifest = Callable[[str, int], Manifest]


@dataclass(frozen=True)
class Written:
    """What a shard holds: its tokens, how many more were too long at each site, and the corpus up to its end."""

    rows: int
    high_norm: dict[str, int]
    documents: int
    prefix: str
    bytes: int = 0
    sha256: str = ""


class _Header(BaseModel):
    header: dict[str, Any]
    thresholds: dict[str, float]


class _Shard(BaseModel):
    shard: StrictInt = Field(ge=0)
    rows: StrictInt = Field(ge=0)
    high_norm: dict[str, StrictInt]
    documents: StrictInt = Field(ge=0)
    prefix: str
    bytes: StrictInt
    sha256: str


class _End(BaseModel):
    end: StrictInt = Field(ge=0)
    counts: dict[str, StrictInt]
    corpus_hash: str
    documents: StrictInt


_LINES: dict[str, type[BaseModel]] = {"header": _Header, "shard": _Shard, "end": _End}


class Memory:
    """Shards kept in memory, for a store that is not written."""

    name = "memory"
    thresholds: dict[str, float] | None = None

    def __init__(self) -> None:
        self._shards: dict[int, dict[str, Tensor]] = {}
        self._written: dict[int, Written] = {}

    def mine(self, shard: int) -> bool:
        return True

    def begin(self, thresholds: dict[str, float]) -> None:
        self.thresholds = thresholds

    def write(self, number: int, tensors: Mapping[str, Tensor], written: Written) -> None:
        self._shards[number] = {name: tensor.clone() for name, tensor in tensors.items()}
        self._written[number] = written

    def end(self, shards: int, counts: Mapping[str, int], corpus_hash: str, documents: int) -> None:
        self._end = counts, corpus_hash, documents

    def store(self, sites: Mapping[str, tuple[int, ...]], header: Mapping[str, Any], make: MakeManifest) -> Store:
        counts, corpus_hash, documents = self._end
        return Store(
            manifest=make(corpus_hash, documents),
            sites=sites,
            dtype=header["settings"]["dtype"],
            counts=_final_counts(counts, self._written.values()),
            thresholds=self.thresholds or {},
            shards=[Shard("", self._written[n].rows, 0, "") for n in sorted(self._written)],
            read=lambda number: self._shards[number],
        )


def _final_counts(counts: Mapping[str, int], written: Any) -> dict[str, Any]:
    """Tokens read, left out by each rule, and kept; tokens too long at a site are counted at each such site."""
    written = list(written)
    kept = sum(shard.rows for shard in written)
    by_site: dict[str, int] = {}
    for shard in written:
        for site, number in shard.high_norm.items():
            by_site[site] = by_site.get(site, 0) + number
    final: dict[str, Any] = {**counts, "high_norm": counts["kept"] - kept, "kept": kept}
    return {**final, "high_norm_by_site": by_site} if by_site else final


class Folder:
    """The folder of a harvest, and this process's journal in it, which nobody else may write meanwhile."""

    def __init__(self, path: Path, header: Mapping[str, Any], rank: int, world: int) -> None:
        self.path, self.rank, self.world = path, rank, world
        self.name = str(path)
        self.header = plain(header)
        self.complete = False
        self.done: dict[int, Written] = {}
        self.thresholds: dict[str, float] | None = None
        self._file: IO[bytes] | None = None
        self._made = False  # whether the folder was not there before
        self._begun = False  # whether this process's journal says what is harvested

    def __enter__(self) -> Self:
        clear_leftovers(self.path)
        if self._finished():
            self.complete = True
            return self
        if self.path.is_dir() and any(
            not entry.name.startswith(".") for entry in self.path.iterdir() if not self._is_ours(entry)
        ):
            raise BadFile(f"{self.path} holds other files; name an empty or a new folder for the activations")
        self._made = not self.path.exists()
        make_folder(self.path)
        with disk_errors(self._journal(self.rank)):
            self._file = open(self._journal(self.rank), "ab+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise CutawayError(f"another process is writing into {self.path}; wait for it, or stop it") from error
        self.complete = self._finished()  # another process may just have ended
        if not self.complete:
            for rank in self._ranks():
                self._take_over(rank)
            self._clean()
        return self

    def __exit__(self, _kind: object, error: object, _trace: object) -> None:
        if self._file is None:
            return
        if isinstance(error, CutawayError) and all("header" in line for line in self._lines(self.rank)):
            self._journal(self.rank).unlink(missing_ok=True)  # nothing to resume, and it would keep other input out
            if self._made:
                with contextlib.suppress(OSError):  # of another process, say
                    self.path.rmdir()
        self._file.close()

    # What a harvest does

    def mine(self, shard: int) -> bool:
        return shard % self.world == self.rank

    def begin(self, thresholds: dict[str, float]) -> None:
        self.thresholds = thresholds
        if not self._begun:
            self._append({"header": self.header, "thresholds": thresholds})

    def write(self, number: int, tensors: Mapping[str, Tensor], written: Written) -> None:
        settings = self.header["settings"]
        path = self.path / _shard_name(number, settings["format"])
        write_shard(path, settings["format"], tensors, settings["sites"])
        whole = {**asdict(written), "bytes": path.stat().st_size, "sha256": file_hash(path)}
        self._append({"shard": number, **whole})

    def end(self, shards: int, counts: Mapping[str, int], corpus_hash: str, documents: int) -> None:
        self._append({"end": shards, "counts": counts, "corpus_hash": corpus_hash, "documents": documents})

    def finish(self, make: MakeManifest, verify: bool = False) -> Store:
        """The store, once all processes have written theirs.

        Of one that was finished before, hashes are compared where that takes seconds, or with `verify`; else only the
        sizes, which a line on stderr says.
        """
        if self.complete:
            store = Store.open(self.path)
            held = sum(shard.bytes for shard in store.shards)
            if verify or held <= _QUICKLY_HASHED:
                store.verify()
            else:
                print(
                    f"cutaway: {self.path} was harvested before; its {held / 1e9:.1f} GB have the right sizes, and "
                    "--verify reads them and compares their hashes",
                    file=sys.stderr,
                )
            return store
        waited, seen = 0.0, -1
        while not (self._finished() or self._merge(make)):
            written = sum(1 for rank in self._ranks() for _ in self._lines(rank))
            waited, seen = (0.0, written) if written != seen else (waited + 0.2, seen)
            if waited > _LONGEST_SILENCE:
                raise BadFile(
                    f"this process has written its shards into {self.path}, but another has written none for an hour; "
                    "run the same command again to finish"
                )
            time.sleep(0.2)
        return Store.open(self.path)

    # How it is kept

    def _finished(self) -> bool:
        """Whether the folder holds this harvest, whole. Raises where it holds another."""
        if not (self.path / MANIFEST).exists():
            return False
        self._compare(read_manifest(self.path).get("header"))
        return True

    def _merge(self, make: MakeManifest) -> bool:
        """Write the manifest if no shard is missing. Several processes may do so: they write the same."""
        shards, end, thresholds = {}, None, {}
        for rank in self._ranks():
            for line in self._lines(rank):
                if "header" in line:
                    thresholds = line["thresholds"]
                elif "shard" in line:
                    shards[line["shard"]] = _written(line)
                else:
                    end = line
        if end is None or set(shards) != set(range(end["end"])):
            return False
        settings = self.header["settings"]
        record = {
            "manifest": make(end["corpus_hash"], end["documents"]).to_json(),
            "header": self.header,
            "sites": settings["sites"],
            "dtype": settings["dtype"],
            "format": settings["format"],
            "counts": _final_counts(end["counts"], shards.values()),
            "thresholds": thresholds,
            "shards": [
                asdict(Shard(_shard_name(number, settings["format"]), found.rows, found.bytes, found.sha256))
                for number, found in sorted(shards.items())
            ],
        }
        write_json(self.path / MANIFEST, record)
        for rank in self._ranks():
            self._journal(rank).unlink(missing_ok=True)
        return True

    def _journal(self, rank: int) -> Path:
        return self.path / f"journal-{rank:05d}.jsonl"

    def _ranks(self) -> list[int]:
        return sorted(int(path.stem.removeprefix("journal-")) for path in self.path.glob("journal-?????.jsonl"))

    def _lines(self, rank: int) -> Iterator[dict[str, Any]]:
        """The whole lines of a journal; a line that was cut short says nothing."""
        try:
            data = self._journal(rank).read_bytes()
        except FileNotFoundError:  # another process has just merged it
            return
        for line in data.split(b"\n")[:-1]:
            yield self._checked(rank, line)

    def _checked(self, rank: int, line: bytes) -> dict[str, Any]:
        """A line as it was written; raises where it is damaged."""
        again = f"delete {self.path} and harvest again"
        found = parse_json(line, f"{self._journal(rank)} is damaged, {again}: a line")
        known = isinstance(found, dict) and next((name for name in _LINES if name in found), None)
        try:
            if not known or found.keys() != _LINES[known].model_fields.keys():
                raise ValueError
            _LINES[known].model_validate(found)
        except ValueError as error:  # pydantic's too
            raise BadFile(f"{self._journal(rank)} is damaged; {again}") from error
        return found

    def _take_over(self, rank: int) -> None:
        """What a journal says is done. A last line that was cut short is taken off this process's own."""
        for line in self._lines(rank):
            if "header" in line:
                self._compare(line["header"])
                self.thresholds = line["thresholds"]
                self._begun |= rank == self.rank
            elif "shard" in line:
                self.done[line["shard"]] = _written(line)
        if rank == self.rank:
            assert self._file is not None
            data = self._journal(rank).read_bytes()
            self._file.truncate(data.rfind(b"\n") + 1)

    def _compare(self, header: Any) -> None:
        """Raise when a folder holds another harvest than the one asked for."""
        parts = {"fingerprint", "source", "settings", "model", "version"}
        whole = isinstance(header, dict) and parts <= header.keys() and isinstance(header["settings"], dict)
        if not whole:
            raise BadFile(f"what {self.path} says of its harvest is damaged; name another folder, or delete it")
        if self.header["fingerprint"] != header["fingerprint"]:
            raise BadFile(
                f"{self.path} was begun with another corpus ({header['source']}), or with this one before it changed; "
                "name another folder, or delete it"
            )
        asked, there = ({**h["settings"], "model": h["model"], "version": h["version"]} for h in (self.header, header))
        for key in asked:
            if asked[key] != there.get(key):
                raise BadFile(
                    f"{self.path} holds another harvest: its {key.replace('_', ' ')} is {_brief(there.get(key))}, not "
                    f"{_brief(asked[key])}; name another folder, or delete it"
                )

    def _is_ours(self, path: Path) -> bool:
        return _SHARD.match(path.name) is not None or re.match(r"^journal-\d{5}\.jsonl$", path.name) is not None

    def _clean(self) -> None:
        """Remove what a process that was killed left half done: this process's shards that no journal knows."""
        for path in self.path.iterdir():
            match = _SHARD.match(path.name)
            if match is None or not self.mine(number := int(match[1])):
                continue
            if path.is_dir():
                shutil.rmtree(path)
            elif match[3] or number not in self.done:
                path.unlink()
        for number, written in self.done.items():
            path = self.path / _shard_name(number, self.header["settings"]["format"])
            if self.mine(number) and (not path.is_file() or path.stat().st_size != written.bytes):
                raise BadFile(
                    f"{path} is missing or was cut short since it was written; delete {self.path} and harvest again"
                )

    def _append(self, line: Mapping[str, Any]) -> None:
        assert self._file is not None
        with disk_errors(self._journal(self.rank)):
            self._file.write(json.dumps(plain(line)).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())


def _written(line: Mapping[str, Any]) -> Written:
    return Written(**{key: value for key, value in line.items() if key != "shard"})


def _shard_name(number: int, file_format: str) -> str:
    return f"shard-{number:06d}.{file_format}"


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 else text[:57] + "…"
