"""Every loss term in every form against its equation, value and gradient of each parameter, dense and sparse."""

from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
from equations import Equation, Quantities, Selecting, by_equation
from torch import Tensor
from weights import apart, batch, random_parameters

from cutaway.artifacts.errors import CutawayError
from cutaway.dictionaries.training.config import TrainConfig
from cutaway.dictionaries.training.rules import BatchTopKRule, GatedRule, JumpReLURule, ReLURule, Rule, TopKRule
from cutaway.dictionaries.training.step import TrainingState, step
from cutaway.dictionaries.training.terms import (
    L0,
    AuxK,
    EndToEnd,
    GatedAuxiliary,
    Lp,
    Matryoshka,
    MultiTopK,
    PreActivation,
    QuadraticL0,
    Reconstruction,
    Tanh,
    Term,
)

D_IN, F, N = 10, 24, 9
DEAD = (1, 4, 7, 8, 13, 20, 22)
PROGRESS, VARIANCE = 0.25, 1.7
EXACT = 1e-10


@dataclass(frozen=True)
class Case:
    rule: Rule
    selecting: Selecting
    terms: tuple[Term, ...]
    equation: Equation
    kind: Literal["sae", "transcoder", "skip", "crosscoder"] = "sae"
    subtract_b_dec: bool = True


RELU = (ReLURule(), Selecting("relu"))
TOPK = (TopKRule(3), Selecting("topk", k=3))
TOPK_BY_NORM = (TopKRule(3, by_norm=True), Selecting("topk", k=3, by_norm=True))
BATCHTOPK = (BatchTopKRule(3), Selecting("batchtopk", k=3))
BATCHTOPK_BY_NORM = (BatchTopKRule(3, by_norm=True), Selecting("batchtopk", k=3, by_norm=True))
GATED = (GatedRule(), Selecting("gated"))
JUMP = (JumpReLURule(bandwidth=0.6), Selecting("jumprelu", bandwidth=0.6))
JUMP_THROUGH = (
    JumpReLURule(bandwidth=0.6, through_pre=True),
    Selecting("jumprelu", bandwidth=0.6, through_pre=True),
)
RULES = {
    "relu": RELU, "topk": TOPK, "topk by norm": TOPK_BY_NORM, "batchtopk": BATCHTOPK,
    "batchtopk by norm": BATCHTOPK_BY_NORM, "gated": GATED, "jumprelu": JUMP, "jumprelu through h": JUMP_THROUGH,
}  # fmt: skip


def sum_of_squares(q: Quantities) -> Tensor:
    return q.e.square().sum(1).mean()


def levels(q: Quantities, *ends: int) -> Tensor:
    """Σ of mean_b Σ_d e² over the prefixes."""
    return torch.stack([q.up_to(end).square().sum(1).mean() for end in ends]).sum()


def residual_form(q: Quantities, k: int) -> Tensor:
    off, r = q.missing(k)
    return off.square().sum(1).mean() / (r - r.mean(0)).square().sum(1).mean()


def token_form(q: Quantities, k: int) -> Tensor:
    off, r = q.missing(k)
    return (off.square().mean(1) / r.square().mean(1)).mean()


def gated_auxiliary(q: Quantities) -> Tensor:
    written = q.h.relu() @ q.D.detach() + q.base.detach()
    return (q.y - written).square().sum(1).mean()


def l1(q: Quantities) -> Tensor:
    return q.a.abs().sum(1).mean()


