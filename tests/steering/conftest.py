"""A small random Llama a random dictionary, and the shipped model with its chat prompts."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import cutaway
from cutaway.dictionaries.dictionary import Dictionary, TopK
from cutaway.model.language_model import LanguageModel, attach

D, F = 32, 80


def _tokenizer() -> PreTrainedTokenizerFast:
    """A word a token: "<s>" (0, beginning of text), "<pad>" (1), then w2, w3, ..."""
    vocab = {"<s>": 0, "<pad>": 1, **{f"w{i}": i for i in range(2, 61)}}
    plain = Tokenizer(WordLevel(vocab, unk_token="<pad>"))
    plain.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", pad_token="<pad>")


@pytest.fixture(scope="session")
def tiny() -> LanguageModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=D, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() == 2 else 1)
    return attach(model, _tokenizer(), name="tiny")


@pytest.fixture(scope="session")
def dictionary() -> Dictionary:
    generator = torch.Generator().manual_seed(1)
    decoder = torch.nn.functional.normalize(torch.randn(F, D, generator=generator), dim=1)
    return Dictionary(
        W_enc=decoder.T.contiguous(),
        b_enc=torch.zeros(F),
        W_dec=decoder,
        b_dec=0.1 * torch.randn(D, generator=generator),
        selector=TopK(4),
        site="blocks.1.resid_post",
    )


@pytest.fixture(scope="session")
def atlas() -> LanguageModel:
    return cutaway.load("atlas")
