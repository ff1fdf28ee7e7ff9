"""Which latents of a crosscoder belong to one side only, which are shared, and which only look exclusive.

A latent's share of side B is ‖W_B‖ / (‖W_A‖ + ‖W_B‖), W its two decoder rows (Lindsey et al. 2024, "Sparse crosscoders
for cross-layer features and model diffing"), each in units of that side's spread √(mean ‖y − ȳ‖²): the longer
activations of one model would else make every latent look like its own. Shares of at most 0.1 are exclusive to A, of
0.9 and more to B, from 0.4 to 0.6 shared.

The norm alone exaggerates: the L1 penalty removes a decoder that would still have explained something (*shrinkage*),
and writes one concept as two latents, one per side (*decoupling*). Both are found by latent scaling (Minder et al.
2025, arXiv 2504.02922). For a latent j exclusive to B with activations f and direction d_B, β is the least-squares
factor of f·d_B in a target, and ν compares A with B:

    ν_error           β in what the *other* latents leave unexplained. Near 1: the concept is in A as well, unexplained
    ν_reconstruction  β in the reconstruction. Near 1: other latents write it in A

Latents with ν_error ≥ 0.2 or ν_reconstruction ≥ 0.5 are artefacts here, not exclusive.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.results import Control, Effect
from cutaway.artifacts.statistics import bootstrap_interval
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.evaluation.figures import figure_line, share_effect
from cutaway.dictionaries.sparse import Places
from cutaway.draw.charts import effects_html
from cutaway.draw.result import Result

_EXCLUSIVE = 0.1  # at most this share of one side, or one less this
_SHARED = (0.4, 0.6)
SHRUNK = 0.2  # ν_error from which a latent is in the other side's error too
DECOUPLED = 0.5  # ν_reconstruction from which others write it there
_MIN_ACTIVE = 10
_TOKENS_AT_ONCE = 4096


@dataclass(frozen=True, eq=False, repr=False)
class Sides(Result):
    """Two outputs A and B of a crosscoder compared, latent by latent."""

    title = "Two sides of a crosscoder"

    labels: tuple[str, str]
    """The names of A and B."""
    share: Tensor
    """B's share of each latent's decoder norm, [F]."""
    cosine: Tensor
    """Signed cosine of each latent's two decoder rows [F]; NaN where widths differ."""
    nu_error: Tensor
    """Latent scaling of the latent's own side into the other's error [F] (see the module); NaN where widths differ or
    the latent was active on fewer than 10 tokens."""
    nu_reconstruction: Tensor
    """Latent scaling into the other side's reconstruction [F]; NaN likewise."""
    n_active: Tensor
    """On how many tokens each latent is active, [F]."""
    effects: dict[str, Effect]
    """By name: "exclusive_a", "exclusive_b", "shared", "shared_cosine", each beside the same latents with their A sides
    shuffled."""

    def summary(self) -> str:
        lines = [f"{self.labels[0]} and {self.labels[1]}: {int((self.n_active > 0).sum()):,} active latents"]
        lines += [f"  {figure_line(one)}" for one in self.effects.values()]
        return "\n".join([*lines, *(f"  note: {warning}" for warning in self.warnings())])

    def rows(self) -> list[dict[str, Any]]:
        names = ("share", "cosine", "nu_error", "nu_reconstruction", "n_active")
        columns = [getattr(self, name).tolist() for name in names]
        return [
            {"latent": latent, **dict(zip(names, values, strict=True))}
            for latent, values in enumerate(zip(*columns, strict=True))
        ]

    def drawing(self) -> Markup:
        from cutaway.draw.charts import line_svg

        middles, counts = self.histogram()
        drawn = line_svg(
            series=[{"name": "active latents", "x": middles, "y": counts}],
            title="share of the norm",
            x_label=f"share of {self.labels[1]}",
            y_label="latents",
        )
        return drawn + effects_html(self.effects.values())

    def exclusive(self, side: int) -> Tensor:
        """Active latents whose norm is exclusive to a side: bool [F].

        Args:
            side: 0 for A, 1 for B.
        """
        of = self.share <= _EXCLUSIVE if side == 0 else self.share >= 1 - _EXCLUSIVE
        return of & (self.n_active > 0)

    @property
    def shared(self) -> Tensor:
        """Active latents that have about as long a decoder on either side: bool [F]."""
        return (self.share >= _SHARED[0]) & (self.share <= _SHARED[1]) & (self.n_active > 0)

    def artefact(self, side: int) -> Tensor:
        """Exclusive by norm, but present on the other side by latent scaling: bool [F].

        Args:
            side: 0 for A, 1 for B.
        """
        return self.exclusive(side) & ((self.nu_error >= SHRUNK) | (self.nu_reconstruction >= DECOUPLED))

    def measured(self, side: int) -> Tensor:
        """Exclusive by norm, and active often enough for latent scaling: bool [F].

        Args:
            side: 0 for A, 1 for B.
        """
        return self.exclusive(side) & self.nu_error.isfinite()

    def warnings(self) -> list[str]:
        """What to keep in mind before calling a latent exclusive, in sentences."""
        found = []
        for side, label in enumerate(self.labels):
            bad, tried, all_ = (
                int(mask.sum()) for mask in (self.artefact(side), self.measured(side), self.exclusive(side))
            )
            if bad:
                found.append(
                    f"{bad} of the {tried} measured latents exclusive to {label} by norm are on the other side too "
                    f"(ν_error ≥ {SHRUNK:g} or ν_reconstruction ≥ {DECOUPLED:g}): shrinkage or decoupling"
                )
            if all_ > tried:
                found.append(
                    f"{all_ - tried} of the {all_} latents exclusive to {label} by norm could not be checked: they "
                    f"were active on fewer than {_MIN_ACTIVE} tokens, or the widths differ"
                )
        return found

    def histogram(self, bins: int = 20) -> tuple[list[float], list[int]]:
        """Middles of equal bins of the share from 0 to 1, and how many latents that are active lie in each.

        Args:
            bins: How many bins.
        """
        counts, edges = np.histogram(self.share[self.n_active > 0].numpy(), bins=bins, range=(0, 1))
        return ((edges[1:] + edges[:-1]) / 2).tolist(), counts.tolist()

    def to_json(self) -> dict[str, Any]:
        """Counts, effects, the histogram and warnings."""
        middles, counts = self.histogram()
        return {
            "sides": list(self.labels),
            "effects": {name: one.to_json() for name, one in self.effects.items()},
            "histogram": [{"share_of_second": x, "latents": n} for x, n in zip(middles, counts, strict=True)],
            "exclusive": [int(self.exclusive(side).sum()) for side in (0, 1)],
            "shared": int(self.shared.sum()),
            "artefacts": [int(self.artefact(side).sum()) for side in (0, 1)],
            "warnings": self.warnings(),
        }


