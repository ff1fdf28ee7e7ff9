"""Small random models of every supported family, batches for them, and a tokenizer of whole words."""

from collections.abc import Iterator

import pytest
import torch
from subject import Subject, Subjects
from tiny import FAMILIES, tiny_model, word_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cutaway.model.language_model import LanguageModel

_subjects: dict[str, Subject] = {}


def _subject(family: str) -> Subject:
    if family not in _subjects:
        _subjects[family] = Subject(family)
    return _subjects[family]


@pytest.fixture(params=list(FAMILIES))
def subject(request: pytest.FixtureRequest) -> Subject:
    """Each family in turn. Tests leave the model as it is; what changes a model takes a fresh one from `tiny_model`."""
    return _subject(request.param)


@pytest.fixture
def of_family() -> Subjects:
    return _subject


@pytest.fixture
def llama() -> LanguageModel:
    return _subject("llama").lm


@pytest.fixture
def fresh_llama() -> PreTrainedModel:
    """A model of one test's own."""
    return tiny_model("llama")


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    """A tokenizer with one token a word, which adds a beginning-of-text."""
    return word_tokenizer()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small run several times faster without a pool of threads, and to the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
