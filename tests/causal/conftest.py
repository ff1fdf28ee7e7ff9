"""A small random Llama without a tokenizer, and pairs of token ids for it."""

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cutaway.data.pairs import PromptPair
from cutaway.model.language_model import LanguageModel, attach


@pytest.fixture(scope="session")
def tiny() -> LanguageModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() == 2 else 1)
    return attach(model, name="tiny")


def _pairs(n: int, length: int | None, seed: int = 0) -> list[PromptPair]:
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for i in range(n):
        p = 5 + i % 4 if length is None else length
        ids = torch.randint(2, 61, (p,), generator=generator).tolist()
        other, at = list(ids), 1 + i % 2
        other[at], other[at + 1] = (ids[at] + 7) % 59 + 2, (ids[at + 1] + 11) % 59 + 2
        pairs.append(PromptPair((0, *ids), (0, *other), 3 + i, 30 + i, {"changed": at + 1}))
    return pairs


@pytest.fixture(scope="session")
def id_pairs() -> Callable[..., list[PromptPair]]:
    """(n, length, seed) -> n pairs of token ids that differ in two tokens; length None gives different lengths."""
    return _pairs
