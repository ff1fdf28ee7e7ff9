"""Where the shipped atlas lies, and whether a folder of such weights is whole.

Atlas is a Hugging Face folder like any other; its place inside the package is all that is special about it.
"""

from importlib.resources import files
from pathlib import Path
from typing import Any

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.files import read_json
from cutaway.artifacts.manifest import file_hash

MANIFEST = "manifest.json"


def atlas_folder() -> Path:
    """The folder of the shipped weights: config, tokenizer, chat template, safetensors, manifest.

    Raises `CutawayError` when the package was installed without them.
    """
    folder = Path(str(files("cutaway.subjects.atlas"))) / "weights"
    if not (folder / "model.safetensors").is_file():
        raise CutawayError(f"the weights of atlas are missing from {folder}: install cutaway again")
    return folder


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
    return read_json(path)


def altered_files(folder: Path) -> list[str]:
    """Names of files that differ from the folder's manifest or are missing; an empty list means all is as written."""
    recorded: dict[str, str] = read_manifest(folder)["files"]
    return [name for name, sha in recorded.items() if not (folder / name).is_file() or file_hash(folder / name) != sha]
