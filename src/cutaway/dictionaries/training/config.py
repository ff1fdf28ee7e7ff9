"""How a dictionary is trained, as one value that can be written down, compared and read again."""

import math
from dataclasses import asdict, dataclass
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from cutaway.artifacts.errors import CutawayError
from cutaway.dictionaries.training.initial import Initial, Start
from cutaway.dictionaries.training.parameters import Plain
from cutaway.dictionaries.training.rules import BatchTopKRule, GatedRule, JumpReLURule, Rule, TopKRule
from cutaway.dictionaries.training.scaling import Normalise
from cutaway.dictionaries.training.terms import AuxK, Matryoshka, Reconstruction, Term, check_terms


@dataclass(frozen=True)
class Resample(Plain):
    """Give dead latents the directions of badly reconstructed tokens (Bricken et al. 2023).

    `at`: after these shares of training; dead: silent for `window`, a share of training too. A dead latent takes the
    direction of a token drawn with chance ∝ (its loss)², `encoder_norm` × the mean length of the living encoders' rows,
    bias 0, and its moments in Adam start again.
    """

    at: tuple[float, ...] = (1 / 8, 1 / 4, 3 / 8, 1 / 2)
    window: float = 1 / 16
    encoder_norm: float = 0.2


BYTES_A_PARAMETER = 16
"""Of float32: the parameter, its gradient, and Adam's two moments."""

_SELECTOR: Rule = TopKRule(32)
_TERMS: tuple[Term, ...] = (Reconstruction(), AuxK(form="sum"))


@dataclass(frozen=True)
class TrainConfig(Plain):
    """Everything here changes the result, so it is part of a dictionary's identity.

    `d_sae` latents, `selector` and the loss `terms`; `skip` adds W_skip. `tokens` counts every token each time it is
    used. `normalise` sets the units of training (`scaling.py`), `input_norm` what is done to each token; both from the
    first `sample` tokens, as are `b_dec` and the encoder's bias (`active`, `centre_encoder`; see `initial.py`).
    `encoder_scale`: length of the first encoder rows over that of the decoder's; "fit": what reconstructs best,
    which is ahead in short trainings and, with more dead latents, level in long ones (docs/dictionaries.md).
    `learning_rate` (None: 2e-4/√(F/2¹⁴)) rises over `warmup` steps and falls linearly to 0 over the last `decay` share.
    `decoder_norm` "unit": rows keep length 1, the gradient's part along them is taken away first. `clip`: greatest norm
    of the gradient. `dead_after`: a latent silent for so many tokens is dead. `calibrate`: tokens that set BatchTopK's
    threshold at the end. `low_precision`: candidates by a bfloat16 product (`step.py`).
    """

    d_sae: int = 4096
    selector: Annotated[Rule, Field(discriminator="kind")] = _SELECTOR
    terms: tuple[Annotated[Term, Field(discriminator="kind")], ...] = _TERMS
    tokens: int = 4_000_000
    batch: int = 512
    normalise: Normalise = "centred"
    input_norm: Literal["layer_norm", "unit"] | None = None
    initial: Initial = "tied"
    initial_norm: float = 1.0
    encoder_scale: float | Literal["fit"] = 1.0
    b_dec: Start = "geometric_median"
    subtract_b_dec: bool = True
    active: int | None = None
    centre_encoder: bool = False
    skip: bool = False
    decoder_norm: Literal["unit", "free"] = "unit"
    learning_rate: float | None = 3e-3
    warmup: int = 100
    decay: float = 0.3
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_epsilon: float = 1e-8
    clip: float | None = None
    dead_after: int = 250_000
    resample: Resample | None = None
    sample: int = 0
    calibrate: int = 65_536
    low_precision: bool = False
    seed: int = 0

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
        """Numbers that are trained, of a dictionary that reads a tensor of the one width and writes the other."""
        own = {JumpReLURule: 1, GatedRule: 2}.get(type(self.selector), 0)
        return self.d_sae * (d_in + d_out + 1 + own) + d_out + (d_in * d_out if self.skip else 0)

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        top = 2e-4 / math.sqrt(self.d_sae / 2**14) if self.learning_rate is None else self.learning_rate
        falling = max(1.0, self.decay * self.steps)
        return top * min(1.0, (step + 1) / max(1, self.warmup), (self.steps - step) / falling)

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` reads them."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> "TrainConfig":
        """The configuration that some plain values describe; defaults for what is not there.

        Raises `CutawayError` that names the first field that is unknown or of the wrong kind.
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
