"""Do dictionaries find features that are known? Training on a generator's stream, scored beside a random dictionary."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.manifest import json_hash
from cutaway.artifacts.results import Control, Effect
from cutaway.artifacts.statistics import bootstrap_interval
from cutaway.dictionaries.dictionary import Dictionary, Port
from cutaway.dictionaries.evaluation.figures import figure_line
from cutaway.dictionaries.training.config import TrainConfig
from cutaway.dictionaries.training.jobs import Job, train_jobs
from cutaway.dictionaries.training.rules import TopKRule
from cutaway.draw.charts import effects_html
from cutaway.draw.heatmap import heatmap_html
from cutaway.draw.panels import table_html
from cutaway.draw.result import Result
from cutaway.draw.scale import Scale
from cutaway.draw.text import interval
from cutaway.subjects.superposition.generator import FeatureGenerator, FeatureWorld
from cutaway.subjects.superposition.scores import COLUMNS, Code, Scores, random_code, score_dictionary, score_row

SITE = "made"


class Made:
    """A generator as a source of training (`jobs.Source`): one site, `SITE`."""

    def __init__(self, generator: FeatureGenerator) -> None:
        self.generator = generator
        self.ports = {SITE: Port(SITE, generator.world.d)}
        self.identity = json_hash({"world": asdict(generator.world)})
        self.metadata: Mapping[str, Any] = {"world": asdict(generator.world)}

    def batches(self, size: int, start: int = 0) -> Iterator[Mapping[str, Tensor]]:
        """Endless batches from number `start` on."""
        for x in self.generator.batches(size, start):
            yield {SITE: x}


@dataclass(frozen=True, repr=False)
class Recovery(Result):
    """How far a dictionary that was trained on made activations holds the features that they are made of."""

    title = "Features recovered"

    name: str
    """The dictionary's name."""
    dictionary: Dictionary
    """The dictionary."""
    scores: Scores
    """Its scores."""
    control: Scores
    """Those of a random dictionary of the same size and L0."""

    def summary(self) -> str:
        table = [("", *COLUMNS), (self.name, *score_row(self.scores)), ("random directions", *score_row(self.control))]
        return "\n".join(_aligned(table))

    def rows(self) -> list[dict[str, Any]]:
        both = {self.name: self.scores, "random directions": self.control}
        return [{"name": name, **_flat(scores.to_json())} for name, scores in both.items()]

    def drawing(self) -> Markup:
        names = ("mcc_signed", "nearest_signed", "precision", "recall", "f1", "explained")
        rows = self.rows()
        return heatmap_html(
            rows=[row["name"] for row in rows],
            columns=[name.replace("_", " ") for name in names],
            values=[[row[name] for name in names] for row in rows],
            cell_text=[[f"{row[name]:.2f}" for name in names] for row in rows],
            title=f"{self.name}: scores against the known features",
        )

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "scores": self.scores.to_json(), "random": self.control.to_json()}


def code_of(dictionary: Dictionary) -> Code:
    """The dictionary as scores want it: activations -> (latents, reconstruction)."""

    def code(x: Tensor) -> tuple[Tensor, Tensor]:
        latents = dictionary.encode(x)
        return latents, dictionary.decode(latents, x)

    return code


def recover(
    generator: FeatureGenerator, configs: Mapping[str, TrainConfig], *, tokens: int = 65_536, seed: int = 0
) -> list[Recovery]:
    """Train dictionaries on made activations and score them against the features these are made of.

    Args:
        generator: Makes the activations, of known features.
        configs: Trainings by name, all on one stream.
        tokens: Held-out tokens that are scored.
        seed: Of the control: as many random directions, the dictionary's L0 of them active, rounded.

    Returns:
        One `Recovery` per training.

    Raises:
        CutawayError: as `train`.
    """
    jobs = {name: Job(config, (SITE,)) for name, config in configs.items()}
    trained = train_jobs(Made(generator), jobs, label=f"{len(jobs)} on {generator.world.n} in {generator.world.d}")
    found = []
    for name, one in trained.items():
        dictionary = one.dictionary
        scores = score_dictionary(dictionary.W_dec, code_of(dictionary), generator, tokens=tokens)
        k = min(dictionary.d_sae, max(1, round(scores.l0)))
        control = score_dictionary(*random_code(dictionary.d_sae, k, generator, seed + 1), generator, tokens=tokens)
        found.append(Recovery(name, dictionary, scores, control))
    return found