@torch.no_grad()
def compare_sides(
    dictionary: Dictionary,
    x: Tensor,
    y: Tensor,
    *,
    sides: tuple[int, int] = (0, 1),
    labels: Sequence[str] | None = None,
    seed: int = 0,
) -> Sides:
    """Which latents of a crosscoder belong to one of two outputs only, and which are shared.

    By decoder norm (Lindsey et al. 2024), checked by latent scaling (Minder et al. 2025;
    https://arxiv.org/abs/2504.02922).

    Args:
        dictionary: A crosscoder.
        x: Activations that it reads [n, d_in].
        y: What it should write [n, d_out].
        sides: Which two outputs, by number.
        labels: A name for each output; their sites if None.
        seed: Of the shuffled control.

    Returns:
        Shares and cosines of every latent, and counts beside shuffled sides.

    Raises:
        CutawayError: the dictionary writes one tensor only.
    """
    if len(dictionary.outputs) < 2:
        raise CutawayError(f"{dictionary} writes one tensor; exclusive and shared latents are a crosscoder's")
    names = tuple(labels or (port.site for port in dictionary.outputs))
    ends = np.cumsum([0, *(port.width for port in dictionary.outputs)])
    parts = [slice(int(ends[side]), int(ends[side + 1])) for side in sides]
    scales = [float((y[:, part] - y[:, part].mean(0)).double().square().sum(1).mean().sqrt()) for part in parts]
    rows = [dictionary.W_dec[:, part].float() / scale for part, scale in zip(parts, scales, strict=True)]
    norms = [some.norm(dim=1) for some in rows]
    share = norms[1] / (norms[0] + norms[1]).clamp_min(torch.finfo(torch.float32).tiny)
    same_width = rows[0].shape[1] == rows[1].shape[1]
    cosine = torch.cosine_similarity(*rows, dim=1) if same_width else torch.full_like(share, float("nan"))
    n_active, nu = _latent_scaling(dictionary, x, y, parts, scales, rows, share, same_width)
    found = Sides((names[sides[0]], names[sides[1]]), share, cosine, *nu, n_active, {})
    found.effects.update(_effects(found, rows, norms, same_width, seed))
    return found


