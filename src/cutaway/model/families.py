"""How each Hugging Face family spells its parts.

Parts are found by structure: a model is a list of decoder layers, each with an attention, an MLP and norms whose
attribute names come from short lists of candidates. What the structure cannot tell (residual wiring, fused
projections) is probed or read from the configuration. A model that does not fit is refused with the reason.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cutaway.artifacts.errors import CutawayError

Split = Callable[[Tensor], dict[str, Tensor]]
Join = Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Norm:
    """A norm: y = gain(center(x) / scale), scale = sqrt(mean(center(x)^2) + eps), computed in fp32 or wider."""

    module: nn.Module
    centered: bool
    eps: float
    weight: Tensor | None
    bias: Tensor | None
    offset: float  # Gemma stores the gain minus one
    gain_in_float: bool  # Gemma multiplies before the cast back, Llama after it

    def divide(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., d] -> centred x and its scale [..., 1], both in the dtype of the computation (fp32 or wider)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.centered:
            wide = wide - wide.mean(-1, keepdim=True)
        return wide, (wide.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def gain(self, normalized: Tensor, dtype: torch.dtype) -> Tensor:
        """The module's output for a normalised value [..., d]."""
        if not self.gain_in_float and not self.centered:
            normalized = normalized.to(dtype)
        y = normalized
        if self.weight is not None:
            weight = self.weight.to(y.dtype) if self.gain_in_float or self.centered else self.weight
            y = y * (weight + self.offset if self.offset else weight)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.to(dtype)


@dataclass(frozen=True)
class Projections:
    """Where queries, keys and values are computed: separate modules, or one fused module with a way to split and
    join.
    """

    modules: dict[str, nn.Module]  # "q", "k", "v", or "qkv"
    split: Split | None = None  # fused output -> {"q": [b p H h], "k": [b p KV h], "v": ...}
    join: Join | None = None


@dataclass(frozen=True)
class Layer:
    """The parts of one decoder layer. A post-norm, where there is one, is what writes to the stream."""

    module: nn.Module
    attention: nn.Module
    projections: Projections
    output: nn.Module  # W_O
    mlp: nn.Module
    mlp_in: nn.Module  # computes `pre` (the gate of a gated MLP)
    mlp_linear: nn.Module | None  # computes `pre_linear`
    mlp_out: nn.Module
    ln1: Norm
    ln2: Norm
    ln1_post: Norm | None
    ln2_post: Norm | None

    @property
    def attention_writer(self) -> nn.Module:
        return self.ln1_post.module if self.ln1_post else self.attention

    @property
    def mlp_writer(self) -> nn.Module:
        return self.ln2_post.module if self.ln2_post else self.mlp


@dataclass(frozen=True)
class Family:
    """A model's parts and numbers, whatever its class calls them."""

    model_type: str
    embed: nn.Module
    pos_embed: nn.Module | None
    layers: tuple[Layer, ...]
    ln_final: Norm
    unembed: nn.Module
    parallel: bool
    qk_norm: bool
    final_softcap: float | None
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    d_mlp: int
    d_vocab: int
    context_length: int
    softmax_in_float: bool

    def absent(self, template: str) -> str | None:
        """Why this family has no such site, or None if it has."""
        first = self.layers[0]
        if template == "pos_embed" and self.pos_embed is None:
            return "positions enter attention (rotary), not the stream"
        if template == "blocks.{l}.resid_mid" and self.parallel:
            return "parallel residual: attention and MLP read the same stream, so there is no resid_mid"
        if ("ln1_post" in template and first.ln1_post is None) or ("ln2_post" in template and first.ln2_post is None):
            return "no norm after the module: it writes to the stream directly"
        if template == "blocks.{l}.mlp.pre_linear" and first.mlp_linear is None:
            return "the MLP is not gated"
        if template == "logits_precap" and self.final_softcap is None:
            return "no final softcap: it would be the same tensor as logits"
        return None


