"""What interchange interventions found: one place beside its controls, or a grid of places."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.results import Choices, Control, Effect, interval_text
from cutaway.artifacts.statistics import bootstrap_interval, wilson_interval
from cutaway.causal.abstraction.causal_model import Swap
from cutaway.causal.effects import effects_drawing
from cutaway.draw.heatmap import heatmap_html
from cutaway.draw.result import Result


@dataclass(frozen=True)
class Place:
    """Where a variable stands: a site at a role, or heads, neurons or a subspace of it."""

    site: str
    """A site of the model, with its layer."""
    role: str
    """One of the example's positions, or "last"."""
    source_role: str | None = None
    """The role in the source, where it has another one."""
    heads: tuple[int, ...] | None = None
    """Heads of it; None: the whole value."""
    neurons: tuple[int, ...] | None = None
    """Entries of its last dimension; None: all."""
    basis: Tensor | None = field(default=None, repr=False, compare=False)
    """Directions [k, width]; only the part within their span is taken."""

    def __str__(self) -> str:
        parts = [f"heads {list(self.heads)}"] if self.heads is not None else []
        parts += [f"{len(self.neurons)} neurons"] if self.neurons is not None else []
        parts += [f"{len(self.basis)} directions"] if self.basis is not None else []
        which = f" ({', '.join(parts)})" if parts else ""
        return f"{self.site}{which} at {self.role}"


Alignment = Mapping[str, Sequence[Place]]
"""The places of each variable that is taken from the source; several variables are taken together."""


@dataclass(frozen=True, repr=False)
class Interchanged(Result):
    """What swapping a place does, over the pairs that the network answers rightly before.

    Controls are None or empty where there is nothing to draw from.
    """

    title: ClassVar[str] = "Interchange intervention"

    model: str
    """Name of the model."""
    variables: tuple[str, ...]
    """The variables that were taken from the source."""
    place: str
    """Their places, in words."""
    role: str
    """The roles of these places."""
    follows: Tensor
    """Whether the network answers as the causal model does with the variable taken from the source, bool [n]."""
    changes: Tensor
    """Whether that is another answer than before, bool [n]; where it is not, following means to be left alone."""
    elsewhere: Tensor
    """`follows` with the place at a random other position [draws, n]."""
    shuffled: Tensor
    """… with another pair's source that has another value [draws, n]."""
    far: Tensor
    """… in the layer farthest away [1, n]."""
    random: Tensor | None
    """… with random heads, neurons or directions instead of those named [draws, n]."""
    evaluation: str
    """What the pairs are."""
    refused: tuple[tuple[Swap, str], ...] = ()
    """The pairs left out, with the reason."""

    @property
    def n(self) -> int:
        """Pairs whose answer should change."""
        return int(self.changes.sum())

    @property
    def iia(self) -> float:
        """Interchange intervention accuracy over the pairs whose answer should change."""
        return float(self.follows[self.changes].float().mean()) if self.n else float("nan")

    @property
    def left_alone(self) -> tuple[int, int]:
        """Of the pairs whose answer should not change: how many did not, and how many there are."""
        same = ~self.changes
        return int(self.follows[same].sum()), int(same.sum())

    def effect(self) -> Effect:
        """The IIA beside its controls, over the pairs whose answer should change."""
        controls = [
            _control("random other position", self.elsewhere[:, self.changes]),
            _control("source with another value", self.shuffled[:, self.changes]),
            _control("the same place in the farthest layer", self.far[:, self.changes]),
        ]
        if self.random is not None:
            controls.append(_control("random part of the same size", self.random[:, self.changes]))
        right = int(self.follows[self.changes].sum())
        return Effect(
            name=f"interchange of {', '.join(self.variables)} at {self.place}",
            value=self.iia,
            n=self.n,
            interval=wilson_interval(right, self.n),
            controls=tuple(control for control in controls if control is not None),
            ablation="interchange: the place taken from the source prompt's run",
            units="share answered as the causal model does",
            choices=Choices(
                granularity="node" if self.random is None else "subspace",
                component=self.place,
                ablation="interchange",
                positions=self.role,
                direction="noise",
                evaluation=self.evaluation,
            ),
        )

    def summary(self) -> str:
        """The share of swaps that the network follows, beside its controls."""
        return str(self)

    def rows(self) -> list[dict[str, Any]]:
        """One row for the swap, and one for each control."""
        effect = self.effect()
        return [
            {
                "measured": one.name, "value": one.value, "low": (one.interval or (None, None))[0],
                "high": (one.interval or (None, None))[1], "n": one.n,
            }
            for one in (effect, *effect.controls)
        ]  # fmt: skip

    def drawing(self) -> Markup:
        """The share of swaps that is followed, with its interval, beside its controls."""
        return effects_drawing([self.effect()], self.title)

    def to_json(self) -> dict[str, Any]:
        """The effect, how often the answer stays where it should, and what was left out."""
        kept, same = self.left_alone
        return {
            "model": self.model,
            "effect": self.effect().to_json(),
            "left_alone": {"right": kept, "n": same, "interval": list(wilson_interval(kept, same))},
            "refused": [
                {"base": base.prompt, "source": source.prompt, "reason": why} for (base, source), why in self.refused
            ],
        }

    def __str__(self) -> str:
        effect = self.effect()
        lines = [f"{effect.name}: {effect.value:.2f} ({interval_text(effect.interval, 2, to=True)}), n {effect.n}"]
        for control in effect.controls:
            lines.append(f"  {control.name}: {control.value:.2f} ({interval_text(control.interval, 2, to=True)})")
        kept, same = self.left_alone
        lines += [f"  left alone where the answer stays: {kept} of {same}"] if same else []
        lines += [f"  {len(self.refused)} pairs left out"] if self.refused else []
        return "\n".join(lines)


