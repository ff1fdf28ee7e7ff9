"""A circuit as a drawing: nodes in layers from the embedding below to the logits above, edges between them.

An edge is as wide as its score is large (the width grows with its square root), blue and solid where it helps, orange
and dashed where it hurts. It enters a head at one of three ports: q, k or v. Pointing at a node leaves only its edges.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NotRequired, TypedDict

from markupsafe import Markup

from cutaway.artifacts.errors import CutawayError
from cutaway.draw.text import escape, number

_NODE, _GAP, _ROW, _TALL = 62, 22, 84, 34
_LEFT, _TOP, _BOTTOM = 74, 46, 26
_NARROWEST = 660
_MERGE = 160  # more edges than this are drawn as one line between two nodes
_WIDEST, _THINNEST = 7.0, 0.7
_PORTS = "qkv"
_PART = {"q": "query", "k": "key", "v": "value"}


class CircuitEdge(TypedDict):
    """An edge between two parts of a model.

    Attributes:
        source: By name: `embed`, `L0H3`, `L0.mlp`.
        destination: By name: `L1H2.q`, `L1K0.v`, `L1.mlp`, `logits`.
        score: Above 0 where it helps.
        group: How many heads share a key or value head (`L1K0`): its edges go to the first of them.
    """

    source: str
    destination: str
    score: float
    group: NotRequired[int]


@dataclass
class _Line:
    source: str
    target: str
    port: str
    score: float
    parts: list[tuple[str, float]] = field(default_factory=list)


def circuit_svg(*, edges: Sequence[CircuitEdge], title: str, units: str = "", parallel: bool = False) -> Markup:
    """A circuit: nodes in layers from the embedding below to the logits above, edges between them.

    More than 160 edges are merged: one line for all that leads from one node to another, its parts in the tip.

    Args:
        edges: The edges with their scores.
        title: What is seen, for screen readers.
        units: Of the scores.
        parallel: Draw a layer's heads and MLP side by side.

    Raises:
        CutawayError: No edges, or a name that is none.
    """
    if not edges:
        raise CutawayError("there is nothing to draw: the circuit has no edges")
    lines = [_line(edge) for edge in edges]
    if len(lines) > _MERGE:
        lines = _merged(lines)
    rows = _rows(lines, parallel)
    x = _across(rows, lines)
    width = round(_LEFT + 24 + max(_NARROWEST, *(_width(row) for row in rows)))
    height = _TOP + _BOTTOM + _ROW * (len(rows) - 1) + _TALL
    middle = (_LEFT + width) / 2
    base = float(height - _BOTTOM - _TALL)
    at = {node: (middle + x[node], base - _ROW * i) for i, row in enumerate(rows) for node in row}
    ports = {(line.target, line.port) for line in lines}
    most = max(abs(line.score) for line in lines)
    body = [_edge(line, at, most, units) for line in sorted(lines, key=lambda line: abs(line.score))]
    body += [_name(row, at) for row in rows]
    body += [_node(node, at[node], ports, lines) for row in rows for node in row]
    drawn = "".join(body)
    name = "cw-k" + hashlib.sha256(drawn.encode()).hexdigest()[:8]
    what = "edge" if len(lines) == len(edges) else "line (all edges between two nodes)"
    key = (
        f'<text class="cw-key" x="0" y="16">Each {what}: as wide as its score is large. '
        '<tspan class="cw-up">Blue, solid: the answer loses it when it is cut.</tspan> '
        '<tspan class="cw-down">Orange, dashed: the answer gains.</tspan></text>'
    )
    largest = max(lines, key=lambda line: abs(line.score))
    described = f"{len(edges)} edges between {len(at)} nodes, the largest {_described_edge(largest)}."
    return Markup(
        f'<svg class="cw-circuit {name}" role="img" width="{width}" height="{height}">'
        f"<title>{escape(title)}</title><desc>{escape(described)}</desc><style>{_focus(name, list(at))}</style>"
        f"{key}{drawn}</svg>"
    )


def _line(edge: CircuitEdge) -> _Line:
    target, _, part = edge["destination"].partition(".")
    if part == "mlp":
        target, part = edge["destination"], ""
    kv = re.fullmatch(r"L(\d+)K(\d+)", target)
    if kv:
        target = f"L{kv[1]}H{int(kv[2]) * edge.get('group', 1)}"
    for node in (edge["source"], target):
        _depth(node)
    return _Line(edge["source"], target, part, edge["score"], [(edge["destination"], edge["score"])])


def _merged(lines: Sequence[_Line]) -> list[_Line]:
    merged: dict[tuple[str, str], _Line] = {}
    for line in lines:
        one = merged.setdefault((line.source, line.target), _Line(line.source, line.target, "", 0.0))
        one.score += line.score
        one.parts += line.parts
        one.port = "".join(port for port in _PORTS if port in {*one.port, *line.port})
    return list(merged.values())


def _depth(node: str) -> tuple[int, int]:
    """Layer and place within it: heads, then the MLP."""
    if node == "embed":
        return (-1, 0)
    if node == "logits":
        return (1 << 30, 0)
    head = re.fullmatch(r"L(\d+)H(\d+)", node)
    mlp = re.fullmatch(r"L(\d+)\.mlp", node)
    if head:
        return (int(head[1]), 0)
    if mlp:
        return (int(mlp[1]), 1)
    raise CutawayError(f"{node!r} is no node of a circuit; nodes are embed, L0H3, L0.mlp and logits")


def _rows(lines: Sequence[_Line], parallel: bool) -> list[list[str]]:
    """Nodes by depth, from the embedding up; layers without a node take no room."""
    nodes = {"embed", "logits"} | {node for line in lines for node in (line.source, line.target)}
    rows: dict[tuple[int, int], list[str]] = {}
    for node in sorted(nodes, key=lambda node: (_depth(node), [int(n) for n in re.findall(r"\d+", node)])):
        layer, place = _depth(node)
        rows.setdefault((layer, 0 if parallel else place), []).append(node)
    return list(rows.values())


def _width(row: Sequence[str]) -> float:
    return len(row) * (_NODE + _GAP)


def _across(rows: list[list[str]], lines: Sequence[_Line]) -> dict[str, float]:
    """Where each node stands across the drawing, from its middle: sorted by the mean place of its neighbours.

    The order settles in a few sweeps up and down (Sugiyama, Tagawa & Toda 1981).
    """
    x: dict[str, float] = {}
    widest = max(_NARROWEST, *(_width(row) for row in rows))

    def place(row: Sequence[str]) -> None:
        step = min(widest / len(row), 2.2 * (_NODE + _GAP))
        for i, node in enumerate(row):
            x[node] = (i - (len(row) - 1) / 2) * step

    for row in rows:
        place(row)
    near: dict[str, list[tuple[str, float]]] = {node: [] for node in x}
    for line in lines:
        weight = math.sqrt(abs(line.score)) + 1e-9
        if line.source != "embed" and line.target != "logits":  # they stand in the middle and would pull all there
            near[line.source].append((line.target, weight))
            near[line.target].append((line.source, weight))
    for sweep in range(8):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            pull = {}
            for node in row:
                total = sum(weight for _, weight in near[node])
                pull[node] = sum(x[other] * weight for other, weight in near[node]) / total if total else x[node]
            row.sort(key=lambda node: pull[node])
            place(row)
    lone = (node for row in rows if len(row) == 1 for node in row if node not in ("embed", "logits"))
    for i, node in enumerate(lone):  # in one column they would hide the edges that pass
        x[node] = (0.15 if i % 2 else -0.15) * widest
    return x


def _edge(line: _Line, at: dict[str, tuple[float, float]], most: float, units: str) -> str:
    (x0, y0), (x1, y1) = at[line.source], at[line.target]
    start, end = y0, y1 + _TALL
    x1 += _port(line.port)
    bend = max(18.0, (start - end) * 0.42)
    passed = (start - end) / _ROW
    side = 0.0 if passed < 1 or abs(x1 - x0) > _NODE else (1 if (x0 + x1) >= 0 else -1) * min(90.0, 22 * passed)
    path = (
        f"M{x0:.1f} {start:.1f}C{x0 + side:.1f} {start - bend:.1f} {x1 + side:.1f} {end + bend:.1f} {x1:.1f} {end:.1f}"
    )
    strength = math.sqrt(abs(line.score) / most) if most else 0.0
    width = max(_THINNEST, _WIDEST * strength)
    css = "cw-down" if line.score < 0 else "cw-up"
    ends = f"{_class('f', line.source)} {_class('t', line.target)}"
    look = f'stroke-width="{width:.2f}" stroke-opacity="{min(0.85, 0.3 + strength):.2f}"'
    return (
        f'<g class="cw-link {css} {ends}"><title>{escape(_described_edge(line, units))}</title>'
        f'<path d="{path}" {look}/><path class="cw-hit" d="{path}"/></g>'
    )


def _port(port: str) -> float:
    """How far from a head's middle its query, key or value enters; merged ones enter in the middle of theirs."""
    places = [(_PORTS.index(letter) - 1) * _NODE / 3.2 for letter in port if letter in _PORTS]
    return sum(places) / len(places) if places else 0.0


