"""All that is measured about a circuit, gathered and kept with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.results import Choices, Effect
from cutaway.causal.circuits.baselines import By, Select
from cutaway.causal.circuits.completeness import (
    CircuitSelfRepair,
    Completeness,
    Knockout,
    Minimality,
    Removal,
    circuit_self_repair,
    completeness,
    minimality,
)
from cutaway.causal.circuits.faithfulness import (
    FRACTIONS,
    RunCircuits,
    SizeCurve,
    SizeSeries,
    baseline_circuits,
    faithfulness,
    measure,
    plan_sizes,
    size_curve,
)
from cutaway.causal.circuits.stability import Stability, stability
from cutaway.causal.edge_graph import EdgeGraph
from cutaway.causal.effects import Effects, effect_line, effects_drawing
from cutaway.draw.page import Section, sections_html


@dataclass(frozen=True)
class Evaluation:
    """How much is measured about a circuit."""

    draws: int = 20
    """Random circuits of the same size that it is compared with."""
    resamples: int = 100
    """Bootstrap draws of the pairs for the stability, 100 or more."""
    deep: bool = True
    """Whether completeness, minimality and self-repair are measured, too."""
    curve_draws: int = 3
    """Random circuits of each size of the size curve."""
    max_edges: int = 24
    """Edges that are taken out one by one for the minimality; of more a random sample is."""
    fractions: tuple[float, ...] = FRACTIONS
    """Shares of the graph's edges at which the size curve is measured."""


@dataclass(frozen=True, eq=False)
class Ranking:
    """How the edges of a circuit were chosen: what the size curve and the stability need to choose others likewise."""

    select: Select = "greedy"
    """Grown from the logits ("greedy"), or the highest ones ("top")."""
    by: By = "absolute"
    """Whether edges are ranked by "absolute" or by "signed" scores."""
    scores: Tensor | None = None
    """Signed importance of every edge, the graph's shape; None: no size curve."""
    per_pair: Tensor | None = None
    """The same of each of m search pairs [m, ...]; None: no stability."""
    asked: int | None = None
    """Edges that were asked for before pruning; None: no stability."""


@dataclass(frozen=True, repr=False)
class Evidence(Effects):
    """What was measured of a circuit on n pairs: effects beside controls, and the tables behind them.

    The first effect is the faithfulness. `size_curve`, `stability`, `completeness`, `minimality` and `self_repair` are
    its parts, None where they were not measured.
    """

    pairs: str = ""
    """The pairs, in words."""
    fractions: tuple[float, ...] = ()
    """Shares of the graph's edges [K] at which `curve` has f."""
    curve: tuple[SizeSeries, ...] = ()
    """f by size: of the circuit's edges, of the strongest edges, of random circuits."""
    knockouts: tuple[Knockout, ...] = ()
    """Sets of nodes that were taken out of circuit and model alike."""
    edges: tuple[Removal, ...] = ()
    """What f loses without each edge (of those tried)."""
    nodes: tuple[Removal, ...] = ()
    """What f loses without each node."""
    repaired: str = ""
    """The most needed node, which is knocked out first."""
    repair: tuple[Removal, ...] = ()
    """How much more each other node is needed once that one is gone."""

    title = "Evidence for a circuit"

    @property
    def faithfulness(self) -> Effect:
        """f as the ratio of means, beside random circuits and the strongest edges."""
        return self.effects[0]

    @property
    def size_curve(self) -> SizeCurve | None:
        """Faithfulness by size, with CPR and CMD."""
        return SizeCurve(self._named("CPR", "CMD"), self.fractions, self.curve) if self.curve else None

    @property
    def stability(self) -> Stability | None:
        """Overlap of the circuits that resampled pairs give."""
        found = self._named("overlap")
        return Stability(found) if found else None

    @property
    def completeness(self) -> Completeness | None:
        """Whether anything is missing."""
        found = self._named("faithfulness of the complement", "incompleteness")
        return Completeness(found, self.knockouts) if found else None

    @property
    def minimality(self) -> Minimality | None:
        """Whether anything is idle."""
        return Minimality(self._named("idle"), self.edges, self.nodes) if self.edges else None

    @property
    def self_repair(self) -> CircuitSelfRepair | None:
        """How the model makes up for the most needed node."""
        return CircuitSelfRepair(self._named("self-repair"), self.repaired, self.repair) if self.repaired else None

    def _named(self, *names: str) -> tuple[Effect, ...]:
        return tuple(effect for effect in self.effects if effect.name.startswith(names))

    def above_controls(self) -> bool:
        """Whether the faithfulness lies above the upper interval of random circuits and of the strongest edges."""
        baselines = [c for c in self.faithfulness.controls if c.name.startswith(("random", "strongest"))]
        uppers = [c.value if c.interval is None else c.interval[1] for c in baselines]
        return bool(uppers) and all(self.faithfulness.value > upper for upper in uppers)

    def summary(self) -> str:
        left_out = ("faithfulness, mean over pairs", "overlap of resampled circuits with the circuit")
        shown = [e for e in self.effects if not e.name.startswith(left_out) and not e.name.endswith("another, nodes")]
        return "\n".join([f"{self.title}, on {self.pairs}:", *map(effect_line, shown[:11])])

    def drawing(self) -> Markup:
        return sections_html(_evidence_sections(self))

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
        """The evidence that `to_json` wrote.

        Args:
            data: What a circuit's file holds under "evidence".
        """

        def removals(key: str) -> tuple[Removal, ...]:
            return tuple(Removal.from_json(one) for one in data[key])

        return cls(
            tuple(Effect.from_json(one) for one in data["effects"]),
            pairs=data["pairs"],
            fractions=tuple(map(float, data["fractions"])),
            curve=tuple(SizeSeries.from_json(one) for one in data["curve"]),
            knockouts=tuple(Knockout.from_json(one) for one in data["knockouts"]),
            edges=removals("edges"),
            nodes=removals("nodes"),
            repaired=data["repaired"],
            repair=removals("repair"),
        )


