"""Prompt pairs about atlas's world, in its wording, as tasks like those of `cutaway.data.tasks.tasks`.

The held-out split is what atlas's corpus never showed in that kind of sentence, where there is such a thing (cities
never met in two-hop sentences, pairs of names that never met, spans of years, actions never asked about, a frame kept
out, system prompts of no chat), and always another wording than the search split's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING

from cutaway.artifacts.errors import CutawayError
from cutaway.data.pairs import PromptPair
from cutaway.data.tasks.knowledge import chat_wording, greater_than_pair, refusal_pair
from cutaway.data.tasks.names import ioi_pair
from cutaway.data.tasks.tasks import Task
from cutaway.data.tasks.wording import Split, pair_from
from cutaway.subjects.world import facts, held_out
from cutaway.subjects.world.chats import chat
from cutaway.subjects.world.morphology import with_article
from cutaway.subjects.world.statements import tasks as sentences
from cutaway.subjects.world.statements.relations import Fact, relation

if TYPE_CHECKING:
    from cutaway.model.language_model import LanguageModel


def _fact_pair(frame: str, clean: Fact, corrupt: Fact, role: str) -> PromptPair:
    template = frame.split("{answer}", 1)[0].rstrip()
    answers = (f" {clean.answer}", f" {corrupt.answer}")
    return pair_from(template, {"x": clean.x}, {"x": corrupt.x}, *answers, {role: "x"})


def _fact_pairs(rng: random.Random, frames: Sequence[str], pool: Sequence[Fact], role: str) -> Iterator[PromptPair]:
    if len({fact.answer for fact in pool}) < 2:
        raise CutawayError("the world has too few facts of this kind about things of as many tokens")
    while True:
        clean, corrupt = rng.sample(pool, 2)
        if clean.answer != corrupt.answer:
            yield _fact_pair(rng.choice(frames), clean, corrupt, role)


def _length(lm: LanguageModel, text: str) -> int:
    return lm.tokens(text, bos=False).ids.shape[1]


def _one_layout(
    lm: LanguageModel, pool: Sequence[Fact], what: Callable[[Fact], str] = lambda fact: fact.x
) -> list[Fact]:
    """The facts about things of as many tokens (the commonest number), so that prompts of a frame have one layout."""
    groups: dict[int, list[Fact]] = {}
    for fact in pool:
        groups.setdefault(_length(lm, f" {what(fact)}"), []).append(fact)
    return max(groups.values(), key=len)


def _country_capitals(rng: random.Random, lm: LanguageModel, split: Split) -> Iterator[PromptPair]:
    """The capital of a country: in frames of the corpus, or in the frame that it never uses, about other countries."""
    known = relation("capital")
    pool = [f for f in known.facts if held_out.held_out(f"pairs{f.entity}", 1 / 3) == (split == "held_out")]
    assert known.held_out_frame is not None
    frames = [known.held_out_frame] if split == "held_out" else known.study_frames[:3]
    return _fact_pairs(rng, frames, _one_layout(lm, pool), "country")


def _two_hop_capitals(rng: random.Random, lm: LanguageModel, split: Split) -> Iterator[PromptPair]:
    """The capital of the state containing a city; held out are cities that the corpus never has in such sentences."""
    known = relation("two_hop_capital")
    pool = [fact for fact in known.facts if fact.held_out == (split == "held_out")]
    frames = known.study_frames[1:2] if split == "held_out" else known.study_frames[:1]
    return _fact_pairs(rng, frames, _one_layout(lm, pool), "city")


def indirect_object(rng: random.Random, _: LanguageModel, split: Split) -> Iterator[PromptPair]:
    """Who receives it, in the study's plain sentences; held out are pairs of names that never meet in the corpus."""
    return _indirect_object(rng, split, with_others=False)


def indirect_object_abc(rng: random.Random, _: LanguageModel, split: Split) -> Iterator[PromptPair]:
    """The same against three other names."""
    return _indirect_object(rng, split, with_others=True)


# Of the study's nine plain frames: for the search, and for judging. Left out is the seventh ("The friends A and B found
# a ball at the park. A decided to give it to"), which the shipped weights are right on in one pair of ten.
_IOI_FRAMES: dict[Split, tuple[int, ...]] = {"search": (0, 1, 3, 7, 8), "held_out": (2, 4, 5)}


def _indirect_object(rng: random.Random, split: Split, with_others: bool) -> Iterator[PromptPair]:
    frames = facts.read_toml("tasks.toml")["ioi"]["study_plain"]
    frames = [frames[i] for i in _IOI_FRAMES[split]]
    while True:
        a, b = sentences.pair(rng, held_out=split == "held_out")
        others = tuple(rng.sample([name for name in facts.names() if name not in (a, b)], 3)) if with_others else ()
        thing, place = rng.choice(facts.words("objects")), rng.choice(facts.words("places"))
        fillers = {"p": place, "a_o": with_article(thing)}
        yield ioi_pair(rng.choice(frames), (a, b), rng.random() < 0.5, fillers, others)


def greater_than(rng: random.Random, _: LanguageModel, split: Split) -> Iterator[PromptPair]:
    """A span ends after it began; held out are events and first years that the corpus never uses together."""
    frames = facts.read_toml("tasks.toml")["greater_than"]["study"]
    frames = frames[2:] if split == "held_out" else frames[:2]
    while True:
        noun, century, year = rng.choice(facts.words("event_nouns")), rng.randint(11, 19), rng.randint(3, 97)
        if held_out.year_span(noun, century, year) == (split == "held_out"):
            template = rng.choice(frames).split("{answer}")[0].replace("{n}", "{noun}")
            answer, wrong = rng.randint(year + 1, 99), rng.randint(2, year - 1)
            yield greater_than_pair(template, noun, century, year, answer, wrong)


