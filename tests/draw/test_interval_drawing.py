"""Numbers with intervals as one picture."""

import xml.etree.ElementTree as ElementTree
from math import nan

from cutaway.draw.intervals import intervals_svg


def test_each_number_has_its_name_its_point_and_its_value():
    svg = intervals_svg(
        groups=[
            [
                {
                    "label": "a < b", "value": 0.5, "low": 0.25, "high": 0.75,
                    "controls": [{"label": "random", "value": -0.5}],
                },
                {"label": "bound", "value": -0.5, "control": True},
            ],
            [{"label": "unknown", "value": nan, "low": nan, "high": nan}],
        ],
        title="Three & more",
        units="nats",
    )  # fmt: skip
    root = ElementTree.fromstring(svg)
    texts = [element.text for element in root.iter("text")]
    ticks = ["−0.5", "0", "0.5", "1"]
    assert [text for text in texts if text not in ticks] == [
        "a < b", "0.50 [0.25, 0.75]", "○ random (control): −0.5", "bound (control)", "unknown", "–", "−0.6", "−0.4",
        "−0.2", "0.2", "0.4", "0.6", "In nats.",
    ]  # fmt: skip
    assert texts.count("0") == 2  # each group has an axis
    points = [float(point.get("cx", "nan").removesuffix("%")) for point in root.iter("circle")]
    assert len(points) == 3  # what is not known has no place
    zero = next(line for line in root.iter("line") if line.get("class") == "cw-zero")
    at = float(zero.get("x1", "nan").removesuffix("%"))
    assert abs((points[0] + points[1]) / 2 - at) < 0.1  # 0.5 and -0.5 lie on both sides of 0
    assert points[1] == points[2]
    assert [group.get("class") for group in root.findall("g")] == ["cw-result", "cw-control", "cw-result"]
    (interval,) = (one for one in root.iter("g") if one.get("class") == "cw-whisker")
    assert len(list(interval)) == 3
