"""Attention views: the numbers in them, hostile tokens, size, SVG and PNG; in a browser, what is seen and reached."""

import base64
import re
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.draw.attention import Pattern, attention_html, attention_svg, enlargement
from cutaway.draw.page import page_html
from cutaway.model.language_model import LanguageModel
from cutaway.observe.heads import attention_view as module
from cutaway.observe.heads.attention_view import AttentionView, attention_view

HOSTILE = ("<s>", "</script><script>alert(1)</script>", '" onload="alert(1)', "\n", "\u202e", "&amp;", "]]>", "'")


def embedded(html: str, p: int) -> dict[str, torch.Tensor]:
    """What a fragment holds, read back from its images with a PNG reader of their own: name -> uint8 [p, p]."""
    found = {}
    for name, data in re.findall(r'data-name="(\w+)".*?base64,([^)]+)\)', html):
        png = base64.b64decode(data)
        assert png[:8] == b"\x89PNG\r\n\x1a\n"
        side, height, depth, colour = struct.unpack(">IIBB", png[16:26])
        assert (height, depth, colour) == (side, 8, 4)
        chunks, at = {}, 8
        while at < len(png):
            (length,) = struct.unpack(">I", png[at : at + 4])
            kind, body = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
            assert struct.unpack(">I", png[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
            chunks[kind], at = body, at + 12 + length
        lines = torch.frombuffer(bytearray(zlib.decompress(chunks[b"IDAT"])), dtype=torch.uint8).view(side, -1)
        assert not lines[:, 0].any(), "lines are not filtered"
        opacity = lines[:, 2::2]
        f = side // p
        small = opacity[::f, ::f]
        assert torch.equal(small.repeat_interleave(f, 0).repeat_interleave(f, 1), opacity)
        found[name] = small
    return found


@pytest.fixture(scope="module")
def view(llama: LanguageModel) -> AttentionView:
    return attention_view(llama, [5, 6, 7, 8, 9, 10, 11])


def planted(tokens: tuple[str, ...] = HOSTILE, layers: int = 2, heads: int = 3) -> AttentionView:
    """Heads that each look at one place: head (l, h) at the token l + h back, but no further than the first."""
    p = len(tokens)
    values = torch.zeros(layers * heads, p, p, dtype=torch.uint8)
    chosen = [(layer, head) for layer in range(layers) for head in range(heads)]
    for n, (layer, head) in enumerate(chosen):
        for i in range(p):
            values[n, i, max(0, i - layer - head)] = 255
    return AttentionView("<model>", tokens, tuple(chosen), values, {}, (0, 1))


def test_the_view_holds_the_patterns(llama: LanguageModel, view: AttentionView) -> None:
    run = llama.run([5, 6, 7, 8, 9, 10, 11], capture="blocks.*.attn.pattern", logits=None)
    found = embedded(str(view.html()), 7)
    assert len(found) == len(view.heads) == 12
    for layer, head in view.heads:
        exact = run[f"blocks.{layer}.attn.pattern"][0, head]
        torch.testing.assert_close(view.pattern((layer, head)), exact, atol=0.5 / 255 + 1e-6, rtol=0)
        assert torch.equal(found[f"L{layer}H{head}"], view.values[view.heads.index((layer, head))])


def test_heads_and_layers_are_chosen(llama: LanguageModel) -> None:
    ids = [5, 6, 7]
    assert attention_view(llama, ids, layers=[2, 0], heads=1).heads == ((2, 1), (0, 1))
    assert attention_view(llama, ids, heads=[(1, 3), (0, 0)], start=(0, 0)).heads == ((1, 3), (0, 0))
    assert attention_view(llama, ids, layers=1).heads == tuple((1, head) for head in range(4))
    looked = attention_view(llama, ids, 1, edits=cutaway.zero("blocks.1.attn.scores"))
    torch.testing.assert_close(looked.pattern((1, 0))[2], torch.full((3,), 1 / 3), atol=0.003, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"layers": 7}, "no head L7H0"),
        ({"heads": [9]}, "no head L0H9"),
        ({"heads": [(0, 0)], "layers": 1}, "pairs alone"),
        ({"heads": []}, "no head to show"),
        ({"heads": ["x"]}, "neither numbers"),
        ({"start": (0, 9)}, "start="),
    ],
)
def test_heads_that_are_not_there(llama: LanguageModel, arguments: dict, says: str) -> None:
    with pytest.raises(CutawayError, match=says):
        attention_view(llama, [5, 6, 7], **arguments)


