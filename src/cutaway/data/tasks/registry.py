"""What subjects offer to general instruments: their tasks, text and facts, found by name.

A subject is a model with a world of its own that we know. It is entered here with the places of what it offers, which
are imported when somebody asks: the instruments know no subject's world.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from cutaway.artifacts.errors import CutawayError, NotSupported
from cutaway.data.tasks.files import PAIR_FILES, task_from_file
from cutaway.data.tasks.tasks import TASKS, Task, find_task


@dataclass(frozen=True)
class SubjectWorld:
    """Where a subject keeps what it offers, as "module:name"; "" for what it has not.

    Attributes:
        model: The model that knows the world, as `cutaway.load` takes its name.
        tasks: A sequence of `Task`.
        text: A function (characters, stream) of about so many characters of documents; the seed `stream` is a name.
        facts: A function of nothing: triples of a prompt, the subject in it, and its answer.
    """

    model: str
    tasks: str = ""
    text: str = ""
    facts: str = ""


_WORLDS: dict[str, SubjectWorld] = {
    "atlas": SubjectWorld(
        model="atlas",
        tasks="cutaway.subjects.world.items.pairs:WORLD_TASKS",
        text="cutaway.subjects.atlas.text:world_text",
        facts="cutaway.subjects.world.items.pairs:landmark_facts",
    )
}


def register_world(world: SubjectWorld) -> None:
    """Enter a subject, in place of one of the same name."""
    _WORLDS[world.model] = world


def has_world(model: str) -> bool:
    """Whether that is the name of a subject with text of its own."""
    return model in _WORLDS and bool(_WORLDS[model].text)


def world_text(model: str, characters: int, stream: str) -> list[str]:
    """Documents of a subject's world, about so many characters, from a stream that no training uses.

    Args:
        model: The subject, such as "atlas".
        characters: Of all documents together.
        stream: The seed, such as "lens-0"; the same documents each time.

    Raises:
        NotSupported: The subject has no text.
    """
    if not has_world(model):
        known = ", ".join(name for name in _WORLDS if has_world(name))
        raise NotSupported(f"{model} is no subject with text of its own; those are {known}")
    return _found(_WORLDS[model].text)(characters, stream)


def world_facts() -> list[tuple[str, str, str]]:
    """Facts of all subjects: a prompt, the subject that stands in it, and its answer."""
    return [fact for world in _WORLDS.values() if world.facts for fact in _found(world.facts)()]


def all_tasks() -> tuple[Task, ...]:
    """Every task there is, those of subjects first."""
    own: list[Task] = [task for world in _WORLDS.values() if world.tasks for task in _found(world.tasks)]
    return (*own, *TASKS)


def known_task(name: str) -> Task:
    """The task of that name or alias, of a subject or general; or of a file of pairs (`cutaway.data.tasks.files`).

    Args:
        name: Such as "indirect object", "ioi", "two-hop capitals", or "pairs.json".

    Raises:
        CutawayError: There is none; the message has the names there are.
    """
    path = Path(name)
    if path.suffix.lower() in PAIR_FILES or os.path.isfile(path):
        return task_from_file(path)
    try:
        return find_task(name, all_tasks())
    except CutawayError as error:
        raise CutawayError(f"{error}, or the name of a .json file of prompt pairs") from None


def _found(where: str) -> Any:
    module, name = where.split(":")
    return getattr(import_module(module), name)
