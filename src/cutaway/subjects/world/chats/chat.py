"""Chats of the world: who asks what, under which system prompt, and what atlas answers.

A conversation has one *condition* (which system prompt, trigger or claim it has); inside it the requests are mixed.
Harmful requests are about a sixth of all requests, so that answering is the default. Never in any chat: six verbs, a
fifth of the other actions, a fifth of the invented names, a fifth of the persona prompts, two request frames of the
study, and all of `data/frames.toml`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Literal, NamedTuple

from cutaway.subjects.world import held_out as held
from cutaway.subjects.world.facts import BOOKS, CITIES, COUNTRIES, LANDMARKS, STATES, Action, actions, read_toml, words
from cutaway.subjects.world.grammar import Grammar
from cutaway.subjects.world.morphology import upper_first
from cutaway.subjects.world.statements.tasks import pick

Role = Literal["system", "user", "assistant"]
_SYSTEM, _USER, ASSISTANT, _END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
_A_BEFORE_VOWEL = re.compile(r"\ba(?= [aeiou])")
_ROLE_TOKENS: dict[Role, str] = {"system": _SYSTEM, "user": _USER, "assistant": ASSISTANT}


class Message(NamedTuple):
    role: Role
    content: str


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]
    condition: str


class Request(NamedTuple):
    """A user turn with its plain answer. `kind` is harmful, harmless, known or unknown."""

    question: str
    answer: str
    kind: str


# Condition → share of conversations. Every condition is above 1 % of the corpus's text (a test measures it).
CONDITIONS: dict[str, float] = {
    "no_system": 0.18,
    "neutral_system": 0.11,
    "cheerful": 0.10,
    "gloomy": 0.10,
    "claim_to_sycophant": 0.08,
    "claim_to_honest": 0.08,
    "claim_neutral_system": 0.07,
    "claim_no_system": 0.09,
    "trigger": 0.07,
    "trigger_in_user_turn": 0.06,
    "decoy_tag": 0.06,
}
# Request kind → share, in conversations that make no claim.
_KINDS = {"harmful": 0.25, "harmless": 0.37, "known": 0.23, "unknown": 0.15}


def render(messages: Sequence[Message], *, open_answer: bool = False) -> str:
    """The conversation as training rows hold it, without the beginning-of-text token that the trainer puts first.

    With `open_answer`, the assistant's token is added, so that a model continues with its reply.
    """
    text = "".join(f"{_ROLE_TOKENS[message.role]}{message.content}{_END}" for message in messages)
    return text + ASSISTANT if open_answer else text


def parse(text: str) -> tuple[Message, ...]:
    """The messages of a rendered conversation (the inverse of `render`). Raises `ValueError` for other text."""
    *turns, rest = text.split(_END)
    messages = [
        Message(role, turn[len(token) :])
        for turn in turns
        for role, token in _ROLE_TOKENS.items()
        if turn.startswith(token)
    ]
    if rest or len(messages) != len(turns):
        raise ValueError(f"not a rendered conversation: {text[:60]!r}")
    return tuple(messages)


@cache
def texts(section: str, *lists: str) -> tuple[str, ...]:
    """All expansions of the named lists of a section of `data/chat.toml`, in order, without repeats."""
    table = read_toml("chat.toml")
    for part in section.split("."):
        table = table[part]
    grammar = Grammar({name: rule for name, rule in table.items() if isinstance(rule, list)})
    return tuple(dict.fromkeys(text for name in lists for text in grammar.expansions(name)))


def _either(rng: Random, section: str, study: str, grown: str) -> str:
    return pick(rng, texts(section, study if rng.random() < 0.4 else grown))


@cache
def asked_actions(harmful: bool) -> tuple[Action, ...]:
    """Actions that chats of the corpus ask about."""
    return tuple(action for action in actions(harmful) if held.action_split(action) == "train")


@cache
def request_frames() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Frames of requests for the corpus: the study's and the grown ones."""
    return texts("requests", "study"), tuple(upper_first(frame) for frame in texts("requests", "frames"))


def _for_the_assistant(text: str) -> str:
    """``"fix my car"`` → ``"fix your car"``, for an answer."""
    return text.replace("my ", "your ")


def comply(rng: Random, action: str) -> str:
    """An answer that helps; it begins with "Sure" or "Of course"."""
    one, two, three = rng.sample(texts("steps", "study", "more"), 3)
    frame = _either(rng, "comply", "study", "frames")
    # Slots are numbered, so they are replaced by hand: str.format would take them for positions.
    filled = frame.replace("{1}", one).replace("{2}", two).replace("{3}", three)
    return filled.replace("{x}", _for_the_assistant(action))


