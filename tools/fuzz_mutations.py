"""Ways to spoil a file: its bytes, or a value in what it says.

    name, data = mutate(rng, ".json", whole)

Half of the mutations know the format: they replace, remove, repeat or rename one value of JSON, JSON lines, TOML, CSV
or the header of a safetensors file, and leave the rest readable.
"""

import copy
import csv
import io
import json
import math
import random
import struct
import tomllib
from collections.abc import Callable
from typing import Any

Mutation = Callable[[random.Random, bytes], bytes]

DEEP = 5000  # levels: more than any reader may follow


class Raw(str):
    """Text that goes into JSON as it stands: what Python's own writer would refuse or change."""


STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 7, 10**9, 10**18, 10**30, 10**400, -(10**30), 0.5, -0.0, 1e-320,
    1e308, math.nan, math.inf, "", " ", "x", "\x00", "\ud800", "\udcff", "é" * 300, "a/../../b", "/etc/passwd", "-1",
    "1e9", "NaN",
    "blocks.*.resid_post", [], {}, [[]], [None], [0], [-1], [10**9], ["x"], {"": 0}, {"x": None}, [1, "a", None],
    Raw("1e999"), Raw("-Infinity"), Raw("9" * 5000), Raw("[" * 200 + "]" * 200), Raw("[" * DEEP + "]" * DEEP),
    Raw('{"a":' * DEEP + "1" + "}" * DEEP), Raw('"\\ud834"'), Raw("1.0E+2"),
)  # fmt: skip


def mutate(rng: random.Random, suffix: str, data: bytes) -> tuple[str, bytes]:
    """What was done, in a word, and the file afterwards."""
    aware = _AWARE.get(suffix)
    if aware is not None and rng.random() < 0.55:
        try:
            return f"value in {suffix}", aware(rng, data)
        except (ValueError, KeyError, IndexError, UnicodeDecodeError, struct.error):
            pass
    how = rng.choice(list(_BYTES))
    return how, _BYTES[how](rng, data)


# Bytes


