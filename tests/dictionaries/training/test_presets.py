"""Presets: what they ask for, how they scale with the run, and what they refuse."""

from typing import Any, Literal

import pytest
import torch
from equations import Equation, Quantities, Selecting, by_equation
from torch import Tensor
from weights import apart, batch, random_parameters

from cutaway.artifacts.errors import CutawayError
from cutaway.dictionaries.training.config import TrainConfig
from cutaway.dictionaries.training.presets import PRESETS, preset
from cutaway.dictionaries.training.rules import BatchTopKRule, TopKRule
from cutaway.dictionaries.training.step import TrainingState, step
from cutaway.dictionaries.training.terms import L0, Lp, QuadraticL0, Tanh


@pytest.mark.parametrize("name", PRESETS)
def test_each_is_a_configuration_that_can_be_written_and_read(name: str) -> None:
    config = preset(name, d_in=48, d_sae=96, tokens=64_000, batch=64, seed=3)
    assert (config.d_sae, config.tokens, config.batch, config.seed) == (96, 64_000, 64, 3)
    assert TrainConfig.from_json(config.to_json()) == config
    assert config.subtract_b_dec is False or PRESETS[name].kind in {"sae", "crosscoder"}
    assert config.skip is (PRESETS[name].kind == "skip_transcoder")


@pytest.mark.parametrize("name", PRESETS)
def test_what_controls_its_sparsity_is_taken_and_nothing_else(name: str) -> None:
    control = PRESETS[name].control
    if control == "k":
        selector = preset(name, d_in=48, k=7).selector
        assert isinstance(selector, TopKRule | BatchTopKRule)
        assert selector.k == 7
        with pytest.raises(CutawayError, match=f"{name} has no sparsity: its sparsity is set by k"):
            preset(name, d_in=48, sparsity=1.0)
        return
    sparse = [term for term in preset(name, d_in=48, sparsity=0.123).terms if isinstance(term, Lp | L0 | Tanh)]
    assert [term.coefficient for term in sparse] == [0.123]
    with pytest.raises(CutawayError, match=f"{name} has no k"):
        preset(name, d_in=48, k=7)
    if control == "coefficient or l0":
        terms = preset(name, d_in=48, l0=20).terms
        assert [term.target for term in terms if isinstance(term, QuadraticL0)] == [20]
        assert not any(isinstance(term, L0 | Tanh) for term in terms)
        with pytest.raises(CutawayError, match="not both"):
            preset(name, d_in=48, l0=20, sparsity=1.0)
    else:
        with pytest.raises(CutawayError, match=f"{name} has no l0"):
            preset(name, d_in=48, l0=20)


def test_overrides_win_and_are_checked() -> None:
    config = preset("openai-topk", d_in=48, learning_rate=1e-5, terms=({"kind": "reconstruction", "form": "fvu"},))
    assert config.learning_rate == 1e-5
    assert [term.kind for term in config.terms] == ["reconstruction"]
    with pytest.raises(CutawayError, match="'openai' is not a preset: there are anthropic-2023, anthropic-2024"):
        preset("openai", d_in=48)
    with pytest.raises(CutawayError, match="'rate' is not a field of a training configuration: there are d_sae, "):
        preset("openai-topk", d_in=48, rate=1)
    with pytest.raises(CutawayError, match="warmup"):
        preset("openai-topk", d_in=48, warmup="soon")
    with pytest.raises(CutawayError, match=r"k = -3: it must be positive"):
        preset("openai-topk", d_in=48, k=-3)
    with pytest.raises(CutawayError, match="k = 97 latents cannot be active out of d_sae = 96"):
        preset("openai-topk", d_in=48, d_sae=96, k=97)
    with pytest.raises(CutawayError, match="a dictionary has 1 latent or more"):
        preset("batchtopk", d_in=48, d_sae=0)
    with pytest.raises(CutawayError, match="d_in = 0"):
        preset("batchtopk", d_in=0)
    with pytest.raises(CutawayError, match="batch = 0"):
        preset("batchtopk", d_in=48, batch=0)


