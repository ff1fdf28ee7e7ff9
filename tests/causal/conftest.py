"""Pairs of token ids for the small random Llama."""

import copy
from collections.abc import Callable

import pytest
import torch

from cutaway.data.pairs import PromptPair
from cutaway.model.language_model import LanguageModel, attach


@pytest.fixture(scope="session")
def tiny(tiny: LanguageModel) -> LanguageModel:
    """With a final norm that changes nothing and without its tokenizer, so that ids are taken as they are."""
    model = copy.deepcopy(tiny.hf)
    with torch.no_grad():
        model.get_parameter("model.norm.weight").fill_(1.0)
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


@pytest.fixture(scope="session")
def words(tiny: LanguageModel) -> LanguageModel:
    """The same model with a tokenizer: a word a token, its space with it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Metaspace
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(WordLevel({"<s>": 0, "<pad>": 1, **{f"▁w{i}": i for i in range(2, 61)}}, unk_token="<pad>"))
    plain.pre_tokenizer = Metaspace()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", pad_token="<pad>")
    return attach(tiny.hf, tokenizer, name="words")
