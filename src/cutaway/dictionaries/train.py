"""Training a TopK dictionary on a stream of activations, resumable bit for bit.

    trained = train(partial(tensor_batches, activations, 512, 0), TrainConfig(d_sae=4096, k=32), site=site)

`from_model.py` does the same from a model and rows of tokens.

Loss and reductions are in `step.py`. Activations are scaled so that the mean distance from their centre is √d, b_dec
starts as the geometric median of the first batch, decoder rows are unit vectors with the encoder their transpose; the
decoder's gradient loses its part along each row before Adam, and rows are set back to length 1 after it.
"""

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.files import write_safetensors
from cutaway.artifacts.manifest import json_hash
from cutaway.artifacts.progress import Progress
from cutaway.dictionaries.dictionary import Dictionary, TopK, log_sparsity
from cutaway.dictionaries.step import Parameters, StepResult, topk_step

CHECKPOINT = "trainer.safetensors"


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Everything here changes the result, so it is part of a dictionary's identity.

    `tokens` counts every token each time it is used. `dead_after`: a latent silent for so many tokens is dead and gets
    the AuxK term, weighted `aux_coefficient`, over the `aux_k` (default d/2) strongest dead latents of each token.
    `learning_rate` rises over `warmup` steps and falls linearly to 0 over the last `decay` share of the steps.
    `low_precision`: find candidates for the top k in bfloat16 (see `topk_step`).
    """

    d_sae: int = 4096
    k: int = 32
    tokens: int = 4_000_000
    batch: int = 512
    learning_rate: float = 3e-3
    warmup: int = 100
    decay: float = 0.3
    adam_betas: tuple[float, float] = (0.9, 0.999)
    dead_after: int = 250_000
    aux_k: int | None = None
    aux_coefficient: float = 1 / 32
    low_precision: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.d_sae:
            raise CutawayError(f"k = {self.k} latents cannot be active out of d_sae = {self.d_sae}")
        for name in ("tokens", "batch", "learning_rate", "dead_after"):
            if getattr(self, name) <= 0:
                raise CutawayError(f"{name} = {getattr(self, name)}: it must be positive")
        if self.tokens < self.batch:
            raise CutawayError(f"tokens = {self.tokens} is less than one batch of {self.batch}")

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        return self.tokens // self.batch

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        falling = max(1.0, self.decay * self.steps)
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup), (self.steps - step) / falling)


@dataclass(frozen=True)
class Trained:
    """The dictionary, and `history`: one record now and then of step, loss, variance explained, dead latents."""

    dictionary: Dictionary
    history: tuple[Mapping[str, float], ...]


class Trainer:
    """The state of a training run: parameters, Adam's moments, and since when each latent has been silent."""

    def __init__(self, config: TrainConfig, first: Tensor) -> None:
        """Initialise from a first batch of activations [n, d], which fixes the scale and the centre."""
        self.config = config
        first = _checked(first, 0).float()
        d = first.shape[1]
        centre = geometric_median(first)
        spread = (first - centre).norm(dim=1).mean()
        if not spread > 1e-5 * first.abs().max():
            raise CutawayError("all activations of the first batch are the same: there is nothing to learn from them")
        self.scale = math.sqrt(d) / spread.item()
        generator = torch.Generator().manual_seed(config.seed)
        decoder = torch.nn.functional.normalize(torch.randn(config.d_sae, d, generator=generator), dim=1)
        decoder = decoder.to(first.device)
        self.parameters = Parameters(
            encoder=decoder.clone(),
            encoder_bias=decoder.new_zeros(config.d_sae),
            decoder=decoder,
            decoder_bias=centre * self.scale,
        )
        self.silent = torch.zeros(config.d_sae, dtype=torch.int64, device=first.device)
        self.fired = torch.zeros(config.d_sae, dtype=torch.float64, device=first.device)
        self.steps_done = 0
        self.history: list[dict[str, float]] = []
        self.adam = torch.optim.Adam(
            list(self.parameters.tensors().values()), lr=config.learning_rate, betas=config.adam_betas, fused=True
        )

    def step(self, x: Tensor) -> StepResult:
        """One optimiser step on a batch of activations [n, d] as the model has them."""
        config, parameters = self.config, self.parameters
        x = x.float() * self.scale
        result = topk_step(
            parameters,
            x,
            config.k,
            dead=self.dead(),
            aux_k=config.aux_k or x.shape[1] // 2,
            aux_coefficient=config.aux_coefficient,
            low_precision=config.low_precision,
        )
        if not torch.isfinite(result.reconstruction):
            _checked(x, self.steps_done)
            raise CutawayError(f"training diverged at step {self.steps_done}: lower the learning rate")
        gradients = result.gradients
        along = torch.linalg.vecdot(gradients.decoder, parameters.decoder)
        gradients.decoder.addcmul_(parameters.decoder, along[:, None], value=-1)
        for group in self.adam.param_groups:
            group["lr"] = config.rate(self.steps_done)
        for name, parameter in parameters.tensors().items():
            parameter.grad = getattr(gradients, name)
        self.adam.step()
        parameters.decoder.div_(torch.linalg.vector_norm(parameters.decoder, dim=1, keepdim=True))
        self.silent.add_(len(x)).masked_fill_(result.fired > 0, 0)
        if self.steps_done >= self._counting_from:
            self.fired += result.fired
        self.steps_done += 1
        return result

    @property
    def _counting_from(self) -> int:
        """Firings are counted in the last quarter of the steps: of the latents as they end, not as they began."""
        return self.config.steps * 3 // 4

    def dead(self) -> Tensor:
        """Latents that have been silent for `dead_after` tokens: [m]."""
        return (self.silent >= self.config.dead_after).nonzero().flatten()

    def dictionary(self, site: str, model: Mapping[str, Any], metadata: Mapping[str, Any]) -> Dictionary:
        """The dictionary as it is now, the scale folded in: h and a become lengths in the model's own units.

        With x' = s·x and b_dec' = s·b_dec the trained h' is s·((x − b_dec)·W_enc + b_enc'/s): dividing both biases by s
        divides every activation by s and changes neither the directions nor which latents are chosen.
        """
        parameters = self.parameters
        counted = (self.steps_done - self._counting_from) * self.config.batch
        return Dictionary(
            W_enc=parameters.encoder.T.contiguous(),
            b_enc=parameters.encoder_bias / self.scale,
            W_dec=parameters.decoder.clone(),
            b_dec=parameters.decoder_bias / self.scale,
            selector=TopK(self.config.k),
            site=site,
            model=dict(model),
            sparsity=log_sparsity(self.fired / counted) if counted > 0 else None,
            metadata=dict(metadata),
        )

    def save(self, path: Path, source: str) -> None:
        """Write the whole state as one file, in one piece; `source` names the data, so that no other resumes it."""
        tensors = {f"parameters.{name}": tensor for name, tensor in self.parameters.tensors().items()}
        for name, parameter in self.parameters.tensors().items():
            for key, value in self.adam.state[parameter].items():
                tensors[f"adam.{name}.{key}"] = value
        tensors |= {"silent": self.silent, "fired": self.fired}
        record = {
            "config": json.dumps(asdict(self.config)),
            "source": source,
            "scale": self.scale.hex(),
            "steps_done": str(self.steps_done),
            "history": json.dumps(self.history),
        }
        write_safetensors(path, {name: tensor.cpu().clone() for name, tensor in tensors.items()}, record)

    @classmethod
    def load(cls, path: Path, config: TrainConfig, source: str, device: torch.device | None = None) -> "Trainer":
        """The trainer that `save` wrote; `CutawayError` when it is of another configuration or of other data."""
        from safetensors import SafetensorError, safe_open

        way_out = f"name another folder, or remove {path} to begin again"
        try:
            with safe_open(path, framework="pt", device=str(device or "cpu")) as file:
                record = file.metadata() or {}
                # cloned, since a tensor inside the file's buffer is aligned otherwise, and products round accordingly
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CutawayError(f"{path} is not a readable checkpoint ({error}): {way_out}") from error
        if record.get("config") != json.dumps(asdict(config)):
            raise CutawayError(f"{path} is of a training run with another configuration: {way_out}")
        if record.get("source") != source:
            raise CutawayError(f"{path} is of a training run on other activations: {way_out}")
        trainer = cls.__new__(cls)
        trainer.config = config
        trainer.scale = float.fromhex(record["scale"])
        trainer.parameters = Parameters(**{name: tensors[f"parameters.{name}"] for name in Parameters.__annotations__})
        trainer.silent, trainer.fired = tensors["silent"], tensors["fired"]
        trainer.steps_done = int(record["steps_done"])
        trainer.history = json.loads(record["history"])
        named = trainer.parameters.tensors()
        trainer.adam = torch.optim.Adam(
            list(named.values()), lr=config.learning_rate, betas=config.adam_betas, fused=True
        )
        for name, parameter in named.items():
            keys = ("step", "exp_avg", "exp_avg_sq")
            trainer.adam.state[parameter] = {key: tensors[f"adam.{name}.{key}"] for key in keys}
        return trainer


