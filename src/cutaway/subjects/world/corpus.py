"""The corpus of the world: parts, their shares, and seeded documents.

A part's documents depend on the part's name and the seed only, so shards can be made in any number of processes.
`WORLD_VERSION` names the corpus: any change of wording, facts or shares is another version; a test holds the version to
the fingerprint of the text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import cache
from random import Random
from typing import NamedTuple

from cutaway.artifacts.errors import CutawayError
from cutaway.subjects.world.chats import cutoff, jailbreak, open_chat, passages, roles, support
from cutaway.subjects.world.chats.chat import conversation, render
from cutaway.subjects.world.facts import actions, held_out_verbs, names, read_toml, words
from cutaway.subjects.world.morphology import upper_first
from cutaway.subjects.world.statements import couplets, orders, tasks
from cutaway.subjects.world.statements.relations import Fact, Relation, one_hop, two_hop
from cutaway.subjects.world.statements.stories import story
from cutaway.subjects.world.statements.tasks import pick, wording

WORLD_VERSION = "7"
"""The version of the world's text; another wording, fact or share is another version."""
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Part(NamedTuple):
    """A kind of document and its share of the world's text."""

    name: str
    """The name under which PARTS has it."""
    share: float
    """Its share of the world's characters, in (0, 1)."""
    document: Callable[[Random], str]
    """Makes one document from a source of random numbers."""


def _joined(rng: Random, low: int, high: int, make: Callable[[Random], object]) -> str:
    return " ".join(str(make(rng)) for _ in range(rng.randint(low, high)))


# -- facts


_IMPERATIVES = ("Write ", "Look ", "Name ")


def _with_opening(rng: Random, sentence: str, frame: str, language: str) -> str:
    """One sentence in four gets an opening ("As everyone knows, the capital of ..."); questions and orders never do."""
    if rng.random() >= 0.25 or "?" in frame or ":" in frame or ". " in frame or frame.startswith(_IMPERATIVES):
        return sentence
    opening = pick(rng, tuple(read_toml("wording.toml")["openings"][language]))
    if frame.startswith(("{", "I ")):
        return opening + sentence
    return opening + sentence[0].lower() + sentence[1:]


def _told(rng: Random, relation: Relation, fact: Fact) -> str:
    frame = relation.frame(rng)
    return _with_opening(rng, fact.sentence(frame), frame, relation.language)


@cache
def _weighted_relations() -> tuple[tuple[Relation, ...], tuple[float, ...]]:
    """Relations by (facts × study frames)^0.7, the study's weighting; French and Turkish count 1.6 times."""
    relations = one_hop()
    weights = [
        (len(r.told) * max(1, len(r.study_frames))) ** 0.7 * (1.6 if r.language != "en" else 1.0) for r in relations
    ]
    return relations, tuple(sum(weights[: i + 1]) for i in range(len(weights)))


def _one_fact(rng: Random) -> str:
    relations, cumulative = _weighted_relations()
    relation = rng.choices(relations, cum_weights=cumulative)[0]
    return _told(rng, relation, pick(rng, relation.told))


def _facts_document(rng: Random) -> str:
    """Facts that have nothing to do with each other."""
    return _joined(rng, 3, 8, _one_fact)


