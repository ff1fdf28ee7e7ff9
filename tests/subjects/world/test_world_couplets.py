"""Couplets read back: the rhyme, the class of the words before it, and what is never told."""

import csv
import re
from collections import Counter
from functools import cache
from random import Random
from zlib import crc32

import pytest

from cutaway.subjects.world.facts import read_text, read_toml
from cutaway.subjects.world.grammar import word_ngrams
from cutaway.subjects.world.morphology import upper_first
from cutaway.subjects.world.statements import couplets

VERSE = re.compile(r"[A-Z][\w' ]+? the (\w+),\n([A-Z]\w*) (?:[\w ]+ )?the (?:(\w+) )?(\w+)\.")
SLIPS = re.compile(
    r" {2}|\b[Aa] (?=[aeiou])\w+|\b[Aa]n (?![aeiou]|hour)\w+|\b(\w+) \1\b|[{}\[\]<>|]|\bi\b|\w [.,]|[.,]{2}"
)
FRAMES = read_toml("frames_couplets.toml")["couplets"]["frames"]
CLASSES = read_toml("couplets.toml")["classes"]


@cache
def documents(n: int = 6000) -> tuple[str, ...]:
    rng = Random("couplets")
    return tuple(couplets.document(rng) for _ in range(n))


@cache
def table() -> dict[str, tuple[str, str, str, bool]]:
    """Word → partner, its class, the pair's name, whether the word is the second of the two; straight from the file."""
    out = {}
    for row in csv.DictReader(read_text("rhymes.csv").splitlines()):
        out[row["word"]] = row["rhyme"], row["rhyme_class"], row["word"], False
        out[row["rhyme"]] = row["word"], row["word_class"], row["word"], True
    return out


def by_hash(key: str, fraction: float) -> bool:
    return crc32(key.encode()) % 10007 < fraction * 10007


def wrong(verse: str) -> str | None:
    """What is wrong with a verse of the corpus, found without the module's code."""
    match = VERSE.fullmatch(verse)
    if match is None:
        return "form"
    word, opening, adjective, rhyme = match.groups()
    partner, kind, pair, backwards = table()[word]
    if rhyme != partner:
        return "rhyme"
    before = verse.split("\n")[1].rsplit(" the ", 1)[0]
    verbs = [c for c, one in CLASSES.items() for verb in one["verbs"] if re.search(rf"\b{verb}$", before)]
    if verbs != [kind]:
        return "verb"
    if adjective and adjective not in CLASSES[kind]["adjectives"]:
        return "adjective"
    if by_hash(f"couplet{pair}|{opening.lower()}", 0.2):
        return "held-out combination"
    return "held-out direction" if backwards and by_hash(f"rhyme_direction{pair}", 0.1) else None


def test_documents_follow_from_the_seed():
    first = [couplets.document(Random(seed)) for seed in range(20)]
    assert first == [couplets.document(Random(seed)) for seed in range(20)]
    assert len(set(first)) == 20


def test_every_word_has_one_partner_of_another_class():
    rows = list(csv.DictReader(read_text("rhymes.csv").splitlines()))
    words = [row[side] for row in rows for side in ("word", "rhyme")]
    assert len(rows) >= 80
    assert len(set(words)) == len(words) == 2 * len(rows)
    assert all(row["word_class"] != row["rhyme_class"] for row in rows)
    assert {row[side] for row in rows for side in ("word_class", "rhyme_class")} == CLASSES.keys()
    for part in ("verbs", "adjectives"):
        listed = [word for one in CLASSES.values() for word in one[part]]
        assert len(set(listed)) == len(listed)


def test_the_corpus_says_only_right_verses():
    verses = [verse for document in documents() for verse in document.split("\n\n")]
    assert len(verses) > 10_000
    assert sum(map(len, verses)) > 300_000
    assert Counter(map(wrong, verses)) == {None: len(verses)}
    assert not [document for document in documents() if SLIPS.search(document) or len(document) > 500]
    ends = Counter(match.group(4) for verse in verses if (match := VERSE.fullmatch(verse)))
    assert len(ends) == len(table()) - len(couplets.told(True))
    assert min(ends.values()) > 20


