"""A label for a latent, read automatically from the tokens around its activations.

The label is the simple property (this token, the token before, the token after, digits, capital word, ...) that the
latent's activations share most, beyond how common the property is. It is a description of tokens, not of meaning, and
says so; its precision is measured on activations in rows that it was not read from.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cutaway.artifacts.statistics import wilson_interval
from cutaway.features.activations import Rows, width_of
from cutaway.features.examples import FeatureExamples
from cutaway.model.language_model import LanguageModel

CLASSES: dict[str, Callable[[str], bool]] = {
    "digits": lambda t: bool(re.fullmatch(r"\s*\d+", t)),
    "capital word": lambda t: bool(re.fullmatch(r"\s*[A-Z][a-z]+", t)),
    "capitals": lambda t: bool(re.fullmatch(r"\s*[A-Z]{2,}", t)),
    "punctuation": lambda t: bool(re.fullmatch(r"\s*[^\w\s]+", t)),
    "indentation or newline": lambda t: t != "" and t.strip() == "",
    "piece inside a word": lambda t: bool(re.fullmatch(r"[a-z]+", t)),
}
ROLES = ("system", "user", "assistant")
NO_LABEL = "no shared token property"


@dataclass(frozen=True)
class TokenSummary:
    """An automatic label and how well it holds.

    `precision` is the share of `n` held-out activations of the latent on which the property holds, with its 95 %
    interval; they are drawn by squared activation, so that a strong one counts as much as it moves the stream.
    `base_rate` is the same share over all tokens. `label` is "no shared token property" when nothing simple covers
    60 % of the activations.
    """

    latent: int
    label: str
    precision: float
    interval: tuple[float, float]
    n: int
    base_rate: float

    def to_json(self) -> dict[str, Any]:
        return {
            "latent": self.latent,
            "label": self.label,
            "precision": self.precision,
            "interval": list(self.interval),
            "n": self.n,
            "base_rate": self.base_rate,
        }

    def __str__(self) -> str:
        if self.label == NO_LABEL:
            return f"{NO_LABEL} (automatic)"
        return (
            f"{self.label} (automatic; holds on {self.precision:.2f} of {self.n} held-out activations, on "
            f"{self.base_rate:.3f} of all tokens)"
        )


@dataclass(frozen=True)
class Property:
    """A yes/no question about a token in its row: `holds(places)` answers it, `base` is its share of all tokens."""

    label: str
    holds: Callable[[Tensor], Tensor]
    base: float


AROUND = {"": "", "after": "after ", "before": "before "}


class CorpusProperties:
    """Simple properties of the tokens of some rows; a place is row * width + column, `kept` the places that count."""

    def __init__(self, lm: LanguageModel, rows: Rows, kept: Tensor | None = None) -> None:
        self.width = width_of(rows)
        ids = torch.full((len(rows), self.width), -1, dtype=torch.long)
        for i, row in enumerate(rows):
            values = torch.as_tensor(row, dtype=torch.long)
            ids[i, : len(values)] = values
        kept = (ids.flatten() >= 0).nonzero()[:, 0] if kept is None else kept
        strings = lm.token_strings(range(lm.d_vocab_in))
        words = [text.strip().lower() or repr(text)[1:-1] for text in strings]
        names = sorted(set(words))
        number = {word: i for i, word in enumerate(names)}
        table = torch.tensor([*(number[word] for word in words), len(names)])  # -1 (no token) is the last
        none = torch.full_like(ids[:, :1], -1)
        near = {"": ids, "after": torch.cat([none, ids[:, :-1]], 1), "before": torch.cat([ids[:, 1:], none], 1)}
        self._names = [*names, ""]
        self._word = {where: table[values.flatten()] for where, values in near.items()}
        self._share = {
            where: torch.bincount(of[kept], minlength=len(self._names)) / len(kept) for where, of in self._word.items()
        }
        self._fixed: list[Property] = []
        for kind, test in CLASSES.items():
            belongs = torch.tensor([*(test(text) for text in strings), False])
            for where, values in near.items():
                self._add(AROUND[where] + kind, belongs[values.flatten()], kept)
        roles = _roles(strings, ids).flatten()
        for i, role in enumerate(ROLES):
            self._add(f"inside the {role}'s turn", roles == i, kept)

    def _add(self, label: str, mask: Tensor, kept: Tensor) -> None:
        base = mask[kept].float().mean().item()
        if base > 0:
            self._fixed.append(Property(label, mask.__getitem__, base))

    def candidates(self, places: Tensor) -> list[Property]:
        """The properties worth asking about tokens at `places`: classes, roles, and the words most common there."""
        found = list(self._fixed)
        for where, prefix in AROUND.items():
            of, share = self._word[where], self._share[where]
            words, counts = of[places].unique(return_counts=True)
            common = [int(w) for w in words[counts.argsort(descending=True, stable=True)][:4] if self._names[int(w)]]
            for size in range(1, len(common) + 1):
                chosen = torch.tensor(common[:size])
                shown = ", ".join(f"“{self._names[w]}”" for w in common[:size])
                label = prefix + (shown if size == 1 else f"one of {shown}")
                base = share[chosen].sum().item()
                found.append(Property(label, lambda at, of=of, chosen=chosen: torch.isin(of[at], chosen), base))
        return found


def _roles(strings: Sequence[str], ids: Tensor) -> Tensor:
    """Which chat turn each token stands in: index into ROLES, or -1."""
    opens = {}
    for token, text in enumerate(strings):
        for i, role in enumerate(ROLES):
            if re.fullmatch(rf"<\W*{role}\W*>", text.strip()):
                opens[token] = i
    roles = torch.full_like(ids, -1)
    if not opens:
        return roles
    closing = re.compile(r"<\W*(end|endoftext|im_end|eot_id|s)\W*>")
    ends = {i for i, text in enumerate(strings) if closing.fullmatch(text.strip())}
    for row, of in enumerate(ids.tolist()):
        now = -1
        for column, token in enumerate(of):
            if token in opens:
                now = opens[token]
            elif token in ends:
                now = -1
            else:
                roles[row, column] = now
    return roles


def token_summary(
    lm: LanguageModel, rows: Rows, examples: FeatureExamples, latents: Sequence[int] | None = None, cover: float = 0.6
) -> dict[int, TokenSummary]:
    """An automatic label for each latent, from even rows, with its precision on odd rows.

    Of the properties that at least `cover` of the latent's activations share, the label is the one with the largest
    share · log(share / base rate): the most surprising to hold so often. A property of a neighbouring token counts four
    fifths.
    """
    corpus = CorpusProperties(lm, rows, examples.kept)
    found = {}
    for latent in examples.latents if latents is None else latents:
        shown, held = (places[latent][places[latent] >= 0] for places in (examples.shown_at, examples.held_at))
        best: tuple[float, Property] | None = None
        for candidate in corpus.candidates(shown) if len(shown) else []:
            share = candidate.holds(shown).float().mean().item()
            if share < cover:
                continue
            near = candidate.label.startswith(("after ", "before "))
            score = share * math.log(share / candidate.base) * (0.8 if near else 1.0)
            if score > 0.3 and (best is None or score > best[0] + 1e-9):
                best = score, candidate
        if best is None:
            found[latent] = TokenSummary(latent, NO_LABEL, float("nan"), (0.0, 1.0), len(held), 1.0)
            continue
        right = int(best[1].holds(held).sum())
        found[latent] = TokenSummary(
            latent=latent,
            label=best[1].label,
            precision=right / len(held) if len(held) else float("nan"),
            interval=wilson_interval(right, len(held)),
            n=len(held),
            base_rate=best[1].base,
        )
    return found
