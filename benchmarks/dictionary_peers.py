"""One training run of a dictionary by one method, in the environment that the method lives in.

    .venvs/saelens/bin/python benchmarks/dictionary_peers.py '{"method": "saelens", ...}'

benchmarks/dictionaries.py writes the request (see `Request`), starts this file as a fresh process and reads the last
line of the output. Only torch, safetensors and what the method needs are imported. Every peer takes its own trainer's
step. What a dictionary is worth is measured here, by the same few lines for all: each method hands over its weights in
one form, and no peer's own idea of a loss, of L0 or of dead is used.
"""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_CHUNK = 1024  # tokens measured at once
_CURVE_TOKENS = 1024  # held-out tokens that the loss of each of the last steps is measured on


@dataclass(frozen=True)
class Request:
    """What to run. `data` holds x [n, d] and held [m, d]; `save`, where given, gets the final weights.

    `selector` is topk, batchtopk or jumprelu, and k the L0 to reach. The loss is measured after each of the `last`
    steps, and after every `curve`-th step before that where `curve` is not 0; the clock stands still meanwhile.
    """

    method: str
    data: str
    d_sae: int
    k: int
    batch: int
    steps: int
    selector: str = "topk"
    learning_rate: float = 1e-3
    seed: int = 0
    last: int = 20
    curve: int = 0
    save: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Weights:
    """h = (x − b_dec) · W_enc + b_enc; a = h where it is selected; x̂ = a · W_dec + b_dec. `threshold` for jumprelu."""

    W_enc: Tensor  # [d, F]
    b_enc: Tensor  # [F]
    W_dec: Tensor  # [F, d]
    b_dec: Tensor  # [d]
    threshold: Tensor | None = None  # [F]


@dataclass(frozen=True)
class Method:
    """A trainer at work: one step on a batch [n, d], and its weights as they are now."""

    step: Callable[[Tensor], object]
    weights: Callable[[], Weights]


