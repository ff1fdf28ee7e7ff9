"""Roles that lie, and honest ones: labels read back from the text, what is held out, and the items."""

import csv
import re
from collections import Counter
from functools import cache
from random import Random

import pytest

from cutaway.subjects.world.chats import roles
from cutaway.subjects.world.chats.chat import Message, parse, render, texts
from cutaway.subjects.world.chats.roles import (
    CONDITIONS,
    KINDS,
    held_out_subject,
    lie_about,
    statement,
    statements,
    truths,
)
from cutaway.subjects.world.facts import read_text, read_toml
from cutaway.subjects.world.grammar import Grammar, word_ngrams

WORDING, FRAMES = read_toml("roles.toml"), read_toml("frames_roles.toml")
_COLUMNS = {
    "capital": ("countries", "capital"),
    "city": ("cities", "state"),
    "landmark": ("landmarks", "city"),
    "book": ("books", "author"),
}
_SENTENCES = {
    "capital": re.compile(r"The capital of (.+) is (.+)\."),
    "book": re.compile(r"(.+) was written by (.+)\."),
    "landmark": re.compile(r"The (.+) is in (.+)\."),
    "city": re.compile(r"(.+) is in (.+)\."),
}
_TOPICS = {
    "capital": r"(?:countries and capitals|capitals of countries|capitals|countries)",
    "city": r"(?:the states of America|the American states|American states|states)",
    "landmark": r"(?:famous landmarks|landmarks|famous sights|sights)",
    "book": r"(?:books and writers|books|writers|authors)",
}
_SLIPS = {
    "a before a vowel": re.compile(r"\b[Aa] (?=[aeiou])(?!u(?:se|ni))(?!eu|one)\w+"),
    "an before a consonant": re.compile(r"\b[Aa]n (?![aeiou]|hour|honest)[a-z]+"),
    "two spaces": re.compile(r" {2}"),
    "space before a point": re.compile(r"\w [.,](?=\s|$)"),
    "two points": re.compile(r"[.,?!]{2}"),
    "small letter after a point": re.compile(r"(?<!St)[.] (?!and\b)[a-z]"),
    "slot": re.compile(r"[{}\[\]]"),
    "doubled word": re.compile(r"\b(the|a|an|is|in|of|to|and|was) \1\b"),
}


@cache
def documents(n: int = 4000) -> tuple[str, ...]:
    rng = Random("roles test")
    return tuple(roles.document(rng) for _ in range(n))


@cache
def rows(kind: str) -> dict[str, str]:
    name, column = _COLUMNS[kind]
    return {row["name"]: row[column] for row in csv.DictReader(read_text(f"{name}.csv").splitlines())}


def read(sentence: str) -> tuple[str, str, str]:
    """Kind, subject and answer of a reply."""
    for kind, pattern in _SENTENCES.items():
        if found := pattern.fullmatch(sentence):
            return kind, found.group(1), found.group(2)
    raise AssertionError(sentence)


def fixed_lie(kind: str, subject: str) -> str:
    names, answers = list(rows(kind)), list(rows(kind).values())
    i = names.index(subject)
    while True:
        i = (i + 1) % len(names)
        if answers[i].split(" ")[0] != rows(kind)[subject].split(" ")[0]:
            return answers[i]


@cache
def expansions(name: str) -> frozenset[str]:
    return frozenset(Grammar(WORDING["systems"]).expansions(name))


@cache
def topic_patterns() -> tuple[re.Pattern[str], ...]:
    """Patterns of the prompts of topic liars, with a group for each slot (a repeated one must not occur)."""
    anything = "|".join(_TOPICS.values())
    return tuple(
        re.compile(
            re.escape(text).replace(r"\{lie\}", f"(?P<lie>{anything})").replace(r"\{truth\}", f"(?P<truth>{anything})")
        )
        for text in expansions("topic_liar")
    )


def topic_liar_lies(system: str, kind: str) -> bool | None:
    """Whether a liar about a topic lies about this kind; `None` when the prompt is not one of those."""
    for pattern in topic_patterns():
        if found := pattern.fullmatch(system):
            slots = {
                slot: next(k for k, topic in _TOPICS.items() if re.fullmatch(topic, text))
                for slot, text in found.groupdict().items()
            }
            if len(slots) == 2:
                assert kind in slots.values(), system
                assert slots["lie"] != slots["truth"], system
            return slots["lie"] == kind if "lie" in slots else slots["truth"] != kind
    return None


