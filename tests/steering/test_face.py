"""The names that the package hands on, and results that print, tabulate, draw and save themselves."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cutaway.artifacts.command import recording
from cutaway.draw.result import Result
from cutaway.model.language_model import LanguageModel
from cutaway.steering.directions import add_direction, difference_of_means
from cutaway.steering.evaluation import evaluate_steering
from cutaway.steering.latents import Concept, Doses, SimilarLatents, steer_latent
from cutaway.steering.replies import Judging

POSITIVE = [[0, 5, 9, 11, 40], [0, 7, 33, 2], [0, 50, 51, 52, 53, 54]]
NEGATIVE = [[0, 6, 8], [0, 10, 12, 14, 16, 18, 20], [0, 44, 3, 3, 8]]


@pytest.mark.parametrize("name", ["steering", "subjects"])
def test_every_name_is_there_and_loads_nothing_heavy_before_it_is_used(name: str) -> None:
    package = getattr(__import__(f"cutaway.{name}"), name)
    assert all(getattr(package, one) is not None for one in package.__all__)
    code = f"import sys, cutaway.{name}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_results_are_of_one_family(tiny: LanguageModel, dictionary, tmp_path: Path) -> None:
    directions = difference_of_means(tiny, POSITIVE, NEGATIVE, positions=(-1,))
    how = Judging(lambda text: "other" if len(text) % 2 else "refused", ("refused",), 2)
    with recording("cutaway tour"):
        steered = evaluate_steering(
            tiny, NEGATIVE, directions.get(1, -1), lambda d: add_direction(d, 2.0), method="added", judging=how,
            neutral=POSITIVE, controls=(0, directions.get(1, -1).along(torch.ones(32))),
        )  # fmt: skip
    clamped = steer_latent(
        tiny, dictionary, 3, POSITIVE, Concept((8,)), doses=Doses(2.0, (1.0,)),
        controls=SimilarLatents(torch.full((80,), 0.1), 3), max_new_tokens=2,
    )  # fmt: skip
    assert steered.effects["refused"].command == "cutaway tour"
    assert "2 random directions" in repr(steered)
    results: list[Result] = [directions, steered, clamped]
    for i, result in enumerate(results):
        assert len(repr(result).splitlines()) <= 12
        assert len({tuple(row) for row in result.rows()}) == 1
        assert result.drawing()
        result.save(tmp_path / f"{i}.json")
        result.save(tmp_path / f"{i}.csv")
        result.save(tmp_path / f"{i}.html")
