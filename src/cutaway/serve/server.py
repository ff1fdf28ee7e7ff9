"""The live page as a server on loopback, until Ctrl-C."""

from __future__ import annotations

import socket
import webbrowser

from cutaway.model.language_model import LanguageModel
from cutaway.serve.address import HOST, listen, require_extra


def serve_page(lm: LanguageModel, listening: socket.socket | None = None, *, browser: bool = False) -> None:
    """Serve the live page of a model on loopback until Ctrl-C.

    Args:
        lm: the model.
        listening: the socket; a free port on loopback if None.
        browser: open the page in the user's browser.

    Raises:
        MissingExtra: fastapi or uvicorn is not installed.
    """
    require_extra()
    import uvicorn

    from cutaway.serve.app import create_app

    listening = listening or listen(0)
    address = f"http://{HOST}:{listening.getsockname()[1]}/"

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print(f"{lm.name} is open at {address} (Ctrl-C ends it)", flush=True)
            if browser:
                webbrowser.open(address)

    config = uvicorn.Config(
        create_app(lm), log_level="error", access_log=False, lifespan="off", ws="none", timeout_graceful_shutdown=2
    )
    try:
        Server(config).run(sockets=[listening])
    except KeyboardInterrupt:  # uvicorn hands it on once all is closed
        print("closed")
    finally:
        listening.close()
