"""Do two trainings that differ in their seed find the same latents?

Decoder rows of one dictionary are matched with those of the other, and the cosines of matched pairs are the figure.
*Signed* cosines tell a direction from its opposite, which is what a latent of non-negative activations needs;
*absolute* ones do not, and are larger. The name of every figure says which. Two matchings:

    assignment   one to one, with the greatest sum of cosines (`scipy.optimize.linear_sum_assignment`, O(F³) at worst)
    mutual       pairs that are each other's nearest; the others have no match. For dictionaries too large to assign

With either, a large dictionary of random directions has matches too: the control is the same figure between two random
dictionaries of the same sizes.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.results import Control, Effect, Interval
from cutaway.artifacts.statistics import bootstrap_interval, student_intervals, wilson_interval
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.evaluation.figures import figure_line
from cutaway.draw.charts import effects_html
from cutaway.draw.result import Result

Matching = Literal["assignment", "mutual"]

ASSIGNABLE = 4096  # more latents are not assigned by default: a second or a few on one core
SAME = 0.7  # pairs above this cosine are counted as one and the same latent


@dataclass(frozen=True, eq=False)
class Matched:
    """Pairs of rows: `first` [m] of one, `second` [m] of the other, and their `cosine` [m]; how, and whether signed.

    With "mutual" m is how many pairs there are, with "assignment" the number of rows of the smaller dictionary.
    """

    first: Tensor
    second: Tensor
    cosine: Tensor
    matching: Matching
    signed: bool
    n: int

    @property
    def mean(self) -> float:
        """Mean cosine of the matched pairs; NaN without any."""
        return float(self.cosine.mean())

    @property
    def share_same(self) -> float:
        """Share of the smaller dictionary's latents whose match has a cosine above `SAME`."""
        return float((self.cosine > SAME).sum()) / self.n


@dataclass(frozen=True, eq=False, repr=False)
class Stability(Result):
    """How far dictionaries of different seeds hold the same latents."""

    title = "Stability across seeds"

    effects: dict[str, Effect]
    """By name: "cosine", of matched decoder rows, and "found_again", the share of latents above a cosine of 0.7; both
    beside two random dictionaries of the same sizes.
    """
    per_pair: dict[str, tuple[float, ...]]
    """The same of each pair of dictionaries."""
    cosines: tuple[np.ndarray, ...]
    """Of each pair of dictionaries, the cosines of matched rows."""
    control_cosines: np.ndarray
    """The same between two random dictionaries."""

    def summary(self) -> str:
        return "\n".join([f"{len(self.cosines)} pairs of dictionaries", *map(figure_line, self.effects.values())])

    def to_json(self) -> dict[str, Any]:
        return {
            "effects": {name: one.to_json() for name, one in self.effects.items()},
            "per_pair": {name: list(each) for name, each in self.per_pair.items()},
        }

    def rows(self) -> list[dict[str, Any]]:
        return [{"pair": pair, "cosine": float(one)} for pair, some in enumerate(self.cosines) for one in some]

    def drawing(self) -> Markup:
        from cutaway.draw.charts import Series, line_legend, line_svg, line_table

        edges = np.linspace(min(0.0, *(some.min(initial=0.0) for some in self.cosines)), 1, 21)
        series: list[Series] = [
            {
                "name": name, "x": ((edges[1:] + edges[:-1]) / 2).tolist(), "control": control,
                "y": np.histogram(some, edges)[0].tolist(),
            }
            for name, some, control in (
                *((f"pair {place + 1}", some, False) for place, some in enumerate(self.cosines)),
                ("two random dictionaries", self.control_cosines, True),
            )
        ]  # fmt: skip
        svg = line_svg(series=series, title=self.title, x_label="cosine of matched decoder rows", y_label="latents")
        return svg + line_legend(series) + line_table(series, "cosine") + effects_html(self.effects.values())


@torch.no_grad()
def match_rows(a: Tensor, b: Tensor, *, signed: bool = True, matching: Matching | None = None) -> Matched:
    """Match the rows of a [m, d] with those of b [n, d] by cosine.

    By assignment up to 4,096 rows, else by mutual nearest neighbours, unless `matching` says. Raises `CutawayError`
    for widths that differ or no rows at all.
    """
    if a.shape[1] != b.shape[1]:
        raise CutawayError(f"decoders of widths {a.shape[1]} and {b.shape[1]} cannot be compared")
    if not len(a) or not len(b):
        raise CutawayError("there are no latents to match")
    matching = matching or ("assignment" if max(len(a), len(b)) <= ASSIGNABLE else "mutual")
    unit = torch.nn.functional.normalize
    one, other = unit(a.detach().float().cpu(), dim=1), unit(b.detach().float().cpu(), dim=1)
    n = min(len(a), len(b))
    if matching == "assignment":
        from scipy.optimize import linear_sum_assignment

        cosines = one @ other.T
        if not signed:
            cosines = cosines.abs()
        first, second = linear_sum_assignment(cosines.numpy(), maximize=True)
        rows, columns = torch.from_numpy(first), torch.from_numpy(second)
        return Matched(rows, columns, cosines[rows, columns], matching, signed, n)
    forth, cosine = _nearest(one, other, signed)
    back, _ = _nearest(other, one, signed)
    rows = torch.arange(len(one))
    mutual = back[forth] == rows
    return Matched(rows[mutual], forth[mutual], cosine[mutual], matching, signed, n)


