"""Pairs as files: what is written is read back, other projects' forms are read, and a bad file gets one sentence."""

import json
from pathlib import Path

import pytest

from cutaway.artifacts.errors import CutawayError
from cutaway.data.pairs import PromptPair
from cutaway.data.tasks.files import (
    pair_from_json,
    read_distinct_pairs,
    read_pair_file,
    read_pairs,
    task_from_file,
    write_pairs,
)

GOOD = {"clean": "The dogs", "corrupt": "The dog", "answer": " are", "wrong": " is"}
PAIRS = [
    PromptPair("The dogs", "The dog", " are", " is", {"subject": ("dogs", "dog"), "first": 0, "the": "The"}),
    PromptPair("In 52", "In 01", "60", "40", {}, ("60", "61"), ("40", "41"), symmetric=False, template="years"),
    PromptPair((1, 2, 3), (1, 4, 3), 5, 6, {"changed": 1}, (5, 7), (6, 8)),
]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    write_pairs(path, PAIRS)
    assert read_pairs(path) == PAIRS
    assert isinstance(json.loads(path.read_text()), list)
    write_pairs(path, PAIRS[:1], name="own", held_out=PAIRS[1:])
    found = read_pair_file(path)
    assert (found.name, found.pairs, found.held_out) == ("own", tuple(PAIRS[:1]), tuple(PAIRS[1:]))
    assert read_pairs(path) == PAIRS


def test_one_pair_a_line(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(json.dumps(pair.to_json()) for pair in PAIRS) + "\n")
    assert read_pairs(path) == PAIRS


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not JSON"),
        ("", "is not JSON"),
        ("[]", "has no prompt pairs"),
        ("3", "pairs is a number; it must be a list"),
        ('{"pears": []}', "unknown key 'pears'"),
        ('{"name": "x"}', "no key pairs"),
        ('{"name": 3, "pairs": []}', "name is 3"),
        ('{"pairs": []}', "the list is empty"),
        ([GOOD, "x"], "pair 1 is a text"),
        ([GOOD, {**GOOD, "answer": None}], "pair 1: answer is null"),
        ([{**GOOD, "answer": 4}], "pair 0: answer is a number"),
        ([{key: GOOD[key] for key in ("clean", "corrupt", "answer")}], "pair 0 has no 'wrong'"),
        ([{**GOOD, "corrupt": ""}], "corrupt is an empty text"),
        ([{**GOOD, "clean": [1, 2]}], "corrupt is a text; with token ids"),
        ([{**GOOD, "clean": [1, True], "corrupt": [1, 2]}], "clean is a list"),
        ([{**GOOD, "extra": 1}], "unknown key 'extra'"),
        ([{**GOOD, "wrong": " are"}], "must differ"),
        ([{**GOOD, "answers": " are"}], "answers is a text"),
        ([{**GOOD, "answers": [" are"]}], "only one of answers and wrongs"),
        ([{**GOOD, "answers": [3], "wrongs": [" is"]}], "an entry of answers is a number"),
        ([{**GOOD, "positions": ["dogs"]}], "positions is a list"),
        ([{**GOOD, "positions": {"subject": ["dogs"]}}], "the place 'subject' is a list"),
        ([{**GOOD, "symmetric": 1}], "symmetric is a number"),
        ([{**GOOD, "template": 1}], "template is a number"),
        ({"pairs": [GOOD], "held_out": [GOOD]}, "held-out pair 0 is among"),
        ({"pairs": [GOOD], "held_out": [{}]}, "held-out pair 0 has no 'clean'"),
        ({"pairs": [GOOD], "held_out": 1}, "held_out is a number"),
    ],
)
def test_a_bad_file_gets_one_sentence(tmp_path: Path, content: object, says: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(CutawayError) as error:
        read_pairs(path)
    assert says in str(error.value)
    assert str(error.value).count("\n") == 0
    assert "bad.json" in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CutawayError, match="there is no file"):
        read_pairs(tmp_path / "absent.json")
    with pytest.raises(CutawayError, match="is a folder"):
        read_pairs(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CutawayError, match="is not UTF-8 text"):
        read_pairs(tmp_path / "binary.json")
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(CutawayError, match="nested too deeply"):
        read_pairs(tmp_path / "deep.json")
    (tmp_path / "digits.json").write_text("9" * 5000)
    with pytest.raises(CutawayError, match="too many digits"):
        read_pairs(tmp_path / "digits.json")
    (tmp_path / "open.csv").write_text('clean,corrupt\n"' + "x" * 300_000)
    with pytest.raises(CutawayError, match="is a quotation mark open"):
        read_pairs(tmp_path / "open.csv")


