"""Training by presets: schedules as tables, rates at the start, revival of the dead; each learns what is there."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from planted import planted
from torch import Tensor

from cutaway.dictionaries.dictionary import Dictionary, Port
from cutaway.dictionaries.training.calibrate import calibrate
from cutaway.dictionaries.training.config import Resample, TrainConfig
from cutaway.dictionaries.training.presets import PRESETS, preset
from cutaway.dictionaries.training.rules import BatchTopKRule, ReLURule, TopKRule
from cutaway.dictionaries.training.terms import Lp, Reconstruction, Tanh
from cutaway.dictionaries.training.trainer import Trainer

PLAIN = TrainConfig(d_sae=48, selector=TopKRule(3), terms=(Reconstruction(),), tokens=20 * 64, batch=64, dead_after=640)


@cache
def centred() -> tuple[Tensor, Tensor]:
    """48 features in 24 dimensions, 2 on at a time, without the offset."""
    features, x = planted(d=24, n_features=48, n_tokens=8_192, active=2, seed=0)
    return features, x - x.mean(0)


def some(x: Tensor, number: int, size: int = 64) -> Tensor:
    return x[torch.randint(len(x), (size,), generator=torch.Generator().manual_seed(number))]


def variance_explained(dictionary: Dictionary, x: Tensor, y: Tensor) -> float:
    return 1 - ((dictionary(x) - y).square().sum() / (y - y.mean(0)).square().sum()).item()


def test_the_learning_rate_is_the_plain_table() -> None:
    config = replace(PLAIN, learning_rate=1.0, warmup=4, decay=0.25)
    table = [0.25, 0.5, 0.75, *[1.0] * 13, 0.8, 0.6, 0.4, 0.2]
    assert [config.rate(step) for step in range(20)] == pytest.approx(table)
    assert [replace(config, warmup=0, decay=0.0).rate(step) for step in range(20)] == [1.0] * 20
    falling = replace(config, warmup=0, decay=1.0)
    assert [falling.rate(step) for step in range(20)] == pytest.approx([1 - step / 20 for step in range(20)])
    assert replace(config, learning_rate=None, d_sae=2**16, warmup=0).rate(3) == pytest.approx(1e-4)
    trainer = Trainer(config, some(centred()[1], 0))
    used = []
    for number in range(20):
        trainer.step(some(centred()[1], number))
        used.append(trainer.adam.param_groups[0]["lr"])
    assert used == pytest.approx(table)


@pytest.mark.parametrize("over", [0.0, 0.3, 1.0])
def test_coefficients_rise_as_the_plain_table(over: float) -> None:
    x = centred()[1]
    terms = (Reconstruction(), Lp(0.7, warmup=over), Tanh(0.4, norms="none", warmup=over))
    trainer = Trainer(replace(PLAIN, selector=ReLURule(), terms=terms), x[:512])
    for number in range(20):
        p, batch = trainer.parameters, some(x, number)
        a = ((trainer.prepared(batch)[0] - p.decoder_bias) @ p.encoder.T + p.encoder_bias).relu()
        expected = {"lp": 0.7 * a.sum(1).mean().item(), "tanh": 0.4 * torch.tanh(4 * a).sum(1).mean().item()}
        share = 1.0 if over == 0 else min(1.0, (number / 20) / over)
        result = trainer.step(batch)
        for name, value in expected.items():
            assert result.terms[name].item() == pytest.approx(share * value, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(
    "rule", [TopKRule(3, start_k=11, anneal=0.5), BatchTopKRule(3, start_k=11, anneal=0.5)], ids=str
)
def test_k_falls_as_the_plain_table(rule: TopKRule | BatchTopKRule) -> None:
    x = centred()[1]
    trainer = Trainer(replace(PLAIN, selector=rule, active=24), x[:512])
    found = [round(trainer.step(some(x, number)).active_tokens.sum().item() / 64, 1) for number in range(20)]
    assert found == pytest.approx([11, 10, 9, 9, 8, 7, 6, 5, 5, 4, *[3] * 10], abs=0.2)  # 11 − 0.8 a step, rounded


@pytest.mark.parametrize("active", [3, 12, 24, 10_000])
def test_rate_calibrated_biases_give_the_rate(active: int) -> None:
    """10,000 latents of 96 would be all of them: at most a half is asked for."""
    x = planted(d=24, n_features=48, n_tokens=8_192, active=2, seed=0)[1]
    config = preset("anthropic-2025", d_in=24, d_sae=96, active=active, tokens=64_000)
    trainer = Trainer(config, x)
    p = trainer.parameters
    assert p.threshold is not None
    fires = (trainer.prepared(x)[0] @ p.encoder.T + p.encoder_bias > p.threshold).float().mean(0)
    torch.testing.assert_close(fires, torch.full((96,), min(0.5, active / 96)), rtol=0, atol=2e-3)


def test_pre_activations_that_are_centred_have_mean_zero() -> None:
    x = planted(d=24, n_features=48, n_tokens=8_192, active=2, seed=0)[1]
    trainer = Trainer(preset("skip-transcoder", d_in=24, d_sae=96, k=3), x, x[:, :7] + 0)
    p = trainer.parameters
    h = trainer.prepared(x)[0] @ p.encoder.T + p.encoder_bias
    assert h.mean(0).abs().max() < 1e-4
    assert h.std() > 0.1


def test_resampling_revives_what_was_dead() -> None:
    x = centred()[1]
    explained: dict[bool, float] = {}
    for resamples in (True, False):
        config = preset("anthropic-2023", d_in=24, d_sae=64, sparsity=1.0, tokens=300 * 128, batch=128)
        assert config.resample == Resample()
        trainer = Trainer(config if resamples else replace(config, resample=None), x)
        trainer.parameters.encoder_bias[:24] = -50.0
        for number in range(config.steps):
            trainer.step(some(x, number, 128))
            if number == 36:  # just before an eighth of the run
                assert (trainer.silent[:24] >= config.tokens / 16).all()
        dictionary = trainer.dictionary([Port("s", 24)])
        fires = (dictionary.encode(x) > 0).any(0)
        assert int(fires[:24].sum()) == (24 if resamples else 0)
        explained[resamples] = variance_explained(dictionary, x, x)
    assert explained[True] > explained[False] + 0.03


def test_a_resampled_gate_begins_anew() -> None:
    x = centred()[1]
    config = preset("gated-2024", d_in=24, d_sae=64, tokens=64 * 64, batch=64, resample=Resample(at=(0.5,)))
    trainer = Trainer(config, x)
    p = trainer.parameters
    assert p.gate_scale is not None
    assert p.magnitude_bias is not None
    p.encoder_bias[:5] = -50.0
    p.gate_scale[:5], p.magnitude_bias[:5] = 3.0, -9.0
    for number in range(33):
        trainer.step(some(x, number))
    for fresh in (p.gate_scale, p.magnitude_bias, p.encoder_bias):  # one step away from 0
        assert (fresh[:5].abs() < 0.05).all()


@cache
def made() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The features, x, what a transcoder is to write for it (its own directions, 18 wide), and x seen by two models."""
    features, x = centred()
    strengths = planted_strengths()
    out = torch.nn.functional.normalize(torch.randn(48, 18, generator=torch.Generator().manual_seed(7)), dim=1)
    turned = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(8)))[0]
    y = 0.1 * strengths @ out
    return features, x, y - y.mean(0), torch.cat([x, 5 * x @ turned], dim=1)


