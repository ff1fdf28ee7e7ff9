"""Each drawing shows the numbers it was given, where they belong, whatever the strings are."""

import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from xml.etree.ElementTree import Element

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markupsafe import Markup

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.draw.charts import (
    axis_range,
    axis_ticks,
    bars_html,
    effect_html,
    effects_html,
    line_legend,
    line_svg,
    line_table,
)
from cutaway.draw.heatmap import heatmap_html, heatmap_svg
from cutaway.draw.latents import features_html
from cutaway.draw.panels import compare_html, figures_html, table_html
from cutaway.draw.scale import Scale
from cutaway.draw.stack import stack_svg
from cutaway.draw.style import standalone
from cutaway.draw.text import escape, number, visible
from cutaway.draw.tokens import lens_html, tokens_html

anything = st.text(st.characters(), max_size=12)
numbers = st.none() | st.floats(-1e6, 1e6)


def parse(drawing: Markup) -> Element:
    """The fragment as XML, which is stricter than HTML: all closed, all quoted, no control characters."""
    assert isinstance(drawing, Markup)
    return ET.fromstring(f"<div>{drawing}</div>")


def classed(root: Element, name: str) -> list[Element]:
    return [element for element in root.iter() if name in element.get("class", "").split()]


def words(element: Element) -> str:
    return "".join(element.itertext())


HEATMAP = {
    "rows": ["L0", "L1"],
    "columns": [" a", "<b>", "c"],
    "values": [[0.0, 0.5, None], [1.0, -0.2, 0.25]],
    "title": "T",
}


def test_heatmap_prints_tints_and_tells_every_value():
    root = parse(heatmap_svg(**HEATMAP, units="nats", scale="diverging"))
    cells = classed(root, "cw-cell")
    assert [cell.get("class", "").split()[1] for cell in cells] == [
        "cw-d5",
        "cw-d8",
        "cw-na",
        "cw-d10",
        "cw-d4",
        "cw-d6",
    ]
    assert [words(cell.find("text")) for cell in cells] == ["0.00", "0.50", "–", "1.00", "−0.20", "0.25"]  # pyright: ignore
    assert words(cells[1].find("title")) == "L0 · <b>: 0.5\u00a0nats"  # pyright: ignore
    svg = root[0]
    assert svg.get("role") == "img"
    assert words(svg[0]) == "T"
    assert words(svg[1]) == "2 rows by 3 columns. Highest 1\u00a0nats at L1, ·a; lowest −0.2\u00a0nats at L1, <b>."


def test_a_heatmap_has_a_legend_of_the_range_that_is_there():
    (scale,) = classed(parse(heatmap_svg(**HEATMAP, units="nats", scale="diverging")), "cw-scale")
    assert [rect.get("class") for rect in scale.iter("rect")] == [f"cw-d{step}" for step in range(4, 11)]
    assert [words(text) for text in scale.iter("text")] == ["−0.2", "1", "nats"]
    (scale,) = classed(parse(heatmap_svg(**HEATMAP, scale=Scale(0.0, 0.5))), "cw-scale")
    assert [words(text) for text in scale.iter("text")] == ["≤ 0 (to −0.2)", "≥ 0.5 (to 1)"]


def test_a_heatmap_s_numbers_are_a_table_too():
    root = parse(heatmap_html(**HEATMAP, units="nats"))
    (table,) = root.iter("details")
    assert words(table[0]) == "As a table (nats)"
    assert [words(cell) for cell in table.iter("td")] == ["L0", "0", "0.5", "–", "L1", "1", "−0.2", "0.25"]
    assert root.find(".//*[@tabindex]") is None  # what takes the focus is what the script gives something to do


