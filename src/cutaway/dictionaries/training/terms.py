"""Loss terms. The loss of a dictionary is their sum, each with its reduction stated.

Notation: e = ŷ − y [n, d]; a activations, h pre-activations [n, F]; mean_b the mean over the n tokens of a batch,
mean_d and Σ_d over the values of a token, Σ_i over latents; sg(·) has no gradient; D the decoder's rows. All is in the
units of training (see `scaling.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.dictionaries import sparse
from cutaway.dictionaries.training.code import Code, StraightThroughStep
from cutaway.dictionaries.training.parameters import Parameters, Plain
from cutaway.dictionaries.training.rules import BatchTopKRule, JumpReLURule, Rule, TopKRule

Norms = Literal["none", "l2", "sum"]
Form = Literal["sum", "mean", "fvu", "variance"]


@dataclass
class Forward:
    """A batch on its way through a dictionary: what terms are computed from.

    `centred` is x − b_dec (or x), without gradient; `dead` [m] numbers of dead latents; `pre_of` gives the exact
    pre-activations [n, m] of some latents, with gradient; `variance` is mean (y − ȳ)² over a first sample; `progress`
    the share of training that is over; `downstream` takes ŷ to a loss, where the step has one.
    """

    parameters: Parameters
    rule: Rule
    x: Tensor
    y: Tensor
    code: Code
    pre_of: Callable[[Tensor], Tensor]
    dead: Tensor
    variance: float = 1.0
    progress: float = 1.0
    downstream: Callable[[Tensor], Tensor] | None = None
    _norms: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def base(self) -> Tensor:
        """What is written without any latent: b_dec, and the skip: [n, d] or [d]."""
        written = self.parameters.decoder_bias
        return written if self.parameters.skip is None else written + self.x @ self.parameters.skip.T

    @cached_property
    def written(self) -> Tensor:
        """ŷ [n, d]."""
        return self.code.decode(self.code.values, self.parameters.decoder) + self.base

    @cached_property
    def error(self) -> Tensor:
        """e = ŷ − y [n, d]."""
        return self.written - self.y

    @cached_property
    def total_variance(self) -> Tensor:
        """Σ_b Σ_d (y − ȳ)², ȳ the batch's mean."""
        return (self.y - self.y.mean(0)).square().sum()

    def norms(self, how: Norms) -> Tensor | float:
        """Decoder norms as the code's values meet them, or 1."""
        if how == "none":
            return 1.0
        if how not in self._norms:
            self._norms[how] = self.parameters.decoder_norms(how)
        return self.code.at(self._norms[how])

    def reduce(self, error: Tensor, form: Form) -> Tensor:
        """ "sum" mean_b Σ_d e²; "mean" mean_b mean_d e²; "fvu" Σ e² / Σ(y − ȳ)²; "variance" mean e² / `variance`."""
        square = error.square()
        if form == "sum":
            return square.sum() / len(error)
        if form == "mean":
            return square.mean()
        if form == "fvu":
            return square.sum() / self.total_variance
        return square.mean() / self.variance


def _ramp(progress: float, over: float) -> float:
    """From 0 to 1 over the first share of training; 1 throughout if that share is 0."""
    return 1.0 if over <= 0 else min(1.0, progress / over)


@dataclass(frozen=True)
class Reconstruction(Plain):
    """weight · e² as `form` says (see `Forward.reduce`)."""

    form: Form = "sum"
    """How e² is reduced: "sum", "mean", "fvu", "variance" (see `Forward.reduce`)."""
    weight: float = 1.0
    """Its weight."""
    kind: Literal["reconstruction"] = "reconstruction"
    """Its name in a file."""

    def __call__(self, f: Forward) -> Tensor:
        """The term's share of the loss of a batch, a number with a gradient.

        Args:
            f: The batch on its way through the dictionary.
        """
        return self.weight * f.reduce(f.error, self.form)


