"""Where the live page is served, and whether it can be: asked before a model is loaded, so nothing heavy is here."""

import errno
import socket
from importlib.util import find_spec

from cutaway.artifacts.errors import CutawayError, MissingExtra

HOST = "127.0.0.1"


def require_extra() -> None:
    """Raise `MissingExtra` where the server's libraries are not installed."""
    if any(find_spec(name) is None for name in ("fastapi", "uvicorn")):
        raise MissingExtra("the live page needs fastapi and uvicorn: pip install 'cutaway[serve]'")


def listen(port: int) -> socket.socket:
    """A socket that listens on loopback, so that nobody else takes the port while the model is loaded.

    Args:
        port: the port; 0 is any that is free.

    Raises:
        CutawayError: the port is taken, or may not be used.
    """
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
        listening.listen(128)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise CutawayError(f"port {port} is taken; name another with --port (0 is any free one)") from error
        raise CutawayError(f"port {port} cannot be used ({error.strerror}); name another with --port") from error
    return listening