def _described_edge(line: _Line, units: str = "") -> str:
    if len(line.parts) == 1:
        part = _PART.get(line.port)
        target = f"{line.target}, {part}" if part else line.target
        return f"{line.source} → {target}: {_signed(line.score)}{f' {units}' if units else ''}"
    parts = "; ".join(f"{name} {_signed(score)}" for name, score in line.parts)
    return f"{line.source} → {line.target}: {_signed(line.score)}{f' {units}' if units else ''} ({parts})"


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else ''}{number(float(value))}"


def _name(row: Sequence[str], at: dict[str, tuple[float, float]]) -> str:
    """What the row is, at the left."""
    layer, _ = _depth(row[0])
    if row[0] in ("embed", "logits"):
        return ""
    y = at[row[0]][1] + _TALL / 2 + 4
    kind = "MLP" if all(node.endswith("mlp") for node in row) else "heads"
    return f'<text class="cw-depth" x="0" y="{y:.1f}">{layer} · {kind}</text>'


def _node(node: str, at: tuple[float, float], ports: set[tuple[str, str]], lines: Sequence[_Line]) -> str:
    x, y = at
    into = sum(line.score for line in lines if line.target == node)
    out = sum(line.score for line in lines if line.source == node)
    tip = f"{node}: edges out {_signed(out)}" + ("" if node == "embed" else f", edges in {_signed(into)}")
    head = "H" in node
    round_ = 17 if node.endswith("mlp") else 4
    parts = [
        f'<g class="cw-part {_class("n", node)}"><title>{escape(tip)}</title>'
        f'<rect x="{x - _NODE / 2:.1f}" y="{y:.1f}" width="{_NODE}" height="{_TALL}" rx="{round_}"/>'
        f'<text x="{x:.1f}" y="{y + (14 if head else 21):.1f}">{escape(node)}</text>'
    ]
    if head:
        used = {letter for target, port in ports if target == node for letter in port}
        for letter in _PORTS:
            css = "cw-port" if letter in used else "cw-port cw-unused"
            parts.append(f'<text class="{css}" x="{x + _port(letter):.1f}" y="{y + 29:.1f}">{letter}</text>')
    return "".join(parts) + "</g>"


def _class(letter: str, node: str) -> str:
    return f"{letter}-{node.replace('.', '-')}"


def _focus(name: str, nodes: Sequence[str]) -> str:
    """While the pointer is on a node, only its own edges are strong."""
    rules = [
        f".{name}:has(.{_class('n', node)}:hover) .cw-link:not(.{_class('f', node)}):not(.{_class('t', node)})"
        for node in nodes
    ]
    return f"{','.join(rules)}{{opacity:.05}}"
