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
    from cutaway.model.edits.edits import (
        Edit,
        add,
        clamp,
        clamp_latent,
        function,
        mean,
        noise,
        patch,
        project_out,
        resample,
        scale,
        set,
        zero,
    )
    from cutaway.model.edits.files import load_edits, save_edits
    from cutaway.model.edits.positions import at_token
    from cutaway.model.edits.values import register_edit_function
    from cutaway.model.forward.files import load_run
    from cutaway.model.forward.run import Run
    from cutaway.model.language_model import LanguageModel, attach, load
    from cutaway.model.own.module import Description
    from cutaway.model.own.weights import from_weights
    from cutaway.model.tokens import Tokens

__all__ = [
    "CutawayError",
    "Description",
    "Edit",
    "LanguageModel",
    "Run",
    "Tokens",
    "add",
    "at_token",
    "attach",
    "clamp",
    "clamp_latent",
    "from_weights",
    "function",
    "load",
    "load_edits",
    "load_run",
    "mean",
    "noise",
    "patch",
    "project_out",
    "register_edit_function",
    "resample",
    "save_edits",
    "scale",
    "set",
    "zero",
]

_HOMES = {
    "cutaway.artifacts.errors": ("CutawayError",),
    "cutaway.model.edits.files": ("load_edits", "save_edits"),
    "cutaway.model.edits.values": ("register_edit_function",),
    "cutaway.model.edits.edits": (
        "Edit",
        "add",
        "clamp",
        "clamp_latent",
        "function",
        "mean",
        "noise",
        "patch",
        "project_out",
        "resample",
        "scale",
        "set",
        "zero",
    ),
    "cutaway.model.language_model": ("LanguageModel", "attach", "load"),
    "cutaway.model.own.module": ("Description",),
    "cutaway.model.own.weights": ("from_weights",),
    "cutaway.model.edits.positions": ("at_token",),
    "cutaway.model.forward.run": ("Run",),
    "cutaway.model.forward.files": ("load_run",),
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
