"""What causal tracing found: average indirect effects, layer × role, for states, attention and MLPs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.results import Choices, Control, Effect, interval_text
from cutaway.artifacts.statistics import bootstrap_interval, false_discovery, mean_intervals, sign_flip_p_of_each
from cutaway.causal.tracing.prompts import BEHIND, IN_SUBJECT, ROLES, FactPrompt
from cutaway.draw.charts import effects_html
from cutaway.draw.heatmap import heatmap_html, heatmap_scale
from cutaway.draw.result import Result

TraceKind = Literal["state", "attention", "MLP"]
"""What is restored: one state of the stream, or what attention or the MLPs write in a window of layers."""
SITES: dict[TraceKind, str] = {"state": "resid_post", "attention": "attn.out", "MLP": "mlp.out"}
HEADINGS: dict[TraceKind, str] = {
    "state": "Restoring one state of the stream",
    "attention": "Restoring what attention writes",
    "MLP": "Restoring what the MLPs write",
}
_UNITS = "probability of the answer"
_OTHER = "random other position"
_ROUNDING = 1e-6
_LEAST = 3  # prompts of a half with a role that can be chosen


@dataclass(frozen=True, repr=False)
class CausalTrace(Result):
    """Indirect effects of n prompts, layer × position, for states, attention and MLPs, in probability."""

    title: ClassVar[str] = "Causal tracing"

    model: str
    """Name of the model."""
    n_layers: int
    """Layers of the model."""
    facts: tuple[FactPrompt, ...]
    """The prompts that were traced."""
    answers: tuple[str, ...]
    """The first token of each answer."""
    tokens: tuple[tuple[str, ...], ...]
    """The tokens of each prompt."""
    starts: tuple[int, ...]
    """Position of each subject's first token."""
    sigma: float
    """One standard deviation of the subject tokens' embeddings."""
    multiple: float
    """How many of them the noise has."""
    draws: int
    """Draws of the noise per prompt."""
    window: int
    """Layers in which attention and MLP outputs are restored together."""
    seed: int
    """Of the noise."""
    clean: Tensor
    """Probability of the answer in the plain run [n]."""
    noised: Tensor
    """The same in the noised runs [n]."""
    again: Tensor
    """The same in noised runs of other draws [n]."""
    elsewhere: Tensor
    """The same with the noise on as many tokens that are not the subject's [n]; NaN where a prompt has none."""
    effects: dict[TraceKind, Tensor]
    """By kind [layers, k, n]: the indirect effect of the token k places behind the subject's first, mean over draws;
    NaN behind the end of a prompt."""
    roles: Tensor
    """Indices into `ROLES` [k, n], -1 behind the end."""
    refused: tuple[tuple[FactPrompt, str], ...] = ()
    """The prompts that were left out, with the reason."""

    @property
    def n(self) -> int:
        """How many prompts were traced."""
        return len(self.facts)

    @property
    def guessed(self) -> int:
        """How many prompts came without an answer: for them the model's own, right or wrong, stands in its place."""
        return sum(fact.answer is None for fact in self.facts)

    @property
    def which(self) -> str:
        """How many prompts, and whose answers they are judged by."""
        words = [f"{self.n - self.guessed} answered rightly"] if self.guessed < self.n else []
        words += [f"{self.guessed} with the model's own guess, not known to be right"] if self.guessed else []
        first, *rest = words
        count, how = first.split(" ", 1)
        return ", ".join([f"{count} prompt{'s' * (count != '1')} {how}", *rest])

    @property
    def columns(self) -> tuple[str, ...]:
        """The roles that some prompt has, in the order of the tokens."""
        return tuple(role for i, role in enumerate(ROLES) if bool((self.roles == i).any()))

    @property
    def counts(self) -> tuple[int, ...]:
        """How many prompts have each of `columns`."""
        return tuple(int((self.roles == ROLES.index(role)).any(0).sum()) for role in self.columns)

    def by_role(self, kind: TraceKind) -> Tensor:
        """Indirect effect [layers, columns, n]: each prompt's mean over its tokens of a role, NaN where it has none.

        Args:
            kind: What was restored.
        """
        masks = torch.stack([self.roles == ROLES.index(role) for role in self.columns])
        return _mean(self.effects[kind][:, None], masks[None])

    def elsewhere_by_role(self, kind: TraceKind) -> Tensor:
        """The control [layers, columns, n]: each prompt's mean over its tokens, from the subject's first on, that do
        not have the role; this is the expectation of restoring one random other position.

        Args:
            kind: What was restored.
        """
        masks = torch.stack([(self.roles >= 0) & (self.roles != ROLES.index(role)) for role in self.columns])
        values = _mean(self.effects[kind][:, None], masks[None])
        return torch.where(self.by_role(kind).isnan(), torch.full_like(values, torch.nan), values)

    def aie(self, kind: TraceKind) -> Tensor:
        """Average indirect effect [layers, columns], over the prompts that have the role.

        Args:
            kind: What was restored.
        """
        return self.by_role(kind).nanmean(-1)

    def interval(self, kind: TraceKind, n_resamples: int = 2000, seed: int = 0) -> Tensor:
        """95 % interval of the AIE over the prompts with the role [2, layers, columns]; NaN below two of them.

        Args:
            kind: What was restored.
            n_resamples: Draws of the bootstrap.
            seed: Of these draws.
        """
        values = self.by_role(kind).double().numpy()
        ends = np.full((2, *values.shape[:2]), np.nan)
        for at in range(values.shape[1]):
            has = ~np.isnan(values[0, at])
            ends[..., at] = mean_intervals(values[:, at, has], n_resamples, seed)
        return torch.from_numpy(ends).float()

    def p(self, kind: TraceKind) -> Tensor:
        """Two-sided p [layers, columns] of each cell against a random other position, by flipping prompts' signs.

        Args:
            kind: What was restored.
        """
        difference = (self.by_role(kind) - self.elsewhere_by_role(kind)).double()
        # differences of rounding alone would have a small p
        difference[difference.abs() <= _ROUNDING] = 0.0
        found = sign_flip_p_of_each(difference.flatten(0, 1).numpy())
        return torch.from_numpy(found).view(difference.shape[:2])

    def q(self, kind: TraceKind) -> Tensor:
        """The rate of false discoveries [layers, columns] among all cells of a kind with a p as small.

        Args:
            kind: What was restored.
        """
        return torch.from_numpy(false_discovery(self.p(kind).numpy()))

    def discoveries(self, kind: TraceKind) -> str:
        """How many cells stand out from other positions, with one in twenty of them expected to be false.

        Args:
            kind: What was restored.
        """
        q = self.q(kind)
        return f"{int((q <= 0.05).sum())} of {int((~q.isnan()).sum())} cells have q at most 0.05"

    def _choices(self, component: str, positions: str) -> Choices:
        return Choices(
            granularity="node",
            component=component,
            ablation=f"gaussian noise of {self.multiple:g} σ (σ = {self.sigma:.4g}) on the subject's embeddings, "
            f"{self.draws} draws",
            positions=positions,
            direction="denoise",
            evaluation=f"{self.which} ({self.model})",
        )

    def total_effect(self) -> Effect:
        """What the noise takes from the answer, beside the same noise on as many other tokens."""
        loss, other = (self.clean - self.noised).numpy(), (self.clean - self.elsewhere).numpy()
        other = other[~np.isnan(other)]
        controls = (
            (Control("same noise on other tokens", float(other.mean()), bootstrap_interval(other), len(other)),)
            if len(other)
            else ()
        )
        return Effect(
            name="total effect of noise on the subject",
            value=float(loss.mean()),
            n=self.n,
            interval=bootstrap_interval(loss),
            controls=controls,
            ablation=f"noise of {self.multiple:g} σ on the subject's embeddings",
            units="probability of the answer",
            choices=self._choices("embed", "subject"),
        )

    def effect(self, kind: TraceKind, layer: int, role: str, *, prompts: Sequence[int] | None = None) -> Effect:
        """One cell's average indirect effect, beside restoring a random other position and restoring nothing.

        Args:
            kind: What was restored.
            layer: In which layer (the middle of a window).
            role: At which of `columns`.
            prompts: Those that it is measured on, by number; None: all.
        """
        if not 0 <= layer < self.n_layers or role not in self.columns:
            raise CutawayError(
                f"this trace has no cell ({layer}, {role!r}); its layers are 0 to {self.n_layers - 1}, its roles "
                f"{', '.join(repr(column) for column in self.columns)}"
            )
        pick = list(range(self.n)) if prompts is None else list(prompts)
        at = self.columns.index(role)
        values, others = (
            found[layer, at, pick].numpy() for found in (self.by_role(kind), self.elsewhere_by_role(kind))
        )
        known = ~np.isnan(values)
        values, others = values[known], others[known & ~np.isnan(others)]
        nothing = (self.again - self.noised)[pick].numpy()[known]
        what = f"{SITES[kind]} of L{layer}" if kind == "state" else f"{SITES[kind]} of {self.layers_of(layer)}"
        named = [(_OTHER, others)] if len(others) else []
        return Effect(
            name=f"restoring {what} at “{role}”",
            value=float(values.mean()) if len(values) else math.nan,
            n=len(values),
            interval=bootstrap_interval(values),
            controls=tuple(
                Control(name, float(found.mean()), bootstrap_interval(found), len(found))
                for name, found in (*named, ("restoring nothing, other draws of the noise", nothing))
            ),
            ablation=f"noise of {self.multiple:g} σ on the subject, then one clean value put back",
            units="probability of the answer",
            choices=self._choices(what, role),
        )

    def best(self, kind: TraceKind, roles: Sequence[str] = ROLES) -> Effect | None:
        """The cell with the largest AIE among some roles, chosen on every second prompt and measured on the others (8
        or more prompts); with fewer, chosen and measured on all of them, which flatters it. A role that fewer than 3
        prompts of either half have is no candidate; None where there is none.

        States after the last layer are no candidates: at the last token they are the answer itself.

        Args:
            kind: What was restored.
            roles: The candidates.
        """
        held_out = self.n >= 8
        values = self.by_role(kind)
        means = (values[..., 0::2] if held_out else values).nanmean(-1).nan_to_num(-torch.inf)
        for at, column in enumerate(self.columns):
            has = ~values[0, at].isnan()
            scarce = held_out and min(int(has[0::2].sum()), int(has[1::2].sum())) < _LEAST
            if column not in roles or scarce:
                means[:, at] = -torch.inf
        if kind == "state":
            means[-1] = -torch.inf
        if not bool(means.isfinite().any()):
            return None
        layer, at = divmod(int(means.argmax()), len(self.columns))
        odd = range(1, self.n, 2) if held_out else None
        return self.effect(kind, layer, self.columns[at], prompts=odd)

    def sites(self, kind: TraceKind) -> list[Effect]:
        """The largest effect on the subject (the paper's "early site") and the largest behind it (the "late site").

        Args:
            kind: What was restored.
        """
        found = (self.best(kind, roles) for roles in (IN_SUBJECT, BEHIND))
        return [effect for effect in found if effect is not None]

    def layers_of(self, layer: int) -> str:
        """The window of layers around one, as it is restored for attention and MLPs.

        Args:
            layer: The middle of the window.
        """
        first, last = window_of(layer, self.window, self.n_layers)
        return f"L{first}" if first == last else f"L{first}-L{last}"

    def to_json(self) -> dict[str, Any]:
        """Grids by role with intervals and tests, and each prompt's effects by token."""
        grids = {}
        for kind in SITES:
            low, high = self.interval(kind)
            grids[kind] = {
                "site": SITES[kind],
                "window": 1 if kind == "state" else self.window,
                "aie": _plain(self.aie(kind)),
                "low": _plain(low),
                "high": _plain(high),
                "p": _plain(self.p(kind)),
                "q": _plain(self.q(kind)),
                "random_other_position": _plain(self.elsewhere_by_role(kind).nanmean(-1)),
                "largest": [effect.to_json() for effect in self.sites(kind)],
            }
        return {
            "model": self.model,
            "n": self.n,
            "n_layers": self.n_layers,
            "sigma": self.sigma,
            "noise_in_sigma": self.multiple,
            "draws": self.draws,
            "seed": self.seed,
            "roles": list(self.columns),
            "prompts_with_role": [
                int((self.roles == ROLES.index(role)).any(0).sum()) for role in self.columns
            ],
            "total_effect": self.total_effect().to_json(),
            "clean": self.clean.mean().item(),
            "noised": self.noised.mean().item(),
            "grids": grids,
            "prompts": [
                {
                    "prompt": fact.prompt,
                    "subject": fact.subject,
                    "answer": answer,
                    "guessed": fact.answer is None,
                    "clean": clean,
                    "noised": noised,
                    "tokens": list(strings[start:]),
                    "effects": {
                        kind: values[:, : len(strings) - start, row].tolist() for kind, values in self.effects.items()
                    },
                }
                for row, (fact, answer, clean, noised, strings, start) in enumerate(
                    zip(
                        self.facts, self.answers, self.clean.tolist(), self.noised.tolist(), self.tokens, self.starts,
                        strict=True,
                    )
                )
            ],
            "refused": [{"prompt": fact.prompt, "reason": reason} for fact, reason in self.refused],
        }  # fmt: skip

    def _head(self) -> list[str]:
        total = self.total_effect()
        return [
            f"causal tracing of {self.model}: {self.which}"
            + (f"; {len(self.refused)} more answered otherwise are left out" if self.refused else ""),
            f"P(answer) {self.clean.mean():.3f} plain, {self.noised.mean():.3f} with noise of {self.multiple:g} σ (σ = "
            f"{self.sigma:.4g}) on the subject, {self.draws} draws: total effect "
            f"{(self.clean - self.noised).mean():.3f}",
            *([f"  {_beside(total)}"] if total.controls else []),
        ]

    def summary(self) -> str:
        """What the noise takes, and the largest cells on the subject and behind it, beside their controls."""
        return "\n".join([*self._head(), *(f"  {_beside(effect)}" for kind in SITES for effect in self.sites(kind))])

    def rows(self) -> list[dict[str, Any]]:
        """One row per kind, layer and role."""
        found = []
        for kind in SITES:
            low, high = self.interval(kind)
            other = self.elsewhere_by_role(kind).nanmean(-1)
            tables = {"value": self.aie(kind), "low": low, "high": high, "control": other}
            tables |= {"p": self.p(kind), "q": self.q(kind)}
            for layer in range(self.n_layers):
                for at, (role, count) in enumerate(zip(self.columns, self.counts, strict=True)):
                    figures = {name: table[layer, at].item() for name, table in tables.items()}
                    found.append({"kind": kind, "layer": layer, "role": role, **figures, "n": count})
        return found

    def drawing(self) -> Markup:
        """Three heatmaps, layer × role (× token where one prompt was traced), with the largest cells' effects."""
        return Markup("").join(self.heatmap(kind) for kind in SITES)

    def heatmap(self, kind: TraceKind) -> Markup:
        """The heatmap of one kind, on the scale of all three, and its largest cells' effects beside their controls.

        Args:
            kind: What was restored.
        """
        scale = heatmap_scale([row for one in SITES for row in self._grid(one)], diverging=True)
        single = self.n == 1
        drawn = heatmap_html(
            rows=[f"L{layer}" for layer in range(self.n_layers)],
            columns=list(self.tokens[0][self.starts[0] :]) if single else list(self.columns),
            values=self._grid(kind),
            title=f"{HEADINGS[kind]}: probability that comes back, by layer and {'token' if single else 'role'}",
            units=_UNITS,
            row_axis="layer",
            column_axis="token restored",
            scale=scale,
        )
        return drawn + effects_html(effect for effect in self.sites(kind) if effect.controls)

    def _grid(self, kind: TraceKind) -> list[list[float | None]]:
        return _plain(self.effects[kind][..., 0] if self.n == 1 else self.aie(kind))

    def __str__(self) -> str:
        lines = self._head()
        width = [max(8, len(name) + 2) for name in self.columns]
        for kind in SITES:
            where = "one layer" if kind == "state" else f"windows of {self.window} layer{'s' * (self.window != 1)}"
            lines.append("")
            lines.append(f"average indirect effect of {SITES[kind]}, {where}")
            lines.append(" " * 6 + "".join(f"{name:>{w}}" for name, w in zip(self.columns, width, strict=True)))
            for layer, row in enumerate(self.aie(kind).tolist()):
                cells = "".join(
                    f"{'–' if math.isnan(value) else f'{value:.3f}':>{w}}" for value, w in zip(row, width, strict=True)
                )
                lines.append(f"  L{layer:<3} {cells}")
            lines.append("  n    " + "".join(f"{n:>{w}}" for n, w in zip(self.counts, width, strict=True)))
            lines += [f"  {_beside(effect)}" for effect in self.sites(kind)]
            lines += [f"  {self.discoveries(kind)}"] if self.n > 1 else []
        return "\n".join(lines)


def _plain(values: Tensor) -> list[list[float | None]]:
    return [[None if math.isnan(value) else value for value in row] for row in values.tolist()]


def _beside(effect: Effect) -> str:
    """An effect and its controls as one line."""

    def written(one: Effect | Control) -> str:
        ends = interval_text(one.interval, to=True)
        return f"{one.value:.3f}" + ("" if ends == "–" else f" ({ends})")

    beside = "; ".join(f"{control.name} {written(control)}" for control in effect.controls)
    return f"{effect.name}: {written(effect)}, n {effect.n}" + (f"; control: {beside}" if beside else "")


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over dimension -2 where `mask` is True; NaN where it is nowhere."""
    mask = mask.expand(*mask.shape[:-2], *values.shape[-2:])
    count = mask.sum(-2)
    total = torch.where(mask, values, torch.zeros_like(values)).sum(-2)
    return torch.where(count > 0, total / count.clamp(min=1), torch.full_like(total, torch.nan))


def window_of(layer: int, window: int, n_layers: int) -> tuple[int, int]:
    """First and last layer of the window around a layer, cut at the ends of the model."""
    return max(0, layer - window // 2), min(n_layers, layer + (window + 1) // 2) - 1
