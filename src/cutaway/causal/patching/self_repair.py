"""Self-repair: what other parts make up for when attention heads are knocked out.

The direct effect of a head is what its own share of the logit difference loses, all else as it was: direct logit
attribution through the final norm with its divisor frozen at the clean run's. The total effect is what the logit
difference really loses. Their difference is self-repair: later parts write more, or suppress less, when the head is
gone, and the final norm divides by less (McGrath et al. 2023; Rushing & Nanda 2024). It adds up exactly, part by part:

    direct - total = sum over the other parts of (share after - share before) + what the norm's new divisor adds

A head with strong backups looks unimportant to any method that ablates one part at a time. Where it is negative, later
parts read the head, and its loss costs more than it wrote itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.progress import Progress
from cutaway.artifacts.results import Choices, Control, Effect, interval_text
from cutaway.artifacts.statistics import bootstrap_interval, sign_flip_p
from cutaway.causal.ablations import Ablation, ablation_of, replacement_run
from cutaway.causal.effects import effects_drawing
from cutaway.causal.patching.grid import LEAST_PAIRS
from cutaway.data.pairs import AlignedPairs, PromptPair, aligned
from cutaway.draw.result import Result
from cutaway.model.edits.edits import Edit, patch
from cutaway.model.language_model import LanguageModel
from cutaway.model.tokens import Tokens
from cutaway.observe.attribution.answers import Wrong
from cutaway.observe.attribution.parts import Group, difference_directions, split_difference, splittable_layers

Head = tuple[int, int]
NORM = "final norm"
_ROUNDING = 1e-4  # logits: what does not read the heads does not change


@dataclass(frozen=True, eq=False)
class KnockOut:
    """What one set of heads, knocked out together, changes, in logits: `direct`, `total` [n], `norm` [n] what the new
    divisor of the final norm adds, and `change` [n, parts] of every part's share (divisor frozen).
    """

    heads: tuple[Head, ...]
    direct: Tensor
    total: Tensor
    norm: Tensor
    change: Tensor

    @property
    def repair(self) -> Tensor:
        """Direct minus total effect [n]: what the rest of the model made up for."""
        return self.direct - self.total


@dataclass(frozen=True, eq=False, repr=False)
class SelfRepair(Result):
    """The knock-out of some heads beside that of random others, over n pairs' clean prompts, at their last token."""

    title: ClassVar[str] = "Self-repair"

    model: str
    """Name of the model."""
    removed: KnockOut
    """The heads that were asked for, knocked out together."""
    controls: tuple[KnockOut, ...]
    """Knock-outs of as many heads drawn at random from the others."""
    parts: tuple[str, ...]
    """Names of the parts, the columns of `before`."""
    before: Tensor
    """Each part's share of the logit difference in the clean run [n, parts]."""
    difference: Tensor
    """The logit difference in the clean run [n]."""
    ablation: str
    """What stood in a head's place."""
    evaluation: str
    """What the pairs are."""
    chosen_on: int
    """How many other pairs the heads were chosen on, 0 where the caller named them."""
    notes: tuple[str, ...] = ()
    """What the split of the logit difference leaves out."""

    @property
    def n(self) -> int:
        """How many pairs were measured."""
        return len(self.difference)

    @property
    def name(self) -> str:
        """The heads that were knocked out, such as "L9H6, L9H9"."""
        return ", ".join(f"L{layer}H{head}" for layer, head in self.removed.heads)

    def effects(self) -> list[Effect]:
        """Direct effect, total effect and self-repair, each beside the same of random heads."""
        return [
            self._effect(f"{what} of {self.name}", value, [get(one) for one in self.controls])
            for what, value, get in (
                ("direct effect", self.removed.direct, lambda one: one.direct),
                ("total effect", self.removed.total, lambda one: one.total),
                ("self-repair", self.removed.repair, lambda one: one.repair),
            )
        ]

    @property
    def p(self) -> float:
        """Two-sided p of the sign-flip test of self-repair against that of random heads."""
        control = torch.stack([one.repair for one in self.controls]).mean(0)
        return sign_flip_p((self.removed.repair - control).numpy())

    def made_up(self, k: int | None = None) -> list[Effect]:
        """How much the direct effect of each other part grows, the k largest by size, beside its growth without random
        heads instead; the final norm's part among them. Parts that do not change are left out.

        Args:
            k: How many; None: all.
        """
        change = torch.cat([self.removed.change, self.removed.norm[:, None]], 1)
        controls = [torch.cat([one.change, one.norm[:, None]], 1) for one in self.controls]
        own = {f"L{layer}H{head}" for layer, head in self.removed.heads}
        names = [*self.parts, NORM]
        order = change.mean(0).abs().argsort(descending=True, stable=True).tolist()
        order = [i for i in order if names[i] not in own and float(change[:, i].abs().max()) > _ROUNDING][:k]
        return [
            self._effect(f"growth of {names[i]} without {self.name}", change[:, i], [c[:, i] for c in controls])
            for i in order
        ]

    def _effect(self, name: str, value: Tensor, controls: list[Tensor]) -> Effect:
        random = torch.stack(controls).mean(0)
        count = len(self.removed.heads)
        what = f"{len(self.controls)} draws of {count} random other head{'s' * (count > 1)}"
        return Effect(
            name=name,
            value=value.mean().item(),
            n=self.n,
            interval=bootstrap_interval(value.numpy()),
            controls=(Control(what, random.mean().item(), bootstrap_interval(random.numpy()), self.n),),
            ablation=f"{self.ablation} at the last token",
            units="logits",
            choices=Choices("node", f"attn.z of {self.name}", self.ablation, "last", "noise", self.evaluation),
        )

    def _whole(self) -> Any:
        return self.to_json(k=len(self.made_up()))

    def to_json(self, k: int = 10) -> dict[str, Any]:
        """The three effects, and the k parts that grow most.

        Args:
            k: How many of the parts that grow.
        """
        return {
            "model": self.model,
            "heads": [list(head) for head in self.removed.heads],
            "ablation": self.ablation,
            "evaluation": self.evaluation,
            "chosen_on": self.chosen_on,
            "n": self.n,
            "difference": self.difference.mean().item(),
            "effects": [effect.to_json() for effect in self.effects()],
            "p": self.p,
            "made_up": [effect.to_json() for effect in self.made_up(k)],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return self.table()

    def summary(self) -> str:
        """Direct effect, total effect and their difference, and the 3 parts that grow most, beside random heads."""
        return self.table(3)

    def rows(self) -> list[dict[str, Any]]:
        """One row per effect: the three, then what each other part grows."""
        return [
            {
                "effect": effect.name, "value": effect.value, "low": (effect.interval or (None, None))[0],
                "high": (effect.interval or (None, None))[1], "control": effect.controls[0].value, "n": effect.n,
            }
            for effect in [*self.effects(), *self.made_up()]
        ]  # fmt: skip

    def drawing(self) -> Markup:
        """The three effects and the 8 parts that grow most, with intervals, beside random heads."""
        return effects_drawing([*self.effects(), *self.made_up(8)], self.title)

    def short(self, effect: Effect) -> str:
        """An effect's name without the heads'.

        Args:
            effect: One of `effects()` or `made_up()`.
        """
        return effect.name.removesuffix(f" without {self.name}").removesuffix(f" of {self.name}")

    def table(self, k: int = 8) -> str:
        """Direct, total and the difference, and the parts that made up for it, beside random heads.

        Args:
            k: How many of the parts that grow.
        """
        lines = [
            f"self-repair after knocking out {self.name} ({self.ablation}, at the last token), {self.model}: logit "
            f"difference {self.difference.mean():.2f}, n {self.n}",
            f"  {'':<34}{'logits':>9}{'95 % interval':>20}{'random heads':>14}",
        ]
        for effect in [*self.effects(), *self.made_up(k)]:
            random, ends = effect.controls[0].value, interval_text(effect.interval)
            lines.append(f"  {self.short(effect):<34}{effect.value:>9.3f}{ends:>20}{random:>14.3f}")
        said = "more is lost than the heads write: later parts read them" if self.removed.repair.mean() < 0 else ""
        lines.append(f"  self-repair is direct minus total effect; p against random heads {self.p:.2g}")
        lines += [f"  it is negative: {said}"] if said else []
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def self_repair(
    lm: LanguageModel,
    pairs: Sequence[PromptPair] | AlignedPairs,
    *,
    heads: Sequence[Head] | None = None,
    k: int = 1,
    ablation: Ablation | str = "resample",
    draws: int = 4,
    seed: int = 0,
    evaluation: str = "",
) -> SelfRepair:
    """Knock heads out at the last token of the clean prompts, and measure what the others make up for.

    McGrath et al. 2023 (https://arxiv.org/abs/2307.15771); Rushing & Nanda 2024 (https://arxiv.org/abs/2402.15390).

    Args:
        lm: The model.
        pairs: Prompt pairs.
        heads: (layer, head) pairs, knocked out together. Without them the `k` heads with the largest direct effect of
            that ablation are taken, chosen on every second pair and measured on the others.
        k: How many heads to choose.
        ablation: What stands in place of a head's z.
        draws: Sets of as many other heads that are the control.
        seed: Of these draws.
        evaluation: What the pairs are, in words, for the record.

    Returns:
        Direct and total effect in logits, of the logit difference before a final softcap, and each part's growth.

    Raises:
        CutawayError: A head that the model has not; fewer than 8 pairs to choose on; too few heads for a control.
        NotSupported: A model whose logit difference cannot be split by head.

    Example:
        >>> lm = cutaway.load("atlas")
        >>> pairs = cutaway.data.readable_pairs(lm, cutaway.data.known_task("world indirect object"), 4)
        >>> repair = self_repair(lm, pairs, heads=[(6, 5)], draws=1)
        >>> repair.name, repair.n
        ('L6H5', 4)
    """
    ready = aligned(lm, pairs)
    choice = ablation_of(ablation)
    layers = splittable_layers(lm, "head")
    every = [(layer, head) for layer in sorted(layers) for head in range(lm.n_heads)]
    for head in heads or ():
        if tuple(head) not in every:
            raise CutawayError(f"{lm.name} has no head L{head[0]}H{head[1]} whose share of an answer can be told apart")
    count = k if heads is None else len({tuple(head) for head in heads})
    if not 1 <= count <= len(every) // 2:
        raise CutawayError(f"{count} of {len(every)} heads cannot be knocked out beside as many others; name fewer")
    setup = _Setup(lm, ready, choice, layers)
    rows = torch.arange(len(ready))
    if heads is None:
        if len(ready) < LEAST_PAIRS:
            raise CutawayError(
                f"{len(ready)} pairs are too few to choose heads on one half and measure them on the other; give "
                f"{LEAST_PAIRS}, or name the heads"
            )
        direct = setup.direct_of_each(every)[0::2].mean(0)
        heads = [every[i] for i in direct.argsort(descending=True, stable=True)[:count].tolist()]
        rows = rows[1::2]
    removed = tuple((int(layer), int(head)) for layer, head in heads)
    others = [head for head in every if head not in removed]
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        tuple(others[i] for i in torch.randperm(len(others), generator=generator)[:count].tolist())
        for _ in range(draws)
    ]
    knocked: list[KnockOut] = []
    with Progress("knocking out", total=1 + draws, unit="sets") as progress:
        for chosen in (removed, *drawn):
            found = setup.knock_out(chosen)
            knocked.append(
                KnockOut(chosen, found.direct[rows], found.total[rows], found.norm[rows], found.change[rows])
            )
            progress.advance()
    return SelfRepair(
        model=lm.name,
        removed=knocked[0],
        controls=tuple(knocked[1:]),
        parts=setup.names,
        before=setup.before[rows],
        difference=setup.total[rows],
        ablation=str(choice),
        evaluation=evaluation or f"{len(ready)} prompt pairs",
        chosen_on=len(ready) - len(rows),
        notes=tuple(setup.notes),
    )


