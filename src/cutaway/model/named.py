"""What models are called: folders, hub ids, and the names of those that the package knows."""

import os
from importlib.resources import files
from pathlib import Path

from cutaway.artifacts.errors import CutawayError

SHIPPED = "atlas"
OTHERS = ("atlas-1", "atlas-2", "atlas-3")
"""Other weights of atlas, kept for comparison in the repository (`models/`), not in the package: those that ship, under
the name that stays theirs, and trainings that go on from them (docs/atlas-3.md)."""


def title_of(name: str) -> str:
    """What a model is called that is loaded by this name: a folder by its own name, without the path that leads there.

    Args:
        name: A path, a hub id, or a name known here; the last two stay as they are.
    """
    folder = os.path.expanduser(name)
    if named_folder(name) is not None or not os.path.isdir(folder):
        return name
    return os.path.basename(os.path.abspath(folder)) or name


def named_folder(name: str) -> Path | None:
    """The folder of a model that has a name of its own; None for any other name.

    Raises `CutawayError` for other weights where the package stands without its repository.
    """
    package = Path(str(files("cutaway")))
    if name == SHIPPED:
        return package / "subjects" / "atlas" / "weights"
    if name not in OTHERS or Path(name).is_dir():
        return None
    folder = package.parents[1] / "models" / name
    if not (folder / "model.safetensors").is_file():
        raise CutawayError(
            f"the weights of {name} are not in the package: name models/{name} in a checkout of the repository"
        )
    return folder
