"""What the tests of the live page ask."""

from collections.abc import Callable
from typing import Any

CAPITALS = {
    "text": "The capital of the state containing Dallas is",
    "other": "The capital of the state containing Oakland is",
}
PATCH: dict[str, Any] = {"kind": "patch", "site": "blocks.1.resid_post", "position": 7}

Ask = Callable[..., Any]
"""Asks the model one thing: `ask("read", text=...)`."""
