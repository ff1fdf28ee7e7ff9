"""The toy models' main results, trained anew: what the page of `cutaway subjects superposition` shows."""

from dataclasses import dataclass
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.draw.result import Result
from cutaway.subjects.superposition.geometry import (
    POLYTOPES,
    dimensionality,
    dimensions_per_feature,
    feature_norms,
    interference,
    nearest_polytope,
)
from cutaway.subjects.superposition.phase import PHASES, PhaseDiagram, optimal_diagram, trained_diagram
from cutaway.subjects.superposition.toy_models import Relation, ToyModels, ToyTraining, loss, sample, train_toys

PLANE = (1.0, 0.4, 0.2, 0.03)
ROWS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
DECAYS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SWEEP = (1.0, 0.7, 0.5, 0.4, 0.3, 0.2, 0.14, 0.1, 0.07, 0.05, 0.03, 0.02)
PAIRS: tuple[tuple[Relation, float], ...] = (("correlated", 0.1), ("correlated", 0.4), ("anticorrelated", 0.1))


@dataclass(frozen=True, repr=False)
class ToyStudy(Result):
    """The main results of toy models of superposition, trained anew.

    Attributes:
        plane: 5 features in 2 dimensions, one instance per density of PLANE, importance 0.9^i.
        plane_linear: The same without ReLU, the control.
        twenty: 20 features in 5 dimensions, ROWS, 0.7^i.
        twenty_linear: The same without ReLU.
        decays: The same for every importance r^i, r of DECAYS, and density, importance by importance.
        sweep: 120 features in 20 dimensions, SWEEP, all of importance 1.
        pairs: 4 features in 2 dimensions, the best of 8 for each of PAIRS.
        trained: Phase diagram of 2 features in 1 dimension, trained.
        optimal: The same by brute force.
    """

    title = "Superposition"

    plane: ToyModels
    plane_linear: ToyModels
    twenty: ToyModels
    twenty_linear: ToyModels
    decays: ToyModels
    sweep: ToyModels
    pairs: tuple[ToyModels, ...]
    trained: PhaseDiagram
    optimal: PhaseDiagram

    def polytopes(self) -> list[dict[str, int]]:
        """How many features of each instance of the sweep are of each polytope, by `nearest_polytope`."""
        counts = []
        for D in dimensionality(self.sweep.W):
            names = nearest_polytope(D)
            counts.append({name: names.count(name) for name in (*POLYTOPES, "other", "none")})
        return counts

    def represented(self) -> list[list[int]]:
        """How many of 20 features have ‖W_i‖ > ½ in 5 dimensions: rows for DECAYS, columns for ROWS."""
        return (feature_norms(self.decays.W) > 0.5).sum(1).view(len(DECAYS), len(ROWS)).tolist()

    def to_json(self) -> dict[str, Any]:
        """What the figures show, as JSON."""

        def models(toys: ToyModels) -> list[dict[str, Any]]:
            return [
                {
                    "density": density,
                    "norms": feature_norms(W).tolist(),
                    "interference": interference(W).tolist(),
                    "dimensionality": dimensionality(W).tolist(),
                    "dimensions_per_feature": dimensions_per_feature(W).item(),
                }
                for density, W in zip(toys.density.tolist(), toys.W, strict=True)
            ]

        return {
            "five_in_two": models(self.plane),
            "five_in_two_linear": models(self.plane_linear),
            "twenty_in_five": models(self.twenty),
            "twenty_in_five_linear": models(self.twenty_linear),
            "represented_by_importance": {"decay": DECAYS, "density": ROWS, "features": self.represented()},
            "sweep_120_in_20": models(self.sweep),
            "polytopes": self.polytopes(),
            "pairs": [
                {"relation": relation, "density": p, "cosines": pair_cosines(toys.W[0])}
                for (relation, p), toys in zip(PAIRS, self.pairs, strict=True)
            ],
            "phases": {
                "density": self.trained.density,
                "importance": self.trained.importance,
                "names": PHASES,
                "trained": self.trained.phase.tolist(),
                "optimal": self.optimal.phase.tolist(),
                "agreement": self.trained.agreement(self.optimal),
                "loss_trained": self.trained.loss.tolist(),
                "loss_optimal": self.optimal.loss.tolist(),
            },
        }

    def rows(self) -> list[dict[str, Any]]:
        """One row per trained instance."""
        sets = {
            "5 in 2": self.plane,
            "5 in 2, linear": self.plane_linear,
            "20 in 5": self.twenty,
            "20 in 5, linear": self.twenty_linear,
            "120 in 20": self.sweep,
        }
        return [
            {
                "models": name,
                "density": density,
                "represented": int((feature_norms(W) > 0.5).sum()),
                "dimensions_per_feature": dimensions_per_feature(W).item(),
            }
            for name, toys in sets.items()
            for density, W in zip(toys.density.tolist(), toys.W, strict=True)
        ]

    def drawing(self) -> Markup:
        """The drawings of the page, one below the other."""
        from cutaway.subjects.superposition.page import toy_sections

        return Markup("").join(drawn for _, _, drawn in toy_sections(self))

    def summary(self) -> str:
        """How many features are represented, and how far training reaches the optimum."""
        lines = str(self).splitlines()
        return "\n".join([*lines[:6], *lines[13:15], lines[-1]])

    def __str__(self) -> str:
        lines = ["5 features in 2 dimensions (features with ‖W_i‖ > ½)"]
        for name, toys in (("ReLU", self.plane), ("linear, control", self.plane_linear)):
            kept = (feature_norms(toys.W) > 0.5).sum(1).tolist()
            lines.append(f"  {name:<16}" + "".join(f"  {p:g}: {n}" for p, n in zip(PLANE, kept, strict=True)))
        lines.append("20 features in 5 dimensions")
        for name, toys in (("ReLU", self.twenty), ("linear, control", self.twenty_linear)):
            kept = (feature_norms(toys.W) > 0.5).sum(1).tolist()
            lines.append(f"  {name:<16}" + "".join(f"  {p:g}: {n}" for p, n in zip(ROWS, kept, strict=True)))
        lines.append("  by importance r^i (rows) and density (columns)")
        for decay, counts in zip(DECAYS, self.represented(), strict=True):
            lines.append(f"    {decay:3.1f}" + "".join(f"{n:5d}" for n in counts))
        lines.append("120 features in 20 dimensions: dimensions per feature, m / ‖W‖²")
        shares = dimensions_per_feature(self.sweep.W).tolist()
        lines.append("  " + "  ".join(f"{p:g}: {share:.2f}" for p, share in zip(SWEEP, shares, strict=True)))
        lines.append("Cosine of two features that are related, 4 in 2 dimensions")
        for (relation, p), toys in zip(PAIRS, self.pairs, strict=True):
            first, second = pair_cosines(toys.W[0])
            lines.append(f"  {relation}, density {p:g}: {first:+.2f} {second:+.2f}")
        cells = self.trained.phase.numel()
        lines.append(
            f"Phase diagram: trained and optimal agree in {self.trained.agreement(self.optimal):.0%} of {cells} cells"
        )
        return "\n".join(lines)


