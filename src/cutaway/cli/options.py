"""Kinds of options that several commands have."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter, validators

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.files import refuse_device
from cutaway.artifacts.progress import is_quiet

if TYPE_CHECKING:
    from cutaway.model.language_model import LanguageModel

Flag = Annotated[bool, Parameter(negative="", show_default=False)]
"""A switch that is off unless given; there is no --no-... form."""

Count = Annotated[int, Parameter(validator=validators.Number(gte=1, lt=2**53))]

Separator = Annotated[str | None, Parameter(allow_leading_hyphen=True)]
"""What stands between the documents of a corpus, such as `<|endoftext|>` or `---`."""

MetricName = Literal["logit_difference", "probability", "probability_difference", "kl", "nll", "rank"]
"""What an effect is measured in: the names of `cutaway.causal.METRICS`, which is not imported for help."""

Seed = Annotated[int, Parameter(validator=validators.Number(gte=0, lt=2**32))]


def _file_name(path: Path | None, example: str) -> None:
    """Refuse a file's name before any work is done for it."""
    if path is None:
        return
    if os.path.isdir(path):  # of os.path, since Path's own raises where a folder may not be looked into
        raise ValueError(f"{path} is a folder; name a file, such as {path / example}.")
    nearest = next(folder for folder in path.absolute().parents if os.path.exists(folder))
    if not os.path.isdir(nearest):
        raise ValueError(f"{nearest} is a file, not a folder.")
    if not os.access(nearest, os.W_OK):
        raise ValueError(f"{nearest} may not be written to; name another folder.")
    try:
        refuse_device(path)
    except CutawayError as error:
        raise ValueError(f"{error}.") from None


def _page_name(_hint: object, path: Path | None) -> None:
    _file_name(path, "page.html")
    if path is not None and os.path.isfile(path):
        from cutaway.draw.page import refuse_no_page

        try:
            refuse_no_page(path)
        except CutawayError as error:
            raise ValueError(f"{error}.") from None


def _data_name(_hint: object, path: Path | None) -> None:
    _file_name(path, "result.json")


Page = Annotated[Path | None, Parameter(validator=_page_name)]
"""Where a page goes."""

Output = Annotated[Path | None, Parameter(validator=_data_name)]
"""Where a JSON file goes."""

ExistingPath = Annotated[Path, Parameter(validator=validators.Path(exists=True))]
"""A file or folder that must be there."""

ExistingFolder = Annotated[Path, Parameter(validator=validators.Path(exists=True, file_okay=False))]


DType = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    Parameter(help="How the model computes; float32 on a CPU and the checkpoint's own on a GPU if not given."),
]

ModuleFile = Annotated[str | None, Parameter(name="--module")]
"""A model of the user's own: FILE.py:function."""


def announce(model: str | None, module: str | None = None) -> None:
    """Say on stderr what is loaded: as soon as the options are found to be right, before anything heavy is imported.

    Raises `CutawayError` where no model is named, or two, or one of the hub while that cannot be reached.
    """
    if (model is None) == (module is None):
        if module is None:
            raise CutawayError("name a model: “atlas”, a folder, a hub id, or a function of yours with --module")
        raise CutawayError(f"--module {module} stands in the place of the model: leave {model!r} out")
    say_loading(str(module or model))
    if model is not None:
        from cutaway.model.named import refuse_out_of_reach

        refuse_out_of_reach(model)


def say_loading(name: str) -> None:
    """Say on stderr that a file or folder is read, or a model."""
    if not is_quiet():
        print(f"loading {Path(name).name}", file=sys.stderr, flush=True)


def opened(
    model: str | None, module: str | None = None, *, dtype: str | None = None, device: str | None = None
) -> "LanguageModel":
    """The model of a command: loaded by its name, or made by the function that --module names."""
    if module is not None:
        from cutaway.model.own.file import load_module

        return load_module(module, dtype=dtype, device=device)
    import cutaway

    assert model is not None
    return cutaway.load(model, dtype=dtype, device=device)


def model_and_prompt(model: str | None, prompt: str | None, module: str | None) -> tuple[str | None, str | None]:
    """With --module the first word of the command line is the prompt, not the model."""
    if module is None or model is None:
        return model, prompt
    if prompt is not None:
        raise CutawayError(f"--module {module} stands in the place of the model: leave {model!r} out")
    return None, model


def keep_apart(outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | str | None]) -> None:
    """Raise `CutawayError` where two options name one file, and one of them is written."""
    seen = {name: path for name, path in inputs.items() if path is not None}
    for name, path in outputs.items():
        if path is None:
            continue
        for other, there in seen.items():
            if os.path.realpath(there) == os.path.realpath(path):
                raise CutawayError(f"{other} and {name} both name {path}: give each a file of its own")
        seen[name] = path