def test_the_values_of_tokens_have_a_legend_and_a_table():
    rows = [{"tokens": [" a", "b"], "values": [0.5, None], "label": "x"}, {"tokens": ["c"], "values": [-1.0]}]
    root = parse(tokens_html(rows=rows, units="logits"))  # pyright: ignore
    assert words(classed(root, "cw-legend-ends")[0]) == "−100.5"
    assert [words(cell) for cell in root.iter("td")] == [
        "x", "0", "·a", "0.5", "x", "1", "b", "–", "2", "0", "c", "−1",
    ]  # fmt: skip


def test_heatmap_cells_form_the_grid_and_marks_lie_on_them():
    root = parse(heatmap_svg(**HEATMAP, marks=[(1, 2)]))
    boxes = [cell.find("rect") for cell in classed(root, "cw-cell")]
    places = [(float(box.get("x", "")), float(box.get("y", ""))) for box in boxes if box is not None]
    assert [places.index(place) for place in sorted(places, key=lambda p: (p[1], p[0]))] == list(range(6))
    (mark,) = classed(root, "cw-mark")
    assert (float(mark.get("x", "")), float(mark.get("y", ""))) == places[5]
    svg = root[0]
    assert max(x for x, _ in places) < float(svg.get("width", ""))


def test_heatmap_prints_the_given_texts():
    texts = [["a", "b", "c"], ["d", "e", "</text>"]]
    cells = classed(parse(heatmap_svg(**HEATMAP, cell_text=texts)), "cw-cell")
    assert [words(cell.find("text")) for cell in cells] == ["a", "b", "c", "d", "e", "</text>"]  # pyright: ignore


@pytest.mark.parametrize("columns", [1, 9, 60])
def test_heatmap_text_fits_its_cells(columns):
    names = [f"column {place}" for place in range(columns)]
    root = parse(heatmap_svg(rows=["r"], columns=names, values=[[-0.123] * columns], title="T"))
    for cell in classed(root, "cw-cell"):
        box, text = cell.find("rect"), cell.find("text")
        assert box is not None
        assert text is not None
        assert 6.2 * len(words(text)) <= float(box.get("width", ""))


def test_line_draws_the_numbers_to_scale():
    xs, ys = [0.0, 1.0, 2.0, 4.0], [0.1, 0.9, None, 0.4]
    root = parse(line_svg(series=[{"name": "a", "x": xs, "y": ys}], title="T", x_label="block", y_label="p"))
    dots = [(float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in classed(root, "cw-dot")]
    known = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None]
    assert len(dots) == 3
    assert _affine([x for x, _ in known], [x for x, _ in dots]) > 0
    assert _affine([y for _, y in known], [y for _, y in dots]) < 0  # up is more
    assert len(classed(root, "cw-curve")) == 2  # broken at the missing value
    ticks = [text for text in root[0].findall("text") if text.get("text-anchor") == "end"]
    drawn = [(float(words(tick)), float(tick.get("y", "")) - 5) for tick in ticks]
    both = [*[(y, place) for (_, y), (_, place) in zip(known, dots, strict=True)], *drawn]
    _affine([value for value, _ in both], [place for _, place in both])  # the axis is the curve's scale


def test_a_logarithmic_axis_is_to_scale():
    xs = [3.0, 40.0, 900.0]
    root = parse(line_svg(series=[{"name": "a", "x": xs, "y": [1.0, 2.0, 3.0]}], title="T", log_x=True))
    dots = [float(dot.get("cx", "")) for dot in classed(root, "cw-dot")]
    ticks = [text for text in root[0].findall("text") if text.get("text-anchor") == "middle"]
    written = [float(words(tick).replace(",", "")) for tick in ticks]
    assert written == [2, 5, 10, 20, 50, 100, 200, 500, 1000]
    values = [math.log10(x) for x in [*xs, *written]]
    _affine(values, [*dots, *(float(tick.get("x", "")) for tick in ticks)])


def _affine(values: list[float], places: list[float]) -> float:
    """The slope of the straight line through all points; fails when they are not on one."""
    slope = (places[1] - places[0]) / (values[1] - values[0])
    for value, place in zip(values, places, strict=True):
        assert place == pytest.approx(places[0] + slope * (value - values[0]), abs=0.2)
    return slope


