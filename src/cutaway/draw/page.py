"""One self-contained page around drawings: no network, light and dark."""

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from cutaway import __version__
from cutaway.artifacts.files import refuse_replacing, write_text
from cutaway.draw.style import stylesheet
from cutaway.draw.text import escape

_LAYOUT = """
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 var(--sans); }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 6px; }
h2 { font-size: 19px; margin: 34px 0 6px; }
p { max-width: 75ch; margin: 6px 0 12px; }
.page-lead, .page-foot { color: var(--soft); }
h1, h2, .page-lead { overflow-wrap: anywhere; }
.page-foot { margin-top: 40px; border-top: 1px solid var(--rule); padding-top: 10px; font-size: 14px; }
.page-foot code { font-family: var(--mono); overflow-wrap: anywhere; }
.page-drawing { overflow-x: auto; }
"""

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
        parts.append(f'<section>{above}{note}<div class="page-drawing">{drawing}</div></section>')
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
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'; img-src data:\">\n"
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>\n{stylesheet()}{_LAYOUT}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        f'<p class="page-lead">{escape(lead)}</p>\n{sections_html(sections)}\n'
        f"{_FOOT}{__version__}.{made}</p>\n</main>\n</body>\n</html>\n"
    )
