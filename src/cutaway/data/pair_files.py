"""Prompt pairs as files: own tasks as JSON, and the formats of other projects' prompt sets.

Our form is a list of pairs, or a task with a name and both splits:

    [{"clean": "The dogs", "corrupt": "The dog", "answer": " are", "wrong": " is"}, ...]
    {"name": "agreement", "pairs": [...], "held_out": [...]}

A pair may also have `positions` ({"subject": ["dogs", "dog"]}), `answers` and `wrongs` (lists), `symmetric` (false
where the corrupt prompt has no answer of its own) and `template`; `PromptPair` says what they mean. Also read are the
minimal pairs of BLiMP (Warstadt et al. 2020; .jsonl), the agreement prompts of the feature-circuits project (one JSON
object a line, `clean_prefix`, `patch_prefix`, ...), and the .csv prompts of EAP-IG (IOI, greater-than).
"""

from __future__ import annotations

import csv
import io
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.files import write_text
from cutaway.data.pairs import Place, PromptPair
from cutaway.data.tasks import Task
from cutaway.data.tasks_knowledge import years_after
from cutaway.data.wording import Split

if TYPE_CHECKING:
    from cutaway.model.language_model import LanguageModel

PAIR_FILES = (".json", ".jsonl", ".csv")
_NEEDED = ("clean", "corrupt", "answer", "wrong")
_OPTIONAL = ("positions", "answers", "wrongs", "symmetric", "template")


@dataclass(frozen=True)
class PairFile:
    """The pairs of a file: those to search with, those to judge on (perhaps none), and the task's name.

    `left_out` counts the entries that are no prompt pair of this kind, by reason.
    """

    name: str
    pairs: tuple[PromptPair, ...]
    held_out: tuple[PromptPair, ...] = ()
    left_out: Mapping[str, int] | None = None


def read_pairs(path: Path | str) -> list[PromptPair]:
    """The pairs of a file (of both splits: those of the search first); `read_pair_file` keeps them apart.

    Raises `CutawayError`, in one sentence, for a file that is absent, not of a known form, empty, or wrong in an entry,
    whose number it gives.
    """
    found = read_pair_file(path)
    return [*found.pairs, *found.held_out]


def read_pair_file(path: Path | str) -> PairFile:
    """The pairs of a file with their split and the task's name; raises like `read_pairs`."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except IsADirectoryError:
        raise CutawayError(f"{path} is a folder; name a file of prompt pairs.") from None
    except FileNotFoundError:
        raise CutawayError(f"there is no file {path}; name a file of prompt pairs.") from None
    except UnicodeDecodeError:
        raise CutawayError(f"{path} is not text in UTF-8; prompt pairs are JSON, JSON lines or CSV.") from None
    if path.suffix.lower() == ".csv":
        return _from_csv(path, text)
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        lines = _json_lines(text)
        if lines is None:
            raise CutawayError(
                f"{path} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}; prompt pairs are a "
                "list of objects with clean, corrupt, answer and wrong."
            ) from None
        return _from_lines(path, lines)
    if _foreign(data):  # a single line
        return _from_lines(path, [data])
    return _from_json(path, data)


def write_pairs(
    path: Path | str, pairs: Sequence[PromptPair], *, name: str = "", held_out: Sequence[PromptPair] = ()
) -> None:
    """Write pairs as JSON that `read_pairs` reads back: a list, or with a name or held-out pairs a task."""
    plain: Any = [pair.to_json() for pair in pairs]
    if name or held_out:
        plain = {"name": name or Path(path).stem, "pairs": plain, "held_out": [pair.to_json() for pair in held_out]}
    write_text(Path(path), json.dumps(plain, indent=1, ensure_ascii=False) + "\n")


def task_from_file(path: Path | str) -> Task:
    """A file's pairs as a task; raises like `read_pairs`, and where a split is asked for that the file has not."""
    found = read_pair_file(path)

    def draw(rng: random.Random, _: LanguageModel, split: Split) -> Iterator[PromptPair]:
        pairs = found.pairs if split == "search" else found.held_out
        if not pairs:
            raise CutawayError(f'{path} has no held-out pairs; give it as {{"pairs": [...], "held_out": [...]}}')
        yield from rng.sample(pairs, len(pairs))

    return Task(found.name, f"the pairs of {path}", "preferred", draw)


# -- our own form


