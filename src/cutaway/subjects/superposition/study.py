"""The toy models' main results, trained anew, and the page of `cutaway subjects superposition` that shows them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.draw.charts import line_svg
from cutaway.draw.heatmap import heatmap_html, heatmap_scale
from cutaway.draw.page import Section
from cutaway.draw.plane import arrows_svg, points_svg
from cutaway.draw.result import Result
from cutaway.draw.scale import Scale
from cutaway.draw.text import escape
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
LEAD = (
    "Small models x̂ = ReLU(WᵀWx + b) that send n features through fewer dimensions, trained here. The setting and the "
    "measures are those of Elhage et al. 2022, “Toy Models of Superposition”. The density is how often a feature is "
    "active."
)


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


# The page


def toy_sections(study: ToyStudy) -> list[Section]:
    """The page's sections about the toy models."""
    return [
        (
            "Five features in two dimensions",
            "Each arrow is the direction of a feature, darker where it matters more (importance 0.9 to the power i). "
            "Dense features: the two most important get a dimension each and the rest is left out. Sparse ones share: "
            "the interference is paid for seldom. The linear model, the control, keeps two however sparse they are.",
            _planes(
                [
                    *((f"density {p:g}", study.plane, i) for i, p in enumerate(PLANE)),
                    (f"control: linear, density {PLANE[-1]:g}", study.plane_linear, len(PLANE) - 1),
                ]
            ),
        ),
        (
            "Twenty features in five dimensions",
            "How strongly each feature is represented, ‖W_i‖, importance 0.7 to the power i. The rows below are the "
            "linear control: the five most important features and no other.",
            _norms(study),
        ),
        (
            "How much else stands in a feature's direction",
            "Interference Σ_{j≠i} (Ŵ_i · W_j)² of the same models: 0 is a direction of its own. “–” is a feature that "
            "is not represented (‖W_i‖ below ½).",
            _interference(study.twenty),
        ),
        (
            "Importance and sparsity",
            "How many of the 20 features are represented (‖W_i‖ above ½) when importance falls as r to the power i. "
            "Five have a dimension each; more is superposition.",
            heatmap_html(
                rows=[f"{r:g}" for r in DECAYS],
                columns=[f"{p:g}" for p in ROWS],
                values=[[float(n) for n in row] for row in study.represented()],
                title="Represented features by importance and density",
                row_axis="importance, r",
                column_axis="density",
                cell_text=[[str(n) for n in row] for row in study.represented()],
                scale=Scale(0.0, 20.0),
            ),
        ),
        (
            "Dimensions per feature",
            "120 features of equal importance in 20 dimensions. m / ‖W‖² falls with the density and stays for a while "
            "near ½, where features lie in antipodal pairs.",
            _shares(study),
        ),
        (
            "Polytopes",
            "The dimensionality D_i = ‖W_i‖² / Σ_j (Ŵ_i · W_j)² of each of the 120 features. It clusters at the values "
            "of regular polytopes; in the sparse limit all features share alike (20/120 = 0.17).",
            points_svg(
                columns=[D.tolist() for D in dimensionality(study.sweep.W)],
                names=[f"{p:g}" for p in SWEEP],
                lines=list(POLYTOPES.items()),
                title="Dimensionality of every feature by density",
                x_label="density",
                y_label="D_i",
            ),
        ),
        (
            "Features that come together, or never do",
            "Four features in two dimensions, in two pairs (dark and light); the best of eight models. Features that "
            "exclude each other lie opposite, at no loss; features that come together lie at right angles to each "
            "other, or, less sparse, in one direction: the model keeps their first principal component.",
            _pairs(study),
        ),
        (
            "Phase diagram",
            "Two features in one dimension; the first has importance 1. What becomes of the second: not represented "
            "(·), given the dimension (1), or put on it together with the first, the other way round (±). Trained "
            "models, the best of five a cell. They agree with the optimum below in "
            f"{study.trained.agreement(study.optimal):.0%} of the {study.trained.phase.numel()} cells.",
            _phases(study.trained, "Phase diagram, trained"),
        ),
        (
            "The optimum, by brute force",
            "The same from the lowest expected loss, an exact integral, over solutions of each kind. Where several are "
            "as good (importance 1, density 1) the choice is arbitrary.",
            _phases(study.optimal, "Phase diagram, optimal"),
        ),
    ]


