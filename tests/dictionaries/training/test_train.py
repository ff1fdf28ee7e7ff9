"""Training: recovers planted features, follows the dense trajectory, and resumes to the same bits after a kill."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from dense_oracle import dense_gradients
from planted import mean_max_cosine, planted
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.dictionaries.dictionary import Dictionary, Port, random_dictionary
from cutaway.dictionaries.training.jobs import CHECKPOINT, Job, TrainConfig, Trained, Trainer, train_jobs
from cutaway.dictionaries.training.parameters import Parameters
from cutaway.dictionaries.training.rules import TopKRule
from cutaway.dictionaries.training.scaling import geometric_median
from cutaway.dictionaries.training.sources import Tensors
from cutaway.dictionaries.training.terms import AuxK, Reconstruction

SITE = "blocks.0.resid_post"


def topk(k: int, **options) -> TrainConfig:
    return TrainConfig(selector=TopKRule(k), **options)


SMALL = topk(4, d_sae=96, tokens=200 * 64, batch=64, learning_rate=3e-3, warmup=10, dead_after=2_000)


def batches_of(x: Tensor, batch: int, start: int) -> Iterator[Tensor]:
    return (values[SITE] for values in Tensors({SITE: x}).batches(batch, start))


def train_on(x: Tensor, config: TrainConfig, folder: Path | None = None, **options) -> Trained:
    return train_jobs(Tensors({SITE: x}), {"": Job(config, (SITE,))}, folder=folder, **options)[""]


class Stream(Tensors):
    """A source with other batches than its tensors' own."""

    def __init__(self, x: Tensor, batches: Callable[[int], Iterator[Tensor]]) -> None:
        super().__init__({SITE: x})
        self.make = batches

    def batches(self, size: int, start: int = 0) -> Iterator[Mapping[str, Tensor]]:
        return ({SITE: batch} for batch in self.make(start))


