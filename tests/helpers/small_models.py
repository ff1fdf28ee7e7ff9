"""Small random models of many wirings for attribution: norms before and after, centred or not, parallel, softcaps."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cutaway.model.language_model import LanguageModel, attach

V, D, L, H, KV = 61, 32, 3, 4, 2

_ROTARY: dict[str, Any] = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": 40, "num_hidden_layers": L, "num_attention_heads": H,
    "num_key_value_heads": KV, "max_position_embeddings": 64, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_NEOX = {k: v for k, v in _ROTARY.items() if k != "num_key_value_heads"}
_GEMMA = {"head_dim": 12, "query_pre_attn_scalar": 7, "sliding_window": 5}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"vocab_size": V, "n_embd": D, "n_layer": L, "n_head": H, "n_positions": 64,
                      "bos_token_id": 0, "eos_token_id": 2}),
    "llama": ("llama", _ROTARY),
    "llama with biases": ("llama", {**_ROTARY, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {**_ROTARY, "sliding_window": 5}),
    "qwen3": ("qwen3", {**_ROTARY, "head_dim": 12}),
    "gemma": ("gemma", {**_ROTARY, "head_dim": 12}),
    "gemma2": ("gemma2", {**_ROTARY, **_GEMMA, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", {**_ROTARY, **_GEMMA, "sliding_window_pattern": 2}),
    "neox": ("gpt_neox", {**_NEOX, "rotary_pct": 0.5}),
    "neox sequential": ("gpt_neox", {**_NEOX, "use_parallel_residual": False}),
    "olmo2": ("olmo2", _ROTARY),
    "cohere": ("cohere", {**_ROTARY, "logit_scale": 0.3}),
    "granite": ("granite", {**_ROTARY, "residual_multiplier": 0.4, "logits_scaling": 3.0}),
    "phi": ("phi", _ROTARY),
    "opt": ("opt", {"vocab_size": V, "hidden_size": D, "word_embed_proj_dim": D, "ffn_dim": 40, "num_hidden_layers": L,
                    "num_attention_heads": H, "max_position_embeddings": 64}),
    "mixtral": ("mixtral", {**_ROTARY, "num_local_experts": 4}),
}  # fmt: skip


def build(name: str) -> LanguageModel:
    """The family's model with random gains and biases, and weights strong enough for its parts to differ."""
    model_type, settings = FAMILIES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(6)
    return attach(model, name=name)
