"""What is found in the weights of heads: copying, composition, and the tokens that a circuit connects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CutawayError, NotSupported
from cutaway.artifacts.results import figure_text
from cutaway.draw.page import Section, sections_html
from cutaway.draw.panels import table_html
from cutaway.draw.result import Result, ResultSequence
from cutaway.draw.text import visible
from cutaway.observe.heads.maps import BALANCE, head_map, meaning
from cutaway.observe.heads.report import Head, name
from cutaway.observe.summaries import block

_COMPOSITIONS = ("q", "k", "v")


@dataclass(frozen=True, eq=False, repr=False)
class CopyingScores(Result):
    """Σλ / Σ|λ| over the eigenvalues of each head's full OV circuit, beside random heads of the same shapes."""

    title: ClassVar[str] = "Copying scores"

    model: str
    """The model's name."""
    score: Tensor
    """[L, H]; NaN: a layer without heads."""
    chance: float
    """Mean score of random heads: Gaussian W_V and W_O of the same shapes, between the same (un)embedding."""
    chance_interval: tuple[float, float]
    """Their 95 % range."""
    draws: int
    """How many random heads."""
    p: Tensor
    """Two-sided p [L, H], by how many random heads have a score as high or as low."""

    def top(self, k: int = 5) -> list[tuple[Head, float]]:
        """The heads with the largest score, largest first.

        Args:
            k: how many.
        """
        order = self.score.nan_to_num(-2.0).flatten().argsort(descending=True)[:k].tolist()
        found = [divmod(i, self.score.shape[1]) for i in order]
        return [(head, self.score[head].item()) for head in found if self.score[head].item() >= -1]

    def summary(self) -> str:
        """The heads that copy most, beside random heads."""
        best = "  ".join(f"{name(head)} {value:.2f}" for head, value in self.top())
        chance = figure_text(self.chance, self.chance_interval)
        return block([f"copying scores of {self.model}; {self.draws} random heads {chance}", f"  {best}"])

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "chance": self.chance,
            "chance_interval": list(self.chance_interval),
            "draws": self.draws,
            "heads": self.rows(),
        }

    def rows(self) -> list[dict[str, Any]]:
        """One row per head: its score and p."""
        found = [((i, j), self.score[i, j].item()) for i, j in (~self.score.isnan()).nonzero().tolist()]
        return [{"layer": h[0], "head": h[1], "score": score, "p": self.p[h].item()} for h, score in found]

    def drawing(self) -> Markup:
        """A map of the heads."""
        return sections_html([_copying_section(self)])


@dataclass(frozen=True, eq=False, repr=False)
class Composition(Result):
    """Composition scores between heads: ‖A B‖ / (‖A‖ ‖B‖) (Frobenius) with A the writer's OV circuit and B what the
    reader does with it. A score means what it has above that of random heads.
    """

    title: ClassVar[str] = "Composition of heads"

    model: str
    """The model's name."""
    q: Tensor | None
    """Q-composition [L, H, L, H], writer first; NaN unless the writer is in an earlier layer; None: not measured."""
    k: Tensor | None
    """K-composition, likewise."""
    v: Tensor
    """V-composition, likewise."""
    baseline: float
    """Mean score of pairs of random heads of the same shapes."""
    baseline_interval: tuple[float, float]
    """Their 95 % range."""
    draws: int
    """How many random pairs."""
    left_out: dict[str, str]
    """What is not measured, and why."""

    def above(self, kind: str) -> Tensor:
        """Scores less the baseline.

        Args:
            kind: "q", "k" or "v".

        Returns:
            [L, H, L, H].
        """
        return self._of(kind) - self.baseline

    def _of(self, kind: str) -> Tensor:
        if kind not in _COMPOSITIONS:
            raise CutawayError(f"no composition is called {kind!r}; there are q, k and v")
        if kind in self.left_out:
            raise NotSupported(f"{kind.upper()}-composition of {self.model} is not measured: {self.left_out[kind]}.")
        return getattr(self, kind)

    def top(self, kind: str, k: int = 5) -> list[tuple[Head, Head, float]]:
        """The pairs of heads with the largest score, largest first.

        Args:
            kind: "q", "k" or "v".
            k: how many pairs.

        Returns:
            (writer, reader, score).

        Raises:
            NotSupported: it is not measured for this model.
            CutawayError: an unknown kind.
        """
        scores = self._of(kind)
        values, flat = scores.nan_to_num(-1.0).flatten().topk(min(k, scores.numel()))
        heads = scores.shape[1]
        found = []
        for value, index in zip(values.tolist(), flat.tolist(), strict=True):
            if value >= 0:
                writer, reader = divmod(index, scores.shape[0] * heads)
                found.append((divmod(writer, heads), divmod(reader, heads), value))
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "baseline": self.baseline,
            "baseline_interval": list(self.baseline_interval),
            "draws": self.draws,
            "left_out": self.left_out,
            "top": {
                kind: [[name(a), name(b), value] for a, b, value in self.top(kind, 20)]
                for kind in _COMPOSITIONS
                if kind not in self.left_out
            },
        }

    def __str__(self) -> str:
        random = figure_text(self.baseline, self.baseline_interval)
        lines = [f"composition in {self.model}; random heads {random}"]
        for kind in _COMPOSITIONS:
            if kind in self.left_out:
                lines.append(f"  {kind.upper()}  not measured: {self.left_out[kind]}")
            else:
                pairs = "  ".join(f"{name(a)}→{name(b)} {value:.3f}" for a, b, value in self.top(kind))
                lines.append(f"  {kind.upper()}  {pairs}")
        return "\n".join(lines)

    def summary(self) -> str:
        """The pairs with the largest scores, beside random heads."""
        return block(str(self).splitlines())

    def rows(self) -> list[dict[str, Any]]:
        """One row per kind and pair of heads of different layers: score, and what it has above random heads."""
        found = []
        for kind in _COMPOSITIONS:
            if kind in self.left_out:
                continue
            scores = self._of(kind)
            for a, i, b, j in (~scores.isnan()).nonzero().tolist():
                score = scores[a, i, b, j].item()
                found.append(
                    {"kind": kind, "writer_layer": a, "writer_head": i, "reader_layer": b, "reader_head": j}
                    | {"score": score, "above_random": score - self.baseline}
                )
        return found

    def drawing(self) -> Markup:
        """The table of the largest scores."""
        return sections_html([composition_section(self)])


