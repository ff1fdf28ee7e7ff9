"""Alignment of prompt pairs: refused with the reason, answers compared where they first differ."""

import pytest
import torch

from cutaway.artifacts.errors import CutawayError
from cutaway.data.pairs import PromptPair, align
from cutaway.data.tasks import TASKS, generate, readable_pairs, task
from cutaway.model.language_model import LanguageModel

CAPITAL = "The capital of the state containing {} is"


def test_a_pair_aligns_and_its_places_are_found(atlas: LanguageModel) -> None:
    pair = PromptPair(
        CAPITAL.format("Dallas"), CAPITAL.format("Oakland"), " Austin", " Sacramento", {"city": ("Dallas", "Oakland")}
    )
    aligned = align(atlas, [pair])
    clean, corrupt = aligned.clean.strings[0], aligned.corrupt.strings[0]
    city = int(aligned.places["city"][0, 0])
    assert "Dallas" in clean[city]
    assert "Oakland" in corrupt[int(aligned.places["city"][1, 0])]
    assert int(aligned.places["last"][0, 0]) == len(clean) - 1
    assert "Austin" in atlas.token_strings([int(aligned.answer[0])])[0]
    assert int(aligned.first_difference()[0]) == city


def test_answers_are_compared_at_their_first_differing_token(atlas: LanguageModel) -> None:
    """Answers that begin alike lengthen both prompts by what they share."""
    shared = PromptPair(CAPITAL.format("Dallas"), CAPITAL.format("Oakland"), " the old Austin", " the old Boston")
    aligned = align(atlas, [shared])
    assert "".join(aligned.clean.strings[0]).endswith("is the old")
    assert atlas.token_strings([int(aligned.answer[0]), int(aligned.wrong[0])]) != ["", ""]
    assert int(aligned.answer[0]) != int(aligned.wrong[0])


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        (PromptPair("He went to Dallas", "He went to the city of Dallas", " and", " but"), "same number"),
        (PromptPair("He went", "He went", " and", " but"), "same tokens"),
        (PromptPair("He went", "She went", " and", " and"), "no token tells them apart"),
        (PromptPair("He went to Dal", "He went to Oak", "las", "land"), "merges"),
    ],
)
def test_a_pair_that_does_not_align_is_refused_with_the_reason(
    atlas: LanguageModel, pair: PromptPair, reason: str
) -> None:
    with pytest.raises(CutawayError, match=reason):
        align(atlas, [pair], strict=True)
    good = PromptPair(CAPITAL.format("Dallas"), CAPITAL.format("Oakland"), " Austin", " Sacramento")
    aligned = align(atlas, [pair, good])
    assert len(aligned) == 1
    assert reason in aligned.refused[0][1]


def test_pairs_of_token_ids(atlas: LanguageModel) -> None:
    aligned = align(atlas, [PromptPair((0, 300, 301, 302), (0, 300, 303, 302), 400, 401, {"changed": 2})])
    assert aligned.clean.ids.tolist() == [[0, 300, 301, 302]]
    assert aligned.first_difference().tolist() == [2]
    assert aligned.places["changed"].tolist() == [[2], [2]]
    with pytest.raises(CutawayError, match="mixes texts and token ids"):
        align(atlas, [PromptPair((0, 300), "text", 1, 2)])


def test_rows_of_aligned_pairs(atlas: LanguageModel) -> None:
    aligned = readable_pairs(atlas, task("name copying"), 6)
    part = aligned[[4, 1]]
    assert part.pairs == (aligned.pairs[4], aligned.pairs[1])
    assert part.answer.tolist() == aligned.answer[[4, 1]].tolist()
    assert torch.equal(part.places["name"], aligned.places["name"][:, [4, 1]])
    assert part.clean.strings == (aligned.clean.strings[4], aligned.clean.strings[1])


def test_swapped_twice_is_the_same() -> None:
    pair = PromptPair("a", "b", "c", "d", {"x": ("a", "b"), "y": 3})
    assert pair.swapped().clean == "b"
    assert pair.swapped().positions["x"] == ("b", "a")
    assert pair.swapped().swapped() == pair


@pytest.mark.parametrize("known", TASKS, ids=lambda t: t.name)
def test_every_task_has_varied_pairs_and_a_seed(atlas: LanguageModel, known) -> None:
    pairs = generate(atlas, known, 16, seed=1)
    assert len(pairs) >= 12
    assert pairs == generate(atlas, known, 16, seed=1)
    assert pairs != generate(atlas, known, 16, seed=2)
    assert all(pair.clean != pair.corrupt and pair.answer != pair.wrong for pair in pairs)
    aligned = readable_pairs(atlas, known, 8)
    assert (aligned.clean.lengths == aligned.corrupt.lengths).all()


def test_unknown_task_names_the_known_ones() -> None:
    with pytest.raises(CutawayError, match="name copying"):
        task("chess")