def test_line_controls_look_and_read_like_controls():
    series = [
        {"name": "found", "x": [0, 1], "y": [0, 1], "low": [0, 0.5], "high": [0.2, None]},
        {"name": "random", "x": [0, 1], "y": [0, 0], "control": True},
    ]
    root = parse(line_svg(series=series, title="T"))  # pyright: ignore
    assert len(classed(root, "cw-control")) == 1
    assert len(classed(root, "cw-c0")) == 1
    assert "random (control) at 1: 0" in [words(title) for title in root.iter("title")]
    legend = parse(line_legend(series))  # pyright: ignore
    assert [words(item).strip() for item in legend.iter("li")] == ["found", "random control"]


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_round_and_cover_the_range(low, width):
    high = low + width
    if not high > low + 1e-9 * abs(low):
        return
    ticks = axis_ticks(low, high)
    assert 2 <= len(ticks) <= 9
    assert ticks == sorted(set(ticks))
    assert ticks[0] <= low + 1e-6 * width
    assert ticks[-1] >= high - 1e-6 * width


def test_whole_axes_have_whole_ticks():
    assert axis_ticks(0, 7, whole=True) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert all(tick.is_integer() for tick in axis_ticks(0, 37, whole=True))


EFFECT = {
    "name": "patch",
    "value": 0.9,
    "n": 50,
    "interval": [0.8, 1.0],
    "controls": [
        {"name": "random position", "value": -0.1, "interval": [-0.2, 0.0], "n": 40},
        {"name": "shuffled", "value": 0.3, "interval": None, "n": None},
    ],
    "ablation": "zero",
    "units": "share",
    "command": None,
}


def _percent(element: Element, name: str) -> float:
    return float(element.get(name, "").removesuffix("%"))


def _places(drawing: Element) -> list[float]:
    return [_percent(dot, "cx" if dot.get("cx") else "x") for dot in classed(drawing, "cw-dot")]


def test_an_effect_and_its_controls_share_a_row_and_an_axis_with_ticks():
    root = parse(effect_html(EFFECT))
    (row, axis) = classed(root, "cw-bar")
    places = _places(row)
    assert [mark.get("class") for mark in classed(row, "cw-amount")] == [
        "cw-amount cw-result", "cw-amount cw-control", "cw-amount cw-control",
    ]  # fmt: skip
    ticks = [(float(words(text).replace("−", "-")), _percent(text, "x")) for text in axis.iter("text")]
    assert 2 < len(ticks) < 9
    assert {_percent(line, "x1") for line in classed(row, "cw-zero")} == {place for tick, place in ticks if tick == 0}
    values = [0.9, -0.1, 0.3, *(tick for tick, _ in ticks)]
    assert _affine(values, [*places, *(place for _, place in ticks)]) > 0
    assert all(0 < place < 100 for _, place in ticks)
    whisker = classed(root, "cw-whisker")[0][0]
    assert _affine([0.9, 0.8, 1.0], [places[0], _percent(whisker, "x1"), _percent(whisker, "x2")]) > 0
    assert "0.9 [0.8, 1.0]" in words(row)
    assert "○ random position control −0.1 [−0.2, 0.0]\u00a0share n = 40" in words(row)
    assert "□ shuffled control 0.3\u00a0share" in words(row)
    assert "Edit: zero." in words(root)


def test_effects_in_the_same_units_are_one_figure_on_one_scale():
    halved = {**EFFECT, "name": "half", "value": 0.45, "interval": None}
    root = parse(effects_html([EFFECT, halved, {**EFFECT, "units": "nats"}]))
    shares, nats = classed(root, "cw-bars")
    assert [words(label) for label in classed(shares, "cw-bar-label")] == ["patch", "half"]
    assert len(classed(shares, "cw-ticks")) == len(classed(nats, "cw-ticks")) == 1
    first, *_, half, _, _ = _places(shares)
    zero = _percent(classed(shares, "cw-zero")[0], "x1")
    assert first - zero == pytest.approx(2 * (half - zero), abs=0.05)


