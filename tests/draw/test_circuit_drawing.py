"""A circuit's drawing shows every edge between the right nodes, as wide and in the colour that its score says."""

import itertools
import re
import xml.etree.ElementTree as ET
from xml.etree.ElementTree import Element

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutaway.artifacts.errors import CutawayError
from cutaway.draw.circuit import CircuitEdge, circuit_svg

EDGES: list[CircuitEdge] = [
    {"source": "embed", "destination": "L0.mlp", "score": 4.0},
    {"source": "L0.mlp", "destination": "L1H2.q", "score": 1.0},
    {"source": "L0.mlp", "destination": "L1H2.v", "score": -0.25},
    {"source": "L1H2", "destination": "logits", "score": 2.0},
    {"source": "embed", "destination": "logits", "score": 0.0},
]


def parse(edges: list[CircuitEdge], **more: bool) -> Element:
    return ET.fromstring(circuit_svg(edges=edges, title="<T>", units="logits", **more))


def classed(root: Element, name: str) -> list[Element]:
    return [element for element in root.iter() if name in element.get("class", "").split()]


def tips(root: Element, name: str) -> dict[str, Element]:
    return {element.find("title").text or "": element for element in classed(root, name)}  # type: ignore[union-attr]


def ends(link: Element) -> tuple[float, float, float, float]:
    numbers = [float(n) for n in re.findall(r"-?\d+\.?\d*", link[1].get("d", ""))]
    return numbers[0], numbers[1], numbers[-2], numbers[-1]


def box(node: Element) -> tuple[float, float, float, float]:
    x, y, width, height = (float(node[1].get(key, "")) for key in ("x", "y", "width", "height"))
    return x, y, x + width, y + height


def test_edges_have_width_colour_and_tip() -> None:
    root = parse(EDGES)
    links = tips(root, "cw-link")
    assert set(links) == {
        "embed → L0.mlp: +4 logits",
        "L0.mlp → L1H2, query: +1 logits",
        "L0.mlp → L1H2, value: −0.25 logits",
        "L1H2 → logits: +2 logits",
        "embed → logits: 0 logits",
    }
    widths = {tip: float(link[1].get("stroke-width", "")) for tip, link in links.items()}
    assert widths["embed → L0.mlp: +4 logits"] == pytest.approx(2 * widths["L0.mlp → L1H2, query: +1 logits"])
    assert widths["embed → logits: 0 logits"] < widths["L0.mlp → L1H2, value: −0.25 logits"]
    down = [tip for tip, link in links.items() if "cw-down" in link.get("class", "")]
    assert down == ["L0.mlp → L1H2, value: −0.25 logits"]


def test_edges_end_at_their_nodes_and_ports() -> None:
    root = parse(EDGES)
    nodes = {tip.split(":")[0]: box(node) for tip, node in tips(root, "cw-part").items()}
    assert set(nodes) == {"embed", "L0.mlp", "L1H2", "logits"}
    heights = [nodes[name][1] for name in ("embed", "L0.mlp", "L1H2", "logits")]
    assert heights == sorted(heights, reverse=True)  # embedding below, logits on top
    entries = {}
    for tip, link in tips(root, "cw-link").items():
        source, target = re.match(r"(\S+) → ([^,:]+)", tip).groups()  # type: ignore[union-attr]
        x0, y0, x1, y1 = ends(link)
        left, top, right, bottom = nodes[source]
        assert left < x0 < right
        assert y0 == pytest.approx(top)
        left, top, right, bottom = nodes[target]
        assert left < x1 < right
        assert y1 == pytest.approx(bottom)
        entries[tip] = x1
    assert entries["L0.mlp → L1H2, query: +1 logits"] < entries["L0.mlp → L1H2, value: −0.25 logits"]
    letters = classed(root, "cw-port")
    assert [letter.text for letter in letters] == ["q", "k", "v"]
    assert ["cw-unused" in letter.get("class", "") for letter in letters] == [False, True, False]


def test_parallel_layers_and_shared_keys() -> None:
    edges: list[CircuitEdge] = [
        {"source": "embed", "destination": "L0K1.k", "score": 1.0, "group": 2},
        {"source": "L0H2", "destination": "logits", "score": 1.0},
        {"source": "embed", "destination": "L0.mlp", "score": 1.0},
        {"source": "L0.mlp", "destination": "logits", "score": 1.0},
    ]
    beside = {tip.split(":")[0]: box(node)[1] for tip, node in tips(parse(edges, parallel=True), "cw-part").items()}
    assert beside["L0H2"] == beside["L0.mlp"]
    above = {tip.split(":")[0]: box(node)[1] for tip, node in tips(parse(edges), "cw-part").items()}
    assert above["L0.mlp"] < above["L0H2"]


def test_many_edges_are_merged_by_node() -> None:
    edges: list[CircuitEdge] = [
        {"source": f"L0H{a}", "destination": f"L1H{b}.{part}", "score": 0.5 if part == "q" else -0.125}
        for a, b, part in itertools.product(range(8), range(8), "qkv")
    ]
    links = tips(parse(edges), "cw-link")
    assert len(links) == 64
    assert "L0H3 → L1H5: +0.25 logits (L1H5.q +0.5; L1H5.k −0.125; L1H5.v −0.125)" in links


@settings(max_examples=30)
@given(st.integers(1, 5), st.integers(1, 12), st.data())
def test_nodes_never_overlap(layers: int, heads: int, data: st.DataObject) -> None:
    sources = (
        ["embed"] + [f"L{x}H{h}" for x in range(layers) for h in range(heads)] + [f"L{x}.mlp" for x in range(layers)]
    )
    chosen = data.draw(st.lists(st.sampled_from(sources), min_size=1, unique=True))
    scores = data.draw(st.lists(st.floats(-5, 5), min_size=len(chosen), max_size=len(chosen)))
    edges: list[CircuitEdge] = [
        {"source": source, "destination": "logits", "score": score}
        for source, score in zip(chosen, scores, strict=True)
    ]
    root = parse(edges)
    boxes = [box(node) for node in classed(root, "cw-part")]
    for (a, b, c, d), (e, f, g, h) in itertools.combinations(boxes, 2):
        assert c <= e or g <= a or d <= f or h <= b
    width = float(root.get("width", ""))
    assert all(left >= 60 and right <= width for left, _, right, _ in boxes)


def test_nothing_and_unknown_nodes_are_refused() -> None:
    with pytest.raises(CutawayError, match="nothing to draw"):
        circuit_svg(edges=[], title="")
    with pytest.raises(CutawayError, match="'L0X1' is no node"):
        circuit_svg(edges=[{"source": "L0X1", "destination": "logits", "score": 1.0}], title="")
