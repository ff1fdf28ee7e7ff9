"""Small random models for comparisons with peers, saved with a tokenizer of one word a token."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
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
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

V, LAYERS, HEADS = 97, 3, 4
_SPECIAL: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
_ROTARY: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": 64, **_SPECIAL,
}  # fmt: skip
_NEOX: dict[str, Any] = {name: value for name, value in _ROTARY.items() if name != "num_key_value_heads"} | {
    "rotary_pct": 0.5
}
KINDS: dict[str, tuple[Any, Any]] = {
    "gpt2": (
        GPT2LMHeadModel,
        lambda: GPT2Config(vocab_size=V, n_embd=32, n_layer=LAYERS, n_head=HEADS, n_positions=64, **_SPECIAL),
    ),
    "llama": (LlamaForCausalLM, lambda: LlamaConfig(**_ROTARY)),
    "qwen3": (Qwen3ForCausalLM, lambda: Qwen3Config(**_ROTARY, head_dim=12)),
    "gemma2": (
        Gemma2ForCausalLM,
        lambda: Gemma2Config(
            **_ROTARY, head_dim=12, attn_logit_softcapping=5.0, final_logit_softcapping=6.0, query_pre_attn_scalar=7
        ),
    ),
    "neox": (GPTNeoXForCausalLM, lambda: GPTNeoXConfig(**_NEOX)),
}


def make(kind: str) -> PreTrainedModel:
    """A random model whose gains and biases differ and whose heads attend differently."""
    cls, config = KINDS[kind]
    torch.manual_seed(0)
    model = cls(config()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(2 if "embed" in name or "wte" in name else 6)
    return model


def save(kind: str, folder: Path) -> PreTrainedModel:
    """Make a model and save it with its tokenizer."""
    model = make(kind)
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({"<s>": 0, "<pad>": 1, **{f"w{i}": i for i in range(2, V)}}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="<s>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    return model


def rows(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, V, (batch, length), generator=torch.Generator().manual_seed(seed))
