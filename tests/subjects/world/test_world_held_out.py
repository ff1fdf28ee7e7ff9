"""The study's splits, kept exactly: fixed numbers, and the study's own generator where it is at hand."""

import importlib.util
import sys

import pytest

from cutaway.subjects.world import held_out as held
from cutaway.subjects.world.chats.chat import asked_actions
from cutaway.subjects.world.facts import BOOKS, CITIES, COUNTRIES, LANDMARKS, actions, names, words
from cutaway.subjects.world.statements import tasks
from cutaway.subjects.world.statements.relations import one_hop, two_hop


def test_the_hash_is_crc32():
    # zlib.crc32(b"2hopDallas") % 10007 = 883, of b"2hopOakland" 5264.
    assert held.held_out("2hopDallas", 884 / 10007)
    assert not held.held_out("2hopDallas", 883 / 10007)
    assert held.two_hop_entity("Dallas")
    assert not held.two_hop_entity("Oakland")
    assert not any(held.held_out(str(i), 0.0) for i in range(100))
    assert all(held.held_out(str(i), 1.0) for i in range(100))


def test_sizes_of_the_splits():
    assert sum(held.two_hop_entity(city.name) for city in CITIES) == 68
    for language, sizes in (("fr", (9, 5, 7)), ("tr", (12, 7, 6)), ("en", (0, 0, 0))):
        for table, size in zip((COUNTRIES, LANDMARKS, BOOKS), sizes, strict=True):
            assert sum(held.language_fact(language, row.name) for row in table) == size
    assert (len(asked_actions(True)), len(asked_actions(False))) == (465, 498)
    splits = [held.action_split(action) for harmful in (True, False) for action in actions(harmful)]
    assert {s: splits.count(s) for s in set(splits)} == {
        "train": 963,
        "held_out_action": 108 + 149,
        "held_out_verb": 90 + 90,
    }
    assert sum(len(r.facts) * (len(r.study_frames)) for r in two_hop()) == 3228


@pytest.mark.parametrize("fraction", [0.12, 0.15, 0.2, 0.3])
def test_a_split_takes_its_share(fraction):
    share = sum(held.held_out(f"key {i}", fraction) for i in range(20_000)) / 20_000
    assert share == pytest.approx(fraction, abs=0.01)


@pytest.fixture(scope="module")
def study(shared):
    """The study's own generator, imported from the optional folder."""
    folder = shared / "prototype"
    if not (folder / "world.py").exists():
        pytest.skip("the study's generator is absent")
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location("study_world", folder / "world.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("data", None)


def test_every_split_equals_the_study(study):
    for city in CITIES:
        assert held.two_hop_entity(city.name) == study.held_city(city.name)
    for i, first in enumerate(names()[::7]):
        for second in names()[i + 1 :: 5]:
            assert held.name_pair(first, second) == study.held_pair(first, second)
    for harmful, table in ((True, study.HARM), (False, study.SAFE)):
        assert [action.text for action in actions(harmful)] == [text for _, text in table]
        for ours, part in (("train", "train"), ("held_out_action", "held"), ("held_out_verb", "heldv")):
            expected = [text for _, text in study.split(table, part)]
            assert [a.text for a in actions(harmful) if held.action_split(a) == ours] == expected
    for task, short in tasks._HASHED_AS.items():
        assert set(tasks.in_context_split(task)[1]) == set(study._ICLS[short][1]), task
    for noun in words("event_nouns"):
        for year in range(2, 98, 7):
            assert held.year_span(noun, 17, year) == study.H(f"gt{noun}17{year}", 0.15)


def test_one_hop_items_equal_the_study(study):
    """Prompt, answer and both held-out marks of the items of every relation that holds out a frame."""
    short = {"capital": "cap", "landmark": "lm", "city": "city", "book": "book"}
    short |= {f"state_{k}": f"st_{v}" for k, v in (("capital", "capital"), ("abbreviation", "abbr"), ("bird", "bird"))}
    short |= {"state_region": "st_region", "state_nickname": "st_nick"}
    expected, found = set(), set()
    for item in study.ONEHOP:
        if item["rel"] in short.values():
            mark = (item["held_t"], item["held_lang"])
            expected.add((item["rel"], item["lang"], item["prompt"], item["ans"], *mark))
    for relation in one_hop():
        if relation.name in short:
            for fact in relation.facts:
                for frame in (*relation.study_frames, relation.held_out_frame):
                    assert frame is not None
                    mark = (frame == relation.held_out_frame, fact.held_out)
                    key = (short[relation.name], relation.language, fact.prompt(frame), fact.answer, *mark)
                    found.add(key)
    assert found == expected


def test_two_hop_items_equal_the_study(study):
    expected = {(item["prompt"], item["ans"], item["held"]) for item in study.TWOHOP}
    found = {(f.prompt(frame), f.answer, f.held_out) for r in two_hop() for f in r.facts for frame in r.study_frames}
    assert found == expected
