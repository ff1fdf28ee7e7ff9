"""A label for a latent, read automatically from the tokens around its activations.

The label is the simple property (this token, the token before, the token after, digits, capital word, ...) that the
latent's activations share most, beyond how common the property is. It is a description of tokens, not of meaning, and
says so; its precision is measured on activations in rows that it was not read from.
"""

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


@dataclass(frozen=True)
class TokenSummary:
    """An automatic label and how well it holds.

    `precision` is the share of `n` held-out activations of the latent (drawn at random over all their strengths) on
    which the property holds, with its 95 % interval; `base_rate` the same share over all tokens; `recall` the share of
    held-out tokens with the property on which the latent fires. `label` is "no shared token property" when nothing
    simple covers 60 % of the activations.
    """

    latent: int
    label: str
    precision: float
    interval: tuple[float, float]
    n: int
    base_rate: float
    recall: float

    def to_json(self) -> dict[str, Any]:
        return {
            "latent": self.latent,
            "label": self.label,
            "precision": self.precision,
            "interval": list(self.interval),
            "n": self.n,
            "base_rate": self.base_rate,
            "recall": self.recall,
        }

    def __str__(self) -> str:
        return (
            f"{self.label} (automatic; holds on {self.precision:.2f} of {self.n} held-out activations, "
            f"on {self.base_rate:.3f} of all tokens)"
        )


@dataclass(frozen=True)
class _Property:
    """A yes/no question about a token in its row: `places` are the looked-up answers of every place of the corpus."""

    label: str
    holds: Tensor


class CorpusProperties:
    """Every simple property of every token of some rows, as masks over places (row * width + column)."""

    def __init__(self, lm: LanguageModel, rows: Rows) -> None:
        self.width = width_of(rows)
        ids = torch.full((len(rows), self.width), -1, dtype=torch.long)
        for i, row in enumerate(rows):
            values = torch.as_tensor(row, dtype=torch.long)
            ids[i, : len(values)] = values
        self._words, self._classes = _vocabulary(lm)
        none = torch.full_like(ids[:, :1], -1)
        around = {"": ids, "before": torch.cat([none, ids[:, :-1]], 1), "after": torch.cat([ids[:, 1:], none], 1)}
        self._around = {where: values.flatten() for where, values in around.items()}
        names = sorted(set(self._words))
        number = {word: i for i, word in enumerate(names)}
        self._names = [*names, ""]
        table = torch.tensor([*(number[word] for word in self._words), len(names)])  # -1 (no token) is the last
        self._word = {where: table[values] for where, values in self._around.items()}
        self._role = _roles(lm, ids).flatten()

    def candidates(self, places: Tensor) -> list[_Property]:
        """The properties worth asking about tokens at `places`: those that several of them have."""
        found: list[_Property] = []
        for where in ("", "before", "after"):
            words, counts = self._word[where][places].unique(return_counts=True)
            order = counts.argsort(descending=True, stable=True)
            common = [int(w) for w in words[order][:4] if self._names[int(w)]]
            for size in range(1, len(common) + 1):
                shown = ", ".join(f"“{self._names[w]}”" for w in common[:size])
                prefix = {"": "", "before": "after ", "after": "before "}[where]
                holds = torch.isin(self._word[where], torch.tensor(common[:size]))
                found.append(_Property(f"{prefix}{shown}" if size == 1 else f"{prefix}one of {shown}", holds))
            for name, table in self._classes.items():
                prefix = {"": "", "before": "after ", "after": "before "}[where]
                found.append(_Property(prefix + name, table[self._around[where]]))
        for i, role in enumerate(ROLES):
            if (self._role == i).any():
                found.append(_Property(f"inside the {role}'s turn", self._role == i))
        return found


def _vocabulary(lm: LanguageModel) -> tuple[list[str], dict[str, Tensor]]:
    """Each id's word (stripped, lower case), and for each class whether the id is in it [V + 1] (last: no token)."""
    strings = lm.token_strings(list(range(lm.d_vocab)))
    classes = {name: torch.tensor([*(test(text) for text in strings), False]) for name, test in CLASSES.items()}
    return [text.strip().lower() or repr(text)[1:-1] for text in strings], classes


def _roles(lm: LanguageModel, ids: Tensor) -> Tensor:
    """Which chat turn each token stands in: index into ROLES, or -1."""
    opens = {}
    strings = lm.token_strings(list(range(lm.d_vocab)))
    for token, text in enumerate(strings):
        for i, role in enumerate(ROLES):
            if re.fullmatch(rf"<\W*{role}\W*>|\[{role.upper()}\]", text.strip()):
                opens[token] = i
    roles = torch.full_like(ids, -1)
    if not opens:
        return roles
    ends = {
        i for i, text in enumerate(strings) if re.fullmatch(r"<\W*(end|endoftext|im_end|eot_id|/?s)\W*>", text.strip())
    }
    for row in range(len(ids)):
        now = -1
        for column, token in enumerate(ids[row].tolist()):
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
    share · log(share / base rate): the most surprising to hold so often.
    """
    corpus = CorpusProperties(lm, rows)
    kept = examples.kept
    odd = kept[(kept // corpus.width) % 2 == 1]
    found = {}
    for latent in examples.latents if latents is None else latents:
        shown = torch.cat([examples.top_at[latent], examples.shown_at[latent]])
        shown, held = shown[shown >= 0], examples.held_at[latent]
        held = held[held >= 0]
        best: tuple[float, float, _Property] | None = None
        for candidate in corpus.candidates(shown) if len(shown) else []:
            share = candidate.holds[shown].float().mean().item()
            base = max(candidate.holds[kept].float().mean().item(), 1 / len(kept))
            score = share * torch.log(torch.tensor(share / base)).item() if share >= cover else 0.0
            if score > 0.05 and (best is None or score > best[0] + 1e-9):
                best = (score, base, candidate)
        if best is None:
            found[latent] = TokenSummary(
                latent, "no shared token property", float("nan"), (0.0, 1.0), len(held), 1.0, 1.0
            )
            continue
        _, base, chosen = best
        right = int(chosen.holds[held].sum())
        having = int(chosen.holds[odd].sum())
        active = right / max(1, len(held)) * examples.held_active[latent].item()
        found[latent] = TokenSummary(
            latent=latent,
            label=chosen.label,
            precision=right / len(held) if len(held) else float("nan"),
            interval=wilson_interval(right, len(held)),
            n=len(held),
            base_rate=base,
            recall=min(1.0, active / having) if having else float("nan"),
        )
    return found
