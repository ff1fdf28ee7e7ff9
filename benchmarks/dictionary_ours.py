"""Our side of the dictionary benchmark: the sparse step as the trainer takes it, and the same training done densely.

The dense one shares nothing with the sparse one but its start: it is the equations below, PyTorch's autograd and Adam.

    h = (x − b_dec)·W_enc + b_enc,   x̂ = a·W_dec + b_dec,   e = x − x̂
    topk        a = relu(h) on the k largest of a token      L = mean_b Σ_d e² + α·mean_b Σ_d (ê − sg(e))²
    batchtopk   a = relu(h) on the k·n largest of n tokens   the same; ê of the d/2 strongest dead latents of a token
    jumprelu    a = h·1[h > θ]                               L = mean_b Σ_d e² + (mean_b Σ_i 1[h_i > θ_i] / k − 1)²
"""

from dataclasses import replace
from typing import Any

import torch
from dictionary_peers import Method, Request, Weights
from torch import Tensor

from cutaway.data.harvesting.hardware import keep_freed_memory
from cutaway.dictionaries.dictionary import Port
from cutaway.dictionaries.selectors import JumpReLU
from cutaway.dictionaries.training.config import TrainConfig
from cutaway.dictionaries.training.rules import BatchTopKRule, JumpReLURule, TopKRule
from cutaway.dictionaries.training.terms import AuxK, QuadraticL0, Reconstruction
from cutaway.dictionaries.training.trainer import Trainer

_BANDWIDTH, _AUX = 0.1, 1 / 32


def trainer(request: Request, first: Tensor) -> Trainer:
    """The trainer that `cutaway.dictionaries` would train with."""
    keep_freed_memory()
    config = TrainConfig(
        d_sae=request.d_sae,
        tokens=request.steps * request.batch,
        batch=request.batch,
        selector=TopKRule(request.k),
        terms=(Reconstruction(), AuxK(_AUX, form="sum")),
        learning_rate=request.learning_rate,
        encoder_scale=request.options.get("encoder_scale", 1.0),
        warmup=0,
        decay=float(request.options.get("decay", 0.0)),
        seed=request.seed,
        low_precision=bool(request.options.get("low_precision")),
    )
    if request.selector == "batchtopk":
        config = replace(config, selector=BatchTopKRule(request.k))
    elif request.selector == "jumprelu":
        rule = JumpReLURule(bandwidth=_BANDWIDTH, initial_threshold=_BANDWIDTH)
        terms = (Reconstruction(), QuadraticL0(float(request.k)))
        config = replace(config, selector=rule, terms=terms, active=request.k)  # sparse from the start
    return Trainer(config, first)


def _weights(of: Trainer) -> Weights:
    found = of.dictionary([Port("site", of.parameters.encoder.shape[1])])
    threshold = found.selector.threshold if isinstance(found.selector, JumpReLU) else None
    return Weights(found.W_enc, found.b_enc, found.W_dec, found.b_dec, threshold)


def sparse(request: Request, first: Tensor) -> Method:
    """The sparse step."""
    ours = trainer(request, first)
    return Method(ours.step, lambda: _weights(ours))


def dense(request: Request, first: Tensor) -> Method:
    """The same start, loss and update with dense codes, autograd, and Adam as PyTorch picks it (or fused)."""
    ours = trainer(request, first)
    config = ours.config
    leaves = {name: tensor.requires_grad_() for name, tensor in ours.parameters.tensors().items()}
    fused: dict[str, Any] = {"fused": True} if request.options.get("fused") else {}
    adam = torch.optim.Adam(leaves.values(), lr=request.learning_rate, betas=config.adam_betas, **fused)
    half = torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(request.options.get("autocast")))
    number = 0

    def step(x: Tensor) -> None:
        nonlocal number
        x = ours.prepared(x)[0]
        with half:
            loss, fired = dense_loss(leaves, x, request, ours.dead())
        adam.zero_grad()
        loss.backward()
        decoder = leaves["decoder"]
        with torch.no_grad():
            assert decoder.grad is not None
            decoder.grad -= (decoder.grad * decoder).sum(1, keepdim=True) * decoder
            adam.param_groups[0]["lr"] = config.rate(number)
            adam.step()
            decoder /= decoder.norm(dim=1, keepdim=True)
            if "threshold" in leaves:
                leaves["threshold"].clamp_(min=0)
            ours.silent.add_(len(x)).masked_fill_(fired, 0)
        number += 1

    def weights() -> Weights:
        with torch.no_grad():
            return _weights(ours)

    return Method(step, weights)


def dense_loss(of: dict[str, Tensor], x: Tensor, request: Request, dead: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of x [n, d] as the equations at the head of this file stand, and which latents fired, [F]."""
    h = (x - of["decoder_bias"]) @ of["encoder"].T + of["encoder_bias"]
    if request.selector == "jumprelu":
        return _jumprelu_loss(of, x, h, request.k)
    if request.selector == "topk":
        a = torch.zeros_like(h).scatter(1, h.topk(request.k, dim=1).indices, 1.0) * h.relu()
    else:
        largest = h.flatten().topk(request.k * len(x)).indices
        a = torch.zeros_like(h).flatten().scatter(0, largest, 1.0).view_as(h) * h.relu()
    error = x - (a @ of["decoder"] + of["decoder_bias"])
    loss = error.square().sum(1).mean()
    if len(dead):
        strongest = torch.full_like(h, -torch.inf)
        strongest[:, dead] = h[:, dead].detach()
        kept = strongest.topk(min(max(1, x.shape[1] // 2), len(dead)), dim=1).indices
        a_dead = torch.zeros_like(h).scatter(1, kept, 1.0) * h.relu()
        loss = loss + _AUX * (a_dead @ of["decoder"] - error.detach()).square().sum(1).mean()
    return loss, (a.detach() > 0).any(0)


def _jumprelu_loss(of: dict[str, Tensor], x: Tensor, h: Tensor, target: int) -> tuple[Tensor, Tensor]:
    """With the straight-through gradients of θ: −(θ/ε)·K of a, −(1/ε)·K of the count, K = 1[|h − θ| < ε/2]."""
    threshold = of["threshold"]
    window = ((h - threshold).abs() < _BANDWIDTH / 2).detach() / _BANDWIDTH
    moved = threshold - threshold.detach()  # zero, with a gradient
    over = (h > threshold).to(h)
    a = h * over - threshold.detach() * window * moved
    active = (over - window * moved).sum(1).mean()
    loss = (x - (a @ of["decoder"] + of["decoder_bias"])).square().sum(1).mean()
    return loss + (active / target - 1).square(), over.any(0)
