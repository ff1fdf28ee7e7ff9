"""The live page in a real browser: type, click, see the answer change; by keyboard, on a phone, in two tabs."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from live_page import CAPITALS

pytestmark = pytest.mark.browser

WIDE, PHONE = {"width": 1280, "height": 860}, {"width": 360, "height": 780}
SECONDS = 60_000  # a busy machine is no failure

Visit = Callable[..., Any]


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Visit]:
    """Opens the page and waits for its figures; the console must be silent, and nobody else be asked."""
    contexts, noise, requests = [], [], []

    def open_page(fragment: str = "", context: Any = None, **options: Any) -> Any:
        if context is None:
            context = browser.new_context(**{"viewport": WIDE, **options})
            contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(SECONDS)
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address + fragment)
        page.locator("#pattern td").first.wait_for()
        idle(page)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [text for text in noise if "422" not in text] == []  # Chromium notes every refusal
    assert requests
    assert not [url for url in requests if not url.startswith((address, "data:"))]


def idle(page: Any) -> None:
    page.locator("body:not([aria-busy])").wait_for()


def cell(page: Any, table: str, row: int, column: int) -> Any:
    return page.locator(f"#{table} tbody tr").nth(row).locator("td").nth(column)


def changed(page: Any, *words: str) -> str:
    """What the page says of the answer once it has all of some words."""
    from playwright.sync_api import expect

    for word in words:
        expect(page.locator("#effect")).to_contain_text(word, timeout=SECONDS)
    idle(page)
    return page.locator("#effect").inner_text()


def test_a_click_patches_and_the_same_click_takes_it_back(visit: Visit) -> None:
    page = visit()
    assert page.title() == "atlas · cutaway"
    assert page.locator("#text").input_value() == CAPITALS["text"]
    changed(page, "The model says ·Austin (0.92)")
    cell(page, "lens", 2, 7).click()
    assert "noise of the same size, 8 draws" in changed(page, "The model says ·Sacramento in place of ·Austin")
    assert page.locator("#edits li").inner_text().startswith("patch blocks.1.resid_post at 7 ·Dallas ← ·Oakland mean")
    assert cell(page, "lens", 2, 7).get_attribute("aria-selected") == "true"
    assert "changed" in cell(page, "lens", 8, 8).get_attribute("class")
    assert "·Sacramento" in cell(page, "lens", 8, 8).inner_text()
    assert "cutaway.patch('blocks.1.resid_post'" in page.locator("#python").text_content()
    cell(page, "lens", 2, 7).click()
    changed(page, "The model says ·Austin (0.92)", "Click a cell")
    assert page.locator("#edits").inner_text() == "none"


def test_parts_are_ablated_beside_each_other_and_looks_are_cut(visit: Visit) -> None:
    page = visit()
    page.get_by_label("ablates to zero").check()
    page.get_by_label("at every token").check()
    page.get_by_label("beside earlier edits").check()
    cell(page, "parts", 4, 8).click()
    changed(page, "before,")
    cell(page, "parts", 2, 7).click()
    idle(page)
    items = page.locator("#edits li")
    items.nth(1).wait_for()
    assert items.nth(0).inner_text().startswith("zero blocks.4.mlp.out at every token mean")
    assert items.nth(1).inner_text().startswith("zero blocks.2.attn.z head 7 at every token mean")
    assert page.locator("#head").input_value() == "L2H7"
    cell(page, "pattern", 8, 7).click()
    items.nth(2).wait_for()
    idle(page)
    assert "cut blocks.2.attn.pattern head 7 at 8 ·is → 7 ·Dallas" in items.nth(2).inner_text()
    assert cell(page, "pattern", 8, 7).inner_text() == "0.00"
    items.nth(0).get_by_role("button").click()
    idle(page)
    page.locator("#edits li").nth(2).wait_for(state="detached")
    page.get_by_role("button", name="Undo all").click()
    changed(page, "Click a cell")


def test_the_keyboard_reaches_every_cell(visit: Visit) -> None:
    page = visit()
    assert page.locator("#lens td[tabindex='0']").count() == 1
    page.locator("#lens td[tabindex='0']").focus()
    for key in ["ArrowDown", "ArrowDown", "End", "ArrowLeft"]:
        page.keyboard.press(key)
    assert "blocks.1.resid_post at 7 ·Dallas:" in page.locator("#readout").inner_text()
    page.keyboard.press("Enter")
    changed(page, "in place of ·Austin")
    assert page.evaluate("document.activeElement.cellIndex") == 8  # it stays where it was
    page.keyboard.press("Space")
    changed(page, "Click a cell")
    page.keyboard.press("Home")
    page.keyboard.press("PageUp")
    page.keyboard.press("ArrowUp")
    assert "blocks.0.resid_pre at 0" in page.locator("#readout").inner_text()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('table')?.id") == "parts"
    page.keyboard.press("ArrowRight")
    assert "L0 H1: writes" in page.locator("#readout").inner_text()
    page.locator("#pattern caption, #_pattern_h", has_text="L0H1").first.wait_for()


def test_two_tabs_do_not_cross(visit: Visit, browser: Any) -> None:
    context = browser.new_context(viewport=WIDE)
    first = visit(context=context)
    second = visit(context=context, fragment="#text=The+opposite+of+hot+is&other=The+opposite+of+big+is")
    changed(second, "The model says ·cold")
    cell(first, "lens", 2, 7).click()
    cell(second, "lens", 1, 4).click()
    changed(first, "·Sacramento in place of ·Austin")
    assert "cold" not in first.locator("#effect").inner_text()
    changed(second, "before,")
    assert "Austin" not in second.locator("#effect").inner_text()
    assert "patch blocks.0.resid_post at 4 ·hot ← ·big" in second.locator("#edits").inner_text()
    first.reload()  # what was asked stands in the address
    changed(first, "·Sacramento in place of ·Austin")
    context.close()


def test_a_refusal_is_said_and_the_page_stays(visit: Visit) -> None:
    page = visit()
    page.locator("#text").fill("the " * 200)
    page.get_by_role("button", name="Read", exact=True).click()
    page.get_by_text("this page shows at most 96; shorten it").wait_for()
    assert page.locator("#lens td").count() == 9 * 9
    page.locator("#text").fill("The opposite of hot is")
    page.locator("#other").fill("")
    page.locator("#text").press("Enter")
    changed(page, "The model says ·cold")
    assert page.locator("#problem").is_hidden()
    assert page.get_by_label("patches").is_disabled()
    cell(page, "lens", 1, 4).click()
    changed(page, "before,")


def test_hostile_text_is_only_text(visit: Visit) -> None:
    page = visit()
    page.locator("#text").fill("<img src=x onerror=alert(1)> <b>is</b>")
    page.locator("#text").press("Enter")
    page.locator("#lens thead").get_by_text("onerror").or_(
        page.locator("#lens thead").get_by_text("<")
    ).first.wait_for()
    idle(page)
    assert page.locator("img, b, #lens b").count() == 0


OUTSIDE = """() => [...document.querySelectorAll("body *")]
  .filter(e => !e.closest(".wide, .cw-hidden, .skip, pre, svg"))
  .filter(e => {
    const box = e.getBoundingClientRect();
    return box.width && (box.right > innerWidth + 0.5 || box.left < -0.5);
  })
  .map(e => e.outerHTML.slice(0, 120))"""


@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_sideways_and_nothing_that_axe_finds(visit: Visit, viewport: Any, theme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed").Axe()
    page = visit(viewport=viewport, color_scheme=theme, reduced_motion="reduce")
    cell(page, "lens", 2, 7).click()
    changed(page, "·Sacramento in place of ·Austin")
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    assert page.evaluate(OUTSIDE) == []
    found = axe.run(page).response["violations"]
    assert [(one["id"], one["impact"], [node["html"] for node in one["nodes"]]) for one in found] == []


def test_the_readers_choice_of_theme_wins(visit: Visit) -> None:
    page = visit(color_scheme="light")
    ground = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(ground)
    page.get_by_role("button", name="Light / dark").click()
    assert page.evaluate(ground) != before
    page.reload()
    assert page.evaluate(ground) != before


def test_a_legend_has_its_true_range(visit: Visit) -> None:
    page = visit()
    values = [float(text.replace("−", "-")) for text in page.locator("#parts td").all_inner_texts()]
    reach = max(map(abs, values))
    ends = page.locator("#parts-legend .cw-legend-ends span").all_inner_texts()
    assert [float(end.replace("−", "-")) for end in ends] == pytest.approx([-reach, 0, reach], abs=0.011)
    lefts = page.evaluate(
        "[...document.querySelectorAll('#parts-legend .cw-legend-ends span')].map(e => e.getBoundingClientRect().left)"
    )
    assert lefts[0] < lefts[1] < lefts[2]