def _nearest(a: Tensor, b: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """For each row of a the nearest row of b and the cosine, a block of rows at a time."""
    found = []
    for some in a.split(1024):
        cosines = some @ b.T
        found.append((cosines if signed else cosines.abs()).max(1))
    return torch.cat([one.indices for one in found]), torch.cat([one.values for one in found])


def stability(
    dictionaries: Sequence[Dictionary],
    *,
    signed: bool = True,
    matching: Matching | None = None,
    alive: Sequence[Tensor] | None = None,
    seed: int = 0,
) -> Stability:
    """How far dictionaries that differ in their seed find the same latents.

    Args:
        dictionaries: Two or more.
        signed: Whether a direction and its opposite differ, which is what latents of non-negative activations need.
        matching: One-to-one "assignment", or "mutual" nearest neighbours; by size if None.
        alive: A mask [F] per dictionary: dead latents, which are where they began, are left out.
        seed: Of the random dictionaries.

    Returns:
        The matched cosine and the share found again, with intervals over pairs and latents.

    Raises:
        CutawayError: fewer than two dictionaries, widths that differ, or no latents.
    """
    if len(dictionaries) < 2:
        raise CutawayError("stability compares dictionaries of different seeds: give two or more")
    rows = [one.W_dec.detach().float().cpu() for one in dictionaries]
    if alive is not None:
        rows = [some[mask.cpu()] for some, mask in zip(rows, alive, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    pairs = list(itertools.combinations(range(len(rows)), 2))
    trained = [match_rows(rows[i], rows[j], signed=signed, matching=matching) for i, j in pairs]
    i, j = pairs[0]
    random = match_rows(
        torch.randn(rows[i].shape, generator=generator),
        torch.randn(rows[j].shape, generator=generator),
        signed=signed,
        matching=matching,
    )
    kind = "signed" if signed else "absolute"
    how = "one-to-one assignment" if trained[0].matching == "assignment" else "mutual nearest neighbours"
    effects: dict[str, Effect] = {}
    each: dict[str, tuple[float, ...]] = {}
    for name, label, units in (
        ("cosine", f"matched decoder cosine ({kind}, {how})", "cosine"),
        ("found_again", f"latents found again ({kind} cosine of the match above {SAME:g}, {how})", "share"),
    ):
        values = [_per_latent(one, name) for one in trained]
        other = _per_latent(random, name)
        each[name] = tuple(float(value.mean()) for value in values)
        effects[name] = Effect(
            name=label,
            value=float(np.mean(each[name])),
            n=sum(map(len, values)),
            interval=_interval(values, len(rows)),
            controls=(
                Control(
                    "two random dictionaries",
                    float(other.mean()),
                    _latents(other),
                    len(other),
                ),
            ),
            ablation="none",
            units=units,
        )
    shown = tuple(_per_latent(one, "cosine") for one in trained)
    return Stability(effects, each, shown, _per_latent(random, "cosine"))


def _per_latent(matched: Matched, name: str) -> np.ndarray:
    """One number per latent of the smaller dictionary; for "cosine" one per matched pair."""
    if name == "cosine":
        return matched.cosine.double().numpy()
    same = np.zeros(matched.n)
    same[: len(matched.cosine)] = (matched.cosine > SAME).double().numpy()
    return same


def _interval(values: Sequence[np.ndarray], n_dictionaries: int) -> Interval:
    """Of the mean over pairs of dictionaries: that over latents, and that over dictionaries by leaving each out.

    The half widths add as squares; of two dictionaries, which are one pair, there is none over dictionaries.
    """
    each = np.array([one.mean() for one in values])
    middle = float(each.mean())
    # the same latents stand in several pairs, so that the mean over pairs is no surer than one pair
    low, high = (float(end) for end in np.mean([_latents(one) for one in values], axis=0))
    if n_dictionaries < 3:
        return low, high
    pairs = np.array(list(itertools.combinations(range(n_dictionaries), 2)))
    left_out = np.array([each[(pairs != k).all(1)].mean() for k in range(n_dictionaries)])
    # pseudo-values: what each dictionary adds to the mean
    own = n_dictionaries * middle - (n_dictionaries - 1) * left_out
    half = float(np.diff(student_intervals(own))[0]) / 2
    return middle - math.hypot(middle - low, half), middle + math.hypot(high - middle, half)


def _latents(values: np.ndarray) -> Interval:
    """Over latents, of their mean; of their share, where each is 0 or 1."""
    if np.isin(values, (0, 1)).all():
        return wilson_interval(int(values.sum()), len(values))
    return bootstrap_interval(values)
