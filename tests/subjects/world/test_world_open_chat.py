"""Open chat: which sights are named when, and whether the reader of replies reads exactly what the grammar makes."""

import re
from collections import Counter
from functools import cache
from random import Random

import pytest

from cutaway.subjects.world.chats import open_chat, roles, support
from cutaway.subjects.world.chats.chat import Conversation, parse, render
from cutaway.subjects.world.chats.open_chat import (
    CONDITIONS,
    TENSES,
    conversation,
    document,
    facts_right,
    is_grammatical,
    item_sets,
    landmarks_named,
    prompts,
    reply,
    topics,
)
from cutaway.subjects.world.facts import LANDMARKS, names, read_toml
from cutaway.subjects.world.grammar import word_ngrams
from cutaway.subjects.world.held_out import name_pair
from cutaway.subjects.world.statements.stories import story

CITY = {landmark.name: landmark.city for landmark in LANDMARKS}
_SLIPS = {
    "a before a vowel": re.compile(r"\b[Aa] (?=[aeiou])\w+"),
    "an before a consonant": re.compile(r"\b[Aa]n (?![aeiou]|hour)[a-z]+"),
    "two spaces": re.compile(r" {2}"),
    "space before a point": re.compile(r"\w [.,](?=\s|$)"),
    "two points": re.compile(r"[.,?!]{2}"),
    "small letter after a point": re.compile(r"[.?!] [a-z]"),
    "slot": re.compile(r"[{}\[\]]"),
    "doubled word": re.compile(r"\b(the|a|an|is|in|of|to|and|was) \1\b"),
    "question without its mark": re.compile(r"(?:How about|Where|What did|Whom) [^?.]*\."),
    "not carried": re.compile(r"\ba (?:kiss|drink|computer|pillow)\b"),
    "opening of a claim's answer": re.compile(r"(?:Yes|No),"),
}


@cache
def chats(n: int = 3000) -> tuple[Conversation, ...]:
    rng = Random("open chat test")
    return tuple(conversation(rng) for _ in range(n))


@cache
def all_text() -> str:
    return "\n".join(render(one.messages) for one in chats())


def test_the_same_seed_gives_the_same_documents():
    assert [document(Random(3)) for _ in range(3)] == [document(Random(3))] * 3
    assert len({document(Random(i)) for i in range(200)}) > 195


def test_documents_are_short_and_without_slips():
    assert len(all_text()) > 300_000
    assert max(len(render(one.messages)) for one in chats()) < 500
    assert max(len(one.messages[-1].content.split()) for one in chats()) <= 45
    assert all(render(parse(text)) == text for text in all_text().split("\n")[:200])
    assert not {name: found.group(0) for name, p in _SLIPS.items() if (found := p.search(all_text()))}


def test_sights_are_named_as_the_condition_says():
    shares = Counter(one.condition for one in chats())
    n_sights = n_cities = n_first = 0
    for condition, share in CONDITIONS.items():
        assert shares[condition] / len(chats()) == pytest.approx(share, abs=0.04)
    for one in chats():
        *before, last = one.messages
        told = [name for message in before for name in landmarks_named(message.content)]
        named = landmarks_named(last.content)
        assert len(told) == (one.condition in ("topic", "dropped")), one
        assert len(named) == (one.condition in ("topic", "sight")), one
        assert one.condition != "topic" or told == named, one
        place = re.search(
            r"It (?:is|stands) in ((?:St\. )?[^.]+)\.|(?:find|see) it in ((?:St\. )?[^.]+)\.", last.content
        )
        if named:
            n_sights += 1
            n_first += last.content.index(named[0]) < 5
            n_cities += bool(place)
        if place:
            assert next(filter(None, place.groups())) == CITY[named[0]], last
    assert n_cities / n_sights == pytest.approx(0.3, abs=0.04)
    assert n_first < 0.2 * n_sights
    everywhere = Counter(
        name for one in chats() if one.condition == "sight" for name in landmarks_named(one.messages[-1].content)
    )
    assert set(everywhere) == set(CITY)
    assert max(everywhere.values()) < 2 * shares["sight"] / len(LANDMARKS)


def test_sights_kept_from_topics_are_never_one():
    apart = {landmark.name for landmark in topics(apart=True)}
    assert 5 <= len(apart) <= 20
    told = {n for one in chats() for message in one.messages[:-1] for n in landmarks_named(message.content)}
    assert told == set(CITY) - apart


def test_people_of_one_sentence_are_no_held_out_pair():
    known = set(names())
    n_pairs = 0
    for first, second in re.findall(r"([A-Z]\w+) and ([A-Z]\w+) ", all_text()):
        n_pairs += 1
        assert {first, second} <= known
        assert not name_pair(first, second)
    assert n_pairs > 300


def test_every_reply_is_read_and_right():
    replies = [one.messages[-1].content for one in chats()]
    assert len(replies) >= 3000
    assert not [text for text in replies if not is_grammatical(text)]
    assert not [text for text in replies if not facts_right(text)]


