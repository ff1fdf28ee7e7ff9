"""How a model's answers are judged: completions by their tokens, chats by the reply, repeated tokens by their loss."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from cutaway.artifacts.errors import CutawayError
from cutaway.subjects.world.chats.chat import Message
from cutaway.subjects.world.items.items import Item, ItemSet

if TYPE_CHECKING:
    from torch import Tensor

    from cutaway.model.edits.edits import Edit
    from cutaway.model.language_model import LanguageModel

_BATCH = 64
_REPLY_TOKENS = 20  # for a reply that must hold an answer somewhere


@dataclass(frozen=True)
class Scores:
    """One number per item, float [n]: 1 or 0, or (years) a difference of probabilities.

    `difference` float [n]: logit of the answer's first own token minus the alternative's; NaN where there is none.
    `opposite` float [n]: 1 where a reply begins with the alternative; None for sets that are not of chats or have none.
    """

    values: np.ndarray
    difference: np.ndarray
    opposite: np.ndarray | None = None


def score(lm: "LanguageModel", items: ItemSet) -> Scores:
    """Score every item of a set in the set's own way (`cutaway.subjects.world.items.items.SCORING`)."""
    none = np.full(len(items.items), np.nan)
    if items.scored == "greater_than":
        return Scores(score_years(lm, items), none)
    if items.scored in ("exact", "logit_difference"):
        exact, difference = score_completions(lm, items)
        return Scores(exact if items.scored == "exact" else (difference > 0).astype(float), difference)
    answers = dict.fromkeys(
        text for item in items.items for text in f"{item.answer}|{item.alternative or ''}".split("|")
    )
    longest = max(map(len, ids_of(lm, list(answers))))
    limit = _REPLY_TOKENS if items.scored == "contains" else longest + 1
    texts = replies(lm, [item.chat or () for item in items.items], max_new_tokens=limit)
    pairs = list(zip(texts, items.items, strict=True))
    right = [reply_is_right(text, item, items.scored) for text, item in pairs]
    opposite = None
    if all(item.alternative for item in items.items):
        opposite = np.array([_begins_with(text, item.alternative or "") for text, item in pairs], dtype=float)
    return Scores(np.array(right, dtype=float), none, opposite)


def reply_is_right(reply: str, item: Item, scored: str) -> bool:
    """Whether a reply begins with one of the answers, holds the answer, or equals it."""
    if scored == "starts_with":
        return _begins_with(reply, item.answer)
    return item.answer in reply if scored == "contains" else reply.strip() == item.answer


def _begins_with(reply: str, answers: str) -> bool:
    """Whether a reply begins with one of the answers, which are parted by |."""
    return reply.strip().startswith(tuple(answers.split("|")))


def ids_of(lm: "LanguageModel", texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts as the model's tokenizer makes them, beginning-of-text included where it writes one."""
    if lm.tokenizer is None:
        raise CutawayError(f"{lm.name} has no tokenizer")
    return lm.tokenizer(list(texts))["input_ids"]  # type: ignore[return-value]


@dataclass(frozen=True)
class _Encoded:
    ids: list[int]
    start: int  # first token that belongs to the answer
    rival: int | None


def _encode(lm: "LanguageModel", items: ItemSet) -> Iterator[_Encoded]:
    """Token ids of prompt and answer together, and where the answer begins (spaces can merge across the border)."""
    prompts = ids_of(lm, [item.prompt for item in items.items])
    wholes = ids_of(lm, [item.prompt + items.separator + item.answer for item in items.items])
    others = ids_of(lm, [item.prompt + items.separator + (item.alternative or "") for item in items.items])
    for item, prompt, whole, other in zip(items.items, prompts, wholes, others, strict=True):
        start = _common(prompt, whole)
        comparable = item.alternative is not None and _common(whole, other) == start < min(len(whole), len(other))
        yield _Encoded(whole, start, other[start] if comparable else None)


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common beginning."""
    n = 0
    while n < min(len(left), len(right)) and left[n] == right[n]:
        n += 1
    return n


def score_completions(lm: "LanguageModel", items: ItemSet) -> tuple[np.ndarray, np.ndarray]:
    """Greedy exact match (1 or 0) and logit difference to the alternative, float [n] each, by teacher forcing.

    An exact match needs every token of the answer to be the most likely one, the tokens before it given.
    """
    encoded = list(_encode(lm, items))
    exact, difference = np.zeros(len(encoded)), np.full(len(encoded), np.nan)
    spans = [range(entry.start - 1, len(entry.ids) - 1) for entry in encoded]
    for i, logits in _logits(lm, [entry.ids for entry in encoded], spans):
        entry = encoded[i]
        exact[i] = float((logits.argmax(-1) == torch.tensor(entry.ids[entry.start :])).all())
        if entry.rival is not None:
            difference[i] = float(logits[0, entry.ids[entry.start]] - logits[0, entry.rival])
    return exact, difference


def score_years(lm: "LanguageModel", items: ItemSet) -> np.ndarray:
    """P(later two digits) − P(the first year's or earlier ones) after a century: float [n] (Hanna et al. 2023)."""
    prompts = [item.prompt for item in items.items]
    digits = torch.tensor([ids[-1] for ids in ids_of(lm, [f"{prompts[0]}{number:02d}" for number in range(100)])])
    rows = ids_of(lm, prompts)
    out = np.zeros(len(rows))
    for i, logits in _logits(lm, rows, [range(len(row) - 1, len(row)) for row in rows]):
        probability = logits[0].softmax(-1)[digits]
        first = int(items.items[i].detail["year"])
        out[i] = float(probability[first + 1 :].sum() - probability[: first + 1].sum())
    return out


def _logits(lm: "LanguageModel", rows: Sequence[list[int]], columns: Sequence[range]) -> Iterator[tuple[int, "Tensor"]]:
    """(index of the row, logits [columns, V] in float32) for each row, batched by length.

    Only the columns asked for are unembedded: the vocabulary is most of what a small model computes.
    """
    last = f"blocks.{lm.n_layers - 1}.resid_post"
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), _BATCH):
        chosen = order[start : start + _BATCH]
        stream = lm.run([rows[i] for i in chosen], capture=last, logits=None)[last]
        wanted = [stream[row, columns[i].start : columns[i].stop] for row, i in enumerate(chosen)]
        logits = lm.unembed(torch.cat(wanted)).float().cpu()
        yield from zip(chosen, logits.split([len(columns[i]) for i in chosen]), strict=True)


