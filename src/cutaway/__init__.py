"""cutaway: look inside language models.

    import cutaway

    lm = cutaway.load("atlas")
    run = lm.run("The capital of the state containing Dallas is", capture="blocks.*.resid_post")

Importing the package loads neither torch nor transformers; the names below load what they need when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cutaway.artifacts.errors import CutawayError
    from cutaway.model.edits import (
        Edit,
        add,
        clamp,
        clamp_latent,
        mean,
        patch,
        project_out,
        scale,
        set,
        zero,
    )
    from cutaway.model.language_model import LanguageModel, attach, load
    from cutaway.model.run import Run
    from cutaway.model.tokens import Tokens

__all__ = [
    "CutawayError",
    "Edit",
    "LanguageModel",
    "Run",
    "Tokens",
    "add",
    "attach",
    "clamp",
    "clamp_latent",
    "load",
    "mean",
    "patch",
    "project_out",
    "scale",
    "set",
    "zero",
]

_HOMES = {
    "cutaway.artifacts.errors": ("CutawayError",),
    "cutaway.model.edits": (
        "Edit",
        "add",
        "clamp",
        "clamp_latent",
        "mean",
        "patch",
        "project_out",
        "scale",
        "set",
        "zero",
    ),
    "cutaway.model.language_model": ("LanguageModel", "attach", "load"),
    "cutaway.model.run": ("Run",),
    "cutaway.model.tokens": ("Tokens",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'cutaway' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
