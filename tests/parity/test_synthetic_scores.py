"""Our scores of found features beside SAELens' (SynthSAEBench): the same numbers for the same latents and features."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cutaway.subjects.superposition.generator import FeatureGenerator, FeatureWorld
from cutaway.subjects.superposition.scores import HELD_OUT, random_code, score_dictionary

_WORKER = """
import json, sys
from safetensors.torch import load_file
from sae_lens.synthetic import evals

t = load_file(sys.argv[1])
found = evals.compute_classification_metrics(t["latents"], t["features"], t["found"], t["true"])
shrinkage, dead, l0 = evals.ShrinkageCalculator(), evals.DeadLatentsCalculator(len(t["found"])), evals.L0Calculator()
shrinkage.add_batch(t["written"], t["x"])
dead.add_batch(t["latents"])
l0.add_batch(t["latents"])
print(json.dumps({
    "mcc_absolute": evals.mean_correlation_coefficient(t["found"], t["true"]),
    "uniqueness": evals.feature_uniqueness(t["found"], t["true"]),
    "precision": found.precision, "recall": found.recall, "f1": found.f1_score,
    "shrinkage": shrinkage.compute(), "dead": dead.compute() / len(t["found"]), "l0": l0.compute(),
}))
"""


@pytest.mark.parametrize("latents", [20, 60])
def test_scores_are_those_of_saelens(latents: int, tmp_path: Path, peer: Callable[[str], Path]) -> None:
    python = peer("saelens")
    generator = FeatureGenerator(FeatureWorld(40, 12, 3.0, exponent=0.5, magnitude=(2, 1), spread=0.3, trees=8, seed=2))
    directions, code = random_code(latents, 3, generator, seed=7)
    directions = directions.clone()
    directions[0] = generator.directions[3]  # not all by chance
    ours = score_dictionary(directions, code, generator, tokens=1024, batch=1024).to_json()
    made = generator.batch(HELD_OUT, 1024)
    activations, written = code(made.x)
    tensors = {
        "latents": activations,
        "written": written,
        "x": made.x,
        "features": made.dense(40),
        "found": directions,
        "true": generator.directions,
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "made.safetensors")
    done = subprocess.run(
        [python, "-c", _WORKER, tmp_path / "made.safetensors"], capture_output=True, text=True, check=True
    )
    theirs = json.loads(done.stdout.splitlines()[-1])
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-5), name
    assert torch.isfinite(activations).all()