def _effects(found: Sides, rows: list[Tensor], norms: list[Tensor], same_width: bool, seed: int) -> dict[str, Effect]:
    """Shares of latents, and the cosine of shared ones, beside the A sides given to other latents."""
    alive = found.n_active > 0
    n = int(alive.sum())
    if not n:
        return {}
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    lengths = [norm[alive] for norm in norms]
    shuffled = lengths[1] / (lengths[0][order] + lengths[1]).clamp_min(torch.finfo(torch.float32).tiny)
    control = "A sides shuffled among latents"
    a, b = found.labels
    effects: dict[str, Effect] = {}
    low, high = _SHARED
    for name, label, mask, by_chance in (
        ("exclusive_a", f"latents exclusive to {a}", found.exclusive(0), shuffled <= _EXCLUSIVE),
        ("exclusive_b", f"latents exclusive to {b}", found.exclusive(1), shuffled >= 1 - _EXCLUSIVE),
        ("shared", f"latents shared by {a} and {b}", found.shared, (shuffled >= low) & (shuffled <= high)),
    ):
        effects[name], _ = share_effect(
            f"{label}, by decoder norm", [int(mask.sum())], n, {control: [int(by_chance.sum())]}
        )
    if same_width and found.shared.any():
        left = torch.nn.functional.normalize(rows[0][alive][order], dim=1)
        right = torch.nn.functional.normalize(rows[1][alive], dim=1)
        chance = (left * right).sum(1).double().numpy()
        shared = found.cosine[found.shared].double().numpy()
        effects["shared_cosine"] = Effect(
            name="signed cosine of the two decoders of a shared latent",
            value=float(shared.mean()),
            n=len(shared),
            interval=bootstrap_interval(shared, n_resamples=500),
            controls=(
                Control(control, float(chance.mean()), bootstrap_interval(chance, n_resamples=500), len(chance)),
            ),
            ablation="none",
            units="cosine",
        )
    return effects


def _latent_scaling(
    dictionary: Dictionary,
    x: Tensor,
    y: Tensor,
    parts: Sequence[slice],
    scales: Sequence[float],
    rows: Sequence[Tensor],
    share: Tensor,
    same_width: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """On how many tokens each latent is active [F], and ν_error, ν_reconstruction [F] from each latent's longer side
    into the other.
    """
    n_latents = dictionary.d_sae
    n_active = torch.zeros(n_latents, dtype=torch.int64)
    own = torch.where((share > 0.5)[:, None], rows[1], rows[0]) if same_width else None
    sums = torch.zeros(2, 2, n_latents, dtype=torch.float64)  # [error or reconstruction, side, latent]
    square = torch.zeros(n_latents, dtype=torch.float64)
    for start in range(0, len(x), _TOKENS_AT_ONCE):
        some = slice(start, start + _TOKENS_AT_ONCE)
        values, latents = dictionary.encode_sparse(x[some])
        active = values > 0
        n_active += torch.bincount(latents[active], minlength=n_latents).cpu()
        if own is None:
            continue
        written = dictionary.decode_sparse(values, latents, x[some])
        places, flat = Places.of_rows(latents, n_latents), values.reshape(-1).float()
        square += places.latent_sums(flat.double().square()).cpu()
        for side, (part, scale) in enumerate(zip(parts, scales, strict=True)):
            error = (y[some][:, part] - written[:, part]).float() / scale
            reconstruction = (written[:, part] - dictionary.b_dec[part]).float() / scale
            for kind, target in enumerate((error, reconstruction)):
                products = places.products(own, target)
                sums[kind, side] += places.latent_sums((products * flat).double()).cpu()
    if own is None:
        nothing = torch.full((n_latents,), float("nan"))
        return n_active, (nothing, nothing)
    own = own.cpu().double()
    for side in (0, 1):  # what the others leave unexplained: the latent's own part is added back to the error
        sums[0, side] += square * (own * rows[side].cpu().double()).sum(1)
    mine = (share > 0.5).long().cpu()
    latent = torch.arange(n_latents)
    ratios = []
    for kind in (0, 1):
        here, there = sums[kind][mine, latent], sums[kind][1 - mine, latent]
        ratio = there / here
        # a latent that its own side does not need has no scale to compare with
        ratio[(n_active < _MIN_ACTIVE) | ~(here > 0)] = float("nan")
        ratios.append(ratio.float())
    return n_active, (ratios[0], ratios[1])
