"""How a dictionary is trained, as one value that can be written down, compared and read again."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from cutaway.artifacts.errors import CutawayError
from cutaway.dictionaries.training.parameters import Plain
from cutaway.dictionaries.training.rules import BatchTopKRule, GatedRule, JumpReLURule, Rule, TopKRule
from cutaway.dictionaries.training.scaling import Normalise
from cutaway.dictionaries.training.terms import AuxK, Matryoshka, Reconstruction, Term, check_terms


@dataclass(frozen=True)
class Resample(Plain):
    """Give dead latents the directions of badly reconstructed tokens (Bricken et al. 2023).

    A dead latent takes the direction of a token drawn with chance ∝ (its loss)², bias 0, and its moments in Adam start
    again.
    """

    at: tuple[float, ...] = (1 / 8, 1 / 4, 3 / 8, 1 / 2)
    """After these shares of training."""
    window: float = 1 / 16
    """A latent is dead when it was silent for this share of training."""
    encoder_norm: float = 0.2
    """Length of its new encoder row, in mean lengths of the living latents' encoder rows."""


BYTES_PER_PARAMETER = 16
"""Of float32: the parameter, its gradient, and Adam's two moments."""

_SELECTOR: Rule = TopKRule(32)
_TERMS: tuple[Term, ...] = (Reconstruction(), AuxK(form="sum"))


