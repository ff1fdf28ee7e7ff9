"""Text and numbers as the pages write them: escaped, visible, and formatted the same way everywhere."""

import html
import math
import unicodedata
from collections.abc import Iterator, Sequence

NOTHING = "–"
"""How a missing number (`None` or NaN) is written."""

_SHOWN_SPACE = {" ": "·", "\n": "⏎", "\t": "⇥"}


def _picture(character: str) -> str:
    """A visible stand-in for a character that would be invisible, reorder its neighbours or break the document."""
    return f"‹U+{ord(character):04X}›"


def _breaks(character: str) -> bool:
    """Characters that an HTML document may not hold, and those that would turn round the text about them."""
    code = ord(character)
    if code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF:  # not characters at all
        return True
    return unicodedata.category(character) in {"Cc", "Cs"} or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069


def _hidden(character: str) -> bool:
    """What a reader could not see in a token: `_breaks`, format and private characters, spaces other than " "."""
    return _breaks(character) or (
        character != " " and unicodedata.category(character) in {"Cf", "Co", "Zl", "Zp", "Zs"}
    )


def escape(text: object) -> str:
    """`text` for an HTML element or a quoted attribute. Newlines and tabs stay; other control characters are shown."""
    kept = "".join(
        character if character in "\n\t" or not _breaks(character) else _picture(character) for character in str(text)
    )
    return html.escape(kept, quote=True)


def _pieces(token: str) -> Iterator[tuple[str, bool]]:
    """Each character of a token as it is shown, and whether it stands in for whitespace."""
    for place, character in enumerate(token):
        if character in _SHOWN_SPACE:
            yield _SHOWN_SPACE[character], True
        elif character == "\u200d" and 0 < place < len(token) - 1:
            yield character, False  # joins the parts of an emoji
        elif _hidden(character):
            yield _picture(character), False
        elif place == 0 and unicodedata.category(character) in {"Mn", "Me", "Mc"}:
            yield "◌" + character, False
        else:
            yield character, False


def visible(token: str) -> str:
    """A token with its whitespace and invisible characters shown (space "·", newline "⏎"); not yet escaped.

    Joiners inside an emoji stay, and a lone combining mark gets a dotted circle to sit on. No token is shown as "∅".
    """
    return "".join(shown for shown, _ in _pieces(token)) or "∅"


def label(text: str) -> str:
    """As `visible`, for the name of a row or column, which may be a token or words: spaces between words stay."""
    words = text.strip(" ")
    if not words:
        return visible(text)
    start = len(text) - len(text.lstrip(" "))
    shown = " ".join(visible(word) if word else "" for word in words.split(" "))
    return "·" * start + shown + "·" * (len(text) - start - len(words))


def token_html(token: str) -> str:
    """`visible(token)` escaped, with the stand-ins for whitespace muted."""
    parts = [f"<i>{shown}</i>" if space else html.escape(shown, quote=True) for shown, space in _pieces(token)]
    return "".join(parts) or "<i>∅</i>"


def shorten(text: str, length: int) -> str:
    """At most `length` characters, the last one "…" where something was left out."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def number(value: object, units: str = "", digits: int = 3) -> str:
    """A number with `digits` significant digits and its units: "0.83", "8,330,240", "4.2×10⁻⁵", "94%".

    Whole numbers are written in full; `None` and NaN are "–"; strings pass through with their units.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        written = f"{value:,}".replace("-", "−")
    elif isinstance(value, float):
        written = _significant(value, digits)
    else:
        written = str(value)
    return _with_units(written, units)


def short(units: str) -> bool:
    """Whether units are short enough to stand behind every number; longer ones are said once."""
    return len(units) <= 6


def _with_units(written: str, units: str) -> str:
    """A written number and its units, kept on one line: "94%", "3.2×", "1.2 nats"."""
    if not units or written == NOTHING:
        return written
    return f"{written}{units}" if units in {"%", "×"} else f"{written}\u00a0{units}"


def _significant(value: float, digits: int) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    size = abs(value)
    exponent = math.floor(math.log10(size))
    if exponent < -3 or exponent > 8:
        mantissa, power = f"{value:.{digits - 1}e}".split("e")
        return f"{_trimmed(mantissa)}×10{_superscript(int(power))}".replace("-", "−")
    decimals = max(0, digits - 1 - exponent)
    return _trimmed(f"{value:,.{decimals}f}").replace("-", "−")


def _trimmed(written: str) -> str:
    return written.rstrip("0").rstrip(".") if "." in written else written


def _superscript(power: int) -> str:
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def interval(value: float | None, low: float | None, high: float | None, units: str = "", digits: int = 3) -> str:
    """A number with its interval, all three to the same decimal place: "0.83 [0.79, 0.87]".

    With `digits` significant ones, or as many more as it takes for the ends to differ ("0.9997 [0.9996, 0.9998]"),
    unless both ends are the same: nothing varied. Without an interval it is `number(value, units)`.
    """
    if value is None or low is None or high is None or any(math.isnan(x) for x in (value, low, high)):
        return number(None if value is None else float(value), units, digits)
    largest = max(abs(value), abs(low), abs(high))
    if largest == 0 or math.isinf(largest) or not 1e-3 <= largest < 1e9:
        bounds = ", ".join(number(float(bound), digits=digits) for bound in (low, high))
        return _with_units(f"{number(float(value), digits=digits)} [{bounds}]", units)
    decimals = max(0, digits - 1 - math.floor(math.log10(largest)))
    while low != high and decimals < 9 and f"{low:.{decimals}f}" == f"{high:.{decimals}f}":
        decimals += 1
    written = same_decimals((value, low, high), decimals)
    return _with_units(f"{written[0]} [{written[1]}, {written[2]}]", units)


def same_decimals(values: Sequence[float], decimals: int) -> list[str]:
    """Every value with the same number of decimals, at most `decimals`: zeros that end all of them are dropped."""
    written = [f"{value:,.{decimals}f}" for value in values]
    while decimals and all(text.endswith("0") for text in written):
        decimals -= 1
        written = [text[:-1] for text in written]
    written = [text.rstrip(".") for text in written]
    return [text.replace("-", "−") if any(c in "123456789" for c in text) else text.lstrip("-") for text in written]


def compact(value: int | float | None) -> str:
    """A large count in three digits: "8.33 M", "124 M", "1.2 B"; below a million it is written in full."""
    if value is None:
        return NOTHING
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(value) >= size:
            return f"{_significant(value / size, 3)}\u00a0{letter}"
    return number(int(value))