def rows_of(number: int, request: Request, n: int) -> Tensor:
    """Numbers of the rows of batch `number`: every pass over the n rows is in another order, of the seed alone."""
    turn, place = divmod(number, n // request.batch)
    return _order(n, request.seed * 1_000_003 + turn)[place * request.batch : (place + 1) * request.batch]


@lru_cache(maxsize=2)
def _order(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


# What a dictionary is worth


@torch.no_grad()
def activations(weights: Weights, x: Tensor, selector: str, k: int) -> Tensor:
    """a [n, F] of x [n, d], chosen as in training: the k largest of a token, k·n of all, or above the thresholds."""
    h = torch.addmm(weights.b_enc, x - weights.b_dec, weights.W_enc)
    if selector == "jumprelu":
        assert weights.threshold is not None
        return h * (h > weights.threshold)
    if selector == "topk":
        top = h.topk(k, dim=1)
        return torch.zeros_like(h).scatter_(1, top.indices, top.values.relu())
    flat = h.relu_().flatten()
    top = flat.topk(k * len(x), sorted=False)
    return torch.zeros_like(flat).scatter_(0, top.indices, top.values).view_as(h)


@torch.no_grad()
def measure(weights: Weights, held: Tensor, selector: str, k: int) -> dict[str, float]:
    """On held-out activations: loss, mean_b Σ_d (x − x̂)²; variance explained; L0; share of latents that never fired."""
    loss, active = 0.0, 0
    fired = torch.zeros(len(weights.W_dec), dtype=torch.bool)
    for x in held.split(_CHUNK):
        a = activations(weights, x, selector, k)
        fired |= (a != 0).any(0)
        active += int((a != 0).sum())
        loss += float((torch.sparse.mm(a.to_sparse(), weights.W_dec) + weights.b_dec - x).double().square().sum())
    variance = float((held - held.mean(0)).double().square().sum())
    return {
        "loss": loss / len(held),
        "variance_explained": 1 - loss / variance,
        "l0": active / len(held),
        "dead": 1 - float(fired.double().mean()),
    }


class Recorder:
    """The clock and the curve of a run; the clock stands still while the loss is measured."""

    def __init__(self, request: Request, held: Tensor) -> None:
        self.request = request
        self.held = held
        self.seconds: list[float] = []
        self.curve: dict[int, float] = {}
        self.peak_bytes = 0
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # sets the high-water mark back to what is resident now
        self.before = resident("VmRSS")
        self.started = time.perf_counter()

    def begin(self) -> None:
        self.started = time.perf_counter()

    def end(self, weights: Callable[[], Weights]) -> None:
        """A step is done."""
        self.seconds.append(time.perf_counter() - self.started)
        done = len(self.seconds)
        late = done > self.request.steps - self.request.last
        if late or (self.request.curve and (done == 1 or done % self.request.curve == 0)):
            self.peak_bytes = self.peak_bytes or max(0, resident("VmHWM") - self.before)
            found = measure(weights(), self.held[:_CURVE_TOKENS], self.request.selector, self.request.k)
            self.curve[done] = found["loss"]

    def result(self, weights: Weights) -> dict[str, Any]:
        request = self.request
        warm_up = min(5, len(self.seconds) // 2)
        counted = self.seconds[warm_up:]
        late = [loss for step, loss in self.curve.items() if step > request.steps - request.last]
        return {
            "tokens_per_second": request.batch * len(counted) / sum(counted),
            "memory_mb": self.peak_bytes / 2**20,
            "steps": request.steps,
            "final_loss": sum(late) / len(late),
            "curve": {str(step): loss for step, loss in self.curve.items()},
            "threads": torch.get_num_threads(),
            **measure(weights, self.held, request.selector, request.k),
        }


def resident(name: str) -> int:
    """Bytes of `VmRSS` or `VmHWM` of this process, 0 where the system does not tell."""
    with contextlib.suppress(OSError), open("/proc/self/status") as lines:
        for line in lines:
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return 0


# The methods


def saelens(request: Request, first: Tensor) -> Method:
    """SAELens: `SAETrainer._train_step`, as its `fit` calls it; defaults, but for what a request sets for all."""
    from sae_lens.config import SAETrainerConfig  # pyright: ignore[reportMissingImports]
    from sae_lens.saes.batchtopk_sae import (  # pyright: ignore[reportMissingImports]
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
    )
    from sae_lens.saes.jumprelu_sae import (  # pyright: ignore[reportMissingImports]
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
    )
    from sae_lens.saes.topk_sae import (  # pyright: ignore[reportMissingImports]
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )
    from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore[reportMissingImports]

    size = {"d_in": first.shape[1], "d_sae": request.d_sae}
    sparse = (
        {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False} if request.options.get("sparse") else {}
    )
    match request.selector:
        case "topk":
            sae = TopKTrainingSAE(TopKTrainingSAEConfig(**size, k=request.k, **sparse))
        case "batchtopk":
            sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**size, k=request.k))
        case _:
            sae = JumpReLUTrainingSAE(
                JumpReLUTrainingSAEConfig(**size, jumprelu_sparsity_loss_mode="quadratic", target_l0=request.k)
            )
    rate = 3e-4 if request.options.get("own") else request.learning_rate  # as its runner's configuration has it
    config = SAETrainerConfig(
        total_training_samples=request.steps * request.batch,
        train_batch_size_samples=request.batch,
        lr=rate,
        lr_end=rate,
        autocast=bool(request.options.get("autocast")),
    )
    trainer = SAETrainer(config, sae, data_provider=iter(()))
    if request.options.get("fused"):
        trainer.optimizer.param_groups[0].update(foreach=False, fused=True)

    def step(x: Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    def weights() -> Weights:
        norm = sae.W_dec.detach().norm(dim=1) if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False) else 1.0
        return Weights(
            W_enc=sae.W_enc.detach() * norm,
            b_enc=sae.b_enc.detach() * norm,
            W_dec=sae.W_dec.detach() / (norm[:, None] if isinstance(norm, Tensor) else 1.0),
            b_dec=sae.b_dec.detach(),
            threshold=sae.threshold.detach() if request.selector == "jumprelu" else None,
        )

    return Method(step, weights)


def dictionary_learning(request: Request, first: Tensor) -> Method:
    """dictionary_learning: the trainer's `update`, as its `trainSAE` calls it; no warm-up of rate or sparsity."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer  # pyright: ignore[reportMissingImports]
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer  # pyright: ignore[reportMissingImports]
    from dictionary_learning.trainers.top_k import TopKTrainer  # pyright: ignore[reportMissingImports]

    own = bool(request.options.get("own"))
    shared = {
        "steps": request.steps + 1,  # it asks for more steps than warm-up
        "activation_dim": first.shape[1],
        "dict_size": request.d_sae,
        "layer": 0,
        "lm_name": "stored activations",
        "lr": None if own else request.learning_rate,
        "warmup_steps": min(1000, request.steps // 2) if own else 0,
        "device": "cpu",
        "seed": request.seed,
    }
    match request.selector:
        case "topk":
            trainer = TopKTrainer(**shared, k=request.k)
        case "batchtopk":
            trainer = BatchTopKTrainer(**shared, k=request.k)
        case _:
            trainer = JumpReluTrainer(**shared, target_l0=float(request.k), sparsity_warmup_steps=0)
    if request.options.get("fused"):
        trainer.optimizer.param_groups[0].update(foreach=False, fused=True)
    half = torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(request.options.get("autocast")))
    number = 0

    def step(x: Tensor) -> None:
        nonlocal number
        with half:
            trainer.update(number, x)
        number += 1

    def weights() -> Weights:
        ae = trainer.ae
        if request.selector == "jumprelu":  # it does not subtract b_dec: x·W + b is (x − b_dec)·W + (b + b_dec·W)
            W_enc, b_dec = ae.W_enc.detach(), ae.b_dec.detach()
            return Weights(W_enc, ae.b_enc.detach() + b_dec @ W_enc, ae.W_dec.detach(), b_dec, ae.threshold.detach())
        return Weights(
            W_enc=ae.encoder.weight.detach().T.contiguous(),
            b_enc=ae.encoder.bias.detach(),
            W_dec=ae.decoder.weight.detach().T.contiguous(),
            b_dec=ae.b_dec.detach(),
        )

    return Method(step, weights)


def _cutaway(request: Request, first: Tensor) -> Method:
    import dictionary_ours

    return dictionary_ours.sparse(request, first)


def _dense(request: Request, first: Tensor) -> Method:
    import dictionary_ours

    return dictionary_ours.dense(request, first)


METHODS: dict[str, Callable[[Request, Tensor], Method]] = {
    "cutaway": _cutaway,
    "dense": _dense,
    "saelens": saelens,
    "dictionary_learning": dictionary_learning,
}


class _Stored(torch.nn.Module):
    """What sparsify's trainer takes for a language model: its one layer's output at token i is stored activation i."""

    def __init__(self, x: Tensor, on_forward: Callable[[], None]) -> None:
        super().__init__()
        self.x = x
        self.on_forward = on_forward
        self.layer = torch.nn.Identity()
        self.base_model = _Named(self.layer)
        self.device = x.device
        self.dummy_inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.int64)}

    def forward(self, input_ids: Tensor) -> Tensor:
        self.on_forward()
        return self.layer(self.x[input_ids])


class _Named(torch.nn.Module):
    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer


def run_sparsify(request: Request, x: Tensor, recorder: Recorder) -> Weights:
    """sparsify: `Trainer.fit` itself, fed with stored activations; a step lasts from one forward to the next."""
    from sparsify import SparseCoderConfig, TrainConfig, Trainer  # pyright: ignore[reportMissingImports]

    adam = request.options.get("optimizer") == "adam"
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            SparseCoderConfig(num_latents=request.d_sae, k=request.k),
            batch_size=1,
            optimizer="adam" if adam else "signum",
            # a step of sign descent is no step of Adam
            lr=request.learning_rate if adam and not request.options.get("own") else None,
            lr_warmup_steps=min(1000, request.steps // 2) if request.options.get("own") else 0,
            hookpoints=["layer"],
            init_seeds=[request.seed],
            log_to_wandb=False,
            save_every=1 << 60,
            save_dir=folder,
        )
        rows = [{"input_ids": rows_of(number, request, len(x))} for number in range(request.steps)]
        entered = -1  # the first forward is the one that finds the width

        def on_forward() -> None:
            nonlocal entered
            if entered >= 1:
                recorder.end(weights)
            entered += 1
            recorder.begin()

        trainer: Any = Trainer(config, rows, _Stored(x, on_forward))  # pyright: ignore[reportArgumentType]

        def weights() -> Weights:
            sae = next(iter(trainer.saes.values()))
            averaged = [one for one in trainer.optimizers if hasattr(one, "eval")]
            for one in averaged:  # schedule-free descent keeps its average aside while it trains
                one.eval()
            found = Weights(
                W_enc=sae.encoder.weight.detach().T.clone(),
                b_enc=sae.encoder.bias.detach().clone(),
                W_dec=sae.W_dec.detach().clone(),
                b_dec=sae.b_dec.detach().clone(),
            )
            for one in averaged:
                one.train()
            return found

        with contextlib.redirect_stdout(sys.stderr):
            trainer.fit()
        recorder.begin()  # what the last step took is mixed with the writing of a checkpoint: not counted
        found = weights()
        recorder.seconds.append(recorder.seconds[-1])
        recorder.curve[request.steps] = measure(found, recorder.held[:_CURVE_TOKENS], "topk", request.k)["loss"]
        return found


def run(request: Request) -> dict[str, Any]:
    """Train, and say what came out."""
    stored = load_file(request.data)
    x, held = stored["x"].clone(), stored["held"].clone()
    del stored
    recorder = Recorder(request, held)
    if request.method == "sparsify":
        weights = run_sparsify(request, x, recorder)
    else:
        torch.manual_seed(request.seed)
        method = METHODS[request.method](request, x[rows_of(0, request, len(x))])
        shuffle = torch.Generator().manual_seed(1) if request.options.get("shuffle") else None
        for number in range(request.steps):
            rows = rows_of(number, request, len(x))
            if shuffle is not None:  # the same batch, summed in another order
                rows = rows[torch.randperm(len(rows), generator=shuffle)]
            part = x[rows]
            recorder.begin()
            method.step(part)
            recorder.end(method.weights)
        weights = method.weights()
    if request.save is not None:
        Path(request.save).parent.mkdir(parents=True, exist_ok=True)
        named = {name: value.contiguous() for name, value in vars(weights).items() if value is not None}
        save_file(named, request.save + ".tmp")
        os.replace(request.save + ".tmp", request.save)
    return recorder.result(weights)


if __name__ == "__main__":
    print(json.dumps(run(Request(**json.loads(sys.argv[1])))))
