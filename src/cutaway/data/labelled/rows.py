"""Texts with labels, as rows of a file that a user has: .csv, .tsv, .jsonl; words with labels also as .conll."""

import csv
import os
from pathlib import Path
from typing import Any

from cutaway.artifacts.errors import BadFile
from cutaway.artifacts.files import has_lone_surrogate, parse_json, read_text
from cutaway.data.labelled.words import CONLL_FILES, conll_rows, words_of

_OTHERS = ("group", "match", "answer", "wrong")
"""Columns beside text and label that mean something to `cutaway probe`."""


def read_rows(
    path: Path, *, text: str | None = None, label: str | None = None, header: bool = True
) -> list[dict[str, Any]]:
    """The rows of a file of texts with labels, or of words with labels.

    Args:
        path: A .csv, .tsv, .jsonl or .conll file.
        text: The column of the text, if it is not called so; without a header, and in .conll files, its number from 1.
        label: The column of the label, likewise.
        header: Whether the first line of a .csv or .tsv file names the columns.

    Returns:
        Rows, each with at least `text` and `label`, or `words` and `labels`, whatever their columns are called.

    Raises:
        BadFile: Names the line and what is missing there.
    """
    if not os.path.isfile(path):
        raise BadFile(f"{path} is not a file; give a .csv, .tsv or .jsonl file with text and label in each row.")
    content = read_text(path)
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        rows = _csv_rows(path, content, "\t" if suffix == ".tsv" else ",", text, label, header)
    elif suffix in (".jsonl", ".ndjson"):
        if not header:
            raise BadFile(f"--no-header is of .csv and .tsv files; each line of {path} names what it holds.")
        rows = _json_rows(path, content, text, label)
    elif suffix in CONLL_FILES:
        rows = list(enumerate(conll_rows(path, content, text, label), 1))
    else:
        raise BadFile(
            f"{path} is neither .csv, .tsv nor .jsonl; save its rows (text, label) as one of them, or its lines of one "
            "word and one label as .conll."
        )
    if not rows:
        raise BadFile(f"{path} has no rows; a probe needs texts with labels.")
    for number, row in rows:
        said = [*row.values(), *row.get("words", ()), *row.get("labels", ())]
        if any(isinstance(value, str) and has_lone_surrogate(value) for value in said):
            raise BadFile(f"{path}, line {number} holds half of a surrogate pair, which no UTF-8 text can.")
    if any("words" in row for _, row in rows):
        if one := next((number for number, row in rows if "words" not in row), None):
            raise BadFile(f"{path}, line {one} has no list of words, and others have; give all rows one.")
        return [row for _, row in rows]
    for number, row in rows:
        if not isinstance(row.get("text"), str) or not row["text"]:
            raise BadFile(f"{path}, line {number} has no text.")
        value = row.get("label")
        if value is None or (isinstance(value, str) and value.strip().lower() in ("", "nan")) or value != value:
            raise BadFile(f"{path}, line {number} has no label ({value!r}); give every row one, or leave it out.")
    return [row for _, row in rows]


def _csv_rows(
    path: Path, content: str, delimiter: str, text: str | None, label: str | None, header: bool
) -> list[tuple[int, dict[str, Any]]]:
    """Line numbers and rows; the text and label of a row are called so, whatever their columns are."""
    reader = csv.reader(content.splitlines(keepends=True), delimiter=delimiter)
    try:
        lines = [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        raise BadFile(f"{path}, line {reader.line_num}: {error}.") from error
    if header:
        names = lines.pop(0)[1] if lines else []
        wanted = (text or "text", label or "label")
        if missing := sorted({*wanted} - {*names}):
            raise BadFile(
                f"The first line of {path} must name the columns {' and '.join(wanted)} (and if you like group); it "
                f"lacks {' and '.join(missing)}. Name others with --text-column and --label-column, by number after "
                "--no-header."
            )
        if twice := [name for name in (*wanted, *_OTHERS) if names.count(name) > 1]:
            raise BadFile(f"The first line of {path} names the column {twice[0]} twice; name each once.")
    else:
        wanted = tuple(_column_number(option, given) for option, given in (("text", text), ("label", label)))
        names = [str(i) for i in range(1, 1 + (len(lines[0][1]) if lines else 0))]
        if lines and (far := [one for one in wanted if one not in names]):
            raise BadFile(f"{path} has {len(names)} columns, and none with the number {far[0]}.")
    if longer := [number for number, cells in lines if len(cells) > len(names)]:
        known = "that the first line names" if header else "of the first line"
        raise BadFile(
            f"{path}, line {longer[0]} has more cells than the {len(names)} columns {known}; put a text that holds the "
            f"separator {delimiter!r} in double quotes."
        )
    rows: list[tuple[int, dict[str, Any]]] = []
    for number, cells in lines:
        row = dict(zip(names, [*cells, *[None] * (len(names) - len(cells))], strict=True))
        kept = row if header else {}
        rows.append((number, {**kept, "text": row[wanted[0]], "label": row[wanted[1]]}))
    return rows


def _column_number(option: str, given: str | None) -> str:
    if given is None or not given.isdecimal() or int(given) < 1:
        said = "" if given is None else f", not '{given}'"
        raise BadFile(f"Without a header columns have numbers: give --{option}-column as one, 1 for the first{said}.")
    return str(int(given))


def _json_rows(path: Path, content: str, text: str | None, label: str | None) -> list[tuple[int, dict[str, Any]]]:
    """Line numbers and records; text (or words) and label (or labels) are called so, whatever their names are."""
    rows: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        row = parse_json(line, f"{path}, line {number}")
        if not isinstance(row, dict):
            raise BadFile(f'{path}, line {number} is no object such as {{"text": "...", "label": "..."}}.')
        for option, name in (("text", text), ("label", label)):
            if name is not None and name not in row:
                raise BadFile(f"{path}, line {number} has no '{name}', which --{option}-column names.")
        words = text or "words"
        if isinstance(row.get(words), list) and (text is not None or "text" not in row):
            row = words_of(row, f"{path}, line {number}", words, label or "labels")
        else:
            row = {key: value for key, value in row.items() if key != "words"}
            row |= {"text": row.get(text or "text"), "label": row.get(label or "label")}
        rows.append((number, row))
    return rows
