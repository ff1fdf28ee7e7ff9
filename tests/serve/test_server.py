"""`cutaway open`: a port that is taken, an extra that is missing, and an end by Ctrl-C, each in one sentence."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from typing import Any

import pytest

from cutaway.cli.main import main
from cutaway.serve import address
from cutaway.serve.address import listen


def test_a_taken_port_is_one_sentence_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with listen(0) as taken:
        port = taken.getsockname()[1]
        assert taken.getsockname()[0] == "127.0.0.1"
        assert main(["open", "/no/such/model", "--port", str(port), "--no-browser"]) == 2
    assert capsys.readouterr() == ("", f"cutaway: port {port} is taken; name another with --port (0 is any free one)\n")
    with listen(port):  # free again
        pass


def test_a_port_that_may_not_be_used_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(address.CutawayError, match=r"^port 80 cannot be used \(Permission denied\); name another"):
        listen(80)


def test_a_missing_extra_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(address, "find_spec", lambda name: None if name == "uvicorn" else object())
    assert main(["open", "atlas", "--no-browser"]) == 2
    says = "cutaway: the live page needs fastapi and uvicorn: pip install 'cutaway[serve]'\n"
    assert capsys.readouterr() == ("", says)


@pytest.mark.parametrize("port", ["-1", "65536", "many"])
def test_what_is_no_port_is_refused(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["open", "atlas", "--port", port]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_ctrl_c_ends_it_cleanly() -> None:
    command = [sys.executable, "-m", "cutaway", "open", "atlas", "--port", "0", "--no-browser"]
    # a shell's background job ignores Ctrl-C, and so would what it starts
    running: Any = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        line = running.stdout.readline()
        assert line.startswith("atlas is open at http://127.0.0.1:"), line + running.stderr.read()
        where = line.split(" at ")[1].split()[0]
        with urllib.request.urlopen(f"{where}api/model") as answer:
            assert json.load(answer)["name"] == "atlas"
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    finally:
        running.kill()
    assert (running.returncode, out) == (0, "closed\n")
    assert "Traceback" not in err