def blimp(prefix: str, good: str, bad: str) -> str:
    entry = {"sentence_good": "-", "sentence_bad": "-", "UID": "u", "one_prefix_prefix": prefix}
    return json.dumps({**entry, "one_prefix_word_good": good, "one_prefix_word_bad": bad})


def test_blimp(tmp_path: Path) -> None:
    path = tmp_path / "blimp.jsonl"
    other = json.dumps({"sentence_good": "-", "sentence_bad": "-", "two_prefix_word": "ever"})
    lines = [
        blimp("She saw those", "cats", "cat"), blimp("The dog", "has", "have"), blimp("Two dogs", "are", "is"),
        blimp("Many old dogs", "have", "has"), blimp("Most dogs", "have", "has"), other,
    ]  # fmt: skip
    path.write_text("\n".join(lines))
    found = read_pair_file(path)
    assert found.pairs == (
        PromptPair("She saw those", "She saw that", " cats", " cat", {"determiner": ("those", "that")}, template="u"),
        PromptPair("The dog", "Most dogs", " has", " have", template="u"),
    )
    assert sum((found.left_out or {}).values()) == 3
    path.write_text(other)
    with pytest.raises(CutawayError, match="two prompts and one continuation"):
        read_pairs(path)
    path.write_text(lines[0] + "\n" + json.dumps({"sentence_good": "-", "one_prefix_prefix": 3}))
    with pytest.raises(CutawayError, match="line 2 has no text under"):
        read_pairs(path)


def test_agreement_prompts(tmp_path: Path) -> None:
    path = tmp_path / "agreement.json"
    entry = {"clean_prefix": "The boys near the car", "patch_prefix": "The boy near the car"}
    entry |= {"clean_answer": " do", "patch_answer": " does", "case": "plural_singular"}
    pair = PromptPair(
        "The boys near the car", "The boy near the car", " do", " does", {"subject": ("^The boys", "^The boy")},
        template="plural_singular",
    )  # fmt: skip
    for lines in (1, 2):
        path.write_text("\n".join([json.dumps(entry)] * lines))
        assert read_pairs(path) == [pair] * lines
    path.write_text(json.dumps(entry) + "\n" + json.dumps({**entry, "patch_answer": None}))
    with pytest.raises(CutawayError, match="line 2 has no text under 'patch_answer'"):
        read_pairs(path)


def test_relations(tmp_path: Path) -> None:
    path = tmp_path / "relation.json"
    facts = {"France": "Paris", "Spain": "Madrid", "South Africa": "Pretoria", "Kenya": "Nairobi", "Peru": "Lima"}
    facts |= {"Italy": "Rome"}
    data = {"name": "capitals", "prompt_templates": ["The capital of {} is"], "prompt_templates_zs": ["In {}, it is"]}
    data["samples"] = [{"subject": subject, "object": thing} for subject, thing in facts.items()]
    path.write_text(json.dumps(data))
    found = read_pair_file(path)
    assert found.name == "capitals"
    assert found.pairs[0] == PromptPair(
        "The capital of France is", "The capital of Kenya is", " Paris", " Nairobi", {"subject": ("France", "Kenya")},
        template="The capital of {} is",
    )  # fmt: skip
    assert [pair.clean for pair in found.pairs] == [
        f"The capital of {subject} is" for subject in ("France", "Spain", "Kenya", "Peru")
    ]
    assert not found.held_out  # South Africa and Italy have not as many words
    assert sum((found.left_out or {}).values()) == 2
    assert task_from_file(path).note == "left out of its file: 2 × no subject of as many words has another object"
    data["samples"][2] = {"subject": "Japan", "object": "Tokyo"}
    path.write_text(json.dumps(data))
    assert [pair.clean for pair in read_pair_file(path).held_out] == ["In Japan, it is", "In Italy, it is"]
    for change, says in (
        ({"samples": [{"subject": "France"}]}, "sample 0 has no text"),
        ({"samples": 3}, "must be lists"),
        ({"samples": []}, "it has no samples"),
        ({"prompt_templates": ["The capital is"]}, "no single place"),
        ({"samples": data["samples"][:1]}, "no subject of as many words"),
    ):
        path.write_text(json.dumps({**data, **change}))
        with pytest.raises(CutawayError, match=says):
            read_pairs(path)


