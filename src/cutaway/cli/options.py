"""Kinds of options that several commands have."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators

Flag = Annotated[bool, Parameter(negative="", show_default=False)]
"""A switch that is off unless given; there is no --no-... form."""

Count = Annotated[int, Parameter(validator=validators.Number(gte=1))]

Seed = Annotated[int, Parameter(validator=validators.Number(gte=0, lt=2**32))]


def _page_name(_hint: object, path: Path | None) -> None:
    """Refuse a page's name before any work is done for it."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file, such as {path / 'page.html'}.")
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if not nearest.is_dir():
        raise ValueError(f"{nearest} is a file, not a folder.")


Page = Annotated[Path | None, Parameter(validator=_page_name)]
"""Where a page goes."""

ExistingPath = Annotated[Path, Parameter(validator=validators.Path(exists=True))]
"""A file or folder that must be there."""

ExistingFolder = Annotated[Path, Parameter(validator=validators.Path(exists=True, file_okay=False))]
