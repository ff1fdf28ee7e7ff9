"""Small random models of four families, without tokenizers."""

from collections.abc import Callable

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from cutaway.model.language_model import LanguageModel, attach

V, D, L, H = 97, 32, 3, 4


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V, hidden_size=D, intermediate_size=48, num_hidden_layers=L, num_attention_heads=H,
            num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, pad_token_id=1,
        )
    )  # fmt: skip


def _gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_embd=D, n_layer=L, n_head=H, n_positions=128, bos_token_id=0, eos_token_id=0)
    )


def _gemma2() -> PreTrainedModel:
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=V, hidden_size=D, intermediate_size=48, num_hidden_layers=L, num_attention_heads=H,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=128, sliding_window=8,
            final_logit_softcapping=3.0, attn_logit_softcapping=5.0, query_pre_attn_scalar=8,
        )
    )  # fmt: skip


def _neox() -> PreTrainedModel:
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=V, hidden_size=D, intermediate_size=48, num_hidden_layers=L, num_attention_heads=H,
            max_position_embeddings=128, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "gemma2": _gemma2,
    "neox": _neox,
}


def build(family: str) -> LanguageModel:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # random initialisation is too weak to tell heads apart, and gains of one would hide a missing gain
            parameter.mul_(6 if parameter.dim() == 2 else 1)
            if parameter.dim() == 1 and "bias" not in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return attach(model, name=f"tiny {family}")


@pytest.fixture(scope="module", params=list(FAMILIES))
def tiny(request: pytest.FixtureRequest) -> LanguageModel:
    return build(request.param)


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return build("llama")
