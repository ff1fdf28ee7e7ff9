"""The texts in which a latent is most active, and some in which it is less so; how often it is active; what it says
next.

Top examples alone flatter a latent: the strongest activations are its cleanest. So examples are also drawn at random
over all its activations and shown by quantile. Rows are split in halves: even rows give the examples (and whatever a
label is read from), odd rows are held out to test it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.evaluation.latents import density_svg
from cutaway.draw.result import Result
from cutaway.features.activations import (
    Keeper,
    LatentActivations,
    Rows,
    latent_activations,
    strongest_per_row,
    width_of,
)
from cutaway.model.language_model import LanguageModel


@dataclass(frozen=True)
class Windows:
    """Which activations of a latent are written out as examples besides the strongest, and how much text is shown."""

    lower: int = 3
    """Examples at evenly spaced quantiles of 8 · lower activations drawn at random; 0 for none."""
    before: int = 12
    """Tokens shown before the active one."""
    after: int = 6
    """Tokens shown behind it."""


@dataclass(frozen=True)
class Example:
    """A window of a row in which a latent is active."""

    row: int
    """The row, counted from 0."""
    position: int
    """The column of the token that is meant."""
    value: float
    """The latent's activation there."""
    quantile: float
    """The share of the latent's activations that are weaker; 1 for a top example."""
    tokens: tuple[str, ...]
    """The window's tokens."""
    values: tuple[float, ...]
    """The latent's activation at each of them, 0 where it is not active."""
    peak: int
    """Which of `tokens` is the one that is meant."""

    def to_json(self) -> dict[str, Any]:
        """The example as plain data."""
        return {
            "row": self.row,
            "position": self.position,
            "value": self.value,
            "quantile": self.quantile,
            "tokens": list(self.tokens),
            "values": list(self.values),
            "peak": self.peak,
        }

    def __str__(self) -> str:
        text = "".join(f"[[{t}]]" if i == self.peak else t for i, t in enumerate(self.tokens))
        return f"{self.value:7.2f}  {text!r}"


@dataclass(frozen=True, repr=False)
class LatentExamples(Result):
    """One latent: how often it is active, and examples of where."""

    title = "Examples of a latent"

    latent: int
    """The latent's number."""
    density: float
    """The share of tokens on which it is active."""
    maximum: float
    """Its largest activation."""
    top: tuple[Example, ...]
    """Where it is strongest, each in another row."""
    lower: tuple[Example, ...]
    """Where it is weaker, by falling quantile."""

    def summary(self) -> str:
        lines = str(self).split("\n")
        return "\n".join(lines[:11] + ([f"  and {len(lines) - 11} more"] if len(lines) > 11 else []))

    def __str__(self) -> str:
        head = f"latent {self.latent}: active on {self.density:.4%} of tokens, at most {self.maximum:.2f}"
        return "\n".join([head, *(f"  {example}" for example in (*self.top, *self.lower))])

    def to_json(self) -> dict[str, Any]:
        return {
            "latent": self.latent,
            "density": self.density,
            "maximum": self.maximum,
            "top": [example.to_json() for example in self.top],
            "lower": [example.to_json() for example in self.lower],
        }

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "latent": self.latent, "row": one.row, "position": one.position, "value": one.value,
                "quantile": one.quantile, "token": one.tokens[one.peak], "text": "".join(one.tokens),
            }
            for one in (*self.top, *self.lower)
        ]  # fmt: skip

    def drawing(self) -> Markup:
        from cutaway.draw.heatmap import heatmap_html

        every = (*self.top, *self.lower)
        first = max((one.peak for one in every), default=0)
        last = max((len(one.tokens) - one.peak for one in every), default=1)

        def placed(one: Example, cells: Sequence[Any], empty: Any) -> list[Any]:
            return [empty] * (first - one.peak) + list(cells) + [empty] * (last - len(cells) + one.peak)

        return heatmap_html(
            rows=[f"{one.value:.2f}" for one in every],
            columns=[f"{offset:+d}" if offset else "token" for offset in range(-first, last)],
            values=[placed(one, one.values, None) for one in every],
            cell_text=[placed(one, one.tokens, "") for one in every],
            title=f"Latent {self.latent}: activation at each token around its examples",
        )


