"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded: as the command line does

REPOSITORY = Path(__file__).resolve().parent.parent


def shared_folder() -> Path | None:
    """The optional folder of real models and texts: `CUTAWAY_SHARED`, else `../shared` beside the checkout."""
    named = os.environ.get("CUTAWAY_SHARED")
    folder = Path(named) if named else REPOSITORY.parent / "shared"
    return folder if (folder / "models").is_dir() else None


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and texts that developers have; users do not, so its tests skip."""
    folder = shared_folder()
    if folder is None:
        pytest.skip("the optional folder of real models is absent (set CUTAWAY_SHARED to its path)")
    return folder
