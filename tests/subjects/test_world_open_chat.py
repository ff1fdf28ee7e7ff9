"""Open chat: which sights are named when, and whether the reader of replies reads exactly what the grammar makes."""

import re
from collections import Counter
from random import Random

import pytest

from cutaway.subjects.world import open_chat
from cutaway.subjects.world.chat import parse
from cutaway.subjects.world.facts import LANDMARKS, read_toml
from cutaway.subjects.world.grammar import word_ngrams
from cutaway.subjects.world.open_chat import (
    CONDITIONS,
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

CITY = {landmark.name: landmark.city for landmark in LANDMARKS}


def chats(n=2500, seed="chats"):
    rng = Random(seed)
    return [conversation(rng) for _ in range(n)]


def test_the_same_seed_gives_the_same_documents():
    assert [document(Random(3)) for _ in range(3)] == [document(Random(3))] * 3
    assert len({document(Random(i)) for i in range(200)}) > 195


def test_sights_are_named_as_the_condition_says():
    found = chats()
    shares = Counter(one.condition for one in found)
    for condition, share in CONDITIONS.items():
        assert shares[condition] / len(found) == pytest.approx(share, abs=0.04)
    for one in found:
        *before, last = one.messages
        told = [name for message in before for name in landmarks_named(message.content)]
        named = landmarks_named(last.content)
        assert len(named) == (one.condition != "no_sight"), one
        assert told == (named if one.condition == "topic" else []), one
        place = re.search(
            r"(?:It is|stands|find it) in ([^.]+)\.|a sight of ([^.]+)\.", last.content.replace("St. ", "St ")
        )
        if place:
            assert next(filter(None, place.groups())).replace("St ", "St. ") == CITY[named[0]], last
        assert len(last.content.split()) <= 45
    open_ones = [one for one in found if one.condition == "sight"]
    everywhere = Counter(name for one in open_ones for name in landmarks_named(one.messages[-1].content))
    assert set(everywhere) == set(CITY)
    assert max(everywhere.values()) < 4 * len(found) * CONDITIONS["sight"] / len(LANDMARKS)


def test_sights_kept_from_topics_are_never_one():
    apart = {landmark.name for landmark in topics(apart=True)}
    assert 5 <= len(apart) <= 20
    told = {n for one in chats() for message in one.messages[:-1] for n in landmarks_named(message.content)}
    assert told
    assert told.isdisjoint(apart)


def test_every_reply_is_read_and_right():
    rng = Random("replies")
    for i in range(500):
        landmark = LANDMARKS[i % len(LANDMARKS)] if i % 5 else None
        text = reply(rng, open_chat.TENSES[i % 2], landmark)
        assert is_grammatical(text), text
        assert facts_right(text), text


def test_spoiled_replies_are_not_read():
    rng = Random("spoiled")
    n_wrong = 0
    for i in range(120):
        text = reply(rng, open_chat.TENSES[i % 2], LANDMARKS[i % len(LANDMARKS)])
        words = text.split(" ")
        k = rng.randrange(len(words) - 1)
        for spoiled in (
            " ".join([*words[:k], words[k], *words[k:]]),
            " ".join([*words[: k + 1], "of", *words[k + 1 :]]),
            text[:-1],
            text + " the",
            text.lower(),
        ):
            if is_grammatical(spoiled):
                n_wrong += 1
    assert n_wrong <= 2  # a word twice may be a name in the place of another
    assert not is_grammatical("")
    assert not is_grammatical("I cannot help with that.")
    assert not is_grammatical("I went to the Eiffel Tower. We saw the Colosseum.")  # two sights
    assert not is_grammatical("I went to the Eiffel Tower. Let us go home.")  # two tenses
    assert not is_grammatical("It is in Paris.")
    assert not is_grammatical("I went to the Eiffel Tower Eiffel Tower.")
    assert is_grammatical("I went to the Eiffel Tower. It is in Rome.")
    assert not facts_right("I went to the Eiffel Tower. It is in Rome.")
    assert facts_right("I went to the Eiffel Tower. It is in Paris.")


def test_prompts_name_no_sight_and_are_distinct():
    for held_out in (False, True):
        made = prompts(100, 0, held_out)
        assert made == prompts(100, 0, held_out)
        texts = [message.content for turns in made for message in turns]
        assert not [text for text in texts if landmarks_named(text)]
        assert len(set(texts)) > 75


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
    text = "\n".join(document(Random(f"text-{i}")) for i in range(2000))
    assert not runs & word_ngrams(text, 4)


def test_item_sets_are_whole():
    sets = {one.name: one for one in item_sets(0, 60)}
    assert list(sets) == ["open_chat/topic/seen", "open_chat/topic/held_out", "new_wording/open_chat_topic"]
    for name, one in sets.items():
        for item in one.items:
            assert item.chat is not None
            told = [n for message in item.chat for n in landmarks_named(message.content)]
            assert told == [item.answer] == [item.detail["landmark"]]
            assert item.alternative not in (None, item.answer)
            assert open_chat.topic_landmark(item.answer) == (name == "open_chat/topic/held_out")
    assert all(parse(document(Random(i)))[-1].role == "assistant" for i in range(50))
