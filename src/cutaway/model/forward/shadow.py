"""Attributes shadowed on an instance while at least one run needs them, and put back when the last one ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_lock = threading.Lock()
_counts: dict[tuple[int, str], int] = {}
_before: dict[tuple[int, str], tuple[bool, Any]] = {}


@contextmanager
def shadowed(instance: Any, name: str, make: Callable[[], Any]) -> Iterator[None]:
    """Give `instance.name` the value `make()` inside the block; nested and concurrent users share one shadow."""
    key = (id(instance), name)
    with _lock:
        if _counts.get(key, 0) == 0:
            value = make()
            _before[key] = (name in instance.__dict__, instance.__dict__.get(name))
            instance.__dict__[name] = value
        _counts[key] = _counts.get(key, 0) + 1
    try:
        yield
    finally:
        with _lock:
            _counts[key] -= 1
            if _counts[key] == 0:
                del _counts[key]
                had, value = _before.pop(key)
                if had:
                    instance.__dict__[name] = value
                else:
                    instance.__dict__.pop(name, None)
