"""Kinds of options that several commands have."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators

Flag = Annotated[bool, Parameter(negative="", show_default=False)]
"""A switch that is off unless given; there is no --no-... form."""

Count = Annotated[int, Parameter(validator=validators.Number(gte=1))]

Seed = Annotated[int, Parameter(validator=validators.Number(gte=0, lt=2**32))]

ExistingPath = Annotated[Path, Parameter(validator=validators.Path(exists=True))]
"""A file or folder that must be there."""

ExistingFolder = Annotated[Path, Parameter(validator=validators.Path(exists=True, file_okay=False))]
