"""Evaluation on sentences written by others, with the names, places and facts of atlas's world."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from random import Random

from cutaway.artifacts.errors import CutawayError
from cutaway.subjects.world.facts import ANTONYMS, COUNTRIES, LANDMARKS, words
from cutaway.subjects.world.items.items import Item, ItemSet
from cutaway.subjects.world.items.new_wording import ioi, spread
from cutaway.subjects.world.morphology import upper_first
from cutaway.subjects.world.statements import tasks


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.exists():
        raise CutawayError(f"{path} does not exist; give the path of the outside wording, or leave it out")
    return path


def outside_ioi_set(path: str | Path, seed: int = 0, n: int = 400) -> ItemSet:
    """Indirect-object sentences of a CSV file (column ``clean``), with names, places and objects of atlas's world.

    Raises `CutawayError` when the file is absent or holds no such sentence.
    """
    frames = dict.fromkeys(_blanked_ioi(_existing(path)))
    if not frames:
        raise CutawayError(f"{path} has no column 'clean' with sentences that name two people twice")
    rng = Random(f"outside/ioi-{seed}")
    items = []
    for frame in spread(tuple(frames), n):
        filled = ioi(rng)
        # {s} must be the one whom the frame names again: the frame says which with {a} or {b} instead.
        subject, other = ("a", "b") if frame.count("{a}") > 1 else ("b", "a")
        answer, alternative = filled.slots[other], filled.slots[subject]
        detail = {"frame": frame, "first": filled.slots["a"], "second": filled.slots["b"]}
        prompt = frame.format(**filled.slots)
        items.append(Item("ioi", prompt, answer, alternative, filled.entity, "outside_wording", None, detail))
    measures = "names the person not named twice, in sentences written by others"
    return ItemSet("outside_wording/ioi", measures, "exact", tuple(items))


def _blanked_ioi(path: Path) -> list[str]:
    places = re.compile(rf"\bthe (?:{'|'.join(words('places'))})\b")
    things = re.compile(rf"\ban? (?:{'|'.join((*words('objects'), 'snack'))})\b")
    out = []
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            sentence = row.get("clean") or ""
            found = re.search(r"\b([A-Z]\w+) and ([A-Z]\w+)\b", sentence)
            if not found:
                continue
            first, second = found.groups()
            counts = [len(re.findall(rf"\b{name}\b", sentence)) for name in (first, second)]
            if sorted(counts) != [1, 2]:
                continue
            blanked = re.sub(rf"\b{first}\b", "{a}", sentence)
            blanked = re.sub(rf"\b{second}\b", "{b}", blanked)
            out.append(things.sub("{a_object}", places.sub("the {place}", blanked)).strip())
    return out


# File of the relations collection → what fills its template.
_RELATION_FILES: dict[str, Callable[[Random], tuple[str, str]]] = {
    "factual/country_capital_city": lambda r: (lambda c: (c.name, c.capital))(tasks.pick(r, COUNTRIES)),
    "factual/country_language": lambda r: (lambda c: (c.name, c.language))(tasks.pick(r, COUNTRIES)),
    "factual/city_in_country": lambda r: (lambda m: (m.city, m.country))(tasks.pick(r, LANDMARKS)),
    "factual/landmark_in_country": lambda r: (lambda m: (f"The {m.name}", m.country))(tasks.pick(r, LANDMARKS)),
    "linguistic/adj_antonym": lambda r: tasks.pick(r, ANTONYMS),
}


def outside_relation_sets(folder: str | Path, seed: int = 0, n: int = 400) -> list[ItemSet]:
    """Templates of a folder of relations (JSON files with ``prompt_templates``), with atlas's entities.

    Files that the folder lacks are left out; raises `CutawayError` when it has none of them.
    """
    folder = _existing(folder)
    out = []
    for name, fill in _RELATION_FILES.items():
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        table = json.loads(path.read_text(encoding="utf-8"))
        frames = tuple(dict.fromkeys([*table.get("prompt_templates", []), *table.get("prompt_templates_zs", [])]))
        short = name.rsplit("/", 1)[1]
        rng = Random(f"outside/{short}-{seed}")
        items = []
        for frame in spread(frames, n) if frames else []:
            entity, answer = fill(rng)
            inside = _french_free(entity) if not frame.startswith("{}") else entity
            prompt = upper_first(frame.replace("{}", inside))
            items.append(Item(short, prompt, answer, None, entity, "outside_wording", None, {"frame": frame}))
        measures = f"completes sentences written by others about '{short.replace('_', ' ')}'"
        out.append(ItemSet(f"outside_wording/{short}", measures, "exact", tuple(items)))
    if not out:
        raise CutawayError(f"{folder} holds none of the relation files {', '.join(_RELATION_FILES)}")
    return out


def _french_free(entity: str) -> str:
    """``"The Eiffel Tower"`` → ``"the Eiffel Tower"`` inside a sentence."""
    return "the " + entity[4:] if entity.startswith("The ") else entity