@dataclass(frozen=True)
class TokenPair:
    """A cell of a head's circuit between tokens. OV: reading `source` raises `target`'s logit. QK: `source` is the
    destination's token and `target` the token it looks for.
    """

    source: str
    """The token that is read (OV), or that looks (QK)."""
    target: str
    """The token whose logit is raised (OV), or that is looked for (QK)."""
    value: float
    """The logit (OV) or score (QK) above the mean of all targets."""


@dataclass(frozen=True, repr=False)
class CircuitTokens(ResultSequence[TokenPair]):
    """The largest cells of a head's circuit between tokens: a sequence of `TokenPair`."""

    title: ClassVar[str] = "Tokens that a head's circuit connects"

    model: str
    """The model's name."""
    head: Head
    """(layer, head)."""
    part: str
    """"ov" or "qk"."""
    pairs: tuple[TokenPair, ...]
    """The cells."""

    def _items(self) -> tuple[TokenPair, ...]:
        return self.pairs

    def summary(self) -> str:
        """The first cells."""
        lines = [f"{self.part.upper()} circuit of {name(self.head)}, {self.model}: {len(self)} cells between tokens"]
        return block([*lines, *(f"  {p.source!r} → {p.target!r}  {p.value:.2f}" for p in self.pairs[:12])])

    def to_json(self) -> dict[str, Any]:
        return {"model": self.model, "head": list(self.head), "part": self.part, "pairs": self.rows()}

    def rows(self) -> list[dict[str, Any]]:
        """One row per cell."""
        return [{"source": p.source, "target": p.target, "value": p.value} for p in self.pairs]

    def drawing(self) -> Markup:
        """The cells as a table."""
        columns = ("reads", "raises") if self.part == "ov" else ("at", "looks for")
        rows = [[visible(p.source), visible(p.target), f"{p.value:.2f}"] for p in self.pairs]
        return table_html(columns=(*columns, "value"), rows=rows, title=f"{self.part} of {name(self.head)}")


def composition_section(composed: Composition) -> Section:
    """The pairs of heads with the largest composition scores."""
    rows = [
        [kind.upper(), name(writer), name(reader), round(value, 3), round(value - composed.baseline, 3)]
        for kind in _COMPOSITIONS
        if kind not in composed.left_out
        for writer, reader, value in composed.top(kind)
    ]
    left_out = "".join(f" {kind.upper()} is not measured: {why}." for kind, why in composed.left_out.items())
    text = (
        "How much of what a later head reads (as query, key or value) an earlier one writes, by their weights alone. "
        f"Random heads of these shapes score {figure_text(composed.baseline, composed.baseline_interval)}.{left_out}"
    )
    columns = ("input", "writer", "reader", "score", "above random")
    return "Composition", text, table_html(columns=columns, rows=rows, title="Composition scores")


def _copying_section(scores: CopyingScores) -> Section:
    """A map of the copying scores."""
    what = (
        f"{meaning('copying')}. {scores.draws} random heads score {figure_text(scores.chance, scores.chance_interval)}."
    )
    return "copying heads", what, head_map(scores.score, "balance of eigenvalues", "copying", BALANCE)
