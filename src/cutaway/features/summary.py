"""A label for a latent, read automatically from the tokens around its activations.

The label is the simple property (this token, the token before, the token after, digits, capital word, ...) that the
latent's activations share most, beyond how common the property is. It is a description of tokens, not of meaning, and
says so; its precision is measured on activations in rows that it was not read from.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.statistics import wilson_interval
from cutaway.draw.result import Result
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
_NO_LABEL = "no shared token property"


@dataclass(frozen=True)
class TokenSummary:
    """An automatic label of a latent, and how well it holds."""

    latent: int
    """The latent's number."""
    label: str
    """The property; "no shared token property" when nothing simple covers 60 % of the activations."""
    precision: float
    """The share of held-out activations on which the property holds; they are drawn by squared activation, so that a
    strong one counts as much as it moves the stream."""
    interval: tuple[float, float]
    """Its 95 % interval (Wilson's)."""
    n: int
    """Held-out activations."""
    base_rate: float
    """The share of all tokens on which the property holds."""

    def to_json(self) -> dict[str, Any]:
        """The label as plain data."""
        return {
            "latent": self.latent,
            "label": self.label,
            "precision": self.precision,
            "interval": list(self.interval),
            "n": self.n,
            "base_rate": self.base_rate,
        }

    def __str__(self) -> str:
        if self.label == _NO_LABEL:
            return f"{_NO_LABEL} (automatic)"
        return (
            f"{self.label} (automatic; holds on {self.precision:.2f} of {self.n} held-out activations, on "
            f"{self.base_rate:.3f} of all tokens)"
        )


@dataclass(frozen=True, repr=False)
class TokenSummaries(Result, Mapping[int, TokenSummary]):
    """The automatic label of each latent, by its number."""

    title = "Automatic labels of latents"

    summaries: Mapping[int, TokenSummary]
    """By latent."""

    def __getitem__(self, latent: int) -> TokenSummary:
        return self.summaries[latent]

    def __iter__(self) -> Iterator[int]:
        return iter(self.summaries)

    def __len__(self) -> int:
        return len(self.summaries)

    def summary(self) -> str:
        lines = [f"{latent}: {one}" for latent, one in list(self.items())[:11]]
        return "\n".join([*lines, *([f"and {len(self) - 11:,} more latents"] if len(self) > 11 else [])])

    def to_json(self) -> list[dict[str, Any]]:
        return [one.to_json() for one in self.values()]

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "latent": one.latent, "label": one.label, "precision": one.precision, "low": one.interval[0],
                "high": one.interval[1], "n": one.n, "base_rate": one.base_rate,
            }
            for one in self.values()
        ]  # fmt: skip

    def drawing(self) -> Markup:
        from cutaway.draw.heatmap import heatmap_html

        return heatmap_html(
            rows=[f"{one.latent} {one.label}" for one in self.values()],
            columns=["precision", "all tokens"],
            values=[[None if math.isnan(one.precision) else one.precision, one.base_rate] for one in self.values()],
            title="How often each latent's label holds on held-out activations, and on all tokens",
        )


@dataclass(frozen=True)
class Property:
    """A yes/no question about a token in its row: `holds(places)` answers it, `base` is its share of all tokens."""

    label: str
    holds: Callable[[Tensor], Tensor]
    base: float


_AROUND = {"": "", "after": "after ", "before": "before "}


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
                self._add(_AROUND[where] + kind, belongs[values.flatten()], kept)
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
        for where, prefix in _AROUND.items():
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
) -> TokenSummaries:
    """An automatic label for each latent, read from even rows, with its precision on odd rows.

    Of the properties that at least `cover` of the latent's activations share, the label is the one with the largest
    share · log(share / base rate): the most surprising to hold so often. A property of a neighbouring token counts four
    fifths. It describes tokens, not meaning.

    Args:
        lm: The model, for its tokenizer.
        rows: The rows that the examples are of.
        examples: What `top_examples` found in them.
        latents: Whose labels; those that have examples if None.
        cover: The share of a latent's activations that a label has to cover.

    Returns:
        Labels by latent.
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
            found[latent] = TokenSummary(latent, _NO_LABEL, float("nan"), (0.0, 1.0), len(held), 1.0)
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
    return TokenSummaries(found)
