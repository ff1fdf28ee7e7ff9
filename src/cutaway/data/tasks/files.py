"""Prompt pairs as files: own tasks as JSON, and the formats of other projects' prompt sets.

Our form is a list of pairs, or a task with a name and both splits:

    [{"clean": "The dogs", "corrupt": "The dog", "answer": " are", "wrong": " is"}, ...]
    {"name": "agreement", "pairs": [...], "held_out": [...]}

A pair may also have `positions` ({"subject": ["dogs", "dog"]}), `answers` and `wrongs` (lists), `symmetric` (false
where the corrupt prompt has no answer of its own) and `template`; `PromptPair` says what they mean. Also read are the
minimal pairs of BLiMP (Warstadt et al. 2020; .jsonl), the agreement prompts of the feature-circuits project (one JSON
object per line, `clean_prefix`, `patch_prefix`, ...), the relations of Hernandez et al. 2023 (`prompt_templates`,
`samples`), and the .csv prompts of EAP-IG (IOI, greater-than).
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cutaway.artifacts.errors import BadFile, CutawayError
from cutaway.artifacts.files import has_lone_surrogate, parse_json, read_text, write_text
from cutaway.data.pairs import Place, PromptPair
from cutaway.data.tasks.formats import NEEDED, PairFile, csv_pairs, foreign_pairs
from cutaway.data.tasks.tasks import Task
from cutaway.data.tasks.wording import Split

if TYPE_CHECKING:
    from cutaway.model.language_model import LanguageModel

PAIR_FILES = (".json", ".jsonl", ".csv")
_OPTIONAL = ("positions", "answers", "wrongs", "symmetric", "template")


def read_pairs(path: Path | str) -> list[PromptPair]:
    """The pairs of a file, of both splits: those of the search first (`task_from_file` keeps them apart).

    Args:
        path: A file in cutaway's form (.json), or in one of BLiMP, the feature-circuits project, the relations of
            Hernandez et al. 2023 (https://arxiv.org/abs/2308.09124) or EAP-IG (.csv).

    Returns:
        The pairs.

    Raises:
        BadFile: The file is absent, not of a known form, empty, or wrong in an entry, whose number is given.
    """
    found = read_pair_file(path)
    return [*found.pairs, *found.held_out]


def read_distinct_pairs(path: Path | str) -> PairFile:
    """`read_pair_file` without pairs that repeat an earlier one of their split, which would make every interval too
    narrow; a line on stderr says how many they are.
    """
    found = read_pair_file(path)

    def once(pairs: tuple[PromptPair, ...]) -> tuple[PromptPair, ...]:
        kept: dict[tuple[object, ...], PromptPair] = {}
        for pair in pairs:
            kept.setdefault((pair.clean, pair.corrupt, pair.answer, pair.wrong), pair)
        return tuple(kept.values())

    kept = replace(found, pairs=once(found.pairs), held_out=once(found.held_out))
    left_out = len(found.pairs) + len(found.held_out) - len(kept.pairs) - len(kept.held_out)
    if left_out:
        print(f"cutaway: {left_out} pairs of {path} repeat another and are left out", file=sys.stderr)
    return kept


def read_pair_file(path: Path | str) -> PairFile:
    """The pairs of a file with their split and the task's name; raises like `read_pairs`."""
    path = Path(path)
    if os.path.isdir(path):
        raise BadFile(f"{path} is a folder; name a file of prompt pairs.")
    if not os.path.lexists(path):
        raise BadFile(f"there is no file {str(path)[:200]}; name a file of prompt pairs.")
    found = _pairs_of(path, read_text(path))
    for i, pair in enumerate((*found.pairs, *found.held_out)):
        said = (pair.clean, pair.corrupt, pair.answer, pair.wrong, *pair.answers, *pair.wrongs, pair.template)
        if any(isinstance(text, str) and has_lone_surrogate(text) for text in said):
            raise BadFile(f"{path}: pair {i} holds half of a surrogate pair, which no UTF-8 text can.")
    return found


def _pairs_of(path: Path, text: str) -> PairFile:
    if path.suffix.lower() == ".csv":
        return csv_pairs(path, text)
    try:
        data = parse_json(text, str(path))
    except CutawayError as error:
        data = _json_lines(text)
        if data is None:
            raise BadFile(
                f"{error}; prompt pairs are a list of objects with clean, corrupt, answer and wrong."
            ) from None
    return foreign_pairs(path, data) or _from_json(path, data)


def write_pairs(
    path: Path | str,
    pairs: Sequence[PromptPair],
    *,
    name: str = "",
    held_out: Sequence[PromptPair] = (),
    replace: bool = True,
) -> None:
    """Write pairs as JSON that `read_pairs` reads back: a list, or with a name or held-out pairs a task.

    Args:
        path: The file.
        pairs: To search with.
        name: The task's name; the file's if it has held-out pairs and no name is given.
        held_out: To judge on.
        replace: False: refuse to replace other pairs.

    Raises:
        BadFile: A file is there that holds no pairs, or, without `replace`, others.
    """
    plain: Any = [pair.to_json() for pair in pairs]
    if name or held_out:
        plain = {"name": name or Path(path).stem, "pairs": plain, "held_out": [pair.to_json() for pair in held_out]}
    path = Path(path)
    refuse_other_pairs(path)
    text = json.dumps(plain, indent=1, ensure_ascii=False) + "\n"
    if not replace and path.is_file() and path.read_bytes() not in (b"", text.encode()):
        raise BadFile(f"{path} holds other pairs, which may have been changed by hand; name another file, or move it")
    write_text(path, text)


def refuse_other_pairs(path: Path) -> None:
    """Raise `CutawayError` where pairs would replace a file that holds something else."""
    if path.is_file() and path.stat().st_size:
        try:
            read_pairs(path)
        except CutawayError as error:
            raise BadFile(f"{path} exists and holds no prompt pairs; name another file, or move it") from error


def task_from_file(path: Path | str) -> Task:
    """A file's pairs as a task.

    Args:
        path: As for `read_pairs`.

    Returns:
        The task; drawing from it raises `BadFile` for a split that the file has not.

    Raises:
        BadFile: As for `read_pairs`.
    """
    found = read_pair_file(path)

    def draw(rng: random.Random, _: LanguageModel, split: Split) -> Iterator[PromptPair]:
        pairs = found.pairs if split == "search" else found.held_out
        if not pairs:
            raise BadFile(f'{path} has no held-out pairs; give it as {{"pairs": [...], "held_out": [...]}}')
        yield from rng.sample(pairs, len(pairs))

    left_out = "; ".join(f"{count} × {reason}" for reason, count in (found.left_out or {}).items())
    note = f"left out of its file: {left_out}" if left_out else ""
    return Task(found.name, f"the pairs of {path}", "preferred", draw, note=note)


# -- our own form


def _from_json(path: Path, data: Any) -> PairFile:
    name, held_out = path.stem, ()
    if isinstance(data, dict):
        unknown = sorted(set(data) - {"name", "pairs", "held_out"})
        if "pairs" not in data or unknown:
            raise BadFile(
                f"{path} has {f'an unknown key {unknown[0]!r}' if unknown else 'no key pairs'}; a task is an object "
                'with "pairs", and perhaps "name" and "held_out".'
            )
        name = data.get("name", name)
        if not isinstance(name, str) or not name:
            raise BadFile(f"{path}: name is {name!r}; it must be a text.")
        held_out = data.get("held_out", [])
        data = data["pairs"]
        held_out = _entries(path, held_out, "held_out", may_be_empty=True)
    pairs = _entries(path, data, "pairs")
    searched = {(pair.clean, pair.corrupt) for pair in pairs}
    for i, pair in enumerate(held_out):
        if (pair.clean, pair.corrupt) in searched:
            raise BadFile(f"{path}: held-out pair {i} is among the pairs of the search, too; take it out of one.")
    return PairFile(name, pairs, held_out)


def _entries(path: Path, data: Any, what: str, *, may_be_empty: bool = False) -> tuple[PromptPair, ...]:
    if not isinstance(data, list):
        raise BadFile(f"{path}: {what} is {_kind(data)}; it must be a list of objects.")
    if not data and not may_be_empty:
        raise BadFile(f"{path} has no prompt pairs: the list is empty.")
    label = "pair" if what == "pairs" else "held-out pair"
    return tuple(pair_from_json(entry, f"{path}: {label} {i}") for i, entry in enumerate(data))


def pair_from_json(data: Any, where: str = "the pair") -> PromptPair:
    """The pair of a JSON object (`PromptPair.to_json`); raises `CutawayError` that begins with `where`."""
    if not isinstance(data, dict):
        raise BadFile(f"{where} is {_kind(data)}; a pair is an object with clean, corrupt, answer and wrong.")
    missing = [key for key in NEEDED if key not in data]
    if missing:
        raise BadFile(f"{where} has no {missing[0]!r}; a pair needs clean, corrupt, answer and wrong.")
    unknown = [key for key in data if key not in (*NEEDED, *_OPTIONAL)]
    if unknown:
        raise BadFile(f"{where} has an unknown key {unknown[0]!r}; known are {', '.join((*NEEDED, *_OPTIONAL))}.")
    ids = isinstance(data["clean"], list)
    for key in ("clean", "corrupt"):
        value = data[key]
        if ids and not (isinstance(value, list) and value and all(_whole(i) and i >= 0 for i in value)):
            raise BadFile(f"{where}: {key} is {_kind(value)}; with token ids both prompts are lists of ids.")
        if not ids and not (isinstance(value, str) and value):
            raise BadFile(f"{where}: {key} is {_kind(value)}; a prompt is a text.")
    for key in ("answer", "wrong"):
        _check_answer(where, key, data[key], ids)
    for key in ("answers", "wrongs"):
        value = data.get(key, [])
        if not isinstance(value, list):
            raise BadFile(f"{where}: {key} is {_kind(value)}; it must be a list.")
        for answer in value:
            _check_answer(where, f"an entry of {key}", answer, ids)
    if bool(data.get("answers")) != bool(data.get("wrongs")):
        raise BadFile(f"{where} has only one of answers and wrongs; give both or none.")
    if data["answer"] == data["wrong"]:
        raise BadFile(f"{where}: answer and wrong are both {data['answer']!r}; they must differ.")
    if not isinstance(data.get("symmetric", True), bool):
        raise BadFile(f"{where}: symmetric is {_kind(data['symmetric'])}; it is true or false.")
    if not isinstance(data.get("template", ""), str):
        raise BadFile(f"{where}: template is {_kind(data['template'])}; it is a text.")
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
        raise BadFile(f"{where}: {key} is {_kind(value)}; where prompts are token ids, answers are too.")
    if not ids and not (isinstance(value, str) and value):
        raise BadFile(f"{where}: {key} is {_kind(value)}; an answer is a text, usually with a space before it.")


def _positions(where: str, data: Any) -> dict[str, Place]:
    if not isinstance(data, dict):
        raise BadFile(f"{where}: positions is {_kind(data)}; it is an object from role to place.")
    positions: dict[str, Place] = {}
    for role, place in data.items():
        if isinstance(place, list) and len(place) == 2 and all(isinstance(text, str) and text for text in place):
            positions[role] = (str(place[0]), str(place[1]))
        elif (isinstance(place, int) and _whole(place)) or (isinstance(place, str) and place):
            positions[role] = place
        else:
            raise BadFile(
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


def _json_lines(text: str) -> list[Any] | None:
    """The objects of a text with one per line, or None where it is not of that form."""
    lines = [line for line in text.splitlines() if line.strip()]
    try:
        found = [parse_json(line, "a line") for line in lines]
    except CutawayError:
        return None
    return found if found and all(isinstance(entry, dict) for entry in found) else None
