"""A model's identity is of the weights as they are: a change in place is noticed."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import cutaway
from cutaway import CutawayError
from cutaway.model.language_model import LanguageModel

SITE = "blocks.1.resid_post"


def under_no_grad(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(1.5)


def one_entry(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.view(-1)[7] += 1


def through_an_optimizer(weight: nn.Parameter) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()


def through_data(weight: nn.Parameter) -> None:
    weight.data.mul_(1.5)


def other_data(weight: nn.Parameter) -> None:
    weight.data = weight.data * 1.5


@pytest.fixture
def lm(tiny: LanguageModel) -> LanguageModel:
    return cutaway.attach(copy.deepcopy(tiny.hf), name="tiny")


@pytest.mark.parametrize("change", [under_no_grad, one_entry, through_an_optimizer, through_data, other_data])
def test_identity_notices_a_change_in_place(lm: LanguageModel, change: Callable[[nn.Parameter], None]) -> None:
    before = lm.identity()
    assert lm.identity() is before
    run = lm.run([2, 3, 4], capture=SITE)
    change(lm.hf.model.layers[0].mlp.down_proj.weight)  # type: ignore[union-attr]
    after = lm.identity()
    assert after.weight_hash != before.weight_hash
    assert after == cutaway.attach(lm.hf, name="tiny").identity()
    assert run.identity() == before
    with pytest.raises(CutawayError, match="weights were changed since"):
        lm.run([2, 3, 4], resume=run, edits=cutaway.zero("blocks.2.mlp.out"))
    with pytest.raises(CutawayError, match="another model"):
        lm.run([2, 3, 4], edits=cutaway.patch(SITE, run))
    lm.run([2, 3, 4], edits=cutaway.patch(SITE, run, other_model=True))
    again = lm.run([2, 3, 4], capture=SITE)
    lm.run([2, 3, 4], resume=again, edits=cutaway.patch(SITE, again))


def test_a_run_whose_weights_nobody_hashed_says_so(lm: LanguageModel) -> None:
    run = lm.run([2, 3, 4], capture=SITE)
    under_no_grad(lm.hf.model.embed_tokens.weight)  # type: ignore[union-attr]
    with pytest.raises(CutawayError, match="changed in place since this was run"):
        run.identity()
    with pytest.raises(CutawayError, match="run it again"):
        lm.run([2, 3, 4], edits=cutaway.patch(SITE, run))


def test_moving_is_no_change(lm: LanguageModel) -> None:
    run = lm.run([2, 3, 4], capture=SITE)
    torch.nn.Module.to(lm.hf, "cpu", torch.float64)  # transformers types its own .to wrongly
    torch.nn.Module.to(lm.hf, torch.float32)
    lm.hf.requires_grad_(False).train().eval()
    assert run.identity() == lm.identity()
    lm.run([2, 3, 4], resume=run, edits=cutaway.patch(SITE, run))
