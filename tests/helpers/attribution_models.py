"""Small Llamas for attribution patching: one that is not linear, and one that is."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cutaway.model.language_model import LanguageModel, attach


def _llama(seed: int, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=6, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, **settings,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def bent_llama() -> LanguageModel:
    """Two layers with grouped heads, in float64 (its norms compute in float32)."""
    model = _llama(0).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(25) if parameter.dim() == 2 else parameter.add_(0.3 * torch.randn_like(parameter))
    return attach(model, name="llama")


def linear_llama() -> LanguageModel:
    """Uniform attention, no MLP, and norms that divide by 10^6 whatever comes: linear in every activation."""
    model = _llama(1, rms_norm_eps=1e12)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1e6)
            else:
                parameter.mul_(0 if "q_proj" in name or "down_proj" in name else 40)
    return attach(model, name="linear")