def test_one_prompt_and_not_too_much(llama: LanguageModel, view: AttentionView, monkeypatch) -> None:
    with pytest.raises(CutawayError, match="one prompt, not 2"):
        attention_view(llama, [[5, 6], [7, 8]])
    with pytest.raises(CutawayError, match="no L0H9"):
        view.svg((0, 9))
    monkeypatch.setattr(module, "CELLS", 100)
    with pytest.raises(CutawayError, match="name fewer layers or heads"):
        attention_view(llama, [5, 6, 7, 8])


def test_patterns_that_do_not_fit_are_refused() -> None:
    with pytest.raises(CutawayError, match="no attention pattern"):
        attention_html(tokens=["a"], patterns=[], title="")
    with pytest.raises(CutawayError, match="2 tokens need 4"):
        attention_svg(tokens=["a", "b"], patterns=[Pattern(layer=0, head=0, values=b"\0")], title="")


def test_hostile_tokens_are_text() -> None:
    view = planted()
    html = str(view.html())
    assert html.count("<script") == 1
    assert "alert(1)</script>" not in html
    assert '" onload="' not in html
    assert "\u202e" not in html
    for dark in (False, True):
        for head in (None, (0, 1)):
            root = ElementTree.fromstring(view.svg(head, dark=dark))  # well-formed, whatever the tokens are
            assert not [e for e in root.iter() if e.tag.endswith("script")]
    texts = [e.text for e in ElementTree.fromstring(view.svg((0, 1))).iter() if e.tag.endswith("text")]
    assert "⏎" in texts
    assert "‹U+202E›" in texts


def test_the_svg_of_one_head_has_its_cells() -> None:
    root = ElementTree.fromstring(planted(("a", "b", "c")).svg((1, 0)))
    tips = [e.text for e in root.iter() if e.tag.endswith("title")]
    assert {"a → a: 1", "b → a: 1", "c → b: 1"} <= set(tips)
    fills = {e.get("fill") for e in root.iter() if e.tag.endswith("rect")}
    assert "#003671" in fills
    many = planted(tuple("abcdefghij" * 7))
    assert "<image" in many.svg((0, 1))
    assert many.svg((0, 1)).count("<rect") < 10


