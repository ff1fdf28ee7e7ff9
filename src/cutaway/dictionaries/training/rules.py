"""How a selector chooses while it is trained.

What a finished dictionary does is in `selectors.py`; a rule says which places of a batch can have a value or a gradient
(`places`), and what the values are as a function of the pre-activations that gradients pass through (`values`).
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.dictionaries import sparse
from cutaway.dictionaries.sparse import Places
from cutaway.dictionaries.training.code import Code, DenseCode, StraightThroughJump
from cutaway.dictionaries.training.parameters import Parameters, Plain

# With bfloat16 a pre-activation is off by about 2^-9 of the typical size of one summand times √d; this many standard
# deviations are left between a rough score and a bound, so that no place is missed in practice.
_DEVIATIONS = 8


@dataclass(frozen=True)
class ReLURule(Plain):
    """Every positive pre-activation. Sparse only once an L1 or a similar term has made it so."""

    kind: Literal["relu"] = "relu"
    """Its name in a file."""

    def places(self, pre: Tensor, parameters: Parameters, margin: Tensor | None) -> Places:
        """The places of a batch that can have a value or a gradient.

        Args:
            pre: Pre-activations [n, F], in bfloat16 where they are rough.
            parameters: The weights as they are trained.
            margin: How far each token's pre-activations may be off [n]; None: they are exact.
        """
        return _above(pre, torch.zeros((), dtype=pre.dtype), margin)

    def values(self, code: Code, parameters: Parameters) -> Tensor:
        """The activations at these places, laid out as the code is.

        Args:
            code: The batch's pre-activations at these places, with gradient.
            parameters: The weights as they are trained.
        """
        return code.pre.relu()


@dataclass(frozen=True)
class TopKRule(Plain):
    """The k largest pre-activations of each token."""

    k: int
    """Active latents per token."""
    by_norm: bool = False
    """Take the largest h·‖W_dec‖ instead, for decoders whose norms are free."""
    start_k: int | None = None
    """As many at the start, falling linearly to k; k throughout if None."""
    anneal: float = 0.0
    """The first share of training, over which k falls."""
    kind: Literal["topk"] = "topk"
    """Its name in a file."""

    def at(self, progress: float) -> "TopKRule":
        """The rule at a share of training.

        Args:
            progress: The share of training that is over, from 0 to 1.
        """
        return replace(self, k=_annealed(self.k, self.start_k, self.anneal, progress))

    def places(self, pre: Tensor, parameters: Parameters, margin: Tensor | None) -> Places:
        """The places of a batch that can have a value or a gradient.

        Args:
            pre: Pre-activations [n, F], in bfloat16 where they are rough.
            parameters: The weights as they are trained.
            margin: How far each token's pre-activations may be off [n]; None: they are exact.
        """
        scores = pre * parameters.decoder_norms().to(pre) if self.by_norm else pre
        k = self.k if margin is None else min(self.k + max(self.k // 4, 1), pre.shape[1])
        return Places.of_rows(sparse.largest(scores, k)[1], pre.shape[1])

    def refine(self, pre: Tensor, places: Places, parameters: Parameters) -> Tensor:
        """Of candidates [P] found roughly, the true k of each token, as places in that list.

        Args:
            pre: Their exact pre-activations [P].
            places: Where they are in the batch.
            parameters: The weights as they are trained.
        """
        scores = pre * parameters.decoder_norms()[places.latents] if self.by_norm else pre
        per_token = scores.view(places.n, -1)
        chosen = per_token.topk(self.k, dim=1, sorted=False).indices
        start = torch.arange(places.n, device=pre.device)[:, None] * per_token.shape[1]
        return (chosen + start).flatten()

    def values(self, code: Code, parameters: Parameters) -> Tensor:
        """The activations at these places, laid out as the code is.

        Args:
            code: The batch's pre-activations at these places, with gradient.
            parameters: The weights as they are trained.
        """
        if isinstance(code, DenseCode):
            scores = code.pre.detach()
            scores = scores * parameters.decoder_norms().detach() if self.by_norm else scores
            kept = torch.zeros_like(scores).scatter(1, scores.topk(self.k, dim=1).indices, 1.0)
            return code.pre.relu() * kept
        return code.pre.relu()


@dataclass(frozen=True)
class BatchTopKRule(Plain):
    """The k·n largest positive pre-activations of a batch of n tokens."""

    k: int
    """Active latents per token, on average."""
    by_norm: bool = False
    """Take the largest h·‖W_dec‖ instead, for decoders whose norms are free."""
    start_k: int | None = None
    """As many at the start, falling linearly to k; k throughout if None."""
    anneal: float = 0.0
    """The first share of training, over which k falls."""
    kind: Literal["batchtopk"] = "batchtopk"
    """Its name in a file."""

    def at(self, progress: float) -> "BatchTopKRule":
        """The rule at a share of training.

        Args:
            progress: The share of training that is over, from 0 to 1.
        """
        return replace(self, k=_annealed(self.k, self.start_k, self.anneal, progress))

    def places(self, pre: Tensor, parameters: Parameters, margin: Tensor | None) -> Places:
        """The places of a batch that can have a value or a gradient.

        Args:
            pre: Pre-activations [n, F], in bfloat16 where they are rough.
            parameters: The weights as they are trained.
            margin: How far each token's pre-activations may be off [n]; None: they are exact.
        """
        scores = pre * parameters.decoder_norms().to(pre) if self.by_norm else pre
        count = self.k * len(pre)
        flat = sparse.largest_of_all(scores, count if margin is None else count + max(count // 8, 1))
        return Places.of_flat(flat, len(pre), pre.shape[1])

    def refine(self, pre: Tensor, places: Places, parameters: Parameters) -> Tensor:
        """Of candidates [P] found roughly, the true k·n, as places in that list.

        Args:
            pre: Their exact pre-activations [P].
            places: Where they are in the batch.
            parameters: The weights as they are trained.
        """
        scores = pre * parameters.decoder_norms()[places.latents] if self.by_norm else pre
        return sparse.largest_of_all(scores, self.k * places.n)

    def values(self, code: Code, parameters: Parameters) -> Tensor:
        """The activations at these places, laid out as the code is.

        Args:
            code: The batch's pre-activations at these places, with gradient.
            parameters: The weights as they are trained.
        """
        if isinstance(code, DenseCode):
            scores = code.pre.detach()
            scores = (scores * parameters.decoder_norms().detach() if self.by_norm else scores).relu()
            flat = scores.flatten().topk(min(self.k * code.n, scores.numel())).indices
            kept = torch.zeros_like(scores).flatten().scatter(0, flat, 1.0).view_as(scores)
            return code.pre.relu() * kept
        return code.pre.relu()


@dataclass(frozen=True)
class GatedRule(Plain):
    """A gate h > 0, and a magnitude that shares the gate's directions (arXiv 2404.16014)."""

    kind: Literal["gated"] = "gated"
    """Its name in a file."""

    def places(self, pre: Tensor, parameters: Parameters, margin: Tensor | None) -> Places:
        """The places of a batch that can have a value or a gradient.

        Args:
            pre: Pre-activations [n, F], in bfloat16 where they are rough.
            parameters: The weights as they are trained.
            margin: How far each token's pre-activations may be off [n]; None: they are exact.
        """
        return _above(pre, torch.zeros((), dtype=pre.dtype), margin)

    def values(self, code: Code, parameters: Parameters) -> Tensor:
        """The activations at these places, laid out as the code is.

        Args:
            code: The batch's pre-activations at these places, with gradient.
            parameters: The weights as they are trained.
        """
        assert parameters.gate_scale is not None
        assert parameters.magnitude_bias is not None
        direction = code.pre - code.at(parameters.encoder_bias)
        magnitude = direction * code.at(parameters.gate_scale.exp()) + code.at(parameters.magnitude_bias)
        return magnitude.relu() * (code.pre.detach() > 0)


