"""Alignment of prompt pairs: refused with the reason, answers compared where they first differ."""

import pytest
import torch

from cutaway.artifacts.errors import CutawayError
from cutaway.data.pairs import PromptPair, aligned
from cutaway.data.tasks.tasks import readable_pairs, task
from cutaway.model.language_model import LanguageModel

CAPITAL = "The capital of the state containing {} is"


def test_a_pair_aligns_and_its_places_are_found(atlas: LanguageModel) -> None:
    pair = PromptPair(
        CAPITAL.format("Dallas"), CAPITAL.format("Oakland"), " Austin", " Sacramento", {"city": ("Dallas", "Oakland")}
    )
    ready = aligned(atlas, [pair])
    clean, corrupt = ready.clean.strings[0], ready.corrupt.strings[0]
    city = int(ready.places["city"][0, 0])
    assert "Dallas" in clean[city]
    assert "Oakland" in corrupt[int(ready.places["city"][1, 0])]
    assert int(ready.places["last"][0, 0]) == len(clean) - 1
    assert "Austin" in atlas.token_strings([int(ready.answer[0])])[0]
    assert int(ready.first_difference()[0]) == city


def test_answers_are_compared_at_their_first_differing_token(atlas: LanguageModel) -> None:
    """Answers that begin alike lengthen both prompts by what they share."""
    shared = PromptPair(CAPITAL.format("Dallas"), CAPITAL.format("Oakland"), " the old Austin", " the old Boston")
    ready = aligned(atlas, [shared])
    assert "".join(ready.clean.strings[0]).endswith("is the old")
    assert atlas.token_strings([int(ready.answer[0]), int(ready.wrong[0])]) != ["", ""]
    assert int(ready.answer[0]) != int(ready.wrong[0])


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
        aligned(atlas, [pair], strict=True)
    good = PromptPair(CAPITAL.format("Dallas"), CAPITAL.format("Oakland"), " Austin", " Sacramento")
    ready = aligned(atlas, [pair, good])
    assert len(ready) == 1
    assert reason in ready.refused[0][1]
    assert ready[[0]].refused == ready.refused  # a part says what was left out of the whole
    assert aligned(atlas, ready) is ready


def test_pairs_of_token_ids(atlas: LanguageModel) -> None:
    ready = aligned(atlas, [PromptPair((0, 300, 301, 302), (0, 300, 303, 302), 400, 401, {"changed": 2})])
    assert ready.clean.ids.tolist() == [[0, 300, 301, 302]]
    assert ready.first_difference().tolist() == [2]
    assert ready.places["changed"].tolist() == [[2], [2]]
    with pytest.raises(CutawayError, match="mixes texts and token ids"):
        aligned(atlas, [PromptPair((0, 300), "text", 1, 2)])


def test_rows_of_aligned_pairs(atlas: LanguageModel) -> None:
    ready = readable_pairs(atlas, task("name copying"), 6)
    part = ready[[4, 1]]
    assert part.pairs == (ready.pairs[4], ready.pairs[1])
    assert part.answer.tolist() == ready.answer[[4, 1]].tolist()
    assert torch.equal(part.places["name"], ready.places["name"][:, [4, 1]])
    assert part.clean.strings == (ready.clean.strings[4], ready.clean.strings[1])


def test_swapped_twice_is_the_same() -> None:
    pair = PromptPair("a", "b", "c", "d", {"x": ("a", "b"), "y": 3})
    assert pair.swapped().clean == "b"
    assert pair.swapped().positions["x"] == ("b", "a")
    assert pair.swapped().swapped() == pair


def test_a_pair_that_is_not_symmetric_cannot_be_swapped() -> None:
    with pytest.raises(CutawayError, match="is not symmetric"):
        PromptPair("In 52", "In 01", "60", "40", symmetric=False).swapped()
    several = PromptPair("a", "b", "c", "d", {}, ("c", "e"), ("d", "f"), template="t")
    assert several.swapped() == PromptPair("b", "a", "d", "c", {}, ("d", "f"), ("c", "e"), template="t")
    assert several.swapped().swapped() == several


SPAN = "The war lasted from the year 17{} to the year 17"
YEARS = [f"{year:02d}" for year in range(100)]