def pair_cosines(W: Tensor) -> tuple[float, float]:
    """Cosines of features 0 and 1, and of 2 and 3, of W [m, 4]."""
    unit = torch.nn.functional.normalize(W, dim=0)
    return (unit[:, 0] @ unit[:, 1]).item(), (unit[:, 2] @ unit[:, 3]).item()


def toy_study(*, seed: int = 0, effort: float = 1.0, cells: int = 13) -> ToyStudy:
    """Train all the toy models of the study: about a minute on two cores.

    Args:
        seed: Of initial weights and samples.
        effort: Factor on the steps of every training.
        cells: Rows, and columns, of the phase diagrams.
    """

    def steps(n: int) -> int:
        return max(1, round(n * effort))

    def toys(
        label: str, density: tuple[float, ...], importance: Tensor, m: int, n_steps: int, **more: Any
    ) -> ToyModels:
        return train_toys(
            torch.tensor(density),
            importance,
            m,
            steps=steps(n_steps),
            seed=seed,
            training=ToyTraining(label=label),
            **more,
        )

    five, twenty = 0.9 ** torch.arange(5.0), 0.7 ** torch.arange(20.0)
    density = tuple(torch.logspace(0, -2, cells).tolist())
    importance = tuple(torch.logspace(-1, 1, cells).tolist())
    return ToyStudy(
        plane=toys("5 in 2", PLANE, five, 2, 3000),
        plane_linear=toys("5 in 2, linear", PLANE, five, 2, 3000, linear=True),
        twenty=toys("20 in 5", ROWS, twenty, 5, 3000),
        twenty_linear=toys("20 in 5, linear", ROWS, twenty, 5, 3000, linear=True),
        decays=train_toys(
            torch.tensor(ROWS).repeat(len(DECAYS)),
            torch.stack([r ** torch.arange(20.0) for r in DECAYS]).repeat_interleave(len(ROWS), 0),
            5,
            steps=steps(2000),
            seed=seed,
            training=ToyTraining(label="20 in 5, importances"),
        ),
        sweep=toys("120 in 20", SWEEP, torch.ones(120), 20, 1500),
        pairs=tuple(_best_pair(relation, p, steps(1000), seed) for relation, p in PAIRS),
        trained=trained_diagram(density, importance, steps=steps(1500), restarts=5, seed=seed),
        optimal=optimal_diagram(density, importance, steps=steps(250)),
    )


def _best_pair(relation: Relation, p: float, steps: int, seed: int) -> ToyModels:
    """The best of 8 instances with two related pairs of features."""
    density = torch.full((8,), p)
    models = train_toys(
        density,
        torch.ones(4),
        2,
        steps=steps,
        relation=relation,
        seed=seed,
        training=ToyTraining(256, label=f"{relation} pairs"),
    )
    x = sample(density[:1], 4, 8192, torch.Generator().manual_seed(seed + 99), relation).expand(8, -1, -1)
    best = loss(models.W, models.b, x, models.importance).argmin()
    pick = slice(int(best), int(best) + 1)
    return ToyModels(models.W[pick], models.b[pick], density[pick], models.importance[pick])