@dataclass(frozen=True)
class Matryoshka(Plain):
    """The reconstruction by nested prefixes of the latents: Σ_g e_g², or their mean if `average` (arXiv 2503.17547).

    `prefixes` are shares of the latents, ascending, the last 1. `bias_level` adds the level with no latent at all.
    """

    prefixes: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    """Shares of the latents, ascending, the last 1."""
    form: Form = "sum"
    """As of `Reconstruction`."""
    average: bool = False
    """The mean over levels instead of their sum."""
    bias_level: bool = False
    """Add the level with no latent at all."""
    kind: Literal["matryoshka"] = "matryoshka"
    """Its name in a file."""

    def __post_init__(self) -> None:
        ascending = all(low < high for low, high in zip((0.0, *self.prefixes), self.prefixes, strict=False))
        if not self.prefixes or not ascending or self.prefixes[-1] != 1.0:
            raise CutawayError(f"prefixes {self.prefixes} must be ascending shares of the latents that end with 1")

    def ends(self, n_latents: int) -> list[int]:
        """The number of latents of each prefix.

        Args:
            n_latents: Latents of the dictionary.
        """
        return [max(1, round(share * n_latents)) for share in self.prefixes]

    def __call__(self, f: Forward) -> Tensor:
        """The term's share of the loss of a batch, a number with a gradient.

        Args:
            f: The batch on its way through the dictionary.
        """
        levels: list[Tensor] = []
        written = f.base
        if self.bias_level:
            levels.append(f.reduce((written - f.y).expand_as(f.y), self.form))
        first = 0
        for last in self.ends(len(f.parameters.decoder)):
            written = written + f.code.decode_among(f.code.values, f.parameters.decoder, first, last)
            levels.append(f.reduce(written - f.y, self.form))
            first = last
        total = torch.stack(levels).sum()
        return total / len(levels) if self.average else total


@dataclass(frozen=True)
class EndToEnd(Plain):
    """weight · mean KL(model ‖ model with ŷ in place of y) in nats per token (Braun et al. 2024, arXiv 2405.12241).

    Only where training runs the model on: see `train_end_to_end`.
    """

    weight: float = 1.0
    """Its weight."""
    kind: Literal["end_to_end"] = "end_to_end"
    """Its name in a file."""

    def __call__(self, f: Forward) -> Tensor:
        """The term's share of the loss of a batch, a number with a gradient.

        Args:
            f: The batch on its way through the dictionary.
        """
        if f.downstream is None:
            raise CutawayError(
                "the end-to-end term needs the model: train on rows of tokens, not on stored activations"
            )
        return self.weight * f.downstream(f.written)


@dataclass(frozen=True)
class Lp(Plain):
    """coefficient · mean_b Σ_i |a_i|^p · w_i, w_i = 1, ‖D_i‖ ("l2"), or the sum of its blocks' lengths ("sum").

    `of` "gate": on relu(gate) of a gated dictionary instead of on a. `warmup`: the share of training over which the
    coefficient rises from 0.
    """

    coefficient: float
    """Its coefficient λ."""
    p: float = 1.0
    """The power."""
    norms: Norms = "none"
    """What w is: 1 ("none"), ‖D_i‖ ("l2"), or the sum of its blocks' lengths ("sum")."""
    of: Literal["activations", "gate"] = "activations"
    """With "gate": on relu(gate) of a gated dictionary instead of on a."""
    warmup: float = 0.0
    """The share of training over which the coefficient rises from 0."""
    kind: Literal["lp"] = "lp"
    """Its name in a file."""

    def __call__(self, f: Forward) -> Tensor:
        """The term's share of the loss of a batch, a number with a gradient.

        Args:
            f: The batch on its way through the dictionary.
        """
        a = f.code.values if self.of == "activations" else f.code.pre.relu()
        powered = a if self.p == 1.0 else torch.where(a > 0, a, 1.0).pow(self.p) * (a > 0)
        return self.coefficient * _ramp(f.progress, self.warmup) * f.code.total(powered * f.norms(self.norms))


@dataclass(frozen=True)
class L0(Plain):
    """coefficient · mean_b Σ_i 1[h_i > θ_i], θ learned straight through (arXiv 2407.14435). JumpReLU only."""

    coefficient: float
    """Its coefficient λ."""
    warmup: float = 0.0
    """The share of training over which the coefficient rises from 0."""
    kind: Literal["l0"] = "l0"
    """Its name in a file."""

    def __call__(self, f: Forward) -> Tensor:
        """The term's share of the loss of a batch, a number with a gradient.

        Args:
            f: The batch on its way through the dictionary.
        """
        return self.coefficient * _ramp(f.progress, self.warmup) * f.code.total(_over(f))


@dataclass(frozen=True)
class QuadraticL0(Plain):
    """Drives L0 to a target instead of to 0. JumpReLU only.

    per "token": coefficient · mean_b [(2/L*)·(L0_b − L*)²]; per "batch": coefficient · (mean_b L0_b / L* − 1)².
    """

    target: float
    """Active latents per token, L*."""
    coefficient: float = 1.0
    """Its coefficient."""
    per: Literal["token", "batch"] = "batch"
    """Whether each token's L0 is driven, or the batch's mean."""
    warmup: float = 0.0
    """The share of training over which the coefficient rises from 0."""
    kind: Literal["quadratic_l0"] = "quadratic_l0"
    """Its name in a file."""

    def __call__(self, f: Forward) -> Tensor:
        """The term's share of the loss of a batch, a number with a gradient.

        Args:
            f: The batch on its way through the dictionary.
        """
        active = f.code.per_token(_over(f))
        if self.per == "token":
            penalty = (2 / self.target) * (active - self.target).square().mean()
        else:
            penalty = (active.mean() / self.target - 1).square()
        return self.coefficient * _ramp(f.progress, self.warmup) * penalty


