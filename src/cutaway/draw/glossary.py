"""The words a newcomer may not know: one line each, and links to them from the page's text."""

import re
from dataclasses import dataclass
from importlib.resources import files

from markupsafe import Markup

from cutaway.draw.text import escape


@dataclass(frozen=True)
class Term:
    """A word, its definition in one line, and the other spellings that link to it."""

    name: str
    definition: str
    spellings: tuple[str, ...] = ()

    @property
    def anchor(self) -> str:
        return "_term-" + re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


def _terms() -> tuple[Term, ...]:
    """The lines of `glossary.txt`: a name, its other spellings, a colon, the definition."""
    terms = []
    for line in files("cutaway.draw").joinpath("glossary.txt").read_text(encoding="utf-8").splitlines():
        words, definition = line.split(": ", 1)
        name, *spellings = words.split(", ")
        terms.append(Term(name, definition, tuple(spellings)))
    return tuple(terms)


TERMS = _terms()
_BY_SPELLING = {spelling.lower(): term for term in TERMS for spelling in (term.name, *term.spellings)}


def _pattern(spelling: str) -> str:
    """The word, also with a capital at the start of a sentence; capitals inside it ("KL") must be there."""
    first = spelling[0]
    return (f"[{first}{first.upper()}]" if first.islower() else first) + re.escape(spelling[1:])


_WORDS = re.compile(
    r"`([^`\n]+)`|(?<![\w/-])("
    + "|".join(
        _pattern(spelling)
        for spelling in sorted((s for term in TERMS for s in (term.name, *term.spellings)), key=lambda s: (-len(s), s))
    )
    + r")(?![\w/-])"
)


class Linker:
    """Turns prose into HTML: `code` between backticks, and each term linked the first time a section uses it."""

    def __init__(self) -> None:
        self.used: set[Term] = set()
        self._here: set[Term] = set()

    def new_section(self) -> None:
        """From here on, terms are linked again."""
        self._here = set()

    def __call__(self, text: str) -> Markup:
        parts, end = [], 0
        for match in _WORDS.finditer(text):
            parts.append(escape(text[end : match.start()]))
            end = match.end()
            if match[1] is not None:
                parts.append(f"<code>{escape(match[1])}</code>")
                continue
            term = _BY_SPELLING[match[2].lower()]
            if term in self._here:
                parts.append(escape(match[2]))
                continue
            self._here.add(term)
            self.used.add(term)
            parts.append(f'<a class="term" href="#{term.anchor}">{escape(match[2])}</a>')
        parts.append(escape(text[end:]))
        return Markup("".join(parts))

    def glossary(self) -> list[Term]:
        """The terms that were linked, in alphabetical order."""
        return sorted(self.used, key=lambda term: term.name.lower())
