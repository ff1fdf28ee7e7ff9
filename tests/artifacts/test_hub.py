"""The first contact with the hub: without a network a hub id fails within seconds, and with one nothing else does."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model, word_tokenizer

import cutaway
from cutaway.artifacts import hub
from cutaway.artifacts.errors import CutawayError
from cutaway.cli.main import main
from cutaway.model.named import is_hub_id

_ANSWERS = hub.answers  # before the tests' own, which asks nobody


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "_asked", {})
    monkeypatch.setattr(hub, "answers", _ANSWERS)
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes every connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def took(work: Any) -> float:
    begun = time.monotonic()
    with pytest.raises(CutawayError, match=r"no folder 'gpt2' here, and .* cannot be reached"):
        work()
    return time.monotonic() - begun


def test_a_resolver_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = threading.Event()
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: hangs.wait(60) and [])
    try:
        assert took(lambda: cutaway.load("gpt2")) < 3
    finally:
        hangs.set()


def test_a_server_that_never_answers(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", silent)
    assert took(lambda: cutaway.load("gpt2")) < 3
    assert took(lambda: cutaway.load("gpt2")) < 1  # it is not asked again at once
    begun = time.monotonic()
    with pytest.raises(CutawayError, match="not in the cache of the hub's client"):
        cutaway.dictionaries.load("hf://owner/repository/folder")
    assert time.monotonic() - begun < 1


def test_the_command_says_so_before_anything_heavy_is_imported(
    silent: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """In a process of its own, start and imports and all."""
    environment = {**os.environ, "HF_ENDPOINT": silent, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")}
    code = "import sys; from cutaway.cli.main import main; c = main(['lens', 'gpt2', 'x'])"
    code += "; assert 'torch' not in sys.modules; sys.exit(c)"
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert time.monotonic() - begun < 2 + _START  # what an import costs on this machine at this moment is not ours
    assert (done.returncode, done.stderr.count("\n")) == (2, 1 + ("loading" in done.stderr)), done.stderr
    monkeypatch.setenv("HF_ENDPOINT", silent)
    for line in ("check gpt2", "tour gpt2 --out runs/x", "dictionary inspect d --model gpt2", "train gpt2 --out x"):
        assert main(line.split()) == 2
        assert "cannot be reached" in capsys.readouterr().err


_START = 8.0


class _Hub(BaseHTTPRequestHandler):
    """A hub with one model, in no hurry once it has been reached."""

    folder: Path

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        name = path.rsplit("/", 1)[-1]
        file = self.folder / name
        if not path.startswith("/owner/tiny/resolve/") or not file.is_file():
            self.send_response(404)
            if path.startswith("/owner/tiny/resolve/"):
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("X-Repo-Commit", "a" * 40)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if name == "config.json":
            time.sleep(hub._PATIENCE + 0.5)
        data = file.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", f'"{len(data):040d}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def test_downloads_have_their_own_patience(tmp_path: Path) -> None:
    """A hub that answers is asked as ever, and waited for; without it what was fetched is found in the cache."""
    tiny_model("llama", vocab_size=20).save_pretrained(tmp_path / "served")
    word_tokenizer().save_pretrained(tmp_path / "served")
    handler = type("Served", (_Hub,), {"folder": tmp_path / "served"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": "1",
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
    }  # fmt: skip
    code = "import json, cutaway; lm = cutaway.load('owner/tiny'); print(json.dumps([lm.name, lm.identity().revision]))"

    def load() -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert load() == ["owner/tiny", "a" * 40]
    server.shutdown()
    server.server_close()
    assert load() == ["owner/tiny", "a" * 40]


def test_which_names_are_the_hubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert is_hub_id("owner/gpt2")
    for name in ("gpt2", "atlas", "./x", "/x/y", "~/x", "a/b/c", "hf://owner/name"):
        assert not is_hub_id(name), name


def test_it_is_not_asked_where_that_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_contact", lambda *_: True)
    assert hub.answers()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not hub.answers()