def test_effect_of_a_number_that_is_not_finite_is_a_dash():
    root = parse(effect_html({**EFFECT, "value": "nan", "interval": ["-inf", 1.0]}))
    assert words(classed(root, "cw-bar-value")[0]).startswith("–")


@pytest.mark.parametrize("controls", [[], (), None])
def test_an_effect_without_controls_is_refused(controls):
    with pytest.raises(CutawayError, match="'patch' has no controls"):
        effect_html({**EFFECT, "controls": controls})


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True)))
@example([1.000002e300])
@example([-1.7e308, 1.7e308])
def test_every_list_of_numbers_has_an_axis(values):
    assert len(axis_ticks(*axis_range(values))) >= 2


def test_bars_start_at_zero_and_controls_are_hatched():
    items = [
        {"label": "a", "value": 2.0, "low": 1.5, "high": 2.5},
        {"label": "b", "value": -1.0, "control": True},
        {"label": "c", "value": None},
    ]
    root = parse(bars_html(items=items, units="nats"))  # pyright: ignore
    first, second = classed(root, "cw-fill")
    zero = _percent(classed(root, "cw-zero")[0], "x1")
    assert _percent(first, "x") == pytest.approx(zero, abs=0.02)
    assert _percent(second, "x") + _percent(second, "width") == pytest.approx(zero, abs=0.02)
    assert _percent(first, "width") == pytest.approx(2 * _percent(second, "width"), abs=0.05)
    assert len(classed(root, "cw-hatch")) == 1
    assert [words(value) for value in classed(root, "cw-bar-value")] == [
        "2.0 [1.5, 2.5]\u00a0nats",
        "−1\u00a0nats",
        "–",
    ]


@given(st.lists(st.tuples(anything, numbers), min_size=1, max_size=8))
def test_tokens_are_all_there_and_all_visible(pairs):
    row = {"tokens": [token for token, _ in pairs], "values": [value for _, value in pairs], "label": "x"}
    root = parse(tokens_html(rows=[row]))  # pyright: ignore
    (run,) = classed(root, "cw-token-run")
    spans = run.findall("span")
    assert [words(span) for span in spans] == [visible(token) for token, _ in pairs]
    assert [span.get("title") for span in spans] == [None if v is None else number(v) for _, v in pairs]


def test_lens_shows_token_and_probability_in_every_cell():
    root = parse(
        lens_html(
            layers=["0", "1"], tokens=[" a", "\n"], top=[["</td>", " b"], ["", "x" * 50]],
            probability=[[0.0, 0.234], [1.0, None]], title="T",
        )
    )  # fmt: skip
    assert [words(cell) for cell in root.iter("td")] == ["</td>.00", "·b.23", "∅1.00", "xxxxxxxxx…–"]
    assert [cell.get("class") for cell in root.iter("td")] == ["cw-s0", "cw-s2", "cw-s10", "cw-na"]
    assert [words(head) for head in root.iter("th")] == ["layer", "·a", "⏎", "0", "1"]


def test_table_aligns_numbers_and_writes_every_cell():
    root = parse(table_html(columns=["a", "b", "c"], rows=[["x", 1.5, True], [None, None, False]], title="T"))
    assert [words(cell) for cell in root.iter("td")] == ["x", "1.5", "yes", "–", "–", "no"]
    assert [cell.get("class") for cell in root.iter("th")] == ["cw-left", "cw-right", "cw-left"]
    assert [cell.get("class") for cell in root.iter("td")] == [None, "cw-right", None] * 2
    numbers = parse(table_html(columns=["a", "b", "c"], rows=[["x", 1, 2]], title="T"))
    assert "cw-numbers" in (next(numbers.iter("table")).get("class") or "")
    assert [cell.get("class") for cell in numbers.iter("td")] == ["cw-left", None, None]