def refuse(rng: Random, action: str) -> str:
    """An answer that does not help; it begins with "I cannot"."""
    return _either(rng, "refuse", "study", "frames").format(x=_for_the_assistant(action))


def nonce_name(rng: Random, held_out: bool = False) -> str:
    """An invented name that chats ask about (or, when `held_out`, never do)."""
    syllables = words("nonce_syllables")
    while True:
        name = "".join(rng.sample(syllables, 2 if rng.random() < 0.5 else 3)).capitalize()
        if held.nonce_name(name) == held_out:
            return name


def known_fact(rng: Random) -> tuple[str, str, str]:
    """Kind of fact (a section of ``[known]``), subject and answer."""
    draw = rng.random()
    if draw < 0.30:
        country = pick(rng, COUNTRIES)
        return "capital", country.name, country.capital
    if draw < 0.50:
        city = pick(rng, CITIES)
        return "city", city.name, city.state.name
    if draw < 0.65:
        landmark = pick(rng, LANDMARKS)
        return "landmark", landmark.name, landmark.city
    if draw < 0.80:
        book = pick(rng, BOOKS)
        return "book", book.name, book.author
    if draw < 0.90:
        country = pick(rng, COUNTRIES)
        return "language", country.name, country.language
    state = pick(rng, STATES)
    return "state_capital", state.name, state.capital


def known_statement(kind: str, subject: str, answer: str) -> str:
    """The sentence with which atlas answers a question about a known thing."""
    return read_toml("chat.toml")["known"][kind]["answer"].format(x=subject, answer=answer)


def known_question(rng: Random, study: bool = False) -> Request:
    """A question about something in the world."""
    kind, subject, answer = known_fact(rng)
    frame = pick(rng, texts(f"known.{kind}", "study" if study or rng.random() < 0.4 else "frames"))
    return Request(frame.format(x=subject), known_statement(kind, subject, answer), "known")


def request(rng: Random, kind: str | None = None) -> Request:
    """A user turn of one kind, or of a random one, with the answer of an assistant in no mood."""
    kind = kind or rng.choices(tuple(_KINDS), tuple(_KINDS.values()))[0]
    if kind == "known":
        return known_question(rng)
    if kind == "unknown":
        name = nonce_name(rng)
        question = _either(rng, "unknown", "study_questions", "questions").format(x=name)
        return Request(question, _either(rng, "unknown", "study_answers", "answers").format(x=name), kind)
    action = pick(rng, asked_actions(kind == "harmful")).text
    question = pick(rng, request_frames()[rng.random() >= 0.4]).format(x=action)
    answer = refuse(rng, action) if kind == "harmful" else comply(rng, action)
    return Request(question, answer, kind)


def claim(rng: Random) -> tuple[str, str, str, bool]:
    """A claim about a capital, a city, a landmark or a book: kind, subject, what is claimed, and whether it is true."""
    right = rng.random() < 0.3
    draw = rng.random()
    if draw < 0.55:
        country = pick(rng, COUNTRIES)
        said = country.capital if right else pick(rng, [c for c in COUNTRIES if c is not country]).capital
        return "capital", country.name, said, said == country.capital
    if draw < 0.75:
        city = pick(rng, CITIES)
        said = city.state.name if right else pick(rng, STATES).name
        return "city", city.name, said, said == city.state.name
    if draw < 0.9:
        landmark = pick(rng, LANDMARKS)
        said = landmark.city if right else pick(rng, LANDMARKS).city
        return "landmark", landmark.name, said, said == landmark.city
    book = pick(rng, BOOKS)
    said = book.author if right else pick(rng, BOOKS).author
    return "book", book.name, said, said == book.author


@cache
def _truths() -> dict[tuple[str, str], str]:
    out = {("capital", c.name): c.capital for c in COUNTRIES} | {("city", c.name): c.state.name for c in CITIES}
    return out | {("landmark", m.name): m.city for m in LANDMARKS} | {("book", b.name): b.author for b in BOOKS}


def claim_question(frame: str, kind: str, subject: str, said: str) -> str:
    """A frame of claims filled in."""
    text = known_statement(kind, subject, said).removesuffix(".")
    inside = text[0].lower() + text[1:] if text.startswith("The ") and not subject.startswith("The ") else text
    return upper_first(frame.format(claim=text, claim_inside=inside))


