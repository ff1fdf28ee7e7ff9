"""The models that the benchmark of model access runs on: random weights, saved once for everyone to load."""

from pathlib import Path
from typing import Any

import torch
from paired import timed
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from cutaway.model.language_model import LanguageModel, attach

_SPECIAL: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
_SHAPES: dict[str, tuple[str, Any, Any]] = {
    "toy": (
        "Llama of 12 layers, width 64, 8 heads over 2 key-value heads",
        LlamaForCausalLM,
        lambda: LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=172, num_hidden_layers=12, num_attention_heads=8,
            num_key_value_heads=2, max_position_embeddings=128, **_SPECIAL,
        ),
    ),
    "small": ("GPT-2 small's shape (124 M parameters)", GPT2LMHeadModel, lambda: GPT2Config(**_SPECIAL)),
    "long": (
        "Llama of 8 layers, width 256, 8 heads over 4 key-value heads",
        LlamaForCausalLM,
        lambda: LlamaConfig(
            vocab_size=1024, hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=4, max_position_embeddings=2048, **_SPECIAL,
        ),
    ),
}  # fmt: skip


def word_tokenizer(n: int) -> PreTrainedTokenizerFast:
    """A word a token: peers ask for a tokenizer even where only ids are given."""
    words = {"<s>": 0, "<pad>": 1, **{f"w{i}": i for i in range(2, n)}}
    plain = Tokenizer(WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="<s>", pad_token="<pad>")


class Models:
    """Makes each model when it is first needed, in a folder under `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.loaded: set[tuple[str, str]] = set()  # (peer, shape) that a peer holds already
        self._attached: dict[str, LanguageModel] = {}
        self._rates: dict[int, float] = {}

    def describe(self, shape: str) -> str:
        return _SHAPES[shape][0]

    def folder(self, shape: str) -> Path:
        """Weights, configuration and a tokenizer."""
        folder = self.root / shape
        if not folder.exists():
            _, kind, config = _SHAPES[shape]
            torch.manual_seed(0)
            model = kind(config()).eval()
            with torch.no_grad():  # strong enough that a head matters, not so strong that rounding grows
                for parameter in model.parameters():
                    if parameter.dim() == 2:
                        parameter.mul_(2)
            model.save_pretrained(folder)
            word_tokenizer(model.config.vocab_size).save_pretrained(folder)
        return folder

    def language_model(self, shape: str) -> LanguageModel:
        """The model of the folder, attached."""
        if shape not in self._attached:
            self._attached[shape] = attach(AutoModelForCausalLM.from_pretrained(self.folder(shape)).eval(), name=shape)
        return self._attached[shape]

    def matmul_rate(self) -> float:
        """FLOP/s of a large matrix product with the threads of now, the best of several."""
        threads = torch.get_num_threads()
        if threads not in self._rates:
            a, b = torch.randn(1024, 768), torch.randn(768, 3072)
            self._rates[threads] = 2 * 1024 * 768 * 3072 / min(timed(lambda: a @ b, 3) for _ in range(10))
        return self._rates[threads]
