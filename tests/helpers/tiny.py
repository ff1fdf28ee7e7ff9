"""Small random models whose parts can all be told apart: random gains and biases, weights strong enough for heads to
differ, head widths that are not d / H where a family allows it.
"""

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

V, D, LAYERS, HEADS, KV = 97, 32, 3, 4, 2
LENGTHS = (11, 7, 4)

_ROTARY: dict[str, Any] = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": 40, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV, "max_position_embeddings": 64,
    "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_WIDE = {"head_dim": 12}  # not d / H
_NEOX = {k: v for k, v in _ROTARY.items() if k != "num_key_value_heads"} | {"rotary_pct": 0.5}
_GPT2 = {
    "vocab_size": V, "n_embd": D, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64,
    "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip

FAMILIES: dict[str, tuple[Callable[..., Any], Callable[..., PreTrainedModel], dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, _ROTARY),
    "mistral": (MistralConfig, MistralForCausalLM, _ROTARY | {"sliding_window": 5}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, _ROTARY),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, _ROTARY | _WIDE),
    "gemma": (GemmaConfig, GemmaForCausalLM, _ROTARY | _WIDE),
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        _ROTARY
        | _WIDE
        | {
            "sliding_window": 5,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 7,
        },
    ),
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        _ROTARY | _WIDE | {"sliding_window": 5, "sliding_window_pattern": 2, "query_pre_attn_scalar": 7},
    ),
    "gpt2": (GPT2Config, GPT2LMHeadModel, _GPT2),
    "neox": (GPTNeoXConfig, GPTNeoXForCausalLM, _NEOX),
    "neox_sequential": (GPTNeoXConfig, GPTNeoXForCausalLM, _NEOX | {"use_parallel_residual": False}),
}


def tiny_config(family: str, **changes: Any) -> Any:
    config, _, settings = FAMILIES[family]
    return config(**(settings | changes))


def tiny_model(family: str, *, seed: int = 0, config: Any = None, **changes: Any) -> PreTrainedModel:
    """A random model in evaluation mode; `changes` go to its configuration, or `config` replaces it."""
    torch.manual_seed(seed)
    model = FAMILIES[family][1](config if config is not None else tiny_config(family, **changes)).eval()
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None  # texts are as long as asked, unless a tokenizer brings an end
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(2 if "embed" in name or "wte" in name else 8)
    return model


def random_rows(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, V, (n,), generator=generator).tolist() for n in lengths]


WORDS = ["the", "a", "cat", "dog", "bird", "sat", "ran", "saw", "on", "under", "big", "red", "old"]
CHAT = (
    "{{ bos_token }}{% for m in messages %} {{ m['role'] }} : {{ m['content'] }} {{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %} assistant :{% endif %}"
)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; a beginning-of-text is added by itself."""
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", "user", "assistant", ":", *WORDS]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT,
    )
