"""What comes out of a trainer reads the model's own units: each preset, under each scaling, as the equations say.

The equations are written in the units of training: scale x (by hand), encode, select, decode, scale back. The finished
dictionary has all that in its weights. Parameters are made float64 first, so that nothing but the algebra is compared.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from weights import apart, batch

from cutaway.artifacts.errors import CutawayError
from cutaway.dictionaries.dictionary import Dictionary, Port
from cutaway.dictionaries.training.config import TrainConfig
from cutaway.dictionaries.training.parameters import Parameters
from cutaway.dictionaries.training.presets import PRESETS, preset
from cutaway.dictionaries.training.rules import BatchTopKRule, GatedRule, JumpReLURule, ReLURule, TopKRule
from cutaway.dictionaries.training.scaling import Scaling
from cutaway.dictionaries.training.trainer import Trainer

D_IN, D_OUT, F, BATCH, STEPS = 12, 7, 40, 64, 12
BLOCKS = (5, 7)
NORMALISE = ("none", "mean_norm", "mean_square", "centred", "whiten")
INPUT_NORM = (None, "layer_norm", "unit")


def activations(kind: str, n: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """x with an offset and large, y small and made of x; the second tensor of a crosscoder 20 times the first."""
    mixing = batch(D_IN, D_IN, 1, torch.float32)
    x = 13 * (batch(n, D_IN, seed, torch.float32).relu() @ mixing) + 5 * batch(1, D_IN, 2, torch.float32)
    if kind == "crosscoder":
        return x * torch.cat([torch.ones(5), torch.full((7,), 20.0)]), None
    if kind == "sae":
        return x, None
    return x, 0.02 * (x @ batch(D_IN, D_OUT, 3, torch.float32)).relu() + 0.3


def config_of(name: str, **overrides: Any) -> TrainConfig:
    control = {"k": 4} if PRESETS[name].control == "k" else {}
    return preset(name, d_in=D_IN, d_sae=F, tokens=BATCH * STEPS, batch=BATCH, **{**control, **overrides})


def trained(name: str, steps: int = 5, **overrides: Any) -> Trainer:
    """A trainer after a few steps, decoder norms and biases spread out, in float64."""
    kind = PRESETS[name].kind
    blocks = BLOCKS if kind == "crosscoder" else None
    config = config_of(name, **overrides)
    trainer = Trainer(config, *activations(kind, 512, 0), blocks=blocks)
    for number in range(steps):
        trainer.step(*activations(kind, BATCH, 10 + number))
    generator = torch.Generator().manual_seed(0)
    tensors = {key: tensor.double() for key, tensor in trainer.parameters.tensors().items()}
    for key, tensor in tensors.items():
        if key != "decoder" or config.decoder_norm == "free":
            tensor.mul_(
                1
                + 0.2
                * torch.randn(len(tensor), 1, generator=generator)[: len(tensor)].view(-1, *[1] * (tensor.ndim - 1))
            )
        if key in ("gate_scale", "magnitude_bias"):
            tensor.add_(0.2 * torch.randn(len(tensor), generator=generator))
    if config.decoder_norm == "unit":
        tensors["decoder"] /= tensors["decoder"].norm(dim=1, keepdim=True)
    trainer.parameters = Parameters.of(tensors, trainer.blocks)
    for side in ("scaling_in", "scaling_out"):
        scaling: Scaling = getattr(trainer, side)
        in_double = Scaling(**{key: tensor.double() for key, tensor in scaling.tensors().items()})
        if in_double.matrix is not None:  # float32 rounding apart, they are each other's inverse
            in_double = replace(in_double, inverse=torch.linalg.inv(in_double.matrix))
        setattr(trainer, side, in_double)
    return trainer


def ports(kind: str) -> tuple[Sequence[Port], Sequence[Port]]:
    if kind == "crosscoder":
        both = [Port("blocks.0.resid_post", BLOCKS[0]), Port("blocks.1.resid_post", BLOCKS[1])]
        return both, both
    reads = [Port("blocks.0.resid_post", D_IN)]
    return reads, () if kind == "sae" else [Port("blocks.0.mlp.out", D_OUT)]


def scaled(x: Tensor, by: Scaling) -> Tensor:
    return x * by.scale if by.matrix is None or by.shift is None else (x - by.shift) @ by.matrix


def scaled_back(x: Tensor, by: Scaling) -> Tensor:
    return x / by.scale if by.matrix is None else torch.linalg.solve(by.matrix.T, x.T).T + by.shift


def by_equations(trainer: Trainer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations in the units of training, and what is written in the model's: [n, F], [n, d_out]."""
    p, config = trainer.parameters, trainer.config
    mean, spread, epsilon = 0.0, 1.0, 0.0
    if config.input_norm == "layer_norm":  # as SAELens and OpenAI: ε on the way in alone
        mean, spread, epsilon = x.mean(1, keepdim=True), x.std(1, keepdim=True), 1e-5
    elif config.input_norm == "unit":
        spread = x.norm(dim=1, keepdim=True) / D_IN**0.5
    into = scaled((x - mean) / (spread + epsilon), trainer.scaling_in)
    u = (into - p.decoder_bias if config.subtract_b_dec else into) @ p.encoder.T
    h, rule = u + p.encoder_bias, config.selector
    norms = p.decoder.norm(dim=1)
    if isinstance(rule, TopKRule):
        scores = h * norms if rule.by_norm else h
        a = h.relu() * (scores >= scores.sort(dim=1, descending=True).values[:, rule.k - 1 : rule.k])
    elif isinstance(rule, BatchTopKRule):
        total, weight = trainer.running_threshold.tolist()
        a = h.relu() * ((h * norms if rule.by_norm else h) > total / weight)
    elif isinstance(rule, JumpReLURule):
        assert p.threshold is not None
        a = h.relu() * (h > p.threshold)
    elif isinstance(rule, GatedRule):
        assert p.gate_scale is not None
        assert p.magnitude_bias is not None
        a = (u * p.gate_scale.exp() + p.magnitude_bias).relu() * (h > 0)
    else:
        assert isinstance(rule, ReLURule)
        a = h.relu()
    written = a @ p.decoder + p.decoder_bias
    if p.skip is not None:
        written = written + into @ p.skip.T
    written = scaled_back(written, trainer.scaling_out)
    return a, written * spread + mean if trainer.same else written


