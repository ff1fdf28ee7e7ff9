"""A dictionary: an encoder, a selector and a decoder that write an activation as a few named directions.

    h = (x − b_dec) · W_enc + b_enc          pre-activations, [n, F]
    a = relu(h) on the k largest of h        TopK (Gao et al. 2024, arXiv 2406.04093), else 0
    x̂ = a · W_dec + b_dec

Whatever scaling was used in training is already in the weights: `x` is the model's activation as it is at `site`, rows
of W_dec have length 1, so an activation is the length of what its latent adds to the stream.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.dictionaries import sparse

_CHUNK_BYTES = 32 << 20  # pre-activations of one chunk of tokens: they should stay in a cache, and memory flat


@dataclass(frozen=True)
class TopK:
    """Keep the k largest pre-activations of a token; of those, the positive ones are active."""

    k: int

    def select(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-activations [n, F] -> values [n, k] (≥ 0), indices [n, k]."""
        values, indices = sparse.largest(pre, self.k)
        return values.relu(), indices


@dataclass(frozen=True, eq=False)
class Dictionary:
    """Weights of a sparse dictionary and where they belong.

    `W_enc` [d, F], `b_enc` [F], `W_dec` [F, d], `b_dec` [d]; `site` is the canonical name of the tensor it was trained
    on; `model` says which model's ("id", "revision", "weight_hash"); `sparsity` is each latent's firing frequency as
    log10 [F], where measured; `metadata` holds what else is to travel with the weights. Raises `CutawayError` when
    shapes disagree or a weight is not finite.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    selector: TopK
    site: str
    model: Mapping[str, Any] = field(default_factory=dict)
    sparsity: Tensor | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.W_enc.ndim != 2 or 0 in self.W_enc.shape:
            raise CutawayError(f"W_enc has shape {list(self.W_enc.shape)}; a dictionary needs [d_in, d_sae]")
        d, n = self.W_enc.shape
        shapes: dict[str, tuple[int, ...]] = {"W_enc": (d, n), "b_enc": (n,), "W_dec": (n, d), "b_dec": (d,)}
        if self.sparsity is not None:
            shapes["sparsity"] = (n,)
        for name, shape in shapes.items():
            tensor: Tensor = getattr(self, name)
            if tuple(tensor.shape) != shape:
                raise CutawayError(
                    f"{name} has shape {list(tensor.shape)} where {list(shape)} is needed (d_in={d}, d_sae={n})"
                )
            if name != "sparsity" and not torch.isfinite(tensor).all():
                raise CutawayError(f"{name} holds NaN or infinite weights: the dictionary cannot be used")
        if not 1 <= self.selector.k <= n:
            raise CutawayError(f"k = {self.selector.k} latents cannot be active out of {n}")

    @property
    def d_in(self) -> int:
        """Width of the activations it reads."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]

    @property
    def k(self) -> int:
        """The most latents that are active on a token."""
        return self.selector.k

    def pre_activations(self, x: Tensor) -> Tensor:
        """h: [..., d] -> [..., F]."""
        centred = x.to(self.W_enc) - self.b_dec
        return torch.addmm(self.b_enc, centred.reshape(-1, self.d_in), self.W_enc).view(*x.shape[:-1], self.d_sae)

    @torch.no_grad()
    def encode_topk(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Only what is active: [..., d] -> values [..., k] and latents [..., k], by falling value, zeros at the end.

        Goes through the tokens in chunks, so memory beyond the result does not grow with their number.
        """
        flat = self._flat(x)
        values = flat.new_empty(len(flat), self.k, dtype=self.W_enc.dtype)
        indices = torch.empty(len(flat), self.k, dtype=torch.int64, device=flat.device)
        step = max(1, _CHUNK_BYTES // (self.d_sae * self.W_enc.element_size()))
        for start in range(0, len(flat), step):
            part = slice(start, start + step)
            chosen, latents = self.selector.select(self.pre_activations(flat[part]))
            values[part], order = chosen.sort(dim=-1, descending=True, stable=True)
            indices[part] = latents.gather(-1, order)
        return values.view(*x.shape[:-1], self.k), indices.view(*x.shape[:-1], self.k)

    def encode(self, x: Tensor) -> Tensor:
        """Activations of every latent, [..., d] -> [..., F]; differentiable in x. For many tokens use `encode_topk`."""
        pre = self.pre_activations(self._flat(x))
        values, indices = self.selector.select(pre)
        return torch.zeros_like(pre).scatter(-1, indices, values).view(*x.shape[:-1], self.d_sae)

    def activations_of(self, x: Tensor, latents: Tensor) -> Tensor:
        """Activations of a few latents, selection included: [..., d], [m] -> [..., m]."""
        values, indices = self.encode_topk(x)
        match = indices[..., :, None] == latents.to(indices)
        return (values[..., :, None] * match).sum(-2)

    def decode(self, activations: Tensor) -> Tensor:
        """x̂ of dense activations: [..., F] -> [..., d]."""
        return activations @ self.W_dec + self.b_dec

    def decode_topk(self, values: Tensor, indices: Tensor) -> Tensor:
        """x̂ of what `encode_topk` returns: [..., k], [..., k] -> [..., d]."""
        flat = sparse.decode(values.reshape(-1, self.k), indices.reshape(-1, self.k), self.W_dec) + self.b_dec
        return flat.view(*values.shape[:-1], self.d_in)

    def __call__(self, x: Tensor) -> Tensor:
        """The reconstruction x̂: [..., d] -> [..., d]. Not differentiable in x: use `decode(encode(x))` for that."""
        return self.decode_topk(*self.encode_topk(x))

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "Dictionary":
        """The same dictionary on another device or in another floating-point type."""
        moved = {
            name: getattr(self, name).to(device=device, dtype=dtype) for name in ("W_enc", "b_enc", "W_dec", "b_dec")
        }
        return replace(self, **moved)

    def __repr__(self) -> str:
        return f"Dictionary({self.site}, d_in={self.d_in}, d_sae={self.d_sae}, k={self.k})"

    def _flat(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.d_in:
            raise CutawayError(
                f"activations of width {x.shape[-1]} do not fit a dictionary of width {self.d_in}: it was trained at "
                f"{self.site} of {self.model.get('id', 'another model')}"
            )
        return x.reshape(-1, self.d_in)


def random_dictionary(like: Dictionary, sample: Tensor, seed: int) -> Dictionary:
    """The control: as many untrained unit directions with the same k; encoder = gain · decoderᵀ, b_dec the mean.

    `sample` [n, d] are activations; the one number `gain` is fitted to them by least squares, since k directions that
    overlap would else add up to too much or too little. It shows what any overcomplete set of directions reaches.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(like.d_sae, like.d_in, generator=generator), dim=1)
    directions = directions.to(like.W_dec)
    mean = sample.mean(0).to(like.b_dec)
    control = replace(
        like,
        W_enc=directions.T.contiguous(),
        b_enc=torch.zeros_like(like.b_enc),
        W_dec=directions,
        b_dec=mean,
        sparsity=None,
        metadata={"control": "random directions", "seed": seed},
    )
    centred, written = sample.to(mean) - mean, control(sample) - mean
    gain = (centred * written).sum() / written.square().sum().clamp_min(torch.finfo(written.dtype).tiny)
    return replace(control, W_enc=control.W_enc * gain)


def log_sparsity(frequency: Tensor) -> Tensor:
    """log10 of firing frequencies [F]; −10 for latents that never fired, as a file cannot hold −∞ portably."""
    return frequency.double().clamp_min(1e-10).log10().float()


def mean_max_cosine(found: Tensor, true: Tensor) -> float:
    """For each row of `true` [m, d] the largest signed cosine with a row of `found` [F, d]; their mean."""
    unit = torch.nn.functional.normalize
    return (unit(true.float(), dim=1) @ unit(found.float(), dim=1).T).amax(1).mean().item()