@dataclass(frozen=True, repr=False)
class FeatureExamples(Result):
    """What one pass over a corpus says of every latent; `examples[7]` are those of latent 7."""

    title = "Top examples of a dictionary's latents"

    site: str
    """Where the dictionary reads."""
    n_tokens: int
    """Tokens that were looked at, of all rows."""
    width: int
    """Columns of the padded rows."""
    density: Tensor
    """The share of the tokens on which each latent is active, [F]."""
    maximum: Tensor
    """Each latent's largest activation, [F]."""
    latents: dict[int, LatentExamples]
    """The examples of the latents that were asked for."""
    shown_at: Tensor
    """Places (row · width + column, or −1) of each latent's activations in even rows, drawn at random in proportion to
    the squared activation, int64 [F, m]."""
    held_at: Tensor
    """The same in odd rows, which test what is read from the even ones, int64 [F, m]."""
    kept: Tensor
    """Places of the tokens that were looked at, int64 [n_tokens]."""

    @property
    def dead(self) -> float:
        """The share of latents that are active nowhere in these rows."""
        return (self.density == 0).float().mean().item()

    def __getitem__(self, latent: int) -> LatentExamples:
        if latent not in self.latents:
            raise CutawayError(f"latent {latent} has no examples here: it was not asked for, or is never active")
        return self.latents[latent]

    def summary(self) -> str:
        shown = list(self.latents.values())
        lines = [
            f"{len(self.density):,} latents at {self.site} on {self.n_tokens:,} tokens: {self.dead:.1%} never active; "
            f"examples of {len(shown):,}"
        ]
        for one in shown[:10]:
            text = f"  {one.top[0]}" if one.top else ""
            lines.append(f"  latent {one.latent}: active on {one.density:.3%}{text}")
        return "\n".join([*lines, *([f"  and {len(shown) - 10:,} more"] if len(shown) > 10 else [])])

    def to_json(self) -> dict[str, Any]:
        return {
            "site": self.site,
            "n_tokens": self.n_tokens,
            "dead": self.dead,
            "latents": [examples.to_json() for examples in self.latents.values()],
        }

    def rows(self) -> list[dict[str, Any]]:
        return [row for one in self.latents.values() for row in one.rows()]

    def drawing(self) -> Markup:
        """How often latents are active, and panels of the first 20 that were asked for."""
        from cutaway.draw.latents import features_html

        items = [
            {
                "id": one.latent, "label": f"latent {one.latent}", "density": one.density,
                "top_examples": [{"tokens": example.tokens, "values": example.values} for example in one.top],
            }
            for one in list(self.latents.values())[:20]
        ]  # fmt: skip
        return density_svg({"latents": self.density}, self.n_tokens) + features_html(items=items)


