"""One training step: the loss of a batch and its gradients, dense or along the active places.

Both ways run the same terms (`terms.py`) on the same pre-activations. The dense one multiplies whole tables; the sparse
one only gathers and sums what is active, so the encoding, 2·d·F operations per token, is the only dense product of it
(dense autograd needs 12·d·F). Sparse is taken where few enough places have a value or a gradient, which is known before
anything is differentiated; it is exact, and the tests hold it against dense autograd.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cutaway.dictionaries.sparse import Encode, Places
from cutaway.dictionaries.training.code import Code, DenseCode, SparseCode
from cutaway.dictionaries.training.parameters import Parameters
from cutaway.dictionaries.training.rules import BatchTopKRule, Rule, TopKRule, rough_margin
from cutaway.dictionaries.training.terms import Forward, Term

# Gathering one row costs about as much as multiplying so many rows of a dense product (measured, two cores, d 256-768).
_DENSE_FROM = 12

Way = Literal["auto", "dense", "sparse"]


@dataclass(frozen=True, eq=False)
class TrainingState:
    """Where a training stands: what terms depend on beside the batch."""

    dead: Tensor | None = None
    """Numbers of dead latents [m], ascending; None is none."""
    variance: float = 1.0
    """mean (y − ȳ)² over a first sample."""
    progress: float = 1.0
    """The share of training that is over."""


@dataclass(frozen=True)
class StepResult:
    """`terms`: each term's value by name, 0-d; `reconstruction`: mean_b Σ_d e²; `active_tokens` [F]: in how many
    tokens.
    """

    terms: Mapping[str, Tensor]
    reconstruction: Tensor
    active_tokens: Tensor
    threshold: Tensor | None
    gradients: Parameters
    sparse: bool

    @property
    def loss(self) -> Tensor:
        """The sum of the terms."""
        return torch.stack(list(self.terms.values())).sum()


def step(
    parameters: Parameters,
    rule: Rule,
    terms: Sequence[Term],
    x: Tensor,
    y: Tensor | None = None,
    state: TrainingState | None = None,
    *,
    subtract_b_dec: bool = True,
    low_precision: bool = False,
    way: Way = "auto",
    downstream: Callable[[Tensor], Tensor] | None = None,
) -> StepResult:
    """Loss and gradients on a batch x [n, d_in] that is to be written as y [n, d_out] (x if None).

    `state` is that of the end of training without dead latents if None. `low_precision` finds candidates with a
    bfloat16 product and scores them again in full precision: TopK a quarter more than k, BatchTopK an eighth more, the
    others all that lie within eight standard deviations of bfloat16's error of their bound; so what is chosen differs
    only where bfloat16 errs by more.
    """
    y = x if y is None else y
    state = state or TrainingState()
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in parameters.tensors().items()}
    live = Parameters.of(leaves, blocks=parameters.blocks)
    centred = x - parameters.decoder_bias.detach() if subtract_b_dec else x
    b_dec = live.decoder_bias if subtract_b_dec else None
    with torch.enable_grad():
        code = _encode(live, b_dec, rule, centred, low_precision, way)
        none = torch.empty(0, dtype=torch.int64, device=x.device)

        def pre_of(latents: Tensor) -> Tensor:
            encoder, bias = live.encoder, live.encoder_bias
            if len(latents) == len(encoder) and isinstance(code, DenseCode):
                return code.pre
            if len(latents) < len(encoder):
                encoder, bias = encoder[latents], bias[latents]
            pre = torch.addmm(bias.detach(), centred, encoder.detach().T)
            return Encode.apply(encoder, bias, b_dec, centred, pre, None)

        forward = Forward(
            live, rule, x, y, code, pre_of,
            dead=none if state.dead is None else state.dead,
            variance=state.variance, progress=state.progress, downstream=downstream,
        )  # fmt: skip
        values = _named(terms, forward)
        torch.stack(list(values.values())).sum().backward()
    gradients = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    with torch.no_grad():
        active = code.values.detach() > 0
        return StepResult(
            terms={name: value.detach() for name, value in values.items()},
            reconstruction=forward.error.detach().square().sum() / len(x),
            active_tokens=code.per_latent(active.to(x.dtype)),
            threshold=_least(code, active, rule, parameters),
            gradients=Parameters.of(gradients, blocks=parameters.blocks),
            sparse=isinstance(code, SparseCode),
        )


def _named(terms: Sequence[Term], forward: Forward) -> dict[str, Tensor]:
    """Each term's value by its kind; a second one of the same kind gets a number."""
    values: dict[str, Tensor] = {}
    for term in terms:
        name, number = term.kind, 2
        while name in values:
            name, number = f"{term.kind}_{number}", number + 1
        values[name] = term(forward)
    return values


def _encode(live: Parameters, b_dec: Tensor | None, rule: Rule, centred: Tensor, low_precision: bool, way: Way) -> Code:
    encoder, bias = live.encoder.detach(), live.encoder_bias.detach()
    if low_precision and way != "dense":
        half = torch.bfloat16
        # a large constant part of x, where b_dec does not take it out, would cost all of bfloat16's digits
        constant = None if b_dec is not None else centred.mean(0)
        x = centred if constant is None else centred - constant
        start = bias if constant is None else bias + encoder @ constant
        rough = torch.addmm(start.to(half), x.to(half), encoder.to(half).T)
        with torch.no_grad():
            places = rule.places(rough, live, rough_margin(x, encoder))
        if way == "sparse" or len(places) * _DENSE_FROM <= rough.numel():
            del rough
            pre = places.products(encoder, centred) + bias[places.latents]
            if isinstance(rule, TopKRule | BatchTopKRule):
                with torch.no_grad():
                    chosen = rule.refine(pre, places, live)
                    places, pre = places.where(chosen), pre[chosen]
            return _sparse(live, b_dec, rule, centred, pre, places)
        way = "dense"
    pre = torch.addmm(bias, centred, encoder.T)
    if way != "dense":
        with torch.no_grad():
            places = rule.places(pre, live, None)
        if way == "sparse" or len(places) * _DENSE_FROM <= pre.numel():
            flat = places.tokens * places.n_latents + places.latents
            return _sparse(live, b_dec, rule, centred, pre.view(-1)[flat], places)
    whole = Encode.apply(live.encoder, live.encoder_bias, b_dec, centred, pre, None)
    code = DenseCode(whole, whole)
    return code.with_values(rule.values(code, live))


def _sparse(
    live: Parameters, b_dec: Tensor | None, rule: Rule, centred: Tensor, pre: Tensor, places: Places
) -> SparseCode:
    at_places = Encode.apply(live.encoder, live.encoder_bias, b_dec, centred, pre, places)
    code = SparseCode(at_places, at_places, places)
    return code.with_values(rule.values(code, live))


def _least(code: Code, active: Tensor, rule: Rule, parameters: Parameters) -> Tensor | None:
    """The smallest score that was kept in this batch, 0-d: what one threshold for all would have to lie below."""
    if not isinstance(rule, BatchTopKRule) or not active.any():
        return None
    scores = code.pre.detach()
    scores = scores * code.at(parameters.decoder_norms()) if rule.by_norm else scores
    return scores[active].min()
