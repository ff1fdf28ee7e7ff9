"""Tuned lens: an affine translator per layer, trained so that what it reads is what the model will say (Belrose et al.
2023, arXiv:2303.08112).

Layer l's stream h becomes h + W_l h + b_l, and then goes through the model's own final norm and unembedding. W and b
start at zero, which is the logit lens, so weight decay pulls towards the logit lens too. The loss is
KL(final || lens), the mean over tokens, summed over layers; one forward of the model trains all layers.

    lens = train_tuned_lens(lm, rows)
    logit_lens(lm, prompt, tuned=lens)

A translator is trained on what the model will say, so it may read something off the stream that the model itself gets
from elsewhere: what a tuned lens reads at a layer is *predictable* there, not yet used there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cutaway.artifacts.errors import BadFile, CutawayError, NotSupported
from cutaway.artifacts.files import parse_json, write_safetensors
from cutaway.artifacts.manifest import ModelIdentity, json_hash
from cutaway.artifacts.progress import Progress
from cutaway.artifacts.run_folder import goes_on
from cutaway.data.corpus.corpus import rows_hash
from cutaway.data.harvesting.activations import as_tokens, counted
from cutaway.model.architecture.parts import weight_matrix
from cutaway.model.language_model import LanguageModel
from cutaway.observe.lens.logit_lens import stream_sites

CHECKPOINT = "trainer.safetensors"
_CHUNK_TOKENS = 4096
_CHUNK_BYTES = 1 << 27


@dataclass(frozen=True)
class TunedLensConfig:
    """How to train a tuned lens; the defaults are those of Belrose et al. 2023 (https://arxiv.org/abs/2303.08112), but
    for `tokens_per_step`, which is 2^18 there.

    The rate falls linearly to 0 (Adam's rises first, over a fifth of the steps, at most 1000).
    """

    steps: int = 250
    """Steps of the optimiser."""
    tokens_per_step: int = 1 << 14
    """Tokens per step, rounded to whole rows."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """"sgd" with Nesterov momentum and the rate learning_rate · (1 - momentum), or "adam" (AMSGrad)."""
    learning_rate: float | None = None
    """The highest rate; 1.0 for sgd and 0.001 for adam if None."""
    momentum: float = 0.9
    """Momentum of sgd, β₁ of adam."""
    weight_decay: float = 1e-3
    """Weight decay, which pulls towards the logit lens."""
    clip: float = 1.0
    """Norm to which the gradient of all layers together is clipped."""
    seed: int = 0
    """Of the order of the rows."""

    def __post_init__(self) -> None:
        for name in ("steps", "tokens_per_step", "clip", "rate"):
            if not getattr(self, name) > 0:
                raise CutawayError(f"{name} = {getattr(self, name)}: it must be positive")
        if self.optimizer not in ("sgd", "adam"):
            raise CutawayError(f"optimizer = {self.optimizer!r}: it is sgd or adam")
        if not 0 <= self.momentum < 1 or not self.weight_decay >= 0:
            raise CutawayError("momentum goes from 0 up to, but not including, 1, and weight_decay from 0 up")

    def rows_per_step(self, rows: Tensor) -> int:
        """How many rows per step.

        Args:
            rows: token ids [n, p].

        Raises:
            CutawayError: a step takes more rows than there are.
        """
        per_step = max(1, round(self.tokens_per_step / rows.shape[1]))
        if len(rows) < per_step:
            raise CutawayError(
                f"The text has {len(rows)} rows of {rows.shape[1]} tokens, and a step takes {per_step}: give more "
                "text, or fewer tokens a step."
            )
        return per_step

    @property
    def rate(self) -> float:
        """The highest learning rate, before the factor 1 - momentum of SGD."""
        default = 1.0 if self.optimizer == "sgd" else 1e-3
        return default if self.learning_rate is None else self.learning_rate

    def factor(self, step: int) -> float:
        """What the rate is multiplied by in a step.

        Args:
            step: counted from 0.
        """
        warmup = min(1000, self.steps // 5) if self.optimizer == "adam" else 0
        if step < warmup:
            return (step + 1) / warmup
        return (self.steps - step) / (self.steps - warmup)


@dataclass(frozen=True, eq=False, repr=False)
class TunedLens:
    """Translators of L layers: h ↦ h + weight[l] h + bias[l] (Belrose et al. 2023, https://arxiv.org/abs/2303.08112).

    Translator l reads the stream that layer l receives; the stream after the last layer needs none.
    """

    weight: Tensor
    """[L, d, d]."""
    bias: Tensor
    """[L, d]."""
    model: ModelIdentity | None
    """What it was trained on, where that is known."""
    model_name: str
    """The model's name."""
    unembed_hash: str | None
    """How the tuned-lens library names a model, None for a lens of our own."""
    about: Mapping[str, Any]
    """What else the file says: configuration, corpus, losses, evaluation."""

    def __repr__(self) -> str:
        layers, width = self.bias.shape
        return f"TunedLens of {self.model_name}: {layers} translators of width {width}"

    def check(self, lm: LanguageModel) -> None:
        """Refuse a model that this lens does not belong to.

        Args:
            lm: the model.

        Raises:
            CutawayError: other layers, another width, or other weights.
        """
        layers, width = self.bias.shape
        if (layers, width) != (lm.n_layers, lm.d_model):
            raise CutawayError(
                f"This tuned lens is of {self.model_name}, with {layers} layers of width {width}; {lm.name} has "
                f"{lm.n_layers} of width {lm.d_model}. Train one for it."
            )
        if self.model is not None and self.model.weight_hash != lm.identity().weight_hash:
            raise CutawayError(
                f"This tuned lens was trained on other weights ({self.model_name}, {self.model.weight_hash[:12]}) than "
                f"those of {lm.name} ({lm.identity().weight_hash[:12]}); train one for this model, or load the model "
                "from the files that the lens was trained on."
            )
        if self.unembed_hash is not None and self.unembed_hash != library_hash(lm):
            raise CutawayError(
                f"This tuned lens of {self.model_name} was trained with another unembedding than that of {lm.name} "
                "(their hashes differ), so it belongs to another model or revision."
            )

    def translate(self, site: str, stream: Tensor) -> Tensor:
        """The translated stream; after the last layer it stays as it is.

        Args:
            site: the stream's site, such as "blocks.3.resid_post".
            stream: [..., d].

        Returns:
            [..., d], in the stream's dtype.

        Raises:
            NotSupported: a site that has no translator.
        """
        layers = len(self.bias)
        translator = {f"blocks.{layer}.resid_pre": layer for layer in range(layers)}
        translator |= {f"blocks.{layer}.resid_post": layer + 1 for layer in range(layers)}
        if site not in translator:
            raise NotSupported(f"A tuned lens has no translator for '{site}': it reads resid_pre and resid_post only.")
        layer = translator[site]
        if layer == layers:
            return stream
        weight, bias = self.weight[layer].to(stream.device), self.bias[layer].to(stream.device)
        return (stream.float() + stream.float() @ weight.T + bias).to(stream.dtype)


def library_hash(lm: LanguageModel) -> str:
    """The hash by which the tuned-lens library knows an unembedding: SHA-256 of numpy's summary of the matrix."""
    import hashlib

    array = weight_matrix(lm.family.unembed).detach().T.cpu()
    array = array.float().numpy() if array.dtype == torch.bfloat16 else array.numpy()
    return hashlib.sha256(np.array_str(array, precision=1).encode()).hexdigest()


# The loss -----------------------------------------------------------------------------------------------------------


def lens_loss(lm: LanguageModel, stream: Tensor, weight: Tensor, bias: Tensor, final: Tensor) -> Tensor:
    """KL(final || lens) of one layer, summed over t tokens, differentiable in `weight` [d, d] and `bias` [d].

    `stream` [t, d] is the layer's, `final` [t, V] the log-probabilities of the model's own answer.
    """
    stream = stream.float()
    translated = stream + stream @ weight.T + bias
    log_q = _lens_logits(lm, translated).float().log_softmax(-1)
    return lens_kl(log_q, final).sum()


def lens_kl(log_q: Tensor, final: Tensor) -> Tensor:
    """KL(final || q) of log-probabilities [t, V]: [t], in nats."""
    zero = torch.zeros((), device=final.device)
    return torch.where(final == -torch.inf, zero, final.exp() * (final - log_q)).sum(-1)


def _lens_logits(lm: LanguageModel, stream: Tensor) -> Tensor:
    """What `lm.unembed` gives for a stream [..., d], as a function that can be differentiated."""
    return lm.family.read_out(stream.to(lm.dtype))


def lens_streams(lm: LanguageModel, rows: Tensor) -> Iterator[tuple[Tensor, list[Tensor], Tensor]]:
    """Pieces of rows [n, p]: which row each token is of [t], every layer's stream [t, d], final log-probabilities
    [t, V]. Only tokens that count: neither the first of a row nor a BOS, whose streams are unlike all others.
    """
    names = stream_sites(lm)[:-1]
    run = lm.run(as_tokens(rows), capture=names, logits="all")
    row, column = counted(rows, lm.bos_id).nonzero(as_tuple=True)
    size = max(1, min(_CHUNK_TOKENS, _CHUNK_BYTES // (4 * lm.d_vocab)))
    for start in range(0, len(row), size):
        r, c = row[start : start + size], column[start : start + size]
        yield r, [run[name][r, c] for name in names], run.all_logits[r, c].float().log_softmax(-1)


# Training -----------------------------------------------------------------------------------------------------------


_KEPT = ("", "step", "momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")  # of a parameter, in a checkpoint


class _Trainer:
    """The state of a training run: parameters of all layers, the optimiser's buffers, steps done, losses."""

    def __init__(self, lm: LanguageModel, config: TunedLensConfig) -> None:
        self.config = config
        width, layers = lm.d_model, lm.n_layers
        self.weight = torch.zeros(layers, width, width, device=lm.device)
        self.bias = torch.zeros(layers, width, device=lm.device)
        self.optimizer = _optimizer([self.weight, self.bias], config)
        self.steps_done = 0
        self.history: list[dict[str, float]] = []

    def step(self, lm: LanguageModel, rows: Tensor) -> Tensor:
        """One optimiser step on rows [n, p]; the mean loss per layer [L]."""
        config = self.config
        self.weight.grad, self.bias.grad = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        total = int(counted(rows, lm.bos_id).sum())
        losses = torch.zeros(len(self.bias), device=self.bias.device)
        for piece in rows.split(max(1, _CHUNK_TOKENS // rows.shape[1])):
            for _, streams, final in lens_streams(lm, piece):
                for layer, stream in enumerate(streams):
                    weight = self.weight[layer].detach().requires_grad_()
                    bias = self.bias[layer].detach().requires_grad_()
                    with torch.enable_grad():
                        loss = lens_loss(lm, stream, weight, bias, final) / total
                        gradients = torch.autograd.grad(loss, (weight, bias))
                    self.weight.grad[layer] += gradients[0]
                    self.bias.grad[layer] += gradients[1]
                    losses[layer] += loss.detach()
        if not bool(torch.isfinite(losses).all()):
            layer = int((~torch.isfinite(losses)).nonzero()[0])
            raise CutawayError(
                f"The tuned lens's loss at layer {layer} is not finite in step {self.steps_done}: lower the learning "
                "rate, or load the model in float32."
            )
        norm = torch.sqrt(self.weight.grad.pow(2).sum() + self.bias.grad.pow(2).sum())
        factor = torch.clamp(config.clip / (norm + 1e-6), max=1.0)
        self.weight.grad *= factor
        self.bias.grad *= factor
        scale = 1 - config.momentum if config.optimizer == "sgd" else 1.0  # as torch's momentum adds up 1 / (1 - β)
        for group in self.optimizer.param_groups:
            group["lr"] = config.rate * scale * config.factor(self.steps_done)
        self.optimizer.step()
        self.steps_done += 1
        return losses

    def save(self, path: Path, source: str) -> None:
        tensors = {"weight": self.weight, "bias": self.bias}
        for name, parameter in (("weight", self.weight), ("bias", self.bias)):
            tensors |= {f"{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        record = {
            "config": json.dumps(asdict(self.config)),
            "source": source,
            "steps_done": str(self.steps_done),
            "history": json.dumps(self.history),
        }
        write_safetensors(path, {name: tensor.cpu().clone() for name, tensor in tensors.items()}, record)

    def load(self, path: Path, source: str) -> None:
        """Go on where `save` was called; BadFile when it is of another configuration, model or corpus."""
        from safetensors import SafetensorError, safe_open

        way_out = f"name another folder, or remove {path} to begin again"
        try:
            with safe_open(path, framework="pt", device=str(self.bias.device)) as file:
                record = file.metadata() or {}
                # cloned: a tensor inside the file's buffer is aligned otherwise, and products round accordingly
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise BadFile(f"{path} is not a readable checkpoint ({error}): {way_out}") from error
        if record.get("config") != json.dumps(asdict(self.config)):
            raise BadFile(f"{path} is of a training run with another configuration: {way_out}")
        if record.get("source") != source:
            raise BadFile(f"{path} is of a training run on another model or other text: {way_out}")
        expected = {name: self._shape(name) for name in ("weight", "bias", *(key for key in tensors if "." in key))}
        wrong = [name for name, shape in expected.items() if name not in tensors or tensors[name].shape != shape]
        history = parse_json(record.get("history", ""), f"{path} is damaged, {way_out}: its history")
        if wrong or tensors.keys() != expected.keys() or not record.get("steps_done", "").isdecimal():
            raise BadFile(f"{path} is damaged ({wrong[0] if wrong else 'its record'}): {way_out}")
        if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
            raise BadFile(f"{path} is damaged (its history): {way_out}")
        self.weight.copy_(tensors.pop("weight"))
        self.bias.copy_(tensors.pop("bias"))
        for name, parameter in (("weight", self.weight), ("bias", self.bias)):
            prefix = f"{name}."
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            self.optimizer.state[parameter] = state
        self.steps_done = int(record["steps_done"])
        self.history = history

    def _shape(self, name: str) -> torch.Size | None:
        """The shape of a tensor of a checkpoint: a parameter, or what the optimiser keeps of it; None of others."""
        whose, _, part = name.partition(".")
        if whose not in ("weight", "bias") or part not in _KEPT:
            return None
        return torch.Size([]) if part == "step" else getattr(self, whose).shape


def _optimizer(parameters: list[Tensor], config: TunedLensConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=1.0, momentum=config.momentum, nesterov=config.momentum > 0, weight_decay=config.weight_decay
        )
    betas = (config.momentum, 0.999)
    return torch.optim.Adam(parameters, lr=1.0, betas=betas, amsgrad=True, weight_decay=config.weight_decay)


def train_tuned_lens(
    lm: LanguageModel,
    rows: Tensor,
    config: TunedLensConfig | None = None,
    *,
    folder: Path | None = None,
    seconds_between_checkpoints: float = 30.0,
    after_step: Callable[[int], None] | None = None,
) -> TunedLens:
    """Train translators for all layers (Belrose et al. 2023, https://arxiv.org/abs/2303.08112).

    Rows are shuffled anew in each pass; the batch of a step depends on its number and the seed alone. Tokens counted
    are all but each row's first and BOS.

    Args:
        lm: the model, in evaluation mode; it is not changed.
        rows: token ids [n, p], such as `token_rows` makes.
        config: how to train; the paper's choice if None.
        folder: where the state is kept, so that a run that was stopped goes on where it was and ends with the same
            bits; nowhere if None.
        seconds_between_checkpoints: how often the state is written into the folder, besides on Ctrl-C.
        after_step: called with the number of steps done.

    Returns:
        The translators of all layers.

    Raises:
        BadFile: the folder holds another run, or a damaged one.
        CutawayError: the rows are fewer than a step takes, or a loss is not finite.
    """
    config = config or TunedLensConfig()
    rows = rows.to(lm.device)
    per_step = config.rows_per_step(rows)
    if lm.hf.training:
        raise CutawayError("The model is in training mode, so its answers are noisy; call lm.hf.eval() first.")
    identity = lm.identity()
    corpus = rows_hash(rows)
    source = json_hash({"model": identity.weight_hash, "rows": corpus, "dtype": str(lm.dtype)})
    trainer = _Trainer(lm, config)
    path = None if folder is None else Path(folder) / CHECKPOINT
    if path is not None and path.exists():
        trainer.load(path, source)
    every = max(1, config.steps // 100)
    saved = time.monotonic()
    left, a_step = config.steps - trainer.steps_done, per_step * rows.shape[1]
    if folder is not None and 0 < trainer.steps_done < config.steps:
        goes_on(Path(folder), trainer.steps_done * a_step, config.steps * a_step, "tokens")
    with Progress("tuned lens", total=left * a_step, unit="tokens") as progress:
        try:
            while trainer.steps_done < config.steps:
                step = trainer.steps_done
                losses = trainer.step(lm, rows[_batch(len(rows), per_step, step, config.seed).to(rows.device)])
                if step % every == 0 or step == config.steps - 1:
                    trainer.history.append({"step": step, "kl": float(losses.mean())})
                progress.advance(a_step, note=f"KL {float(losses.mean()):.3f} per layer")
                if path is not None and time.monotonic() - saved >= seconds_between_checkpoints:
                    trainer.save(path, source)
                    saved = time.monotonic()
                if after_step is not None:
                    after_step(trainer.steps_done)
        except KeyboardInterrupt:
            if path is not None:
                trainer.save(path, source)
            raise
    if path is not None:
        trainer.save(path, source)
    about = {
        "configuration": {**asdict(config), "context": rows.shape[1], "rows_per_step": per_step},
        "corpus_hash": corpus,
        "seed": config.seed,
        "history": trainer.history,
    }
    return TunedLens(trainer.weight.cpu(), trainer.bias.cpu(), identity, lm.name, None, about)


def _batch(n: int, size: int, step: int, seed: int) -> Tensor:
    """Which of n rows step number `step` uses: [size]; each pass over the rows has an order of its own."""
    per_pass = n // size
    turn, place = divmod(step, per_pass)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + turn))
    return order[place * size : (place + 1) * size]
