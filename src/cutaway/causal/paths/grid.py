"""What path patching found: the share that each path moves, senders × receivers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.results import Choices, Control, Effect, interval_text
from cutaway.artifacts.statistics import bootstrap_interval, false_discovery, mean_intervals, sign_flip_p_of_each
from cutaway.causal.metrics import PatchDirection
from cutaway.draw.heatmap import heatmap_html
from cutaway.draw.result import Result

Mlps = Literal["recompute", "freeze"]
"""What MLPs between sender and receiver do."""
_ROUNDING = 1e-5


@dataclass(frozen=True, repr=False)
class PathGrid(Result):
    """What each path moves, senders × receivers, for n pairs.

    A share is of the difference between the two runs that the path moves: noising, (clean - patched) / (clean -
    corrupt); denoising, (patched - corrupt) / (clean - corrupt).
    """

    title: ClassVar[str] = "Path patching"

    model: str
    """Name of the model."""
    n_layers: int
    """Layers of the model."""
    n_heads: int
    """Heads of each layer."""
    metric: str
    """Name of the metric."""
    direction: PatchDirection
    """What is put where."""
    mlps: Mlps
    """Whether MLPs on the way are recomputed, or frozen."""
    senders: tuple[str, ...]
    """The rows."""
    receivers: tuple[str, ...]
    """The columns."""
    values: Tensor
    """Shares [senders, receivers, n]; NaN where the receiver does not come after the sender, and where a pair's two
    prompts hardly differ."""
    random: Tensor
    """The control: the mean over random senders of the same kind (of any kind, where there is no other) into the same
    receiver [senders, receivers, n]."""
    n_random: Tensor
    """How many random senders [senders, receivers]."""
    clean: Tensor
    """The metric of the clean prompts [n]."""
    corrupt: Tensor
    """The metric of the corrupt prompts [n]."""
    dropped: int
    """Pairs whose two prompts hardly differ."""

    @property
    def n(self) -> int:
        """How many pairs were patched."""
        return int(self.values.shape[-1])

    @property
    def mean(self) -> Tensor:
        """Mean share moved [senders, receivers] over the pairs that can be judged."""
        return self.values.nanmean(-1)

    def interval(self, n_resamples: int = 2000, seed: int = 0) -> Tensor:
        """95 % interval of the mean over pairs [2, senders, receivers].

        Args:
            n_resamples: Draws of the bootstrap.
            seed: Of these draws.
        """
        usable = ~self.values.isnan().all(0).all(0)
        kept = self.values[..., usable].double().numpy()
        return torch.from_numpy(mean_intervals(kept, n_resamples, seed)).float()

    @cached_property
    def p(self) -> Tensor:
        """Two-sided p [senders, receivers] of each path against random other senders, by flipping pairs' signs."""
        difference = (self.values - self.random).double()
        # differences of rounding alone would have a small p
        difference[difference.abs() <= _ROUNDING] = 0.0
        return torch.from_numpy(sign_flip_p_of_each(difference.flatten(0, 1).numpy())).view(difference.shape[:2])

    @cached_property
    def q(self) -> Tensor:
        """The rate of false discoveries [senders, receivers] among all paths with a p as small."""
        return torch.from_numpy(false_discovery(self.p.numpy()))

    def _at(self, sender: str, receiver: str) -> tuple[int, int]:
        if sender not in self.senders or receiver not in self.receivers:
            raise CutawayError(
                f"this grid has no path {sender} → {receiver}; its senders begin with {', '.join(self.senders[:3])}, "
                f"its receivers with {', '.join(self.receivers[:3])}"
            )
        return self.senders.index(sender), self.receivers.index(receiver)

    def effect(self, sender: str, receiver: str, *, pairs: Sequence[int] | None = None) -> Effect:
        """One path, beside random other senders into the same receiver.

        Args:
            sender: One of `senders`.
            receiver: One of `receivers`.
            pairs: Those that it is measured on, by number; None: all.
        """
        i, j = self._at(sender, receiver)
        pick = list(range(self.n)) if pairs is None else list(pairs)
        value, control = self.values[i, j, pick], self.random[i, j, pick]
        if bool(value.isnan().all()):
            raise CutawayError(f"{sender} → {receiver} is no path: {receiver} does not come after {sender}")
        value, control = value[~value.isnan()].numpy(), control[~control.isnan()].numpy()
        controls = ()
        if len(control):
            named = f"{int(self.n_random[i, j])} random other senders"
            controls = (Control(named, float(control.mean()), bootstrap_interval(control), len(control)),)
        to, of = ("clean", "corrupt") if self.direction == "noise" else ("corrupt", "clean")
        return Effect(
            name=f"{sender} → {receiver}",
            value=float(value.mean()),
            n=len(value),
            interval=bootstrap_interval(value),
            controls=controls,
            ablation=f"what {sender} writes taken from the {of} prompt, in the {to} one, for {receiver} alone",
            units=f"share of the {self.metric.replace('_', ' ')} between the two runs",
            choices=Choices(
                granularity="edge",
                component=f"{sender} → {receiver}, other heads frozen, MLPs "
                + ("recomputed" if self.mlps == "recompute" else "frozen"),
                ablation="resample",
                positions=", ".join(sorted({name.partition("@")[2] or "all" for name in (sender, receiver)})),
                direction=self.direction,
                evaluation=f"{self.n} pairs",
            ),
        )

    def strongest(self, receiver: str, k: int = 5) -> list[Effect]:
        """The k senders that move most into a receiver, chosen on every second pair, measured on the others.

        Needs at least 8 pairs.

        Args:
            receiver: One of `receivers`.
            k: How many.
        """
        if self.n < 8:
            raise CutawayError(
                f"{self.n} pairs are too few to choose senders on one half and measure them on the other; give 8"
            )
        j = self._at(self.senders[0], receiver)[1]
        chosen = self.values[:, j, 0::2].nanmean(-1).abs().nan_to_num(-1.0)
        able = [i for i in chosen.argsort(descending=True).tolist() if chosen[i] >= 0][:k]
        return [self.effect(self.senders[i], receiver, pairs=range(1, self.n, 2)) for i in able]

    def heads(self, receiver: str) -> Tensor:
        """Mean share moved by each head [layers, heads], NaN where the head is no sender or not earlier.

        Args:
            receiver: One of `receivers`.
        """
        j = self._at(self.senders[0], receiver)[1]
        table = torch.full((self.n_layers, self.n_heads), torch.nan)
        for i, name in enumerate(self.senders):
            layer, _, head = name.partition("@")[0].removeprefix("L").partition("H")
            if layer.isdigit() and head.isdigit():
                table[int(layer), int(head)] = self.mean[i, j]
        return table

    def heatmap(self, receiver: str) -> Markup:
        """An SVG heatmap of `heads`.

        Args:
            receiver: One of `receivers`.
        """
        return heatmap_html(
            rows=[f"L{layer}" for layer in range(self.n_layers)],
            columns=[f"H{head}" for head in range(self.n_heads)],
            values=_plain(self.heads(receiver)),
            title=f"share of the {self.metric.replace('_', ' ')} that each head moves through {receiver}",
            units="share of the difference",
            scale="diverging",
            row_axis="layer",
            column_axis="head",
        )

    def to_json(self) -> dict[str, Any]:
        """Mean shares with intervals, tests and controls, by [sender][receiver]."""
        low, high = self.interval()
        return {
            "model": self.model,
            "metric": self.metric,
            "direction": self.direction,
            "mlps": self.mlps,
            "n": self.n,
            "dropped": self.dropped,
            "senders": list(self.senders),
            "receivers": list(self.receivers),
            "mean": _plain(self.mean),
            "low": _plain(low),
            "high": _plain(high),
            "p": _plain(self.p),
            "q": _plain(self.q),
            "random_senders": _plain(self.random.nanmean(-1)),
            "clean": self.clean.mean().item(),
            "corrupt": self.corrupt.mean().item(),
        }

    def _head(self) -> str:
        return (
            f"paths of {self.model}, {self.direction}, MLPs {'recomputed' if self.mlps == 'recompute' else 'frozen'}: "
            f"{self.metric} clean {self.clean.mean():.2f}, corrupt {self.corrupt.mean():.2f}, n {self.n}"
        )

    def summary(self) -> str:
        """The paths that move most, beside random other senders (`print(grid)` has the whole table)."""
        sizes = self.mean.abs().nan_to_num(-1.0).flatten()
        lines = [self._head()]
        for at in sizes.argsort(descending=True, stable=True).tolist()[:8]:
            if sizes[at] < 0:
                break
            i, j = divmod(at, len(self.receivers))
            effect = self.effect(self.senders[i], self.receivers[j])
            beside = [f"; {one.name} {one.value:.3f}" for one in effect.controls]
            lines.append(f"  {effect.name}: {effect.value:.3f} {interval_text(effect.interval)}{''.join(beside)}")
        return "\n".join(lines)

    def rows(self) -> list[dict[str, Any]]:
        """One row per path."""
        low, high = self.interval()
        tables = {"value": self.mean, "low": low, "high": high, "control": self.random.nanmean(-1)}
        tables |= {"p": self.p, "q": self.q}
        return [
            {
                "sender": sender,
                "receiver": receiver,
                **{name: table[i, j].item() for name, table in tables.items()},
                "n": self.n - self.dropped,
            }
            for i, sender in enumerate(self.senders)
            for j, receiver in enumerate(self.receivers)
            if not self.mean[i, j].isnan()
        ]

    def drawing(self) -> Markup:
        """A heatmap of mean shares, senders × receivers."""
        return heatmap_html(
            rows=list(self.senders),
            columns=list(self.receivers),
            values=_plain(self.mean),
            title=f"share of the {self.metric.replace('_', ' ')} that each path moves",
            units="share of the difference",
            scale="diverging",
            row_axis="sender",
            column_axis="receiver",
        )

    def __str__(self) -> str:
        most = self.mean.abs().nan_to_num(-1.0).amax(1)
        shown = most.argsort(descending=True).tolist()[:20]
        first = max(8, *(len(self.senders[i]) + 2 for i in shown))
        width = max(9, *(len(name) + 2 for name in self.receivers))
        lines = [self._head(), " " * first + "".join(f"{name:>{width}}" for name in self.receivers)]
        for i in shown:
            cells = ["–" if math.isnan(value) else f"{value:.3f}" for value in self.mean[i].tolist()]
            lines.append(f"{self.senders[i]:<{first}}" + "".join(f"{cell:>{width}}" for cell in cells))
        if len(shown) < len(self.senders):
            lines.append(f"… and {len(self.senders) - len(shown)} senders that move less")
        control = [math.nan if row.isnan().all() else row.nanmean().item() for row in self.random.transpose(0, 1)]
        cells = "".join(f"{'–' if math.isnan(value) else f'{value:.3f}':>{width}}" for value in control)
        lines.append(f"{'random':<{first}}{cells}")
        return "\n".join(lines)


def _plain(values: Tensor) -> list[list[float | None]]:
    return [[None if math.isnan(value) else value for value in row] for row in values.tolist()]