@dataclass(frozen=True)
class JumpReLURule(Plain):
    """h > θ with a straight-through gradient of width `bandwidth`; see `code.StraightThroughJump`.

    θ is learned as it is, in float32, and set back to 0 where a step takes it below; its logarithm would hardly move.
    """

    bandwidth: float = 0.001
    """Width of the window around θ that gradients pass through."""
    initial_threshold: float = 0.001
    """θ of every latent at the start."""
    through_pre: bool = False
    """Whether gradients of the jump reach h too, not θ alone."""
    kind: Literal["jumprelu"] = "jumprelu"
    """Its name in a file."""

    def __post_init__(self) -> None:
        if not self.bandwidth > 0:
            raise CutawayError(f"the bandwidth of the straight-through gradient is {self.bandwidth}; give more than 0")

    def places(self, pre: Tensor, parameters: Parameters, margin: Tensor | None) -> Places:
        """The places of a batch that can have a value or a gradient.

        Args:
            pre: Pre-activations [n, F], in bfloat16 where they are rough.
            parameters: The weights as they are trained.
            margin: How far each token's pre-activations may be off [n]; None: they are exact.
        """
        assert parameters.threshold is not None
        return _above(pre, parameters.threshold - self.bandwidth / 2, margin)

    def values(self, code: Code, parameters: Parameters) -> Tensor:
        """The activations at these places, laid out as the code is.

        Args:
            code: The batch's pre-activations at these places, with gradient.
            parameters: The weights as they are trained.
        """
        assert parameters.threshold is not None
        return StraightThroughJump.apply(code.pre, code.at(parameters.threshold), self.bandwidth, self.through_pre)


Rule = ReLURule | TopKRule | BatchTopKRule | GatedRule | JumpReLURule


def _annealed(k: int, start: int | None, over: float, progress: float) -> int:
    if start is None or progress >= over:
        return k
    return round(start + (k - start) * progress / over)


def rough_margin(centred: Tensor, encoder: Tensor) -> Tensor:
    """How far a bfloat16 pre-activation may lie from the exact one in practice, for each token: [n]."""
    longest = torch.linalg.vector_norm(encoder, dim=1).amax()
    return centred.norm(dim=1) * longest * (_DEVIATIONS * 2**-9 / math.sqrt(centred.shape[1]))


def _above(pre: Tensor, bound: Tensor, margin: Tensor | None) -> Places:
    if margin is not None:
        bound = (bound - margin[:, None] - 2**-7 * bound.abs()).to(pre)
    flat = (pre > bound).view(-1).nonzero().flatten()
    return Places.of_flat(flat, len(pre), pre.shape[1])