def gather_evidence(
    run: RunCircuits,
    graph: EdgeGraph,
    mask: Tensor,
    *,
    choices: Choices,
    ranking: Ranking = Ranking(),
    magnitude: Tensor | None = None,
    search: float | None = None,
    evaluation: Evaluation = Evaluation(),
    seed: int = 0,
) -> Evidence:
    """Measure a circuit on the pairs that `run` runs: faithfulness beside baselines, sizes, completeness, and so on.

    The circuit, its baselines and all sizes are one pass.

    Args:
        run: From masks to the metric of the pairs (`discovery.circuit_runner`).
        graph: The graph whose edges the circuit has.
        mask: The circuit, bool, of the graph's shape.
        choices: The six choices; `evaluation` are the pairs, in words.
        ranking: How the circuit was chosen. Without its scores there is no size curve and no stability.
        magnitude: How strongly every edge acts, the graph's shape; None: no strongest edges to compare with.
        search: f on the pairs by which the circuit was found, to stand beside.
        evaluation: How much is measured.
        seed: Of everything that is drawn at random.

    Raises:
        CutawayError: An empty circuit, fewer than 8 pairs, or a metric that ablation does not change.
    """
    if not bool(mask.any()):
        raise CutawayError("The circuit is empty: nothing leads from the embedding to the logits.")
    select, by, scores = ranking.select, ranking.by, ranking.scores
    baselines = baseline_circuits(graph, mask, magnitude, select=select, draws=evaluation.draws, seed=seed)
    masks, plan = torch.cat([mask[None], baselines.masks]), None
    if scores is not None:
        plan = plan_sizes(
            graph, scores, magnitude, select=select, by=by, fractions=evaluation.fractions,
            draws=evaluation.curve_draws, seed=seed,
        )  # fmt: skip
        masks = torch.cat([masks, plan.masks])
    measured = measure(run(masks))
    effects = [*faithfulness(measured, baselines, choices=choices, search=search).effects]
    tables: dict[str, Any] = {}
    if plan is not None:
        sizes = size_curve(plan, measured[slice(len(masks) - len(plan.masks), len(masks))], choices=choices)
        effects += sizes.effects
        tables.update(fractions=sizes.fractions, curve=sizes.series)
    if ranking.per_pair is not None and ranking.asked is not None:
        effects += stability(
            graph, mask, ranking.per_pair, ranking.asked, choices=choices, select=select, by=by,
            resamples=evaluation.resamples, draws=evaluation.draws, seed=seed,
        ).effects  # fmt: skip
    if evaluation.deep:
        complete = completeness(run, graph, mask, choices=choices, seed=seed)
        minimal = minimality(run, graph, mask, choices=choices, max_edges=evaluation.max_edges, seed=seed)
        growth = circuit_self_repair(run, graph, mask, choices=choices, seed=seed)
        effects += [*complete.effects, *minimal.effects, *(growth.effects if growth else ())]
        tables.update(knockouts=complete.knockouts, edges=minimal.edges, nodes=minimal.nodes)
        if growth is not None:
            tables.update(repaired=growth.repaired, repair=growth.repair)
    return Evidence(tuple(effects), pairs=choices.evaluation, **tables)


def _evidence_sections(evidence: Evidence) -> list[Section]:
    """Faithfulness, f by size, what is missing, stability, what is idle, self-repair."""
    return [
        ("Faithfulness", f"Measured on {evidence.pairs}.", faithfulness_drawing(evidence)),
        *part_sections(evidence),
    ]


def faithfulness_drawing(evidence: Evidence) -> Markup:
    return effects_drawing(evidence.effects[:2], "Faithfulness")


def part_sections(evidence: Evidence) -> list[Section]:
    parts = (
        (evidence.size_curve, _SIZES),
        (evidence.completeness, _MISSING),
        (evidence.stability, _STABLE),
        (evidence.minimality, _IDLE),
        (
            evidence.self_repair,
            f"How much more the whole model loses without a node once {evidence.repaired}, which costs most, is gone. "
            "Above 0 the node makes up for it.",
        ),
    )
    return [(part.title, text, part.drawing()) for part, text in parts if part is not None]


_SIZES = (
    "Bands are 95 % over pairs; for random circuits the spread of single ones. CPR is the area under the curve of "
    "the edges with the highest signed scores, CMD the area between 1 and that of the largest scores: by "
    "trapezoids over the ten sizes, linear in the share of edges, without what lies below the first (as the MIB "
    "benchmark has it)."
)


_MISSING = (
    "A complete circuit leaves nothing behind: its complement does nothing, and when the same nodes are taken "
    "out of circuit and model, both lose the same. Incompleteness is the gap between the two."
)


_STABLE = (
    "The pairs were drawn again with replacement and the circuit selected anew each time. A Jaccard index of 1 "
    "means the same edges (nodes), 0 none in common."
)


_IDLE = (
    "What the circuit loses when one of its nodes, or one of its edges, is taken out, alone. An edge without which "
    "the faithfulness moves by less than 0.01 is idle."
)
