"""What models are called: folders, hub ids, and the names of those that the package knows."""

import os
import re
from importlib.resources import files
from pathlib import Path

from cutaway.artifacts import hub
from cutaway.artifacts.errors import CutawayError

SHIPPED = "atlas"
OTHERS = ("atlas-1", "atlas-2", "atlas-3")
"""Other weights of atlas, kept for comparison in the repository (`models/`), not in the package: those that ship, under
the name that stays theirs, and trainings that go on from them (docs/atlas-3.md)."""


_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_hub_id(name: str) -> bool:
    """Whether `cutaway.load` would ask the hub for a model of that name: it is no path, nor a name known here."""
    if named_folder(name) is not None or name.startswith((".", "~")) or not _HUB_ID.fullmatch(name):
        return False
    return not os.path.exists(name)


def refuse_out_of_reach(name: str, revision: str | None = None) -> None:
    """Raise `CutawayError` for a hub id where the hub does not answer and its client's cache has no such model.

    Nothing heavy is imported for it, so that it is said within seconds.

    Args:
        name: What `cutaway.load` is given.
        revision: A branch, tag or commit of the hub.
    """
    if not is_hub_id(name) or hub.answers():
        return
    if hub.cached(name, revision) is None:
        raise CutawayError(
            f"There is no folder '{name}' here, and the hub ({hub.address()}) cannot be reached, nor is the model in "
            "the cache of its client; check the name, or the network."
        )


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
