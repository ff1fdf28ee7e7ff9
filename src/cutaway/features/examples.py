"""The texts in which a latent fires most, and some in which it fires less; how often it fires; what it says next.

Top examples alone flatter a latent: the strongest activations are its cleanest. So examples are also drawn at random
over all its activations and shown by quantile. Rows are split in halves: even rows give the examples (and whatever a
label is read from), odd rows are held out to test it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.features.activations import Firing, Keeper, Rows, fires, strongest_per_row, width_of
from cutaway.model.language_model import LanguageModel


@dataclass(frozen=True)
class Example:
    """A window of a row: its tokens, the latent's activation at each, and which of them is the one meant.

    `quantile` is the share of the latent's activations that are weaker (1 for a top example).
    """

    row: int
    position: int
    value: float
    quantile: float
    tokens: tuple[str, ...]
    values: tuple[float, ...]
    peak: int

    def to_json(self) -> dict[str, Any]:
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


@dataclass(frozen=True)
class LatentExamples:
    """One latent: its density (share of tokens on which it is active), its maximum, and its examples."""

    latent: int
    density: float
    maximum: float
    top: tuple[Example, ...]
    lower: tuple[Example, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "latent": self.latent,
            "density": self.density,
            "maximum": self.maximum,
            "top": [example.to_json() for example in self.top],
            "lower": [example.to_json() for example in self.lower],
        }

    def __str__(self) -> str:
        head = f"latent {self.latent}: active on {self.density:.4%} of tokens, at most {self.maximum:.2f}"
        return "\n".join([head, *(f"  {example}" for example in (*self.top, *self.lower))])


@dataclass(frozen=True)
class FeatureExamples:
    """What one pass over a corpus says of every latent.

    `density` and `maximum` [F] over `n_tokens` tokens of all rows, at the places `kept`. `shown_at`, `held_at` [F, m]
    are places (row * width + column, or -1) of each latent's activations in even and in odd rows, drawn at random in
    proportion to the squared activation. `latents` has the windows of the latents asked for.
    """

    site: str
    n_tokens: int
    width: int
    density: Tensor
    maximum: Tensor
    latents: dict[int, LatentExamples]
    shown_at: Tensor
    held_at: Tensor
    kept: Tensor

    @property
    def dead(self) -> float:
        """Share of latents that fire nowhere in these rows."""
        return (self.density == 0).float().mean().item()

    def __getitem__(self, latent: int) -> LatentExamples:
        if latent not in self.latents:
            raise CutawayError(f"latent {latent} has no examples here: it was not asked for, or never fires")
        return self.latents[latent]

    def to_json(self) -> dict[str, Any]:
        return {
            "site": self.site,
            "n_tokens": self.n_tokens,
            "dead": self.dead,
            "latents": [examples.to_json() for examples in self.latents.values()],
        }


def top_examples(
    lm: LanguageModel,
    dictionary: Dictionary,
    rows: Rows,
    latents: Sequence[int] | None = None,
    n: int = 5,
    window: tuple[int, int] = (12, 6),
    *,
    lower: int = 3,
    sample: int = 32,
    batch_rows: int = 32,
    seed: int = 0,
    firings: Iterable[Firing] | None = None,
) -> FeatureExamples:
    """Stream rows of token ids [N, p] through the model and keep each latent's strongest contexts.

    `n` top examples a latent, each from another row, and `lower` at evenly spaced quantiles of `8 * lower` random
    activations; `window` tokens before and after; `sample` activations a half for labels. `latents` limits the windows
    that are written out (default: all that fire); densities are counted for every latent. Memory is O(F · sample),
    whatever the number of rows. `firings` is `fires(lm, dictionary, rows)`, for those who have made that pass already.
    """
    f, width = dictionary.d_sae, width_of(rows)
    top, uniform, shown, held = Keeper(f, n), Keeper(f, 8 * lower), Keeper(f, sample), Keeper(f, sample)
    counts, maximum = torch.zeros(f), torch.zeros(f)
    generator = torch.Generator().manual_seed(seed)
    kept: list[Tensor] = []
    for firing in fires(lm, dictionary, rows, batch_rows=batch_rows) if firings is None else firings:
        kept.append(firing.kept)
        latent, value, at = firing.latent, firing.value, firing.at
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
    windows = _windows(lm, dictionary, rows, wanted, window, batch_rows)
    found: dict[int, list[Example]] = {latent: [] for latent in asked}
    for (latent, _, _), example in zip(wanted, windows, strict=True):
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
    window: tuple[int, int],
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
                low, high = max(0, column - window[0]), min(length, column + window[1] + 1)
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