def _from_json(path: Path, data: Any) -> PairFile:
    name, held_out = path.stem, ()
    if isinstance(data, dict):
        unknown = sorted(set(data) - {"name", "pairs", "held_out"})
        if "pairs" not in data or unknown:
            raise CutawayError(
                f"{path} has {f'an unknown key {unknown[0]!r}' if unknown else 'no key pairs'}; a task is an object "
                'with "pairs", and perhaps "name" and "held_out".'
            )
        name = data.get("name", name)
        if not isinstance(name, str) or not name:
            raise CutawayError(f"{path}: name is {name!r}; it must be a text.")
        held_out = data.get("held_out", [])
        data = data["pairs"]
        held_out = _entries(path, held_out, "held_out", may_be_empty=True)
    pairs = _entries(path, data, "pairs")
    searched = {(pair.clean, pair.corrupt) for pair in pairs}
    for i, pair in enumerate(held_out):
        if (pair.clean, pair.corrupt) in searched:
            raise CutawayError(f"{path}: held-out pair {i} is among the pairs of the search, too; take it out of one.")
    return PairFile(name, pairs, held_out)


def _entries(path: Path, data: Any, what: str, *, may_be_empty: bool = False) -> tuple[PromptPair, ...]:
    if not isinstance(data, list):
        raise CutawayError(f"{path}: {what} is {_kind(data)}; it must be a list of objects.")
    if not data and not may_be_empty:
        raise CutawayError(f"{path} has no prompt pairs: the list is empty.")
    label = "pair" if what == "pairs" else "held-out pair"
    return tuple(pair_from_json(entry, f"{path}: {label} {i}") for i, entry in enumerate(data))


def pair_from_json(data: Any, where: str = "the pair") -> PromptPair:
    """The pair of a JSON object (`PromptPair.to_json`); raises `CutawayError` that begins with `where`."""
    if not isinstance(data, dict):
        raise CutawayError(f"{where} is {_kind(data)}; a pair is an object with clean, corrupt, answer and wrong.")
    missing = [key for key in _NEEDED if key not in data]
    if missing:
        raise CutawayError(f"{where} has no {missing[0]!r}; a pair needs clean, corrupt, answer and wrong.")
    unknown = [key for key in data if key not in (*_NEEDED, *_OPTIONAL)]
    if unknown:
        raise CutawayError(f"{where} has an unknown key {unknown[0]!r}; known are {', '.join((*_NEEDED, *_OPTIONAL))}.")
    ids = isinstance(data["clean"], list)
    for key in ("clean", "corrupt"):
        value = data[key]
        if ids and not (isinstance(value, list) and value and all(_whole(i) and i >= 0 for i in value)):
            raise CutawayError(f"{where}: {key} is {_kind(value)}; with token ids both prompts are lists of ids.")
        if not ids and not (isinstance(value, str) and value):
            raise CutawayError(f"{where}: {key} is {_kind(value)}; a prompt is a text.")
    for key in ("answer", "wrong"):
        _check_answer(where, key, data[key], ids)
    for key in ("answers", "wrongs"):
        value = data.get(key, [])
        if not isinstance(value, list):
            raise CutawayError(f"{where}: {key} is {_kind(value)}; it must be a list.")
        for answer in value:
            _check_answer(where, f"an entry of {key}", answer, ids)
    if bool(data.get("answers")) != bool(data.get("wrongs")):
        raise CutawayError(f"{where} has only one of answers and wrongs; give both or none.")
    if data["answer"] == data["wrong"]:
        raise CutawayError(f"{where}: answer and wrong are both {data['answer']!r}; they must differ.")
    if not isinstance(data.get("symmetric", True), bool):
        raise CutawayError(f"{where}: symmetric is {_kind(data['symmetric'])}; it is true or false.")
    if not isinstance(data.get("template", ""), str):
        raise CutawayError(f"{where}: template is {_kind(data['template'])}; it is a text.")
    return PromptPair(
        tuple(data["clean"]) if ids else data["clean"],
        tuple(data["corrupt"]) if ids else data["corrupt"],
        data["answer"],
        data["wrong"],
        _positions(where, data.get("positions", {})),
        tuple(data.get("answers", ())),
        tuple(data.get("wrongs", ())),
        data.get("template", ""),
        data.get("symmetric", True),
    )


def _check_answer(where: str, key: str, value: Any, ids: bool) -> None:
    if ids and not (_whole(value) and value >= 0):
        raise CutawayError(f"{where}: {key} is {_kind(value)}; where prompts are token ids, answers are too.")
    if not ids and not (isinstance(value, str) and value):
        raise CutawayError(f"{where}: {key} is {_kind(value)}; an answer is a text, usually with a space before it.")


