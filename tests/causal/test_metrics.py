"""Metrics against float64 formulas, recovery and its ratio of means, and which metrics have a gradient."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.causal.metrics import (
    METRICS,
    UNITS,
    Targets,
    differentiable,
    kl_from_clean,
    named_metric,
    probability_difference,
    rank,
    ratio_of_means,
    recovery,
)

ROWS, V = 5, 13


def _targets(several: bool = False) -> tuple[Tensor, Targets]:
    generator = torch.Generator().manual_seed(1)
    logits, clean = (3 * torch.randn(ROWS, V, generator=generator) for _ in range(2))
    answer, wrong = torch.arange(ROWS), torch.arange(ROWS) + 6
    answers = wrongs = None
    if several:
        answers, wrongs = (torch.zeros(ROWS, V, dtype=torch.bool) for _ in range(2))
        for row in range(ROWS):
            answers[row, [row, 11]] = True
            wrongs[row, [row + 6, 12]] = True
    return logits, Targets(answer, wrong, clean, answers, wrongs)


def _softmax(row: list[float]) -> list[float]:
    top = max(row)
    e = [math.exp(x - top) for x in row]
    return [x / sum(e) for x in e]


def _by_formula(name: str, z: list[float], clean: list[float], right: list[int], wrong: list[int]) -> float:
    p, q = _softmax(z), _softmax(clean)
    return {
        "logit_difference": lambda: z[right[0]] - z[wrong[0]],
        "probability": lambda: p[right[0]],
        "probability_difference": lambda: sum(p[i] for i in right) - sum(p[i] for i in wrong),
        "kl": lambda: sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)),
        "nll": lambda: -math.log(p[right[0]]),
        "rank": lambda: sorted(z, reverse=True).index(z[right[0]]) + 1.0,
    }[name]()


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("name", METRICS)
def test_metrics_are_their_formulas(name: str, several: bool) -> None:
    logits, targets = _targets(several)
    measured = named_metric(name)[1](logits, targets)
    assert measured.shape == (ROWS,)
    assert name in UNITS
    for row in range(ROWS):
        right, wrong = [row, *([11] if several else [])], [row + 6, *([12] if several else [])]
        z, clean = logits[row].double().tolist(), targets.clean[row].double().tolist()
        assert measured[row].item() == pytest.approx(_by_formula(name, z, clean, right, wrong), abs=2e-5)
    assert kl_from_clean(targets.clean, targets).tolist() == pytest.approx([0.0] * ROWS, abs=1e-6)


def test_rank_is_one_at_the_top_and_ties_do_not_count() -> None:
    z = torch.tensor([[5.0, 1.0, 5.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    targets = Targets(torch.tensor([0, 0]), torch.tensor([1, 1]), z)
    assert rank(z, targets).tolist() == [1.0, 4.0]


@pytest.mark.parametrize("name", METRICS)
def test_what_has_a_gradient_says_so(name: str) -> None:
    logits, targets = _targets()
    logits = logits.clone().requires_grad_()
    value = METRICS[name](logits, targets).sum()
    assert differentiable(name) == value.requires_grad
    assert differentiable(METRICS[name]) == value.requires_grad
    if differentiable(name):
        (gradient,) = torch.autograd.grad(value, logits)
        assert float(gradient.abs().max()) > 0


def test_the_users_function_is_a_metric() -> None:
    def margin(logits: Tensor, _: Targets) -> Tensor:
        return logits[:, 0]

    name, measured = named_metric(margin)
    logits, targets = _targets()
    assert name == "margin"
    assert torch.equal(measured(logits, targets), margin(logits, targets))
    assert named_metric(measured) == ("margin", measured)
    assert differentiable(margin)
    assert named_metric(probability_difference)[0] == "probability_difference"
    with pytest.raises(CutawayError, match=r"'accuracy'.*logit_difference, probability, .*rank"):
        named_metric("accuracy")


def test_recovery_leaves_out_pairs_that_hardly_differ() -> None:
    clean, corrupt = torch.tensor([2.0, 1.0, 0.001]), torch.tensor([0.0, -1.0, 0.0])
    patched = torch.tensor([[1.0, 1.0, 5.0]])
    value, usable = recovery(patched, clean, corrupt)
    assert usable.tolist() == [True, True, False]
    assert value[0, :2].tolist() == [0.5, 1.0]
    assert value[0, 2].isnan()


def test_the_ratio_of_means_is_not_the_mean_of_ratios() -> None:
    """Pairs that differ by 1 and by 9, restored wholly and not at all: half of the pairs, a tenth of the difference."""
    clean, corrupt, patched = torch.tensor([1.0, 9.0]), torch.tensor([0.0, 0.0]), torch.tensor([[1.0, 0.0]])
    assert recovery(patched, clean, corrupt, guard=0.0)[0].mean(-1).tolist() == [0.5]
    assert ratio_of_means(patched, clean, corrupt).tolist() == pytest.approx([0.1])


@pytest.mark.parametrize(
    ("gives", "says"), [(torch.zeros(()), "shape []"), (torch.zeros(2, V), f"shape [2, {V}]"), (1.0, "float")]
)
def test_a_function_that_gives_no_number_a_prompt_is_refused(gives: Any, says: str) -> None:
    def odd(logits: Tensor, targets: Targets) -> Any:
        return gives

    with pytest.raises(CutawayError) as error:
        named_metric(odd)[1](*_targets())
    assert "the metric odd must give a tensor with one number per prompt, [5]" in str(error.value)
    assert str(error.value).endswith(f"it gave {says}")