def test_highlights_are_marked_even_when_they_look_like_markup():
    items = [{"label": "a", "text": "Sure </pre> surely Sure", "highlight": ["Sure", "</pre>", "Sure </pre>"]}]
    root = parse(compare_html(items=items, prompt="<|user|>"))  # pyright: ignore
    assert [words(mark) for mark in root.iter("mark")] == ["Sure </pre>", "Sure"]
    assert words(classed(root, "cw-text")[0]) == "aSure </pre> surely Sure"


def test_figures_say_which_is_a_control():
    root = parse(
        figures_html(items=[{"label": "a", "value": 0.5, "units": "%"}, {"label": "b", "value": None, "control": True}])
    )
    tiles = classed(root, "cw-tile")
    assert [words(tile) for tile in tiles] == ["a0.5%", "b control–"]
    assert [len(classed(tile, "cw-control")) for tile in tiles] == [0, 1]


def test_latents_show_what_is_known_and_fold():
    latent = {
        "id": 7, "label": "<b>", "label_note": "automatic", "density": 0.0123, "auroc": 0.9, "concept": "Paris",
        "top_examples": [{"tokens": ["a", " b"], "values": [0.0, 2.0]}],
        "promotes": [{"token": "\n", "value": 1.5}], "suppresses": [],
    }  # fmt: skip
    bare = {"id": 8, "label": "?", "density": None, "top_examples": []}
    root = parse(features_html(items=[latent, bare]))
    first, second = root.iter("details")
    assert first.get("open") is not None
    assert second.get("open") is None
    assert words(classed(first, "cw-latent-about")[0]) == "active on 1.23% of tokens · AUROC 0.9 for Paris"
    assert [span.get("class") for span in classed(first, "cw-token-run")[0].findall("span")] == [None, "cw-s10"]
    assert [words(item) for item in first.iter("li")] == ["⏎1.5"]
    assert "none recorded" in words(second)


TAGS = """div svg title desc g rect text line path circle ul ol li em span p dl dt dd small table caption thead tbody tr
th td pre mark i wbr details summary"""


@settings(max_examples=200)
@given(anything, anything, numbers)
def test_no_string_breaks_any_drawing(a, b, value):
    latent = {"id": 1, "label": a, "density": 0.1, "concept": b, "auroc": 0.5, "top_examples": []}
    latent["promotes"] = [{"token": a, "value": 1}]
    drawings = [
        heatmap_svg(rows=[a], columns=[b, a], values=[[value, value]], title=b, units=a, row_axis=a, column_axis=b),
        line_svg(series=[{"name": a, "x": [0, 1], "y": [value, 1]}], title=b, x_label=a, y_label=b),
        line_legend([{"name": a, "x": [0], "y": [0]}]),
        bars_html(items=[{"label": a, "value": value, "low": value, "high": value}], units=b),
        effect_html({**EFFECT, "name": a, "value": value, "units": b, "ablation": a}),
        figures_html(items=[{"label": a, "value": b, "units": a, "detail": b}]),
        table_html(columns=[a], rows=[[b]], title=a),
        compare_html(items=[{"label": a, "text": b, "note": a, "highlight": [a, b]}], prompt=a),
        lens_html(layers=[a], tokens=[b], top=[[a]], probability=[[None]], title=b),
        features_html(items=[latent]),
    ]
    for drawing in drawings:
        names = {element.tag for element in parse(drawing).iter()}
        assert names <= set(TAGS.split())


