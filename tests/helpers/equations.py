"""The losses as they are written down: dense tables in float64, the selectors' gradients by hand.

What `step` computes must equal this. Nothing of the package is used but the container of the weights. An equation is a
function of `Quantities`; autograd differentiates it for the decoder's side and for a, h and 1[h > θ], which are leaves
here. From those the encoder's gradients follow by the formulas below, also where a selector has no derivative:

    topk, batchtopk   a = relu(h) on the chosen places             ∂a/∂h = 1[chosen, h > 0]
    relu              a = relu(h)                                  ∂a/∂h = 1[h > 0]
    jumprelu          a = h·1[h > θ], K = 1[|h − θ| < ε/2]         ∂a/∂h = 1[h > θ] (+ θ/ε·K)   ∂a/∂θ = −θ/ε·K
                      H = 1[h > θ]                                 ∂H/∂h = 0 (+ 1/ε·K)           ∂H/∂θ = −1/ε·K
    gated             a = 1[h > 0]·relu(u·exp(r) + m), u = h − b   through u, r and m; the gate has no gradient
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cutaway.dictionaries.training.parameters import Parameters


@dataclass
class Quantities:
    """What equations are written in. Tables [n, F] or [n, d]; `dead` numbers of latents."""

    x: Tensor
    y: Tensor
    h: Tensor
    a: Tensor
    over: Tensor
    D: Tensor
    b_dec: Tensor
    theta: Tensor
    S: Tensor | None
    dead: list[int]
    blocks: tuple[int, ...]

    @property
    def base(self) -> Tensor:
        return self.b_dec if self.S is None else self.b_dec + self.x @ self.S.T

    @property
    def e(self) -> Tensor:
        """ŷ − y."""
        return self.a @ self.D + self.base - self.y

    def up_to(self, last: int) -> Tensor:
        """ŷ − y with the latents before `last` only."""
        return self.a[:, :last] @ self.D[:last] + self.base - self.y

    @property
    def norms(self) -> Tensor:
        return self.D.square().sum(1).sqrt()

    @property
    def summed_norms(self) -> Tensor:
        """Σ over the blocks of their decoders' lengths."""
        return sum((part.square().sum(1).sqrt() for part in self.D.split(self.blocks, dim=1)), torch.zeros(()))

    @property
    def spread(self) -> Tensor:
        """Σ_b Σ_d (y − ȳ)²."""
        return (self.y - self.y.mean(0)).square().sum()

    def strongest(self, k: int, among: Sequence[int] | None = None) -> Tensor:
        """relu(h) on the k strongest of some latents, 0 elsewhere."""
        latents = list(range(self.h.shape[1]) if among is None else among)
        keep = torch.zeros_like(self.h)
        for token, row in enumerate(self.h.tolist()):
            for latent in sorted(latents, key=lambda i: -row[i])[:k]:
                keep[token, latent] = 1
        return self.h.relu() * keep

    def missing(self, k: int) -> tuple[Tensor, Tensor]:
        """AuxK's ê − r, and r = sg(y − ŷ)."""
        r = -self.e.detach()
        return self.strongest(k, self.dead) @ self.D - r, r


Equation = Callable[[Quantities], Tensor]


@dataclass(frozen=True)
class Selecting:
    """A selector in plain numbers: `name`, and what it needs."""

    name: str
    k: int = 0
    by_norm: bool = False
    bandwidth: float = 0.0
    through_pre: bool = False


def chosen_by(selecting: Selecting, h: Tensor, norms: Tensor) -> Tensor:
    """1 at the places that TopK or BatchTopK keeps, by sorting everything."""
    scores = h * norms if selecting.by_norm else h
    keep = torch.zeros_like(h)
    if selecting.name == "topk":
        for token, row in enumerate(scores.tolist()):
            for latent in sorted(range(len(row)), key=lambda i: -row[i])[: selecting.k]:
                keep[token, latent] = 1
        return keep
    flat = scores.flatten().tolist()
    for place in sorted(range(len(flat)), key=lambda i: -flat[i])[: selecting.k * len(h)]:
        keep.view(-1)[place] = 1
    return keep


def by_equation(
    parameters: Parameters,
    selecting: Selecting,
    equation: Equation,
    x: Tensor,
    y: Tensor | None = None,
    *,
    subtract_b_dec: bool = True,
    dead: Sequence[int] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its gradient for every parameter."""
    y = x if y is None else y
    E, b = parameters.encoder, parameters.encoder_bias
    D = parameters.decoder.clone().requires_grad_()
    b_dec = parameters.decoder_bias.clone().requires_grad_()
    S = None if parameters.skip is None else parameters.skip.clone().requires_grad_()
    theta = (torch.zeros_like(b) if parameters.threshold is None else parameters.threshold.clone()).requires_grad_()
    xc = x - parameters.decoder_bias if subtract_b_dec else x
    u = xc @ E.T
    h = (u + b).requires_grad_()
    at = h.detach()
    th = theta.detach()
    if selecting.name == "gated":
        assert parameters.gate_scale is not None
        assert parameters.magnitude_bias is not None
        scale = parameters.gate_scale.exp()
        magnitude = u * scale + parameters.magnitude_bias
        open_ = ((at > 0) & (magnitude > 0)).to(h)
        a = magnitude * open_
    elif selecting.name == "jumprelu":
        a = at * (at > th)
    elif selecting.name == "relu":
        a = at * (at > 0)
    else:
        a = at * (at > 0) * chosen_by(selecting, at, parameters.decoder.norm(dim=1))
    a = a.detach().requires_grad_()
    over = (at > th).to(h).requires_grad_()
    q = Quantities(x, y, h, a, over, D, b_dec, theta, S, list(dead), parameters.blocks or (y.shape[1],))
    loss = equation(q)
    leaves = [leaf for leaf in (h, a, over, D, b_dec, theta, S) if leaf is not None]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    of = {
        id(leaf): torch.zeros_like(leaf) if value is None else value for leaf, value in zip(leaves, found, strict=True)
    }
    to_h, to_a, to_over, to_theta = of[id(h)], of[id(a)], of[id(over)], of[id(theta)]
    to_u = torch.zeros_like(to_h)
    gradients: dict[str, Tensor] = {}
    if selecting.name == "gated":
        to_magnitude = to_a * open_  # pyright: ignore[reportPossiblyUnboundVariable]
        to_u = to_magnitude * scale  # pyright: ignore[reportPossiblyUnboundVariable]
        gradients["gate_scale"] = (to_magnitude * u * scale).sum(0)  # pyright: ignore[reportPossiblyUnboundVariable]
        gradients["magnitude_bias"] = to_magnitude.sum(0)
    elif selecting.name == "jumprelu":
        epsilon = selecting.bandwidth
        window = ((at - th).abs() < epsilon / 2).to(h)
        to_theta = to_theta - (to_a * th / epsilon * window + to_over / epsilon * window).sum(0)
        to_h = to_h + to_a * (at > th)
        if selecting.through_pre:
            to_h = to_h + to_a * th / epsilon * window + to_over / epsilon * window
        gradients["threshold"] = to_theta
    else:
        to_h = to_h + to_a * (a.detach() > 0)
    to_table = to_h + to_u  # h = u + b, so b has no part in what comes through u alone
    gradients["encoder"] = to_table.T @ xc
    gradients["encoder_bias"] = to_h.sum(0)
    gradients["decoder"] = of[id(D)]
    gradients["decoder_bias"] = of[id(b_dec)] - (to_table.sum(0) @ E if subtract_b_dec else 0)
    if S is not None:
        gradients["skip"] = of[id(S)]
    return loss.detach(), gradients
