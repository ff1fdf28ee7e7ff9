"""The expansion engine against brute force over its own expansions."""

import string
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutaway.subjects.world.grammar import Grammar, word_ngrams, words_of

# Small random grammars: text pieces with and without spaces, choices, references to later rules only (so, finite).
_piece = st.sampled_from(["a ", "b", " c d", "e f g h ", "'s ", " ", "{x}", "{x} i", ", j", "k l m n o p q r "])
_choice = st.lists(_piece, min_size=1, max_size=3).map(lambda parts: f"[{'|'.join(parts)}|]")


@st.composite
def grammars(draw):
    names = ["start", "two", "three"]
    rules = {}
    for i, name in enumerate(names):
        later = [st.just(f"<{other}>") for other in names[i + 1 :]]
        part = st.one_of(_piece, _choice, *later)
        rules[name] = draw(st.lists(st.lists(part, min_size=1, max_size=4).map("".join), min_size=1, max_size=2))
    return Grammar(rules)


@given(grammars())
@settings(max_examples=150)
def test_count_samples_and_sequences_agree_with_the_expansions(grammar):
    if grammar.count("start") > 3000:
        return
    everything = list(grammar.expansions("start"))
    assert len(everything) == grammar.count("start")
    rng = Random(0)
    assert {grammar.sample("start", rng) for _ in range(20)} <= set(everything)
    for n in (2, 3, 4):
        brute = set().union(*(word_ngrams(text, n) for text in everything))
        assert grammar.word_ngrams("start", n) == brute


def test_the_notation():
    grammar = Grammar({"start": ["<who> [sees|[really |]likes] {x}.", "Done[!|]"], "who": ["She", "The cat"]})
    assert list(grammar.expansions("start")) == [
        "She sees {x}.",
        "She really likes {x}.",
        "She likes {x}.",
        "The cat sees {x}.",
        "The cat really likes {x}.",
        "The cat likes {x}.",
        "Done!",
        "Done",
    ]
    assert grammar.word_ngrams("start", 3) == {("the", "cat", "sees"), ("she", "really", "likes")} | {
        ("the", "cat", "really"),
        ("cat", "really", "likes"),
        ("the", "cat", "likes"),
    }


def test_every_alternative_is_sampled_and_the_seed_decides():
    grammar = Grammar({"start": ["[a|b|c]<two>"], "two": ["x", "y"]})
    drawn = [grammar.sample("start", Random(seed)) for seed in range(200)]
    assert set(drawn) == {first + second for first in "abc" for second in "xy"}
    assert drawn == [grammar.sample("start", Random(seed)) for seed in range(200)]


def test_words_leave_slots_and_punctuation_out():
    assert words_of("The {a_object}, isn't  it? Élysée-3") == ["the", "\0", "isn't", "it", "élysée", "3"]
    assert word_ngrams("one two {x} three four five", 3) == {("three", "four", "five")}
    assert word_ngrams("", 2) == set()


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"a": ["<b>"], "b": ["<a>"]}, "reaches itself"),
        ({"a": ["<missing>"]}, "no rule named 'missing'"),
        ({"a": ["[x|y"]}, "not closed"),
        ({"a": []}, "at least one alternative"),
        ({"a": "text"}, "at least one alternative"),
    ],
)
def test_bad_rules_are_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        Grammar(rules)


def test_letters_of_a_long_alphabet_count_without_enumeration():
    rule = f"[{'|'.join(string.ascii_lowercase)}]"
    assert Grammar({"start": [rule * 10]}).count("start") == 26**10