@dataclass(frozen=True)
class Tanh(Plain):
    """coefficient · mean_b Σ_i tanh(scale · a_i · w_i), w as in `Lp` (Anthropic, January 2025)."""

    coefficient: float
    """Its coefficient λ."""
    scale: float = 4.0
    """What a is multiplied by."""
    norms: Norms = "l2"
    """As of `Lp`."""
    warmup: float = 1.0
    """The share of training over which the coefficient rises from 0."""
    kind: Literal["tanh"] = "tanh"
    """Its name in a file."""

    def __call__(self, f: Forward) -> Tensor:
        """The term's share of the loss of a batch, a number with a gradient.

        Args:
            f: The batch on its way through the dictionary.
        """
        squashed = torch.tanh(self.scale * f.code.values * f.norms(self.norms))
        return self.coefficient * _ramp(f.progress, self.warmup) * f.code.total(squashed)


@dataclass(frozen=True)
class PreActivation(Plain):
    """coefficient · mean_b Σ_i relu(θ_i − h_i) · ‖D_i‖: pulls silent latents back (Anthropic, January 2025).

    θ is 0 for other selectors than JumpReLU. It reaches every latent, so a step with it is dense, unless `dead_only`.
    """

    coefficient: float
    """Its coefficient."""
    norms: Norms = "l2"
    """As of `Lp`."""
    dead_only: bool = False
    """On dead latents alone."""
    kind: Literal["pre_activation"] = "pre_activation"
    """Its name in a file."""

    def __call__(self, f: Forward) -> Tensor:
        """The term's share of the loss of a batch, a number with a gradient.

        Args:
            f: The batch on its way through the dictionary.
        """
        latents = f.dead if self.dead_only else torch.arange(len(f.parameters.decoder), device=f.x.device)
        if not len(latents):
            return f.x.new_zeros(())
        pre = f.pre_of(latents)
        threshold = 0.0 if f.parameters.threshold is None else f.parameters.threshold[latents]
        weights = 1.0 if self.norms == "none" else f.parameters.decoder_norms(self.norms)[latents]
        return self.coefficient * ((threshold - pre).relu() * weights).sum() / len(pre)


