"""One training step of a TopK dictionary, gradients written by hand along the active latents.

    L = mean_b Σ_d (x̂ − x)²  +  α · mean_b Σ_d (ê − (x − x̂))²

with x̂ = b_dec + Σ_{i in top k of h} relu(h_i) D_i, h = (x − b_dec) Eᵀ + b, and, where latents are dead, ê the sum of
relu(h_i) D_i over the k_aux dead latents with the largest h (AuxK of Gao et al. 2024, arXiv 2406.04093; no bias). In
the second term x − x̂ is a constant, so it moves only the dead latents, their encoder rows included, and b_dec through
the encoder. Dense autograd needs 12·d·F operations a token; here the encoding, 2·d·F, is the only dense product.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cutaway.dictionaries import sparse


@dataclass(frozen=True)
class Parameters:
    """What is trained. Encoder and decoder both hold one latent a row, which the sparse gradients need."""

    encoder: Tensor  # E [F, d], W_encᵀ
    encoder_bias: Tensor  # b [F]
    decoder: Tensor  # D [F, d], rows of length 1
    decoder_bias: Tensor  # b_dec [d]

    def tensors(self) -> dict[str, Tensor]:
        """By name, in a fixed order."""
        return dict(vars(self))


@dataclass(frozen=True)
class StepResult:
    """Losses as 0-d tensors (sum over d, mean over the batch), how often each latent fired [F], and the gradients."""

    reconstruction: Tensor
    auxiliary: Tensor
    fired: Tensor
    gradients: Parameters


@torch.no_grad()
def topk_step(
    parameters: Parameters,
    x: Tensor,
    k: int,
    *,
    dead: Tensor | None = None,
    aux_k: int = 0,
    aux_coefficient: float = 0.0,
    low_precision: bool = False,
) -> StepResult:
    """Loss and gradients on a batch x [n, d]; `dead` are the numbers of the dead latents [m], if any.

    With `low_precision` candidates for the top k are found with a bfloat16 product, a quarter more than k of them, and
    then scored in full precision, so only a latent that bfloat16 misplaces by that many ranks can be missed.
    """
    encoder, decoder = parameters.encoder, parameters.decoder
    n, n_latents = len(x), len(encoder)
    centred = x - parameters.decoder_bias
    pre = None
    if low_precision:
        scores, indices = _low_precision_top(parameters, centred, k)
    else:
        pre = torch.addmm(parameters.encoder_bias, centred, encoder.T)
        scores, indices = sparse.largest(pre, k)
    with torch.enable_grad():
        values = scores.relu().requires_grad_()
        written = sparse.decode(values, indices, decoder)
        error = written.detach() + parameters.decoder_bias - x
        from_above = error * (2 / n)
        (to_values,) = torch.autograd.grad(written, values, from_above)
    values = values.detach()
    active = values > 0
    to_scores = to_values * active

    latents = sparse.by_latent(indices, n_latents)
    grad_decoder = latents.outer(values, from_above)
    grad_encoder = latents.outer(to_scores, centred)
    grad_encoder_bias = sparse.latent_sums(to_scores, indices, n_latents)
    auxiliary = error.new_zeros(())
    if dead is not None and len(dead) and aux_coefficient > 0:
        dead_pre = pre[:, dead] if pre is not None else _pre(parameters, centred, dead)
        auxiliary, to_dead, to_dead_decoder = _auxiliary(dead_pre, decoder[dead], -error, aux_k, aux_coefficient)
        grad_decoder.index_add_(0, dead, to_dead_decoder)
        grad_encoder.index_add_(0, dead, to_dead.T @ centred)
        grad_encoder_bias.index_add_(0, dead, to_dead.sum(0))
    # every h depends on b_dec as −E does, so its share needs only the bias's gradient, not the tokens again
    grad_decoder_bias = from_above.sum(0) - grad_encoder_bias @ encoder
    return StepResult(
        reconstruction=error.square().sum() / n,
        auxiliary=auxiliary,
        fired=sparse.latent_sums(active.to(x.dtype), indices, n_latents),
        gradients=Parameters(grad_encoder, grad_encoder_bias, grad_decoder, grad_decoder_bias),
    )


def _pre(parameters: Parameters, centred: Tensor, latents: Tensor) -> Tensor:
    return torch.addmm(parameters.encoder_bias[latents], centred, parameters.encoder[latents].T)


def _low_precision_top(parameters: Parameters, centred: Tensor, k: int) -> tuple[Tensor, Tensor]:
    half = torch.bfloat16
    rough = torch.addmm(parameters.encoder_bias.to(half), centred.to(half), parameters.encoder.to(half).T)
    _, candidates = sparse.largest(rough, min(k + max(k // 4, 1), rough.shape[1]))
    scores = sparse.row_products(candidates, parameters.encoder, centred) + parameters.encoder_bias[candidates]
    values, chosen = scores.topk(k, dim=-1, sorted=False)
    return values, candidates.gather(1, chosen)


def _auxiliary(
    pre: Tensor, decoder: Tensor, residual: Tensor, aux_k: int, coefficient: float
) -> tuple[Tensor, Tensor, Tensor]:
    """α · mean_b Σ_d (ê − residual)² over the dead latents (pre [n, m], decoder [m, d]); gradients of pre and decoder.

    Dense over the dead: AuxK keeps so many of them that gathering rows would cost more than multiplying.
    """
    if aux_k < pre.shape[1]:
        values, indices = sparse.largest(pre.contiguous(), aux_k)
        activations = torch.zeros_like(pre).scatter_(1, indices, values.relu())
    else:
        activations = pre.relu()
    error = activations @ decoder - residual
    from_above = error * (2 * coefficient / len(pre))
    to_pre = (from_above @ decoder.T) * (activations > 0)
    return coefficient * error.square().sum() / len(pre), to_pre, activations.T @ from_above
