"""From documents to rows: nothing lost, nothing doubled, and each token leads back to its place."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cutaway.artifacts.errors import CutawayError
from cutaway.data.corpus.corpus import corpus_hash
from cutaway.data.corpus.documents import documents_of
from cutaway.data.corpus.rows import Packing, Reading, Row, given_rows, row_batches, text_rows

BOS, EOS = 0, 99


class WordTokenizer:
    eos_token_id = EOS

    def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(word[1:]) for word in text.split()] for text in texts]}


@dataclass
class TinyModel:
    bos_id: int | None = BOS
    name: str = "tiny"
    tokenizer: Any = field(default_factory=WordTokenizer)
    context_length: int = 64


def texts(lengths: Sequence[int]) -> list[str]:
    return [" ".join(f"w{1 + (7 * d + i) % 90}" for i in range(length)) for d, length in enumerate(lengths)]


def rows(documents: list[str], context: int, packing: Packing, bos: int | None) -> tuple[list[Row], Reading]:
    reading = Reading()
    return list(text_rows(TinyModel(bos), documents_of(documents), context, packing, reading)), reading


@given(lengths=st.lists(st.integers(0, 30), max_size=12), context=st.integers(2, 16), bos=st.sampled_from([None, BOS]))
@settings(max_examples=200)
def test_packed_rows_are_the_joined_documents_cut(lengths: list[int], context: int, bos: int | None) -> None:
    documents = texts(lengths)
    found, reading = rows(documents, context, "packed", bos)
    stream: list[tuple[int, int, int]] = []  # (id, document, offset), one token after another
    for number, text in enumerate(documents):
        ids = [int(word[1:]) for word in text.split()]
        stream += [(token, number, place) for place, token in enumerate(ids)]
        stream.append((EOS if bos is None else bos, number, len(ids)))
    expected = []
    while stream:
        if bos is None:
            row, stream = stream[:context], stream[context:]
        else:
            while stream and stream[0][0] == bos:
                stream = stream[1:]
            if not stream:
                break
            body, stream = stream[: context - 1], stream[context - 1 :]
            row = [(bos, body[0][1], -1), *body]
        expected.append(row)
    assert [list(zip(*(column.tolist() for column in row), strict=True)) for row in found] == expected
    assert all(len(row[0]) == context for row in found[:-1])
    assert reading.documents == len(documents)
    assert reading.digest.hexdigest() == corpus_hash(documents)


@given(lengths=st.lists(st.integers(0, 30), max_size=12), context=st.integers(2, 16), bos=st.sampled_from([None, BOS]))
@settings(max_examples=100)
def test_a_document_a_row(lengths: list[int], context: int, bos: int | None) -> None:
    found, reading = rows(texts(lengths), context, "document", bos)
    body = context - (bos is not None)
    kept = [number for number, length in enumerate(lengths) if length]
    assert len(found) == len(kept)
    for number, (ids, document, offset) in zip(kept, found, strict=True):
        expected = [int(word[1:]) for word in texts(lengths)[number].split()][:body]
        assert ids.tolist() == ([] if bos is None else [bos]) + expected
        assert set(document.tolist()) == {number}
        assert offset.tolist() == ([] if bos is None else [-1]) + list(range(len(expected)))
    assert reading.truncated_tokens == sum(max(0, length - body) for length in lengths)


def test_batches_are_padded_to_their_longest_row() -> None:
    found, _ = rows(texts([5, 2, 9, 3, 1]), 8, "document", BOS)
    batches = list(row_batches(iter(found), 2, pad_id=7))
    assert [batch.ids.shape for batch in batches] == [(2, 6), (2, 8), (1, 2)]
    assert [batch.first_row for batch in batches] == [0, 2, 4]
    assert (batches[0].ids[~batches[0].mask] == 7).all()
    assert (batches[0].document[~batches[0].mask] == -1).all()
    flat = [i for batch in batches for i in batch.ids[batch.mask].tolist()]
    assert flat == np.concatenate([ids for ids, _, _ in found]).tolist()


def test_rows_that_are_given_stay_as_they_are() -> None:
    ids = torch.arange(12).view(3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 0, 0]]).bool()
    found = list(given_rows(ids, mask))
    assert [row[0].tolist() for row in found] == [[0, 1, 2, 3], [5, 6, 7], [8, 9]]
    assert [row[1].tolist() for row in found] == [[0] * 4, [1] * 3, [2] * 2]
    assert found[1][2].tolist() == [0, 1, 2]


def test_documents_are_taken_as_they_are_needed() -> None:
    taken = []

    def source():
        for number in range(10_000):
            taken.append(number)
            yield "w1 w2 w3 w4"

    stream = text_rows(TinyModel(), documents_of(source), 9, "packed", Reading())
    for _ in range(3):
        next(stream)
    assert len(taken) <= 64


def test_what_cannot_be_is_refused() -> None:
    for context, words in ((1, "at least 2"), (65, "longer than the 64 of tiny")):
        with pytest.raises(CutawayError, match=words):
            rows(["w1"], context, "packed", BOS)
    with pytest.raises(CutawayError, match="'w1' is no token id, and this model has no tokenizer"):
        list(text_rows(TinyModel(tokenizer=None), documents_of(["w1"]), 8, "packed", Reading()))
    by_id = text_rows(TinyModel(None, tokenizer=None), documents_of(["#5 #3", "#4"]), 8, "document", Reading())
    assert [ids.tolist() for ids, _, _ in by_id] == [[5, 3], [4]]
    with pytest.raises(CutawayError, match="packing is 'loose'"):
        rows(["w1"], 8, "loose", BOS)  # type: ignore[arg-type]