@dataclass(frozen=True)
class TrainConfig(Plain):
    """How one dictionary is trained. Everything here changes the result, so it is part of a dictionary's identity.

    `preset` makes one as published; `train` takes each field by its name.
    """

    d_sae: int = 4096
    """Number of latents."""
    selector: Annotated[Rule, Field(discriminator="kind")] = _SELECTOR
    """Which pre-activations become activations, and how that is trained: `ReLURule`, `TopKRule`, ..."""
    terms: tuple[Annotated[Term, Field(discriminator="kind")], ...] = _TERMS
    """The loss, a sum of terms: `Reconstruction`, `Lp`, `AuxK`, ..."""
    tokens: int = 4_000_000
    """Tokens to train on; each counts whenever it is used."""
    batch: int = 512
    """Tokens per step."""
    normalise: Normalise = "centred"
    """Units of training, one scale for the whole data set: "none"; "mean_norm", mean ‖x‖ = √d; "mean_square",
    mean ‖x‖² = 1; "centred", mean ‖x − median‖ = √d; "whiten". Folded into the weights at the end."""
    input_norm: Literal["layer_norm", "unit"] | None = None
    """What is done to each token before anything else; stays with the dictionary."""
    initial: Literal["tied", "uniform", "zero_decoder"] = "tied"
    """First weights. "tied": random directions as decoder, the encoder the same rows (where input and output are of one
    kind; else other directions of length 1). "uniform": entries of the decoder uniform in ±1/√d_out and the encoder its
    rows times d/F (Anthropic, January 2025). "zero_decoder": no decoder, random unit encoder."""
    initial_norm: float = 1.0
    """Length of the first decoder rows, where `decoder_norm` leaves them free."""
    encoder_scale: float | Literal["fit"] = 1.0
    """Length of the first encoder rows over that of the decoder's; "fit": what reconstructs best, which is ahead in
    short trainings and, with more dead latents, level in long ones (docs/dictionaries.md)."""
    b_dec: Literal["zero", "mean", "geometric_median"] = "geometric_median"
    """The first b_dec, of the sample."""
    subtract_b_dec: bool = True
    """Whether b_dec is subtracted from the input; not for transcoders."""
    active: int | None = None
    """Set the encoder's first bias so that each latent is active on the share active / d_sae of the sample, at most a
    half."""
    centre_encoder: bool = False
    """Set the encoder's first bias so that pre-activations have mean 0, as if the mean were subtracted (sparsify)."""
    skip: bool = False
    """Add W_skip, a linear map beside the latents."""
    decoder_norm: Literal["unit", "free"] = "unit"
    """With "unit" decoder rows keep length 1, and the gradient's part along them is taken away first."""
    learning_rate: float | None = 3e-3
    """The highest rate of Adam; None is 2e-4/√(d_sae/2¹⁴)."""
    warmup: int = 100
    """Steps over which the rate rises from 0."""
    decay: float = 0.3
    """The last share of training, over which the rate falls linearly to 0."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates of the two moments."""
    adam_epsilon: float = 1e-8
    """Adam's ε."""
    clip: float | None = None
    """The largest norm of the gradient; None does not clip."""
    dead_after: int = 250_000
    """A latent that was silent for so many tokens is dead."""
    resample: Resample | None = None
    """Whether dead latents are resampled."""
    sample: int = 0
    """The first tokens that set scales, b_dec and the encoder's bias; the first batch at least."""
    calibrate: int = 65_536
    """Tokens after training that set BatchTopK's threshold; 0 keeps the running one."""
    low_precision: bool = False
    """Find candidates by a bfloat16 product and score them again in float32 (`step.py`)."""
    seed: int = 0
    """Of the first weights and of resampling."""

    def __post_init__(self) -> None:
        if not 1 <= self.d_sae < 2**31:
            raise CutawayError(f"d_sae = {self.d_sae}: a dictionary has 1 latent or more, and fewer than 2^31")
        if isinstance(self.selector, TopKRule | BatchTopKRule):
            for k in (self.selector.k, self.selector.start_k or self.selector.k):
                if not 1 <= k <= self.d_sae:
                    raise CutawayError(f"k = {k} latents cannot be active out of d_sae = {self.d_sae}")
        for name in ("tokens", "batch", "dead_after"):
            if not 0 < getattr(self, name) < 2**53:
                raise CutawayError(f"{name} = {getattr(self, name)}: it must be positive, and below 2^53")
        for name in ("sample", "calibrate", "warmup"):
            if not 0 <= getattr(self, name) < 2**31:
                raise CutawayError(f"{name} = {getattr(self, name)}: it must be 0 or more, and below 2^31")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise CutawayError(f"learning_rate = {self.learning_rate}: it must be positive")
        if self.encoder_scale != "fit" and not 0 < self.encoder_scale < math.inf:
            raise CutawayError(f"encoder_scale = {self.encoder_scale}: it must be positive, or “fit”")
        if self.tokens < self.batch:
            raise CutawayError(f"tokens = {self.tokens} is less than one batch of {self.batch}")
        if self.decoder_norm == "unit" and self.initial == "zero_decoder":
            raise CutawayError("a decoder that starts at zero has no direction to keep: give decoder_norm 'free'")
        check_terms(self.terms, self.selector)
        for term in self.terms:
            if isinstance(term, Matryoshka) and len(set(term.ends(self.d_sae))) < len(term.prefixes):
                raise CutawayError(f"{self.d_sae} latents are too few for the prefixes {term.prefixes}")

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        return self.tokens // self.batch

    def parameters(self, d_in: int, d_out: int) -> int:
        """Numbers that are trained, of a dictionary with this configuration.

        Args:
            d_in: Width of what is read.
            d_out: Width of what is written.
        """
        own = {JumpReLURule: 1, GatedRule: 2}.get(type(self.selector), 0)
        return self.d_sae * (d_in + d_out + 1 + own) + d_out + (d_in * d_out if self.skip else 0)

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0.

        Args:
            step: The step's number.
        """
        top = 2e-4 / math.sqrt(self.d_sae / 2**14) if self.learning_rate is None else self.learning_rate
        falling = max(1.0, self.decay * self.steps)
        return top * min(1.0, (step + 1) / max(1, self.warmup), (self.steps - step) / falling)

    def to_json(self) -> dict[str, Any]:
        """Plain values, which `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """The configuration that plain values describe; defaults for what is not there.

        Args:
            values: Fields by name.

        Raises:
            CutawayError: a field is unknown or of the wrong kind; the first is named.
        """
        try:
            return _adapter().validate_python(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the recipe"
            raise CutawayError(f"{where}: {first['msg']}") from error


@cache
def _adapter() -> Any:
    return TypeAdapter(TrainConfig)