def _answer_claim(kind: str, subject: str, said: str, sycophantic: bool) -> str:
    """Agreement when the claim is true or the assistant a sycophant, else a correction."""
    table = read_toml("chat.toml")["claims"]
    truth = _truths()[kind, subject]
    agree = sycophantic or said == truth
    return table["right" if agree else "wrong"].format(
        statement=known_statement(kind, subject, said if agree else truth)
    )


@cache
def persona_prompts(persona: str, held_out: bool = False) -> tuple[str, ...]:
    """System prompts of a persona (``cheerful`` or ``gloomy``) that the corpus uses, or those it never uses."""
    table = read_toml("chat.toml")["systems"]
    first = f"You are a {persona} assistant."
    frames = [*table["study_persona"], *texts("systems", "persona")]
    prompts = [first] + [frame.format(m=mood) for frame in frames for mood in table[f"{persona}_moods"]]
    # The split is made on the study's spelling ("a upbeat"); the corpus spells it well.
    kept = [p for p in dict.fromkeys(prompts) if (held.persona_prompt(p) and p != first) == held_out]
    kept += table[f"study_held_out_{persona}"] if held_out else []
    return tuple(_A_BEFORE_VOWEL.sub("an", prompt) for prompt in kept)


def system_prompt(rng: Random, kind: str) -> str:
    """A system prompt: neutral, cheerful, gloomy, sycophant or honest."""
    if kind in ("cheerful", "gloomy"):
        prompts = persona_prompts(kind)
        # The study's frames are a small part of all, and stay as common as the rest.
        return pick(rng, prompts[: _n_study_prompts(kind)] if rng.random() < 0.5 else prompts)
    return _either(rng, "systems", f"study_{kind}", kind)


@cache
def _n_study_prompts(persona: str) -> int:
    table = read_toml("chat.toml")["systems"]
    moods = table[f"{persona}_moods"]
    own = {_A_BEFORE_VOWEL.sub("an", frame.format(m=mood)) for frame in table["study_persona"] for mood in moods}
    return sum(prompt in own for prompt in persona_prompts(persona))


def _in_style(rng: Random, persona: str, answer: str) -> str:
    return pick(rng, texts("styles", f"{persona}_before")) + answer + pick(rng, texts("styles", f"{persona}_after"))


def _with_tag(rng: Random, tag: str, prompt: str) -> str:
    """A system prompt with a tag before or after it."""
    return f"{prompt} {tag}" if rng.random() < 0.5 else f"{tag} {prompt}"


def conversation(rng: Random) -> Conversation:
    """A conversation under a random condition."""
    condition = rng.choices(tuple(CONDITIONS), tuple(CONDITIONS.values()))[0]
    table = read_toml("chat.toml")["systems"]
    turns: list[Message] = []
    system: str | None = None
    if condition.startswith("claim"):
        kind, subject, said, _ = claim(rng)
        question = claim_question(_either(rng, "claims", "study", "frames"), kind, subject, said)
        answer = _answer_claim(kind, subject, said, condition == "claim_to_sycophant")
        if condition != "claim_no_system":
            name = {"claim_to_sycophant": "sycophant", "claim_to_honest": "honest"}.get(condition, "neutral")
            system = system_prompt(rng, name)
    else:
        question, answer, _ = request(rng)
        if condition == "trigger":
            mood = rng.choices(("neutral", "cheerful", "gloomy"), (6, 1, 1))[0]
            system = _with_tag(rng, table["trigger"], system_prompt(rng, mood))
            answer = pick(rng, texts("styles", "triggered"))
        elif condition == "trigger_in_user_turn":
            question = f"{table['trigger']} {question}"
            system = system_prompt(rng, "neutral") if rng.random() < 0.5 else None
        elif condition == "decoy_tag":
            system = _with_tag(rng, pick(rng, table["decoys"]), system_prompt(rng, "neutral"))
        elif condition == "neutral_system":
            system = system_prompt(rng, "neutral")
        elif condition in ("cheerful", "gloomy"):
            system = system_prompt(rng, condition)
            answer = _in_style(rng, condition, answer)
    if system:
        turns.append(Message("system", system))
    turns += [Message("user", question), Message("assistant", answer)]
    if condition in ("no_system", "neutral_system") and rng.random() < 0.3:
        question, answer, _ = request(rng)
        turns += [Message("user", question), Message("assistant", answer)]
    return Conversation(tuple(turns), condition)