def test_csv_of_greater_than_and_indirect_objects(tmp_path: Path) -> None:
    path = tmp_path / "gt.csv"
    path.write_text("clean,corrupted,label\nThe war went from 1795 to 17,The war went from 1701 to 17,95\n")
    (pair,) = read_pairs(path)
    assert pair.answers == ("96", "97", "98", "99")
    assert len(pair.wrongs) == 96
    assert pair.wrongs[-1] == "95"
    assert (pair.answer, pair.wrong, pair.symmetric) == ("99", "85", False)
    assert pair.positions == {"year": ("^The war went from 1795", "^The war went from 1701")}
    path.write_text('x,clean,corrupted,corrupted_hard\n1,"Al and Bo met, Al gave to",?,"Al and Bo met, Bo gave to"\n')
    (pair,) = read_pairs(path)
    assert (pair.clean, pair.answer, pair.wrong) == ("Al and Bo met, Al gave to", " Bo", " Al")
    path.write_text("clean,corrupt,answer,wrong\nThe dogs,The dog, are, is\n")
    assert read_pairs(path) == [PromptPair("The dogs", "The dog", " are", " is")]
    for text, says in (
        ("", r"\(none\)"),
        ("clean,corrupted,label\n", "no row under its header"),
        ("clean,corrupted,label\na,b\n", "row 1 has another number of columns"),
        ("clean,corrupted,label\na,b,99\n", "label is '99'"),
        ("a,b\n1,2\n", "has the columns a, b"),
        ("clean,corrupt,answer,wrong\nx,y,,b\n", "is empty"),
        ("clean,corrupted_hard\nAl went,Al came\n", "row 1: clean and corrupted_hard do not differ in one name"),
    ):
        path.write_text(text)
        with pytest.raises(CutawayError, match=says):
            read_pairs(path)


def test_a_single_object_is_checked() -> None:
    assert pair_from_json(GOOD) == PromptPair("The dogs", "The dog", " are", " is")
    with pytest.raises(CutawayError, match=r"^the pair is a list"):
        pair_from_json([1])


@pytest.mark.parametrize(
    ("file", "n", "read"),
    [
        ("blimp/determiner_noun_agreement_1.jsonl", 1000, 800),
        ("blimp/anaphor_number_agreement.jsonl", 223, 20),
        ("blimp/regular_plural_subject_verb_agreement_1.jsonl", 110, 10),
        ("agreement/simple_test.json", 120, 40),
        ("agreement/nounpp_test.json", 480, 100),
        ("eap-ig/greater_than_data.csv", 1000, 200),
        ("eap-ig/ioi_llama.csv", 499, 100),
        ("relations/factual/landmark_in_country.json", 834, 100),
        ("relations/linguistic/adj_antonym.json", 100, 25),
    ],
)
def test_real_files(shared: Path, file: str, n: int, read: int) -> None:
    import cutaway
    from cutaway.data.pairs import aligned

    pairs = read_pairs(shared / "corpora" / file)
    assert len(pairs) == n
    chosen = pairs[:200] if "greater" in file else pairs
    ready = aligned(cutaway.load(shared / "models" / "webtext-gpt2"), chosen)
    assert len(ready) + len(ready.refused) == len(chosen)
    assert len(ready) >= min(read, len(chosen) // 4)


def test_repeated_pairs_are_taken_once_where_intervals_are_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "twice.json"
    path.write_text(json.dumps([GOOD, {**GOOD, "answer": " were"}, GOOD, GOOD]))
    assert [pair.answer for pair in read_distinct_pairs(path).pairs] == [" are", " were"]
    assert f"2 pairs of {path} repeat another and are left out" in capsys.readouterr().err
    assert len(read_pairs(path)) == 4
