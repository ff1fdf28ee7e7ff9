"""Text that a user has, as documents and as rows of tokens.

corpus = read_corpus("texts/")
rows = token_rows(lm, corpus.documents, context=256, seed=0)
split = split_rows(rows, held_out=64, seed=0)
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.data.corpus.documents import add_document, documents_of
from cutaway.data.corpus.separators import Marks
from cutaway.model.tokens import ids_in

_DOCUMENTS_AT_ONCE = 256


class Tokenizing(Protocol):
    """What is needed of a language model here; `cutaway.model.LanguageModel` has it."""

    @property
    def name(self) -> str: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def context_length(self) -> int: ...


@dataclass(frozen=True)
class Corpus:
    """Texts in memory; make one with `read_corpus`."""

    documents: tuple[str, ...]
    """In the order of their files."""
    source: str
    """The path they were read from."""
    hash: str
    """SHA-256 of the documents and where each ends; their files and paths do not matter."""

    @property
    def characters(self) -> int:
        """Characters in all documents."""
        return sum(map(len, self.documents))


def read_corpus(path: str | Path, *, document_separator: str | None = None) -> Corpus:
    """Read texts into memory, as UTF-8.

    Documents of a .txt file are separated by blank lines; each line of a .jsonl file is an object with a `text`, each
    row of a .parquet file has one; other files are one document.

    Args:
        path: A file, or a folder: every .txt, .md, .py, .jsonl and .parquet file below it, hidden ones left out.
        document_separator: Where documents end instead, in files of every kind, such as "<|endoftext|>".

    Returns:
        The documents with their hash.

    Raises:
        CutawayError: The path does not exist; a file is not UTF-8 or not as its suffix says; there is no text at all,
            or no separator in it.
    """
    found = documents_of(Path(path), document_separator=document_separator)
    documents = tuple(found)
    return Corpus(documents, found.source, corpus_hash(documents))


def corpus_hash(documents: Sequence[str]) -> str:
    """SHA-256 (hex) of the documents and where each ends; their files and their paths do not matter."""
    digest = hashlib.sha256()
    for document in documents:
        add_document(digest, document)
    return digest.hexdigest()


def rows_hash(rows: Tensor) -> str:
    """SHA-256 (hex) of rows of tokens [n, p] in their order."""
    digest = hashlib.sha256(str(tuple(rows.shape)).encode())
    digest.update(rows.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def token_rows(
    lm: Tokenizing, documents: Sequence[str], context: int, seed: int = 0, limit: int | None = None
) -> Tensor:
    """Rows of tokens of equal length, no two the same.

    Documents are shuffled, joined by the tokenizer's BOS (or EOS without one) and cut; with a BOS every row begins with
    it, as rows do in training. What is left over at the end is dropped.

    Args:
        lm: The model, whose tokenizer is used.
        documents: Texts.
        context: Tokens per row.
        seed: Of the shuffle.
        limit: At most so many rows; only as much text as they need is tokenised. None: all.

    Returns:
        Token ids, int64 [n, context].

    Raises:
        CutawayError: The text does not fill one row, or the context is longer than the model's.

    Example:
        >>> lm = cutaway.load("atlas")
        >>> token_rows(lm, ["The capital of Texas is Austin."], context=4).shape[1]
        4
    """
    if context < 2:
        raise CutawayError(f"a context of {context} tokens is too short: it takes at least 2")
    if context > lm.context_length:
        raise CutawayError(f"a context of {context} tokens is longer than the {lm.context_length} of {lm.name}")
    body = context if lm.bos_id is None else context - 1
    rows: list[Tensor] = []
    seen: set[bytes] = set()
    rest: list[int] = []
    for ids in _token_stream(lm, documents, seed):
        rest += ids
        begin = 0
        while True:
            if begin < len(rest) and rest[begin] == lm.bos_id:  # the row's own BOS stands there already
                begin += 1
            if len(rest) - begin < body:
                break
            piece = rest[begin : begin + body]
            begin += body
            tokens = torch.tensor(piece if lm.bos_id is None else [lm.bos_id, *piece])
            key = tokens.numpy().tobytes()
            if key not in seen:
                seen.add(key)
                rows.append(tokens)
            if len(rows) == limit:
                return torch.stack(rows)
        rest = rest[begin:]
    if not rows:
        raise CutawayError(
            f"the corpus has {len(rest)} tokens, too few for one row of {context}: give more text or a shorter context"
        )
    return torch.stack(rows)


@dataclass(frozen=True)
class RowSplit:
    """Rows of tokens for two purposes; no row is in both."""

    train: Tensor
    """Rows to train on, int64 [n, context]."""
    held_out: Tensor
    """Rows to judge on, int64 [m, context]."""


def split_rows(rows: Tensor, held_out: int, seed: int = 0) -> RowSplit:
    """Put some rows aside.

    Args:
        rows: Token ids [n, context].
        held_out: How many rows are put aside.
        seed: Of the draw.

    Returns:
        The two parts.

    Raises:
        CutawayError: No row would be left to train on.
    """
    if not 0 < held_out < len(rows):
        raise CutawayError(
            f"{held_out} rows cannot be held out of {len(rows)}: give a longer corpus, or a shorter context"
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return RowSplit(train=rows[order[held_out:]], held_out=rows[order[:held_out]])


def _token_stream(lm: Tokenizing, documents: Sequence[str], seed: int) -> Iterator[list[int]]:
    """Token ids of some documents at a time, each document behind or before a separator."""
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    separator = lm.bos_id if lm.bos_id is not None else getattr(lm.tokenizer, "eos_token_id", None)
    join = [] if separator is None else [separator]
    marks = Marks(lm.tokenizer)
    for start in range(0, len(order), _DOCUMENTS_AT_ONCE):
        texts = [documents[place] for place in order[start : start + _DOCUMENTS_AT_ONCE]]
        for text in texts:
            marks.see(text)
        yield [token for ids in token_ids(lm, texts) for token in (*ids, *join)]


def token_ids(lm: Tokenizing, texts: list[str]) -> list[list[int]]:
    """Texts as a model's tokenizer reads them; of a model without one they are ids, such as "#3 #5 #1"."""
    if lm.tokenizer is None:
        return [ids_in(text) for text in texts]
    return lm.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