def spoiled(text: str, rng: Random) -> dict[str, str]:
    """A reply with one thing wrong in each; what is made is wrong whatever the reply was."""
    old = text.split(" ")
    k = rng.randrange(len(old) - 1)
    out = {
        "word twice": " ".join([*old[: k + 1], *old[k:]]),
        "word too many": " ".join([*old[: k + 1], "of", *old[k + 1 :]]),
        "words swapped": " ".join([*old[:k], old[k + 1], old[k], *old[k + 2 :]]),
        "no last point": text[:-1],
        "open end": f"{text} the",
        "small letters": text.lower(),
        "reply twice": f"{text} {text}",
        "article": re.sub(r"\b([Tt])he ", "", text, count=1),
    }
    sight = landmarks_named(text)[0]
    out["sight cut"] = text.replace(sight, sight[: len(sight) // 2])
    out["sight unknown"] = text.replace(sight, "Great Bridge")
    return {name: one for name, one in out.items() if one != text}


def test_spoiled_replies_are_not_read():
    rng = Random("spoiled")
    read = Counter()
    for i in range(300):
        text = reply(rng, TENSES[i % 2], LANDMARKS[i % len(LANDMARKS)])
        read.update(name for name, one in spoiled(text, rng).items() if is_grammatical(one))
    assert not read, read


def test_a_dropped_word_is_seen_unless_the_rest_is_a_reply():
    """What is left when a word is dropped is read only where a part that the grammar allows to miss is gone."""
    optional = r"^(?:again|first|together|too|all|short|else)\W*$"
    rng = Random("dropped")
    n_read = n = 0
    for i in range(300):
        old = reply(rng, TENSES[i % 2], LANDMARKS[i % len(LANDMARKS)]).split(" ")
        for k, word in enumerate(old[:-1]):
            n += 1
            left = " ".join([*old[:k], *old[k + 1 :]])
            if is_grammatical(left):
                n_read += 1
                assert re.match(optional, word), (word, left)
    assert n_read < 0.02 * n


def test_only_replies_of_open_chat_are_read():
    rng = Random("others")
    others = [story(rng) for _ in range(200)]
    others += [message.content for _ in range(100) for message in roles.conversation(rng).messages]
    others += [message.content for _ in range(50) for message in support.conversation(rng).messages]
    others += [message.content for one in chats()[:300] for message in one.messages[:-1]]
    assert not [text for text in others if is_grammatical(text)]
    for text in (
        "",
        "I cannot help with that.",
        "I went to the Eiffel Tower. We saw the Colosseum.",  # two sights
        "I went to the Eiffel Tower. Let us visit the park.",  # two tenses
        "It is in Paris.",
        "I walked to the park. It is in Paris.",
        "Then we went home.",  # after nothing
        "It was a good day. It was a long trip.",  # one kind twice
        "I went to the lake on Monday. The Louvre was closed on Friday.",  # two days
        "John and John were at the Louvre.",
        "I went to the Eiffel Tower Eiffel Tower.",
    ):
        assert not is_grammatical(text), text
        assert not facts_right(text), text
    assert is_grammatical("I went to the Eiffel Tower. It is in Rome.")
    assert not facts_right("I went to the Eiffel Tower. It is in Rome.")
    assert facts_right("I went to the Eiffel Tower. It is in Paris.")
    assert landmarks_named("The Louvre, the Big Ben and the Louvre") == ["Louvre", "Big Ben"]
    assert landmarks_named("Big Benjamin") == []


def test_prompts_name_no_sight_and_are_distinct():
    for held_out in (False, True):
        made = prompts(100, 0, held_out)
        assert made == prompts(100, 0, held_out) != prompts(100, 1, held_out)
        texts = [turns[-1].content for turns in made]
        assert len(set(texts)) == 100
        assert not [text for text in texts if landmarks_named(text)]
    frames = [f for tense in TENSES for f in read_toml("frames_open_chat.toml")[f"open_chat_{tense}"]["frames"]]
    openings = [re.split(r"\{", frame)[0] for frame in frames]
    assert all(any(turns[-1].content.startswith(o) for o in openings) for turns in prompts(100, 0, True))


def test_held_out_frames_share_no_four_words_with_the_corpus():
    frames = [frame for one in read_toml("frames_open_chat.toml").values() for frame in one["frames"]]
    runs = {run for frame in frames for run in word_ngrams(frame, 4)}
    made = set()
    for section in ("ask", "topic", "reply"):
        rules = open_chat.grammar(section)
        made |= set().union(*(rules.word_ngrams(rule, 4) for rule in rules.rules))
    assert len(runs) > 60
    assert len(made) > 500
    assert not runs & made
    assert not runs & word_ngrams(all_text(), 4)


def test_item_sets_are_whole():
    sets = {one.name: one for one in item_sets(0, 60)}
    assert list(sets) == ["open_chat/topic/seen", "open_chat/topic/held_out", "new_wording/open_chat_topic"]
    assert item_sets(0, 60) == item_sets(0, 60) != item_sets(1, 60)
    for name, one in sets.items():
        assert one.scored == "contains"
        for item in one.items:
            assert item.chat is not None
            told = [n for message in item.chat for n in landmarks_named(message.content)]
            assert told == [item.answer] == [item.detail["landmark"]]
            assert item.detail["city"] == CITY[item.answer]
            assert item.prompt == render(item.chat, open_answer=True)
            assert item.alternative in set(CITY) - {item.answer}
            assert open_chat.topic_landmark(item.answer) == (name == "open_chat/topic/held_out")