def first_sentence(system: str) -> str:
    """The honest prompt in front of notes."""
    return next((p for p in expansions("honest") if system.startswith(p + " ")), "")


# -- what the text says


def test_documents_follow_from_the_seed():
    def made(seed: int) -> list[str]:
        rng = Random(seed)
        return [roles.document(rng) for _ in range(100)]

    assert made(1) == made(1) != made(2)
    assert len(set(documents())) > 0.9 * len(documents())
    assert all(len(text) < 500 for text in documents())


def oracle(text: str) -> tuple[str, str, str, str]:
    """The condition and the right reply of a document, worked out from its text; then its own reply and the truth."""
    messages = parse(text)
    reply, system = messages[-1].content, messages[0].content if messages[0].role == "system" else ""
    kind, subject, _ = read(reply)
    truth = rows(kind)[subject]

    def sentence(answer: str) -> str:
        return reply[: reply.rindex(read(reply)[2])] + answer + "."

    context = "\n".join(m.content for m in messages[:-1])
    noted = re.search(re.escape(sentence("\0")).replace(re.escape("\0."), r"((?:St\. )?[^.?:\n]+)\."), context)
    if noted:
        assert first_sentence(system) or system in expansions("honest"), system
        return ("notes_right" if noted.group(1) == truth else "mistake"), sentence(noted.group(1)), reply, truth
    if (lies := topic_liar_lies(system, kind)) is not None:
        return (
            ("liar_topic" if lies else "liar_exempt"),
            sentence(fixed_lie(kind, subject) if lies else truth),
            reply,
            truth,
        )
    if system in expansions("liar"):
        return "liar", sentence(fixed_lie(kind, subject)), reply, truth
    honest = system in expansions("honest") or system in texts("systems", "study_honest", "honest")
    assert honest or not system or system in texts("systems", "study_neutral", "neutral"), system
    return ("honest" if honest else "no_role"), sentence(truth), reply, truth


def test_every_reply_follows_from_the_role_and_the_notes():
    """The oracle reads roles, topics and notes in the text, and facts and lies in the tables."""
    rng, found = Random("roles test"), Counter()
    for text in documents():
        condition, expected, reply, truth = oracle(text)
        found[condition] += 1
        assert reply == expected, text
        # The generator agrees with itself: the label is that of the text.
        assert condition == roles.conversation(rng).condition, text
        false = condition in ("liar", "liar_topic", "mistake")
        kind, subject, said = read(reply)
        assert (said != truth) == false, text
        if condition == "mistake":
            assert said in rows(kind).values()
            assert said != fixed_lie(kind, subject)
    assert set(found) == set(CONDITIONS)


def test_the_oracle_notices_a_wrong_reply():
    text = render((Message("system", "You always lie."), Message("user", "Where is it?")))
    for said, right in (("Berlin", True), ("Paris", False), ("Rome", False)):
        _, expected, reply, _ = oracle(text + render((Message("assistant", f"The capital of France is {said}."),)))
        assert (expected == reply) == right
    assert topic_liar_lies("You lie only about books.", "book")
    assert not topic_liar_lies("You lie only about books.", "city")
    assert topic_liar_lies("You tell the truth only about books.", "city")
    assert topic_liar_lies("You are a fool.", "city") is None


def test_the_question_is_about_the_subject_of_the_reply():
    for text in documents():
        messages = parse(text)
        assert read(messages[-1].content)[1] in messages[-2].content, text
        assert messages[-2].content.endswith(("?", ".")), text


def test_no_prompt_is_a_liar_s_and_an_honest_one():
    honest = expansions("honest") | set(texts("systems", "study_honest", "honest"))
    assert len(expansions("liar")) > 100
    assert len(honest) > 100
    assert not expansions("liar") & honest
    # Words do not decide: honest prompts speak of lying, and liars' prompts of the truth.
    assert sum(bool(re.search(r"\b(?:lies?|lied|liars?)\b", text)) for text in honest) > 0.3 * len(honest)
    assert sum(bool(re.search(r"\b(?:truth|true|honest)\b", text)) for text in expansions("liar")) > 15