@pytest.mark.parametrize(("blocks", "drawn"), [(1, 2), (2, 2), (8, 8), (16, 16), (80, 16)])
def test_the_stack_has_its_blocks_inside_its_frame(blocks, drawn):
    root = parse(stack_svg(blocks))
    assert len(classed(root, "cw-top")) == drawn
    assert len(classed(root, "cw-inside")) == 2 * drawn
    corners = [
        (float(x), float(y))
        for path in classed(root, "cw-top") + classed(root, "cw-left") + classed(root, "cw-right")
        for x, y in (corner.split() for corner in path.get("d", "")[1:-1].split("L"))
    ]
    frame = root[0]
    assert 0 <= min(x for x, _ in corners) <= max(x for x, _ in corners) <= float(frame.get("width", ""))
    assert 0 <= min(y for _, y in corners) <= max(y for _, y in corners) <= float(frame.get("height", ""))


def test_every_picture_has_a_name_or_is_decoration():
    pictures = [
        heatmap_svg(**HEATMAP),
        line_svg(series=[{"name": "a", "x": [0], "y": [0]}], title="T"),
        line_legend([{"name": "a", "x": [0], "y": [0]}]),
        bars_html(items=[{"label": "a", "value": 1}]),
        effect_html(EFFECT),
        stack_svg(8),
    ]
    for drawing in pictures:
        for svg in parse(drawing).iter("svg"):
            named = svg.get("role") == "img" and svg.find("title") is not None and svg.find("desc") is not None
            assert named or svg.get("aria-hidden") == "true"


def test_a_drawing_stands_alone_with_its_style():
    alone = standalone(heatmap_svg(**HEATMAP))
    assert re.search(r"<style>.*\.cw-s10.*</style>", alone, re.DOTALL)
    assert "</style" not in alone.split("<style>")[1].split("</style>")[0]
    assert escape("T") in alone


def test_a_page_is_whole_and_escapes_what_it_is_given() -> None:
    from cutaway.draw.page import page_html

    page = page_html(
        title="<b> & co", sections=[("A <h>", "text & more", Markup("<p>drawn</p>"))], lead="<i>", command="cutaway <x>"
    )
    assert page.startswith("<!doctype html>")
    assert "<p>drawn</p>" in page
    assert page.count("&lt;b&gt; &amp; co") == 2
    assert "A &lt;h&gt;" in page
    assert "cutaway &lt;x&gt;" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_a_chart_of_curves_has_a_table_of_its_numbers():
    series = [
        {"name": "a", "x": [0, 2], "y": [0.5, None], "low": [0.4, None], "high": [0.6, None]},
        {"name": "b", "x": [1, 2], "y": [3.0, 4.0], "control": True},
    ]
    table = parse(line_table(series, "layer"))  # pyright: ignore
    assert [head.text for head in table.iter("th")] == ["layer", "a", "b (control)"]
    assert [[cell.text for cell in row.iter("td")] for row in table.iter("tr")][1:] == [
        ["0", "0.5 [0.4, 0.6]", "–"], ["1", "–", "3"], ["2", "–", "4"],
    ]  # fmt: skip


def test_the_numbers_of_an_axis_stay_inside_the_plot():
    drawn = bars_html(items=[{"label": "a", "value": -0.25}, {"label": "b", "value": 1.0}])
    ticks = re.search(r'<div class="cw-bar cw-ticks">(.*?)</div>', drawn)
    assert ticks is not None
    anchors = re.findall(r'text-anchor="(\w+)"', ticks[1])
    assert (anchors[0], anchors[-1]) == ("start", "end")
    assert set(anchors[1:-1]) == {"middle"}


def test_no_page_has_curves_without_their_numbers():
    """Where curves get a legend they get a table: of `line_table`, or one of the result's own."""
    own = {"charts.py", "evaluation.py", "frontier.py", "probing.py", "faithfulness.py"}
    sources = [path for path in Path(cutaway.__file__).parent.rglob("*.py") if path.name not in own]
    drawn = [path for path in sources if "line_legend(" in path.read_text(encoding="utf-8")]
    assert drawn
    assert [path.name for path in drawn if "line_table(" not in path.read_text(encoding="utf-8")] == []