def _positions(where: str, data: Any) -> dict[str, Place]:
    if not isinstance(data, dict):
        raise CutawayError(f"{where}: positions is {_kind(data)}; it is an object from role to place.")
    positions: dict[str, Place] = {}
    for role, place in data.items():
        if isinstance(place, list) and len(place) == 2 and all(isinstance(text, str) and text for text in place):
            positions[role] = (str(place[0]), str(place[1]))
        elif (isinstance(place, int) and _whole(place)) or (isinstance(place, str) and place):
            positions[role] = place
        else:
            raise CutawayError(
                f"{where}: the place {role!r} is {_kind(place)}; it is a token position, a text of both prompts, or "
                "the two texts of clean and corrupt."
            )
    return positions


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if value == "" or value == [] or value == {}:
        return {"str": "an empty text", "list": "an empty list", "dict": "an empty object"}[type(value).__name__]
    names = {"str": "a text", "list": "a list", "dict": "an object", "NoneType": "null", "bool": "true or false"}
    return names.get(type(value).__name__, "a number")


# -- other projects' forms


def _json_lines(text: str) -> list[Any] | None:
    """The objects of a text with one a line, or None where it is not of that form."""
    lines = [line for line in text.splitlines() if line.strip()]
    try:
        found = [json.loads(line) for line in lines]
    except json.JSONDecodeError:
        return None
    return found if found and all(isinstance(entry, dict) for entry in found) else None


_AGREEMENT = ("clean_prefix", "patch_prefix", "clean_answer", "patch_answer")


def _foreign(entry: Any) -> bool:
    """Whether an object is of another project's form."""
    return isinstance(entry, dict) and (
        {"sentence_good", "sentence_bad"} <= set(entry) or set(_AGREEMENT) <= set(entry)
    )


def _from_lines(path: Path, entries: Sequence[Any]) -> PairFile:
    """One object a line: BLiMP, agreement prompts, or pairs of our form."""
    if not _foreign(entries[0]):
        return _from_json(path, list(entries))
    if "sentence_good" in entries[0]:
        return _blimp(path, entries)
    return PairFile(path.stem, tuple(_agreement(entry, f"{path}: line {i + 1}") for i, entry in enumerate(entries)))


_OTHER_NUMBER = {"this": "these", "these": "this", "that": "those", "those": "that"}
_LAST_DETERMINER = re.compile(r"\b(this|these|that|those)$", re.IGNORECASE)


def _blimp(path: Path, entries: Sequence[Mapping[str, Any]]) -> PairFile:
    """Minimal pairs of one paradigm as prompt pairs.

    BLiMP's "one prefix" items have one prompt and a right and a wrong word after it, so a corrupt prompt must be found.
    Where the prompt ends in this, these, that or those, that word is turned to the other number. Elsewhere the corrupt
    prompt is another item's, as long in words, after which the two words are right and wrong the other way round; each
    item is used once, and the two prompts may differ in several words. "Two prefix" items have one continuation, which
    decides between no two answers; they are left out, as are items without a partner.
    """
    pairs: list[PromptPair] = []
    left_out: dict[str, int] = {}
    waiting: dict[tuple[str, str, int], list[str]] = {}
    for i, entry in enumerate(entries):
        if "one_prefix_prefix" not in entry:
            reason = "it has two prompts and one continuation, which decides between no two answers"
            left_out[reason] = left_out.get(reason, 0) + 1
            continue
        keys = ("one_prefix_prefix", "one_prefix_word_good", "one_prefix_word_bad")
        if not all(isinstance(entry.get(key), str) and entry[key] for key in keys):
            raise CutawayError(f"{path}: line {i + 1} has no text under one of {', '.join(keys)}.")
        prompt, good, bad = (entry[key] for key in keys)
        template = str(entry.get("UID", path.stem))
        last = _LAST_DETERMINER.search(prompt)
        if last:
            word = last.group()
            other = _OTHER_NUMBER[word.lower()]
            other = other.capitalize() if word[0].isupper() else other
            corrupt, positions = prompt[: last.start()] + other, cast("dict[str, Place]", {"determiner": (word, other)})
            pairs.append(PromptPair(prompt, corrupt, f" {good}", f" {bad}", positions, template=template))
            continue
        length = len(prompt.split())
        partners = waiting.get((bad, good, length))
        if partners:
            pairs.append(PromptPair(partners.pop(0), prompt, f" {bad}", f" {good}", template=template))
        else:
            waiting.setdefault((good, bad, length), []).append(prompt)
    alone = sum(len(prompts) for prompts in waiting.values())
    if alone:
        left_out["no item of as many words has the same two words the other way round"] = alone
    if not pairs:
        raise CutawayError(f"{path} has no prompt pairs: {next(iter(left_out))}.")
    return PairFile(path.stem, tuple(pairs), left_out=left_out)