def weights(dictionary: Dictionary) -> dict[str, Tensor]:
    return {name: getattr(dictionary, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}


def test_recovers_planted_features_where_a_random_dictionary_does_not() -> None:
    features, x = planted(d=32, n_features=48, n_tokens=8_192, active=2, seed=0)
    config = topk(4, d_sae=64, tokens=400_000, batch=512, learning_rate=4e-3, dead_after=20_000)
    dictionary = train_on(x, config).dictionary
    found, chance = mean_max_cosine(dictionary.W_dec, features), []
    for seed in range(10, 13):
        control = random_dictionary(dictionary, x[:2_000], seed)
        chance.append(mean_max_cosine(control.W_dec, features))
    assert found > 0.95
    assert max(chance) < 0.65
    explained = 1 - (x - dictionary(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert explained > 0.93


def test_trajectory_equals_dense_autograd() -> None:
    _, x = planted(d=24, n_features=40, n_tokens=2_048, active=3, seed=1)
    config = replace(SMALL, dead_after=256, seed=5)  # so soon that AuxK is at work in most steps
    batches = list(zip(range(30), batches_of(x, config.batch, 0), strict=False))
    trainer = Trainer(config, batches[0][1])
    oracle = {name: tensor.clone() for name, tensor in trainer.parameters.tensors().items()}
    adam = torch.optim.Adam(list(oracle.values()), lr=0.0, betas=config.adam_betas, foreach=False)
    silent = torch.zeros(config.d_sae, dtype=torch.int64)
    auxiliary = 0.0
    for step, batch in batches:
        scaled = batch * trainer.scaling_in.scale
        dead = (silent >= config.dead_after).nonzero().flatten()
        now = Parameters.of(oracle)
        _, extra, gradients = dense_gradients(now, scaled, 4, dead=dead, aux_k=12, aux_coefficient=1 / 32)
        auxiliary += extra.item()
        h = (scaled - now.decoder_bias) @ now.encoder.T + now.encoder_bias
        fires = ((torch.zeros_like(h).scatter(1, h.topk(4, 1).indices, 1.0) * h) > 0).any(0)
        silent = torch.where(fires, 0, silent + len(batch))
        direction = now.decoder
        along = (gradients.decoder * direction).sum(1, keepdim=True) * direction
        gradients = replace(gradients, decoder=gradients.decoder - along)
        for name, tensor in oracle.items():
            tensor.grad = getattr(gradients, name)
        adam.param_groups[0]["lr"] = config.rate(step)
        adam.step()
        oracle["decoder"] /= oracle["decoder"].norm(dim=1, keepdim=True)
        trainer.step(batch)
    assert auxiliary > 0
    for name, tensor in trainer.parameters.tensors().items():
        torch.testing.assert_close(tensor, oracle[name], rtol=1e-4, atol=1e-5)
    assert torch.equal(trainer.silent, silent)


def test_decoder_rows_stay_unit_vectors_and_the_scale_is_folded() -> None:
    _, x = planted(d=24, n_features=40, n_tokens=2_048, active=3, seed=2)
    trainer = Trainer(SMALL, x[:64])
    for batch, _ in zip(batches_of(100 * x, 64, 0), range(5), strict=False):
        trainer.step(batch)
    dictionary = trainer.dictionary([Port(SITE, 24)])
    torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(96))
    raw = 100 * x[:50]
    p = trainer.parameters
    h = (raw * trainer.scaling_in.scale - p.decoder_bias) @ p.encoder.T + p.encoder_bias
    a = torch.zeros_like(h).scatter(1, h.topk(4, 1).indices, 1.0) * h.relu()
    written = (a @ p.decoder + p.decoder_bias) / trainer.scaling_in.scale
    torch.testing.assert_close(dictionary(raw), written, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(dictionary.encode(raw), a / trainer.scaling_in.scale[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("coefficient", [0.0, 1 / 32])
def test_dead_latents_are_counted_in_tokens_and_revived_by_the_auxiliary_term(coefficient: float) -> None:
    _, x = planted(d=24, n_features=40, n_tokens=4_096, active=3, seed=3)
    config = replace(SMALL, tokens=600 * 64, dead_after=1_000, terms=(Reconstruction(), AuxK(coefficient, form="sum")))
    trainer = Trainer(config, x[:64])
    ten = set(range(10))
    trainer.parameters.encoder_bias[:10] = -2.5  # never among the top k, though sometimes above zero
    for step, batch in zip(range(16), batches_of(x, 64, 0), strict=False):
        assert not trainer.dead().numel(), f"{step * 64} tokens are too few to be dead"
        trainer.step(batch)
    assert ten <= set(trainer.dead().tolist())  # silent for 16 · 64 = 1,024 tokens
    for _, batch in zip(range(500), batches_of(x, 64, 16), strict=False):
        trainer.step(batch)
    still = len(ten & set(trainer.dead().tolist()))
    assert still >= 8 if coefficient == 0 else still <= 5


def test_geometric_median_ignores_outliers() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=generator) + 2
    spoiled = torch.cat([x, torch.full((20, 6), 1e4)])
    assert (geometric_median(spoiled) - 2).norm() < 0.3
    assert (spoiled.mean(0) - 2).norm() > 100
    point = geometric_median(x)
    distance = (x - point).norm(dim=1).sum()
    for shift in torch.randn(20, 6, generator=generator):
        assert (x - point - 0.05 * shift).norm(dim=1).sum() >= distance


def test_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CUTAWAY_QUIET", raising=False)
    _, x = planted(d=24, n_features=40, n_tokens=2_048, active=3, seed=4)
    whole = train_on(x, SMALL)

    def interrupted(stop: int, start: int) -> Iterator[Tensor]:
        for number, batch in enumerate(batches_of(x, 64, start), start):
            if number == stop:
                raise KeyboardInterrupt
            yield batch

    for stop in (37, 38, 120):
        with pytest.raises(KeyboardInterrupt):
            train_jobs(Stream(x, partial(interrupted, stop)), {"": Job(SMALL, (SITE,))}, folder=tmp_path)
    assert f"goes on at {37 * 64:,} of {SMALL.tokens:,} tokens ({tmp_path}, begun " in capsys.readouterr().err
    resumed = train_on(x, SMALL, tmp_path)
    assert f"goes on at {120 * 64:,} of {SMALL.tokens:,} tokens ({tmp_path}" in capsys.readouterr().err
    assert all(
        torch.equal(weights(whole.dictionary)[name], tensor) for name, tensor in weights(resumed.dictionary).items()
    )
    assert whole.history == resumed.history
    again = train_on(x, SMALL, tmp_path)  # a finished run has nothing left to do
    assert "goes on" not in capsys.readouterr().err
    assert torch.equal(again.dictionary.W_dec, whole.dictionary.W_dec)


KILLED = """
import sys, time, torch
sys.path.insert(0, {here!r})
from pathlib import Path
from planted import mean_max_cosine, planted
from cutaway.dictionaries.training.rules import TopKRule
from cutaway.dictionaries.training.sources import Tensors
from cutaway.dictionaries.training.jobs import Job, TrainConfig, train_jobs
torch.set_num_threads(1)
config = TrainConfig(
    d_sae=96, selector=TopKRule(4), tokens=200 * 64, batch=64, learning_rate=3e-3, warmup=10, dead_after=2_000
)
class Slow(Tensors):
    def batches(self, size, start=0):
        for batch in super().batches(size, start):
            time.sleep({pause})
            yield batch
source = Slow({{"s": planted(d=24, n_features=40, n_tokens=2_048, active=3, seed=4)[1]}})
print("ready", flush=True)
jobs = {{"": Job(config, ("s",))}}
trained = train_jobs(source, jobs, folder=Path({folder!r}), seconds_between_checkpoints=0.05)[""]
print(trained.dictionary.W_dec.double().sum().item().hex(), trained.dictionary.W_enc.double().sum().item().hex())
"""


def test_same_bits_after_kill_nine(tmp_path: Path) -> None:
    environment = os.environ | {"CUTAWAY_QUIET": "1", "OMP_NUM_THREADS": "1"}

    def start(folder: str, pause: float) -> subprocess.Popen[str]:
        code = KILLED.format(
            here=str(Path(__file__).parents[2] / "helpers"), folder=str(tmp_path / folder), pause=pause
        )
        return subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )

    quiet, disturbed = start("quiet", 0.0), start("disturbed", 0.05)
    expected = quiet.communicate(timeout=120)[0]
    assert disturbed.stdout is not None
    disturbed.stdout.readline()
    checkpoint = tmp_path / "disturbed" / CHECKPOINT
    deadline = time.monotonic() + 60
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.3))
    disturbed.send_signal(signal.SIGKILL)
    disturbed.communicate()
    from safetensors import safe_open

    with safe_open(checkpoint, framework="pt") as file:
        assert 0 < int((file.metadata() or {})["steps_done"]) < 200
    resumed = start("disturbed", 0.0).communicate(timeout=120)[0]
    assert resumed == expected
    assert "0x" in expected


def test_ctrl_c_saves_a_whole_step(tmp_path: Path) -> None:
    _, x = planted(d=24, n_features=40, n_tokens=2_048, active=3, seed=4)

    class Interrupting(Trainer):
        def step(self, x: Tensor, y: Tensor | None = None, **options):
            if self.steps_done == 20:
                os.kill(os.getpid(), signal.SIGINT)  # in the middle of a step
            return super().step(x, y, **options)

    import cutaway.dictionaries.training.jobs as training

    whole = train_on(x, SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "Trainer", Interrupting)
        with pytest.raises(KeyboardInterrupt):
            train_on(x, SMALL, tmp_path)
    assert Trainer.load(tmp_path / CHECKPOINT, SMALL, _source(x)).steps_done == 21
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert torch.equal(train_on(x, SMALL, tmp_path).dictionary.W_enc, whole.dictionary.W_enc)


def _source(x: Tensor) -> str:
    from cutaway.artifacts.manifest import json_hash

    return json_hash({"source": Tensors({SITE: x}).identity, "sites": [(SITE,), ()]})


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    _, x = planted(d=24, n_features=40, n_tokens=1_024, active=3, seed=4)
    short = replace(SMALL, tokens=640)
    train_on(x, short, tmp_path)
    with pytest.raises(CutawayError, match="another configuration"):
        train_on(x, replace(short, selector=TopKRule(5)), tmp_path)
    with pytest.raises(CutawayError, match="other activations"):
        train_on(x + 1, short, tmp_path)
    data = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(data[: len(data) // 2])
    with pytest.raises(CutawayError, match="not a readable checkpoint"):
        train_on(x, short, tmp_path)


def test_bad_activations_are_refused() -> None:
    _, x = planted(d=24, n_features=40, n_tokens=1_024, active=3, seed=4)
    spoiled = x.clone()
    spoiled[700, 3] = float("nan")
    with pytest.raises(CutawayError, match="NaN"):
        train_on(spoiled, SMALL)
    with pytest.raises(CutawayError, match="all activations"):
        train_on(torch.ones(128, 24), SMALL)
    with pytest.raises(CutawayError, match="less than one batch"):
        train_on(x[:10], SMALL)
    with pytest.raises(CutawayError, match="ended after 2 of 200"):
        train_jobs(Stream(x, lambda start: iter([x[:64], x[64:128]])), {"": Job(SMALL, (SITE,))})
    with pytest.raises(CutawayError, match="k = 97"):
        TrainConfig(d_sae=96, selector=TopKRule(97))


def test_history_is_json_and_improves() -> None:
    _, x = planted(d=24, n_features=40, n_tokens=2_048, active=3, seed=6)
    history = train_on(x, SMALL).history
    assert json.loads(json.dumps(history)) == list(history)
    assert history[-1]["variance_explained"] > history[0]["variance_explained"] + 0.1
    assert history[-1]["step"] == SMALL.steps
    assert all(record["l0"] <= 4 for record in history)


def test_k_is_annealed_from_its_start() -> None:
    rule = TopKRule(4, start_k=24, anneal=0.5)
    assert [rule.at(progress).k for progress in (0, 0.25, 0.4999, 0.5, 1)] == [24, 14, 4, 4, 4]
    _, x = planted(d=24, n_features=40, n_tokens=2_048, active=3, seed=6)
    history = train_on(x, replace(SMALL, selector=rule)).history
    assert history[0]["l0"] > 12
    assert history[-1]["l0"] <= 4
    with pytest.raises(CutawayError, match="k = 100"):
        replace(SMALL, selector=TopKRule(4, start_k=100))