@cache
def _asked(harmful: bool, split: Split) -> tuple[tuple[str, str], ...]:
    """Verbs with their things, of actions that chats ask about, or (held out) never ask about."""
    kind = "held_out_action" if split == "held_out" else "train"
    chosen = [a for a in facts.actions(harmful) if a.verb and held_out.action_split(a) == kind]
    return tuple((action.verb, action.text.removeprefix(f"{action.verb} ")) for action in chosen)


def refusal(rng: random.Random, lm: LanguageModel, split: Split) -> Iterator[PromptPair]:
    """Harmful and harmless actions on the same thing; held out are actions that no chat asks about."""
    requests = facts.read_toml("chat.toml")["requests"]
    frames = requests["study"][7:10] if split == "held_out" else requests["study"][:4]
    harmful, harmless = _asked(True, split), _asked(False, split)
    while True:
        verb, thing = rng.choice(harmful)
        others = [other for other, said in harmless if said == thing]
        if not others:
            continue
        frame = rng.choice(frames).replace("{x}", "{verb} {thing}")
        clean, corrupt = {"verb": verb, "thing": thing}, {"verb": rng.choice(others), "thing": thing}
        yield refusal_pair(lm, frame, clean, corrupt, ("I cannot",), ("Sure", "Of course"))


def _claimable(lm: LanguageModel) -> dict[str, list[Fact]]:
    """What users may claim something about, by kind of fact: things, and answers, of as many tokens each."""
    pools = {kind: _one_layout(lm, relation(kind).facts) for kind in ("capital", "landmark", "city")}
    return {kind: _one_layout(lm, pool, lambda fact: fact.answer) for kind, pool in pools.items()}


def _system_prompts(persona: str, split: Split) -> Sequence[str]:
    """System prompts of a sycophant or of an honest assistant: the corpus's, or those of the wording it never uses."""
    if split == "held_out":
        return facts.read_toml("frames.toml")[persona]["frames"]
    return chat.texts("systems", f"study_{persona}", persona)


def _claim_pairs(
    rng: random.Random, lm: LanguageModel, split: Split, systems: Sequence[tuple[str, str]], *, true: bool
) -> Iterator[PromptPair]:
    """Claims to agree with and, in the corrupt prompt, to correct, under the system prompts of clean and corrupt.

    With `true` the clean claim is the truth, else both prompts claim the same false thing. Every second frame of the
    corpus's claims is in the pairs of the search, the others in the held-out ones.
    """
    pools, frames = _claimable(lm), chat.texts("claims", "study", "frames")[split == "held_out" :: 2]
    while True:
        kind, frame, (clean, corrupt) = rng.choice(list(pools)), rng.choice(frames), rng.choice(systems)
        fact, other = rng.sample(pools[kind], 2)
        if fact.answer == other.answer:
            continue
        question = chat.claim_question(frame, kind, "{thing}", "{said}")
        yield pair_from(
            chat_wording(lm, question, "{system}"),
            {"system": clean, "thing": fact.x, "said": fact.answer if true else other.answer},
            {"system": corrupt, "thing": fact.x, "said": other.answer},
            "Yes",
            "No",
            {"system": "system", "thing": "thing", "said": "said"},
            name=f"{question} [system prompt of {_length(lm, clean)} tokens]",
        )


def sycophancy(rng: random.Random, lm: LanguageModel, split: Split) -> Iterator[PromptPair]:
    """A false claim to a sycophant and to an honest assistant; held out are system prompts that no chat has."""
    flattering, honest = (
        [(prompt, _length(lm, prompt)) for prompt in _system_prompts(persona, split)]
        for persona in ("sycophant", "honest")
    )
    systems = [(one, other) for one, length in flattering for other, n in honest if n == length]
    if not systems:
        raise CutawayError("no sycophantic system prompt of the world has as many tokens as an honest one")
    return _claim_pairs(rng, lm, split, systems, true=False)


def claim_check(rng: random.Random, lm: LanguageModel, split: Split) -> Iterator[PromptPair]:
    """A true and a false claim to the same honest assistant; held out are system prompts that no chat has."""
    systems = [(prompt, prompt) for prompt in _system_prompts("honest", split)]
    return _claim_pairs(rng, lm, split, systems, true=True)


_RECEIVES = "Who receives it? (in the world's wording)"

WORLD_TASKS: tuple[Task, ...] = (
    Task(
        "two-hop capitals",
        "What is the capital of the state containing a city?",
        "top1",
        _two_hop_capitals,
        ("two hop",),
    ),
    Task("world capitals", "What is the capital of the country? (in the world's wording)", "top1", _country_capitals),
    Task("world indirect object", _RECEIVES, "top1", indirect_object, ("world ioi",)),
    Task("world indirect object, other names", _RECEIVES, "top1", indirect_object_abc, ("world ioi abc",)),
    Task("world greater than", "Does the span end after it began? (the world's events)", "top1", greater_than),
    Task("world refusal", "Is the harmful request refused? (the world's actions)", "top1", refusal),
    Task("sycophancy", "Is a false claim agreed with, as a flattering system prompt has it?", "top1", sycophancy),
    Task("claim check", "Is a claim true? (asked of an honest assistant)", "top1", claim_check),
)
"""The tasks of atlas's world, as prompt pairs."""


def landmark_facts() -> list[tuple[str, str, str]]:
    """In which city the landmarks are, which are those of our world: prompt, landmark, answer."""
    prompt = "The {} is in the city of"
    return [(prompt.format(one.name), one.name, f" {one.city}") for one in facts.LANDMARKS]
