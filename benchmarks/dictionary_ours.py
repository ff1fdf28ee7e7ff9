"""Our side of the dictionary benchmark: the sparse step as the trainer takes it, and the same training done densely."""

import torch
from dictionary_peers import Method, Request, Weights
from torch import Tensor

from cutaway.data.hardware import keep_freed_memory
from cutaway.dictionaries.train import TrainConfig, Trainer


def trainer(request: Request, first: Tensor) -> Trainer:
    """The trainer that `cutaway.dictionaries` would train with."""
    keep_freed_memory()
    config = TrainConfig(
        d_sae=request.d_sae,
        k=request.k,
        tokens=request.steps * request.batch,
        batch=request.batch,
        learning_rate=request.learning_rate,
        warmup=0,
        decay=0.0,
        seed=request.seed,
        low_precision=bool(request.options.get("low_precision")),
    )
    return Trainer(config, first)


def _weights(of: Trainer) -> Weights:
    found = of.dictionary("site", {}, {})
    return Weights(found.W_enc, found.b_enc, found.W_dec, found.b_dec)


def sparse(request: Request, first: Tensor) -> Method:
    """The sparse step."""
    ours = trainer(request, first)
    return Method(ours.step, lambda: _weights(ours))


def dense(request: Request, first: Tensor) -> Method:
    """The same start, loss and update with dense codes, autograd, and Adam as PyTorch picks it (or fused)."""
    ours = trainer(request, first)
    config = ours.config
    leaves = {name: tensor.requires_grad_() for name, tensor in ours.parameters.tensors().items()}
    fused = {"fused": True} if request.options.get("fused") else {}
    adam = torch.optim.Adam(leaves.values(), lr=request.learning_rate, betas=config.adam_betas, **fused)
    half = torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(request.options.get("autocast")))

    def step(x: Tensor) -> None:
        x = x * ours.scale
        with half:
            loss, fired = dense_loss(
                leaves, x, request, ours.dead(), config.aux_k or x.shape[1] // 2, config.aux_coefficient
            )
        adam.zero_grad()
        loss.backward()
        decoder = leaves["decoder"]
        with torch.no_grad():
            assert decoder.grad is not None
            decoder.grad -= (decoder.grad * decoder).sum(1, keepdim=True) * decoder
            adam.step()
            decoder /= decoder.norm(dim=1, keepdim=True)
            ours.silent.add_(len(x)).masked_fill_(fired, 0)

    return Method(step, lambda: _weights(ours))


def dense_loss(
    of: dict[str, Tensor], x: Tensor, request: Request, dead: Tensor, aux_k: int, aux_coefficient: float
) -> tuple[Tensor, Tensor]:
    """The trainer's loss of x [n, d] as its equation stands, for autograd; and which latents fired, [F].

    mean_b Σ_d (x − x̂)² + α · mean_b Σ_d (ê − (x − x̂))², the second over the `aux_k` strongest dead latents, and with
    x − x̂ a constant in it.
    """
    h = (x - of["decoder_bias"]) @ of["encoder"].T + of["encoder_bias"]
    a = torch.zeros_like(h).scatter(1, h.topk(request.k, dim=1).indices, 1.0) * h.relu()
    residual = x - (a @ of["decoder"] + of["decoder_bias"])
    loss = residual.square().sum(1).mean()
    if len(dead):
        strongest = torch.full_like(h, -torch.inf)
        strongest[:, dead] = h[:, dead].detach()
        kept = strongest.topk(min(aux_k, len(dead)), dim=1).indices
        a_dead = torch.zeros_like(h).scatter(1, kept, 1.0) * h.relu()
        loss = loss + aux_coefficient * (a_dead @ of["decoder"] - residual.detach()).square().sum(1).mean()
    return loss, (a.detach() > 0).any(0)