@dataclass(frozen=True)
class AuxK(Plain):
    """Dead latents learn to reconstruct what is missing (Gao et al. 2024, arXiv 2406.04093).

        coefficient · s · R of (ê − sg(y − ŷ))²,   ê = Σ relu(h_i) D_i over the k (d/2 if None) strongest dead latents

    `form`: "sum" mean_b Σ_d; "mean" mean_b mean_d; "fvu" over Σ(y − ȳ)²; "residual" mean_b Σ_d / mean_b Σ_d (e − ē)²;
    "token" mean_b [mean_d / mean_d e²], of each token; these two are 0 where they would divide by 0.
    s is min(number of dead / k, 1) if `by_share`, else 1. The gradient reaches the encoder as well: without it dead
    latents cannot move.
    """

    coefficient: float = 1 / 32
    """Its coefficient."""
    k: int | None = None
    """How many dead latents per token; d/2 if None."""
    form: Literal["sum", "mean", "fvu", "residual", "token"] = "residual"
    """How the error is reduced (see above)."""
    by_share: bool = False
    """Scale by min(number of dead / k, 1)."""
    kind: Literal["auxk"] = "auxk"
    """Its name in a file."""

    def __call__(self, f: Forward) -> Tensor:
        """The term's share of the loss of a batch, a number with a gradient.

        Args:
            f: The batch on its way through the dictionary.
        """
        k = self.k or max(1, f.y.shape[1] // 2)
        if not len(f.dead) or self.coefficient == 0:
            return f.x.new_zeros(())
        pre = f.pre_of(f.dead)
        activations = pre.relu()
        if k < len(f.dead):
            kept = torch.zeros_like(pre).scatter(1, sparse.largest(pre.detach().contiguous(), k)[1], 1.0)
            activations = activations * kept
        residual = -f.error.detach()
        error = activations @ f.parameters.decoder[f.dead] - residual
        if self.form == "residual":
            spread = (residual - residual.mean(0)).square().sum()
            loss = error.square().sum() / _or_infinite(spread)
        elif self.form == "token":
            loss = (error.square().mean(1) / _or_infinite(residual.square().mean(1))).mean()
        else:
            loss = f.reduce(error, self.form)
        share = min(len(f.dead) / k, 1.0) if self.by_share else 1.0
        return self.coefficient * share * loss


@dataclass(frozen=True)
class MultiTopK(Plain):
    """weight · e² of the reconstruction by `factor` times as many latents (arXiv 2406.04093). TopK only; dense."""

    factor: int = 4
    """How many times k."""
    weight: float = 1 / 8
    """Its weight."""
    form: Form = "fvu"
    """As of `Reconstruction`."""
    kind: Literal["multi_topk"] = "multi_topk"
    """Its name in a file."""

    def __call__(self, f: Forward) -> Tensor:
        """The term's share of the loss of a batch, a number with a gradient.

        Args:
            f: The batch on its way through the dictionary.
        """
        if not isinstance(f.rule, TopKRule):
            raise CutawayError("multi-TopK goes with the TopK selector")
        n_latents = len(f.parameters.decoder)
        pre = f.pre_of(torch.arange(n_latents, device=f.x.device))
        indices = sparse.largest(pre.detach().contiguous(), min(self.factor * f.rule.k, n_latents))[1]
        places = sparse.Places.of_rows(indices, n_latents)
        values = pre.gather(1, indices).relu().flatten()
        written = sparse.Combine.apply(values, f.parameters.decoder, places) + f.base
        return self.weight * f.reduce(written - f.y, self.form)


@dataclass(frozen=True)
class GatedAuxiliary(Plain):
    """weight · mean_b Σ_d (y − (relu(gate) · sg(D) + sg(b_dec)))²: the gate has to reconstruct too (arXiv 2404.16014).

    The decoder is constant here; where it is not, the gate's share can be moved into it and L1 is cheated.
    """

    weight: float = 1.0
    """Its weight."""
    kind: Literal["gated_auxiliary"] = "gated_auxiliary"
    """Its name in a file."""

    def __call__(self, f: Forward) -> Tensor:
        """The term's share of the loss of a batch, a number with a gradient.

        Args:
            f: The batch on its way through the dictionary.
        """
        written = f.code.decode(f.code.pre.relu(), f.parameters.decoder.detach()) + f.base.detach()
        return self.weight * f.reduce(written - f.y, "sum")


Term = (
    Reconstruction
    | Matryoshka
    | EndToEnd
    | Lp
    | L0
    | QuadraticL0
    | Tanh
    | PreActivation
    | AuxK
    | MultiTopK
    | GatedAuxiliary
)


def check_terms(terms: tuple[Term, ...], rule: Rule) -> None:
    """Raise `CutawayError` for terms that do not go with the selector."""
    if not any(isinstance(term, Reconstruction | Matryoshka | EndToEnd) for term in terms):
        raise CutawayError("the loss has no reconstruction term: give 'reconstruction', 'matryoshka' or 'end_to_end'")
    for term in terms:
        if isinstance(term, L0 | QuadraticL0) and not isinstance(rule, JumpReLURule):
            raise CutawayError(f"the term '{term.kind}' learns thresholds: it goes with jumprelu, not {rule.kind}")
        if isinstance(term, MultiTopK) and not isinstance(rule, TopKRule):
            raise CutawayError(f"the term 'multi_topk' goes with topk, not {rule.kind}")
        gate = isinstance(term, GatedAuxiliary) or (isinstance(term, Lp) and term.of == "gate")
        if gate and rule.kind != "gated":
            raise CutawayError(f"the term '{term.kind}' on the gate goes with gated, not {rule.kind}")
    sparsity = (Lp, L0, QuadraticL0, Tanh)
    if not isinstance(rule, TopKRule | BatchTopKRule) and not any(isinstance(term, sparsity) for term in terms):
        raise CutawayError(f"nothing makes {rule.kind} sparse: give one of the terms lp, l0, quadratic_l0, tanh")


def _over(f: Forward) -> Tensor:
    """1[h > θ] as the code's values are laid out."""
    assert isinstance(f.rule, JumpReLURule)
    assert f.parameters.threshold is not None
    return StraightThroughStep.apply(
        f.code.pre, f.code.at(f.parameters.threshold), f.rule.bandwidth, f.rule.through_pre
    )


def _or_infinite(divisor: Tensor) -> Tensor:
    """What divides by nothing is nothing: of a batch of one token, or of an error that is 0."""
    return torch.where(divisor > 0, divisor, torch.inf)
