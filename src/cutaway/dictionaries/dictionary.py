"""A dictionary: encoder(s), a selector and decoder(s) that write an activation as a few named directions.

    h = (x − b_dec) · W_enc + b_enc          pre-activations, [n, F]; without "− b_dec" where `subtract_b_dec` is off
    a = selector(h)                          see `selectors.py`; zero almost everywhere
    x̂ = a · W_dec + b_dec (+ x · W_skipᵀ)    [n, d_out]

One definition for all kinds, which differ in what is read and written:

    SAE            reads and writes one site
    transcoder     reads one site (mlp.in) and writes another (mlp.out), with W_skip a skip-transcoder
    crosscoder     reads and writes several sites, of one model or of several: x is their concatenation, so the blocks
                   of W_enc and W_dec are its encoders and decoders

Whatever scaling of the data set was used in training is already in the weights: x is the model's activation as it is.
Only what depends on the token cannot be folded: `input_norm` "layer_norm" or "unit" is applied to x first and undone
on what is written to the same site.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.dictionaries import selectors, sparse
from cutaway.dictionaries.latent import Latent
from cutaway.dictionaries.selectors import BatchTopK, Gated, JumpReLU, ReLU, Selector, TopK

__all__ = ["BatchTopK", "Dictionary", "Gated", "JumpReLU", "Port", "ReLU", "TopK", "log_sparsity", "random_dictionary"]

_CHUNK_BYTES = 32 << 20  # pre-activations of one chunk of tokens: they should stay in a cache, and memory flat
_EPSILON = 1e-5  # SAELens and OpenAI's dictionaries were trained with it; added to the standard deviation
_WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")

InputNorm = Literal["layer_norm", "unit"]
DictionaryKind = Literal["sae", "transcoder", "skip_transcoder", "crosscoder"]


@dataclass(frozen=True)
class Port:
    """A tensor that a dictionary reads or writes."""

    site: str
    """Its site."""
    width: int
    """Values per token, heads flattened."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """Whose it is: "id", "revision" and "weight_hash", where known."""


@dataclass(frozen=True, eq=False)
class Dictionary:
    """Weights of a sparse dictionary and where they belong.

    It takes the model's activations as they are. Raises `CutawayError` when shapes disagree or a weight is not finite.
    """

    W_enc: Tensor
    """Encoder [d_in, F]."""
    b_enc: Tensor
    """Encoder bias [F]."""
    W_dec: Tensor
    """Decoder [F, d_out]."""
    b_dec: Tensor
    """Decoder bias [d_out]."""
    selector: Selector
    """Which pre-activations become activations: `ReLU`, `TopK`, `BatchTopK`, `JumpReLU`, `Gated`."""
    site: str
    """Canonical name of the (first) tensor that it reads."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """Whose that is: "id", "revision" and "weight_hash", where known."""
    sparsity: Tensor | None = None
    """log10 of each latent's frequency of activation [F], where measured."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What else travels with the weights: how it was trained, on what."""
    reads: tuple[Port, ...] = field(default=(), kw_only=True)
    """What it reads, where that is not one tensor at `site`."""
    writes: tuple[Port, ...] = field(default=(), kw_only=True)
    """What it writes, where that is not what it reads."""
    subtract_b_dec: bool = field(default=True, kw_only=True)
    """Whether b_dec is subtracted from the input."""
    W_skip: Tensor | None = field(default=None, kw_only=True)
    """A linear map beside the latents [d_out, d_in], of skip-transcoders."""
    input_norm: InputNorm | None = field(default=None, kw_only=True)
    """What is done to each token first, and undone on what is written to the same site."""

    def __post_init__(self) -> None:
        if self.W_enc.ndim != 2 or 0 in self.W_enc.shape:
            raise CutawayError(f"W_enc has shape {list(self.W_enc.shape)}; a dictionary needs [d_in, d_sae]")
        d, n = self.W_enc.shape
        out = self.W_dec.shape[-1] if self.writes else d
        shapes: dict[str, tuple[int, ...]] = {"W_enc": (d, n), "b_enc": (n,), "W_dec": (n, out), "b_dec": (out,)}
        if self.sparsity is not None:
            shapes["sparsity"] = (n,)
        if self.W_skip is not None:
            shapes["W_skip"] = (out, d)
        for name, shape in shapes.items():
            tensor: Tensor = getattr(self, name)
            if tuple(tensor.shape) != shape:
                raise CutawayError(
                    f"{name} has shape {list(tensor.shape)} where {list(shape)} is needed (d_in={d}, d_sae={n})"
                )
            if name != "sparsity" and not torch.isfinite(tensor).all():
                raise CutawayError(f"{name} holds NaN or infinite weights: the dictionary cannot be used")
        selectors.check(self.selector, n)
        for name, ports, width in (("reads", self.inputs, d), ("writes", self.outputs, out)):
            if sum(port.width for port in ports) != width:
                raise CutawayError(f"{name} {[port.width for port in ports]} values, but the weights have {width}")
        if self.subtract_b_dec and d != out:
            raise CutawayError(f"b_dec [{out}] cannot be subtracted from an input of width {d}")
        if self.input_norm and len(self.inputs) > 1:
            raise CutawayError("a crosscoder cannot normalise its inputs token by token: fold a scale in instead")

    @property
    def inputs(self) -> tuple[Port, ...]:
        """What it reads: `reads`, or the one tensor at `site`."""
        return self.reads or (Port(self.site, self.W_enc.shape[0], self.model),)

    @property
    def outputs(self) -> tuple[Port, ...]:
        """What it writes: `writes`, or what it reads."""
        return self.writes or self.inputs

    @property
    def d_in(self) -> int:
        """Width of what it reads."""
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        """Width of what it writes."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]

    @property
    def kind(self) -> DictionaryKind:
        """What it is in the field's words."""
        if len(self.inputs) > 1 or len(self.outputs) > 1:
            return "crosscoder"
        if self.W_skip is not None:
            return "skip_transcoder"
        return "sae" if self.writes_what_it_reads else "transcoder"

    @property
    def writes_what_it_reads(self) -> bool:
        """Whether what is written stands in place of what is read, as in an SAE or a crosscoder."""
        return self.outputs == self.inputs

    def pre_activations(self, x: Tensor) -> Tensor:
        """h: [..., d_in] -> [..., F].

        Args:
            x: Activations that the dictionary reads [..., d_in].
        """
        return self._pre(self._flat(x)).view(*x.shape[:-1], self.d_sae)

    @torch.no_grad()
    def encode_sparse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Only what is active: [..., d_in] -> values [..., m] and latents [..., m], by falling value, zeros at the end.

        m is k for TopK, and else the greatest number of latents that are active on one of these tokens (1 at least).
        Goes through the tokens in chunks, so memory beyond the result does not grow with their number.

        Args:
            x: Activations that the dictionary reads [..., d_in].
        """
        flat = self._flat(x)
        step = max(1, _CHUNK_BYTES // (self.d_sae * self.W_enc.element_size()))
        parts = [self._active(flat[start : start + step]) for start in range(0, len(flat), step)]
        m = max((values.shape[1] for values, _ in parts), default=1)
        values = flat.new_zeros(len(flat), m, dtype=self.W_enc.dtype)
        indices = torch.zeros(len(flat), m, dtype=torch.int64, device=flat.device)
        for number, (some, latents) in enumerate(parts):
            rows = slice(number * step, number * step + step)
            values[rows, : some.shape[1]] = some
            indices[rows, : some.shape[1]] = latents
        return values.view(*x.shape[:-1], m), indices.view(*x.shape[:-1], m)

    def encode(self, x: Tensor) -> Tensor:
        """Activations of every latent, [..., d_in] -> [..., F]; differentiable in x. Many tokens: `encode_sparse`.

        Args:
            x: Activations that the dictionary reads [..., d_in].
        """
        pre = self._pre(self._flat(x))
        return self.selector.dense(pre, self.b_enc).view(*x.shape[:-1], self.d_sae)

    def activations_of(self, x: Tensor, latents: Tensor) -> Tensor:
        """Activations of a few latents, selection included: [..., d_in], [m] -> [..., m].

        Args:
            x: Activations that the dictionary reads [..., d_in].
            latents: Numbers of the latents, int [m].
        """
        if not isinstance(self.selector, TopK):  # the others choose each latent without looking at the rest
            return self._some(latents).encode(x)
        values, indices = self.encode_sparse(x)
        match = indices[..., :, None] == latents.to(indices)
        return (values[..., :, None] * match).sum(-2)

    def decode(self, activations: Tensor, x: Tensor | None = None) -> Tensor:
        """x̂ of dense activations: [..., F] -> [..., d_out].

        Args:
            activations: Of every latent [..., F].
            x: What they were encoded from [..., d_in]; needed where `input_norm` or `W_skip` is set, and else not used.
        """
        return self._finish(activations @ self.W_dec, x)

    def decode_sparse(self, values: Tensor, indices: Tensor, x: Tensor | None = None) -> Tensor:
        """x̂ of what `encode_sparse` returns: [..., m], [..., m] -> [..., d_out].

        Args:
            values: Activations of the active latents [..., m].
            indices: Their numbers, int [..., m].
            x: What they were encoded from [..., d_in]; needed where `input_norm` or `W_skip` is set, and else not used.
        """
        m = values.shape[-1]
        flat = sparse.decode(values.reshape(-1, m), indices.reshape(-1, m), self.W_dec)
        return self._finish(flat.view(*values.shape[:-1], self.d_out), x)

    def __call__(self, x: Tensor) -> Tensor:
        """What is written, x̂: [..., d_in] -> [..., d_out]. Not differentiable in x; `decode(encode(x), x)` is.

        Args:
            x: Activations that the dictionary reads [..., d_in].
        """
        return self.decode_sparse(*self.encode_sparse(x), x)

    def decoders(self) -> tuple[Tensor, ...]:
        """The decoder of each tensor that is written: views [F, width] of W_dec."""
        return self.W_dec.split([port.width for port in self.outputs], dim=1)

    def latent(self, index: int) -> Latent:
        """One latent as a small view: its rows, bias and norm, its neighbours, what it writes and where it is active.

        Args:
            index: Its number, from 0; negative from the end.

        Returns:
            The view.

        Raises:
            CutawayError: there is no such latent.

        Example:
            >>> len(load("atlas/blocks.3.resid_post").latent(7).nearest(3))
            3
        """
        if not -self.d_sae <= index < self.d_sae:
            raise CutawayError(f"there is no latent {index}: the dictionary has {self.d_sae:,}, counted from 0")
        return Latent(self, index % self.d_sae)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "Dictionary":
        """The same dictionary on another device or in another floating-point type.

        Args:
            device: Where to; None: where it is.
            dtype: A floating-point type; None: as it is.
        """
        moved = {name: getattr(self, name).to(device=device, dtype=dtype) for name in _WEIGHTS}
        if self.W_skip is not None:
            moved["W_skip"] = self.W_skip.to(device=device, dtype=dtype)
        own = {
            name: tensor.to(device=device, dtype=dtype) for name, tensor in selectors.tensors_of(self.selector).items()
        }
        return replace(self, **moved, selector=replace(self.selector, **own))

    def __repr__(self) -> str:
        sites = " + ".join(port.site for port in self.inputs)
        if not self.writes_what_it_reads:
            sites += " → " + " + ".join(port.site for port in self.outputs)
        return f"Dictionary({sites}, d_in={self.d_in}, d_sae={self.d_sae}, {selectors.describe(self.selector)})"

    def _flat(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.d_in:
            raise CutawayError(
                f"activations of width {x.shape[-1]} do not fit a dictionary of width {self.d_in}: it was trained at "
                f"{self.site} of {self.model.get('id', 'another model')}"
            )
        return x.reshape(-1, self.d_in)

    def _pre(self, flat: Tensor) -> Tensor:
        x = self._normalised(flat.to(self.W_enc))[0]
        return torch.addmm(self.b_enc, x - self.b_dec if self.subtract_b_dec else x, self.W_enc)

    def _active(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Values and latents [n, m] of some tokens, by falling value."""
        pre = self._pre(flat)
        if not isinstance(self.selector, TopK):
            return selectors.active(self.selector.dense(pre, self.b_enc))
        chosen, latents = self.selector.select(pre)
        values, order = chosen.sort(dim=-1, descending=True, stable=True)
        return values, latents.gather(-1, order)

    def _normalised(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """x [..., d] as the encoder wants it; what to multiply what is written with [..., 1], and to add [..., 1]."""
        if self.input_norm == "layer_norm":
            mean = x.mean(-1, keepdim=True)
            spread = x.std(-1, keepdim=True)
            return (x - mean) / (spread + _EPSILON), spread, mean  # both leave the epsilon out when they undo it
        if self.input_norm == "unit":
            length = x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) / x.shape[-1] ** 0.5
            return x / length, length, None
        return x, x.new_ones(()), None

    def _finish(self, written: Tensor, x: Tensor | None) -> Tensor:
        written = written + self.b_dec
        if self.W_skip is None and self.input_norm is None:
            return written
        if x is None:
            why = "W_skip" if self.W_skip is not None else f"input_norm {self.input_norm!r}"
            raise CutawayError(f"this dictionary has {why}: give decode() the x that was encoded as well")
        normalised, scale, shift = self._normalised(x.to(self.W_dec))
        if self.W_skip is not None:
            written = written + normalised @ self.W_skip.T
        if self.input_norm and self.writes_what_it_reads:
            written = written * scale
            written = written if shift is None else written + shift
        return written

    def _some(self, latents: Tensor) -> "Dictionary":
        """The dictionary with a few of its latents only; not for TopK, which would choose among fewer."""
        own = {name: tensor[latents] for name, tensor in selectors.tensors_of(self.selector).items()}
        return replace(
            self,
            W_enc=self.W_enc[:, latents],
            b_enc=self.b_enc[latents],
            W_dec=self.W_dec[latents],
            selector=_of_size(replace(self.selector, **own), len(latents)),
            sparsity=None,
        )


