"""The page in a real browser: nothing overflows, nothing is fetched, and it works with and without its script."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sample_page import sample

from cutaway.draw.blocks import Figure, Figures, Heatmap, Lens, Section, Table, TourResult
from cutaway.tour.page import write_tour

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = pytest.mark.browser

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDE, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}


def _chromium() -> str | None:
    named = os.environ.get("CUTAWAY_CHROMIUM")
    return named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    path = _chromium()
    if path is None:
        pytest.skip("no Chromium is installed (set CUTAWAY_CHROMIUM to its path)")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


def crowded() -> TourResult:
    """The sample with what could push a page wide: long words, many columns, long commands."""
    long = "x" * 300
    columns = tuple(f"column {place}" for place in range(60))
    section = Section(
        id="crowded",
        title=long,
        question=long,
        lead=long,
        note=long,
        command=long,
        blocks=(
            Figures(items=(Figure(label=long, value=long, units=long, detail=long),)),
            Heatmap(rows=(long,), columns=columns, values=((0.5,) * 60,), caption=long, units=long),
            Table(columns=columns, rows=((long,) * 60,), caption=long),
            Lens(layers=(long,), tokens=columns, top=((long,) * 60,), probability=((0.5,) * 60,), caption=long),
        ),
    )
    result = sample().model_dump()
    result["card"] |= {"name": long, "identity": long, "description": long, "facts": [{"label": long, "value": long}]}
    return TourResult.model_validate({**result, "title": long, "sections": (*sample().sections, section)})


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("page")
    write_tour(sample(), folder / "sample.html")
    write_tour(crowded(), folder / "crowded.html")
    return {path.stem: path for path in folder.glob("*.html")}


@pytest.fixture
def visit(browser, files):
    """Opens a page; afterwards the console must be silent and the file itself the only request."""
    contexts, noise, requests = [], [], []

    def open_page(name: str = "sample", viewport: dict | None = None, **options):
        context = browser.new_context(viewport=viewport or WIDE, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(files[name].as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert noise == []
    assert set(requests) <= {path.as_uri() for path in files.values()}
    assert requests


OUTSIDE = """() => [...document.querySelectorAll("body *")]
  .filter(e => !e.closest(".wide, .cw-hidden, .skip, svg") || e.matches("svg:not(.wide svg)"))
  .filter(e => {
    const box = e.getBoundingClientRect();
    return box.width && (box.right > innerWidth + 0.5 || box.left < -0.5);
  })
  .map(e => e.outerHTML.slice(0, 120))"""


@pytest.mark.parametrize("script", [True, False])
@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("name", ["sample", "crowded"])
def test_nothing_overflows_the_page(visit, name, viewport, script):
    page = visit(name, viewport, java_script_enabled=script)
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    assert page.evaluate(OUTSIDE) == []


def test_a_wide_grid_scrolls_in_its_own_box(visit):
    page = visit("crowded", PHONE)
    for box in page.query_selector_all("#crowded .wide"):
        assert box.evaluate("e => e.scrollWidth > e.clientWidth && getComputedStyle(e).overflowX === 'auto'")


GROUND = "getComputedStyle(document.body).backgroundColor"


def test_dark_follows_the_system_and_the_reader(visit):
    light, dark = visit(color_scheme="light"), visit(color_scheme="dark")
    grounds = light.evaluate(GROUND), dark.evaluate(GROUND)
    cells = [page.evaluate("getComputedStyle(document.querySelector('.cw-s0 rect')).fill") for page in (light, dark)]
    assert grounds[0] != grounds[1]
    assert cells[0] != cells[1]
    light.click(".theme")
    assert light.evaluate(GROUND) == grounds[1]
    light.reload()
    assert light.evaluate(GROUND) == grounds[1], "the choice is kept"
    light.click(".theme")
    assert light.evaluate(GROUND) == grounds[0]


def test_a_command_is_copied(visit):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    button = page.locator("#patching .copy").first
    button.click()
    sync_api.expect(button).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == sample().sections[2].command


def test_cells_are_reached_by_pointer_and_by_keyboard(visit):
    page = visit()
    tip = page.locator(".tip")
    page.hover("#patching .cw-heatmap .cw-cell >> nth=7")
    sync_api.expect(tip).to_have_text("block 0 · ·Dallas: 1 share of pairs that flip")
    page.focus("#patching .cw-heatmap")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    sync_api.expect(tip).to_contain_text("block 1 · The: ")
    page.keyboard.press("Escape")
    assert tip.is_hidden()


def test_without_its_script_the_page_says_everything(visit):
    page = visit(java_script_enabled=False)
    text = page.locator("main").inner_text()
    for section in sample().sections:
        assert section.question in text
        assert section.command in text
    assert page.locator(".copy:visible, .theme:visible").count() == 0
    page.locator("summary", has_text="os. /").click()
    assert page.locator("details[open]").count() == 2


def test_the_contents_follow_the_reader(visit):
    page = visit()
    assert page.locator(".toc").is_visible()
    page.evaluate("document.querySelector('#dictionary').scrollIntoView({behavior: 'instant'})")
    sync_api.expect(page.locator(".toc a[aria-current]")).to_have_attribute("href", "#dictionary")
    assert visit(viewport=PHONE).locator(".toc").is_hidden()


# The colours under each piece of text, found by walking up to the first opaque ground; WCAG 2 contrast.
FAINT = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (css) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = css; canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data; };
  const light = (c) => { const [r, g, b] = [0, 1, 2].map(i => c[i] / 255)
    .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ground = (e) => { for (; e; e = e.parentElement) {
    const c = rgb(getComputedStyle(e).backgroundColor); if (c[3] > 250) return c; } return [255, 255, 255, 255]; };
  const faint = [];
  for (const e of document.querySelectorAll("body *")) {
    if (e.closest("svg, script, .tip, .skip, .cw-hidden, i") || !e.checkVisibility()) continue;
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => x - y);
    if ((b + 0.05) / (a + 0.05) < 4.5) faint.push(e.outerHTML.slice(0, 100));
  }
  return faint;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast(visit, scheme):
    page = visit(color_scheme=scheme)
    assert page.evaluate(FAINT) == []


def test_everything_is_visible_on_paper(visit):
    page = visit()
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator(".toc, .theme, .copy").locator("visible=true").count() == 0
    assert page.locator("details:not([open])").count() == 0
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(23, 33, 43)"
