"""One self-contained page around drawings: no network, light and dark, a script that it can do without."""

import base64
import hashlib
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from markupsafe import Markup

from cutaway import __version__
from cutaway.artifacts.files import refuse_replacing, write_text
from cutaway.draw.glossary import Linker
from cutaway.draw.style import asset, script, stylesheet
from cutaway.draw.text import escape

_MARK = (
    '<svg width="22" height="22" viewBox="0 0 22 22" aria-hidden="true"><path d="M11 1.5A9.5 9.5 0 1 0 20.5 11H11z"/>'
    '<path d="M11 5a6 6 0 1 0 6 6M11 8.4A2.6 2.6 0 1 0 13.6 11"/></svg>'
)
_SWITCH = (
    '<button type="button" class="theme needs-js" aria-label="Light / dark: switch the colours">'
    '<svg width="16" height="16" viewBox="0 0 16 16" aria-hidden="true"><circle cx="8" cy="8" r="6.5"/>'
    '<path d="M8 1.5a6.5 6.5 0 0 1 0 13z"/></svg>'
    "<span>Light / dark</span></button>"
)
HEADER = f'<header class="top"><span class="brand">{_MARK}cutaway</span>{_SWITCH}</header>'
"""The mark, and the switch between light and dark."""

Section = tuple[str, str, Markup]
"""A part of a page: its heading, the text under it, and its drawing."""

_FOOT = '<p class="page-foot">cutaway '


def write_page(path: Path, html: str) -> None:
    """Write what `page_html` returned.

    Args:
        path: The file.
        html: The page.

    Raises:
        BadFile: The file is there and is no such page.
    """
    refuse_no_page(path)
    write_text(path, html)


def refuse_no_page(path: Path) -> None:
    """Raise `CutawayError` where a page would replace a file that is no page of ours."""
    refuse_replacing(path, "page", _FOOT)


def sections_html(sections: Sequence[Section]) -> Markup:
    """Sections one under another, without a page around them."""
    parts = []
    for heading, text, drawing in sections:
        note = f"<p>{escape(text)}</p>" if text else ""
        above = f"<h2>{escape(heading)}</h2>" if heading else ""
        parts.append(f'<section>{above}{note}<div class="cw-wide">{drawing}</div></section>')
    return Markup("\n".join(parts))


def page_html(
    *,
    title: str,
    sections: Sequence[Section],
    lead: str = "",
    command: str | None = None,
) -> str:
    """A whole HTML document.

    Args:
        title: Of the page.
        sections: (heading, text under it, drawing) each.
        lead: Under the title: what is seen and where it comes from.
        command: The command line that makes the page again.
    """
    made = f" Made by <code>{escape(command)}</code>." if command else ""
    link = Linker()
    about = f'<p class="statement">{link(lead)}</p>' if lead else ""
    named, steps = [], []
    for place, (heading, text, drawing) in enumerate(sections, start=1):
        link.new_section()
        anchor = f"_s{place}"
        if heading:
            named.append((anchor, heading))
        above = f'<h2 id="{anchor}-title">{escape(heading)}</h2>' if heading else ""
        note = f'<p class="lead">{link(text)}</p>' if text else ""
        steps.append(
            f'<section class="step" id="{anchor}">{above}{note}<div class="block cw-wide">{drawing}</div></section>'
        )
    terms = link.glossary()
    if terms:
        named.append(("_glossary", "Glossary"))
        steps.append(glossary_html(link))
    contents = "".join(f'<li><a href="#{anchor}">{escape(heading)}</a></li>' for anchor, heading in named)
    toc = f'<nav class="toc" aria-label="Contents"><ol>{contents}</ol></nav>' if len(named) > 1 else ""
    body = (
        f'<main>\n<div class="hero plain"><div><h1>{escape(title)}</h1>{about}</div></div>\n'
        f'<div class="body{"" if toc else " alone"}">{toc}<div class="steps" id="_steps">\n'
        f"{''.join(steps)}\n</div></div>\n"
        f"</main>\n<footer>{_FOOT}{__version__}.{made}</p></footer>"
    )
    return shell(title, body)


def glossary_html(link: Linker) -> Markup:
    """The terms that were linked, each with its definition, as the last section of a page."""
    terms = "".join(
        f'<div id="{term.anchor}"><dt>{escape(term.name)}</dt><dd>{escape(term.definition)}</dd></div>'
        for term in link.glossary()
    )
    return Markup(
        '<section class="step glossary" id="_glossary" aria-labelledby="_glossary-title"><h2 id="_glossary-title">'
        f"Glossary</h2><dl>{terms}</dl></section>"
    )


def shell(title: str, body: str) -> str:
    """The document around a page's main part: its head, the mark, the switch between light and dark, the script."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        f'script-src {_allowed()}; img-src data:">\n<meta name="generator" content="cutaway {__version__}">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>\n{_style()}\n</style>\n<script>{asset('theme.js')}</script>\n</head>\n<body>\n"
        f'<a class="skip" href="#_steps">Skip to the results</a>\n'
        f"{HEADER}\n{body}\n<script>{script()}</script>\n</body>\n</html>\n"
    )


@cache
def _allowed() -> str:
    """The hashes of the only scripts that a page may run: what a text might smuggle in does not."""
    hashes = (hashlib.sha256(text.encode()).digest() for text in (asset("theme.js"), script(), asset("attention.js")))
    return " ".join(f"'sha256-{base64.b64encode(one).decode()}'" for one in hashes)


@cache
def _style() -> str:
    """The style sheets without comments and indentation."""
    css = re.sub(r"/\*.*?\*/", "", f"{stylesheet()}\n{asset('frame.css')}\n{asset('page.css')}", flags=re.DOTALL)
    return "\n".join(line.strip() for line in css.splitlines() if line.strip())
