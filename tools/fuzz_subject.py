"""What the readers of `fuzz_readers.py` and `fuzz_weights.py` share: a tiny model, its texts, and what a reader is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cutaway.artifacts.manifest import json_hash
from cutaway.model.language_model import LanguageModel, attach

SITE = "blocks.0.resid_post"
_SPOKEN = "the a cat dog bird sat ran saw on under big red old kings queens is are Anna Ben went to and gave it this"
WORDS = _SPOKEN.split()
D, F = 16, 24


@dataclass(frozen=True)
class Reader:
    """`files` are the names, or patterns of names, of what is spoiled; all that `make` wrote if there are none."""

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    files: tuple[str, ...] = ("**/*",)
    mend: Callable[[Path], None] | None = None


@cache
def tiny() -> LanguageModel:
    """A Llama of two layers with a word tokenizer, in memory."""
    return attach(tiny_model(), tiny_tokenizer(), name="tiny")


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 4, hidden_size=D, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=0, pad_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(("<s>", "<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


TEXTS = [" ".join(WORDS[(i * k + k) % len(WORDS)] for i in range(12)) for k in range(1, 40)]


def sign(manifest: dict[str, Any]) -> None:
    """Set a manifest's id to what its other fields give."""
    parts = ("kind", "model", "corpus_hash", "configuration", "seed", "version", "parents")
    manifest["id"] = json_hash({name: manifest[name] for name in parts})


def each_file(folder: Path, read: Callable[[Path], Any]) -> None:
    """Read all files of a folder, each by itself."""
    for file in sorted(folder.iterdir()):
        read(file)
