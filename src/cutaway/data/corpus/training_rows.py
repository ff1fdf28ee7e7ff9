"""Rows of tokens to train on, from any corpus, and no more of it than training takes."""

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.data.corpus.corpus import Tokenizing, token_rows
from cutaway.data.corpus.documents import TextSource, documents_of
from cutaway.data.corpus.rows import Reading, text_rows
from cutaway.data.corpus.separators import Marks, refuse_separator

_SMALL = 1 << 28  # bytes of text that are held in memory


def training_rows(
    lm: Tokenizing,
    corpus: TextSource | Tensor,
    *,
    context: int,
    tokens: int,
    more_rows: int = 0,
    seed: int = 0,
    field: str = "text",
    split: str = "train",
    document_separator: str | None = None,
) -> Tensor:
    """Rows of `context` tokens [n, context], no two the same: enough for `tokens` tokens, and `more_rows` beside them.

    `corpus` is as for `harvest`; rows of token ids are taken as they are. Texts of up to 256 MiB are held in memory,
    and their documents shuffled by `seed` before rows are cut. Of a larger corpus, or one that does not say how large
    it is, the first rows are taken in its own order; training shuffles the rows either way. Fewer rows than wanted are
    no error: training goes through them again. Raises `CutawayError` when the text does not fill one row.
    """
    if isinstance(corpus, Tensor):
        refuse_separator(document_separator)
        return corpus
    limit = -(-tokens // (context - 1)) + more_rows if context > 1 else None
    documents = documents_of(corpus, field=field, split=split, document_separator=document_separator)
    at_hand = isinstance(corpus, (list, tuple)) or (documents.size is not None and documents.size <= _SMALL)
    if at_hand:
        return token_rows(lm, tuple(documents), context, seed, limit)
    rows: list[Tensor] = []
    seen: set[bytes] = set()
    for ids, _, _ in text_rows(lm, documents, context, "packed", Reading(marks=Marks(lm.tokenizer))):
        if len(ids) == context and (key := ids.tobytes()) not in seen:
            seen.add(key)
            rows.append(torch.from_numpy(ids.astype("int32")))
            if len(rows) == limit:
                break
    if not rows:
        raise CutawayError(f"{documents.source} does not fill one row of {context} tokens: give more text")
    return torch.stack(rows).long()
