"""What the tests of commands share."""

import pytest


@pytest.fixture(autouse=True)
def no_status_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that run in this process say nothing about loading; `test_early.py` looks at that line."""
    monkeypatch.setattr("cutaway.cli.options.is_quiet", lambda: True)
