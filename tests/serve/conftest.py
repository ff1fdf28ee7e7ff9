"""The live page of atlas: its application, a client that speaks to it, and a browser on a real server."""

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from live_page import Ask

from cutaway.model.language_model import LanguageModel
from cutaway.serve.address import listen
from cutaway.serve.app import create_app


@pytest.fixture(scope="session")
def app(atlas: LanguageModel) -> Any:
    return create_app(atlas)


@pytest.fixture(scope="session")
def client(app: Any) -> Any:
    from starlette.testclient import TestClient

    return TestClient(app, base_url="http://127.0.0.1:8765", raise_server_exceptions=False)


@pytest.fixture(scope="session")
def ask(client: Any) -> Ask:
    """Ask the model; the answer's data."""

    def asked(path: str, **body: Any) -> Any:
        done = client.post(f"/api/{path}", json=body)
        assert done.status_code == 200, done.text
        return done.json()

    return asked


@pytest.fixture(scope="session")
def address(app: Any) -> Iterator[str]:
    """Where a real server serves the page."""
    import uvicorn

    listening: socket.socket = listen(0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    server.should_exit = True
    thread.join(10)
