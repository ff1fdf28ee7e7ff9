"""Text and numbers as the pages write them."""

import html
import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutaway.draw.text import compact, escape, interval, label, number, same_decimals, shorten, token_html, visible

anything = st.text(st.characters(), max_size=30)  # surrogates and control characters included


@pytest.mark.parametrize(
    ("value", "units", "written"),
    [
        (0.83, "", "0.83"),
        (0.9, "", "0.9"),
        (1.0, "", "1"),
        (12.345, "", "12.3"),
        (12345.6, "", "12,346"),
        (8_330_240, "", "8,330,240"),
        (-0.5, "", "−0.5"),
        (-3, "", "−3"),
        (0.0, "", "0"),
        (-0.0, "", "0"),
        (4.2e-5, "", "4.2×10⁻⁵"),
        (-3e12, "", "−3×10¹²"),
        (94.0, "%", "94%"),
        (3.25, "×", "3.25×"),
        (1.25, "nats", "1.25\u00a0nats"),
        (None, "nats", "–"),
        (math.nan, "nats", "–"),
        (math.inf, "", "∞"),
        (-math.inf, "", "−∞"),
        (True, "", "yes"),
        ("L3H7", "", "L3H7"),
    ],
)
def test_numbers_are_written_one_way(value, units, written):
    assert number(value, units) == written


@pytest.mark.parametrize(
    ("numbers", "units", "written"),
    [
        ((0.83, 0.79, 0.87), "", "0.83 [0.79, 0.87]"),
        ((0.831, 0.79, 0.87), "", "0.831 [0.790, 0.870]"),
        ((12.34, 11, 13.2), "nats", "12.3 [11.0, 13.2]\u00a0nats"),
        ((-0.01, -0.03, 0.0), "", "−0.01 [−0.03, 0.00]"),
        ((0.0, 0.0, 0.0), "", "0 [0, 0]"),
        ((0.99970, 0.99968, 0.99973), "", "0.99970 [0.99968, 0.99973]"),
        ((1.0, 0.9996, 1.0004), "", "1.0000 [0.9996, 1.0004]"),
        ((0.5, 0.5, 0.5), "", "0.5 [0.5, 0.5]"),
        ((94.0, 88.0, 98.0), "%", "94 [88, 98]%"),
        ((0.83, None, None), "", "0.83"),
        ((0.83, math.nan, 0.9), "", "0.83"),
        ((None, 0.1, 0.2), "", "–"),
    ],
)
def test_an_interval_has_the_decimals_of_its_number(numbers, units, written):
    value, low, high = numbers
    assert interval(value, low, high, units) == written


def _read(written: str) -> float:
    """The number that was written, by another route than the one that wrote it."""
    written = unicodedata.normalize("NFKC", written.replace("−", "-").replace(",", ""))
    mantissa, _, power = written.partition("×10")
    return float(mantissa) * 10.0 ** int((power or "0").replace("−", "-"))


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e200, max_value=1e200))
def test_a_written_number_is_within_three_digits_of_the_number(value):
    assert _read(number(value)) == pytest.approx(value, rel=5.01e-3, abs=1e-250)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5), st.integers(0, 4))
def test_same_decimals_rounds_and_agrees(values, decimals):
    written = same_decimals(values, decimals)
    assert len({len(text.partition(".")[2]) for text in written}) == 1
    for text, value in zip(written, values, strict=True):
        assert _read(text) == pytest.approx(value, abs=0.5 * 10.0**-decimals + 1e-9)
        assert "−" not in text or _read(text) != 0


def test_large_counts_are_compact():
    assert [compact(n) for n in (None, 260_000, 8_330_240, 1_240_000_000)] == [
        "–",
        "260,000",
        "8.33\u00a0M",
        "1.24\u00a0B",
    ]


@given(anything)
def test_escaped_text_has_no_markup_and_reads_back(text):
    written = escape(text)
    assert not set(written) & set("<>\"'")
    assert all(character in "\n\t" or unicodedata.category(character) not in {"Cc", "Cs"} for character in written)
    written.encode("utf-8")
    if all(unicodedata.category(c) not in {"Cc", "Cs", "Cf", "Cn"} for c in text):
        assert html.unescape(written) == text


@given(anything)
def test_every_character_of_a_token_can_be_seen(text):
    shown = visible(text)
    assert shown
    assert not any(c.isspace() for c in shown)
    assert all(unicodedata.category(c) not in {"Cc", "Cs", "Co"} for c in shown)
    assert html.unescape(token_html(text).replace("<i>", "").replace("</i>", "")) == shown


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" the", "·the"),
        ("\n\n", "⏎⏎"),
        ("\t", "⇥"),
        ("", "∅"),
        ("\x00", "‹U+0000›"),
        ("\u202e", "‹U+202E›"),
        ("\u200d", "‹U+200D›"),
        ("👩\u200d🚀", "👩\u200d🚀"),
        ("\u0301", "◌\u0301"),
        ("Çığ", "Çığ"),
        ("\ud800", "‹U+D800›"),
    ],
)
def test_what_cannot_be_seen_is_spelled_out(token, shown):
    assert visible(token) == shown


def test_labels_keep_the_spaces_between_words():
    assert [label(text) for text in (" of", "block 0", "  a  b ", " ", "a\nb c")] == [
        "·of",
        "block 0",
        "··a  b·",
        "·",
        "a⏎b c",
    ]


@given(anything, st.integers(1, 20))
def test_shortened_text_fits(text, length):
    short = shorten(text, length)
    assert len(short) <= length
    assert short == text or short.endswith("…")