def _of_size(selector: Selector, n_latents: int) -> Selector:
    """BatchTopK's k is what it was trained with; of fewer latents no more than all can be active."""
    return replace(selector, k=min(selector.k, n_latents)) if isinstance(selector, BatchTopK) else selector


def random_dictionary(like: Dictionary, sample: Tensor, seed: int, target: Tensor | None = None) -> Dictionary:
    """The control: as many untrained unit directions, each token described by as many of them; b_dec the mean.

    It shows what any overcomplete set of directions reaches. It selects by TopK with k = the L0 of `like` on the
    sample, rounded; one gain is fitted by least squares, since directions that overlap would else add up to too much
    or too little.

    Args:
        like: The dictionary to be a control of.
        sample: Activations that it reads [n, d_in].
        seed: Of the directions.
        target: What is to be written [n, d_out], for a dictionary that does not write what it reads; then the
            encoder's directions are random too.

    Returns:
        A dictionary of the same ports and size.

    Raises:
        CutawayError: the dictionary is a transcoder and there is no target.
    """
    generator = torch.Generator().manual_seed(seed)

    def directions(width: int) -> Tensor:
        rows = torch.randn(like.d_sae, width, generator=generator)
        return torch.nn.functional.normalize(rows, dim=1).to(like.W_dec)

    if isinstance(like.selector, TopK):
        k = like.selector.k
    else:
        active = (like.encode_sparse(sample)[0] > 0).sum().item() / max(1, len(sample))
        k = min(like.d_sae, max(1, round(active)))
    decoder = directions(like.d_out)
    same = like.writes_what_it_reads
    encoder = decoder if same else directions(like.d_in)
    mean_in = sample.mean(0).to(like.W_dec)
    if target is None and not same:
        raise CutawayError("a random control of a transcoder needs the target as well as the input")
    wanted = (sample if target is None else target).to(like.W_dec)
    mean = wanted.mean(0)
    control = Dictionary(
        W_enc=encoder.T.contiguous(),
        b_enc=torch.zeros_like(like.b_enc) if same else -(encoder @ mean_in),
        W_dec=decoder,
        b_dec=mean,
        selector=TopK(k),
        site=like.site,
        model=like.model,
        metadata={"control": "random directions", "seed": seed},
        reads=like.reads,
        writes=like.writes,
        subtract_b_dec=same,
    )
    # in float64: float16, in which weights are often stored, ends at 65,504
    centred, written = (values.double() - mean.double() for values in (wanted, control(sample)))
    gain = ((centred * written).sum() / written.square().sum().clamp_min(1e-300)).item()
    return replace(control, W_enc=control.W_enc * gain, b_enc=control.b_enc * gain)


def log_sparsity(frequency: Tensor) -> Tensor:
    """log10 of frequencies of activation [F]; −10 for latents that were never active, as a file cannot hold −∞
    portably.
    """
    return frequency.double().clamp_min(1e-10).log10().float()
