"""Models and tokenizers that do not go together, and models that are no causal language models."""

from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model, word_tokenizer
from transformers import BertConfig, BertLMHeadModel, T5Config, T5ForConditionalGeneration

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.model.language_model import attach


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=12)
    with pytest.raises(CutawayError, match=r"does not fit mine: it has 20 tokens, 8 of them beyond the 12"):
        attach(model, word_tokenizer(), name="mine")
    model.save_pretrained(tmp_path / "small")
    word_tokenizer().save_pretrained(tmp_path / "small")
    with pytest.raises(CutawayError, match="The tokenizer does not fit"):
        cutaway.load(tmp_path / "small")


def test_tokens_that_were_added_may_lie_beyond_the_embedding() -> None:
    """A padding token, say: text does not contain it, and padding is any id under the mask."""
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<new-pad>"})
    assert len(tokenizer) == 21
    lm = attach(tiny_model("llama", vocab_size=20), tokenizer)
    assert lm.run(["w5 w6 w7", "w5"], logits="last").logits is not None


def test_other_kinds_of_models_in_memory() -> None:
    both: dict[str, Any] = {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    with pytest.raises(CutawayError, match=r"is an encoder-decoder model \(t5\)"):
        attach(T5ForConditionalGeneration(T5Config(**both)))
    small: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    with pytest.raises(CutawayError, match=r"is an encoder \(bert\)"):
        attach(BertLMHeadModel(BertConfig(**small)))
