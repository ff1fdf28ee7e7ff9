"""Which latent detects a known concept best, without reporting the winner of a lottery.

Among thousands of latents the best one for *any* labels looks good. So the latent is chosen on one half of the rows and
measured on the other, and the same search is made for shuffled labels. Detecting a concept is not yet using it: whether
the latent does anything is for `cutaway.steering` to show.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from scipy.special import stdtr
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.ranking import Ranking, auroc
from cutaway.artifacts.results import Control, Effect, interval_text
from cutaway.artifacts.statistics import bootstrap_weights, false_discovery, resampled_intervals
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.draw.result import ResultSequence
from cutaway.features.activations import LatentActivations, Rows, latent_activations, of_rows, width_of
from cutaway.model.language_model import LanguageModel


@dataclass(frozen=True)
class ConceptMatch:
    """The latent that detects a concept best, chosen on even rows; every other number is from odd rows."""

    concept: str
    """The concept's name."""
    latent: int
    """The latent's number."""
    selected_auroc: float
    """Its AUROC on the even rows, where it was chosen: too good."""
    effect: Effect
    """Its AUROC on odd rows with its interval over rows, beside the same search for shuffled labels."""
    precision: float
    """Of the tokens on which the latent is active, the share that are the concept's."""
    recall: float
    """Of the concept's tokens, the share on which the latent is active."""
    n_positive: int
    """The concept's tokens in odd rows."""
    p: float = math.nan
    """Of the AUROC against ½, two-sided."""
    q: float = math.nan
    """The rate of false discoveries among all concepts with a p as small."""

    @property
    def auroc(self) -> float:
        """The AUROC on odd rows."""
        return self.effect.value

    def to_json(self) -> dict[str, Any]:
        """The match as plain data."""
        return {
            "concept": self.concept,
            "latent": self.latent,
            "selected_auroc": self.selected_auroc,
            "effect": self.effect.to_json(),
            "precision": self.precision,
            "recall": self.recall,
            "n_positive": self.n_positive,
            "p": self.p,
            "q": self.q,
        }

    def __str__(self) -> str:
        return (
            f"{self.concept}: latent {self.latent}, AUROC {self.auroc:.3f} {interval_text(self.effect.interval)} on "
            f"held-out rows, precision {self.precision:.2f}, recall {self.recall:.2f} (n {self.n_positive}; shuffled "
            f"labels {self.effect.controls[0].value:.3f}; q {self.q:.2g})"
        )


@dataclass(frozen=True, repr=False)
class ConceptMatches(ResultSequence[ConceptMatch]):
    """The best latent of each concept, in the order in which the concepts were given."""

    title = "Concepts and their latents"

    matches: tuple[ConceptMatch, ...]
    """One per concept."""

    def _items(self) -> tuple[ConceptMatch, ...]:
        return self.matches

    def summary(self) -> str:
        lines = [str(one) for one in self.matches[:11]]
        return "\n".join([*lines, *([f"and {len(self) - 11} more concepts"] if len(self) > 11 else [])])

    def to_json(self) -> list[dict[str, Any]]:
        return [one.to_json() for one in self.matches]

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "concept": one.concept, "latent": one.latent, "auroc": one.auroc,
                **dict(zip(("low", "high"), one.effect.interval or (None, None), strict=True)),
                "auroc_shuffled": one.effect.controls[0].value, "selected_auroc": one.selected_auroc,
                "precision": one.precision, "recall": one.recall, "n_positive": one.n_positive, "p": one.p, "q": one.q,
            }
            for one in self.matches
        ]  # fmt: skip

    def drawing(self) -> Markup:
        from cutaway.draw.heatmap import heatmap_html

        columns = ("auroc", "auroc_shuffled", "precision", "recall")
        rows = self.rows()
        return heatmap_html(
            rows=[f"{row['concept']} · {row['latent']}" for row in rows],
            columns=["AUROC", "shuffled labels", "precision", "recall"],
            values=[[row[name] for name in columns] for row in rows],
            cell_text=[[f"{row[name]:.2f}" for name in columns] for row in rows],
            title="The best latent of each concept, on held-out rows",
        )