def _agreement(entry: Mapping[str, Any], where: str) -> PromptPair:
    """A subject in both numbers, with the verb after each."""
    wrong = next((key for key in _AGREEMENT if not (isinstance(entry.get(key), str) and entry[key])), None)
    if wrong is not None:
        raise CutawayError(f"{where} has no text under {wrong!r}.")
    clean, corrupt = str(entry["clean_prefix"]), str(entry["patch_prefix"])
    before, here, there = _differing_word(clean, corrupt)
    positions = cast(
        "dict[str, Place]", {"subject": (f"^{before}{here}", f"^{before}{there}")} if here and there else {}
    )
    return PromptPair(
        clean,
        corrupt,
        str(entry["clean_answer"]),
        str(entry["patch_answer"]),
        positions,
        template=str(entry.get("case", "")),
    )


def _differing_word(clean: str, corrupt: str) -> tuple[str, str, str]:
    """What stands before the first differing word, and that word in both."""
    ours, theirs = clean.split(" "), corrupt.split(" ")
    for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return "".join(f"{word} " for word in ours[:i]), a, b
    return "", "", ""


def _from_csv(path: Path, text: str) -> PairFile:
    """EAP-IG's prompts: IOI with names in the text, greater-than with the first year as label; or columns of ours."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = set(reader.fieldnames or ())
    rows = list(reader)
    if set(_NEEDED) <= columns:
        read: Callable[[Mapping[str, str]], PromptPair | str] = _own_row
    elif {"clean", "corrupted", "label"} <= columns:
        read = _greater_than_row
    elif {"clean", "corrupted_hard"} <= columns:
        read = _ioi_row
    else:
        raise CutawayError(
            f"{path} has the columns {', '.join(sorted(filter(None, columns))) or '(none)'}; prompt pairs need clean, "
            "corrupt, answer and wrong (EAP-IG: clean, corrupted, label; or clean, corrupted, corrupted_hard)."
        )
    if not rows:
        raise CutawayError(f"{path} has no prompt pairs: it has no row under its header.")
    pairs: list[PromptPair] = []
    for i, row in enumerate(rows):
        if None in row or None in row.values():
            raise CutawayError(f"{path}: row {i + 1} has another number of columns than the header.")
        found = read(row)
        if isinstance(found, str):
            raise CutawayError(f"{path}: row {i + 1}: {found}.")
        pairs.append(found)
    return PairFile(path.stem, tuple(pairs))


def _own_row(row: Mapping[str, str]) -> PromptPair | str:
    if not all(row[key] for key in _NEEDED):
        return "a prompt or an answer is empty"
    return PromptPair(row["clean"], row["corrupt"], row["answer"], row["wrong"], template=row.get("template", ""))


def _greater_than_row(row: Mapping[str, str]) -> PromptPair | str:
    """A span of years whose label is the two last digits of its first year: every later year is right."""
    label = row["label"].strip()
    if not re.fullmatch(r"\d{1,2}", label) or not 1 <= int(label) <= 98:
        return f"label is {row['label']!r}; it is the last two digits of a year from 01 to 98"
    year = int(label)
    answers, wrongs = years_after(year)
    # a later and an earlier year as far from the first as the century allows, up to ten
    answer, wrong = f"{min(year + 10, 99):02d}", f"{max(year - 10, 0):02d}"
    before, here, there = _differing_word(row["clean"], row["corrupted"])
    return PromptPair(
        row["clean"],
        row["corrupted"],
        answer,
        wrong,
        {"year": (f"^{before}{here}", f"^{before}{there}")},
        answers,
        wrongs,
        symmetric=False,
        template="greater than",
    )


def _ioi_row(row: Mapping[str, str]) -> PromptPair | str:
    """Two names, one of which acts; the corrupt prompt has the other one act (`corrupted_hard`), so it is symmetric."""
    clean, corrupt = row["clean"], row["corrupted_hard"]
    before, subject, other = _differing_word(clean, corrupt)
    if (
        not subject
        or clean.count(other) < 1
        or corrupt[len(before) + len(other) :] != clean[len(before) + len(subject) :]
    ):
        return "clean and corrupted_hard do not differ in one name"
    return PromptPair(
        clean, corrupt, f" {other}", f" {subject}", {"S2": (f"^{before}{subject}", f"^{before}{other}")}, template="ioi"
    )
