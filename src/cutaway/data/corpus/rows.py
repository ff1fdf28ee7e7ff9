"""Rows of tokens for a model to read, from a stream of documents, each token with the place it came from.

`packed` joins the documents by the separator (the tokenizer's BOS, or EOS without one) and cuts them into rows of the
context's length; only the last row may be shorter. `document` gives each document a row of its own and leaves out what
is beyond the context. With a BOS every row begins with it, as rows do in training.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.data.corpus.corpus import Tokenizing, token_ids
from cutaway.data.corpus.documents import Documents, add_document
from cutaway.data.corpus.separators import Marks
from cutaway.model.tokens import Tokens

Packing = Literal["packed", "document"]
Row = tuple[np.ndarray, np.ndarray, np.ndarray]  # ids, document, offset, each [p]
_DOCUMENTS_AT_ONCE = 64


@dataclass(frozen=True)
class RowBatch:
    """Rows of one forward pass, right padded: [b, p] each.

    `document` numbers the documents of the corpus from 0; `offset` is a token's place among its document's tokens
    (those of the text alone), -1 for a row's own BOS; a separator stands just behind its document's last token.
    """

    ids: Tensor
    mask: Tensor
    document: Tensor
    offset: Tensor
    first_row: int

    def tokens(self) -> Tokens:
        """As a model's input, without strings: making them costs more than a small model's forward."""
        return Tokens(self.ids, self.mask, ((),) * len(self.ids))


@dataclass
class Reading:
    """What was read so far: a running hash of it, and what was left out."""

    digest: Any = field(default_factory=hashlib.sha256)
    documents: int = 0
    bytes: int = 0
    truncated_tokens: int = 0
    marks: Marks | None = None  # None: lines that look like separators are not looked for

    def add(self, text: str) -> None:
        add_document(self.digest, text)
        self.documents += 1
        self.bytes += len(text)
        if self.marks is not None:
            self.marks.see(text)


def row_batches(rows: Iterable[Row], size: int, pad_id: int) -> Iterator[RowBatch]:
    """`size` rows at a time, padded on the right to the longest of them."""
    source, first = iter(rows), 0
    while chosen := list(islice(source, size)):
        width = max(len(ids) for ids, _, _ in chosen)
        ids = np.full((len(chosen), width), pad_id, dtype=np.int64)
        mask = np.zeros((len(chosen), width), dtype=bool)
        document, offset = np.full_like(ids, -1), np.full_like(ids, -1)
        for place, (row, documents, offsets) in enumerate(chosen):
            n = len(row)
            ids[place, :n], mask[place, :n], document[place, :n], offset[place, :n] = row, True, documents, offsets
        yield RowBatch(*map(torch.from_numpy, (ids, mask, document, offset)), first_row=first)
        first += len(chosen)


def given_rows(ids: Tensor, mask: Tensor | None = None) -> Iterator[Row]:
    """Rows [n, p] that are tokens already; each row is its own document."""
    for number, row in enumerate(ids):
        kept = row if mask is None else row[mask[number]]
        n = len(kept)
        yield kept.cpu().numpy().astype(np.int64), np.full(n, number), np.arange(n)


def text_rows(lm: Tokenizing, documents: Documents, context: int, packing: Packing, reading: Reading) -> Iterator[Row]:
    """The rows of a stream of texts; `reading` counts and hashes the documents as they are taken.

    Raises `CutawayError` for a context that the model does not have, and for text where a model without a tokenizer
    takes ids.
    """
    if context < 2:
        raise CutawayError(f"a context of {context} tokens is too short: it takes at least 2")
    if context > lm.context_length:
        raise CutawayError(f"a context of {context} tokens is longer than the {lm.context_length} of {lm.name}")
    if packing not in ("packed", "document"):
        raise CutawayError(f"packing is '{packing}'; it is 'packed' or 'document'")
    encoded = _encoded(lm, documents, reading)
    if packing == "packed":
        separator = lm.bos_id if lm.bos_id is not None else getattr(lm.tokenizer, "eos_token_id", None)
        return _packed(encoded, context, lm.bos_id, separator)
    return _one_document_a_row(encoded, context, lm.bos_id, reading)


def _encoded(lm: Tokenizing, documents: Documents, reading: Reading) -> Iterator[np.ndarray]:
    """The token ids of each document. Some are tokenised at once, which is faster, but counted one by one."""
    source = iter(documents)
    while texts := list(islice(source, _DOCUMENTS_AT_ONCE)):
        for text, ids in zip(texts, token_ids(lm, texts), strict=True):
            reading.add(text)
            yield np.asarray(ids, dtype=np.int64)


def _packed(encoded: Iterable[np.ndarray], context: int, bos: int | None, separator: int | None) -> Iterator[Row]:
    body = context if bos is None else context - 1
    join = [] if separator is None else [separator]
    parts: list[Row] = []
    held = 0

    def cut(final: bool) -> Iterator[Row]:
        """All whole rows of what is held, and with `final` the rest; what is left over is held on."""
        nonlocal parts, held
        ids, document, offset = (np.concatenate(column) for column in zip(*parts, strict=True))
        begin = 0
        while True:
            # the row's own BOS stands there already; empty documents leave several behind each other
            while begin < len(ids) and bos is not None and ids[begin] == bos:
                begin += 1
            end = begin + body
            if end > len(ids) and not (final and begin < len(ids)):
                break
            piece = slice(begin, min(end, len(ids)))
            row = ids[piece], document[piece], offset[piece]
            yield row if bos is None else _with_bos(row, bos)
            begin = piece.stop
        parts = [(ids[begin:], document[begin:], offset[begin:])]
        held = len(ids) - begin

    for number, ids in enumerate(encoded):
        joined = np.concatenate([ids, np.asarray(join, dtype=np.int64)])
        parts.append((joined, np.full(len(joined), number), np.arange(len(joined))))
        held += len(joined)
        if held > body:
            yield from cut(False)
    if parts:
        yield from cut(True)


def _with_bos(row: Row, bos: int) -> Row:
    ids, document, offset = row
    return np.insert(ids, 0, bos), np.insert(document, 0, document[0]), np.insert(offset, 0, -1)


def _one_document_a_row(
    encoded: Iterable[np.ndarray], context: int, bos: int | None, reading: Reading
) -> Iterator[Row]:
    body = context if bos is None else context - 1
    for number, ids in enumerate(encoded):
        if not len(ids):
            continue
        reading.truncated_tokens += max(0, len(ids) - body)
        ids = ids[:body]
        row = ids, np.full(len(ids), number), np.arange(len(ids))
        yield row if bos is None else _with_bos(row, bos)