class SortedActivations:
    """A sparse table of activations, from which every latent's AUROC for any labels takes one sum along it."""

    def __init__(self, parts: Sequence[LatentActivations], n_latents: int) -> None:
        self.tokens = torch.cat([part.kept for part in parts])
        latent = torch.cat([part.latent for part in parts])
        value = torch.cat([part.value for part in parts])
        at = torch.cat([part.at for part in parts])
        self.latent, self.value = latent, value
        self.token = torch.searchsorted(self.tokens, at)  # place -> index into tokens (tokens are in order)
        self._ranking = Ranking(value.numpy(), latent.numpy(), n_latents)

    def auroc(self, labels: Tensor) -> Tensor:
        """AUROC of every latent [F] for boolean labels over `tokens`; a latent that is not active counts as 0 there."""
        p, n = int(labels.sum()), int((~labels).sum())
        positive = labels[self.token].double().numpy()
        negative = 1 - positive
        quiet_p, quiet_n = p - self._ranking.sums(positive), n - self._ranking.sums(negative)
        won = self._ranking.won(positive, negative) + (p - quiet_p) * quiet_n + quiet_p * quiet_n / 2
        return torch.from_numpy(won / (p * n if p * n else math.nan))

    def auroc_of(self, latent: int, labels: Tensor) -> float:
        """The same for one latent."""
        values, token = self.of(latent)
        dense = torch.zeros(len(self.tokens)).index_put((token,), values)
        return auroc(dense.numpy(), labels.numpy())

    def of(self, latent: int) -> tuple[Tensor, Tensor]:
        """The activations of one latent and the tokens (indices) where they are."""
        chosen = self.latent == latent
        return self.value[chosen], self.token[chosen]


def mentions(lm: LanguageModel, rows: Rows, words: Sequence[str]) -> Tensor:
    """Where words stand in rows of tokens.

    Args:
        lm: The model, for its tokenizer.
        rows: Token ids [N, p], or lists of ids of any length.
        words: Matched as the tokenizer writes them after a space and at the start of a text.

    Returns:
        True at the last token of each mention, bool [N, width].
    """
    if isinstance(rows, Tensor):
        ids = rows
    else:
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=-1)
    found = torch.zeros(ids.shape, dtype=torch.bool)
    for text in (form for word in words for form in (f" {word}", word)):
        tokens = lm.tokens(text, bos=False)
        spelled = tokens.ids[0][tokens.mask[0]].tolist()
        starts = ids.shape[1] - len(spelled) + 1
        if starts > 0:
            here = [ids[:, i : i + starts] == token for i, token in enumerate(spelled)]
            found[:, len(spelled) - 1 :] |= torch.stack(here).all(0)
    return found