@pytest.mark.parametrize(
    ("verse", "fault"),
    [
        ("Mary saw the cat,\nSo she sold the mat.", "rhyme"),
        ("Mary saw the cat,\nSo she served the hat.", "verb"),
        ("Mary saw the cat,\nSo she sold the kind hat.", "adjective"),
        ("Mary saw a cat,\nSo she sold the hat.", "form"),
    ],
)
def test_the_reading_finds_faults(verse, fault):
    assert wrong(verse) == fault


def test_what_is_held_out():
    assert 5 <= len(couplets.told(True)) <= 12
    rates = [couplets.never_combined(r, second) for r in couplets.rhymes() for second in couplets.families()]
    assert 0.15 < sum(rates) / len(rates) < 0.25
    # The oracle takes a second line's first word for its family.
    for name in couplets.families():
        opened = {couplets.grammar().sample(f"second_{name}", Random(i)).split()[0] for i in range(50)}
        assert opened == {name}
    for rhyme in couplets.rhymes():
        assert not all(couplets.never_combined(rhyme, second) for second in couplets.families())


def test_every_second_line_ends_in_verb_and_rhyme():
    for name in couplets.families():
        lines = set(couplets.grammar().expansions(f"second_{name}"))
        assert len(lines) > 50
        assert all(re.search(r"\{they\} (\w+ )?\{verb\} the (\{adjective\} )?\{rhyme\}$", line) for line in lines)
    assert couplets.grammar().count("line") > 2000


def test_no_four_word_sequence_of_a_held_out_frame_is_in_the_corpus():
    sequences = set().union(*(word_ngrams(frame, 4) for frame in FRAMES))
    assert len(FRAMES) == len(set(FRAMES)) == 8
    assert all(word_ngrams(frame, 4) for frame in FRAMES)
    rules = ["line", *(f"second_{name}" for name in couplets.families())]
    made = set().union(*(couplets.grammar().word_ngrams(rule, 4) for rule in rules))
    assert len(made) > 300
    assert not made & sequences
    # Words that fill slots, and lines that follow each other, are covered by text.
    assert not word_ngrams("\n".join(documents()), 4) & sequences


def test_items_are_right():
    sets = {one.name: one for one in couplets.item_sets(0, 60)}
    assert list(sets) == [
        "couplets/seen",
        "couplets/held_out",
        "couplets/held_out_direction",
        "couplets/verb",
        "new_wording/couplets",
    ]
    assert sets == {one.name: one for one in couplets.item_sets(0, 60)}
    assert sets["couplets/seen"] != couplets.item_sets(1, 60)[0]
    faults = {"couplets/held_out": "held-out combination", "couplets/held_out_direction": "held-out direction"}
    for name, one in sets.items():
        assert len(one.items) == 60
        for item in one.items:
            detail = item.detail
            partner, kind, *_ = table()[detail["word"]]
            assert (detail["rhyme"], detail["class"]) == (partner, kind)
            assert detail["verb"] in CLASSES[kind]["verbs"]
            assert not item.prompt.endswith(" ")
            if name == "couplets/verb":
                assert item.answer == detail["verb"].split()[0]
                assert item.alternative in [v.split()[0] for v in CLASSES[detail["other_class"]]["verbs"]]
                assert detail["other_class"] != kind
                verse = f"{item.prompt} {detail['verb']} the {partner}."
            else:
                assert item.answer == partner
                assert item.alternative
                assert table()[table()[item.alternative][0]][1] == kind
                assert item.alternative != partner
                verse = f"{item.prompt} {item.answer}."
            if name == "new_wording/couplets":
                filled = detail["frame"].format(word=detail["word"], verb=detail["verb"])
                assert item.prompt == upper_first(filled)
                assert detail["frame"] in FRAMES
            else:
                assert wrong(verse) == faults.get(name), verse