def _control(name: str, outcomes: Tensor) -> Control | None:
    """A rate over draws and pairs; its interval is over pairs."""
    if not outcomes.numel():
        return None
    per_pair = outcomes.float().mean(0).numpy()
    whole = len(outcomes) == 1
    ends = wilson_interval(int(outcomes.sum()), outcomes.shape[1]) if whole else bootstrap_interval(per_pair)
    return Control(name, float(per_pair.mean()), ends, len(per_pair))


@dataclass(frozen=True, repr=False)
class InterchangeGrid(Result):
    """Interchange intervention accuracy of one site by layer × role, for n pairs whose answer should change."""

    title: ClassVar[str] = "Interchange interventions"

    model: str
    """Name of the model."""
    variable: str
    """The variable that was taken from the source."""
    site: str
    """With `{l}` where the layer stands."""
    layers: tuple[int, ...]
    """The rows."""
    roles: tuple[str, ...]
    """The columns."""
    follows: Tensor
    """Whether the network answers as the causal model does, bool [layers, roles, n]."""
    refused: tuple[tuple[Swap, str], ...] = ()
    """The pairs left out, with the reason."""

    @property
    def n(self) -> int:
        """Pairs whose answer should change."""
        return int(self.follows.shape[-1])

    @property
    def iia(self) -> Tensor:
        """Interchange intervention accuracy [layers, roles]."""
        return self.follows.float().mean(-1)

    def place(self, roles: Sequence[str] | None = None) -> Place:
        """The place with the highest IIA, the earliest layer of equals, among these roles (default: all).

        Args:
            roles: The candidates; None: all.
        """
        chosen = self.iia.clone()
        for j, role in enumerate(self.roles):
            if roles is not None and role not in roles:
                chosen[:, j] = -1.0
        layer, j = divmod(int(chosen.argmax()), len(self.roles))
        return Place(self.site.format(l=self.layers[layer]), self.roles[j])

    def summary(self) -> str:
        """The five places with the highest accuracy."""
        lines = [f"interchange of {self.variable} at {self.site}: accuracy, n {self.n}"]
        for at in self.iia.flatten().argsort(descending=True, stable=True).tolist()[:5]:
            i, j = divmod(at, len(self.roles))
            ends = interval_text(wilson_interval(int(self.follows[i, j].sum()), self.n), 2)
            lines.append(f"  L{self.layers[i]} at {self.roles[j]}: {self.iia[i, j]:.2f} {ends}")
        return "\n".join(lines)

    def rows(self) -> list[dict[str, Any]]:
        """One row per layer and role."""
        found = []
        for i, layer in enumerate(self.layers):
            for j, role in enumerate(self.roles):
                low, high = wilson_interval(int(self.follows[i, j].sum()), self.n)
                found.append(
                    {
                        "layer": layer,
                        "role": role,
                        "value": self.iia[i, j].item(),
                        "low": low,
                        "high": high,
                        "n": self.n,
                    }
                )
        return found

    def drawing(self) -> Markup:
        """A heatmap of the accuracy, layer × role."""
        return heatmap_html(
            rows=[f"L{layer}" for layer in self.layers],
            columns=list(self.roles),
            values=self.iia.tolist(),
            title=f"share of swaps of {self.variable} after which the model answers as the causal model does",
            units="share of pairs",
            row_axis="layer",
            column_axis="role",
        )

    def to_json(self) -> dict[str, Any]:
        """Accuracies and intervals by [layer][role]."""
        return {
            "model": self.model,
            "variable": self.variable,
            "site": self.site,
            "layers": list(self.layers),
            "roles": list(self.roles),
            "n": self.n,
            "iia": self.iia.tolist(),
            "intervals": [
                [list(wilson_interval(int(cell.sum()), self.n)) for cell in row] for row in self.follows
            ],
        }  # fmt: skip

    def __str__(self) -> str:
        width = max(8, *(len(role) + 2 for role in self.roles))
        lines = [
            f"interchange of {self.variable} at {self.site}: IIA, n {self.n}",
            " " * 6 + "".join(f"{role:>{width}}" for role in self.roles),
        ]
        for layer, row in zip(self.layers, self.iia.tolist(), strict=True):
            lines.append(f"  L{layer:<3} " + "".join(f"{value:>{width}.2f}" for value in row))
        return "\n".join(lines)
