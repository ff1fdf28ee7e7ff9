"""The page: sound HTML that holds everything, says everything and refuses a result without its controls."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from types import SimpleNamespace

import pytest
from html_check import Page
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_page import NASTY, effect, sample, with_block

from cutaway.artifacts.errors import CutawayError
from cutaway.draw.blocks import (
    Bar,
    Bars,
    Block,
    Card,
    Compare,
    Continuation,
    EffectBlock,
    Example,
    Features,
    Figure,
    Figures,
    Heatmap,
    Latent,
    Lens,
    Line,
    Section,
    Series,
    Table,
    Text,
    TokenEffect,
    TokenRow,
    Tokens,
    TourResult,
)
from cutaway.draw.fragments import draw_block
from cutaway.draw.glossary import TERMS, Linker
from cutaway.draw.text import visible
from cutaway.tour.page import render, write_tour
from cutaway.tour.steering import _null


@pytest.fixture(scope="module")
def source() -> str:
    return render(sample())


@pytest.fixture(scope="module")
def page(source) -> Page:
    return Page(source)


def test_the_checker_finds_faults():
    for fault in ("<p><b></p>", "<div>", '<p id="a"></p><p id="a"></p>', '<a href="#x">y</a>', "<div/>", "<p>\x01</p>"):
        assert Page(fault).problems, fault


def test_the_page_is_sound(page):
    assert page.problems == []


def test_the_page_asks_the_network_for_nothing(source, page):
    fetching = {"src", "srcset", "data", "poster", "action", "background", "xlink:href"}
    assert not [value for _, name, value in page.attributes if name in fetching]
    for tag, name, value in page.attributes:
        if name == "href":
            assert value.startswith("#") or (tag == "link" and value == "data:,")
    css = "".join(text for tag, text in page.raw if tag == "style")
    assert not re.search(r"url\(|@import|@font-face", css)
    assert "http://" not in source
    assert "https://" not in source
    assert "default-src 'none'" in source


def test_headings_come_in_order(page):
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    questions = [section.question for section in sample().sections]
    assert [words for _, words in page.headings if words in questions] == questions


def test_the_first_screen_has_the_card_and_every_section_in_short(source):
    first = source[source.index("<h1>") : source.index('id="_steps"')]
    for words in (
        "Inside atlas",
        "8.33\u00a0M",
        "512\u00a0tokens",
        "212 of 212",
        "rotary",
        "block 5",
        "0.94 [0.88, 0.98]",
    ):
        assert words in first, words
    for section in sample().sections:
        assert f'href="#{section.id}"' in first
    assert first.count("not shown") >= 1


def test_a_section_says_what_it_is(page):
    text = re.sub(r"\s+", " ", page.text)
    for section in sample().sections:
        assert section.title in text
        assert section.command in text
        if section.status != "not shown":
            assert section.lead.replace("`", "") in text
    assert "Fallback: Zero-ablation" in text
    assert "Not shown: right on 3 of 20 landmark prompts, and 16 are needed." in text
    assert "Not asked of this model." not in text


def test_controls_say_so(source):
    for name in (
        "random position, same block",
        "without 3 random heads",
        "another state&#x27;s capital",
        "Random direction",
    ):
        assert re.search(re.escape(name) + r'(?: |</span>)?\s*<em class="cw-tag">control</em>', source), name


def test_every_command_stands_once_in_its_section(source):
    section = source[source.index('id="patching"') : source.index('id="dictionary"')]
    commands = re.findall(r"<code>(cutaway .*?)</code>", section)
    assert commands == [
        "cutaway tour atlas --only patching --pair &#x27;Dallas&#x27; &quot;Oakland&quot;",
        "cutaway tour atlas --only patching",
    ]
    assert section.count('class="copy') == 2


def test_the_footer_leads_to_the_run(page):
    text = page.text[page.text.rindex("Where this came from") :]
    manifest = sample().manifest
    for words in (
        manifest["id"],
        manifest["model"]["weight_hash"],
        manifest["corpus_hash"],
        "cutaway tour atlas",
        "0.1.0",
    ):
        assert words in text
    assert re.search(r"seed\s*0", text)


def test_odd_strings_reach_the_reader_unharmed(page):
    for token in NASTY:
        assert visible(token.encode("utf-16", "surrogatepass").decode("utf-16", "replace")) in page.text
    assert "Sure. First you take the well and </pre><b>poison</b> it." in page.text
    assert "</script><script>alert(1)</script>" in page.text
    assert "b" not in page.tags
    assert page.tags.count("script") == 2


def test_a_typical_page_is_small():
    result = sample()
    assert len(render(result).encode()) < 200_000
    tokens = tuple(f" word{place}" for place in range(32))
    latents = tuple(
        Latent(
            id=number,
            label="a label",
            density=0.01,
            top_examples=tuple(Example(tokens=tokens, values=(0.0,) * 24 + (1.5,) * 8) for _ in range(6)),
            promotes=tuple(TokenEffect(token=token, value=1.0) for token in tokens[:8]),
            suppresses=tuple(TokenEffect(token=token, value=-1.0) for token in tokens[:8]),
        )
        for number in range(20)
    )
    # 24 layers, as many as a model that a laptop runs has
    heatmap = Heatmap(rows=tuple(map(str, range(24))), columns=tokens, values=((0.123,) * 32,) * 24)
    blocks = (Features(items=latents), heatmap, heatmap)
    more = Section(id="more", title="More", question="More?", lead="Much.", blocks=blocks)
    page = render(TourResult.model_validate({**result.model_dump(), "sections": (*result.sections, more)}))
    assert len(page.encode()) < 600_000


@pytest.mark.parametrize("controls", [[], None])
def test_an_effect_without_controls_is_refused(tmp_path, controls):
    bare = {**effect("lone effect"), "controls": controls}
    section = Section(id="a", title="t", question="q", lead="l", effects=(bare,))
    result = sample()
    for refused in (
        with_block(EffectBlock(effect=bare)),
        TourResult.model_validate({**result.model_dump(), "sections": (*result.sections, section)}),
    ):
        with pytest.raises(CutawayError, match="'lone effect' has no controls"):
            write_tour(refused, tmp_path / "index.html")
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_what_was_rendered(tmp_path, source):
    write_tour(sample(), tmp_path / "index.html")
    assert (tmp_path / "index.html").read_text(encoding="utf-8") == source
    assert render(sample()) == source


def test_an_effect_is_drawn_once():
    one = effect("drawn once")
    section = Section(
        id="a", title="t", question="q", lead="l", blocks=(EffectBlock(effect=one),), effects=(one, effect("another"))
    )
    result = sample()
    page = render(TourResult.model_validate({**result.model_dump(), "sections": (section,)}))
    body = page[page.index('id="_steps"') :]
    assert body.count("drawn once") == 1
    assert body.count(">another<") == 1


def test_a_failed_self_test_is_not_hidden():
    result = sample().model_dump()
    result["card"]["selftest"]["passed"] = 211
    page = render(TourResult.model_validate(result))
    assert "✗</span> Self-test: 211 of 212" in page


def test_the_stack_is_drawn_when_the_depth_is_known():
    assert render(sample()).count('class="cw-stack"') == 1
    assert 'class="cw-stack"' not in render(with_block(Text(text="no facts")))


def test_the_smallest_tour_has_a_page():
    result = with_block(Text(text="Nothing but text."))
    assert Page(render(result)).problems == []
    bare = TourResult(title="t", card=result.card, sections=(), version="0", created="")
    assert Page(render(bare)).problems == []


words = st.text(st.characters(), max_size=15)
number = st.none() | st.floats() | st.floats(-10, 10)
BLOCKS: list = [
    lambda a, b, x: Text(text=f"{a}\n\n{b}"),
    lambda a, b, x: Figures(
        items=(Figure(label=a, value=b, units=a, detail=b), Figure(label=b, value=x, control=True))
    ),
    lambda a, b, x: Table(columns=(a, b), rows=((x, a), (None, b)), caption=a, fold=b),
    lambda a, b, x: Heatmap(rows=(a,), columns=(b, a), values=((x, x),), caption=b, units=a, row_axis=b, column_axis=a),
    lambda a, b, x: Line(series=(Series(name=a, x=(0, 1), y=(x, 1)),), x_label=b, y_label=a, caption=b),
    lambda a, b, x: Bars(items=(Bar(label=a, value=x, low=x, high=x, control=True),), units=b, caption=a),
    lambda a, b, x: Tokens(rows=(TokenRow(label=a, tokens=(a, b), values=(x, None), detail=b),), caption=a, units=b),
    lambda a, b, x: Lens(layers=(a,), tokens=(b,), top=((a,),), probability=((x,),), caption=b),
    lambda a, b, x: Compare(prompt=a, items=(Continuation(label=a, text=b, note=a, highlight=(a, b)),), caption=b),
    lambda a, b, x: EffectBlock(effect={**effect(a), "value": x, "units": b, "ablation": a, "command": b}),
    lambda a, b, x: Features(items=(Latent(id=1, label=a, label_note=b, density=x, concept=a, auroc=x),)),
]


@settings(max_examples=200)
@given(words, words, number, st.sampled_from(BLOCKS))
def test_no_string_and_no_number_breaks_the_page(a, b, x, make):
    block: Block = make(a, b, x)
    section = Section(
        id="only", title=a, question=b, lead=a, note=b, command=a, status="fallback" if b else "shown", blocks=(block,)
    )
    card = {"name": a, "identity": b, "description": a, "facts": [{"label": a, "value": b}], "parameters": 1}
    result = TourResult.model_validate(
        {
            "title": a, "card": card, "sections": [section], "version": b, "created": a,
            "manifest": {"id": a, "model": {"id": b}}, "configuration": {"x": a, "y": x},
        }
    )  # fmt: skip
    assert TourResult.model_validate_json(result.model_dump_json()) == result
    page = Page(render(result))
    assert page.problems == []
    assert page.tags.count("script") == 2
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_drawing_needs_neither_torch_nor_transformers():
    code = "import sys, cutaway.tour.page; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_block_can_be_drawn_alone():
    drawn = draw_block(Text(text="a <b>\n\nc"))
    assert drawn == "<p>a &lt;b&gt;</p><p>c</p>"


class _Links(HTMLParser):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        if tag == "a":
            self.found.append(dict(attrs)["href"] or "")


def test_terms_are_linked_once_a_section_and_defined_once():
    link = Linker()
    assert _Links(link("Logit lens of a head; the heads, the logit lens, `logit lens`.")).found == [
        "#_term-logit-lens",
        "#_term-attention-head",
    ]
    assert _Links(link("logit lens")).found == []
    link.new_section()
    assert _Links(link("The KL, overheads, kl, headlong, multi-head, blocks.3")).found == ["#_term-kl", "#_term-block"]
    assert [term.name for term in link.glossary()] == ["attention head", "block", "KL", "logit lens"]


def test_the_glossary_is_in_order():
    names = [term.name for term in TERMS]
    assert len(TERMS) >= 25
    assert len({term.anchor for term in TERMS}) == len(names)
    assert names == sorted(names, key=str.lower)
    assert all("\n" not in term.definition and term.definition.endswith((".", "?")) for term in TERMS)


@pytest.mark.parametrize(("text", "html"), [("a `<b>` c", "a <code>&lt;b&gt;</code> c"), ("`open", "`open"), ("", "")])
def test_backticks_are_code(text, html):
    assert Linker()(text) == html


def test_a_folded_table_opens_from_a_line_that_says_what_it_is() -> None:
    table = Table(columns=("a",), rows=(("inside",),), caption="Below it.", fold="All <1> rows")
    page = Page(render(with_block(table)))
    assert page.problems == []
    assert page.text.index("All <1> rows") < page.text.index("inside")
    assert ("details", "class", "cw-fold") in page.attributes
    assert ("details", "class", "cw-fold") not in Page(
        render(with_block(table.model_copy(update={"fold": ""})))
    ).attributes


def test_a_null_result_has_a_neutral_mark():
    section = Section(
        id="clamping", title="T", question="Q?", lead="L.", status="no effect", note="Null result.",
        blocks=(Text(text="t"),),
    )  # fmt: skip
    card = Card(name="m", identity="i", parameters=1)
    page = render(TourResult(title="T", card=card, sections=(section,), version="0", created="2026-01-01"))
    assert '<span class="badge no-effect">no effect</span>' in page
    assert ".badge.no-effect::before { background: var(--soft); }" in page


@pytest.mark.parametrize(("low", "controls", "is_null"), [(0.5, (0.1, 0.4), False), (0.4, (0.1, 0.4), True)])
def test_a_method_is_null_where_its_interval_reaches_a_control(low: float, controls: tuple[float, ...], is_null: bool):
    beside = tuple(SimpleNamespace(interval=None, value=value) for value in controls)
    result = SimpleNamespace(effects={"answered": SimpleNamespace(interval=(low, 0.9), controls=beside)})
    said = _null([("harmful", "of the request", result)])  # type: ignore[list-item]
    assert bool(said) is is_null