def replies(
    lm: "LanguageModel",
    chats: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    edits: "Edit | Sequence[Edit]" = (),
) -> list[str]:
    """The model's greedy reply to each conversation, special tokens left out."""
    lengths = [sum(len(message.content) for message in chat) for chat in chats]
    order = sorted(range(len(chats)), key=lengths.__getitem__)
    out = [""] * len(chats)
    for start in range(0, len(order), _BATCH):
        chosen = order[start : start + _BATCH]
        messages = [as_dicts(chats[i]) for i in chosen]
        generation = lm.chat(messages, max_new_tokens=max_new_tokens, edits=edits)
        for i, text in zip(chosen, generation.texts, strict=True):
            out[i] = text
    return out


def as_dicts(chat: Sequence[Message]) -> list[dict[str, str]]:
    """A conversation as Hugging Face's chat templates want it."""
    return [{"role": message.role, "content": message.content} for message in chat]


def repeat_losses(
    lm: "LanguageModel", *, rows: int = 64, period: int = 60, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Mean loss in nats per token on random tokens and on their repeat, row by row: float [rows] each.

    Tokens are drawn uniformly from ids 300 up (whole words rather than bytes where ids follow the order of merges). The
    first token of the repeat is left out: nothing announces it.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(min(300, lm.d_vocab // 2), lm.d_vocab, (rows, period), generator=generator)
    bos = [] if lm.bos_id is None else [lm.bos_id]
    ids = [[*bos, *row, *row] for row in tokens.tolist()]
    first, second = np.zeros(rows), np.zeros(rows)
    for i, logits in _logits(lm, ids, [range(len(row) - 1) for row in ids]):
        losses = _losses(logits, ids[i][1:])
        first[i], second[i] = float(losses[: len(losses) - period].mean()), float(losses[1 - period :].mean())
    return first, second


def text_losses(lm: "LanguageModel", texts: Sequence[str], *, length: int = 256) -> np.ndarray:
    """Mean loss in nats per token of the first `length` tokens of each text: float [n]."""
    rows = [row[:length] for row in ids_of(lm, texts)]
    out = np.zeros(len(rows))
    for i, logits in _logits(lm, rows, [range(len(row) - 1) for row in rows]):
        out[i] = float(_losses(logits, rows[i][1:]).mean())
    return out


def world_losses(lm: "LanguageModel", texts: Sequence[str], *, length: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Summed loss in nats of each text's first `length` tokens, and how many they are: float [n] and int [n]."""
    rows = [row[:length] for row in ids_of(lm, texts)]
    counts = np.array([len(row) - 1 for row in rows])
    return text_losses(lm, texts, length=length) * counts, counts


def _losses(logits: "Tensor", targets: Sequence[int]) -> "Tensor":
    return torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="none")