def weight_matrix(module: nn.Module) -> Tensor:
    """The weight of a projection as [in, out], whatever way its class stores it."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight if type(module).__name__ == "Conv1D" else weight.T


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    for name in names:
        found = getattr(module, name, None)
        if isinstance(found, nn.Module):
            return found
    return None


def _refuse(model: nn.Module, reason: str) -> CutawayError:
    return CutawayError(
        f"{type(model).__name__} is not supported: {reason}. Families like Llama, GPT-2, Qwen, Gemma and GPT-NeoX are."
    )


def _need(owner: nn.Module, names: tuple[str, ...], what: str, model: nn.Module) -> nn.Module:
    found = _child(owner, names)
    if found is None:
        raise _refuse(model, f"its {type(owner).__name__} has no {what} under the names {', '.join(names)}")
    return found


def probe_norm(module: nn.Module, d: int, model: nn.Module) -> Norm:
    """Find out by trying which normalisation a module computes."""
    weight = getattr(module, "weight", None)
    bias = getattr(module, "bias", None)
    weight = weight if isinstance(weight, Tensor) else None
    bias = bias if isinstance(bias, Tensor) else None
    eps = next((float(v) for n in ("eps", "variance_epsilon") if (v := getattr(module, n, None)) is not None), None)
    if eps is None or (weight is not None and weight.shape != (d,)):
        raise _refuse(
            model, f"its norm {type(module).__name__} is neither a LayerNorm nor an RMS norm of the model width"
        )
    device = weight.device if weight is not None else torch.device("cpu")
    dtype = weight.dtype if weight is not None else torch.float32
    if device.type == "meta":
        raise _refuse(model, "its weights are on the meta device")
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(4, d, generator=generator) * 3 + 1).to(device=device, dtype=dtype)
    with torch.no_grad():
        expected = module(x)
        for centered in (isinstance(module, nn.LayerNorm), not isinstance(module, nn.LayerNorm)):
            for offset in (0.0, 1.0):
                for gain_in_float in (False, True):
                    norm = Norm(module, centered, eps, weight, bias, offset, gain_in_float)
                    wide, scale = norm.divide(x)
                    y = norm.gain(wide / scale, dtype)
                    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 4e-2
                    if torch.allclose(y.float(), expected.float(), rtol=tolerance, atol=tolerance):
                        # fp32 does not tell the two orders of cast and gain apart; Gemma's offset does.
                        return Norm(module, centered, eps, weight, bias, offset, gain_in_float or offset == 1.0)
    raise _refuse(model, f"its norm {type(module).__name__} does not compute a LayerNorm or an RMS norm")


def _split_thirds(x: Tensor, *, n_heads: int) -> dict[str, Tensor]:
    q, k, v = x.unflatten(-1, (3, n_heads, -1)).unbind(-3)
    return {"q": q, "k": k, "v": v}


def _join_thirds(parts: dict[str, Tensor]) -> Tensor:
    return torch.stack([parts["q"], parts["k"], parts["v"]], dim=-3).flatten(-3)


def _split_by_head(x: Tensor, *, n_heads: int) -> dict[str, Tensor]:
    q, k, v = x.unflatten(-1, (n_heads, 3, -1)).unbind(-2)
    return {"q": q, "k": k, "v": v}


def _join_by_head(parts: dict[str, Tensor]) -> Tensor:
    return torch.stack([parts["q"], parts["k"], parts["v"]], dim=-2).flatten(-3)


def _projections(attention: nn.Module, n_heads: int, n_kv_heads: int, model: nn.Module) -> Projections:
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}
    separate = {part: found for part, name in names.items() if (found := _child(attention, (name,)))}
    if len(separate) == 3:
        return Projections(separate)
    if (fused := _child(attention, ("c_attn",))) is not None:
        return Projections({"qkv": fused}, partial(_split_thirds, n_heads=n_heads), _join_thirds)
    if (fused := _child(attention, ("query_key_value",))) is not None and n_heads == n_kv_heads:
        return Projections({"qkv": fused}, partial(_split_by_head, n_heads=n_heads), _join_by_head)
    raise _refuse(model, f"{type(attention).__name__} computes queries, keys and values in an unknown way")


def _layer(module: nn.Module, n_heads: int, n_kv_heads: int, d: int, model: nn.Module) -> Layer:
    need = partial(_need, model=model)
    attention = need(module, ("self_attn", "attn", "attention"), "attention")
    mlp = need(module, ("mlp",), "MLP")
    before_mlp = _child(module, ("pre_feedforward_layernorm",))
    sandwich = before_mlp is not None
    ln1 = _child(module, ("input_layernorm", "ln_1"))
    ln2 = before_mlp or _child(module, ("post_attention_layernorm", "ln_2"))
    if ln1 is None or ln2 is None:
        raise _refuse(model, f"{type(module).__name__} lacks a norm before attention or before the MLP")
    if not sandwich and _child(module, ("post_feedforward_layernorm",)) is not None:
        raise _refuse(model, f"{type(module).__name__} normalises only what its modules write")
    gate, up, down = (_child(mlp, (name,)) for name in ("gate_proj", "up_proj", "down_proj"))
    if gate is not None and up is not None and down is not None:
        mlp_in, mlp_linear, mlp_out = gate, up, down
    else:
        mlp_in = need(mlp, ("c_fc", "dense_h_to_4h", "fc1", "up_proj"), "input projection")
        mlp_out = need(mlp, ("c_proj", "dense_4h_to_h", "fc2", "down_proj"), "output projection")
        mlp_linear = None
    norm = partial(probe_norm, d=d, model=model)
    return Layer(
        module=module,
        attention=attention,
        projections=_projections(attention, n_heads, n_kv_heads, model),
        output=need(attention, ("o_proj", "c_proj", "dense", "out_proj"), "output projection"),
        mlp=mlp,
        mlp_in=mlp_in,
        mlp_linear=mlp_linear,
        mlp_out=mlp_out,
        ln1=norm(ln1),
        ln2=norm(ln2),
        ln1_post=norm(need(module, ("post_attention_layernorm",), "norm after attention")) if sandwich else None,
        ln2_post=norm(need(module, ("post_feedforward_layernorm",), "norm after the MLP")) if sandwich else None,
    )


def find_family(model: PreTrainedModel) -> Family:
    """Find the parts of a causal language model. Raises CutawayError with the reason if it does not fit."""
    if not callable(getattr(model, "get_output_embeddings", None)) or model.get_output_embeddings() is None:
        raise _refuse(model, "it has no unembedding (load it with AutoModelForCausalLM)")
    config = model.config.get_text_config()
    base = model.base_model
    stack = next((s for n in ("layers", "h") if isinstance(s := getattr(base, n, None), nn.ModuleList)), None)
    if stack is None or len(stack) == 0:
        raise _refuse(model, f"its {type(base).__name__} has no list of decoder layers named layers or h")
    d = int(config.hidden_size)
    n_heads = getattr(config, "num_attention_heads", None)
    if n_heads is None:
        raise _refuse(model, "its configuration names no attention heads")
    n_heads = int(n_heads)
    n_kv_heads = int(getattr(config, "num_key_value_heads", None) or n_heads)
    d_head = int(getattr(config, "head_dim", None) or d // n_heads)
    layers = tuple(_layer(module, n_heads, n_kv_heads, d, model) for module in stack)
    final = _need(base, ("norm", "ln_f", "final_layer_norm"), "final norm", model)
    unembed = model.get_output_embeddings()
    assert isinstance(unembed, nn.Module)
    embed = model.get_input_embeddings()
    assert isinstance(embed, nn.Module)
    _check_scalars(model, config)
    return Family(
        model_type=config.model_type,
        embed=embed,
        pos_embed=_child(base, ("wpe",)),
        layers=layers,
        ln_final=probe_norm(final, d, model),
        unembed=unembed,
        parallel=bool(getattr(config, "use_parallel_residual", False)) if config.model_type == "gpt_neox" else False,
        qk_norm=_child(layers[0].attention, ("q_norm",)) is not None,
        final_softcap=getattr(config, "final_logit_softcapping", None),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        d_model=d,
        d_mlp=int(weight_matrix(layers[0].mlp_out).shape[0]),
        d_vocab=int(weight_matrix(unembed).shape[1]),
        context_length=int(getattr(config, "max_position_embeddings", 0) or 2**31),
        softmax_in_float=config.model_type != "gpt2",
    )


def _check_scalars(model: PreTrainedModel, config: object) -> None:
    """Refuse multipliers on the stream that the site algebra does not account for (Granite, Cohere, MiniCPM)."""
    for name in ("residual_multiplier", "logits_scaling", "logit_scale", "embedding_multiplier"):
        value = getattr(config, name, None)
        if value is not None and float(value) != 1.0:
            raise _refuse(model, f"its configuration scales the stream or the logits ({name}={value})")
