"""How each Hugging Face family spells its parts.

Parts are found by structure: a model is a list of decoder layers, each with an attention, an MLP or experts, and norms,
whose attribute names come from short lists of candidates; which norm a module computes is tried out. `_TRAITS` says
what structure cannot tell. A model that does not fit is refused with the reason; one of a type that the test bed does
not hold (`TESTED`) has to pass the self-test when it is attached.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from cutaway.artifacts.errors import CutawayError, NotSupported
from cutaway.model.architecture.layouts import by_groups, by_heads, codegen, in_turn, latent_values
from cutaway.model.architecture.norms import Norm, probe_norm
from cutaway.model.architecture.parts import Experts, Family, Layer, Projection, weight_matrix, width_in, width_out
from cutaway.model.architecture.wrapped import innermost
from cutaway.model.own.module import OwnModel, described_family

__all__ = ["TESTED", "Family", "Layer", "Norm", "find_family", "weight_matrix"]

# Model types whose random small configurations the test bed holds; they are attached without a self-test.
TESTED = frozenset(
    {
        "apertus",
        "arcee",
        "biogpt",
        "bloom",
        "codegen",
        "cohere",
        "cohere2",
        "deepseek_v2",
        "deepseek_v3",
        "dots1",
        "ernie4_5",
        "ernie4_5_moe",
        "exaone4",
        "falcon",
        "flex_olmo",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "glm4",
        "glm4_moe",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gpt_neox",
        "gpt_oss",
        "gptj",
        "granite",
        "granitemoe",
        "helium",
        "hunyuan_v1_dense",
        "hunyuan_v1_moe",
        "llama",
        "ministral",
        "ministral3",
        "mistral",
        "mixtral",
        "mpt",
        "nemotron",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "opt",
        "persimmon",
        "phi",
        "phi3",
        "phimoe",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
        "solar_open",
        "stablelm",
        "starcoder2",
        "vaultgemma",
        "xglm",
    }
)


@dataclass(frozen=True)
class Traits:
    """What the structure of a model type does not tell.

    `parallel`: attention and MLP read the same stream though each has a norm. `grouped`: a fused projection holds
    queries, key and value of one key-value head after those of another (else all queries, all keys, all values).
    `adds`: modules that return the stream with what they write already added. `refuse`: a setting that is not
    supported, with the reason.
    """

    parallel: Callable[[Any], bool] | None = None
    grouped: Callable[[Any], bool] | None = None
    adds: tuple[str, ...] = ()
    alibi: Callable[[Any], bool] | None = None
    qk_norm_last: bool = False
    kv_heads: Callable[[Any], int] | None = None
    refuse: Callable[[Any], str | None] | None = None


def _always(_: Any) -> bool:
    return True


def _after_norm(config: Any) -> str | None:
    after = getattr(config, "apply_residual_connection_post_layernorm", False)
    return "the stream goes through a norm in every layer (apply_residual_connection_post_layernorm)" if after else None


def _opt_350m(config: Any) -> str | None:
    if not config.do_layer_norm_before:
        return "its norms stand in the stream itself, after attention and MLP (do_layer_norm_before=False)"
    return "its embedding is narrower than its stream" if config.word_embed_proj_dim != config.hidden_size else None


def _falcon_kv_heads(config: Any) -> int:
    if config.new_decoder_architecture:
        return config.num_kv_heads
    return 1 if config.multi_query else config.num_attention_heads


_TRAITS: Mapping[str, Traits] = {
    "gpt_neox": Traits(parallel=lambda c: c.use_parallel_residual, grouped=_always),
    "stablelm": Traits(parallel=lambda c: c.use_parallel_residual),
    "persimmon": Traits(grouped=_always),
    "bloom": Traits(grouped=_always, adds=("attention", "mlp"), alibi=_always, refuse=_after_norm),
    "mpt": Traits(adds=("mlp",), alibi=lambda c: c.attn_config.alibi),
    "falcon": Traits(
        parallel=lambda c: c.parallel_attn or c.new_decoder_architecture,
        grouped=lambda c: c.new_decoder_architecture or not c.multi_query,
        alibi=lambda c: c.alibi,
        kv_heads=_falcon_kv_heads,
        refuse=_after_norm,
    ),
    "gpt_bigcode": Traits(
        grouped=lambda c: not c.multi_query, kv_heads=lambda c: 1 if c.multi_query else c.num_attention_heads
    ),
    "hunyuan_v1_dense": Traits(qk_norm_last=True),
    "hunyuan_v1_moe": Traits(qk_norm_last=True),
    "opt": Traits(refuse=_opt_350m),
}


def _refuse(model: nn.Module, reason: str) -> NotSupported:
    return NotSupported(
        f"{type(model).__name__} is not supported: {reason}. docs/parity.md lists the families that are."
    )


def _child(module: nn.Module, *names: str) -> nn.Module | None:
    for name in names:
        found = getattr(module, name, None)
        if isinstance(found, nn.Module):
            return found
    return None


def _need(model: nn.Module, owner: nn.Module, what: str, *names: str) -> nn.Module:
    found = _child(owner, *names)
    if found is None:
        raise _refuse(model, f"its {type(owner).__name__} has no {what} under the names {', '.join(names)}")
    return found


@dataclass(frozen=True)
class _Numbers:
    """What the parts of a layer need to know of the whole model."""

    model: PreTrainedModel
    config: Any
    traits: Traits
    d: int
    n_heads: int
    n_kv: int
    d_value: int
    parallel: bool


def _projections(attention: nn.Module, about: _Numbers) -> tuple[Projection, ...]:
    heads = {"q": about.n_heads, "k": about.n_kv, "v": about.n_kv}

    separate = {part: _child(attention, f"{part}_proj") for part in "qkv"}
    if all(separate.values()):
        return tuple(by_heads(module, part, heads[part]) for part, module in separate.items() if module is not None)
    if (latent := _child(attention, "kv_b_proj")) is not None:
        direct = separate["q"] is not None
        query = separate["q"] or _need(about.model, attention, "query projection", "q_b_proj")
        return (by_heads(query, "q", heads["q"], direct), latent_values(latent, about.n_heads, about.d_value))
    fused = _need(
        about.model,
        attention,
        "projection of queries, keys and values",
        "c_attn",
        "query_key_value",
        "qkv_proj",
        "Wqkv",
    )
    if about.config.model_type == "codegen":
        return (codegen(fused, about.n_heads),)
    if about.traits.grouped is not None and about.traits.grouped(about.config):
        return (by_groups(fused, about.n_heads, about.n_kv),)
    return (in_turn(fused, about.n_heads, about.n_kv),)


def _norms(module: nn.Module, about: _Numbers) -> dict[str, Norm | None]:
    """ln1, ln2, ln1_post and ln2_post, by which norms stand beside each other."""
    first = _child(
        module, "input_layernorm", "ln_1", "norm_1", "self_attn_layer_norm", "attention_layernorm", "ln_attn"
    )
    after = _child(module, "post_attention_layernorm")
    last = _child(module, "post_feedforward_layernorm", "post_mlp_layernorm", "post_norm2")
    found: dict[str, nn.Module | None] = {"ln1": first, "ln2": None, "ln1_post": None, "ln2_post": last}
    if (sandwiched := _child(module, "pre_feedforward_layernorm", "pre_mlp_layernorm")) is not None:
        found |= {"ln2": sandwiched, "ln1_post": after}
    elif (own := _child(module, "post_self_attn_layernorm", "post_norm1")) is not None:
        found |= {"ln2": after, "ln1_post": own}
    elif first is None or last is not None:
        found |= {"ln1_post": after}
    else:
        found |= {
            "ln2": after or _child(module, "ln_2", "norm_2", "final_layer_norm", "feedforward_layernorm", "ln_mlp")
        }
    if about.parallel and _child(module, "ln_mlp", "post_attention_layernorm") is None:
        found["ln2"] = None
    if first is None and after is None:
        raise _refuse(about.model, f"its {type(module).__name__} has no norm that is known")
    try:
        return {
            name: None if norm is None or isinstance(norm, nn.Identity) else probe_norm(norm, about.d)
            for name, norm in found.items()
        }
    except CutawayError as error:
        raise _refuse(about.model, str(error)) from error


def _mlp(module: nn.Module, about: _Numbers) -> dict[str, Any]:
    """The fields of a `Layer` that concern what stands where its MLP stands."""
    mlp = _child(module, "mlp", "ffn", "block_sparse_moe", "feed_forward", "moe")
    if mlp is None:
        into, out = (_need(about.model, module, "MLP", name) for name in ("fc1", "fc2"))
        return {"mlp": into, "mlp_in": into, "mlp_linear": None, "mlp_out": out, "experts": None, "mlp_writer": out}
    if (experts := _child(mlp, "experts")) is not None:
        router = _need(about.model, mlp, "router", "gate", "router")
        n = getattr(innermost(experts), "num_experts", None) or getattr(innermost(router), "num_experts", None)
        if isinstance(experts, nn.ModuleList) or n is None:
            raise _refuse(about.model, f"its {type(mlp).__name__} keeps its experts in an unknown way")
        known = {"experts", "gate", "router"}
        mixture = Experts(experts, router, int(n), any(name not in known for name, _ in mlp.named_children()))
        return {
            "mlp": mlp, "mlp_in": None, "mlp_linear": None, "mlp_out": None, "experts": mixture, "mlp_writer": mlp,
        }  # fmt: skip
    out = _need(
        about.model, mlp, "output projection", "down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "output_linear"
    )
    if (fused := _child(mlp, "gate_up_proj", "input_linear")) is not None:
        into = linear = fused
    else:
        into = _need(
            about.model, mlp, "input projection", "gate_proj", "c_fc", "dense_h_to_4h", "fc1", "fc_in", "up_proj"
        )
        linear = _child(mlp, "up_proj") if _child(mlp, "gate_proj") is not None else None
    writer = out if "mlp" in about.traits.adds else mlp
    return {"mlp": mlp, "mlp_in": into, "mlp_linear": linear, "mlp_out": out, "experts": None, "mlp_writer": writer}


def _layer(module: nn.Module, index: int, about: _Numbers) -> Layer:
    attention = _child(module, "self_attn", "attn", "attention", "self_attention")
    if attention is None:
        raise _refuse(
            about.model, f"layer {index} ({type(module).__name__}) has no softmax attention under a name that is known"
        )
    core = _child(attention, "attention") or attention
    for extra in ("attn_sub_norm", "groupnorm", "g_proj"):
        if _child(core, extra) is not None:
            raise _refuse(about.model, f"its attention changes what the heads write ({extra}) before it is projected")
    output = _need(about.model, core, "output projection", "o_proj", "c_proj", "dense", "out_proj")
    norms = _norms(module, about)
    mlp = _mlp(module, about)
    numbers = (getattr(module, name, None) for name in ("residual_multiplier", "residual_scale"))
    multiplier = next((float(number) for number in numbers if isinstance(number, int | float)), 1.0)
    ln1_post, ln2_post = norms["ln1_post"], norms["ln2_post"]
    plain_writer = output if "attention" in about.traits.adds else attention
    mlp["mlp_writer"] = ln2_post.module if ln2_post is not None else mlp["mlp_writer"]
    return Layer(
        module=module,
        attention=attention,
        core=core,
        projections=_projections(core, about),
        output=output,
        q_norm=_child(core, "q_norm", "q_layernorm", "query_layernorm"),
        k_norm=_child(core, "k_norm", "k_layernorm", "key_layernorm"),
        attention_writer=ln1_post.module if ln1_post is not None else plain_writer,
        attn_multiplier=multiplier,
        mlp_multiplier=multiplier,
        **norms,
        **mlp,
    )


_STACKS = ("layers", "h", "blocks")


def _decoder(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    base = model.base_model
    for owner in (base, getattr(base, "decoder", None), getattr(base, "language_model", None)):
        for name in _STACKS:
            stack = getattr(owner, name, None)
            if isinstance(owner, nn.Module) and isinstance(stack, nn.ModuleList) and len(stack):
                return owner, stack
    raise _refuse(model, f"its {type(base).__name__} has no list of decoder layers named {' or '.join(_STACKS)}")


def find_family(model: PreTrainedModel) -> Family:
    """Find the parts of a causal language model. Raises CutawayError with the reason if it does not fit."""
    if isinstance(model, OwnModel):
        return described_family(model)
    unembed = model.get_output_embeddings() if callable(getattr(model, "get_output_embeddings", None)) else None
    if not isinstance(unembed, nn.Module):
        raise _refuse(model, "it has no unembedding (load it with AutoModelForCausalLM)")
    config: Any = model.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise _refuse(model, "it is an encoder-decoder, not a causal language model")
    traits = _TRAITS.get(config.model_type, Traits())
    if traits.refuse is not None and (reason := traits.refuse(config)) is not None:
        raise _refuse(model, reason)
    own = getattr(vars(config).get("_heterogeneity_spec"), "per_layer_attributes", ())
    if differ := sorted({"hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"} & {*own}):
        raise _refuse(model, f"its layers differ in {', '.join(differ)}")
    owner, stack = _decoder(model)
    heads = getattr(config, "num_attention_heads", None)
    if heads is None:
        raise _refuse(model, "its configuration names no attention heads")
    d, n_heads = int(config.hidden_size), int(heads)
    n_kv = traits.kv_heads(config) if traits.kv_heads else int(getattr(config, "num_key_value_heads", None) or n_heads)
    first = _child(stack[0], "self_attn", "attn", "attention", "self_attention")
    latent = first is not None and _child(first, "kv_b_proj") is not None
    d_head = int(getattr(config, "head_dim", None) or d // n_heads)
    d_value = d_head
    if latent:
        n_kv, d_head, d_value = n_heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    parallel = bool(traits.parallel(config)) if traits.parallel else False
    about = _Numbers(model, config, traits, d, n_heads, n_kv, d_value, parallel)
    layers = tuple(_layer(module, index, about) for index, module in enumerate(stack))
    # one norm for both: attention and MLP read the same stream
    parallel = parallel or all(x.ln1 is not None and x.ln2 is None and x.ln2_post is None for x in layers)
    embed = model.get_input_embeddings()
    assert isinstance(embed, nn.Module)
    final = _need(
        model, owner, "final norm", "norm", "ln_f", "final_layer_norm", "final_layernorm", "layer_norm", "norm_f"
    )
    try:
        ln_final = probe_norm(final, d)
    except CutawayError as error:
        raise _refuse(model, str(error)) from error
    divisor = float(getattr(config, "logits_scaling", None) or 1.0)
    widths = [width_in(layer.mlp_out) for layer in layers if layer.mlp_out is not None]
    return Family(
        model_type=config.model_type,
        embed=embed,
        pos_embed=_child(owner, "wpe", "embed_positions"),
        layers=layers,
        ln_final=ln_final,
        unembed=unembed,
        parallel=parallel,
        latent=latent,
        alibi=traits.alibi is not None and bool(traits.alibi(config)),
        qk_norm_last=traits.qk_norm_last,
        qkv_clip=_clip(config),
        final_softcap=getattr(config, "final_logit_softcapping", None),
        logit_scale=float(getattr(config, "logit_scale", None) or 1.0) / divisor,
        n_heads=n_heads,
        n_kv_heads=n_kv,
        d_head=d_head,
        d_value=d_value,
        d_model=d,
        d_mlp=widths[0] if widths else int(getattr(config, "moe_intermediate_size", 0) or config.intermediate_size),
        d_vocab=width_out(unembed),
        d_vocab_in=width_out(unembed),
        context_length=int(getattr(config, "max_position_embeddings", 0) or getattr(config, "max_seq_len", 0) or 2**31),
    )


def _clip(config: Any) -> float | None:
    found = getattr(config, "clip_qkv", None) or getattr(getattr(config, "attn_config", None), "clip_qkv", None)
    return float(found) if found else None