SUM = Reconstruction("sum")
# With the plain reconstruction each time, so that AuxK and the like have an error to look at.
TERMS: dict[str, tuple[tuple[Rule, Selecting], tuple[Term, ...], Equation]] = {
    "reconstruction sum": (TOPK, (SUM,), sum_of_squares),
    "reconstruction mean": (TOPK, (Reconstruction("mean"),), lambda q: q.e.square().mean()),
    "reconstruction fvu": (TOPK, (Reconstruction("fvu"),), lambda q: q.e.square().sum() / q.spread),
    "reconstruction variance": (TOPK, (Reconstruction("variance"),), lambda q: q.e.square().mean() / VARIANCE),
    "reconstruction weighted": (TOPK, (Reconstruction("sum", 0.3),), lambda q: 0.3 * sum_of_squares(q)),
    "matryoshka sum": (
        BATCHTOPK, (Matryoshka((0.25, 0.5, 1.0)),), lambda q: levels(q, 6, 12, 24),
    ),
    "matryoshka average": (
        BATCHTOPK, (Matryoshka((0.25, 0.5, 1.0), average=True),),
        lambda q: levels(q, 6, 12, 24) / 3,
    ),
    "matryoshka with bias level, mean": (
        BATCHTOPK, (Matryoshka((0.25, 0.5, 1.0), form="mean", average=True, bias_level=True),),
        lambda q: levels(q, 0, 6, 12, 24) / D_IN / 4,
    ),
    "matryoshka fvu": (
        TOPK, (Matryoshka((0.1, 1.0), form="fvu"),),
        lambda q: levels(q, 2, 24) * N / q.spread,
    ),
    "matryoshka jumprelu": (
        JUMP, (Matryoshka((0.5, 1.0), form="variance"), L0(0.2)),
        lambda q: levels(q, 12, 24) / D_IN / VARIANCE + 0.2 * q.over.sum(1).mean(),
    ),
    "l1": (RELU, (SUM, Lp(0.3)), lambda q: sum_of_squares(q) + 0.3 * l1(q)),
    "l1 warming up": (RELU, (SUM, Lp(0.3, warmup=0.4)), lambda q: sum_of_squares(q) + 0.3 * (0.25 / 0.4) * l1(q)),
    "l1 warmed up": (RELU, (SUM, Lp(0.3, warmup=0.1)), lambda q: sum_of_squares(q) + 0.3 * l1(q)),
    "l1 by norms": (
        RELU, (SUM, Lp(0.3, norms="l2")), lambda q: sum_of_squares(q) + 0.3 * (q.a * q.norms).sum(1).mean(),
    ),
    "lp 2 by norms": (
        RELU, (SUM, Lp(0.3, p=2.0, norms="l2")),
        lambda q: sum_of_squares(q) + 0.3 * (q.a.square() * q.norms).sum(1).mean(),
    ),
    "lp half": (
        RELU, (SUM, Lp(0.3, p=0.5)),
        lambda q: sum_of_squares(q) + 0.3 * q.a[q.a > 0].sqrt().sum() / N,
    ),
    "l1 of jumprelu by norms": (
        JUMP_THROUGH, (SUM, Lp(0.3, norms="l2")), lambda q: sum_of_squares(q) + 0.3 * (q.a * q.norms).sum(1).mean(),
    ),
    "l1 of the gate": (
        GATED, (SUM, Lp(0.3, of="gate"), GatedAuxiliary()),
        lambda q: sum_of_squares(q) + 0.3 * q.h.relu().sum(1).mean() + gated_auxiliary(q),
    ),
    "l1 of the gate by norms": (
        GATED, (SUM, Lp(0.3, norms="l2", of="gate"), GatedAuxiliary(0.5)),
        lambda q: sum_of_squares(q) + 0.3 * (q.h.relu() * q.norms).sum(1).mean() + 0.5 * gated_auxiliary(q),
    ),
    "l0": (JUMP, (SUM, L0(0.4)), lambda q: sum_of_squares(q) + 0.4 * q.over.sum(1).mean()),
    "l0 through h": (JUMP_THROUGH, (SUM, L0(0.4)), lambda q: sum_of_squares(q) + 0.4 * q.over.sum(1).mean()),
    "quadratic l0 by batch": (
        JUMP, (SUM, QuadraticL0(5.0, 2.0)),
        lambda q: sum_of_squares(q) + 2.0 * (q.over.sum(1).mean() / 5.0 - 1).square(),
    ),
    "quadratic l0 by token": (
        JUMP_THROUGH, (SUM, QuadraticL0(5.0, 2.0, per="token")),
        lambda q: sum_of_squares(q) + 2.0 * ((2 / 5.0) * (q.over.sum(1) - 5.0).square()).mean(),
    ),
    "tanh": (
        JUMP_THROUGH, (SUM, Tanh(0.7)),
        lambda q: sum_of_squares(q) + 0.7 * 0.25 * torch.tanh(4 * q.a * q.norms).sum(1).mean(),
    ),
    "tanh without norms": (
        RELU, (SUM, Tanh(0.7, scale=2.0, norms="none", warmup=0.0)),
        lambda q: sum_of_squares(q) + 0.7 * torch.tanh(2 * q.a).sum(1).mean(),
    ),
    "pre-activation of jumprelu": (
        JUMP, (SUM, L0(0.1), PreActivation(0.2)),
        lambda q: sum_of_squares(q) + 0.1 * q.over.sum(1).mean()
        + 0.2 * ((q.theta - q.h).relu() * q.norms).sum(1).mean(),
    ),
    "pre-activation of the dead, without norms": (
        TOPK, (SUM, PreActivation(0.2, norms="none", dead_only=True)),
        lambda q: sum_of_squares(q) + 0.2 * (-q.h[:, q.dead]).relu().sum(1).mean(),
    ),
    "auxk sum": (
        TOPK, (SUM, AuxK(0.5, k=2, form="sum")),
        lambda q: sum_of_squares(q) + 0.5 * q.missing(2)[0].square().sum(1).mean(),
    ),
    "auxk mean, half the width": (
        TOPK, (SUM, AuxK(0.5, form="mean")),
        lambda q: sum_of_squares(q) + 0.5 * q.missing(D_IN // 2)[0].square().mean(),
    ),
    "auxk fvu by share": (
        TOPK, (SUM, AuxK(0.5, k=14, form="fvu", by_share=True)),
        lambda q: sum_of_squares(q) + 0.5 * (len(DEAD) / 14) * q.missing(14)[0].square().sum() / q.spread,
    ),
    "auxk by share, more dead than k": (
        TOPK, (SUM, AuxK(0.5, k=2, form="sum", by_share=True)),
        lambda q: sum_of_squares(q) + 0.5 * q.missing(2)[0].square().sum(1).mean(),
    ),
    "auxk residual": (
        BATCHTOPK, (SUM, AuxK(0.5, k=3, form="residual")),
        lambda q: sum_of_squares(q) + 0.5 * residual_form(q, 3),
    ),
    "auxk token": (TOPK, (SUM, AuxK(0.5, k=3, form="token")), lambda q: sum_of_squares(q) + 0.5 * token_form(q, 3)),
    "multi-topk": (
        TOPK, (SUM, MultiTopK(4, 1 / 8)),
        lambda q: sum_of_squares(q) + (q.strongest(12) @ q.D + q.base - q.y).square().sum() / q.spread / 8,
    ),
    "multi-topk of all": (
        TOPK, (SUM, MultiTopK(10, 0.5, form="sum")),
        lambda q: sum_of_squares(q) + 0.5 * (q.strongest(24) @ q.D + q.base - q.y).square().sum(1).mean(),
    ),
    "two of a kind": (
        RELU, (SUM, Lp(0.3), Lp(0.2, p=2.0)),
        lambda q: sum_of_squares(q) + (0.3 * q.a + 0.2 * q.a.square()).sum() / N,
    ),
}  # fmt: skip


def check(case: Case, way: Literal["dense", "sparse"], seed: int = 0) -> None:
    width = {"sae": None, "transcoder": 7, "skip": 7, "crosscoder": None}[case.kind]
    parameters = random_parameters(
        D_IN, F, case.rule, d_out=width, skip=case.kind == "skip", seed=seed,
        blocks=(4, 6) if case.kind == "crosscoder" else (),
    )  # fmt: skip
    x = batch(N, D_IN, seed + 100)
    y = None if width is None else batch(N, width, seed + 200)
    expected, gradients = by_equation(
        parameters, case.selecting, case.equation, x, y, subtract_b_dec=case.subtract_b_dec, dead=DEAD
    )
    result = step(
        parameters, case.rule, case.terms, x, y, subtract_b_dec=case.subtract_b_dec,
        state=TrainingState(torch.tensor(DEAD), VARIANCE, PROGRESS), way=way,
    )  # fmt: skip
    assert result.sparse is (way == "sparse")
    assert apart(result.loss, expected) < EXACT
    found = result.gradients.tensors()
    assert set(found) == set(gradients)
    for name, gradient in gradients.items():
        assert apart(found[name], gradient) < EXACT, name


@pytest.mark.parametrize("way", ["dense", "sparse"])
@pytest.mark.parametrize("name", TERMS)
def test_a_term_equals_its_equation(name: str, way: Literal["dense", "sparse"]) -> None:
    (rule, selecting), terms, equation = TERMS[name]
    check(Case(rule, selecting, terms, equation), way)


def plain(rule: Rule) -> tuple[tuple[Term, ...], Equation]:
    """The plainest loss that a selector can be trained with."""
    if isinstance(rule, TopKRule | BatchTopKRule):
        return (SUM,), sum_of_squares
    if isinstance(rule, JumpReLURule):
        return (SUM, L0(0.3)), lambda q: sum_of_squares(q) + 0.3 * q.over.sum(1).mean()
    return (SUM, Lp(0.3)), lambda q: sum_of_squares(q) + 0.3 * l1(q)


@pytest.mark.parametrize("way", ["dense", "sparse"])
@pytest.mark.parametrize("kind", ["sae", "sae without b_dec in", "transcoder", "skip", "crosscoder"])
@pytest.mark.parametrize("name", RULES)
def test_every_selector_in_every_kind_of_dictionary(name: str, kind: str, way: Literal["dense", "sparse"]) -> None:
    rule, selecting = RULES[name]
    terms, equation = plain(rule)
    case = Case(rule, selecting, terms, equation)
    if kind == "sae without b_dec in":
        case = replace(case, subtract_b_dec=False)
    elif kind in ("transcoder", "skip"):
        case = replace(case, kind=kind, subtract_b_dec=False)
    elif kind == "crosscoder":
        case = replace(
            case, kind="crosscoder", terms=(SUM, Lp(0.3, norms="sum")),
            equation=lambda q: sum_of_squares(q) + 0.3 * (q.a * q.summed_norms).sum(1).mean(),
        )  # fmt: skip
    for seed in range(3):
        check(case, way, seed)


def test_terms_are_reported_by_name_and_sum_to_the_loss() -> None:
    rule, _ = RELU
    parameters, x = random_parameters(D_IN, F, rule), batch(N, D_IN, 1)
    result = step(parameters, rule, (SUM, Lp(0.3), Lp(0.2, p=2.0)), x)
    assert list(result.terms) == ["reconstruction", "lp", "lp_2"]
    assert torch.equal(result.loss, torch.stack(list(result.terms.values())).sum())


def test_the_end_to_end_term_sends_the_gradient_through_what_comes_after() -> None:
    """With downstream(ŷ) = mean_b Σ_d c·(ŷ − y)² the term is a reconstruction weighted by c."""
    rule, selecting = TOPK
    parameters, x = random_parameters(D_IN, F, rule), batch(N, D_IN, 1)
    c = batch(1, D_IN, 2).abs()
    result = step(
        parameters, rule, (EndToEnd(0.7),), x, downstream=lambda written: (c * (written - x).square()).sum(1).mean()
    )
    expected, gradients = by_equation(parameters, selecting, lambda q: 0.7 * (c * q.e.square()).sum(1).mean(), x)
    assert apart(result.loss, expected) < EXACT
    for name, gradient in gradients.items():
        assert apart(getattr(result.gradients, name), gradient) < EXACT, name
    with pytest.raises(CutawayError, match="the end-to-end term needs the model"):
        step(parameters, rule, (EndToEnd(),), x)


def test_terms_that_do_not_go_with_a_selector_are_refused() -> None:
    def config(rule: Rule, *terms: Term) -> TrainConfig:
        return TrainConfig(d_sae=64, selector=rule, terms=terms)

    with pytest.raises(CutawayError, match="no reconstruction term"):
        config(TopKRule(3), AuxK())
    with pytest.raises(CutawayError, match="'l0' learns thresholds: it goes with jumprelu, not relu"):
        config(ReLURule(), SUM, L0(1.0))
    with pytest.raises(CutawayError, match="'multi_topk' goes with topk, not batchtopk"):
        config(BatchTopKRule(3), SUM, MultiTopK())
    with pytest.raises(CutawayError, match="on the gate goes with gated, not relu"):
        config(ReLURule(), SUM, Lp(1.0, of="gate"))
    with pytest.raises(CutawayError, match="nothing makes gated sparse"):
        config(GatedRule(), SUM, GatedAuxiliary())
    with pytest.raises(CutawayError, match="ascending shares"):
        Matryoshka((0.5, 0.25, 1.0))
    with pytest.raises(CutawayError, match="64 latents are too few for the prefixes"):
        config(TopKRule(3), Matryoshka((1e-4, 2e-4, 1.0)))
