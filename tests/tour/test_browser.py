"""The page in a real browser: nothing overflows, nothing is fetched, and it works with and without its script."""

from pathlib import Path

import pytest
from markupsafe import Markup
from sample_page import sample

from cutaway.draw.blocks import Figure, Figures, Heatmap, Lens, Section, Table, TourResult
from cutaway.draw.charts import effects_html
from cutaway.draw.heatmap import heatmap_html
from cutaway.draw.page import page_html, write_page
from cutaway.draw.panels import table_html
from cutaway.draw.tokens import lens_html, tokens_html
from cutaway.tour.page import write_tour

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = pytest.mark.browser

WIDE, PHONE = {"width": 1280, "height": 860}, {"width": 360, "height": 844}


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


def command_page() -> str:
    """A command's page with every block that shows numbers."""
    effect = {
        "name": "patch", "value": 0.9, "n": 50, "interval": [0.8, 1.0], "units": "share", "ablation": "zero",
        "controls": [{"name": "random position", "value": 0.1, "interval": [0.0, 0.2], "n": 50}],
    }  # fmt: skip
    words = [f"word{place}" for place in range(30)]
    values = [place / 10 - 1 for place in range(30)]
    numbers = table_html(columns=["name", "size"], rows=[["a", "−2"], ["b", "10"], ["c", "9.5"]], title="sizes")
    drawings = [
        heatmap_html(rows=["L0", "L1"], columns=words, values=[values, values], title="map", units="share of " * 9),
        tokens_html(rows=[{"tokens": words, "values": values}], units="logits"),
        lens_html(layers=["0"], tokens=words, top=[words], probability=[[0.5] * 30], title="lens"),
        effects_html([effect, effect]),
        numbers,
    ]
    sections = [(f"Section {place}", "A control at a layer.", drawn) for place, drawn in enumerate(drawings)]
    return page_html(title="Pages of atlas: " + "“prompt” " * 20, sections=sections, lead="x" * 90, command="cutaway x")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("page")
    write_page(folder / "command.html", command_page())
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
  .filter(e => !e.closest(".cw-wide, .cw-hidden, .skip, svg") || e.matches("svg:not(.cw-wide svg)"))
  .filter(e => {
    const box = e.getBoundingClientRect();
    return box.width && (box.right > innerWidth + 0.5 || box.left < -0.5);
  })
  .map(e => e.outerHTML.slice(0, 120))"""


@pytest.mark.parametrize("script", [True, False])
@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("name", ["sample", "crowded", "command"])
def test_nothing_overflows_the_page(visit, name, viewport, script):
    page = visit(name, viewport, java_script_enabled=script)
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    assert page.evaluate(OUTSIDE) == []


def test_a_wide_grid_scrolls_in_its_own_box(visit):
    page = visit("crowded", PHONE)
    for box in page.query_selector_all("#crowded .cw-wide"):
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
    tip = page.locator(".cw-tip-box")
    page.hover("#patching .cw-heatmap .cw-cell >> nth=7")
    sync_api.expect(tip).to_have_text("block 0 · ·Dallas: 1 share of pairs that flip")
    page.focus("#patching .cw-heatmap")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    sync_api.expect(tip).to_contain_text("block 1 · The: ")
    page.keyboard.press("Escape")
    assert tip.is_hidden()


def test_what_takes_the_focus_on_a_command_s_page_does_something(visit):
    page = visit("command", PHONE)
    tip = page.locator(".cw-tip-box")
    for drawing, said in (
        (".cw-heatmap", "L0 · word1: −0.9 "),
        (".cw-token-run", "−0.9"),
        (".cw-lens", "0 at word1: "),
    ):
        page.focus(drawing)
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        sync_api.expect(tip).to_contain_text(said)
        page.keyboard.press("Escape")
        assert tip.is_hidden()
    for box in page.query_selector_all('.cw-wide[tabindex="0"]'):
        assert box.evaluate("e => e.scrollWidth > e.clientWidth")
    assert visit("command", java_script_enabled=False).locator("main [tabindex]").count() == 0


def test_a_value_is_told_at_a_tap(visit):
    page = visit("command", PHONE, has_touch=True)
    page.locator(".cw-token-run span").nth(2).tap()
    sync_api.expect(page.locator(".cw-tip-box")).to_have_text("−0.8\u00a0logits")
    page.locator(".cw-heatmap .cw-cell").nth(1).tap()
    sync_api.expect(page.locator(".cw-tip-box")).to_contain_text("L0 · word1: −0.9")


def test_a_table_sorts_by_its_columns(visit):
    page = visit("command")
    table = page.locator("#_s5 .cw-table")
    cells = table.locator("td:first-child")
    for column, orders in (("size", (["b", "c", "a"], ["a", "c", "b"])), ("name", (["c", "b", "a"], ["a", "b", "c"]))):
        for order in orders:
            table.get_by_role("button", name=column).click()
            assert cells.all_inner_texts() == order


def test_a_command_s_page_has_the_header_and_the_contents(visit):
    page = visit("command")
    light = page.evaluate(GROUND)
    page.click(".theme")
    assert page.evaluate(GROUND) != light
    assert page.locator(".toc a").all_inner_texts() == [*(f"Section {place}" for place in range(5)), "Glossary"]
    assert page.locator("#_glossary dt").all_inner_texts() == ["block", "control"]
    main = page.locator(".steps").bounding_box()
    assert main["width"] > 800


def test_a_script_that_is_not_ours_does_not_run(browser, tmp_path):
    path = tmp_path / "page.html"
    drawn = Markup("<script>document.title = 'theirs'</script>")
    path.write_text(page_html(title="ours", sections=[("a", "", drawn)]), encoding="utf-8")
    page = browser.new_page()
    page.goto(path.as_uri())
    assert page.title() == "ours"
    page.close()


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
    if (e.closest("svg, script, .cw-tip-box, .skip, .cw-hidden, i") || !e.checkVisibility()) continue;
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
