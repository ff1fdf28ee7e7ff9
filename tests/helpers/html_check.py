"""A strict reader of a page: it fails on what browsers silently repair, and keeps what tests ask about."""

import unicodedata
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "wbr", "hr", "img", "input"}
RAW = {"script", "style"}
SINGLE = {"rect", "line", "path", "circle", "br", "wbr"}


class Page(HTMLParser):
    """`problems` is empty for a sound page; `text` is what is read."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.problems: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.headings: list[tuple[int, str]] = []
        self.raw: list[tuple[str, str]] = []
        self._text: list[str] = []
        for character in set(source):
            if character not in "\n\t" and unicodedata.category(character) in {"Cc", "Cs"}:
                self.problems.append(f"control character {character!r}")
        self.feed(source)
        self.close()
        if self.open:
            self.problems.append(f"never closed: {self.open}")
        twice = {name for name in self.ids if self.ids.count(name) > 1}
        if twice:
            self.problems.append(f"ids used twice: {twice}")
        for link in self.links:
            if link.startswith("#") and link[1:] not in self.ids:
                self.problems.append(f"link to nowhere: {link}")

    @property
    def text(self) -> str:
        return "".join(self._text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._take(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag in {"h1", "h2", "h3", "h4"}:
            self.headings.append((int(tag[1]), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._take(tag, attrs)
        if tag not in SINGLE:
            self.problems.append(f"<{tag}/> does not close itself in HTML")

    def _take(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = [name for name, _ in attrs]
        if len(set(names)) < len(names):
            self.problems.append(f"an attribute twice in <{tag}>: {names}")
        for name, value in attrs:
            self.attributes.append((tag, name, value or ""))
            if name == "id":
                self.ids.append(value or "")
            if name == "href":
                self.links.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open[-1] != tag:
            self.problems.append(f"</{tag}> closes {self.open[-1:]} at {self.getpos()}")
        else:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in RAW:
            self.raw.append((self.open[-1], data))
            return
        self._text.append(data)
        if self.open and self.headings and any(tag in {"h1", "h2", "h3", "h4"} for tag in self.open):
            level, words = self.headings[-1]
            self.headings[-1] = (level, words + data)

    def handle_comment(self, data: str) -> None:
        self.problems.append(f"comment: {data[:40]}")
