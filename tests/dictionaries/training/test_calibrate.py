"""The threshold for a wanted number of active latents, against sorting every pre-activation of the sample."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from weights import batch

from cutaway.artifacts.errors import CutawayError
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.selectors import BatchTopK, Gated, JumpReLU, ReLU, Selector, TopK
from cutaway.dictionaries.training.calibrate import calibrate

D, F = 8, 60


def dictionary(selector: Selector, bias: float = 0.0) -> Dictionary:
    return Dictionary(
        W_enc=batch(D, F, 0, torch.float32), b_enc=batch(1, F, 1, torch.float32)[0] * 0.5 + bias,
        W_dec=batch(F, D, 2, torch.float32), b_dec=batch(1, D, 3, torch.float32)[0], selector=selector, site="s",
    )  # fmt: skip


def uneven(n: int, batches: int) -> list[Tensor]:
    """Batches of different sizes; what is in the first is 30 times as large as in the others."""
    parts = [batch(n + 7 * number, D, 10 + number, torch.float32) for number in range(batches)]
    return [30 * parts[0], *parts[1:]]


def by_sorting(d: Dictionary, sample: list[Tensor], l0: float) -> tuple[float, int]:
    """The threshold, and how many pre-activations are to lie above it: the (l0·N + 1)-th of all, or 0."""
    pre = torch.cat([d.pre_activations(x) for x in sample]).flatten().tolist()
    wanted = round(l0 * sum(len(x) for x in sample))
    return max(0.0, sorted(pre, reverse=True)[wanted]), wanted


@pytest.mark.parametrize("l0", [0.02, 1.0, 3.7, 20.0, 29.0])
@pytest.mark.parametrize("selector", [ReLU(), TopK(5), BatchTopK(5, 0.3)], ids=lambda s: s.name)
def test_it_is_the_one_that_sorting_everything_finds(selector: Selector, l0: float) -> None:
    d, sample = dictionary(selector), uneven(40, 5)
    found = calibrate(d, lambda: sample, l0)
    threshold, wanted = by_sorting(d, sample, l0)
    assert isinstance(found.selector, BatchTopK)
    assert found.selector.threshold == pytest.approx(threshold, rel=1e-6)
    assert found.selector.k == max(1, round(l0))
    active = sum(int((found.encode(x) > 0).sum()) for x in sample)
    assert abs(active - wanted) <= 1  # the one that is the threshold may round to either side


def test_all_that_is_positive_is_the_most_there_can_be() -> None:
    d, sample = dictionary(ReLU(), bias=-1.0), uneven(40, 3)
    pre = torch.cat([d.pre_activations(x) for x in sample])
    positive = int((pre > 0).sum())
    found = calibrate(d, lambda: sample, positive / len(pre))
    assert isinstance(found.selector, BatchTopK)
    assert found.selector.threshold == 0.0
    with pytest.raises(CutawayError, match="latents are positive on a token, fewer than the wanted 60"):
        calibrate(d, lambda: sample, 60)


def test_one_token_that_holds_nearly_all_is_no_exception() -> None:
    """A batch's share is at first guessed to be at most four times the mean; here one batch has all but one."""
    d = dictionary(ReLU(), bias=-4.0)
    sample = [batch(50, D, 5, torch.float32) * 0.01 for _ in range(30)]
    sample[11] = batch(50, D, 6, torch.float32) * 50
    pre = torch.cat([d.pre_activations(x) for x in sample])
    l0 = (int((pre > 0).sum()) - 3) / len(pre)
    found = calibrate(d, lambda: sample, l0)
    assert isinstance(found.selector, BatchTopK)
    assert found.selector.threshold == pytest.approx(by_sorting(d, sample, l0)[0], rel=1e-6)


def test_what_cannot_be_calibrated_is_said() -> None:
    def nothing() -> Iterator[Tensor]:
        return iter(())

    with pytest.raises(CutawayError, match="a jumprelu dictionary has thresholds of its own"):
        calibrate(dictionary(JumpReLU(torch.ones(F))), lambda: uneven(4, 1), 3)
    with pytest.raises(CutawayError, match="a gated dictionary has thresholds of its own"):
        calibrate(dictionary(Gated(torch.zeros(F), torch.zeros(F))), lambda: uneven(4, 1), 3)
    with pytest.raises(CutawayError, match="there are no activations"):
        calibrate(dictionary(ReLU()), nothing, 3)
    for l0 in (0.0, -1.0, float("nan")):
        with pytest.raises(CutawayError, match="more than 0 active latents"):
            calibrate(dictionary(ReLU()), lambda: uneven(4, 1), l0)