def top_examples(
    lm: LanguageModel,
    dictionary: Dictionary,
    rows: Rows,
    latents: Sequence[int] | None = None,
    n: int = 5,
    *,
    windows: Windows | None = None,
    sample: int = 32,
    batch_rows: int = 16,
    seed: int = 0,
    activations: Iterable[LatentActivations] | None = None,
) -> FeatureExamples:
    """Stream a corpus through the model and keep the texts in which each latent is strongest.

    Top examples alone flatter a latent: its strongest activations are its cleanest. So some are also drawn at random
    over all its activations. Even rows give the examples, odd rows are held out to test what is read from them. Memory
    is O(F · sample), whatever the number of rows.

    Args:
        lm: The model that the dictionary belongs to.
        dictionary: Reads one site of it.
        rows: Token ids [n, p], or lists of ids of any length.
        latents: Whose examples are written out; all that are active if None. Densities are counted for every latent.
        n: Top examples per latent, each from another row.
        windows: Examples at lower quantiles, and how much text is shown; `Windows()` if None.
        sample: Activations per latent and half of the rows that labels are read from and tested on.
        batch_rows: Rows per forward.
        seed: Of what is drawn at random.
        activations: What `latent_activations(lm, dictionary, rows)` gave, for those who have made that pass already.

    Returns:
        Densities of all latents and examples of those asked for.

    Raises:
        CutawayError: there are no rows.

    Example:
        >>> lm, dictionary = cutaway.load("atlas"), cutaway.dictionaries.load("atlas/blocks.3.resid_post")
        >>> texts = [f"{i}. The capital of Texas is Austin, and Dallas lies in Texas." for i in range(30)]
        >>> rows = cutaway.data.token_rows(lm, texts, context=32)
        >>> examples = top_examples(lm, dictionary, rows, latents=[7, 12])
        >>> examples[7].latent, len(examples.density)
        (7, 4096)
    """
    windows = windows or Windows()
    lower = windows.lower
    f, width = dictionary.d_sae, width_of(rows)
    top, uniform, shown, held = Keeper(f, n), Keeper(f, 8 * lower), Keeper(f, sample), Keeper(f, sample)
    counts, maximum = torch.zeros(f), torch.zeros(f)
    generator = torch.Generator().manual_seed(seed)
    kept: list[Tensor] = []
    for part in latent_activations(lm, dictionary, rows, batch_rows=batch_rows) if activations is None else activations:
        kept.append(part.kept)
        latent, value, at = part.latent, part.value, part.at
        counts += torch.bincount(latent, minlength=f)
        maximum.scatter_reduce_(0, latent, value, "amax")
        odd = (at // width) % 2 == 1
        # the largest keys are a sample without replacement: uniform, or by squared value (Efraimidis & Spirakis 2006)
        chance = torch.rand(len(latent), generator=generator).clamp(min=1e-30)
        key = chance.log() / value.square().clamp(min=1e-12)
        uniform.add(latent[~odd], chance[~odd], value[~odd], at[~odd])
        shown.add(latent[~odd], key[~odd], value[~odd], at[~odd])
        held.add(latent[odd], key[odd], value[odd], at[odd])
        best = strongest_per_row(latent[~odd], value[~odd], at[~odd], width)
        top.add(latent[~odd][best], value[~odd][best], value[~odd][best], at[~odd][best])
    seen = torch.cat(kept)
    asked = [i for i in range(f) if counts[i] > 0] if latents is None else list(latents)
    wanted: list[tuple[int, int, float]] = []  # latent, place, quantile
    for latent in asked:
        wanted += [(latent, at, 1.0) for at in top.at[latent].tolist() if at >= 0]
        values, order = uniform.value[latent][uniform.at[latent] >= 0].sort()
        places = uniform.at[latent][uniform.at[latent] >= 0][order].tolist()
        for step in range(lower):
            quantile = (step + 0.5) / lower
            if len(values) >= 2 * lower:
                wanted.append((latent, places[int(quantile * len(places))], quantile))
    written = _windows(lm, dictionary, rows, wanted, windows, batch_rows)
    found: dict[int, list[Example]] = {latent: [] for latent in asked}
    for (latent, _, _), example in zip(wanted, written, strict=True):
        found[latent].append(example)
    density = counts / len(seen)
    return FeatureExamples(
        site=dictionary.site,
        n_tokens=len(seen),
        width=width,
        density=density,
        maximum=maximum,
        latents={
            latent: LatentExamples(
                latent,
                density[latent].item(),
                maximum[latent].item(),
                tuple(e for e in examples if e.quantile == 1.0),
                tuple(sorted((e for e in examples if e.quantile < 1.0), key=lambda e: -e.quantile)),
            )
            for latent, examples in found.items()
        },
        shown_at=shown.at,
        held_at=held.at,
        kept=seen,
    )


def _windows(
    lm: LanguageModel,
    dictionary: Dictionary,
    rows: Rows,
    wanted: Sequence[tuple[int, int, float]],
    window: Windows,
    batch_rows: int,
) -> list[Example]:
    """The windows around places, with the latent's activation on each of their tokens."""
    width = width_of(rows)
    by_row: dict[int, list[int]] = {}
    for number, (_, at, _) in enumerate(wanted):
        by_row.setdefault(at // width, []).append(number)
    out: dict[int, Example] = {}
    order = sorted(by_row)
    for first in range(0, len(order), batch_rows):
        part = order[first : first + batch_rows]
        tokens = lm.tokens([list(map(int, rows[i])) for i in part])
        stream = lm.run(tokens, capture=dictionary.site, logits=None)[dictionary.site]
        for k, row in enumerate(part):
            length = int(tokens.lengths[k])
            values, latents = dictionary.encode_sparse(stream[k, :length])
            values, latents = values.detach().float().cpu(), latents.cpu()
            for number in by_row[row]:
                latent, at, quantile = wanted[number]
                column = at % width
                low, high = max(0, column - window.before), min(length, column + window.after + 1)
                shown = (values[low:high] * (latents[low:high] == latent)).sum(-1)
                out[number] = Example(
                    row=row,
                    position=column,
                    value=shown[column - low].item(),
                    quantile=quantile,
                    tokens=tokens.strings[k][low:high],
                    values=tuple(shown.tolist()),
                    peak=column - low,
                )
    return [out[number] for number in range(len(wanted))]