def train(
    batches: Callable[[int], Iterator[Tensor]],
    config: TrainConfig,
    *,
    site: str,
    source: str = "",
    model: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    folder: Path | None = None,
    seconds_between_checkpoints: float = 30.0,
) -> Trained:
    """Train to the end, or from where an interrupted run with the same arguments stopped.

    `batches(start)` gives the batches [config.batch, d] from number `start` on, always the same ones; `source` is a
    hash of what they are. With a `folder` the state is written there every so many seconds, at the end, and on Ctrl-C;
    a run that is killed and started again ends with the same bits as one that was not. Raises `CutawayError` when the
    data end early, are not finite, or the folder holds another run.
    """
    path = None if folder is None else Path(folder) / CHECKPOINT
    source = json_hash({"source": source, "site": site})
    stream: Iterator[Tensor] | None = None
    every = max(1, config.steps // 100)
    with Progress(f"dictionary at {site}", total=config.steps * config.batch, unit="tokens") as progress:
        if path is not None and path.exists():
            trainer = Trainer.load(path, config, source)
        else:
            stream = batches(0)
            first = next(stream, None)
            if first is None:
                raise CutawayError("there is not one batch of activations: give a longer corpus or a smaller batch")
            trainer = Trainer(config, first)
            stream = _prepend(first, stream)
        progress.advance(trainer.steps_done * config.batch)
        saved = time.monotonic()
        try:
            if trainer.steps_done < config.steps:
                stream = stream or batches(trainer.steps_done)
            while trainer.steps_done < config.steps:
                assert stream is not None
                x = next(stream, None)
                if x is None:
                    raise CutawayError(f"the activations ended after {trainer.steps_done} of {config.steps} steps")
                with _whole_step():
                    record = trainer.steps_done % every == 0 or trainer.steps_done == config.steps - 1
                    result = trainer.step(x)
                    if record:
                        trainer.history.append(_record(trainer, x, result))
                progress.advance(len(x), note=_note(trainer.history) if record else None)
                if path is not None and time.monotonic() - saved >= seconds_between_checkpoints:
                    trainer.save(path, source)
                    saved = time.monotonic()
        except KeyboardInterrupt:
            if path is not None:
                trainer.save(path, source)
            raise
    if path is not None:
        trainer.save(path, source)
    return Trained(
        trainer.dictionary(site, model or {}, {**(metadata or {}), "training": asdict(config)}), tuple(trainer.history)
    )


def geometric_median(x: Tensor, iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """The point with the least summed distance to the rows of x [n, d] (Weiszfeld's iteration): [d].

    Unlike the mean it is not drawn away by the few tokens whose activations are huge.
    """
    point = x.mean(0)
    for _ in range(iterations):
        weights = 1 / (x - point).norm(dim=1).clamp_min(1e-12)
        moved = (weights @ x) / weights.sum()
        done = (moved - point).norm() <= tolerance * point.norm()
        point = moved
        if done:
            break
    return point


def tensor_batches(x: Tensor, batch: int, seed: int, start: int = 0) -> Iterator[Tensor]:
    """Endless batches [batch, d] of the rows of x [n, d], shuffled anew in each pass, from number `start` on."""
    per_pass = len(x) // batch
    if per_pass == 0:
        raise CutawayError(f"{len(x)} activations are less than one batch of {batch}: give more, or a smaller batch")
    number = start
    while True:
        turn, first = divmod(number, per_pass)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed * 1_000_003 + turn))
        for place in range(first, per_pass):
            yield x[order[place * batch : (place + 1) * batch]]
            number += 1


