"""The page of the toy models."""

from collections.abc import Sequence

from markupsafe import Markup

from cutaway.draw.charts import line_svg
from cutaway.draw.heatmap import heatmap_scale, heatmap_svg
from cutaway.draw.page import Section
from cutaway.draw.plane import arrows_svg, points_svg
from cutaway.draw.scale import Scale
from cutaway.draw.text import escape
from cutaway.subjects.superposition.geometry import (
    POLYTOPES,
    dimensionality,
    dimensions_per_feature,
    feature_norms,
    interference,
)
from cutaway.subjects.superposition.phase import PHASES, PhaseDiagram
from cutaway.subjects.superposition.study import DECAYS, PAIRS, PLANE, ROWS, SWEEP, ToyStudy, pair_cosines
from cutaway.subjects.superposition.toy_models import ToyModels

LEAD = (
    "Small models x̂ = ReLU(WᵀWx + b) that send n features through fewer dimensions, trained here. The setting and the "
    "measures are those of Elhage et al. 2022, “Toy Models of Superposition”. The density is how often a feature is "
    "active."
)


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
            heatmap_svg(
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
        heatmap_svg(
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
    return heatmap_svg(
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
    drawing = heatmap_svg(
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
