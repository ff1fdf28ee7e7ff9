"""Sparse dictionaries: trained, judged, exchanged with the field.

    cutaway.dictionaries.train("atlas", "blocks.3.resid_post", preset="batchtopk", corpus="texts/", out="runs/one")
    dictionary = cutaway.dictionaries.load("hf://owner/repository/folder")
    cutaway.dictionaries.save(dictionary, "runs/dictionary", format="sparsify")

Importing the package loads no torch; the names below load what they need when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cutaway.dictionaries.formats.files import load, load_all, save, save_all
    from cutaway.dictionaries.training.api import train

__all__ = ["load", "load_all", "save", "save_all", "train"]

_HOMES = {
    "cutaway.dictionaries.training.api": ("train",),
    "cutaway.dictionaries.formats.files": ("load", "load_all", "save", "save_all"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'cutaway.dictionaries' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