def match_concepts(
    lm: LanguageModel,
    dictionary: Dictionary,
    rows: Rows,
    labelled: Mapping[str, Tensor],
    *,
    shuffles: int = 10,
    batch_rows: int = 16,
    seed: int = 0,
    activations: Sequence[LatentActivations] | None = None,
) -> ConceptMatches:
    """For each concept, the latent that detects it best on even rows, tested on odd rows.

    The control makes the same search for shuffled labels (as many tokens, drawn anew in both halves): its AUROC on the
    rows it was chosen on shows what chance alone finds among all latents.

    Args:
        lm: The model that the dictionary belongs to.
        dictionary: Reads one site of it.
        rows: Token ids [N, p], or lists of ids of any length.
        labelled: True at each concept's tokens, bool [N, width]; `mentions` makes it of words.
        shuffles: Draws of the control.
        batch_rows: Rows per forward.
        seed: Of the shuffles and of the interval.
        activations: What `latent_activations(lm, dictionary, rows)` gave, for those who have made that pass already.

    Returns:
        One match per concept, in their order.

    Raises:
        CutawayError: labels of another shape than the rows, or fewer than 4 tokens of a concept in either half.

    Example:
        >>> lm, dictionary = cutaway.load("atlas"), cutaway.dictionaries.load("atlas/blocks.3.resid_post")
        >>> texts = [f"{i}. The capital of Texas is Austin, and Dallas lies in Texas." for i in range(30)]
        >>> rows = cutaway.data.token_rows(lm, texts, context=32)
        >>> matches = match_concepts(lm, dictionary, rows, {"Dallas": mentions(lm, rows, ["Dallas"])}, shuffles=2)
        >>> matches[0].concept
        'Dallas'
    """
    width = width_of(rows)
    found = (
        list(latent_activations(lm, dictionary, rows, batch_rows=batch_rows)) if activations is None else activations
    )
    halves = [SortedActivations(of_rows(found, width, half), dictionary.d_sae) for half in (0, 1)]
    generator = torch.Generator().manual_seed(seed)
    matches = []
    for concept, mask in labelled.items():
        if mask.shape != (len(rows), width):
            raise CutawayError(f"the labels of {concept!r} are {tuple(mask.shape)}, the rows {(len(rows), width)}")
        labels = [mask.flatten()[half.tokens] for half in halves]
        counts = [int(label.sum()) for label in labels]
        if min(counts) < 4:
            raise CutawayError(
                f"{concept!r} has {counts[0]} and {counts[1]} tokens in the two halves of the rows; 4 are needed"
            )
        scores = halves[0].auroc(labels[0])
        latent = int(scores.argmax())
        held = halves[1].auroc_of(latent, labels[1])
        selected, held_out = [], []
        for _ in range(shuffles):
            first, second = (label[torch.randperm(len(label), generator=generator)] for label in labels)
            by_chance = halves[0].auroc(first)
            winner = int(by_chance.argmax())
            selected.append(by_chance[winner].item())
            held_out.append(halves[1].auroc_of(winner, second))
        values, tokens = halves[1].of(latent)
        hits = int(labels[1][tokens].sum())
        interval, p = _evidence(held, values, tokens, labels[1], halves[1].tokens // width, seed)
        effect = Effect(
            name=f"latent {latent} detects {concept!r}",
            value=held,
            n=counts[1],
            interval=interval,
            controls=(
                Control(
                    "best latent for shuffled labels, held-out rows",
                    float(np.mean(held_out)),
                    _range(held_out),
                    shuffles,
                ),
                Control(
                    "best latent for shuffled labels, where chosen",
                    float(np.mean(selected)),
                    _range(selected),
                    shuffles,
                ),
            ),
            ablation="none",
            units="AUROC",
        )
        matches.append(
            ConceptMatch(
                concept=concept,
                latent=latent,
                selected_auroc=scores[latent].item(),
                effect=effect,
                precision=hits / len(tokens) if len(tokens) else float("nan"),
                recall=hits / counts[1],
                n_positive=counts[1],
                p=p,
            )
        )
    found_q = false_discovery([match.p for match in matches]).tolist()
    return ConceptMatches(tuple(replace(match, q=q) for match, q in zip(matches, found_q, strict=True)))


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _evidence(
    value: float, values: Tensor, tokens: Tensor, labels: Tensor, row: Tensor, seed: int, n_resamples: int = 500
) -> tuple[tuple[float, float], float]:
    """95 % interval of one latent's AUROC, resampling rows, since tokens of one row are not independent; and the
    two-sided p of its distance from ½, by Student's t over rows with the concept, and no smaller than that of as many
    coins.
    """
    _, row = row.unique(return_inverse=True)
    n_rows = int(row.max()) + 1
    ranking, positive, of_row = Ranking(values.numpy()), labels[tokens].double().numpy(), row[tokens].numpy()
    p_row = np.bincount(row.numpy(), weights=labels.double().numpy(), minlength=n_rows)
    n_row = np.bincount(row.numpy(), weights=(~labels).double().numpy(), minlength=n_rows)

    def auroc_of(weight: np.ndarray) -> float:
        p, n = weight @ p_row, weight @ n_row
        if p == 0 or n == 0:
            return math.nan
        w = weight[of_row]
        up, down = w * positive, w * (1 - positive)
        quiet_p, quiet_n = p - up.sum(), n - down.sum()
        return float((ranking.won(up, down)[0] + up.sum() * quiet_n + quiet_p * quiet_n / 2) / (p * n))

    weights = bootstrap_weights(n_rows, n_resamples, seed) * n_rows
    drawn = [auroc_of(weight) for weight in weights]
    low, high = resampled_intervals(auroc_of(np.ones(n_rows)), drawn, weights / n_rows)
    with_concept = int((p_row > 0).sum())
    error = float(np.nanstd(drawn, ddof=1))
    t = (value - 0.5) / error if error > 0 else math.copysign(math.inf, value - 0.5)
    p = max(2 * float(stdtr(max(1, with_concept - 1), -abs(t))), 2.0 ** (1 - with_concept))
    return (max(0.0, float(low)), min(1.0, float(high))), min(1.0, p)