# Two toys side by side ----------------------------------------------------------------------------------------------

HARD = "32 in 8 dimensions, signed"
EASY = "32 in 20 dimensions, non-negative"
TOYS = {
    HARD: FeatureWorld(32, 8, active=(2, 4), signed=True, spread=0.2),
    EASY: FeatureWorld(32, 20, active=(2, 4), spread=0.2),
}
DIMENSIONS = (6, 8, 12, 16, 20, 24, 32)
ACTIVE = (1, 2, 3, 4, 6, 8)


@dataclass(frozen=True, repr=False)
class RecoveryStudy(Result):
    """Two toys over several seeds, and where recovery breaks down."""

    title = "Features that are known, recovered"

    dimensions: Sequence[int]
    """Numbers of dimensions of the grids, [D]."""
    active: Sequence[int]
    """Numbers of active features of the grids, [A]."""
    toys: Mapping[str, Sequence[Recovery]]
    """By name one `Recovery` per seed."""
    grid: Sequence[Sequence[Recovery]]
    """32 non-negative features in `dimensions[d]`, `active[a]` of them active, [D][A]."""
    signed_grid: Sequence[Sequence[Recovery]]
    """The same with random signs."""

    def summary(self) -> str:
        lines = [f"Two toys of 32 features, {len(self.toys[HARD])} seeds; grids of {len(self.dimensions)} × "
                 f"{len(self.active)}"]  # fmt: skip
        return "\n".join([*lines, *(f"  {figure_line(one)}" for one in self.effects())])

    def rows(self) -> list[dict[str, Any]]:
        found = [
            {"toy": name, "seed": place, "dimensions": None, "active": None, **one.rows()[0]}
            for name, runs in self.toys.items()
            for place, one in enumerate(runs)
        ]
        for name, grid in (("non-negative", self.grid), ("signed", self.signed_grid)):
            found += [
                {"toy": name, "seed": 0, "dimensions": d, "active": a, **cell.rows()[0]}
                for d, row in zip(self.dimensions, grid, strict=True)
                for a, cell in zip(self.active, row, strict=True)
            ]
        return found

    def drawing(self) -> Markup:
        return Markup("").join(
            Markup("<h3>{}</h3><p>{}</p>{}").format(*section) for section in recovery_sections(self)[::-1]
        )

    def effects(self) -> list[Effect]:
        """Features recovered in each toy and the highest cosines, over seeds, beside random directions."""
        return [
            _over_seeds(
                f"{name}: {what}", [pick(one.scores) for one in runs], [pick(one.control) for one in runs], unit
            )
            for name, runs in self.toys.items()
            for what, pick, unit in (
                ("recovered, one to one", lambda s: float(s.recovered), "features of 32"),
                ("highest signed cosine, latents shared", lambda s: s.nearest_signed, "cosine"),
            )
        ]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON."""
        grids = {"non-negative": self.grid, "signed": self.signed_grid}
        return {
            "effects": [effect.to_json() for effect in self.effects()],
            "toys": {name: [one.to_json() for one in runs] for name, runs in self.toys.items()},
            "dimensions": self.dimensions,
            "active": self.active,
            "grids": {name: [[cell.to_json() for cell in row] for row in grid] for name, grid in grids.items()},
        }

    def __str__(self) -> str:
        lines = ["Two toys, 128 latents, TopK 3, the first seed"]
        table: list[tuple[str, ...]] = [("", *COLUMNS)]
        for name, runs in self.toys.items():
            table.append((name, *score_row(runs[0].scores)))
            table.append(("  random directions", *score_row(runs[0].control)))
        lines += _aligned(table)
        for effect in self.effects():
            lines.append(
                f"{effect.name}: {interval(effect.value, *(effect.interval or (None, None)))} {effect.units}, "
                f"{effect.n} seeds; "
                f"{effect.controls[0].name} {effect.controls[0].value:.3g}"
            )
        for name, grid in (("non-negative", self.grid), ("signed", self.signed_grid)):
            lines.append(f"Recovered of 32 {name} features by dimensions (rows) and active features (columns)")
            lines.append("    " + "".join(f"{a:4d}" for a in self.active))
            for d, row in zip(self.dimensions, grid, strict=True):
                lines.append(f"{d:4d}" + "".join(f"{cell.scores.recovered:4d}" for cell in row))
        return "\n".join(lines)


def recovery_study(
    *,
    seeds: int = 3,
    seed: int = 0,
    tokens: int = 400_000,
    cell_tokens: int = 150_000,
    scored: int = 16_384,
    dimensions: Sequence[int] = DIMENSIONS,
    active: Sequence[int] = ACTIVE,
) -> RecoveryStudy:
    """Train on two toys for several seeds and on grids of them: a few minutes on two cores.

    TopK with as many latents active as features are (3 where that varies from 2 to 4), 128 latents for the toys and 64
    for the grids, 256 tokens per step. A seed is both the world's and the dictionary's.

    Args:
        seeds: Seeds per toy.
        seed: The first of them, and that of the grids.
        tokens: Training tokens per toy.
        cell_tokens: Training tokens per cell of the grids.
        scored: Held-out tokens that are scored.
        dimensions: Rows of the grids.
        active: Columns of the grids.

    Returns:
        Every `Recovery`.
    """

    def one(name: str, world: FeatureWorld, d_sae: int, k: int, budget: int, place: int) -> Recovery:
        config = TrainConfig(
            d_sae=d_sae, selector=TopKRule(k), tokens=budget, batch=256, dead_after=max(256, budget // 10), seed=place
        )
        generator = FeatureGenerator(replace(world, seed=place))
        return recover(generator, {name: config}, tokens=scored, seed=place)[0]

    def grid(signed: bool) -> list[list[Recovery]]:
        return [
            [
                one(
                    f"{a} of 32",
                    FeatureWorld(32, d, active=(a, a), signed=signed, spread=0.2),
                    64,
                    a,
                    cell_tokens,
                    seed,
                )
                for a in active
            ]
            for d in dimensions
        ]

    toys = {name: [one(name, world, 128, 3, tokens, seed + i) for i in range(seeds)] for name, world in TOYS.items()}
    return RecoveryStudy(dimensions, active, toys, grid(False), grid(True))


def _over_seeds(name: str, found: Sequence[float], random: Sequence[float], units: str) -> Effect:
    """A figure's mean over seeds with its bootstrap interval, beside random directions of the same number."""

    def ends(values: Sequence[float]) -> tuple[float, float] | None:
        return bootstrap_interval(values) if len(values) > 1 else None

    control = Control("random directions", sum(random) / len(random), ends(random), len(random))
    return Effect(name, sum(found) / len(found), len(found), ends(found), (control,), "", units)


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table]


def _flat(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Scores with an interval as two figures."""
    low, high = scores["f1_interval"]
    return {**{name: value for name, value in scores.items() if name != "f1_interval"}, "f1_low": low, "f1_high": high}


def recovery_sections(study: RecoveryStudy) -> list[tuple[str, str, Markup]]:
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
            effects_html(study.effects()),
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
    return heatmap_html(
        rows=[str(d) for d in study.dimensions],
        columns=[str(a) for a in study.active],
        values=values,
        title=title,
        row_axis=f"dimensions ({name})",
        column_axis="active features",
        cell_text=[[f"{value:.0f}" for value in row] for row in values],
        scale=Scale(0.0, 32.0),
    )
