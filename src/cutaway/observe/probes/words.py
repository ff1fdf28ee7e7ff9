"""Words of sentences as examples of a probe: each is read at its last token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cutaway.artifacts.errors import CutawayError
from cutaway.model.language_model import LanguageModel
from cutaway.model.tokens import Tokens


def sentences_of(texts: Any) -> list[list[str]]:
    """Lists of words, checked. Raises CutawayError for what is none."""
    found = [list(words) if not isinstance(words, str) else [] for words in texts]
    for i, words in enumerate(found):
        if not words or not all(isinstance(word, str) and word.strip() for word in words):
            raise CutawayError(f"Position rule 'words' needs a list of words for text {i}; got {texts[i]!r}.")
    return found


def joined(sentences: Sequence[Sequence[str]]) -> list[str]:
    """Each sentence as a text, a blank between two words."""
    return [" ".join(words) for words in sentences]


def word_places(lm: LanguageModel, tokens: Tokens, sentences: Sequence[Sequence[str]]) -> list[list[int]]:
    """Position of each word's last token, sentence by sentence, in the `tokens` of the `joined` sentences.

    Raises CutawayError for a word without a token, and where the tokenizer does not say which characters a token is.
    """
    return [_places(lm, tokens, row, words) for row, words in enumerate(sentences)]


def _places(lm: LanguageModel, tokens: Tokens, row: int, words: Sequence[str]) -> list[int]:
    spans = _spans(lm, tokens, row, " ".join(words))
    found = []
    begin = 0
    for word in words:
        end = begin + len(word)
        at = next((i for i in reversed(range(len(spans))) if spans[i][0] < end and spans[i][1] > begin), None)
        if at is None:
            raise CutawayError(f"The tokenizer of {lm.name} leaves the word {word!r} of text {row} out; leave it out.")
        found.append(at)
        begin = end + 1
    return found


def _spans(lm: LanguageModel, tokens: Tokens, row: int, text: str) -> list[tuple[int, int]]:
    """Which characters of `text` each token of a row is, (0, 0) for those that are none of it."""
    ids = tokens.row_ids(row)
    if getattr(lm.tokenizer, "is_fast", False):
        assert lm.tokenizer is not None
        encoded = lm.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        plain: list[int] = encoded["input_ids"]
        for skipped in range(len(ids) - len(plain) + 1):  # a beginning-of-text stands before them
            if ids[skipped : skipped + len(plain)] == plain:
                after = len(ids) - skipped - len(plain)
                return [*[(0, 0)] * skipped, *map(tuple, encoded["offset_mapping"]), *[(0, 0)] * after]
    start = tokens.text(row).rfind(text)
    if start < 0:
        raise CutawayError(
            f"The tokenizer of {lm.name} does not say which of its tokens are which words of text {row}; give texts "
            "and positions instead of lists of words."
        )
    spans = [(0, 0)] * len(ids)
    for place in range(len(text)):
        first, last = tokens.covering(row, start + place, start + place + 1)
        for i in range(first, last + 1):
            spans[i] = (spans[i][0] if spans[i][1] else place, place + 1)
    return spans


def word_examples(
    lm: LanguageModel, tokens: Tokens, sentences: Sequence[Sequence[str]], labels: Sequence[Any]
) -> tuple[np.ndarray, np.ndarray, list[Any]]:
    """Text [n], position [n] and label of every word that has a label (not None).

    Raises CutawayError where a sentence has more or fewer labels than words.
    """
    where: list[tuple[int, int, Any]] = []
    for i, (places, given) in enumerate(zip(word_places(lm, tokens, sentences), labels, strict=True)):
        if isinstance(given, str) or not hasattr(given, "__len__") or len(given) != len(places):
            raise CutawayError(
                f"Position rule 'words' needs a list of {len(places)} labels for text {i}, one per word; got {given!r}."
            )
        where += [(i, p, label) for p, label in zip(places, given, strict=True) if label is not None]
    found = np.array([(i, p) for i, p, _ in where], dtype=np.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1], [label for *_, label in where]
