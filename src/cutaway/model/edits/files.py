"""Edits on disk: `edits.json` says what is done, `edits.safetensors` holds the values, bit for bit.

Tensors are named by a hash of their content, so that several edits share one and a file that was changed is noticed.
Nothing that is read is executed; a function is only ever named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, StrictInt, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cutaway.artifacts.errors import BadFile, CutawayError
from cutaway.artifacts.files import read_json, take_folder, write_json, write_safetensors
from cutaway.artifacts.manifest import ModelIdentity
from cutaway.model.edits.edit import KINDS, PATCHES, Edit, edit_list, edit_record
from cutaway.model.edits.positions import AtToken, Columns, Places
from cutaway.model.edits.record import FILES, FORMAT, VERSION, Packed, tensor_record
from cutaway.model.edits.source import StoredSource
from cutaway.model.edits.values import registered_function
from cutaway.model.tokens import Tokens

# The wire, as it is read; `edit_record` is what is written


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _TensorRecord(_Record):
    hash: str
    dtype: str
    shape: list[StrictInt]


class _Slice(_Record):
    slice: tuple[StrictInt | None, StrictInt | None, StrictInt | None]


class _Mask(_Record):
    shape: tuple[StrictInt, StrictInt]
    columns: list[list[StrictInt]]


class _Token(_Record):
    text: str | None = None
    ids: list[StrictInt] | None = None
    occurrence: StrictInt | Literal["all"]
    missing: Literal["error", "skip"]


_Places = StrictInt | list[StrictInt] | list[list[StrictInt]] | _Slice | _Mask | _Token | None


class _Model(_Record):
    id: str
    revision: str | None
    weight_hash: str


class _Source(_Record):
    ids: _TensorRecord
    mask: _TensorRecord
    strings: list[list[str]]
    values: dict[str, _TensorRecord]
    rows: list[StrictInt]
    columns: list[StrictInt]
    model: _Model | None = None


class _Edit(_Record):
    kind: str
    site: str
    positions: _Places = None
    heads: list[StrictInt] | None = None
    neurons: list[StrictInt] | None = None
    rows: list[StrictInt] | None = None
    phase: Literal["all", "prompt", "new"] | tuple[StrictInt, StrictInt] = "all"
    tensors: dict[str, _TensorRecord] = {}
    numbers: dict[str, float] = {}
    source: _Source | None = None
    source_positions: _Places = None
    source_rows: list[StrictInt] | None = None
    seed: list[StrictInt] | None = None
    function: str | None = None
    other_model: bool = False


class _File(_Record):
    format: str
    version: int
    edits: list[_Edit]


def _places(record: Any) -> Places:
    if isinstance(record, _Slice):
        return slice(*record.slice)
    if isinstance(record, _Mask):
        good = len(record.columns) == record.shape[0] and all(
            0 <= c < record.shape[1] for row in record.columns for c in row
        )
        if not good:
            raise BadFile("a mask of positions names columns outside its own shape")
        return Columns(record.shape, tuple(tuple(row) for row in record.columns))
    if isinstance(record, _Token):
        return AtToken(
            record.text, None if record.ids is None else tuple(record.ids), record.occurrence, record.missing
        )
    if isinstance(record, list):
        return tuple(tuple(p) if isinstance(p, list) else p for p in record)
    return record


def save_edits(path: str | Path, edits: Edit | Sequence[Edit]) -> Path:
    """Write edits into a folder as `edits.json` and `edits.safetensors`; `load_edits` gives them back bit for bit.

    A patch from a run keeps the values that it needs, the source's tokens and its model's identity.

    Args:
        path: a new or empty folder, or one of earlier edits, which are replaced.
        edits: one edit or several.

    Returns:
        The folder.

    Raises:
        NotSupported: an edit of a dictionary's latents.
        CutawayError: a function that is not registered by name.

    Example:
        cutaway.save_edits("my-edits", cutaway.zero("blocks.3.mlp.out"))
    """
    folder, found = Path(path), edit_list(edits)
    for edit in found:
        edit.digest()  # refuses what cannot be saved, before anything is written
    packed = Packed()
    records = [edit_record(edit, packed, provenance=True) for edit in found]
    take_folder(folder, "edits", dict.fromkeys(FILES, FORMAT))
    # the values first: a reader that finds the JSON finds what it names
    write_safetensors(folder / "edits.safetensors", {k: t.cpu() for k, t in packed.tensors.items()}, {"format": FORMAT})
    write_json(folder / "edits.json", {"format": FORMAT, "version": VERSION, "edits": records})
    return folder


def load_edits(path: str | Path) -> tuple[Edit, ...]:
    """The edits that `save_edits` wrote into a folder, equal to what they were.

    Args:
        path: the folder.

    Returns:
        The edits, in order.

    Raises:
        BadFile: a file that is absent, of another format or a newer version, an unknown kind of edit, values that are
            missing, damaged or of another shape, a function that is not registered here.

    Example:
        lm.run(prompt, edits=cutaway.load_edits("my-edits"))
    """
    folder = Path(path)
    file = folder / "edits.json"
    wire = _read_wire(file)
    tensors = _read_tensors(folder / "edits.safetensors", wire)
    made = []
    for i, record in enumerate(wire.edits):
        try:
            made.append(_edit_from(record, tensors))
        except CutawayError as error:
            raise BadFile(f"Edit {i} of {file} is not usable: {error}") from error
    return tuple(made)


def _read_wire(file: Path) -> _File:
    data = read_json(file)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise BadFile(f"{file} holds no edits of cutaway; write them with cutaway.save_edits.")
    if data.get("version") != VERSION:
        raise BadFile(
            f"{file} is of version {data.get('version')!r} of the format, and this cutaway reads version {VERSION}; "
            "use the cutaway that wrote it, or a newer one."
        )
    for i, edit in enumerate(data["edits"] if isinstance(data.get("edits"), list) else []):
        if isinstance(edit, dict) and edit.get("kind") not in KINDS:
            raise BadFile(f"Edit {i} of {file} is of an unknown kind, {edit.get('kind')!r}.")
    try:
        return _File.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadFile(f"{file} is damaged at {where}: {first['msg']}") from error


def _records(wire: _File) -> Iterable[_TensorRecord]:
    for edit in wire.edits:
        yield from edit.tensors.values()
        if edit.source is not None:
            yield edit.source.ids
            yield edit.source.mask
            yield from edit.source.values.values()


def _read_tensors(file: Path, wire: _File) -> dict[str, Tensor]:
    wanted = {record.hash: record for record in _records(wire)}
    if not file.is_file():
        raise BadFile(f"{file} does not exist; it holds the values of the edits.json beside it.")
    tensors = {}
    try:
        with safe_open(file, framework="pt") as held:
            names = {*held.keys()}
            for key, record in wanted.items():
                if key not in names:
                    raise BadFile(f"{file} lacks values that the edits.json beside it names; they are no pair.")
                shape = list(held.get_slice(key).get_shape())
                if shape != record.shape:
                    raise BadFile(f"{file} is damaged: values of shape {record.shape} are {shape} there.")
                tensors[key] = held.get_tensor(key)
    except (SafetensorError, OSError, ValueError) as error:
        raise BadFile(f"{file} is damaged or no safetensors file: {error}") from error
    for key, tensor in tensors.items():
        if tensor_record(tensor)["hash"] != key:
            raise BadFile(f"{file} is damaged: values are not those that were written.")
    return tensors


def _edit_from(record: _Edit, tensors: Mapping[str, Tensor]) -> Edit:
    def back(values: list[int] | None) -> tuple[int, ...] | None:
        return None if values is None else tuple(values)

    if record.function is not None:
        registered_function(record.function)
    if (record.source is not None) > (record.kind in PATCHES):
        raise BadFile(f"an edit of the kind '{record.kind}' has no source")
    return Edit(
        kind=record.kind,  # type: ignore[arg-type]
        site=record.site,
        positions=_places(record.positions),
        heads=back(record.heads),
        rows=back(record.rows),
        phase=record.phase,
        tensors={name: tensors[t.hash] for name, t in record.tensors.items()},
        numbers=record.numbers,
        source=None if record.source is None else _source_from(record.source, tensors),
        source_positions=_places(record.source_positions),
        source_rows=back(record.source_rows),
        neurons=back(record.neurons),
        seed=back(record.seed),
        function=record.function,
        other_model=record.other_model,
    )


def _source_from(record: _Source, tensors: Mapping[str, Tensor]) -> StoredSource:
    tokens = Tokens(
        tensors[record.ids.hash], tensors[record.mask.hash].bool(), tuple(tuple(row) for row in record.strings)
    )
    values = {name: tensors[value.hash] for name, value in record.values.items()}
    n, width = tokens.ids.shape
    good = len(record.strings) == n and all(0 <= r < n for r in record.rows)
    good = good and all(0 <= c < width for c in record.columns) and bool(values)
    held = (len(record.rows), len(record.columns))
    if not good or any(tuple(value.shape[:2]) != held for value in values.values()):
        raise BadFile("the values of its source do not fit the tokens of the source")
    if record.model is None:
        raise BadFile("its source names no model")
    model = ModelIdentity(**record.model.model_dump())
    return StoredSource(tokens, values, tuple(record.rows), tuple(record.columns), model)