def _flips(rng: random.Random, data: bytes) -> bytes:
    new = bytearray(data)
    reach = len(new) if rng.random() < 0.5 else min(len(new), 400)  # what is read first decides most
    for _ in range(rng.choice((1, 1, 2, 8)) if new else 0):
        new[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    return bytes(new)


def _overwritten(rng: random.Random, data: bytes) -> bytes:
    new = bytearray(data)
    place = rng.randrange(len(new) + 1)
    some = rng.choice((b"\xff" * 8, b"\x00" * 8, rng.randbytes(16), b"\x7f" + b"\xff" * 7, b"\x80" * 4))
    new[place : place + len(some)] = some
    return bytes(new)


def _cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _headless(rng: random.Random, data: bytes) -> bytes:
    return data[rng.randrange(len(data) + 1) :]


def _hole(rng: random.Random, data: bytes) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + data[place + rng.randrange(1, 64) :]


def _splice(rng: random.Random, data: bytes) -> bytes:
    a, b, c = (rng.randrange(len(data) + 1) for _ in range(3))
    return data[:a] + data[min(b, c) : max(b, c)] + data[a:]


def _appended(rng: random.Random, data: bytes) -> bytes:
    return data + rng.choice((b"\x00", b"\n", rng.randbytes(40), data[: rng.randrange(len(data) + 1)]))


_BYTES: dict[str, Mutation] = {
    "bits": _flips,
    "bytes": _overwritten,
    "cut short": _cut,
    "beginning gone": _headless,
    "hole": _hole,
    "splice": _splice,
    "more behind": _appended,
    "empty": lambda rng, data: b"",
    "noise": lambda rng, data: rng.randbytes(rng.choice((1, 100, 4000))),
    "byte order mark": lambda rng, data: rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff\x00")) + data,
    "surrogate": lambda rng, data: _inside(rng, data, b"\xed\xa0\x80"),
    "lines": lambda rng, data: _inside(rng, data, rng.choice((b"\r", b"\r\n", b"\n\n", b"\x0b", "\u2028".encode()))),
}


def _inside(rng: random.Random, data: bytes, some: bytes) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + some + data[place:]


# Values


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if isinstance(value, dict):
        for key in list(value):
            found += _places(value[key], (*path, key))
    elif isinstance(value, list):
        for i in range(min(len(value), 12)):
            found += _places(value[i], (*path, i))
    return found


def changed(rng: random.Random, value: Any) -> Any:
    """A value with one of its parts replaced, removed, repeated, or given under another name."""
    value = copy.deepcopy(value)
    path = rng.choice(_places(value))
    if not path:
        return rng.choice(STRANGE)
    inside = value
    for key in path[:-1]:
        inside = inside[key]
    key, how = path[-1], rng.randrange(6)
    if how == 0:
        del inside[key]
    elif how == 1 and isinstance(inside, dict):
        inside[rng.choice(("", "x", f"{key}.", "\ud800", "é" * 300))] = inside.pop(key)
    elif how == 1:
        inside += [copy.deepcopy(inside[key])] * rng.choice((1, 50))
    elif how == 2 and isinstance(inside[key], (int, float)) and not isinstance(inside[key], bool):
        inside[key] = rng.choice((inside[key] + 1, -inside[key], inside[key] * 10**9, str(inside[key]), [inside[key]]))
    else:
        inside[key] = rng.choice(STRANGE)
    return value


def to_json(value: Any) -> str:
    """JSON, with what JSON has no words for."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(k))}: {to_json(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(to_json(item) for item in value) + "]"
    return json.dumps(value)


def _json(rng: random.Random, data: bytes) -> bytes:
    return to_json(changed(rng, json.loads(data))).encode("utf-8", "surrogatepass")


def _json_lines(rng: random.Random, data: bytes) -> bytes:
    lines = data.splitlines()
    place = rng.randrange(len(lines))
    lines[place] = _json(rng, lines[place])
    return b"\n".join(lines) + b"\n"


def _toml(rng: random.Random, data: bytes) -> bytes:
    return "".join(_toml_lines(changed(rng, tomllib.loads(data.decode())))).encode("utf-8", "surrogatepass")


def _toml_lines(value: Any) -> list[str]:
    return [f"{json.dumps(str(k))} = {_toml_value(v)}\n" for k, v in value.items()] if isinstance(value, dict) else []


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(k))} = {_toml_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if value != value else "inf"
    return "2020-01-01T00:00:00Z" if value is None else to_json(value)


def _table(rng: random.Random, data: bytes) -> bytes:
    delimiter = "\t" if b"\t" in data else ","
    rows = list(csv.reader(io.StringIO(data.decode(), newline=""), delimiter=delimiter))
    row = rng.randrange(len(rows))
    how = rng.randrange(4)
    if how == 0:
        rows[row].append("more")
    elif how == 1:
        rows[row].pop(rng.randrange(len(rows[row])))
    else:
        cells = ("", " ", '"', "\x00", "nan", "-1", "1e999", "x" * 200_000, "\ud800", "a\nb", "999999999999")
        rows[row][rng.randrange(len(rows[row]))] = rng.choice(cells)
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter).writerows(rows)
    return out.getvalue().encode("utf-8", "surrogatepass")


def _safetensors(rng: random.Random, data: bytes) -> bytes:
    """The header with a value changed and its length set right, or only one of the numbers."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    if rng.random() < 0.25:  # numbers that are none
        some = rng.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff" * 8, b"\x00" * 64))
        place = 4 * rng.randrange(max(1, len(body) // 4))
        return data[: 8 + length] + body[:place] + some + body[place + len(some) :]
    new = to_json(changed(rng, header)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(new)) + new + body


_AWARE: dict[str, Mutation] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".toml": _toml,
    ".csv": _table,
    ".tsv": _table,
    ".sha256": _json,
    ".written": _json_lines,
    ".safetensors": _safetensors,
}
