"""Controls with the side effects of the edit; strengths; side effects over tokens."""

import pytest
import torch

from cutaway.model.edits.edits import add
from cutaway.model.language_model import LanguageModel
from cutaway.steering.controls import TOLERANCE, matched_controls, matched_scale
from cutaway.steering.directions import ablate_direction, add_direction, clamp_to_negative, difference_of_means
from cutaway.steering.side_effects import side_effects_of_each

POSITIVE = [[0, 5, 9, 11, 40], [0, 7, 33, 2], [0, 50, 51, 52, 53, 54]]
NEGATIVE = [[0, 6, 8], [0, 10, 12, 14, 16, 18, 20], [0, 44, 3, 3, 8]]


@pytest.mark.parametrize(
    ("cost", "start"),
    [
        *((lambda s: 0.02 * s**2, start) for start in (0.01, 1.0, 50.0)),
        *((lambda s: 3 * s**2 / (40 + s**2), start) for start in (0.01, 1.0, 50.0)),
        *((lambda s: 0.001 * s**3 + 0.01 * s, start) for start in (0.01, 1.0, 50.0)),
        (lambda s: 0.001 + max(0, s - 1.5) ** 2, 1.0),  # a clamp that does nothing before it binds
    ],
)
def test_the_scale_is_found_at_which_a_control_costs_the_same(cost, start) -> None:
    asked: list[float] = []
    scale, found = matched_scale(lambda s: asked.append(s) or cost(s), 0.4, start)
    assert found == pytest.approx(cost(scale))
    assert found == pytest.approx(0.4, rel=0.1)
    assert len(asked) <= 8


def test_side_effects_that_are_never_met_give_the_nearest() -> None:
    asked: list[float] = []
    _, found = matched_scale(lambda s: asked.append(s) or 0.1 * s / (1 + s), 0.4)
    assert len(asked) == 8
    assert found == pytest.approx(max(0.1 * s / (1 + s) for s in asked))


def test_controls_change_neutral_text_as_much_as_the_direction(tiny: LanguageModel) -> None:
    own = difference_of_means(tiny, POSITIVE, NEGATIVE).get(1, -1)
    controls = [own.random(0), own.along(torch.ones(32))]
    found = matched_controls(tiny, own, lambda d, strength: add_direction(d, 2 * strength), controls, POSITIVE)
    edits = [add_direction(own, 2.0), *(add_direction(one.direction, 2 * one.strength) for one in found)]
    wanted, *kls = (one.kl_per_token for one in side_effects_of_each(tiny, POSITIVE, edits))
    assert [one.kl for one in found] == pytest.approx(kls, rel=1e-3)
    assert all(one.met and abs(kl / wanted - 1) <= TOLERANCE for one, kl in zip(found, kls, strict=True))
    assert [one.direction.norm for one in found] == pytest.approx([own.norm] * 2)


@pytest.mark.parametrize("strength", [0.0, 1.0, 3.0])
def test_strength_is_how_many_times_the_component_is_taken_out(tiny: LanguageModel, strength: float) -> None:
    direction = difference_of_means(tiny, POSITIVE, NEGATIVE).get(1, -1)
    site = "blocks.0.resid_pre"
    before, after = (
        tiny.run(POSITIVE[:1], edits=edits, capture=site, logits="last")[site][0]
        for edits in ([], ablate_direction(tiny, direction, strength))
    )
    along, left = before @ direction.unit, after @ direction.unit
    assert torch.allclose(left, (1 - strength) * along, atol=1e-4)
    assert torch.allclose(after - left[:, None] * direction.unit, before - along[:, None] * direction.unit, atol=1e-4)


def test_a_stronger_clamp_moves_the_bound_by_the_norm(tiny: LanguageModel) -> None:
    direction = difference_of_means(tiny, POSITIVE, NEGATIVE).get(1, -1)
    run = tiny.run(POSITIVE, capture="blocks.1.resid_post", edits=clamp_to_negative(tiny, direction, 1.5))
    along = run["blocks.1.resid_post"][run.tokens.mask] @ direction.unit
    assert along.max() <= direction.negative_projection - 0.5 * direction.norm + 1e-4


def test_side_effects_per_token_weigh_every_token_alike_and_where_chooses(tiny: LanguageModel) -> None:
    edits = [add("blocks.1.resid_post", torch.ones(32), scale=0.5)]
    kls = []
    for ids in POSITIVE:
        p, q = (tiny.run([ids], edits=some).logits[0].double().log_softmax(-1) for some in ([], edits))  # type: ignore[index]
        kls.append((p.exp() * (p - q)).sum(-1))
    (whole,) = side_effects_of_each(tiny, POSITIVE, [edits], batch_rows=2)
    assert whole.kl_per_token == pytest.approx(torch.cat(kls).mean().item(), rel=1e-3)
    where = torch.zeros(3, 6, dtype=torch.bool)
    where[0, 2], where[2, 5] = True, True
    (chosen,) = side_effects_of_each(tiny, POSITIVE, [edits], where=where, batch_rows=2)
    assert chosen.kl_per_token == pytest.approx((kls[0][2] + kls[2][5]).item() / 2, rel=1e-3)
    assert chosen.n_rows == 2
