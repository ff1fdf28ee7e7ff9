"""How long a click on the live page takes: from the request to the whole answer, on the shipped model.

    python benchmarks/live.py [--n 40]

Each row sends one kind of request over a real socket, n times, the texts of the page's first example. The exit code is
1 where the median of a click is above 200 ms.
"""

import argparse
import json
import os
import sys
import threading
import time
import urllib.request
from statistics import median, quantiles
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded; the command line does too

import uvicorn

import cutaway
from cutaway.serve import create_app
from cutaway.serve.address import HOST, listen

LIMIT = 0.2
TEXTS = {
    "text": "The capital of the state containing Dallas is",
    "other": "The capital of the state containing Oakland is",
}
CLICKS: dict[str, list[dict[str, Any]]] = {
    "patch of a stream": [{"kind": "patch", "site": "blocks.1.resid_post", "position": 7}],
    "mean of a head": [{"kind": "mean", "site": "blocks.2.attn.z", "head": 7, "position": 8}],
    "zero of an MLP everywhere": [{"kind": "zero", "site": "blocks.4.mlp.out"}],
    "cut of a look": [{"kind": "cut", "site": "blocks.2.attn.pattern", "head": 7, "position": 8, "key": 7}],
}


def main() -> int:
    """Serve atlas, time every kind of request, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=40)
    n = max(2, parser.parse_args().n)
    listening = listen(0)
    server = uvicorn.Server(uvicorn.Config(create_app(cutaway.load("atlas")), log_level="error", lifespan="off"))
    threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True).start()
    address = f"http://{HOST}:{listening.getsockname()[1]}/api/"

    def timed(path: str, body: dict[str, Any]) -> float:
        start = time.perf_counter()
        request = urllib.request.Request(
            address + path, json.dumps(body).encode(), {"content-type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request) as answer:
            answer.read()
        return time.perf_counter() - start

    rows = [(f"a click: {name}", "change", {**TEXTS, "changes": changes}) for name, changes in CLICKS.items()]
    rows += [("a head", "look", {**TEXTS, "changes": [], "layer": 2, "head": 7}), ("a text", "read", TEXTS)]
    slow = False
    print("| request | median, ms | 95 %, ms |\n|---|---|---|")
    for name, path, body in rows:
        timed(path, body)
        seconds = [timed(path, body) for _ in range(n)]
        print(f"| {name} | {1000 * median(seconds):.0f} | {1000 * quantiles(seconds, n=20)[-1]:.0f} |")
        slow |= path == "change" and median(seconds) > LIMIT
    server.should_exit = True
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