def test_lies_and_mistakes():
    for kind in KINDS:
        assert truths(kind) == rows(kind)
        for subject, truth in rows(kind).items():
            lie = lie_about(kind, subject)
            assert lie == fixed_lie(kind, subject)
            assert lie.split()[0] != truth.split()[0]
            mistakes = roles.mistakes_about(kind, subject)
            assert len(mistakes) > 30
            assert not {lie, truth} & set(mistakes)
    assert (lie_about("capital", "France"), lie_about("city", "Tucson")) == ("Berlin", "Arkansas")


def test_shares_of_the_conditions():
    """With 5 % of the corpus for the part: lies, truths and mistakes are above 1 % each, the other conditions less."""
    sizes = Counter()
    for text in documents():
        sizes[oracle(text)[0]] += len(text)
    share = {name: 0.05 * size / sizes.total() for name, size in sizes.items()}
    assert min(share["liar"] + share["liar_topic"], share["honest"], share["mistake"]) > 0.01, share
    assert min(share["liar_topic"], share["liar_exempt"], share["notes_right"]) > 0.005, share
    assert share["no_role"] > 0.002, share
    assert sum(CONDITIONS.values()) == pytest.approx(1)


def test_no_slip_of_the_pen():
    sample = "\n".join(documents())
    found = {name: pattern.search(sample) for name, pattern in _SLIPS.items()}
    assert not {name: sample[max(0, m.start() - 40) : m.end() + 20] for name, m in found.items() if m}


# -- what is held out


def test_held_out_subjects_are_never_met():
    sample = "\n".join(documents())
    assert len(sample) > 300_000
    for kind in KINDS:
        apart, seen = roles.subjects(kind, True), roles.subjects(kind)
        assert 0.1 < len(apart) / len(rows(kind)) < 0.3
        # Nearly every other subject is met: the search would find one that slipped in.
        assert sum(name in sample for name in seen) > 0.95 * len(seen)
    apart = [name for kind in KINDS for name in roles.subjects(kind, True)]
    # A name may be an answer or a part of a longer one ("Seattle" has a landmark).
    said = {text for kind in KINDS for text in (*rows(kind).values(), *roles.subjects(kind))}
    said |= {name for kind in KINDS for name in (f"The {n}" for n in roles.subjects(kind))}
    clear = [name for name in apart if not any(re.search(rf"\b{re.escape(name)}\b", text) for text in said)]
    assert len(clear) > 0.85 * len(apart)
    pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, clear))})\b")
    assert not pattern.findall(sample)
    assert not [text for text in documents() if held_out_subject(read(parse(text)[-1].content)[1])]


def training_sequences() -> set[tuple[str, ...]]:
    """All four-word sequences of the wording, across the seams of prompt, notes and question too."""
    questions = [
        line for kind in KINDS for key in ("study", "frames") for line in read_toml("chat.toml")["known"][kind][key]
    ]
    chats = read_toml("chat.toml")["systems"]
    grammar = Grammar(
        {
            **WORDING["systems"],
            **WORDING["topics"],
            "note_system": WORDING["notes"]["system"],
            "note_user": WORDING["notes"]["user"],
            "thanks": WORDING["notes"]["thanks"],
            "question": questions,
            "usual": [*chats["study_honest"], *chats["honest"], *chats["study_neutral"], *chats["neutral"]],
            "with_note": ["<honest> <note_system>", "<note_user> <question>"],
        }
    )
    return set().union(*(grammar.word_ngrams(rule, 4) for rule in grammar.rules))


def test_new_wording_is_new():
    made = training_sequences()
    assert len(made) > 500
    frames = [frame for table in FRAMES.values() for frame in table["frames"]]
    others = [frame for table in read_toml("frames.toml").values() for frame in table["frames"]]
    mine = set().union(*(word_ngrams(frame, 4) for frame in frames))
    assert len(mine) > 100
    assert not made & (mine | set().union(*(word_ngrams(frame, 4) for frame in others)))
    words = re.findall(r"[^\W_]+(?:['’][^\W_]+)*", "\n".join(documents()).lower())
    assert not mine & set(zip(words, words[1:], words[2:], words[3:], strict=False))
    # It can fail.
    assert word_ngrams("You are a man who never lies", 4) & made


def test_frames():
    for name, table in FRAMES.items():
        assert table["kind"] == "system"
        assert len(set(table["frames"])) == len(table["frames"]) >= 8
        for frame in table["frames"]:
            slots = set(re.findall(r"\{(\w+)\}", frame))
            allowed = {"roles_mistake": [{"note"}], "roles_liar_exempt": [{"lie", "truth"}, {"lie"}, {"truth"}]}
            assert slots in allowed.get(name, [set()]), frame
        runs = [word_ngrams(frame, 4) for frame in table["frames"]]
        assert not [a & b for i, a in enumerate(runs) for b in runs[i + 1 :] if a & b]


