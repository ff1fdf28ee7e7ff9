"""Arrows in the plane and points in columns: every value is there, in its place, and told in words."""

import re
import xml.etree.ElementTree as ElementTree

from cutaway.draw.plane import arrows_svg, points_svg


def test_arrows_point_where_they_should() -> None:
    drawn = arrows_svg(vectors=[(1.0, 0.0), (0.0, -0.5)], names=["a <b>", "c"], title="two", reach=1.25)
    root = ElementTree.fromstring(drawn)
    ends = {
        group.findtext("title"): group.find("line").attrib  # type: ignore[union-attr]
        for group in root.iter("g")
    }
    right = ends["a <b>: (1, 0), length 1"]
    assert float(right["x2"]) > float(right["x1"])
    assert right["y2"] == "90.0"
    down = ends["c: (0, −0.5), length 0.5"]
    assert float(down["y2"]) > 90  # y of an SVG falls
    assert "a <b> has length 1; c has length 0.5" in (root.findtext("desc") or "")
    assert 'class="cw-s10"' in drawn, "the first is the darkest"


def test_every_point_is_drawn_at_its_height_and_crowds_are_spread() -> None:
    drawn = points_svg(
        columns=[[0.0, 0.5, 1.0], [0.5] * 6, [None, float("nan")]],
        names=["x", "y", "z"],
        lines=[("half", 0.5), ("close by", 0.49)],
        title="points",
    )
    root = ElementTree.fromstring(drawn)
    heights = [[float(c.attrib["cy"]) for c in group.iter("circle")] for group in root.iter("g")]
    assert [len(column) for column in heights] == [3, 6, 0]
    assert sorted(heights[0], reverse=True) == heights[0]
    assert heights[0][1] == heights[1][0]
    across = [float(c.attrib["cx"]) for c in list(root.iter("g"))[1].iter("circle")]
    assert len(set(across)) == 6
    labels = [float(y) for y in re.findall(r'y="([\d.]+)">(?:half|close by)<', drawn)]
    assert abs(labels[0] - labels[1]) >= 13, "names do not cover each other"
    assert "x: 3 points from 0 to 1" in (root.findtext("desc") or "")


def test_nothing_to_draw_is_drawn() -> None:
    assert "No values" in points_svg(columns=[[]], names=["none"], title="empty")
