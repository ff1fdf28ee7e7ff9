"""Directions against their definition; each edit does to the stream what it says."""

import pytest
import torch

from cutaway.artifacts.errors import CutawayError
from cutaway.model.language_model import LanguageModel
from cutaway.steering.directions import (
    INSTRUCTION,
    Direction,
    ablate_direction,
    add_direction,
    clamp_to_negative,
    difference_of_means,
)

POSITIVE = [[0, 5, 9, 11, 40], [0, 7, 33, 2], [0, 50, 51, 52, 53, 54]]
NEGATIVE = [[0, 6, 8], [0, 10, 12, 14, 16, 18, 20], [0, 44, 3, 3, 8]]


@pytest.fixture(scope="module")
def direction(tiny: LanguageModel) -> Direction:
    return difference_of_means(tiny, POSITIVE, NEGATIVE).get(1, -1)


def test_difference_of_means_is_its_definition(tiny: LanguageModel) -> None:
    found = difference_of_means(tiny, POSITIVE, NEGATIVE, positions=(-1, -2, INSTRUCTION))
    assert len(found) == 9
    for layer in range(3):
        means = {}
        for side, rows in (("+", POSITIVE), ("-", NEGATIVE)):
            streams = [
                tiny.run([ids], capture=f"blocks.{layer}.resid_post")[f"blocks.{layer}.resid_post"][0] for ids in rows
            ]
            means[side, -1] = torch.stack([s[-1] for s in streams]).mean(0)
            means[side, -2] = torch.stack([s[-2] for s in streams]).mean(0)
            means[side, INSTRUCTION] = torch.stack([s[1:].mean(0) for s in streams]).mean(0)  # all but BOS
        for position in (-1, -2, INSTRUCTION):
            item = found.get(layer, position)
            torch.testing.assert_close(item.vector, means["+", position] - means["-", position], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(item.negative_mean, means["-", position], rtol=1e-4, atol=1e-4)
            assert item.n == (3, 3)


def test_auroc_of_the_projection(tiny: LanguageModel) -> None:
    """With so few prompts in 32 dimensions the classes separate in sample; the same prompts on both sides do not."""
    assert difference_of_means(tiny, POSITIVE, NEGATIVE).get(2, -1).auroc > 0.8
    same = difference_of_means(tiny, POSITIVE, [*POSITIVE[1:], POSITIVE[0][:-1]]).get(2, -2)
    assert same.auroc < 0.9


def test_a_random_direction_has_the_same_norm(direction: Direction) -> None:
    a, b = direction.random(0), direction.random(1)
    assert a.norm == pytest.approx(direction.norm, rel=1e-5)
    assert abs((a.unit @ direction.unit).item()) < 0.6
    assert abs((a.unit @ b.unit).item()) < 0.6
    assert torch.equal(a.vector, direction.random(0).vector)
    assert a.seed == 0


def test_ablation_leaves_nothing_along_the_direction(tiny: LanguageModel, direction: Direction) -> None:
    run = tiny.run(POSITIVE, capture="blocks.*.resid_post", edits=ablate_direction(tiny, direction))
    for layer in range(3):
        along = run[f"blocks.{layer}.resid_post"][run.tokens.mask] @ direction.unit
        assert along.abs().max() < 1e-4
    free = tiny.run(POSITIVE, capture="blocks.*.resid_post")
    assert (free["blocks.1.resid_post"][free.tokens.mask] @ direction.unit).abs().max() > 0.1


def test_the_clamp_is_an_upper_bound_from_its_layer_on(tiny: LanguageModel, direction: Direction) -> None:
    run = tiny.run(POSITIVE, capture="blocks.*.resid_post", edits=clamp_to_negative(tiny, direction))
    free = tiny.run(POSITIVE, capture="blocks.*.resid_post")
    limit = direction.negative_projection
    for layer in (1, 2):
        site = f"blocks.{layer}.resid_post"
        along = run[site][run.tokens.mask] @ direction.unit
        assert along.max() <= limit + 1e-4
    assert torch.equal(run["blocks.0.resid_post"], free["blocks.0.resid_post"])
    before = free["blocks.1.resid_post"][free.tokens.mask] @ direction.unit
    after = run["blocks.1.resid_post"][run.tokens.mask] @ direction.unit
    torch.testing.assert_close(after, before.clamp(max=limit), rtol=1e-4, atol=1e-4)
    assert limit < before.max()


def test_push_adds_at_its_own_layer(tiny: LanguageModel, direction: Direction) -> None:
    site = "blocks.1.resid_post"
    free, pushed = (tiny.run(POSITIVE, capture=site, edits=edits) for edits in ((), add_direction(direction, -2.0)))
    torch.testing.assert_close(
        (pushed[site] - free[site])[free.tokens.mask], (-2 * direction.vector).expand(15, -1), rtol=1e-4, atol=1e-4
    )


def test_bad_positions(tiny: LanguageModel) -> None:
    with pytest.raises(CutawayError, match="shortest prompt has 4 tokens"):
        difference_of_means(tiny, POSITIVE, NEGATIVE, positions=(-4, -5))
    with pytest.raises(CutawayError, match="instruction mean"):
        difference_of_means(tiny, POSITIVE, NEGATIVE, positions=("middle",))
    with pytest.raises(CutawayError, match="two prompts"):
        difference_of_means(tiny, POSITIVE[:1], NEGATIVE)
    with pytest.raises(CutawayError, match="layer 7"):
        difference_of_means(tiny, POSITIVE, NEGATIVE).get(7, -1)
