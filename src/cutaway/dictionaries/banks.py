"""Public dictionaries: by model and site, in which format, and the address by which each is loaded.

What is known of them is in `banks.csv`, each row with the source it was read in and the date. Nobody has loaded all of
them with cutaway, so a row is where to look, not a promise.
"""

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from cutaway.artifacts.errors import CutawayError


@dataclass(frozen=True)
class Bank:
    """A row of the table."""

    model: str
    """The model it was trained on, as `cutaway.load` takes it."""
    kind: str
    """What it is: sae, transcoder, transcoders (a set, which `load_all` reads), crosscoder, ..."""
    site: str
    """Where it reads, and in which layers."""
    width: str
    """How many latents, as far as that was checked."""
    format: str
    """One that is read here, but where `readable` says no."""
    readable: str
    """yes, or no with the reason."""
    load: str
    """The address of one of them, for `load` and the commands; other layers and widths have addresses like it."""
    source: str
    """Where that was read."""
    date: str
    """When, or as of when."""


@cache
def known_banks() -> tuple[Bank, ...]:
    """All rows."""
    text = files("cutaway").joinpath("dictionaries", "banks.csv").read_text(encoding="utf-8")
    return tuple(Bank(**row) for row in csv.DictReader(text.splitlines()))


def find_banks(model: str | None = None, format: str | None = None) -> list[Bank]:
    """The rows of a model and in a format.

    Args:
        model: A piece of the model's name, in any case; every model if None.
        format: A piece of the format's name; every format if None.

    Raises:
        CutawayError: There is none; the message has what there is.
    """
    found = [
        bank
        for bank in known_banks()
        if (model or "").lower() in bank.model.lower() and (format or "").lower() in bank.format.lower()
    ]
    if not found:
        asked = " and ".join(
            f"{name} {value!r}" for name, value in (("model", model), ("format", format)) if value is not None
        )
        models, formats = (
            ", ".join(dict.fromkeys(getattr(bank, name) for bank in known_banks())) for name in ("model", "format")
        )
        raise CutawayError(f"no dictionary of {asked} is known: models are {models}; formats are {formats}")
    return found
