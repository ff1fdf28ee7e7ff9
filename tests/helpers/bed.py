"""The test bed: a random small model of each supported family, made from its configuration class.

Sizes are small but distinct where a family allows it, gains and biases are random, and weights strong
enough for heads and experts to differ.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

V, D, LAYERS, HEADS, KV = 97, 32, 3, 4, 2

# Settings under the names that configuration classes use; each takes those that it knows.
_SIZES: dict[str, Any] = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": 40, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV, "max_position_embeddings": 64,
    "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "n_inner": 48, "ffn_dim": 40, "word_embed_proj_dim": D,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20, "n_shared_experts": 1, "num_shared_experts": 1,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_dense_layers": 1, "sliding_window": 5,
    "max_seq_len": 64, "d_model": D, "n_heads": HEADS, "n_layers": LAYERS, "rotary_dim": 4,
}  # fmt: skip
_LATENT: dict[str, Any] = {
    "q_lora_rank": 16, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6,
    "num_key_value_heads": HEADS, "head_dim": None,
}  # fmt: skip
_WIDE = {"head_dim": 12}  # not d / H
_MOE2 = {"decoder_sparse_step": 2, "mlp_only_layers": []}

# family -> (model type, changes to the settings above; None leaves a setting to the class)
BED: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("apertus", {}),
    "arcee": ("arcee", _WIDE),
    "biogpt": ("biogpt", {}),
    "bloom": ("bloom", {}),
    "codegen": ("codegen", {}),
    "cohere": ("cohere", {"logit_scale": 0.3, "use_qk_norm": True}),
    "cohere2": ("cohere2", {"logit_scale": 0.3} | _WIDE),
    "deepseek_v2": ("deepseek_v2", _LATENT | {"topk_method": "greedy"}),
    "deepseek_v3": ("deepseek_v3", _LATENT),
    "deepseek_v3_direct": ("deepseek_v3", _LATENT | {"q_lora_rank": None}),
    "dots1": ("dots1", {}),
    "ernie4_5": ("ernie4_5", _WIDE | {"use_bias": True}),
    "ernie4_5_moe": ("ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1}),
    "exaone4": ("exaone4", _WIDE),
    "falcon": ("falcon", {}),
    "falcon_alibi": ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "falcon_new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": KV}),
    "flex_olmo": ("flex_olmo", {}),
    "gemma": ("gemma", _WIDE),
    "gemma2": ("gemma2", _WIDE | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", _WIDE | {"sliding_window_pattern": 2, "query_pre_attn_scalar": 7}),
    "glm": ("glm", _WIDE),
    "glm4": ("glm4", _WIDE),
    "glm4_moe": ("glm4_moe", {"use_qk_norm": True}),
    "gpt2": ("gpt2", {}),
    "gpt_bigcode": ("gpt_bigcode", {}),
    "gpt_bigcode_mha": ("gpt_bigcode", {"multi_query": False}),
    "gpt_neo": ("gpt_neo", {"attention_types": [[["global", "local", "global"], 1]], "window_size": 5}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5}),
    "gpt_neox_sequential": ("gpt_neox", {"rotary_pct": 0.5, "use_parallel_residual": False}),
    "gpt_oss": ("gpt_oss", _WIDE),
    "gptj": ("gptj", {}),
    "granite": (
        "granite",
        {"residual_multiplier": 0.4, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "attention_multiplier": 0.3},
    ),
    "granitemoe": ("granitemoe", {"residual_multiplier": 0.4, "logits_scaling": 2.0}),
    "helium": ("helium", {"head_dim": 8}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", _WIDE),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {"moe_topk": 2, "num_shared_expert": 1, "head_dim": 8}),
    "llama": ("llama", _WIDE | {"attention_bias": True, "mlp_bias": True}),
    "ministral": ("ministral", _WIDE),
    "ministral3": ("ministral3", _WIDE),
    "mistral": ("mistral", _WIDE),
    "mixtral": ("mixtral", _WIDE),
    "mpt": ("mpt", {}),
    "nemotron": ("nemotron", _WIDE),
    "olmo": ("olmo", {"clip_qkv": 4.0}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {}),
    "olmoe": ("olmoe", {}),
    "opt": ("opt", {}),
    "persimmon": ("persimmon", {}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "phimoe": ("phimoe", {}),
    "qwen2": ("qwen2", {}),
    "qwen2_moe": ("qwen2_moe", _MOE2),
    "qwen3": ("qwen3", _WIDE),
    "qwen3_moe": ("qwen3_moe", _WIDE | _MOE2),
    "seed_oss": ("seed_oss", _WIDE),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "solar_open": ("solar_open", _WIDE),
    "stablelm": ("stablelm", {"qk_layernorm": True}),
    "stablelm_parallel": ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True}),
    "starcoder2": ("starcoder2", {}),
    "vaultgemma": ("vaultgemma", _WIDE),
    "xglm": ("xglm", {"attention_heads": HEADS, "num_layers": LAYERS}),
}


def bed_config(family: str, **changes: Any) -> Any:
    """A configuration of its own: nothing shares it."""
    model_type, own = BED[family]
    config = CONFIG_MAPPING[model_type]
    known = set(inspect.signature(config.__init__).parameters)
    for base in config.__mro__:
        known |= {*getattr(base, "__annotations__", {})}
    other_names = getattr(config, "attribute_map", {})
    given = {
        name: value
        for name, value in _SIZES.items()
        if name in known or (name in other_names and other_names[name] not in _SIZES)
    }
    given = {name: value for name, value in (given | own | changes).items() if value is not None or name in own}
    settings: dict[str, Any] = {n: v for n, v in given.items() if not (n == "head_dim" and v is None)}
    return config(**settings)


def bed_model(family: str, *, seed: int = 0, attention: str | None = None, **changes: Any) -> PreTrainedModel:
    """A random model in evaluation mode, with the attention kernel that transformers chooses or the one named."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(bed_config(family, **changes), attn_implementation=attention).eval()
    if model.generation_config is not None:
        model.generation_config.eos_token_id = None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif not parameter.any():  # routers are made of zeros
                parameter.normal_(std=0.3)
            else:
                parameter.mul_(2 if "embed" in name or "wte" in name else 8)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    return model