def _planes(items: Sequence[tuple[str, ToyModels, int]]) -> Markup:
    figures = []
    for name, models, place in items:
        W = models.W[place]
        kept = int((feature_norms(W) > 0.5).sum())
        drawing = arrows_svg(
            vectors=[(x, y) for x, y in W.T.tolist()],
            names=[f"feature {i}" for i in range(W.shape[1])],
            title=f"Features in the plane, {name}",
        )
        figures.append(
            f"<figure>{drawing}<figcaption>{escape(name)}: {kept} of {W.shape[1]} represented</figcaption></figure>"
        )
    return Markup(f'<div class="cw-planes">{"".join(figures)}</div>')


def _pairs(study: ToyStudy) -> Markup:
    figures = []
    for (relation, p), models in zip(PAIRS, study.pairs, strict=True):
        first, second = pair_cosines(models.W[0])
        drawing = arrows_svg(
            vectors=[(x, y) for x, y in models.W[0].T.tolist()],
            names=["pair 1, first", "pair 1, second", "pair 2, first", "pair 2, second"],
            title=f"{relation} pairs in the plane",
        )
        caption = f"{relation}, density {p:g}: cosines {first:+.2f} and {second:+.2f}"
        figures.append(f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>")
    return Markup(f'<div class="cw-planes">{"".join(figures)}</div>')


def _norms(study: ToyStudy) -> Markup:
    both = [*feature_norms(study.twenty.W).tolist(), *feature_norms(study.twenty_linear.W).tolist()]
    scale = heatmap_scale(both)
    drawings = [
        heatmap_html(
            rows=[f"{p:g}" for p in ROWS],
            columns=[str(i) for i in range(20)],
            values=feature_norms(models.W).tolist(),
            title=f"Length of each feature's direction, {name}",
            row_axis=name,
            column_axis="feature, most important first",
            cell_text=[[f"{v:.1f}" for v in row] for row in feature_norms(models.W).tolist()],
            scale=scale,
        )
        for name, models in (("density", study.twenty), ("control: linear", study.twenty_linear))
    ]
    return Markup("<br>").join(drawings)


def _interference(models: ToyModels) -> Markup:
    norms, shared = feature_norms(models.W).tolist(), interference(models.W).tolist()
    values = [[s if n > 0.5 else None for n, s in zip(*row, strict=True)] for row in zip(norms, shared, strict=True)]
    return heatmap_html(
        rows=[f"{p:g}" for p in ROWS],
        columns=[str(i) for i in range(20)],
        values=values,
        title="Interference of each feature",
        row_axis="density",
        column_axis="feature, most important first",
        cell_text=[["–" if v is None else f"{v:.1f}" for v in row] for row in values],
    )


def _shares(study: ToyStudy) -> Markup:
    return line_svg(
        series=[
            {"name": "m / ‖W‖²", "x": [1 / p for p in SWEEP], "y": dimensions_per_feature(study.sweep.W).tolist()},
            {"name": "one half", "x": [1.0, 1 / SWEEP[-1]], "y": [0.5, 0.5], "control": True},
        ],
        title="Dimensions per feature by sparsity",
        x_label="1 / density",
        y_label="dimensions per feature",
    )


def _phases(diagram: PhaseDiagram, title: str) -> Markup:
    signs = ("·", "1", "±")
    legend = " ".join(f"{sign} {name}." for sign, name in zip(signs, PHASES, strict=True))
    drawing = heatmap_html(
        rows=[f"{p:.3g}" for p in diagram.density],
        columns=[f"{value:.2g}" for value in diagram.importance],
        values=diagram.phase.double().tolist(),
        title=title,
        row_axis="density",
        column_axis="importance of the second feature",
        cell_text=[[signs[int(cell)] for cell in row] for row in diagram.phase.tolist()],
        scale=Scale(0.0, 2.4),
    )
    return Markup(f'{drawing}<p class="cw-small">{escape(legend)}</p>')
