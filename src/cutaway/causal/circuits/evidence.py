"""All that is measured about a circuit, gathered and kept with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.results import Choices, Effect
from cutaway.causal.circuits.baselines import By, Select
from cutaway.causal.circuits.completeness import Knockout, Removal, completeness, minimality, self_repair
from cutaway.causal.circuits.faithfulness import (
    FRACTIONS,
    Run,
    SizeSeries,
    faithfulness_effects,
    measure,
    plan_sizes,
    rivals_of,
    size_curve,
)
from cutaway.causal.circuits.stability import stability
from cutaway.causal.edge_graph import EdgeGraph

FAITHFULNESS = "faithfulness"


@dataclass(frozen=True)
class Evidence:
    """What was measured of a circuit on n `pairs` (in words): effects beside controls, and the tables behind them.

    The first effect is the faithfulness. `curve` has f by size over `fractions`; `edges` and `nodes` what f loses
    without each; `knockouts` the sets of nodes taken out of circuit and model alike; `repair` how much more each node
    is needed once `repaired` is gone.
    """

    pairs: str
    effects: tuple[Effect, ...]
    fractions: tuple[float, ...] = ()
    curve: tuple[SizeSeries, ...] = ()
    knockouts: tuple[Knockout, ...] = ()
    edges: tuple[Removal, ...] = ()
    nodes: tuple[Removal, ...] = ()
    repaired: str = ""
    repair: tuple[Removal, ...] = ()

    def effect(self, name: str) -> Effect:
        """The effect whose name begins so."""
        for effect in self.effects:
            if effect.name.startswith(name):
                return effect
        raise CutawayError(
            f"nothing called {name!r} was measured of this circuit; there are "
            f"{', '.join(effect.name for effect in self.effects)}"
        )

    @property
    def faithfulness(self) -> Effect:
        return self.effects[0]

    def above_controls(self) -> bool:
        """Whether the faithfulness lies above the upper interval of random circuits and of the strongest edges."""
        rivals = [c for c in self.faithfulness.controls if c.name.startswith(("random", "strongest"))]
        uppers = [c.value if c.interval is None else c.interval[1] for c in rivals]
        return bool(uppers) and all(self.faithfulness.value > upper for upper in uppers)

    def to_json(self) -> dict[str, Any]:
        return {
            "pairs": self.pairs,
            "effects": [effect.to_json() for effect in self.effects],
            "fractions": list(self.fractions),
            "curve": [one.to_json() for one in self.curve],
            "knockouts": [one.to_json() for one in self.knockouts],
            "edges": [one.to_json() for one in self.edges],
            "nodes": [one.to_json() for one in self.nodes],
            "repaired": self.repaired,
            "repair": [one.to_json() for one in self.repair],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Evidence:
        """The evidence that `to_json` wrote."""

        def removals(key: str) -> tuple[Removal, ...]:
            return tuple(Removal.from_json(one) for one in data[key])

        return cls(
            data["pairs"],
            tuple(Effect.from_json(one) for one in data["effects"]),
            tuple(map(float, data["fractions"])),
            tuple(SizeSeries.from_json(one) for one in data["curve"]),
            tuple(Knockout.from_json(one) for one in data["knockouts"]),
            removals("edges"),
            removals("nodes"),
            data["repaired"],
            removals("repair"),
        )


def gather_evidence(
    run: Run,
    graph: EdgeGraph,
    mask: Tensor,
    *,
    pairs: str,
    choices: Choices,
    scores: Tensor | None = None,
    per_pair: Tensor | None = None,
    magnitude: Tensor | None = None,
    asked: int | None = None,
    select: Select = "greedy",
    by: By = "absolute",
    search: float | None = None,
    fractions: Sequence[float] = FRACTIONS,
    draws: int = 20,
    curve_draws: int = 3,
    resamples: int = 100,
    most_edges: int = 24,
    deep: bool = True,
    seed: int = 0,
    command: str | None = None,
) -> Evidence:
    """Measure a circuit on the pairs that `run` runs: faithfulness beside rivals, sizes, completeness, and so on.

    `scores` [...] of every edge give the size curve, `per_pair` [m, ...] and `asked` (edges before pruning) the
    stability; without them these are left out. `magnitude` [...] ranks the strongest edges. `deep` adds completeness,
    minimality and self-repair. The circuit, its rivals and all sizes are one pass.
    """
    if not bool(mask.any()):
        raise CutawayError("The circuit is empty: nothing leads from the embedding to the logits.")
    rivals = rivals_of(graph, mask, magnitude, select=select, draws=draws, seed=seed)
    masks = torch.cat([mask[None], rivals.masks])
    plan = None
    if scores is not None:
        plan = plan_sizes(
            graph, scores, magnitude, select=select, by=by, fractions=fractions, draws=curve_draws, seed=seed
        )
        masks = torch.cat([masks, plan.masks])
    measured = measure(run(masks))
    effects = faithfulness_effects(measured, rivals, choices=choices, search=search, command=command)
    curve: tuple[SizeSeries, ...] = ()
    if plan is not None:
        start = len(masks) - len(plan.masks)
        curve, areas = size_curve(plan, measured[slice(start, len(masks))], choices=choices, command=command)
        effects += areas
    if per_pair is not None and asked is not None:
        effects += stability(
            graph, mask, per_pair, asked, choices=choices, select=select, by=by, resamples=resamples, draws=draws,
            seed=seed, command=command,
        )  # fmt: skip
    if not deep:
        return Evidence(pairs, tuple(effects), tuple(fractions) if curve else (), curve)
    knockouts, complete = completeness(run, graph, mask, choices=choices, seed=seed, command=command)
    edges, nodes, minimal = minimality(run, graph, mask, choices=choices, most=most_edges, seed=seed, command=command)
    repaired, repair, growth = self_repair(run, graph, mask, choices=choices, seed=seed, command=command)
    return Evidence(
        pairs,
        (*effects, *complete, *minimal, *growth),
        tuple(fractions) if curve else (),
        curve,
        tuple(knockouts),
        tuple(edges),
        tuple(nodes),
        repaired,
        tuple(repair),
    )
