"""Whether the Hugging Face hub answers: asked once, briefly, before its client is.

Without a network the client tries for half a minute and more, one file after another. What follows the first contact
has the client's own patience.
"""

import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from ssl import SSLError
from typing import Any

_FORBID = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_PATIENCE = 2.0
_AGAIN = 60.0
"""Seconds after which a hub that did not answer is asked again."""
_asked: dict[str, tuple[float, bool]] = {}


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Follow nothing: that there is an answer is enough."""


def address() -> str:
    """Of the hub, or of the mirror that HF_ENDPOINT names."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def answers() -> bool:
    """Whether the hub answers within 2 seconds (or HF_HUB_ETAG_TIMEOUT, where that is set), through proxies if any.

    An error that it answers with is an answer. Not asked where HF_HUB_OFFLINE forbids it, and not again for a minute.

    Returns:
        Whether its client should be let at it, rather than at its cache alone.
    """
    if any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in _FORBID):
        return False
    where = address()
    when, found = _asked.get(where, (0.0, False))
    if where not in _asked or (not found and time.monotonic() - when > _AGAIN):
        found = _contact(where, _patience())
        _asked[where] = time.monotonic(), found
    return found


def cached(repository: str, revision: str | None = None) -> Path | None:
    """The folder of a model in the cache of the hub's client, which is named after its commit; None if it has none."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


@contextmanager
def reached() -> Iterator[bool]:
    """Whether the hub answers; where it does not, its client is offline while the block runs.

    Not only its `local_files_only`: with that alone it still asks for what has nothing to do with the files.
    """
    if answers():
        yield True
        return
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield False
    finally:
        constants.HF_HUB_OFFLINE = before


def _patience() -> float:
    try:
        return float(os.environ["HF_HUB_ETAG_TIMEOUT"])
    except (KeyError, ValueError):
        return _PATIENCE


def _contact(where: str, seconds: float) -> bool:
    """In a thread of its own: a name that is looked up in vain takes no timeout."""
    if any(proxy.startswith("socks") for proxy in urllib.request.getproxies().values()):
        return True  # which the standard library does not speak: left to the client
    found: list[bool] = []

    def ask() -> None:
        # a page that needs no looking up, and no log-in
        request = urllib.request.Request(f"{where}/robots.txt", method="HEAD", headers={"User-Agent": "cutaway"})
        try:
            urllib.request.build_opener(_Stay).open(request, timeout=seconds).close()
        except urllib.error.HTTPError:
            found.append(True)
        except urllib.error.URLError as error:
            found.append(isinstance(error.reason, SSLError))  # somebody is there; what is wrong its client says better
        except (OSError, ValueError):  # such as a timeout, or no address at all
            found.append(False)
        else:
            found.append(True)

    thread = threading.Thread(target=ask, name="cutaway hub", daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(found) and found[0]