def planted_strengths() -> Tensor:
    """The strengths that `planted` drew for `centred`: its generator again."""
    generator = torch.Generator().manual_seed(0)
    torch.randn(48, 24, generator=generator)
    on = torch.rand(8_192, 48, generator=generator) < 2 / 48
    return on * (1 + torch.rand(8_192, 48, generator=generator))


# What 400 steps must at least explain, at most so many active of 64; 2 are on. RowSums: see docs/presets.md.
FLOORS = {
    "anthropic-2023": (0.90, 25), "anthropic-2024": (0.90, 30), "anthropic-2025": (0.85, 25),
    "openai-topk": (0.70, 2), "gated-2024": (0.90, 25), "gemma-scope-1": (0.90, 20), "batchtopk": (0.80, 2.5),
    "matryoshka": (0.75, 2.5), "sparsify": (0.70, 2), "saprmarks": (0.88, 16), "transcoder": (0.55, 25),
    "skip-transcoder": (0.75, 2), "crosscoder-2024": (0.90, 40),
}  # fmt: skip


def train(name: str, **options: Any) -> tuple[Dictionary, Trainer, Tensor, Tensor]:
    _, x, y, both = made()
    kind = PRESETS[name].kind
    x = both if kind == "crosscoder" else x
    target = y if "transcoder" in kind else None
    control: dict[str, Any] = {"k": 2} if PRESETS[name].control == "k" else {}
    config = preset(name, d_in=x.shape[1], d_sae=64, tokens=400 * 128, batch=128, **control, **options)
    blocks = (24, 24) if kind == "crosscoder" else None
    trainer = Trainer(config, x, target, blocks=blocks)
    for number in range(config.steps):
        chosen = torch.randint(len(x), (128,), generator=torch.Generator().manual_seed(number))
        trainer.step(x[chosen], None if target is None else target[chosen])
    reads = [Port(site, 24) for site in (("one", "other") if blocks else ("one",))]
    writes = reads if blocks else [] if target is None else [Port("out", 18)]
    dictionary = trainer.dictionary(reads, writes)
    return dictionary, trainer, x, x if target is None else target


@pytest.mark.parametrize("name", PRESETS)
def test_each_learns_planted_features(name: str) -> None:
    dictionary, trainer, x, y = train(name)
    if isinstance(trainer.config.selector, BatchTopKRule):
        dictionary = calibrate(dictionary, lambda: x.split(1_024), 2)
    explained, most = FLOORS[name]
    active = dictionary.encode(x) > 0
    assert variance_explained(dictionary, x, y) > explained
    assert active.sum(1).float().mean() <= most
    assert (~active.any(0)).float().mean() < 0.35
    control = replace(
        dictionary, W_enc=dictionary.W_enc[:, torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    )
    assert variance_explained(control, x, y) < 0.3  # the same numbers, each latent reading for another


@pytest.mark.slow
@pytest.mark.parametrize("name", ["anthropic-2025", "gemma-scope-1"])
def test_a_target_l0_is_reached(name: str) -> None:
    dictionary, _, x, _ = train(name, l0=4.0)
    assert (dictionary.encode(x) > 0).sum(1).float().mean().item() == pytest.approx(4.0, rel=0.35)
    assert variance_explained(dictionary, x, x) > 0.7
