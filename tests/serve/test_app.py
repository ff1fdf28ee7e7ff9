"""The application at its door: who may ask, how much, what is answered, and what its document says."""

import re
from importlib.resources import files
from typing import Any

import pytest
from live_page import CAPITALS, PATCH

from cutaway.model.language_model import LanguageModel
from cutaway.serve.guard import MOST_BYTES
from cutaway.serve.wire import MOST_CHARACTERS, MOST_TOKENS

FILES = ["", "app.css", "blocks.js", "cutaway.css", "look.js", "theme.js"]


@pytest.mark.parametrize("name", FILES)
def test_every_file_comes_with_a_strict_policy(client: Any, name: str) -> None:
    done = client.get(f"/{name}")
    assert done.status_code == 200
    policy = done.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert done.headers["x-content-type-options"] == "nosniff"
    assert not [header for header in done.headers if header.startswith("access-control")]


def test_the_page_asks_nobody_else_and_has_nothing_inline() -> None:
    folder = files("cutaway.serve").joinpath("page")
    page = folder.joinpath("index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=", page)
    for file in folder.iterdir():
        assert not re.search(r"https?://|//[a-z]+\.|@import|innerHTML|eval\(", file.read_text(encoding="utf-8")), (
            file.name
        )


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "0.0.0.0", "127.0.0.2", "", "[::2]"]
)
@pytest.mark.parametrize("path", ["/", "/api/model"])
def test_a_name_that_points_here_is_refused(client: Any, host: str, path: str) -> None:
    done = client.get(path, headers={"host": host})
    assert done.status_code == 421
    assert done.json()["error"].endswith("open the address that cutaway printed.")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8765", "[::1]:8765", "127.0.0.1:1"])
def test_loopback_is_served(client: Any, host: str) -> None:
    assert client.get("/api/model", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"origin": "https://127.0.0.1:8765"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"origin": "http://127.0.0.1:8765", "sec-fetch-site": "same-origin"}, 200),
        ({}, 200),
    ],
)
def test_only_this_servers_page_may_ask(client: Any, headers: dict[str, str], status: int) -> None:
    done = client.post("/api/read", json=CAPITALS, headers=headers)
    assert done.status_code == status
    if status != 200:
        assert re.fullmatch(r"[A-Z][^\n]+\.", done.json()["error"])


def test_there_is_no_way_across_origins(client: Any) -> None:
    asked = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    done = client.options("/api/read", headers=asked)
    assert done.status_code == 403
    assert "access-control-allow-origin" not in done.headers


def test_a_request_says_how_long_it_is_and_is_not_long(client: Any) -> None:
    long = {"text": "x" * MOST_BYTES}
    assert client.post("/api/read", json=long).status_code == 413

    def parts() -> Any:
        yield b'{"text": '
        yield b'"a"}'

    done = client.post("/api/read", content=parts(), headers={"content-type": "application/json"})
    assert done.status_code == 411


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        (
            "read",
            {"text": "x" * (MOST_CHARACTERS + 1)},
            f"text: string should have at most {MOST_CHARACTERS} characters",
        ),
        ("read", {"text": "the " * (MOST_TOKENS + 9)}, f"this page shows at most {MOST_TOKENS}; shorten it"),
        ("read", {"text": ""}, "The text is empty"),
        ("read", {}, "text: field required"),
        ("read", {"text": "a", "more": 1}, "more: extra inputs are not permitted"),
        ("read", {"text": "\ud800"}, ""),
        ("change", {"text": "a", "changes": [PATCH] * 99}, "changes: list should have at most 32 items"),
        ("change", {"text": "a", "changes": [{**PATCH, "kind": "exec"}]}, "changes.0.kind: input should be"),
        (
            "change",
            {"text": "a", "changes": [{**PATCH, "position": -1}]},
            "changes.0.position: input should be greater",
        ),
        ("look", {"text": "a", "changes": [], "layer": 99, "head": 0}, "has no head L99H0"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(client: Any, path: str, body: Any, says: str) -> None:
    import json

    content = json.dumps(body)
    done = client.post(f"/api/{path}", content=content, headers={"content-type": "application/json"})
    assert done.status_code == 422
    assert done.json().keys() == {"error"}
    sentence = done.json()["error"]
    assert says in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence


def test_json_that_is_none_is_refused(client: Any) -> None:
    done = client.post("/api/read", content="{", headers={"content-type": "application/json"})
    assert done.status_code == 422
    assert done.json().keys() == {"error"}


@pytest.mark.parametrize(("method", "path", "status"), [("get", "/no", 404), ("get", "/api/read", 405)])
def test_what_is_not_there_is_one_sentence(client: Any, method: str, path: str, status: int) -> None:
    done = getattr(client, method)(path)
    assert done.status_code == status
    assert done.json()["error"].endswith("this server has / and /api/openapi.json.")


def test_a_defect_is_not_shown_to_the_page(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("cutaway.serve.live.logit_lens", fail)
    done = client.post("/api/read", json=CAPITALS)
    assert done.status_code == 500
    assert "ZeroDivisionError" in done.json()["error"]
    assert "secret" not in done.text


def test_the_document_describes_every_record(client: Any) -> None:
    document = client.get("/api/openapi.json").json()
    assert document["openapi"].startswith("3.")
    assert sorted(document["paths"]) == ["/api/change", "/api/look", "/api/model", "/api/read"]
    for path in document["paths"].values():
        for operation in path.values():
            assert operation["description"]
            answer = operation["responses"]["200"]["content"]["application/json"]["schema"]
            assert answer["$ref"].startswith("#/components/schemas/")
            assert operation["responses"]["422"]["content"]["application/json"]["schema"]["$ref"].endswith("/Problem")
    change = document["components"]["schemas"]["Change"]
    assert change["properties"]["kind"]["enum"] == ["patch", "mean", "zero", "cut"]
    assert "every token if None" in change["properties"]["position"]["description"]


def test_the_card_says_what_is_served(client: Any, atlas: LanguageModel) -> None:
    card = client.get("/api/model").json()
    assert (card["name"], card["layers"], card["heads"]) == ("atlas", atlas.n_layers, atlas.n_heads)
    for example in card["examples"]:
        assert client.post("/api/read", json=example).status_code == 200