def test_a_page_of_twelve_by_twelve_heads_stays_small() -> None:
    """12 × 12 heads on 64 tokens, as noisy as attention can be."""
    p, n = 64, 144
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(n, p, p, generator=generator).tril() ** 2
    values = (255 * noise / noise.sum(-1, keepdim=True).clamp(min=1)).round().to(torch.uint8)
    heads = tuple((i // 12, i % 12) for i in range(n))
    view = AttentionView("m", tuple(f" w{i}" for i in range(p)), heads, values, {}, (0, 0))
    assert len(view._repr_html_()) < 3_000_000
    assert embedded(str(view.html()), p)["L11H11"].equal(values[-1])
    assert enlargement(64) == 2


def test_png_is_the_drawing(view: AttentionView, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    for head in (None, (1, 2)):
        path = view.png(tmp_path / "drawn.png", head, zoom=1.5)
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        wide = float(ElementTree.fromstring(view.svg(head)).get("width", "0"))
        assert struct.unpack(">I", data[16:20])[0] == pytest.approx(1.5 * wide, abs=2)
    assert list(tmp_path.iterdir()) == [tmp_path / "drawn.png"]


def test_without_the_library_a_png_says_how_to_get_it(view: AttentionView, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(CutawayError, match=r"cutaway\[png\]"):
        view.png(tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_a_notebook_gets_everything_in_one_piece(view: AttentionView) -> None:
    html = view._repr_html_()
    assert "--accent" in html
    assert "http" not in html.replace("http://www.w3.org", "")
    assert repr(view).startswith("attention of tiny llama: 12 heads × 7 tokens")


# In a browser -------------------------------------------------------------------------------------------------------


@pytest.fixture
def visit(browser, tmp_path: Path) -> Iterator:
    """Opens a page of two views, the first with hostile tokens; the console stays silent and nothing is fetched."""
    path = tmp_path / "page.html"
    words = tuple(f" word{i}" for i in range(12))
    sections = [("hostile", "", planted().html()), ("plain", "", planted(words, 3, 8).html())]
    path.write_text(page_html(title="views/" * 40, sections=sections), encoding="utf-8")
    contexts, noise, requests = [], [], []

    def open_page(**options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on("dialog", lambda dialog: noise.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert noise == []
    assert {url for url in requests if not url.startswith("data:")} == {path.as_uri()}


@pytest.mark.browser
def test_a_token_shows_where_it_looks_and_who_looks_at_it(visit) -> None:
    from playwright.sync_api import expect

    page = visit()
    plain = page.locator(".cw-att").nth(1)
    say, tokens = plain.locator(".cw-att-say"), plain.locator(".cw-att-token")
    expect(plain.locator(".cw-att-head-name")).to_have_text("L0H1")
    tokens.nth(5).hover()
    expect(say).to_have_text("·word5 (5) looks at ·word4 (4) 1.00; looked at by ·word6 (6) 1.00")
    assert "cw-s10" in tokens.nth(4).get_attribute("class")
    assert "cw-d0" in tokens.nth(6).get_attribute("class")
    assert tokens.nth(3).get_attribute("class") == "cw-att-token"
    plain.locator('[data-name="L2H3"]').click()
    expect(plain.locator(".cw-att-head-name")).to_have_text("L2H3")
    expect(say).to_contain_text("looks at ·word0 (0) 1.00; looked at by ·word10 (10) 1.00")
    hostile = page.locator(".cw-att").nth(0)
    hostile.locator(".cw-att-token").nth(1).hover()
    expect(hostile.locator(".cw-att-say")).to_contain_text(
        "</script><script>alert(1)</script> (1) looks at <s> (0) 1.00"
    )


@pytest.mark.browser
def test_it_is_held_and_let_go_by_keyboard(visit) -> None:
    from playwright.sync_api import expect

    page = visit()
    plain = page.locator(".cw-att").nth(1)
    say, tokens = plain.locator(".cw-att-say"), plain.locator(".cw-att-token")
    expect(say).to_contain_text("·word11 (11) looks at ·word10")
    tokens.nth(11).focus()
    for key in ("ArrowLeft", "ArrowLeft", "Enter"):
        page.keyboard.press(key)
    expect(say).to_contain_text("·word9 (9) looks at")
    expect(say).to_contain_text("held")
    tokens.nth(2).hover()
    expect(say).to_contain_text("·word9 (9) looks at")
    page.keyboard.press("Escape")
    expect(say).not_to_contain_text("held")
    assert plain.locator('.cw-att-token[tabindex="0"]').count() == 1
    plain.locator('.cw-att-head[tabindex="0"]').focus()
    for key in ("ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    expect(plain.locator(".cw-att-head-name")).to_have_text("L1H2")
    expect(plain.locator('.cw-att-head[aria-checked="true"]')).to_have_attribute("data-name", "L1H2")


@pytest.mark.browser
def test_the_large_pattern_is_drawn_and_pointed_at(visit) -> None:
    from playwright.sync_api import expect

    page = visit()
    plain = page.locator(".cw-att").nth(1)
    expect(plain.locator(".cw-att-big")).to_be_visible()
    canvas = plain.locator("canvas")
    cell = canvas.bounding_box()["width"] / 12
    canvas.hover(position={"x": 4.5 * cell, "y": 5.5 * cell})
    expect(plain.locator(".cw-att-say")).to_contain_text("at ·word4 (4) 1.000")
    opacity = page.evaluate(
        """() => { const c = document.querySelectorAll(".cw-att canvas")[1], f = c.width / 12;
        const pixels = c.getContext("2d").getImageData(0, 0, c.width, c.width).data;
        return [4, 5].map((j) => pixels[4 * (Math.floor(5.5 * f) * c.width + Math.floor((j + 0.5) * f)) + 3]); }"""
    )
    assert opacity == [255, 0]
    dark = visit(color_scheme="dark")
    colour = "getComputedStyle(document.querySelector('.cw-att-map')).backgroundImage"
    assert page.evaluate(colour) != dark.evaluate(colour)


@pytest.mark.browser
@pytest.mark.parametrize("script", [True, False])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_and_is_legible_without_its_script(visit, width: int, script: bool) -> None:
    page = visit(viewport={"width": width, "height": 844}, java_script_enabled=script)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".cw-att-map:visible").count() == 6 + 24
    assert "word11" in page.locator(".cw-att-text").nth(1).inner_text()
    assert page.locator(".cw-att-big:visible").count() == (2 if script else 0)
    assert page.locator(".cw-att-head").first.get_attribute("aria-label").startswith("L0H0; the last token looks most")