def test_counts_of_the_source_are_scaled_to_a_short_run_and_kept_in_a_long_one() -> None:
    def gemma(tokens: int) -> TrainConfig:
        return preset("gemma-scope-1", d_in=48, tokens=tokens, batch=4_096)

    long, short = gemma(4_096_000_000), gemma(4_096 * 10_000)
    assert long.learning_rate == 7e-5
    assert (long.warmup, long.dead_after) == (1_000, 10_000_000)
    sparse = [term for term in long.terms if isinstance(term, L0)]
    assert sparse[0].warmup == 10_000 / 1_000_000
    assert short.learning_rate == pytest.approx(7e-5 * 10)
    assert (short.warmup, short.dead_after) == (500, 4_096 * 10_000 // 16)
    assert gemma(4_096 * 50).learning_rate == 3e-3


# The losses, written down once more from their sources. λ is 0.3 and k 3 wherever there is one; half of training is
# over, so a ramp over all of it stands at ½, and the shorter ones at 1. e = ŷ − y; d = 12; 6 prefixes' ends of F = 32.
D_IN, F, N = 12, 32, 8
DEAD, VARIANCE = (0, 3, 5, 11, 17, 26, 30), 1.3


def squares(q: Quantities) -> Tensor:
    return q.e.square().sum(1).mean()


def auxk_mean(q: Quantities) -> Tensor:
    """1/32 · mean over tokens and dimensions; 512 latents are more than are dead."""
    return q.missing(512)[0].square().mean() / 32


def auxk_residual(q: Quantities) -> Tensor:
    off, r = q.missing(D_IN // 2)
    return off.square().sum() / (r - r.mean(0)).square().sum() / 32


def gate(q: Quantities) -> Tensor:
    return (q.y - q.h.relu() @ q.D.detach() - q.b_dec.detach()).square().sum(1).mean()


def anthropic_2025(q: Quantities) -> Tensor:
    sparse = 0.3 * 0.5 * torch.tanh(4 * q.a * q.norms).sum(1).mean()
    return squares(q) + sparse + 3e-6 * ((q.theta - q.h).relu() * q.norms).sum(1).mean()


def nested(q: Quantities) -> Tensor:
    return torch.stack([q.up_to(end).square().mean() for end in (0, 2, 4, 8, 16, 32)]).mean() + auxk_mean(q)


def l1(q: Quantities) -> Tensor:
    return squares(q) + 0.3 * q.a.abs().sum(1).mean()


TOPK, BATCHTOPK, RELU = Selecting("topk", k=3), Selecting("batchtopk", k=3), Selecting("relu")
EQUATIONS: dict[str, tuple[Selecting, Equation]] = {
    "anthropic-2023": (RELU, l1),
    "anthropic-2024": (RELU, lambda q: squares(q) + 0.3 * (q.a * q.norms).sum(1).mean()),
    "anthropic-2025": (Selecting("jumprelu", bandwidth=2.0, through_pre=True), anthropic_2025),
    "openai-topk": (TOPK, lambda q: q.e.square().mean() / VARIANCE + auxk_residual(q)),
    "gated-2024": (Selecting("gated"), lambda q: squares(q) + 0.3 * q.h.relu().sum(1).mean() + gate(q)),
    "gemma-scope-1": (Selecting("jumprelu", bandwidth=0.001), lambda q: squares(q) + 0.3 * q.over.sum(1).mean()),
    "batchtopk": (BATCHTOPK, lambda q: q.e.square().mean() + auxk_mean(q)),
    "matryoshka": (BATCHTOPK, nested),
    "sparsify": (TOPK, lambda q: q.e.square().sum() / q.spread),
    "saprmarks": (RELU, l1),
    "transcoder": (RELU, l1),
    "skip-transcoder": (TOPK, lambda q: q.e.square().sum() / q.spread),
    "crosscoder-2024": (RELU, lambda q: squares(q) + 0.3 * (q.a * q.summed_norms).sum(1).mean()),
}
TARGETED: dict[str, Equation] = {
    "anthropic-2025": lambda q: squares(q) + D_IN * (q.over.sum(1).mean() / 6 - 1).square()
    + 3e-6 * ((q.theta - q.h).relu() * q.norms).sum(1).mean(),
    "gemma-scope-1": lambda q: squares(q) + (q.over.sum(1).mean() / 6 - 1).square(),
}  # fmt: skip


def check(name: str, equation: Equation, way: Literal["dense", "sparse"], **control: Any) -> None:
    kind, selecting = PRESETS[name].kind, EQUATIONS[name][0]
    config = preset(name, d_in=D_IN, d_sae=F, **control)
    width = 7 if "transcoder" in kind else None
    parameters = random_parameters(
        D_IN, F, config.selector, d_out=width, skip=config.skip, blocks=(5, 7) if kind == "crosscoder" else (), seed=3
    )
    x = batch(N, D_IN, 4)
    y = None if width is None else batch(N, width, 5)
    if selecting.name == "jumprelu" and parameters.threshold is not None:  # a narrow window has to hold something
        parameters.threshold.copy_((x @ parameters.encoder.T + parameters.encoder_bias).abs()[2] + 0.0002)
    expected, gradients = by_equation(
        parameters, selecting, equation, x, y, subtract_b_dec=config.subtract_b_dec, dead=DEAD
    )
    result = step(
        parameters, config.selector, config.terms, x, y, subtract_b_dec=config.subtract_b_dec,
        state=TrainingState(torch.tensor(DEAD), VARIANCE, 0.5), way=way,
    )  # fmt: skip
    assert apart(result.loss, expected) < 1e-10
    found = result.gradients.tensors()
    assert set(found) == set(gradients)
    for parameter, gradient in gradients.items():
        assert gradient.norm() > 0, parameter
        assert apart(found[parameter], gradient) < 1e-10, parameter


@pytest.mark.parametrize("way", ["dense", "sparse"])
@pytest.mark.parametrize("name", PRESETS)
def test_loss_and_gradients_equal_the_written_equation(name: str, way: Literal["dense", "sparse"]) -> None:
    control = {"k": 3} if PRESETS[name].control == "k" else {"sparsity": 0.3}
    check(name, EQUATIONS[name][1], way, **control)


@pytest.mark.parametrize("way", ["dense", "sparse"])
@pytest.mark.parametrize("name", TARGETED)
def test_a_target_l0_has_the_written_equation_too(name: str, way: Literal["dense", "sparse"]) -> None:
    check(name, TARGETED[name], way, l0=6)