def _prepend(first: Tensor, rest: Iterator[Tensor]) -> Iterator[Tensor]:
    yield first
    yield from rest


def _checked(x: Tensor, step: int) -> Tensor:
    if not torch.isfinite(x).all():
        raise CutawayError(
            f"the activations of batch {step} hold NaN or infinite values: load the model in float32, or look for the "
            "first site that holds them"
        )
    return x


def _record(trainer: Trainer, x: Tensor, result: StepResult) -> dict[str, float]:
    scaled = x.float() * trainer.scale
    variance = (scaled - scaled.mean(0)).square().sum().item() / len(x)
    return {
        "step": trainer.steps_done,
        "tokens": trainer.steps_done * trainer.config.batch,
        "loss": result.reconstruction.item(),
        "auxiliary": result.auxiliary.item(),
        "variance_explained": 1 - result.reconstruction.item() / variance,
        "l0": result.fired.sum().item() / len(x),
        "dead": len(trainer.dead()),
        "learning_rate": trainer.config.rate(trainer.steps_done - 1),
    }


def _note(history: list[dict[str, float]]) -> str:
    last = history[-1]
    return f"variance explained {last['variance_explained']:.3f}, dead {last['dead']:.0f}"


@contextlib.contextmanager
def _whole_step() -> Iterator[None]:
    """Hold Ctrl-C back until the step is whole, so that what is saved is a state between two steps."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        raise KeyboardInterrupt
