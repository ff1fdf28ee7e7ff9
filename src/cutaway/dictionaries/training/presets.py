"""Training as published: each preset names its source and gives a `TrainConfig`.

The loss terms, their reductions, the selector, normalisation, decoder norm and initial weights are the source's. What a
source gives as an absolute number of a far longer run or of another width is scaled, and this scaling is ours:

    steps of warm-up      at most a twentieth of the run
    dead latents          silent for 10 M tokens there, at most a sixteenth of the run
    learning rate         the source's × √(its steps / this run's steps) in shorter runs, at most 3e-3
    coefficients          with mean ‖x‖ = √d, L1 ∝ √d and what counts latents ∝ d: then λ means the same at each width
    tokens, batch         4 M and 512, and the first 8,192 tokens set scales and biases

`docs/presets.md` has them side by side, with what differs from each source.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from cutaway.artifacts.errors import CutawayError
from cutaway.dictionaries.dictionary import DictionaryKind
from cutaway.dictionaries.training.config import Resample, TrainConfig
from cutaway.dictionaries.training.parameters import Setting
from cutaway.dictionaries.training.rules import BatchTopKRule, GatedRule, JumpReLURule, ReLURule, TopKRule
from cutaway.dictionaries.training.terms import (
    L0,
    AuxK,
    GatedAuxiliary,
    Lp,
    Matryoshka,
    PreActivation,
    QuadraticL0,
    Reconstruction,
    Tanh,
)

Control = Literal["k", "coefficient", "coefficient or l0"]

_HIGHEST_RATE = 3e-3
_SAMPLE = 8_192
_WIDTH = 2_304  # Gemma 2 2B, where others used the published coefficients; their sources do not say the width


@dataclass(frozen=True)
class _Run:
    """What is asked for, and what follows from the length of the run."""

    d_in: int
    d_sae: int
    k: int
    tokens: int
    batch: int
    sparsity: float | None
    l0: float | None

    @property
    def steps(self) -> int:
        return max(1, self.tokens // self.batch)

    def warmup(self, steps: int) -> int:
        return min(steps, self.steps // 20)

    def share(self, steps: int) -> float:
        """Of training, for a ramp that the source gives in steps."""
        return min(steps, self.steps / 20) / self.steps

    def rate(self, published: float, steps: int) -> float:
        return min(max(published, _HIGHEST_RATE), published * max(1.0, math.sqrt(steps / self.steps)))

    def topk_rate(self) -> float:
        """Fitted in Gao et al. 2024 and used by sparsify: ∝ 1/√F. Their runs had about 60,000 steps."""
        return self.rate(2e-4 / math.sqrt(self.d_sae / 2**14), 60_000)

    def coefficient(self, default: float) -> float:
        return default if self.sparsity is None else self.sparsity


@dataclass(frozen=True)
class Preset:
    """A published way of training."""

    source: str
    """Who, year, and arXiv number or version."""
    kind: DictionaryKind
    """The kind of dictionary."""
    what: str
    """What it is, in one line."""
    control: Control
    """What sets its sparsity: "k", the `sparsity` "coefficient", or that or a target `l0`."""
    values: Callable[[_Run], dict[str, Any]] = field(repr=False)
    """The fields of `TrainConfig` for a run."""


def preset(
    name: str,
    *,
    d_in: int,
    d_sae: int | None = None,
    k: int | None = None,
    sparsity: float | None = None,
    l0: float | None = None,
    tokens: int | None = None,
    batch: int | None = None,
    seed: int = 0,
    **overrides: Setting,
) -> TrainConfig:
    """The configuration of a published way of training.

    Args:
        name: One of `PRESETS`.
        d_in: Width of what is read (all together for a crosscoder).
        d_sae: Latents; 16 · d_in if None.
        k: Active latents per token, where `PRESETS[name].control` says so; 32 if None.
        sparsity: The coefficient of its sparsity term; the published one, scaled to the width, if None.
        l0: For JumpReLU a target, which replaces that term by a quadratic one.
        tokens: Tokens to train on; 4 million if None.
        batch: Tokens per step; 512 if None.
        seed: Of the first weights.
        **overrides: Fields of `TrainConfig`, as values or as read from a file; they win.

    Returns:
        The configuration.

    Raises:
        CutawayError: the preset is unknown or has no such control, or a field is unknown or wrong.

    Example:
        >>> preset("openai-topk", d_in=256, k=64, learning_rate=1e-4).selector.k
        64
    """
    chosen = PRESETS.get(name)
    if chosen is None:
        raise CutawayError(f"'{name}' is not a preset: there are {', '.join(PRESETS)}")
    if d_in < 1:
        raise CutawayError(f"d_in = {d_in}: give the width of what is read")
    _check_control(name, chosen, k=k, sparsity=sparsity, l0=l0)
    names = [item.name for item in fields(TrainConfig)]
    unknown = [key for key in overrides if key not in names]
    if unknown:
        raise CutawayError(f"'{unknown[0]}' is not a field of a training configuration: there are {', '.join(names)}")
    n_tokens = TrainConfig.tokens if tokens is None else tokens
    size = TrainConfig.batch if batch is None else batch
    d_sae = 16 * d_in if d_sae is None else d_sae
    run = _Run(
        d_in=d_in,
        d_sae=max(1, d_sae),
        k=min(32, d_sae) if k is None else k,
        tokens=n_tokens,
        batch=max(1, size),
        sparsity=sparsity,
        l0=l0,
    )
    base = {
        "d_sae": d_sae,
        "tokens": n_tokens,
        "batch": size,
        "seed": seed,
        "sample": max(0, min(_SAMPLE, n_tokens)),
        "dead_after": max(1, min(10_000_000, n_tokens // 16)),
    }
    return TrainConfig.from_json({**base, **chosen.values(run), **overrides})


def _check_control(name: str, chosen: Preset, **given: float | None) -> None:
    has = {"k": ("k",), "coefficient": ("sparsity",), "coefficient or l0": ("sparsity", "l0")}[chosen.control]
    for key, value in given.items():
        if value is None:
            continue
        if key not in has:
            raise CutawayError(f"{name} has no {key}: its sparsity is set by {' or '.join(has)}")
        if not value > 0 or not math.isfinite(value):
            raise CutawayError(f"{key} = {value}: it must be positive")
    if given["sparsity"] is not None and given["l0"] is not None:
        raise CutawayError("give either the coefficient 'sparsity' or the target 'l0', not both")


def _anthropic_2023(run: _Run) -> dict[str, Any]:
    # The source trained on unscaled activations; a scale makes λ mean the same for each model. λ, rate: ours.
    return {
        "selector": ReLURule(),
        "terms": (Reconstruction("sum"), Lp(run.coefficient(5 * math.sqrt(run.d_in / _WIDTH)))),
        "normalise": "mean_norm",
        "b_dec": "geometric_median",
        "learning_rate": run.rate(1e-4, 200_000),
        "warmup": 0,
        "decay": 0.0,
        "resample": Resample(),
    }


def _anthropic_2024(run: _Run) -> dict[str, Any]:
    coefficient = run.coefficient(5 * math.sqrt(run.d_in / _WIDTH))
    return {
        "selector": ReLURule(),
        "terms": (Reconstruction("sum"), Lp(coefficient, norms="l2", warmup=0.05)),
        "normalise": "mean_norm",
        "initial_norm": 0.1,
        "b_dec": "zero",
        "subtract_b_dec": False,
        "decoder_norm": "free",
        "learning_rate": run.rate(5e-5, 200_000),
        "warmup": 0,
        "decay": 0.2,
        "clip": 1.0,
    }


def _anthropic_2025(run: _Run) -> dict[str, Any]:
    sparse = (
        QuadraticL0(run.l0, coefficient=float(run.d_in), per="batch")
        if run.l0 is not None
        else Tanh(run.coefficient(5 * run.d_in / _WIDTH), scale=4.0, norms="l2", warmup=1.0)
    )
    return {
        "selector": JumpReLURule(bandwidth=2.0, initial_threshold=0.1, through_pre=True),
        "terms": (Reconstruction("sum"), sparse, PreActivation(3e-6, norms="l2")),
        "normalise": "mean_norm",
        "initial": "uniform",
        "b_dec": "zero",
        "subtract_b_dec": False,
        "active": 10_000,
        "decoder_norm": "free",
        "learning_rate": run.rate(2e-4, 200_000),
        "warmup": 0,
        "decay": 0.2,
        "clip": 1.0,
    }


def _openai_topk(run: _Run) -> dict[str, Any]:
    return {
        "selector": TopKRule(run.k),
        "terms": (Reconstruction("variance"), AuxK(1 / 32, form="residual")),
        "normalise": "none",
        "input_norm": "layer_norm",
        "encoder_scale": "fit",
        "b_dec": "geometric_median",
        "learning_rate": run.topk_rate(),
        "warmup": 0,
        "decay": 0.0,
        "adam_epsilon": 6.25e-10,
    }


def _gated_2024(run: _Run) -> dict[str, Any]:
    coefficient = run.coefficient(5 * math.sqrt(run.d_in / _WIDTH))
    return {
        "selector": GatedRule(),
        "terms": (Reconstruction("sum"), Lp(coefficient, of="gate"), GatedAuxiliary()),
        "normalise": "mean_norm",
        "b_dec": "geometric_median",
        "learning_rate": run.rate(3e-4, 100_000),
        "warmup": run.warmup(1_000),
        "decay": 0.0,
        "adam_betas": (0.0, 0.999),
    }


def _gemma_scope_1(run: _Run) -> dict[str, Any]:
    sparse = (
        QuadraticL0(run.l0, coefficient=1.0, per="batch")
        if run.l0 is not None
        else L0(run.coefficient(1e-3), warmup=run.share(10_000))
    )
    return {
        "selector": JumpReLURule(bandwidth=0.001, initial_threshold=0.001),
        "terms": (Reconstruction("sum"), sparse),
        "normalise": "mean_square",
        "b_dec": "geometric_median",
        "subtract_b_dec": False,
        "learning_rate": run.rate(7e-5, 1_000_000),
        "warmup": run.warmup(1_000),
        "decay": 0.0,
        "adam_betas": (0.0, 0.999),
    }


def _batchtopk(run: _Run) -> dict[str, Any]:
    return {
        "selector": BatchTopKRule(run.k),
        "terms": (Reconstruction("mean"), AuxK(1 / 32, k=512, form="mean")),
        "normalise": "none",
        "input_norm": "layer_norm",
        "b_dec": "zero",
        "learning_rate": run.rate(3e-4, 120_000),
        "warmup": 0,
        "decay": 0.0,
        "adam_betas": (0.9, 0.99),
    }


def _matryoshka(run: _Run) -> dict[str, Any]:
    prefixes = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    nested = Matryoshka(prefixes, form="mean", average=True, bias_level=True)
    terms = (nested, AuxK(1 / 32, k=512, form="mean"))
    return {**_batchtopk(run), "terms": terms, "normalise": "mean_norm", "input_norm": None}


def _sparsify(run: _Run) -> dict[str, Any]:
    # Its default optimiser is SignSGD with schedule-free averaging; this is what it does when asked for Adam.
    return {
        "selector": TopKRule(run.k),
        "terms": (Reconstruction("fvu"),),
        "normalise": "none",
        "encoder_scale": 3**-0.5,  # the encoder is a linear layer as PyTorch makes it, the decoder its rows at length 1
        "b_dec": "mean",
        "learning_rate": run.topk_rate(),
        "warmup": run.warmup(1_000),
        "decay": 1.0,
    }


def _saprmarks(run: _Run) -> dict[str, Any]:
    return {
        "selector": ReLURule(),
        "terms": (Reconstruction("sum"), Lp(run.coefficient(0.1), warmup=run.share(2_000))),
        "normalise": "mean_square",
        "b_dec": "zero",
        "learning_rate": run.rate(1e-3, 100_000),
        "warmup": run.warmup(1_000),
        "decay": 0.0,
    }


def _transcoder(run: _Run) -> dict[str, Any]:
    return {
        "selector": ReLURule(),
        "terms": (Reconstruction("sum"), Lp(run.coefficient(2.5 * math.sqrt(run.d_in / _WIDTH)))),
        "normalise": "mean_norm",
        "b_dec": "mean",
        "centre_encoder": True,
        "subtract_b_dec": False,
        "learning_rate": run.rate(4e-4, 15_000),
        "warmup": run.warmup(5_000),
        "decay": 0.0,
    }


def _skip_transcoder(run: _Run) -> dict[str, Any]:
    return {
        "selector": TopKRule(run.k),
        "terms": (Reconstruction("fvu"),),
        "normalise": "mean_norm",
        "initial": "zero_decoder",
        "b_dec": "mean",
        "centre_encoder": True,
        "subtract_b_dec": False,
        "skip": True,
        "decoder_norm": "free",
        "learning_rate": run.topk_rate(),
        "warmup": run.warmup(1_000),
        "decay": 1.0,
    }


def _crosscoder_2024(run: _Run) -> dict[str, Any]:
    # λ = 2 was for two residual streams of Gemma 2 2B, 2,304 wide each.
    coefficient = run.coefficient(2 * math.sqrt(run.d_in / (2 * _WIDTH)))
    return {
        "selector": ReLURule(),
        "terms": (Reconstruction("sum"), Lp(coefficient, norms="sum", warmup=0.05)),
        "normalise": "mean_norm",
        "initial_norm": 0.08,
        "b_dec": "zero",
        "subtract_b_dec": False,
        "decoder_norm": "free",
        "learning_rate": run.rate(5e-5, 100_000),
        "warmup": 0,
        "decay": 0.2,
        "clip": 1.0,
    }


PRESETS: dict[str, Preset] = {
    "anthropic-2023": Preset(
        "Bricken et al. 2023, Towards Monosemanticity (transformer-circuits.pub)",
        "sae", "ReLU with L1, unit decoder, dead latents resampled", "coefficient", _anthropic_2023,
    ),
    "anthropic-2024": Preset(
        "Conerly et al. 2024, Update on how we train SAEs (transformer-circuits.pub, April 2024)",
        "sae", "ReLU with L1 weighted by free decoder norms", "coefficient", _anthropic_2024,
    ),
    "anthropic-2025": Preset(
        "Conerly et al. 2025, Dictionary learning optimization techniques (transformer-circuits.pub, January 2025)",
        "sae", "JumpReLU with a tanh penalty, a wide straight-through window and a pull on silent latents",
        "coefficient or l0", _anthropic_2025,
    ),
    "openai-topk": Preset(
        "Gao et al. 2024, arXiv 2406.04093",
        "sae", "TopK on layer-normed activations, with AuxK", "k", _openai_topk,
    ),
    "gated-2024": Preset(
        "Rajamanoharan et al. 2024, arXiv 2404.16014",
        "sae", "a gate that L1 acts on, and a magnitude that it does not shrink", "coefficient", _gated_2024,
    ),
    "gemma-scope-1": Preset(
        "Lieberum et al. 2024, arXiv 2408.05147 (method of arXiv 2407.14435)",
        "sae", "JumpReLU with an L0 penalty, straight through", "coefficient or l0", _gemma_scope_1,
    ),
    "batchtopk": Preset(
        "Bussmann et al. 2024, arXiv 2412.06410",
        "sae", "the k·n largest of a batch of n, with AuxK", "k", _batchtopk,
    ),
    "matryoshka": Preset(
        "Bussmann et al. 2025, arXiv 2503.17547",
        "sae", "BatchTopK whose nested prefixes each reconstruct", "k", _matryoshka,
    ),
    "sparsify": Preset(
        "EleutherAI sparsify 1.3, with Adam",
        "sae", "TopK on the share of variance unexplained", "k", _sparsify,
    ),
    "saprmarks": Preset(
        "dictionary_learning 0.1 (saprmarks), StandardTrainer",
        "sae", "ReLU with L1 and a unit decoder", "coefficient", _saprmarks,
    ),
    "transcoder": Preset(
        "Dunefsky et al. 2024, arXiv 2406.11944",
        "transcoder", "ReLU with L1, from what an MLP reads to what it writes", "coefficient", _transcoder,
    ),
    "skip-transcoder": Preset(
        "Paulo et al. 2025, arXiv 2501.18823",
        "skip_transcoder", "TopK from an MLP's input to its output beside a linear map", "k", _skip_transcoder,
    ),
    "crosscoder-2024": Preset(
        "Lindsey et al. 2024, Sparse Crosscoders (transformer-circuits.pub, October 2024), as ckkissane's code",
        "crosscoder", "ReLU over several sites, L1 weighted by the sum of their decoder norms",
        "coefficient", _crosscoder_2024,
    ),
}  # fmt: skip
