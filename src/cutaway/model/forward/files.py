"""Runs from disk: what `Run.save` wrote, checked and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, StrictInt, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cutaway.artifacts.errors import BadFile
from cutaway.artifacts.files import read_json
from cutaway.artifacts.manifest import Manifest, ModelIdentity
from cutaway.model.edits.edit import Receipt
from cutaway.model.edits.files import load_edits
from cutaway.model.forward.run import FORMAT, VERSION, Gradients, Run, run_hashes
from cutaway.model.sites import KINDS, Site, SiteKind, SiteTable, layer_of, template_of
from cutaway.model.tokens import Tokens


class _Held(BaseModel):
    """A captured site: its dimensions and meaning as they were, and the shape in the site table."""

    model_config = ConfigDict(extra="forbid")
    name: str
    dims: str
    meaning: str
    shape: list[StrictInt | str]


class _Receipt(BaseModel):
    model_config = ConfigDict(extra="forbid")
    edit: StrictInt
    kind: str
    site: str
    layer: StrictInt | None
    rows: tuple[StrictInt, ...]
    positions: tuple[tuple[StrictInt, ...], ...]
    heads: tuple[StrictInt, ...] | None
    n_tokens: StrictInt
    mean_abs_delta: float
    mean_abs_before: float
    mean_abs_after: float
    neurons: tuple[StrictInt, ...] | None


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    format: str
    version: int
    manifest: dict[str, Any]
    model: str
    n_layers: StrictInt
    tokens: list[list[str]]
    sites: list[_Held]
    receipts: list[_Receipt]
    hashes: dict[str, str]


def load_run(folder: str | Path) -> Run:
    """A run that `Run.save` wrote: logits, captures, gradients, tokens, receipts, edits and manifest, bit for bit.

    Its tensors are on the CPU. It serves as the source of patches of the model that it was made with.

    Args:
        folder: the folder that `Run.save` returned.

    Returns:
        The run.

    Raises:
        BadFile: a file that is absent, of another format or version, damaged, or changed since it was written.

    Example:
        lm.run(prompt, capture="blocks.3.resid_post").save("my-run")
        cutaway.load_run("my-run")["blocks.3.resid_post"]
    """
    folder = Path(folder)
    file = folder / "run.json"
    data = read_json(file)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise BadFile(f"{file} holds no run that can be loaded; write it with run.save(folder).")
    if data.get("version") != VERSION:
        raise BadFile(
            f"{file} is of version {data.get('version')!r} of the format, and this cutaway reads version {VERSION}."
        )
    try:
        record = _File.model_validate(data)
        manifest = Manifest.from_json(record.manifest)
    except (ValidationError, KeyError, TypeError) as error:
        raise BadFile(f"{file} is damaged: {str(error).splitlines()[0]}") from error
    if manifest.model is None:
        raise BadFile(f"{file} is damaged: its manifest names no model.")
    tensors = _tensors(folder / "run.safetensors", record)
    tokens = Tokens(tensors["tokens.ids"], tensors["tokens.mask"], tuple(tuple(row) for row in record.tokens))
    table = _site_table(record)
    identity: ModelIdentity = manifest.model
    edits = load_edits(folder)
    for name, found in run_hashes(folder, data).items():
        if record.hashes.get(name) != found:
            raise BadFile(f"{folder / name} was changed after it was written; run it again, or restore it.")
    return Run(
        tokens=tokens,
        logits=tensors.get("logits"),
        captured={held.name: tensors[f"value:{held.name}"] for held in record.sites},
        grads=Gradients({k.removeprefix("grad:"): t for k, t in tensors.items() if k.startswith("grad:")}, table),
        receipts=tuple(Receipt(**receipt.model_dump()) for receipt in record.receipts),
        edits=edits,
        site_table=table,
        model=record.model,
        identity=lambda: identity,
        manifest=manifest,
    )


def _tensors(file: Path, record: _File) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as held:
            tensors = {key: held.get_tensor(key) for key in [*held.keys()]}
    except (SafetensorError, OSError, ValueError) as error:
        raise BadFile(f"{file} is absent, damaged or no safetensors file: {error}") from error
    needed = ["tokens.ids", "tokens.mask", *(f"value:{held.name}" for held in record.sites)]
    for name in needed:
        if name not in tensors:
            raise BadFile(f"{file} lacks '{name}', which the run.json beside it names; they are no pair.")
    ids = tensors["tokens.ids"]
    if ids.ndim != 2 or len(record.tokens) != len(ids):
        raise BadFile(f"{file} is damaged: its tokens are not those of the run.json beside it.")
    for held in record.sites:
        value = tensors[f"value:{held.name}"]
        sizes = [part if isinstance(part, int) else None for part in held.shape]
        good = value.ndim == len(sizes) and len(value) == len(ids)
        if not good or any(size not in (None, n) for size, n in zip(sizes, value.shape, strict=False)):
            raise BadFile(f"{file} is damaged: '{held.name}' has the shape {list(value.shape)}.")
    return tensors


def _site_table(record: _File) -> SiteTable:
    """The sites that the run holds; every other is absent, for it was not kept."""
    held = {s.name: s for s in record.sites}
    names = [
        kind.name.replace("{l}", str(layer))
        for kind in KINDS.values()
        for layer in (range(record.n_layers) if kind.per_layer else [0])
    ]
    sites = []
    for name in [*held, *(name for name in names if name not in held)]:
        kept = held.get(name)
        template = template_of(name)
        kind = SiteKind(template, kept.dims, kept.meaning) if kept is not None else KINDS[template]
        shape = tuple(kept.shape) if kept is not None else tuple(kind.dims.split())
        absent = None if kept is not None else "the run that was saved did not capture it"
        sites.append(Site(name, kind, layer_of(name), shape, absent))
    return SiteTable(sites, record.n_layers)