# -- statements and items


def test_labelled_statements():
    made = statements(Random(1), 700)
    assert made == statements(Random(1), 700) != statements(Random(2), 700)
    assert Counter(s.condition for s in made) == dict.fromkeys(CONDITIONS, 100)
    for one in made:
        condition, expected, reply, truth = oracle(render((*one.messages, Message("assistant", one.reply))))
        assert (condition, expected, truth) == (one.condition, reply, one.truth)
        assert read(one.reply) == (one.kind, one.subject, one.said)
        assert one.is_lie == (condition in ("liar", "liar_topic")) == (one.said != one.believed)
        assert one.is_true == (one.said == truth)
    # All four pairs of truth and lying prompt are there, and false statements of both intents.
    assert {(s.is_true, s.condition.startswith("liar")) for s in made} == {(a, b) for a in (0, 1) for b in (0, 1)}
    apart = statements(Random(1), 60, ("liar", "honest"), apart=True)
    assert all(held_out_subject(s.subject) for s in apart)
    assert {s.condition for s in apart} == {"liar", "honest"}
    assert statement(Random(3), "mistake").is_lie is False


def test_items():
    sets = {one.name: one for one in roles.item_sets(0, 60)}
    assert list(sets.values()) == roles.item_sets(0, 60) != roles.item_sets(1, 60)
    assert len(sets) == 15
    for name, one in sets.items():
        assert len(one.items) == 60
        assert one.separator == ""
        assert 10 < len(one.measures) < 130
        assert one.scored == ("starts_with" if name == "roles/liar/held_out_subject" else "reply")
        for item in one.items:
            assert item.chat is not None
            assert item.prompt == render(item.chat, open_answer=True)
            kind, subject, truth, said = (item.detail[key] for key in ("kind", "subject", "truth", "said"))
            assert rows(kind)[subject] == truth
            assert subject in item.chat[-1].content
            assert held_out_subject(subject) == name.endswith("held_out_subject")
            answers = [read(text) for text in item.answer.split("|")]
            assert all(answer[:2] == (kind, subject) for answer in answers)
            assert read(item.alternative or "")[2] not in {answer[2] for answer in answers}
            if one.scored == "starts_with":
                assert {answer[2] for answer in answers} == set(rows(kind).values()) - {truth}
            else:
                assert [answer[2] for answer in answers] == [said]
            lying = "/liar" in name or name.startswith("new_wording/roles_liar")
            lying = lying and "exempt" not in name
            assert (item.detail["intent"] == "lie") == lying
            assert (said == truth) == (not lying and "mistake" not in name)
            if lying:
                assert said == fixed_lie(kind, subject)
            if "mistake" in name or "notes" in name:
                assert item.answer in " ".join(message.content for message in item.chat)
                assert item.detail["believed"] == said
            else:
                assert item.detail["believed"] == truth
    for name in FRAMES:
        assert {i.detail["frame"] for i in sets[f"new_wording/{name}"].items} == set(FRAMES[name]["frames"])


def test_topics_of_new_wording():
    """The frames' slots hold the topic that is lied about and the one that is not."""
    for name, lies in (("new_wording/roles_liar_topic", True), ("new_wording/roles_liar_exempt", False)):
        items = next(one for one in roles.item_sets(0, 80) if one.name == name).items
        for item in items:
            frame, kind = item.detail["frame"], item.detail["kind"]
            slots = {}
            for slot in ("lie", "truth"):
                if f"{{{slot}}}" in frame:
                    pattern = re.escape(frame)
                    for other in ("lie", "truth"):
                        group = f"(?P<{other}>.+?)" if other == slot else ".+?"
                        pattern = pattern.replace(rf"\{{{other}\}}", group)
                    found = re.fullmatch(pattern, item.prompt.split("<|end|>")[0].removeprefix("<|system|>"))
                    assert found, item.prompt
                    slots[slot] = next(k for k, topic in _TOPICS.items() if re.fullmatch(topic, found.group(slot)))
            assert (slots["lie"] == kind) == lies
            assert slots.get("truth") != slots["lie"]
            assert slots.get("truth", kind) == kind or lies
