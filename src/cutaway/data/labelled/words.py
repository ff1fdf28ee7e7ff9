"""Sentences as lists of words with a label per word (parts of speech, names), from CoNLL-like files and JSON lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cutaway.artifacts.errors import BadFile

CONLL_FILES = (".conll", ".conllu", ".iob", ".bio")
_COLUMNS = {".conllu": (2, 4)}  # FORM and UPOS


def conll_rows(path: Path, content: str, word: str | None = None, label: str | None = None) -> list[dict[str, Any]]:
    """The sentences of a CoNLL-like file, {"words": [...], "labels": [...]} each.

    A line is a word and its labels in columns, between tabs (without any tab in the file: blanks); a blank line ends a
    sentence. `word` and `label` are the numbers of their columns, from 1: in a .conllu file 2 and 4 (the word and its
    part of speech) if None, else 1 and 2, of two. A label "_" is none (None). Left out: comments, `-DOCSTART-`, and
    the ranges and empty nodes of .conllu. Raises `CutawayError` that names the line.
    """
    universal = path.suffix.lower() == ".conllu"
    tabs = "\t" in content
    chosen = [_number(path, "--text-column", word), _number(path, "--label-column", label)]
    usual = _COLUMNS.get(path.suffix.lower(), (1, 2))
    word_at, label_at = (given or standard for given, standard in zip(chosen, usual, strict=True))
    rows: list[dict[str, Any]] = []
    words, labels = list[str](), list[str | None]()
    for number, line in enumerate([*content.split("\n"), ""], 1):
        line = line.rstrip("\r")
        if not line.strip():
            if words:
                rows.append({"words": words, "labels": labels})
            words, labels = [], []
            continue
        if line.startswith("#") and (universal or tabs) and "\t" not in line:
            continue
        cells = line.split("\t") if tabs else line.split()
        if cells[0] == "-DOCSTART-" or (universal and not cells[0].isdigit()):
            continue
        if len(cells) < max(word_at, label_at):
            raise BadFile(
                f"{path}, line {number} has {len(cells)} columns, and the label is in column {label_at}, the word in "
                f"column {word_at}; write WORD<tab>LABEL, with a blank line between sentences"
            )
        if not universal and len(cells) > 2 and chosen[1] is None:
            raise BadFile(
                f"{path}, line {number} has {len(cells)} columns: say with --label-column which of them, from 1, is "
                "the label"
            )
        words.append(cells[word_at - 1].strip())
        labels.append(None if cells[label_at - 1].strip() == "_" else cells[label_at - 1].strip())
        if not words[-1] or labels[-1] == "":
            raise BadFile(f"{path}, line {number} has no {'label' if words[-1] else 'word'}")
    return rows


def _number(path: Path, option: str, given: str | None) -> int | None:
    if given is None:
        return None
    if not given.isdecimal() or int(given) < 1:
        raise BadFile(f"{option} {given}: the columns of {path} have no names; give a number, 1 for the first")
    return int(given)


def words_of(row: Mapping[str, Any], where: str, word: str = "words", label: str = "labels") -> dict[str, Any]:
    """A record's words and labels, checked: `{"words": [...], "labels": [...]}`, other entries as they are.

    Raises `CutawayError`, beginning with `where`, for what is not two lists of one length of words and labels.
    """
    words, labels = row.get(word), row.get(label)
    if not isinstance(words, list) or not words or not all(isinstance(one, str) and one.strip() for one in words):
        raise BadFile(f"{where}: '{word}' is not a list of words")
    if not isinstance(labels, list) or len(labels) != len(words):
        raise BadFile(f"{where}: '{label}' is not a list of {len(words)} labels, one for each of '{word}'")
    if bad := next((one for one in labels if isinstance(one, (list, dict)) or one == "" or one != one), None):
        raise BadFile(f"{where}: {bad!r} is no label; give a text, a number, or null for a word without one")
    return {**row, "words": words, "labels": labels}


def without_rare(rows: Sequence[Mapping[str, Any]], least: int) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The rows with no label where one is in fewer than `least` different sentences (or groups), and those labels.

    Tag sets have tails (a foreign word, a symbol) of which no fold can be made.
    """
    where: dict[Any, set[Any]] = {}
    for row in rows:
        sentence = row.get("group") or tuple(row["words"])
        for label in row["labels"]:
            if label is not None:
                where.setdefault(label, set()).add(sentence)
    rare = {label: len(found) for label, found in where.items() if len(found) < least}
    kept = [{**row, "labels": [None if label in rare else label for label in row["labels"]]} for row in rows]
    return kept, {str(label): n for label, n in rare.items()}
