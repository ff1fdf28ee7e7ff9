"""A model of the user's own, made by a function in a file: what `--module FILE.py:function` names."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cutaway.artifacts.errors import CutawayError
from cutaway.model.architecture import loading
from cutaway.model.language_model import LanguageModel, attach
from cutaway.model.own.module import PAGE


def load_module(
    named: str, *, dtype: str | torch.dtype | None = None, device: str | torch.device | None = None
) -> LanguageModel:
    """Run the file of "FILE.py:function", call the function, and attach what it returns.

    That is a model of transformers, or a module with its description, or these two and a tokenizer. It is put into
    evaluation mode. The file's folder is searched for what it imports, as Python does for a script.

    Args:
        named: "FILE.py:function".
        dtype: move it to this type, such as "bfloat16".
        device: move it there, such as "cuda".

    Returns:
        The model.

    Raises:
        CutawayError: no such file or function, an error inside them, or what `attach` raises.

    Example:
        cutaway.model.load_module("my_model.py:make")
    """
    function = _function(named)
    try:
        made = function()
    except Exception as error:  # it is the user's program
        raise _raised(named, error) from error
    module, description, tokenizer = (*made, None, None)[:3] if isinstance(made, tuple) else (made, None, None)
    if not isinstance(module, nn.Module) or (isinstance(made, tuple) and len(made) > 3):
        raise CutawayError(
            f"{named} returned {_kind(made)}; it returns a module, (module, description) or (module, description, "
            f"tokenizer) ({PAGE})."
        )
    if device is not None:
        module = module.to(loading.device_named(device))
    if dtype is not None:
        wanted: Any = loading.dtype_named(dtype)
        module = module.to(wanted)
    return attach(module.eval(), tokenizer, description=description, name=named)


def _function(named: str) -> Callable[[], Any]:
    file, _, name = named.rpartition(":")
    path = Path(file).expanduser()
    if not file or path.suffix != ".py" or not name.isidentifier():
        raise CutawayError(f"--module {named}: name a file and a function in it, as in FILE.py:function ({PAGE}).")
    if not path.is_file():
        raise CutawayError(f"--module {named}: there is no file {path}.")
    spec = importlib.util.spec_from_file_location(f"cutaway_own_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = program  # where its classes are looked up
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(program)
    except Exception as error:  # it is the user's program
        raise _raised(named, error) from error
    found = getattr(program, name, None)
    if not callable(found):
        here = [key for key, value in vars(program).items() if callable(value) and not isinstance(value, type)]
        here = [key for key in here if getattr(program, key).__module__ == spec.name]
        raise CutawayError(f"--module {named}: {path.name} has no function {name}; it has {', '.join(here) or 'none'}.")
    return found


def _raised(named: str, error: Exception) -> CutawayError:
    if isinstance(error, CutawayError):
        return error
    text = " ".join(str(error).split())[:150]
    line, at = "", error.__traceback__
    while at is not None:
        if at.tb_frame.f_code.co_filename.endswith(Path(named.rpartition(":")[0]).name):
            line = f", line {at.tb_lineno}"
        at = at.tb_next
    return CutawayError(f"--module {named} raised {type(error).__name__}{line}: {text}.")


def _kind(made: Any) -> str:
    if isinstance(made, tuple):
        return f"a tuple of {', '.join(type(part).__name__ for part in made)}"
    return "nothing" if made is None else f"a {type(made).__name__}"
