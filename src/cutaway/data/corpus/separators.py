"""Where one document of a text ends: at a separator that the user names; and lines that look like one.

A tokenizer that does not know `<|endoftext|>` spells it out, and a model is then trained on it as text: such lines are
noticed (`Marks`), and `--document-separator` cuts there.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from cutaway.artifacts.errors import CutawayError

_TOKEN = (
    r"<\|[^|<>\s]{1,40}\|>|</?(?:s|bos|eos|eot|sep|doc|document|end|endoftext|end_of_text)>|\[(?:BOS|EOS|SEP|DOC|END)\]"
)
_SPELLED_AS_TOKEN = re.compile(_TOKEN, re.IGNORECASE)
_TOKEN_LINE = re.compile(rf"^[ \t]*({_TOKEN})[ \t]*$|(<\|[^|<>\s]{{1,40}}\|>)[ \t]*$", re.IGNORECASE | re.MULTILINE)
_RULE_LINE = re.compile(r"^[ \t]*(([-=*_~#+])(?:[ \t]*\2){2,})[ \t]*$", re.MULTILINE)
_SENTENCE_END = (".", "!", "?", '"', "'", "”", "’", ")")
_RULES = 3  # a line of dashes may be an ornament; this many are a habit


def check_separator(separator: str | None) -> None:
    """Raise `CutawayError` for a separator that would cut everywhere or nowhere in particular."""
    if separator is not None and not separator.strip(" \t"):
        raise CutawayError("the document separator is empty: give the text that stands between documents, as '---'")


def refuse_separator(separator: str | None, what: str = "rows of token ids") -> None:
    """Raise `CutawayError` for a separator that goes with what has documents already."""
    if separator is not None:
        raise CutawayError(f"a document separator is of texts that are read from files: {what} have none")


def separated(texts: Iterable[Iterable[str]], separator: str, source: str) -> Iterator[str]:
    """The documents between separators, of texts that come in pieces; each text's end is a document's end too.

    One spelled as a token (`<|endoftext|>`, `</s>`) and one with a line break cut wherever they stand, others where a
    line is nothing else. Line breaks around a document are left out, and so are documents of blanks. Raises
    `CutawayError` when all was read and the separator stood nowhere.
    """
    found = False
    anywhere = "\n" in separator or _SPELLED_AS_TOKEN.fullmatch(separator) is not None
    for pieces in texts:
        whole = _newlines(pieces)
        for number, document in enumerate(_cut(whole, separator) if anywhere else _cut_lines(whole, separator)):
            found |= number > 0
            if document.strip():
                yield document.strip("\n")
    if not found:
        where = "" if anywhere else ", on a line of its own,"
        raise CutawayError(
            f"the document separator {separator!r}{where} stands nowhere in {source}: give what stands between its "
            "documents, or leave the option out"
        )


def _newlines(pieces: Iterable[str]) -> Iterator[str]:
    """Line ends of Windows as those of Unix, also where a piece ends between the two characters."""
    tail = ""
    for piece in pieces:
        new = tail + piece
        tail = "\r" if new.endswith("\r") else ""
        yield new.removesuffix("\r").replace("\r\n", "\n")
    yield tail


def _cut(pieces: Iterable[str], separator: str) -> Iterator[str]:
    held = ""
    for piece in pieces:
        begin = max(0, len(held) - len(separator) + 1)  # what was looked through is not looked through again
        held += piece
        if held.find(separator, begin) >= 0:
            *whole, held = held.split(separator)
            yield from whole
    yield held


def _cut_lines(pieces: Iterable[str], separator: str) -> Iterator[str]:
    wanted, document = separator.strip(), list[str]()
    for line in _lines(pieces):
        if line.strip() == wanted:
            yield "\n".join(document)
            document = []
        else:
            document.append(line)
    yield "\n".join(document)


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    held = ""
    for piece in pieces:
        held += piece
        if "\n" in piece:
            *whole, held = held.split("\n")
            yield from whole
    yield held


class Marks:
    """Looks through documents for lines that look like separators, and says so once on stderr.

    Such are lines that are, or end in, something spelled as a token that the tokenizer does not know as one token of
    its own, and lines of one repeated character (`---`, `* * *`) that stand where a paragraph ends, three times or
    more: an underlined heading is none.
    """

    def __init__(self, tokenizer: Any, source: str = "the corpus") -> None:
        self.source = source
        self.known = {*getattr(tokenizer, "all_special_tokens", ())}
        self.known |= set(tokenizer.get_added_vocab()) if hasattr(tokenizer, "get_added_vocab") else set()
        self.rules: Counter[str] = Counter()
        self.said = False

    def see(self, text: str) -> None:
        """Look through one document."""
        if self.said:
            return
        if "<" in text or "[" in text:
            for match in _TOKEN_LINE.finditer(text):
                if (mark := match[1] or match[2]) not in self.known:
                    self._say(mark)
                    return
        for match in _RULE_LINE.finditer(text):
            if _ends_a_paragraph(text[: match.start()], text[match.end() :]):
                self.rules[match[1]] += 1
                if self.rules[match[1]] == _RULES:
                    self._say(match[1])
                    return

    def _say(self, mark: str) -> None:
        self.said = True
        print(
            f"cutaway: lines of {self.source} look like marks between documents: {mark!r}, which are read as text; "
            f"--document-separator {mark!r} (document_separator= in Python) cuts there instead",
            file=sys.stderr,
        )


def _ends_a_paragraph(before: str, after: str) -> bool:
    """Whether a line between the two stands apart: behind a blank line or a sentence, and not over a heading."""
    above, below = before.rstrip("\n"), after.removeprefix("\n")
    last = above.rsplit("\n", 1)[-1].rstrip()
    if last.endswith(_SENTENCE_END) and len(last) > 1:
        return True
    apart = not above or before.endswith("\n\n")
    return apart and (not below.strip() or below.startswith("\n"))
