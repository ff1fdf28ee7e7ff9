"""The live page of atlas: its application, a client that speaks to it, and a browser on a real server."""

import os
import shutil
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


@pytest.fixture(scope="module")  # there may be one Playwright at a time
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    named = os.environ.get("CUTAWAY_CHROMIUM")
    path = named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium is installed (set CUTAWAY_CHROMIUM to its path)")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=path,
            args=["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"],
        )
        yield browser
        browser.close()
