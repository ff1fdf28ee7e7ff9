"""Parameters before the first step, from a sample of activations."""

import math
from typing import Literal

import torch
from torch import Tensor

from cutaway.dictionaries.training.config import TrainConfig
from cutaway.dictionaries.training.parameters import Parameters
from cutaway.dictionaries.training.rules import BatchTopKRule, GatedRule, JumpReLURule, Rule, TopKRule
from cutaway.dictionaries.training.scaling import geometric_median

_FITTED = 1024  # tokens


def initial_parameters(x: Tensor, y: Tensor, config: TrainConfig, blocks: tuple[int, ...] = ()) -> Parameters:
    """Parameters before the first step, for x [n, d_in] and y [n, d_out], both in the units of training.

    `blocks` are the widths of a crosscoder's tensors.
    """
    rule, d_sae, subtract = config.selector, config.d_sae, config.subtract_b_dec
    d_in, d_out = x.shape[1], y.shape[1]
    generator = torch.Generator().manual_seed(config.seed)
    same = subtract or (d_in == d_out and x is y)

    def unit(width: int) -> Tensor:
        rows = torch.randn(d_sae, width, generator=generator)
        return torch.nn.functional.normalize(rows, dim=1).to(x)

    if config.initial == "uniform":
        decoder = ((2 * torch.rand(d_sae, d_out, generator=generator) - 1) / math.sqrt(d_out)).to(x)
        encoder = decoder * (d_in / d_sae) if same else unit(d_in) * (d_in / d_sae) / math.sqrt(3)
    elif config.initial == "zero_decoder":
        decoder, encoder = x.new_zeros(d_sae, d_out), unit(d_in)
    else:
        direction = unit(d_out)
        if len(blocks) > 1:  # each block of a crosscoder's decoder has the length
            parts = [torch.nn.functional.normalize(part, dim=1) for part in direction.split(list(blocks), dim=1)]
            direction = torch.cat(parts, dim=1)
        decoder = direction * (1.0 if config.decoder_norm == "unit" else config.initial_norm)
        encoder = decoder.clone() if same else unit(d_in)
    centre = {"zero": y.new_zeros(d_out), "mean": y.mean(0)}.get(config.b_dec)
    if centre is None:
        centre = torch.cat([geometric_median(part) for part in y.split(list(blocks or (d_out,)), dim=1)])
    bias = x.new_zeros(d_sae)
    if config.centre_encoder:
        bias = -(encoder @ (x - centre if subtract else x).mean(0))
    threshold = x.new_full((d_sae,), rule.initial_threshold) if isinstance(rule, JumpReLURule) else None
    if config.active is not None:
        bias = _rate_calibrated(encoder, x - centre if subtract else x, min(0.5, config.active / d_sae))
        bias = bias if threshold is None else bias + threshold
    gated = isinstance(rule, GatedRule)
    return Parameters(
        encoder=encoder.contiguous(),
        encoder_bias=bias,
        decoder=decoder.contiguous(),
        decoder_bias=centre.clone(),
        threshold=threshold,
        gate_scale=x.new_zeros(d_sae) if gated else None,
        magnitude_bias=x.new_zeros(d_sae) if gated else None,
        skip=x.new_zeros(d_out, d_in) if config.skip else None,
        blocks=blocks,
    )


def scale_encoder(parameters: Parameters, x: Tensor, rule: Rule, scale: float | Literal["fit"], subtract: bool) -> None:
    """Multiply a start's encoder and its bias by `scale`, in place.

    "fit": by what makes the codes of x [n, d], which is what is to be written, reconstruct it best in least squares
    (Gao et al. 2024, A.1, match the lengths). Random directions overlap: with encoder rows as long as the decoder's the
    k largest codes together write far too much, and steps of Adam take long to undo that. Only the k largest are so
    many from the first step on: for the selectors of other rules "fit" changes nothing.
    """
    if scale == "fit":
        if not isinstance(rule, TopKRule | BatchTopKRule):
            return
        sample = x[:_FITTED]
        wanted = sample - parameters.decoder_bias
        h = (wanted if subtract else sample) @ parameters.encoder.T + parameters.encoder_bias
        top = h.topk(min(rule.start_k or rule.k, h.shape[1]), dim=1)
        written = torch.zeros_like(h).scatter(1, top.indices, top.values.relu()) @ parameters.decoder
        size = written.double().square().sum()
        scale = float((wanted.double() * written).sum() / size) if size > 0 else 1.0
        if not scale > 0:  # codes that say nothing of what is written
            return
    parameters.encoder.mul_(scale)
    parameters.encoder_bias.mul_(scale)


def _rate_calibrated(encoder: Tensor, centred: Tensor, rate: float) -> Tensor:
    """Biases [F] with which each latent is above 0 on that share of the sample, a block of latents at a time."""
    sample = centred[:8192]
    rank = min(len(sample), max(1, round((1 - rate) * len(sample))))
    found = [(sample @ rows.T).kthvalue(rank, dim=0).values for rows in encoder.split(1024)]
    return -torch.cat(found)