class _Setup:
    """The clean run's shares, and those of runs without some heads."""

    def __init__(self, lm: LanguageModel, pairs: AlignedPairs, ablation: Ablation, layers: set[int]) -> None:
        self.lm, self.pairs = lm, pairs
        self.tokens: Tokens = pairs.clean
        self.columns = self.tokens.last.cpu()
        self.answers = pairs.answer.tolist()
        self.wrongs: list[Wrong] = [[wrong] for wrong in pairs.wrong.tolist()]
        self.directions, self.biases = difference_directions(lm, self.answers, self.wrongs, 0, 0)
        sites = [f"blocks.{layer}.attn.z" for layer in sorted(layers)]
        self.given = replacement_run(lm, pairs, sites, ablation)
        self.scale = None
        if lm.family.ln_final is not None:
            scale = lm.run(self.tokens, capture="ln_final.scale", logits=None)["ln_final.scale"]
            self.scale = scale[torch.arange(len(pairs)), self.columns]
        groups, self.total, self.notes = self._split()
        self.before = _joined(groups)
        self.names = tuple(group.name(i) for group in groups for i in range(group.values.shape[-1]))

    def _split(self, edits: Sequence[Edit] = ()) -> tuple[list[Group], Tensor, list[str]]:
        groups, total, _, notes = split_difference(
            self.lm, self.tokens, self.columns, self.directions, self.biases, "head", self.answers, self.wrongs,
            edits=edits, final_scale=self.scale,
        )  # fmt: skip
        return groups, total, notes

    def _edits(self, heads: Sequence[Head]) -> list[Edit]:
        by_layer: dict[int, list[int]] = {}
        for layer, head in heads:
            by_layer.setdefault(layer, []).append(head)
        return [
            patch(f"blocks.{layer}.attn.z", self.given, positions=-1, source_positions=-1, heads=chosen)
            for layer, chosen in by_layer.items()
        ]

    def knock_out(self, heads: Sequence[Head]) -> KnockOut:
        groups, total, _ = self._split(self._edits(heads))
        after = _joined(groups)
        change = after - self.before
        own = [self.names.index(f"L{layer}H{head}") for layer, head in heads]
        direct = -change[:, own].sum(1)
        # with the clean divisor the shares sum to another difference than the model's own: the norm's part
        return KnockOut(tuple(heads), direct, self.total - total, total - after.sum(1), change)

    def direct_of_each(self, heads: Sequence[Head]) -> Tensor:
        """Direct effect of each head alone [n, heads], in one run per layer: a layer's heads do not read each other."""
        found = torch.zeros(len(self.pairs), len(heads), dtype=torch.float64)
        with Progress("direct effects", total=len({layer for layer, _ in heads}), unit="layers") as progress:
            for layer in sorted({layer for layer, _ in heads}):
                here = [i for i, (at, _) in enumerate(heads) if at == layer]
                groups, _, _ = self._split(self._edits([heads[i] for i in here]))
                change = _joined(groups) - self.before
                columns = [self.names.index(f"L{layer}H{heads[i][1]}") for i in here]
                found[:, here] = -change[:, columns]
                progress.advance()
        return found


def _joined(groups: Sequence[Group]) -> Tensor:
    """Shares of all parts, float64 [n, parts]."""
    return torch.cat([group.values[:, 0] for group in groups], dim=1)
