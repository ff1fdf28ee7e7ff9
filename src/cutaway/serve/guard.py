"""What a page of another origin, or another machine, must not be able to ask: every request passes here first.

A name that is made to point at this machine (DNS rebinding) shows in the Host header; a page elsewhere that sends a
form here shows in Origin, or in a content type that no JSON request has. Nothing is ever allowed across origins.
"""

import json
import re
from typing import Any

MOST_BYTES = 64 * 1024
_HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?", re.ASCII)
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """ASGI middleware: refuses what does not come from a page of this server, and puts its headers on every answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        refusal = _refusal(scope) if scope["type"] == "http" else (403, "There are no web sockets here.")
        if refusal is None:
            await self.app(scope, receive, guarded)
        elif scope["type"] == "http":
            status, sentence = refusal
            body = json.dumps({"error": sentence}).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            headers += [(b"connection", b"close")]  # a body that is not read must not be taken for the next request
            await guarded({"type": "http.response.start", "status": status, "headers": headers})
            await guarded({"type": "http.response.body", "body": body})
        else:
            await send({"type": "websocket.close", "code": 1008})


def _refusal(scope: Any) -> tuple[int, str] | None:
    """Status and sentence for a request that is not served."""
    headers: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    host = headers.get("host", [])
    if len(host) != 1 or not _HOST.fullmatch(host[0]):
        return 421, "This server answers to 127.0.0.1 and localhost alone; open the address that cutaway printed."
    if scope["method"] in ("GET", "HEAD"):
        return None
    if any(one != f"http://{host[0]}" for one in headers.get("origin", [])) or any(
        one not in ("same-origin", "none") for one in headers.get("sec-fetch-site", [])
    ):
        return 403, "This request comes from another page; only the page of this server may ask."
    if headers.get("content-type", [""])[0].split(";")[0].strip().lower() != "application/json":
        return 415, "A request is JSON; send it with the content type application/json."
    length = headers.get("content-length", [""])[0]
    if not length.isascii() or not length.isdigit():
        return 411, "A request says how long it is; send it with a Content-Length."
    if len(length) > 9 or int(length) > MOST_BYTES:
        return 413, f"A request has at most {MOST_BYTES:,} bytes; send a shorter text."
    return None