def span(year: int, **changes: object) -> PromptPair:
    said = {"answers": tuple(YEARS[year + 1 :]), "wrongs": tuple(YEARS[: year + 1]), "symmetric": False, **changes}
    return PromptPair(SPAN.format(f"{year:02d}"), SPAN.format("01"), "99", "02", {}, **said)  # type: ignore[arg-type]


def test_several_answers_become_masks_over_the_vocabulary(atlas: LanguageModel) -> None:
    one = PromptPair(CAPITAL.format("Dallas"), CAPITAL.format("Oakland"), " Austin", " Sacramento")
    ready = aligned(atlas, [span(52), one, span(97)])
    assert ready.answers is not None
    assert ready.wrongs is not None
    token = {year: atlas.tokens(SPAN.format("52") + year, bos=True).row_ids(0)[-1] for year in YEARS}
    for row, year in ((0, 52), (2, 97)):
        assert set(ready.answers[row].nonzero()[:, 0].tolist()) == {token[y] for y in YEARS[year + 1 :]}
        assert set(ready.wrongs[row].nonzero()[:, 0].tolist()) == {token[y] for y in YEARS[: year + 1]}
    # a pair that names no sets has its two answers alone
    assert ready.answers[1].nonzero()[:, 0].tolist() == [int(ready.answer[1])]
    assert ready.wrongs[1].nonzero()[:, 0].tolist() == [int(ready.wrong[1])]
    part = ready[[2]]
    assert part.answers is not None
    assert torch.equal(part.answers, ready.answers[[2]])
    assert aligned(atlas, [one]).answers is None


def test_answers_that_cannot_be_told_apart_are_refused(atlas: LanguageModel) -> None:
    shared = span(52, wrongs=("02", "99 years"))  # begins with the token of the answer 99
    other_side = span(52, answers=("98", "97"))
    unknown = span(52, wrongs=())
    merged = PromptPair("He went to Dal", "He went to Oak", " and", " but", {}, (" and", "las"), (" but",))
    ready = aligned(atlas, [span(52), shared, other_side, unknown, merged])
    assert len(ready) == 1
    reasons = [reason for _, reason in ready.refused]
    assert "begin with the same token: '99 years'" in reasons[0]
    assert "must be one of its answers" in reasons[1]
    assert "must list what is right and what is wrong" in reasons[2]
    assert "token of its own" in reasons[3]


def test_refused_pairs_are_counted_by_reason(atlas: LanguageModel) -> None:
    good = PromptPair(CAPITAL.format("Dallas"), CAPITAL.format("Oakland"), " Austin", " Sacramento")
    longer = [PromptPair("He went", "He went" + " far" * i, " and", " but") for i in (1, 2)]
    same = PromptPair("He went", "He went", " and", " but")
    lost = PromptPair(good.clean, good.corrupt, good.answer, good.wrong, {"river": "Nile"})
    outside = PromptPair(good.clean, good.corrupt, good.answer, good.wrong, {"river": 40})
    long = PromptPair("a " * 3000, "b " * 3000, " and", " but")
    ids = PromptPair((0, *range(300, 3300)), (0, *range(301, 3301)), 4, 5)
    unknown = PromptPair((0, 300), (0, 301), 4, 9000)
    ready = aligned(atlas, [good, same, *longer, lost, outside, long, ids, unknown])
    assert ready.pairs == (good,)
    assert ready.refusals() == {
        "clean and corrupt must have the same number of tokens": 2,
        "the prompt cannot be read": 3,
        "clean and corrupt are the same tokens": 1,
        "a place is not in the prompt": 1,
        "a place is outside the prompt": 1,
    }
    assert [reason for _, reason in ready.refused if "Nile" in reason]


def test_a_role_that_some_pairs_lack_is_no_place(atlas: LanguageModel) -> None:
    one = PromptPair(CAPITAL.format("Dallas"), CAPITAL.format("Oakland"), " Austin", " Sacramento", {"of": "of"})
    two = PromptPair(one.clean, one.corrupt, one.answer, one.wrong, {"of": "of", "city": ("Dallas", "Oakland")})
    ready = aligned(atlas, [one, two])
    assert list(ready.places) == ["of", "last"]
