"""The length of the first encoder rows: the fitted one against a search, and where it changes nothing."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.dictionaries.training.config import TrainConfig
from cutaway.dictionaries.training.presets import preset
from cutaway.dictionaries.training.rules import BatchTopKRule, JumpReLURule, ReLURule, TopKRule
from cutaway.dictionaries.training.terms import Lp, Reconstruction
from cutaway.dictionaries.training.trainer import Trainer

CONFIG = TrainConfig(d_sae=96, tokens=4096, batch=64, selector=TopKRule(8), normalise="none", encoder_scale="fit")


def activations(n: int = 300, d: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=generator) @ torch.randn(d, d, generator=generator) + 3


def error(trainer: Trainer, x: Tensor, scale: float, k: int) -> float:
    """Σ (x − x̂)² where the encoder is `scale` times as long as it is, written plainly."""
    total, p = 0.0, trainer.parameters
    for row in x:
        h = scale * (p.encoder @ (row - p.decoder_bias))
        chosen = h.argsort(descending=True)[:k]
        made = sum((float(h[i].clamp(min=0)) * p.decoder[i] for i in chosen.tolist()), p.decoder_bias.clone())
        total += float((row - made).square().sum())
    return total


@pytest.mark.parametrize("selector", [TopKRule(8), BatchTopKRule(8), TopKRule(8, start_k=20, anneal=0.5)])
def test_the_fitted_scale_reconstructs_best(selector):
    x = activations()
    trainer = Trainer(replace(CONFIG, selector=selector), x)
    k = selector.start_k or 8
    best = error(trainer, x[:200], 1.0, k)
    others = [error(trainer, x[:200], scale, k) for scale in (0.8, 0.9, 1.1, 1.25)]
    assert best < min(others)
    plain = Trainer(replace(CONFIG, selector=selector, encoder_scale=1.0), x)
    torch.testing.assert_close(plain.parameters.encoder, plain.parameters.decoder)
    ratio = trainer.parameters.encoder.norm(dim=1) / plain.parameters.encoder.norm(dim=1)
    assert ratio.max() - ratio.min() < 1e-5
    assert 0.1 < ratio[0] < 0.9  # overlapping directions write too much at length 1
    assert error(plain, x[:200], 1.0, k) > 1.5 * best


def test_a_number_is_the_length_over_that_of_the_decoder():
    trainer = Trainer(replace(CONFIG, encoder_scale=0.25), activations())
    torch.testing.assert_close(trainer.parameters.encoder, trainer.parameters.decoder / 4)


def test_what_no_scale_fits_stays_as_it_is():
    x = activations()
    for selector, terms in (
        (ReLURule(), (Reconstruction(), Lp(1.0))),
        (JumpReLURule(bandwidth=0.1, initial_threshold=0.1), (Reconstruction(), Lp(1.0))),
    ):
        config = replace(CONFIG, selector=selector, terms=terms)
        one, other = Trainer(config, x), Trainer(replace(config, encoder_scale=1.0), x)
        assert torch.equal(one.parameters.encoder, other.parameters.encoder)
    transcoder = replace(CONFIG, subtract_b_dec=False)
    one, other = (Trainer(replace(transcoder, encoder_scale=s), x, x.flip(1)) for s in ("fit", 1.0))
    assert torch.equal(one.parameters.encoder, other.parameters.encoder)


def test_presets_start_as_their_sources_do():
    assert preset("openai-topk", d_in=24).encoder_scale == "fit"  # Gao et al. 2024, A.1
    assert preset("batchtopk", d_in=24).encoder_scale == 1.0
    found = Trainer(preset("sparsify", d_in=24, d_sae=4096, k=4, tokens=4096), activations())
    linear = torch.nn.Linear(24, 4096)
    theirs = linear.weight.detach().norm(dim=1).mean()
    assert float(found.parameters.encoder.norm(dim=1).mean() / theirs) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_a_scale_that_is_none(scale):
    with pytest.raises(CutawayError, match="encoder_scale"):
        TrainConfig(encoder_scale=scale)
