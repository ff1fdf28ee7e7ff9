"""Prompt sets of other projects as prompt pairs: BLiMP, agreement prompts, relations, EAP-IG's tables."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from cutaway.artifacts.errors import BadFile
from cutaway.data.pairs import Place, PromptPair
from cutaway.data.tasks.knowledge import years_after

NEEDED = ("clean", "corrupt", "answer", "wrong")
"""What every pair of our own form has."""


@dataclass(frozen=True)
class PairFile:
    """The pairs of a file: those to search with, those to judge on (perhaps none), and the task's name.

    `left_out` counts the entries that are no prompt pair of this kind, by reason.
    """

    name: str
    pairs: tuple[PromptPair, ...]
    held_out: tuple[PromptPair, ...] = ()
    left_out: Mapping[str, int] | None = None


_AGREEMENT = ("clean_prefix", "patch_prefix", "clean_answer", "patch_answer")


def foreign_pairs(path: Path, data: Any) -> PairFile | None:
    """The pairs of another project's JSON: an object, or a list of them (one per line); None where it is of none."""
    first = data[0] if isinstance(data, list) and data else data
    if not isinstance(first, dict):
        return None
    if {"prompt_templates", "samples"} <= set(first):
        return _relation(path, first)
    entries = data if isinstance(data, list) else [data]
    if not all(isinstance(entry, dict) for entry in entries):
        return None
    if {"sentence_good", "sentence_bad"} <= set(first):
        return _blimp(path, entries)
    if set(_AGREEMENT) <= set(first):
        pairs = [_agreement(entry, f"{path}: line {i + 1}") for i, entry in enumerate(entries)]
        return PairFile(path.stem, tuple(pairs))
    return None


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
            raise BadFile(f"{path}: line {i + 1} has no text under one of {', '.join(keys)}.")
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
        raise BadFile(f"{path} has no prompt pairs: {next(iter(left_out))}.")
    return PairFile(path.stem, tuple(pairs), left_out=left_out)


def _relation(path: Path, data: Mapping[str, Any]) -> PairFile:
    """Facts of one relation (Hernandez et al. 2023): two subjects with different objects in one template.

    The corrupt subject has as many words and nearly as many letters, since pairs must be equally long in tokens. Every
    third subject is held out, and asked about in other templates where the file has them (`prompt_templates_zs`).
    """
    samples, templates = data["samples"], data["prompt_templates"]
    if not isinstance(samples, list) or not isinstance(templates, list) or not templates:
        raise BadFile(f"{path}: samples and prompt_templates must be lists, and neither empty.")
    facts: list[tuple[str, str]] = []
    for i, sample in enumerate(samples):
        subject, thing = (sample.get("subject"), sample.get("object")) if isinstance(sample, dict) else (None, None)
        if not (isinstance(subject, str) and subject and isinstance(thing, str) and thing):
            raise BadFile(f"{path}: sample {i} has no text under subject and object.")
        facts.append((subject, thing))
    zero_shot = data.get("prompt_templates_zs", [])
    if not isinstance(zero_shot, list):
        raise BadFile(f"{path}: prompt_templates_zs must be a list.")
    others = [template for template in zero_shot if template not in templates]
    for template in (*templates, *others):
        if not isinstance(template, str) or template.count("{}") != 1:
            raise BadFile(f"{path}: the template {template!r} has no single place {{}} for the subject.")
    pools = ([fact for i, fact in enumerate(facts) if i % 3 != 2], facts[2::3])
    left_out: dict[str, int] = {}
    splits = [
        _facts(pool, chosen, left_out) for pool, chosen in zip(pools, (templates, others or templates), strict=True)
    ]
    if not splits[0]:
        raise BadFile(f"{path} has no prompt pairs: {next(iter(left_out), 'it has no samples')}.")
    return PairFile(str(data.get("name") or path.stem), tuple(splits[0]), tuple(splits[1]), left_out)


def _facts(pool: Sequence[tuple[str, str]], templates: Sequence[str], left_out: dict[str, int]) -> list[PromptPair]:
    pairs: list[PromptPair] = []
    for subject, thing in pool:
        partners = [
            (abs(len(other) - len(subject)), other, wrong)
            for other, wrong in pool
            if len(other.split()) == len(subject.split()) and not (wrong.startswith(thing) or thing.startswith(wrong))
        ]
        if not partners:
            reason = "no subject of as many words has another object"
            left_out[reason] = left_out.get(reason, 0) + 1
            continue
        _, other, wrong = min(partners)
        for template in templates:
            prompts = (template.replace("{}", subject), template.replace("{}", other))
            positions = cast("dict[str, Place]", {"subject": (subject, other)})
            pairs.append(PromptPair(*prompts, f" {thing}", f" {wrong}", positions, template=template))
    return pairs


def _agreement(entry: Mapping[str, Any], where: str) -> PromptPair:
    """A subject in both numbers, with the verb after each."""
    wrong = next((key for key in _AGREEMENT if not (isinstance(entry.get(key), str) and entry[key])), None)
    if wrong is not None:
        raise BadFile(f"{where} has no text under {wrong!r}.")
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


def csv_pairs(path: Path, text: str) -> PairFile:
    """EAP-IG's prompts: IOI with names in the text, greater-than with the first year as label; or columns of ours."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        columns = set(reader.fieldnames or ())
        rows = list(reader)
    except csv.Error as error:
        raise BadFile(f"{path} is not CSV: {error} (near line {reader.line_num}); is a quotation mark open?") from None
    if set(NEEDED) <= columns:
        read: Callable[[Mapping[str, str]], PromptPair | str] = _own_row
    elif {"clean", "corrupted", "label"} <= columns:
        read = _greater_than_row
    elif {"clean", "corrupted_hard"} <= columns:
        read = _ioi_row
    else:
        raise BadFile(
            f"{path} has the columns {', '.join(sorted(filter(None, columns))) or '(none)'}; prompt pairs need clean, "
            "corrupt, answer and wrong (EAP-IG: clean, corrupted, label; or clean, corrupted, corrupted_hard)."
        )
    if not rows:
        raise BadFile(f"{path} has no prompt pairs: it has no row under its header.")
    pairs: list[PromptPair] = []
    for i, row in enumerate(rows):
        if None in row or None in row.values():
            raise BadFile(f"{path}: row {i + 1} has another number of columns than the header.")
        found = read(row)
        if isinstance(found, str):
            raise BadFile(f"{path}: row {i + 1}: {found}.")
        pairs.append(found)
    return PairFile(path.stem, tuple(pairs))


def _own_row(row: Mapping[str, str]) -> PromptPair | str:
    if not all(row[key] for key in NEEDED):
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
