"""Our sums of terms are the losses that the peers' own trainers compute, with the same gradients.

Where a peer leaves a gradient out (sparsify: the encoder's of AuxK and of multi-TopK) or gives it to something else,
the case says so, and the rest is compared.
"""

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cutaway.dictionaries.training.parameters import Parameters
from cutaway.dictionaries.training.rules import BatchTopKRule, GatedRule, JumpReLURule, ReLURule, Rule, TopKRule
from cutaway.dictionaries.training.step import TrainingState, step
from cutaway.dictionaries.training.terms import (
    L0,
    AuxK,
    GatedAuxiliary,
    Lp,
    Matryoshka,
    MultiTopK,
    PreActivation,
    QuadraticL0,
    Reconstruction,
    Tanh,
    Term,
)

K = 7


@dataclass(frozen=True)
class Case:
    """A rule and terms; `subtract`: b_dec is taken off the input; `least`: dead latents that there must be.

    `without` names gradients that the peer computes otherwise, and `why`.
    """

    rule: Rule
    terms: tuple[Term, ...]
    subtract: bool = True
    least: int = 0
    without: tuple[str, ...] = ()
    why: str = ""


_SUM, _FVU = Reconstruction("sum"), Reconstruction("fvu")
_JUMP = JumpReLURule(bandwidth=0.5)
_DECODER_ALONE = ("encoder", "encoder_bias", "decoder_bias")
CASES: dict[str, dict[str, Case]] = {
    "saelens": {
        "standard": Case(ReLURule(), (_SUM, Lp(0.3, norms="l2"))),
        "topk": Case(TopKRule(K), (_SUM, AuxK(1.0, form="sum", by_share=True)), least=40),
        "topk-by-norm": Case(TopKRule(K, by_norm=True), (_SUM,)),
        "batchtopk": Case(BatchTopKRule(K), (_SUM, AuxK(1.0, form="sum", by_share=True)), least=40),
        "batchtopk-by-norm": Case(BatchTopKRule(K, by_norm=True), (_SUM,)),
        "matryoshka": Case(BatchTopKRule(K, by_norm=True), (Matryoshka((12 / 96, 0.5, 1.0)),)),
        "jumprelu-step": Case(_JUMP, (_SUM, L0(0.2))),
        "jumprelu-quadratic": Case(_JUMP, (_SUM, QuadraticL0(K, coefficient=0.2, per="token"))),
        "jumprelu-tanh": Case(
            JumpReLURule(bandwidth=0.5, through_pre=True),
            (_SUM, Tanh(0.2, warmup=0.0), PreActivation(0.01, dead_only=True)),
            least=40,
        ),
    },
    "sparsify": {
        "sae": Case(TopKRule(K), (_FVU,)),
        "auxk": Case(
            TopKRule(K),
            (_FVU, AuxK(0.5, form="fvu", by_share=True)),
            least=40,
            without=_DECODER_ALONE,
            why="AuxK's gradient ends at its encoder",
        ),
        "multi_topk": Case(
            TopKRule(K), (_FVU, MultiTopK()), without=_DECODER_ALONE, why="multi-TopK's gradient ends at its encoder"
        ),
        "transcoder": Case(TopKRule(K), (_FVU,), subtract=False),
        "skip_transcoder": Case(TopKRule(K), (_FVU,), subtract=False),
    },
    "dictionary_learning": {
        "standard": Case(ReLURule(), (_SUM, Lp(0.1))),
        "april": Case(ReLURule(), (_SUM, Lp(0.1, norms="l2"))),
        "topk": Case(TopKRule(K), (_SUM, AuxK(1 / 32, form="residual")), least=20),
        "batchtopk": Case(BatchTopKRule(K), (_SUM, AuxK(1 / 32, form="residual")), least=20),
        "gated": Case(GatedRule(), (_SUM, Lp(0.1, of="gate"), GatedAuxiliary())),
        "jumprelu": Case(
            _JUMP,
            (_SUM, QuadraticL0(K)),
            subtract=False,
            without=("threshold",),
            why="it counts on what is left after the jump, where the window below the threshold is empty",
        ),
    },
}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_the_peers(tmp_path: Path, peer: Callable[[str], Path], name: str) -> None:
    worker = Path(__file__).with_name("losses_worker.py")
    done = subprocess.run(
        [peer(name), worker, name, tmp_path], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    made = {path.stem: load_file(path) for path in tmp_path.glob("*.safetensors")}
    assert set(made) == set(CASES[name])
    wrong: dict[str, object] = {}
    for case, theirs in made.items():
        ours = CASES[name][case]
        weights = {key.removeprefix("w."): value for key, value in theirs.items() if key.startswith("w.")}
        assert len(theirs["dead"]) >= ours.least
        for way in ("dense", "sparse"):
            result = step(
                Parameters.of(weights),
                ours.rule,
                ours.terms,
                theirs["x"],
                theirs.get("y"),
                TrainingState(theirs["dead"]),
                subtract_b_dec=ours.subtract,
                way=way,
            )
            found = {"loss": relative(result.loss, theirs["loss"])}
            for key, gradient in result.gradients.tensors().items():
                found[key] = relative(gradient, theirs[f"g.{key}"])
            left_out = {key: found.pop(key) for key in ours.without}
            assert (max(left_out.values()) > 1e-3) if left_out else not ours.why, (case, left_out)
            if max(found.values()) > 2e-5:
                wrong[f"{case}, {way}"] = {key: error for key, error in found.items() if error > 2e-5}
    assert not wrong, wrong


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return ((value - reference).abs().max() / reference.abs().max().clamp_min(1e-12)).item()