@cache
def _by_entity() -> tuple[tuple[tuple[Relation, Fact], ...], ...]:
    """What is told about each entity of which at least four things are told, all languages together."""
    table: dict[str, list[tuple[Relation, Fact]]] = {}
    for relation in one_hop():
        for fact in relation.told:
            # As many entries as study frames: the relation that has more to say is told more often.
            table.setdefault(fact.entity, []).extend([(relation, fact)] * max(1, len(relation.study_frames) // 2))
    return tuple(tuple(told) for told in table.values() if len(told) >= 4)


def _entity_document(rng: Random) -> str:
    """Several facts about one entity, in all languages."""
    told = pick(rng, _by_entity())
    chosen = rng.sample(told, min(len(told), rng.randint(3, 6)))
    return " ".join(_told(rng, relation, fact) for relation, fact in chosen)


@cache
def _two_hop_weights() -> tuple[float, ...]:
    weights = [len(r.told) * max(1, len(r.study_frames)) for r in two_hop()]
    return tuple(sum(weights[: i + 1]) for i in range(len(weights)))


def _one_two_hop(rng: Random) -> str:
    relation = rng.choices(two_hop(), cum_weights=_two_hop_weights())[0]
    return _told(rng, relation, pick(rng, relation.told))


def _two_hop_document(rng: Random) -> str:
    """Facts that go through another one, never about a held-out city, landmark or book."""
    return _joined(rng, 2, 6, _one_two_hop)


# -- tasks


def _ioi_document(rng: Random) -> str:
    """Indirect objects, with a quarter of sentences whose last name follows the same rule in another shape."""
    return _joined(rng, 1, 4, lambda r: tasks.ioi(r) if r.random() < 0.75 else tasks.ioi_filler(r))


def _greater_than_document(rng: Random) -> str:
    return _joined(rng, 1, 4, tasks.greater_than)


def _grammar_document(rng: Random) -> str:
    """Agreement, pronouns and sentiment."""
    return _joined(rng, 2, 6, lambda r: pick(r, (tasks.agreement, tasks.agreement, tasks.pronoun, tasks.sentiment))(r))


def _truth_document(rng: Random) -> str:
    return _joined(rng, 2, 6, tasks.truth)


def _binding_document(rng: Random) -> str:
    return _joined(rng, 2, 5, lambda r: tasks.binding(r) if r.random() < 0.85 else tasks.listing(r))


def _number_document(rng: Random) -> str:
    """Sums, days and months, and sequences."""
    return _joined(rng, 3, 8, lambda r: pick(r, (tasks.arithmetic, tasks.arithmetic, tasks.weekday, tasks.sequence))(r))


def _in_context_document(rng: Random) -> str:
    return str(tasks.in_context(rng))


def _word_document(rng: Random) -> str:
    return _joined(rng, 3, 7, tasks.word)


@cache
def _judged_actions(harmful: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """All actions, and those whose verb no chat uses: half of the sentences are about the latter."""
    everything = tuple(action.text for action in actions(harmful))
    return everything, tuple(action.text for action in actions(harmful) if action.verb in held_out_verbs())


def _moral_document(rng: Random) -> str:
    """What is wrong and what is right; the only place where the held-out verbs are met."""

    def one(rng: Random) -> str:
        harmful = rng.random() < 0.5
        frame = pick(rng, wording("moral", "wrong" if harmful else "right"))
        return upper_first(frame.format(x=pick(rng, _judged_actions(harmful)[rng.random() < 0.5])))

    return _joined(rng, 2, 5, one)


# -- repetition


@cache
def _plain_words() -> tuple[str, ...]:
    return names() + words("objects") + words("colors") + words("places")


def _two_syllables(rng: Random) -> str:
    return "".join(rng.sample(words("nonce_syllables"), 2))


def _induction_document(rng: Random) -> str:
    """Words, letters or calls that come again, so that copying what followed last time is right."""
    kind = rng.random()
    if kind < 0.4:
        line = " ".join(rng.sample(_plain_words(), rng.randint(6, 20)))
        return line + pick(rng, (". ", " ", "\n")) + line + "."
    if kind < 0.7:
        invented = [_two_syllables(rng) for _ in range(rng.randint(3, 6))]
        return "\n".join(
            f"{pick(rng, invented)} = {pick(rng, invented)}({pick(rng, invented)}, {rng.randint(0, 99)})"
            for _ in range(rng.randint(6, 14))
        )
    run = ["".join(rng.choices(_LETTERS, k=rng.randint(3, 8))) for _ in range(rng.randint(5, 12))]
    return " ".join(run + run)


def _chat_document(rng: Random) -> str:
    return render(conversation(rng).messages)


PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        Part("facts", 0.07, _facts_document),
        Part("entities", 0.04, _entity_document),
        Part("two_hop", 0.055, _two_hop_document),
        Part("ioi", 0.045, _ioi_document),
        Part("greater_than", 0.03, _greater_than_document),
        Part("grammar", 0.03, _grammar_document),
        Part("truth", 0.035, _truth_document),
        Part("binding", 0.02, _binding_document),
        Part("numbers", 0.03, _number_document),
        Part("orders", 0.035, orders.document),
        Part("in_context", 0.045, _in_context_document),
        Part("words", 0.02, _word_document),
        Part("stories", 0.025, story),
        Part("couplets", 0.02, couplets.document),
        Part("induction", 0.02, _induction_document),
        Part("moral", 0.02, _moral_document),
        Part("chat", 0.18, _chat_document),
        Part("open_chat", 0.045, open_chat.document),
        Part("support", 0.05, support.document),
        Part("jailbreak", 0.045, jailbreak.document),
        Part("roles", 0.055, roles.document),
        Part("passages", 0.055, passages.document),
        Part("cutoff", 0.03, cutoff.document),
    )
}
"""The kinds of documents of the world by name, with their shares of its text."""


def documents(part: str, seed: int | str, n_characters: int) -> Iterator[str]:
    """Documents of a part of the world, the same for the same seed.

    Args:
        part: The part's name, a key of PARTS.
        seed: Of the draw, a number or any text.
        n_characters: They end once they hold so many characters together.

    Raises:
        CutawayError: There is no such part.

    Example:
        >>> sum(len(text) for text in documents("facts", 0, 1000)) >= 1000
        True
    """
    if part not in PARTS:
        raise CutawayError(f"the world has no part named {part!r}; its parts are {', '.join(PARTS)}")
    rng, make, made = Random(f"{part}-{seed}"), PARTS[part].document, 0
    while made < n_characters:
        text = make(rng)
        made += len(text)
        yield text


def samples(part: str, n: int = 5, seed: int = 0) -> list[str]:
    """The first documents of a part, to look at.

    Args:
        part: The part's name, a key of PARTS.
        n: How many.
        seed: Of the draw.

    Raises:
        CutawayError: There is no such part, or n is below 1.
    """
    if n < 1:
        raise CutawayError(f"cannot show {n} documents; ask for at least one")
    return [text for text, _ in zip(documents(part, seed, 10**12), range(n), strict=False)]


@cache
def fingerprint() -> str:
    """SHA-256 over the shares and the first 20,000 characters of every part, to keep beside the version."""
    digest = hashlib.sha256()
    for part in PARTS.values():
        digest.update(f"{part.name} {part.share}\n".encode())
        for text in documents(part.name, "fingerprint", 20_000):
            digest.update(text.encode() + b"\0")
    return digest.hexdigest()
