"""Latents one by one: how often each is active, how long its decoder is, and how it lies to its encoder and its
neighbours.

    dead     active on none of the tokens. On n tokens a latent that is active on a share s of all text is missed with
             probability (1 − s)ⁿ, so n is always said beside it
    dense    active on more than `DENSE` of the tokens

Cosines are signed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.dictionaries.dictionary import Dictionary
from cutaway.draw.result import Result

DENSE = 0.1  # the share of tokens above which a latent is called dense
_NEIGHBOURS_OF = 4096  # for how many latents, evenly spaced, the nearest other decoder row is looked for
_BIN = 0.5  # width of a histogram's bin, in powers of ten


@dataclass(frozen=True, eq=False, repr=False)
class LatentStatistics(Result):
    """How often each latent of a dictionary is active, and how its decoder row lies."""

    title = "Latents one by one"

    frequency: Tensor
    """The share of the tokens on which each latent is active, float64 [F]."""
    n_tokens: int
    """Tokens that were looked at."""
    decoder_norm: Tensor
    """Length of each decoder row, all outputs together, [F]."""
    encoder_cosine: Tensor | None
    """Signed cosine of each latent's encoder column and decoder row [F]; None where input and output differ."""
    nearest: Tensor
    """The largest signed cosine of a latent's decoder row with another's, of up to 4,096 latents, [m]."""

    @property
    def n_dead(self) -> int:
        """Latents that are active on none of the tokens."""
        return int((self.frequency == 0).sum())

    @property
    def n_dense(self) -> int:
        """Latents that are active on more than 10 % of the tokens."""
        return int((self.frequency > DENSE).sum())

    def histogram(self) -> tuple[list[tuple[float, float]], list[int]]:
        """Bins of log10(frequency), and how many latents lie in each."""
        return _density_histogram(self.frequency, self.n_tokens)

    def summary(self) -> str:
        figures = {name: value for name, value in self.to_json().items() if isinstance(value, dict)}
        lines = [
            f"{len(self.frequency):,} latents on {self.n_tokens:,} tokens: {self.n_dead:,} never active, "
            f"{self.n_dense:,} on more than {DENSE:.0%}"
        ]
        lines += [
            f"  {name.replace('_', ' ')}: median {some['median']:.3f}, 5 % {some['q05']:.3f}, 95 % {some['q95']:.3f}"
            for name, some in figures.items()
        ]
        return "\n".join(lines)

    def rows(self) -> list[dict[str, Any]]:
        cosine = [None] * len(self.frequency) if self.encoder_cosine is None else self.encoder_cosine.tolist()
        each = zip(self.frequency.tolist(), self.decoder_norm.tolist(), cosine, strict=True)
        return [
            {"latent": latent, "frequency": frequency, "decoder_norm": norm, "encoder_cosine": one}
            for latent, (frequency, norm, one) in enumerate(each)
        ]

    def drawing(self) -> Markup:
        return density_svg({"latents": self.frequency}, self.n_tokens)

    def to_json(self) -> dict[str, Any]:
        """Counts, the histogram, and quantiles of the rest."""
        bins, counts = self.histogram()
        return {
            "latents": len(self.frequency),
            "tokens": self.n_tokens,
            "dead": self.n_dead,
            "dense": self.n_dense,
            "dense_above": DENSE,
            "density_log10": [
                {"from": low, "to": high, "latents": n} for (low, high), n in zip(bins, counts, strict=True)
            ],
            "decoder_norm": quantiles(self.decoder_norm),
            "encoder_decoder_cosine_signed": None if self.encoder_cosine is None else quantiles(self.encoder_cosine),
            "nearest_decoder_cosine_signed": quantiles(self.nearest),
        }


def _density_histogram(frequency: Tensor, n_tokens: int) -> tuple[list[tuple[float, float]], list[int]]:
    """Bins of log10(frequency), half a power of ten each, from the rarest that n tokens can show to 1; and how many
    latents lie in each. Dead latents are in none.
    """
    alive = frequency[frequency > 0].double().log10().numpy()
    low = np.floor(-np.log10(max(n_tokens, 2)) / _BIN) * _BIN
    edges = np.arange(low, _BIN / 2, _BIN)
    # a frequency of 1 belongs to the last bin, and rounding must not lose the rarest
    counts, _ = np.histogram(np.clip(alive, edges[0], edges[-1]), edges)
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)), counts.tolist()


def density_svg(frequencies: Mapping[str, Tensor], n_tokens: int, control: Tensor | None = None) -> Markup:
    """How many latents are active how often, one curve per dictionary [F] and one of its control."""
    from cutaway.draw.charts import Series, line_legend, line_svg, line_table

    series: list[Series] = []
    controls = {} if control is None else {"random directions": control}
    for name, frequency in (*frequencies.items(), *controls.items()):
        bins, counts = _density_histogram(frequency, n_tokens)
        x = [10 ** ((low + high) / 2) for low, high in bins]
        series.append({"name": name, "x": x, "y": counts, "control": name in controls})
    drawing = line_svg(
        series=series,
        title="How often latents are active",
        x_label=f"share of {n_tokens:,} tokens on which a latent is active",
        y_label="latents in half a power of ten",
        log_x=True,
    )
    return drawing + line_legend(series) + line_table(series, "share of tokens")


@torch.no_grad()
def latent_statistics(dictionary: Dictionary, counts: Tensor, n_tokens: int) -> LatentStatistics:
    """From the weights, and from how many of `n_tokens` tokens each latent was active on: `counts` int [F]."""
    decoder = dictionary.W_dec.detach().float().cpu()
    encoder = dictionary.W_enc.detach().float().cpu()
    cosine = torch.cosine_similarity(encoder.T, decoder, dim=1) if dictionary.writes_what_it_reads else None
    return LatentStatistics(
        frequency=counts.double().cpu() / max(n_tokens, 1),
        n_tokens=n_tokens,
        decoder_norm=decoder.norm(dim=1),
        encoder_cosine=cosine,
        nearest=nearest_cosine(decoder),
    )


def nearest_cosine(rows: Tensor, at_most: int = _NEIGHBOURS_OF) -> Tensor:
    """For up to `at_most` rows of [F, d], evenly spaced, the largest signed cosine with another row: [m].

    NaN where there is no other row.
    """
    if len(rows) < 2:
        return torch.full((len(rows),), float("nan"))
    unit = torch.nn.functional.normalize(rows, dim=1)
    chosen = torch.linspace(0, len(rows) - 1, min(at_most, len(rows))).round().long()
    found = torch.empty(len(chosen))
    for start in range(0, len(chosen), 512):
        some = chosen[start : start + 512]
        cosines = unit[some] @ unit.T
        cosines[torch.arange(len(some)), some] = -2.0
        found[start : start + 512] = cosines.amax(1)
    return found


def quantiles(values: Tensor) -> dict[str, float]:
    """Mean, and quantiles from the smallest to the largest."""
    ends = torch.quantile(values.double(), torch.tensor([0, 0.05, 0.5, 0.95, 1], dtype=torch.float64))
    names = ("min", "q05", "median", "q95", "max")
    return {"mean": float(values.double().mean()), **dict(zip(names, ends.tolist(), strict=True))}