def check(trainer: Trainer, kind: str, *, unit_rows: bool) -> Dictionary:
    dictionary = trainer.dictionary(*ports(kind))
    assert dictionary.kind == kind
    assert dictionary.W_enc.dtype == torch.float64
    x = activations(kind, 50, 99)[0].double()
    a, written = by_equations(trainer, x)
    assert (a > 0).any(1).float().mean() > 0.5
    assert apart(dictionary(x), written) < 1e-9
    acts = dictionary.encode(x)
    assert torch.equal(acts > 0, a > 0)
    assert apart(dictionary.decode(acts, x), written) < 1e-9
    if unit_rows:
        torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(F, dtype=torch.float64))
    return dictionary


SINGLE = [name for name in PRESETS if PRESETS[name].kind != "crosscoder"]


@pytest.mark.parametrize("name", SINGLE)
def test_the_dictionary_is_the_equations_under_every_scaling(name: str) -> None:
    kind = PRESETS[name].kind
    for normalise, input_norm in product(NORMALISE, INPUT_NORM):
        trainer = trained(name, normalise=normalise, input_norm=input_norm)
        rule, by = trainer.config.selector, trainer.config.decoder_norm
        chooses = isinstance(rule, TopKRule | BatchTopKRule)
        # an activation is then the length of what its latent adds, but for a scale of each token
        check(trainer, kind, unit_rows=not chooses or (by == "unit" and normalise != "whiten"))


@pytest.mark.parametrize("normalise", NORMALISE)
def test_a_crosscoder_has_a_scale_for_each_tensor(normalise: str) -> None:
    name = "crosscoder-2024"
    if normalise == "whiten":
        with pytest.raises(CutawayError, match="whitening is of one site"):
            trained(name, normalise=normalise)
        return
    for selector in (
        ReLURule(), JumpReLURule(0.5, 0.02), GatedRule(), TopKRule(4), TopKRule(4, by_norm=True),
        BatchTopKRule(4), BatchTopKRule(4, by_norm=True),
    ):  # fmt: skip
        trainer = trained(name, normalise=normalise, selector=selector)
        dictionary = check(trainer, "crosscoder", unit_rows=False)
        # the share of its decoder's length that a latent has in each tensor, in the units of training, is kept
        ours = [
            part.norm(dim=1) * trainer.scaling_in.scale[at]
            for part, at in zip(dictionary.decoders(), (0, 5), strict=True)
        ]
        there = [part.norm(dim=1) for part in trainer.parameters.decoder.split(BLOCKS, dim=1)]
        assert apart(ours[0] / sum(ours), there[0] / sum(there)) < 1e-9
    scale = trained(name, normalise=normalise).scaling_in.scale
    if normalise != "none":
        assert scale[0] > 10 * scale[-1]
    with pytest.raises(CutawayError, match="token by token"):
        trained(name, normalise=normalise, input_norm="unit")


