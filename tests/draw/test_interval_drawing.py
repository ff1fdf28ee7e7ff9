"""Numbers with intervals as one picture."""

import xml.etree.ElementTree as ElementTree
from math import nan

from cutaway.draw.intervals import intervals_svg


def test_each_number_has_its_name_its_point_and_its_value():
    svg = intervals_svg(
        groups=[
            [
                {"label": "a < b", "value": 0.5, "low": 0.25, "high": 0.75},
                {"label": "random", "value": -0.5, "control": True},
            ],
            [{"label": "unknown", "value": nan, "low": nan, "high": nan}],
        ],
        title="Three & more",
        units="nats",
    )
    root = ElementTree.fromstring(svg)
    texts = [element.text for element in root.iter("text")]
    assert texts == ["a < b", "0.50 [0.25, 0.75]", "random (control)", "−0.5", "unknown", "–", "In nats."]
    points = list(root.iter("circle"))
    assert len(points) == 2  # what is not known has no place
    a, b = (float(point.get("cx", "nan")) for point in points)
    zero = next(line for line in root.iter("line") if "cw-zero" in line.get("class", ""))
    assert abs((a + b) / 2 - float(zero.get("x1", "nan"))) < 0.1  # 0.5 and -0.5 lie on both sides of 0
    assert [group.get("class") for group in root.findall("g")] == ["cw-result", "cw-control", "cw-result"]
    (interval,) = root.iter("path")
    assert interval.get("d", "").startswith("M")
