"""Templates into prompts: slots filled, and where each filler ends, so that a pair can name its important tokens."""

from __future__ import annotations

import string
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from cutaway.data.pairs import Place, PromptPair

Split = Literal["search", "held_out"]
"""What a circuit may be looked for with, and what it is judged on: no prompt is in both."""


@cache
def task_wording(task: str) -> Mapping[str, Any]:
    """One table of `data/tasks.toml`, read once. Treat it as read-only."""
    text = (files("cutaway.data.tasks") / "tasks.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)[task]


def fill(template: str, fillers: Mapping[str, str]) -> tuple[str, dict[str, list[int]]]:
    """The text of a template, and the offset at which each appearance of each slot's filler ends."""
    text, ends = "", {}
    for literal, slot, _, _ in string.Formatter().parse(template):
        text += literal
        if slot is not None:
            text += fillers[slot]
            ends.setdefault(slot, []).append(len(text))
    return text, ends


def place(text: str, end: int, filler: str) -> str:
    """How a pair names the token at which text[:end] ends: by the filler, where its last occurrence ends there, else by
    everything up to it, anchored at the beginning.
    """
    return filler if text.rfind(filler) + len(filler) == end else f"^{text[:end]}"


def pair_from(
    template: str | tuple[str, str],
    clean: Mapping[str, str],
    corrupt: Mapping[str, str],
    answer: str,
    wrong: str,
    roles: Mapping[str, str] | Mapping[str, tuple[str, int]] | Mapping[str, str | tuple[str, int]],
    *,
    answers: tuple[str, ...] = (),
    wrongs: tuple[str, ...] = (),
    symmetric: bool = True,
    name: str = "",
) -> PromptPair:
    """The pair of a template filled in two ways.

    Args:
        template: Text with slots, such as "The capital of {state} is"; or two, of the clean and of the corrupt prompt.
        clean: What stands in the slots of the clean prompt.
        corrupt: What stands in those of the corrupt one.
        answer: What continues the clean prompt, with its space.
        wrong: What continues the corrupt one.
        roles: For each role its slot, or (slot, which appearance); a slot that the template lacks is left out.
        answers: All right continuations, where there are several.
        wrongs: All wrong ones.
        symmetric: Whether the corrupt prompt has `wrong` as its answer.
        name: What the pair calls its template; the template itself if empty.

    Returns:
        The pair, each role with the token at which its filler ends.

    Example:
        >>> pair_from("{name} is in", {"name": "Rome"}, {"name": "Oslo"}, " Italy", " Norway", {"city": "name"}).corrupt
        'Oslo is in'
    """
    template, corrupt_template = (template, template) if isinstance(template, str) else template
    said, ends = fill(template, clean)
    other, other_ends = fill(corrupt_template, corrupt)
    positions: dict[str, Place] = {}
    for role, named in roles.items():
        slot, nth = named if isinstance(named, tuple) else (named, -1)
        if slot in ends and slot in other_ends:
            here = place(said, ends[slot][nth], clean[slot])
            there = place(other, other_ends[slot][nth], corrupt[slot])
            positions[role] = here if here == there else (here, there)
    return PromptPair(said, other, answer, wrong, positions, answers, wrongs, name or template, symmetric)