@pytest.mark.parametrize("normalise", NORMALISE)
@pytest.mark.parametrize("selector", [TopKRule(4, by_norm=True), BatchTopKRule(4, by_norm=True)], ids=str)
@pytest.mark.parametrize("name", ["openai-topk", "skip-transcoder"])
def test_selection_by_decoder_norms_is_folded(name: str, selector: TopKRule | BatchTopKRule, normalise: str) -> None:
    initial = {"initial": "tied", "initial_norm": 1.0}
    for input_norm in INPUT_NORM:
        options = {"normalise": normalise, "input_norm": input_norm, "decoder_norm": "free", **initial}
        trainer = trained(name, selector=selector, **options)
        lengths = trainer.parameters.decoder.norm(dim=1)
        assert lengths.max() > 1.5 * lengths.min()
        check(trainer, PRESETS[name].kind, unit_rows=normalise != "whiten")


def test_scales_are_what_they_say() -> None:
    """Of the sample: mean ‖x'‖ = √d, mean ‖x'‖² = 1, mean distance from the median √d, covariance 1."""
    sizes: dict[str, Tensor] = {}
    for normalise in NORMALISE:
        trainer = Trainer(config_of("saprmarks", normalise=normalise), activations("sae", 2_000, 0)[0])
        sizes[normalise] = trainer.prepared(activations("sae", 2_000, 0)[0])[0].double()
    assert sizes["mean_norm"].norm(dim=1).mean().item() == pytest.approx(D_IN**0.5, rel=1e-5)
    assert sizes["mean_square"].square().sum(1).mean().item() == pytest.approx(1, rel=1e-5)
    centred = sizes["centred"]
    best = min((centred - (centred.mean(0) + shift)).norm(dim=1).mean() for shift in 0.02 * batch(200, D_IN, 5))
    assert best.item() == pytest.approx(D_IN**0.5, rel=0.02)
    white = sizes["whiten"]
    assert white.mean(0).abs().max() < 1e-4
    assert apart(torch.cov(white.T), torch.eye(D_IN, dtype=torch.float64)) < 1e-4
    assert torch.equal(sizes["none"], activations("sae", 2_000, 0)[0].double())


@pytest.mark.parametrize("normalise", NORMALISE)
@pytest.mark.parametrize("input_norm", INPUT_NORM)
def test_what_comes_after_is_given_what_the_dictionary_writes(normalise: str, input_norm: str | None) -> None:
    config = config_of(
        "openai-topk", normalise=normalise, input_norm=input_norm, terms=({"kind": "end_to_end"},), learning_rate=1e-9
    )
    x = activations("sae", BATCH, 20)[0] / 1_000  # so small that layer norm's ε counts
    trainer = Trainer(config, x)
    expected = trainer.dictionary(*ports("sae"))(x)
    given: list[Tensor] = []

    def downstream(written: Tensor) -> Tensor:
        given.append(written.detach())
        return (written - x).square().sum(1).mean()

    result = trainer.step(x, downstream=downstream)
    assert apart(given[0], expected) < 2e-5
    assert result.gradients.decoder.norm() > 0


@pytest.mark.parametrize("name", PRESETS)
def test_saved_and_loaded_it_goes_on_to_the_same_bits(name: str, tmp_path: Path) -> None:
    kind = PRESETS[name].kind
    config = config_of(name, dead_after=3 * BATCH)
    blocks = BLOCKS if kind == "crosscoder" else None
    trainer = Trainer(config, *activations(kind, 512, 0), blocks=blocks)
    trainer.parameters.encoder_bias[:8] = -100.0  # dead from the start, for AuxK and resampling
    for number in range(5):
        trainer.step(*activations(kind, BATCH, 10 + number))
    trainer.save(tmp_path / "state", "these activations")
    loaded = Trainer.load(tmp_path / "state", config, "these activations")
    for number in range(5, STEPS):
        one, other = (t.step(*activations(kind, BATCH, 10 + number)) for t in (trainer, loaded))
        assert torch.equal(one.loss, other.loss)
    assert trainer.dead().tolist() == loaded.dead().tolist()
    ours, theirs = (t.dictionary(*ports(kind)) for t in (trainer, loaded))
    for tensor in ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip", "sparsity"):
        one, other = getattr(ours, tensor), getattr(theirs, tensor)
        assert (one is None) is (other is None), tensor
        if one is not None and other is not None:
            assert torch.equal(one, other), tensor
    x = activations(kind, 20, 7)[0]
    assert torch.equal(ours(x), theirs(x))
