"""Which parts of the world the corpus never shows: the study's hash splits, kept exactly.

A split is a fixed share of keys chosen by their CRC-32, so it needs no list and no random state, and a generator can
ask about one fact at a time. Change nothing here: the shipped weights were trained with these splits.
"""

from __future__ import annotations

import zlib

from cutaway.subjects.world.facts import Action, held_out_verbs


def held_out(key: str, fraction: float) -> bool:
    """Whether `key` falls in the held-out `fraction` of all keys."""
    return zlib.crc32(key.encode()) % 10007 < fraction * 10007


def two_hop_entity(name: str) -> bool:
    """A city, landmark or book that never appears in a two-hop sentence."""
    return held_out(f"2hop{name}", 0.30)


def language_fact(language: str, entity: str) -> bool:
    """An entity whose facts are never told in that language (``"fr"`` or ``"tr"``; all are told in English)."""
    return language != "en" and held_out(f"lang{language}{entity}", 0.12)


def name_pair(first: str, second: str) -> bool:
    """Two people who never meet in a sentence that names one of them again."""
    return held_out("ioi" + "|".join(sorted((first, second))), 0.20)


def ioi_clauses(opening: str, meeting: str, giving: str, ending: str) -> bool:
    """A combination of clause parts that no indirect-object sentence uses."""
    return held_out(f"ioit{opening}{meeting}{giving}{ending}", 0.15)


def year_span(noun: str, century: int, year: int) -> bool:
    """An event with its first year that no sentence about a span of years uses."""
    return held_out(f"gt{noun}{century}{year}", 0.15)


def judged_statement(statement: str) -> bool:
    """A statement that is never called true or false."""
    return held_out(f"truth{statement}", 0.15)


def in_context_word(task: str, word: str) -> bool:
    """A word that never stands in a list of examples of `task`."""
    return held_out(f"icl{task}{word}", 0.20)


def _action_text(text: str) -> bool:
    """An action that no chat asks about, though its verb is met with other objects."""
    return held_out(f"act{text}", 0.20)


def action_split(action: Action) -> str:
    """``"train"``, ``"held_out_action"`` (its verb is known) or ``"held_out_verb"`` (no chat uses the verb)."""
    if action.verb in held_out_verbs():
        return "held_out_verb"
    return "held_out_action" if _action_text(action.text) else "train"


def nonce_name(name: str) -> bool:
    """An invented name that no chat asks about."""
    return held_out(f"nonce{name}", 0.20)


def persona_prompt(prompt: str) -> bool:
    """A system prompt of a persona that no chat uses."""
    return held_out(f"per{prompt}", 0.20)


def held_out_document(name: str) -> bool:
    """A document of the standard library kept for measuring; a module's docstrings go where the module goes."""
    return held_out(f"sd{name.removeprefix('docstrings:')}", 0.03)
