"""Where the shipped atlas lies, and whether a folder of such weights is whole.

Atlas is a Hugging Face folder like any other; its place inside the package is all that is special about it.
"""

import os
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.files import atomic_folder, parse_json, read_bytes, read_json, write_json
from cutaway.artifacts.manifest import file_hash
from cutaway.model.named import SHIPPED, named_folder

MANIFEST = "manifest.json"


def atlas_folder() -> Path:
    """The folder of the shipped weights: config, tokenizer, chat template, safetensors, manifest.

    Raises:
        CutawayError: The package was installed without them.
    """
    folder = weights_folder(SHIPPED)
    if not (folder / "model.safetensors").is_file():
        raise CutawayError(f"the weights of atlas are missing from {folder}: install cutaway again")
    return folder


def weights_folder(name: str) -> Path:
    """The folder of the weights that a name or path names: "atlas", other ones ("atlas-1", ...), or a folder.

    Raises `CutawayError` for other weights where the package stands without its repository.
    """
    return named_folder(name) or Path(name)


def shipped_dictionary(site: str) -> Path:
    """The folder of the dictionary of that site that ships with atlas.

    Raises `CutawayError` when there is none, with the sites that have one.
    """
    folder = Path(str(files("cutaway.subjects.atlas"))) / "dictionaries"
    if "/" in site or not (folder / site / "cfg.json").is_file():
        names = ", ".join(sorted(path.name for path in folder.glob("*") if path.is_dir())) or "none"
        raise CutawayError(f"no dictionary of '{site}' ships with atlas; there are: {names}")
    return folder / site


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the weights in `folder` are: corpus, seed, tokens, recipe, and a SHA-256 for each file beside it."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CutawayError(f"{folder} has no {MANIFEST}: it was not written by `cutaway subjects train`")
    record = read_json(path)
    if not isinstance(record, dict):
        raise CutawayError(f"{path} is damaged: it is no object")
    return record


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a training's log, each with tokens, loss and tokens_per_second."""
    again = f"{path} is damaged, remove it, or begin again with --overwrite"
    records = [parse_json(line, f"{again}: a line") for line in read_bytes(path).splitlines()]
    for record in records:
        wanted = ("tokens", "loss", "tokens_per_second")
        if not isinstance(record, dict) or not all(isinstance(record.get(name), (int, float)) for name in wanted):
            raise CutawayError(again)
    return records


def altered_files(folder: Path) -> list[str]:
    """Names of files that differ from the folder's manifest or are missing; an empty list means all is as written."""
    recorded = read_manifest(folder).get("files")
    if not isinstance(recorded, dict) or any(os.path.basename(name) != name for name in recorded):
        raise CutawayError(f"{folder / MANIFEST} is damaged: it does not say which files lie beside it")
    return [name for name, sha in recorded.items() if not (folder / name).is_file() or file_hash(folder / name) != sha]


def write_pair(out: Path, other: str = "atlas-1") -> dict[str, str]:
    """Copy the shipped weights and other ones into `out`, a folder each, for comparing two trainings of one model.

    Writes `manifest.json` beside them and returns what it says: name to SHA-256 of the weights. Raises `CutawayError`
    when `out` exists or the other weights are not at hand.
    """
    if out.exists():
        raise CutawayError(f"{out} exists: name another folder, or remove it")
    folders = {SHIPPED: atlas_folder(), Path(other).name: weights_folder(other)}
    for name, folder in folders.items():
        if not (folder / "model.safetensors").is_file():
            raise CutawayError(f"{folder} holds no model.safetensors: the pair cannot be made with {name}")
    hashes = {name: file_hash(folder / "model.safetensors") for name, folder in folders.items()}
    with atomic_folder(out) as fresh:
        for name, folder in folders.items():
            shutil.copytree(folder, fresh / name)
        write_json(fresh / MANIFEST, {"pair": hashes})
    return hashes
