"""The parts of a causal language model under one set of names, whatever its class calls them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cutaway.model.architecture.norms import Norm
from cutaway.model.architecture.wrapped import linear_map, no_matrix
from cutaway.model.attention.adapters import Observed


@dataclass(frozen=True)
class Projection:
    """A module that computes queries, keys or values, or several of them at once.

    `split` takes its output [..., n] to {"q": [..., H, h], "k": [..., KV, h], "v": [..., KV, h]} (those of `parts`),
    `join` takes them back (the second argument is the output as it was). `direct` modules read `attn.in`.
    """

    module: nn.Module
    parts: tuple[str, ...]
    split: Callable[[Tensor], dict[str, Tensor]]
    join: Callable[[dict[str, Tensor], Tensor], Tensor]
    direct: bool = True


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: `module(x [n, d], index [n, k], weights [n, k]) -> [n, d]`, weighted and summed."""

    module: nn.Module
    router: nn.Module
    n: int
    shared: bool  # something else in the MLP writes beside the routed experts


@dataclass(frozen=True)
class Layer:
    """The parts of one decoder layer.

    What attention and MLP add to the stream is the output of their writers times their multiplier. A post-norm, where
    there is one, is the writer.
    """

    module: nn.Module
    attention: nn.Module  # whose input is attn.in
    core: nn.Module  # whose forward computes scores and pattern
    projections: tuple[Projection, ...]
    output: nn.Module  # W_O
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    mlp: nn.Module  # whose input is mlp.in
    mlp_in: nn.Module | None  # computes `pre` (the gate of a gated MLP); None with experts
    mlp_linear: nn.Module | None  # computes `pre_linear`; the same module as mlp_in where both are fused
    mlp_out: nn.Module | None
    experts: Experts | None
    ln1: Norm | None
    ln2: Norm | None
    ln1_post: Norm | None
    ln2_post: Norm | None
    attention_writer: nn.Module
    mlp_writer: nn.Module
    attn_multiplier: float
    mlp_multiplier: float
    observed: Observed | None = None  # how attention is observed in a module that is not one of transformers

    @property
    def mlp_fused(self) -> bool:
        """Whether one module computes gate and up, one behind the other."""
        return self.mlp_linear is not None and self.mlp_linear is self.mlp_in

    def projection(self, part: str) -> Projection | None:
        """The module that computes "q", "k" or "v", or None."""
        return next((p for p in self.projections if part in p.parts), None)


@dataclass(frozen=True)
class Family:
    """A model's parts and numbers.

    `d_head` is the width of queries and keys, `d_value` that of values and z; they differ with latent attention.
    `logit_scale` multiplies what the unembedding returns. `d_vocab` counts logits, `d_vocab_in` the ids that are read.
    `positions_added`: something that depends on the position alone is added to the token embeddings, by no module.
    """

    model_type: str
    embed: nn.Module
    pos_embed: nn.Module | None
    layers: tuple[Layer, ...]
    ln_final: Norm | None
    unembed: nn.Module
    parallel: bool
    latent: bool
    alibi: bool
    qk_norm_last: bool  # QK-norm after rotary
    qkv_clip: float | None
    final_softcap: float | None
    logit_scale: float
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_value: int
    d_model: int
    d_mlp: int
    d_vocab: int
    d_vocab_in: int
    context_length: int
    positions_added: bool = False

    @property
    def has_positions(self) -> bool:
        """Whether there is a site `pos_embed`."""
        return self.pos_embed is not None or self.positions_added

    @property
    def qk_norm(self) -> bool:
        return any(layer.q_norm is not None for layer in self.layers)

    def sizes(self, template: str, layer: int = 0) -> dict[str, int]:
        """The numbers that stand for the letters of a site's dimensions in one layer."""
        here = self.layers[layer]
        return {
            "d": self.d_model,
            "H": self.n_heads,
            "KV": self.n_kv_heads,
            "h": self.d_value if template.endswith((".v", ".z")) else self.d_head,
            "m": self.d_mlp if here.mlp_out is None else width_in(here.mlp_out),
            "E": 0 if here.experts is None else here.experts.n,
            "V": self.d_vocab,
            "1": 1,
        }

    def read_out(self, stream: Tensor) -> Tensor:
        """Logits [..., V] of a stream [..., d] behind the last layer, in the model's dtype."""
        return self.finish(self.unembed(stream if self.ln_final is None else self.ln_final.module(stream)))

    def finish(self, unembedded: Tensor) -> Tensor:
        """Logits from what the unembedding returned: scaled, then capped."""
        logits = unembedded * self.logit_scale if self.logit_scale != 1.0 else unembedded
        cap = self.final_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def absent(self, template: str, layer: int = 0) -> str | None:
        """Why a layer of this family has no such site, or None if it has."""
        here, part = self.layers[layer], template.removeprefix("blocks.{l}.")
        if template == "pos_embed" and not self.has_positions:
            return "positions enter attention (rotary or ALiBi), not the stream"
        if template.startswith("ln_final.") and self.ln_final is None:
            return "no norm before the unembedding: it reads the stream directly"
        if template == "logits_precap" and self.final_softcap is None:
            return "no final softcap: it would be the same tensor as logits"
        if part == "attn.result" and (reason := no_matrix(here.output)) is not None:
            return f"the output projection has no weight matrix to split by head: {reason}"
        if part == "resid_mid" and self.parallel:
            return "parallel residual: attention and MLP read the same stream, so there is no resid_mid"
        if part.startswith("ln1.") and here.ln1 is None:
            return "no norm before attention: it reads the stream directly"
        if part.startswith("ln2.") and here.ln2 is None:
            return (
                "parallel residual with one norm: the MLP reads what ln1 gives"
                if self.parallel
                else "no norm before the MLP: it reads the stream directly"
            )
        if part.startswith("ln1_post.") and here.ln1_post is None:
            return "no norm after attention: it writes to the stream directly"
        if part.startswith("ln2_post.") and here.ln2_post is None:
            return "no norm after the MLP: it writes to the stream directly"
        if part == "attn.k" and self.latent:
            return "latent attention: keys are built of a latent part and a shared rotary part; see attn.rot_k"
        if part.startswith(("mlp.router.", "mlp.experts.")):
            return None if here.experts is not None else "this layer has one MLP, no mixture of experts"
        if part in ("mlp.pre", "mlp.pre_linear", "mlp.post") and here.experts is not None:
            return "a mixture of experts: each has neurons of its own; see mlp.router.* and mlp.experts.*"
        if part == "mlp.pre_linear" and here.mlp_linear is None:
            return "the MLP is not gated"
        return None


def weight_matrix(module: nn.Module) -> Tensor:
    """The weight of a projection as it acts, [in, out], whatever stores it; see `wrapped.linear_map`."""
    return linear_map(module)


def width_in(module: nn.Module) -> int:
    """How many numbers a projection reads; packed weights do not tell by their shape."""
    given = getattr(module, "in_features", None)
    return int(given) if given is not None else int(weight_matrix(module).shape[0])


def width_out(module: nn.Module) -> int:
    """How many numbers a projection writes."""
    given = getattr(module, "out_features", None)
    return int(given) if given is not None else int(weight_matrix(module).shape[1])
