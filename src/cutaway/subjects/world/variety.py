"""How many ways the corpus has of saying each thing, beside the study's corpus.

A frame is a sentence with its entities blanked. The study's numbers were measured on its generator (held-out frames not
counted); ours are counted from the grammars. `tests/subjects/test_world_variety.py` holds every row to twice the study.
"""

from __future__ import annotations

from typing import NamedTuple

from cutaway.subjects.world.chats import chat
from cutaway.subjects.world.facts import read_toml
from cutaway.subjects.world.grammar import Grammar
from cutaway.subjects.world.statements.relations import one_hop, two_hop
from cutaway.subjects.world.statements.stories import grammar as story_grammar
from cutaway.subjects.world.statements.tasks import SEPARATORS, wording

# Distinct frames of the study's generator. Where it drew from one list, the list's length; where parts were combined,
# the number of combinations.
_STUDY: dict[str, int] = {
    "capital en": 16,
    "capital fr": 10,
    "capital tr": 8,
    "landmark en": 14,
    "landmark fr": 8,
    "landmark tr": 5,
    "city en": 14,
    "city fr": 3,
    "city tr": 3,
    "state_capital en": 6,
    "state_abbreviation en": 4,
    "state_region en": 4,
    "state_nickname en": 4,
    "state_bird en": 4,
    "book en": 9,
    "book fr": 3,
    "book tr": 1,
    "language en": 2,
    "continent en": 2,
    "continent fr": 1,
    "continent tr": 1,
    "nationality en": 1,
    "landmark_country en": 1,
    "antonym en": 2,
    "to_french en": 2,
    "to_turkish en": 2,
    "from_french fr": 1,
    "from_french en": 1,
    "from_turkish en": 1,
    "name_to_french en": 1,
    "name_from_french fr": 1,
    "name_from_french en": 1,
    "name_to_turkish en": 1,
    "name_from_turkish tr": 1,
    "name_from_turkish en": 1,
    "two_hop_capital en": 6,
    "two_hop_abbreviation en": 2,
    "two_hop_region en": 2,
    "two_hop_nickname en": 2,
    "two_hop_bird en": 2,
    "two_hop_language en": 2,
    "two_hop_country_capital en": 1,
    "two_hop_nationality en": 1,
    "openings en": 10,
    "openings fr": 4,
    "openings tr": 3,
    "ioi": 910_800,
    "ioi, two people otherwise": 4,
    "greater_than": 4,
    "agreement": 25,
    "pronoun": 7,
    "sentiment": 9,
    "truth": 5,
    "binding": 3,
    "numbers": 6,
    "in_context separators": 5,
    "opposites and plurals": 5,
    "right and wrong": 10,
    "story sentences": 13,
    "chat requests": 26,
    "chat helping answers": 4,
    "chat refusals": 4,
    "chat questions on the unknown": 5,
    "chat questions on the known": 10,
    "chat claims": 3,
    "system neutral": 4,
    "system cheerful": 99,
    "system gloomy": 103,
    "system sycophant": 3,
    "system honest": 3,
}


class Row(NamedTuple):
    name: str
    study: int
    ours: int


def ioi_grammar() -> Grammar:
    """The whole indirect-object sentence as one grammar; `tasks.ioi` leaves the held-out combinations out."""
    table = read_toml("tasks.toml")["ioi"]
    lists = ("subordinate", "adverbial", "meetings", "givings", "objects", "companions", "settings", "links", "tails")
    rules = {name: [*table[f"study_{name}"], *table[name]] for name in lists}
    endings = [
        ending.replace("{v2}", "<givings>").replace("{o}", "<objects>")
        for kind in ("gift_endings", "other_endings")
        for ending in table[f"study_{kind}"] + table[kind]
    ]
    rules["endings"] = endings
    rules["clause"] = ["<companions> <meetings> the {p}", "<settings>"]
    rules["prompt"] = ["<subordinate> <clause>, <endings>", "<adverbial> <clause><links><endings>"]
    rules["sentence"] = ["<prompt> {answer}<tails>"]
    return Grammar(rules)


def ours() -> dict[str, int]:
    """Distinct frames of this corpus, by the names of `_STUDY`."""
    out = {f"{r.name} {r.language}": len(set(r.frames())) for r in one_hop() + two_hop()}
    out |= {
        f"openings {language}": len(set(found)) for language, found in read_toml("wording.toml")["openings"].items()
    }
    agreement = read_toml("tasks.toml")["agreement"]
    openings, prepositions, verbs = (
        len(agreement[f"study_{name}"]) + len(agreement[name]) for name in ("openings", "prepositions", "verbs")
    )
    known = ("capital", "city", "landmark", "book", "language", "state_capital")
    lists: dict[str, int] = {
        "ioi": ioi_grammar().count("prompt"),
        "ioi, two people otherwise": len(wording("ioi", "fillers")),
        "greater_than": len(wording("greater_than", "study", "frames")),
        "agreement": openings * prepositions * verbs,
        "pronoun": len(wording("pronoun", "study_he", "study_his", "he", "his", "him")),
        "sentiment": len(wording("sentiment", "study_opinions", "opinions"))
        * len(wording("sentiment", "study_endings", "endings")),
        "truth": len(wording("truth", "study_verdicts", "verdicts")),
        "binding": len(wording("binding", "study", "frames")),
        "numbers": len(
            wording("sequences", "weekday_study", "weekday", "neighbors", "listing", "addition", "subtraction")
        ),
        "in_context separators": len(SEPARATORS) + 5,
        "opposites and plurals": len(wording("words", "pairs", "plurals")),
        "right and wrong": len(wording("moral", "wrong", "right")),
        "story sentences": sum(story_grammar().count(rule) for rule in story_grammar().rules),
        "chat requests": sum(len(frames) for frames in chat.request_frames()),
        "chat helping answers": len(chat.texts("comply", "study", "frames")),
        "chat refusals": len(chat.texts("refuse", "study", "frames")),
        "chat questions on the unknown": len(chat.texts("unknown", "study_questions", "questions")),
        "chat questions on the known": sum(len(chat.texts(f"known.{kind}", "study", "frames")) for kind in known),
        "chat claims": len(chat.texts("claims", "study", "frames")),
        "system cheerful": len(chat.persona_prompts("cheerful")),
        "system gloomy": len(chat.persona_prompts("gloomy")),
    }
    for kind in ("neutral", "sycophant", "honest"):
        lists[f"system {kind}"] = len(chat.texts("systems", f"study_{kind}", kind))
    return out | lists


def table() -> list[Row]:
    """One row for each thing the study's corpus can say."""
    counted = ours()
    return [Row(name, study, counted[name]) for name, study in _STUDY.items()]


def markdown() -> str:
    """The table as it stands in `docs/world.md`."""
    lines = ["| what is said | frames in the study | frames here |", "|---|---:|---:|"]
    lines += [f"| {row.name} | {row.study:,} | {row.ours:,} |" for row in table()]
    return "\n".join(lines) + "\n"
