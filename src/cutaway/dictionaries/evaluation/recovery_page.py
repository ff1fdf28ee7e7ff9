"""The page's sections about dictionaries that look for known features."""

from collections.abc import Callable, Sequence

from markupsafe import Markup

from cutaway.dictionaries.evaluation.recovery import EASY, HARD, Recovery, RecoveryStudy
from cutaway.draw.charts import effect_html
from cutaway.draw.heatmap import heatmap_svg
from cutaway.draw.panels import table_html
from cutaway.draw.scale import Scale
from cutaway.subjects.superposition.scores import COLUMNS, score_row

Section = tuple[str, str, Markup]


def recovery_sections(study: RecoveryStudy) -> list[Section]:
    """The two toys, and where recovery breaks down."""
    hard, easy = study.toys[HARD][0], study.toys[EASY][0]
    rows = []
    for name, runs in study.toys.items():
        rows += [
            [name.removeprefix("32 in "), *score_row(runs[0].scores)],
            ["control: random", *score_row(runs[0].control)],
        ]
    return [
        (
            "Two toys side by side",
            "A dictionary of 128 latents (TopK 3) looks for 32 features, 2 to 4 of them active. In 8 dimensions with "
            "random signs the features cannot be found: the highest cosine of a feature with any latent is "
            f"{hard.scores.nearest_signed:.2f}, but with any of 128 random directions it is already "
            f"{hard.control.nearest_signed:.2f}, and assigned one to one {hard.scores.recovered} of 32 are above 0.9. "
            f"In 20 dimensions with non-negative values {easy.scores.recovered} of 32 are found. One seed; ± is a "
            "signed cosine, |·| an absolute one.",
            table_html(columns=["", *COLUMNS], rows=rows, title="Scores of the two toys", align=["left"] * 13),
        ),
        (
            "The same over seeds",
            f"Means over {len(study.toys[HARD])} seeds of world and dictionary, with bootstrap intervals over them.",
            Markup("").join(effect_html(effect.to_json()) for effect in study.effects()),
        ),
        (
            "Where recovery breaks down",
            "How many of 32 non-negative features get a latent of their own with a signed cosine above 0.9 (TopK, 64 "
            "latents, one seed per cell). Below: the same with random signs, where a feature needs two latents and "
            "every latent is one half of it.",
            Markup("<br>").join(
                _grid(study, grid, lambda cell: cell.scores.recovered, f"Recovered features, {name}", name)
                for name, grid in (("non-negative", study.grid), ("random signs", study.signed_grid))
            ),
        ),
        (
            "The control: random directions",
            "As many of 32 features that 64 random directions “recover”. Few dimensions alone bring directions near.",
            _grid(study, study.grid, lambda cell: cell.control.recovered, "Recovered by random directions", "control"),
        ),
    ]


def _grid(
    study: RecoveryStudy, grid: Sequence[Sequence[Recovery]], pick: Callable[[Recovery], float], title: str, name: str
) -> Markup:
    values = [[float(pick(cell)) for cell in row] for row in grid]
    return heatmap_svg(
        rows=[str(d) for d in study.dimensions],
        columns=[str(a) for a in study.active],
        values=values,
        title=title,
        row_axis=f"dimensions ({name})",
        column_axis="active features",
        cell_text=[[f"{value:.0f}" for value in row] for row in values],
        scale=Scale(0.0, 32.0),
    )
