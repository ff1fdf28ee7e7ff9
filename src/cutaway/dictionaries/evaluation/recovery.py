"""Do dictionaries find features that are known? Training on a generator's stream, scored beside a random dictionary."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from cutaway.artifacts.manifest import json_hash
from cutaway.artifacts.results import Control, Effect
from cutaway.artifacts.statistics import bootstrap_interval
from cutaway.dictionaries.dictionary import Dictionary, Port
from cutaway.dictionaries.training.config import TrainConfig
from cutaway.dictionaries.training.jobs import Job, train_jobs
from cutaway.dictionaries.training.rules import TopKRule
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


@dataclass(frozen=True)
class Recovery:
    """A dictionary that was trained on made activations, its scores, and those of a random one of the same size."""

    name: str
    dictionary: Dictionary
    scores: Scores
    control: Scores

    def to_json(self) -> dict[str, Any]:
        """The scores as JSON."""
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
    """Train all on one stream and score each on `tokens` held-out tokens.

    The control has as many random directions, drawn from `seed`, the dictionary's L0 of them active, rounded.
    Raises `CutawayError` as `train_jobs` does.
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


@dataclass(frozen=True)
class RecoveryStudy:
    """`toys`: by name one `Recovery` a seed. `grid[d][a]`: 32 non-negative features in `dimensions[d]`, `active[a]` of
    them active; `signed_grid`: the same with random signs."""

    dimensions: Sequence[int]
    active: Sequence[int]
    toys: Mapping[str, Sequence[Recovery]]
    grid: Sequence[Sequence[Recovery]]
    signed_grid: Sequence[Sequence[Recovery]]

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
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
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
    """Train on the two toys for several seeds and on the grids: a few minutes on two cores.

    TopK with as many latents active as features are (3 where that varies from 2 to 4), 128 latents for the toys and 64
    for the grids, 256 tokens a step, `scored` held-out tokens. A seed is both the world's and the dictionary's.
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
