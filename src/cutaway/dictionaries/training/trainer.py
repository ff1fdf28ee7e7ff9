"""The state of one training run: parameters, Adam's moments, scales, and since when each latent has been silent."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cutaway.artifacts.errors import BadFile, CutawayError
from cutaway.artifacts.files import write_safetensors
from cutaway.dictionaries.dictionary import Dictionary, Port, log_sparsity
from cutaway.dictionaries.selectors import BatchTopK, Gated, JumpReLU, ReLU, Selector, TopK
from cutaway.dictionaries.training.config import TrainConfig
from cutaway.dictionaries.training.initial import initial_parameters, scale_encoder
from cutaway.dictionaries.training.parameters import Parameters
from cutaway.dictionaries.training.rules import BatchTopKRule, GatedRule, JumpReLURule, TopKRule
from cutaway.dictionaries.training.scaling import Scaling, fit, per_token, undo_per_token
from cutaway.dictionaries.training.step import StepResult, TrainingState, step

_THRESHOLD_MEMORY = 0.99  # of the running threshold of BatchTopK (as SAELens; the bias of its start is taken out)


class Trainer:
    """Trains one dictionary, a batch at a time.

    trainer = Trainer(config, sample)      # a first sample [n, d_in] fixes scales, centre and biases
    trainer.step(x)                        # a batch [n, d_in] as the model has it; y [n, d_out] for a transcoder
    trainer.dictionary(...)                # what has been learned, in the model's own units
    """

    def __init__(
        self, config: TrainConfig, x: Tensor, y: Tensor | None = None, *, blocks: Sequence[int] | None = None
    ) -> None:
        """`blocks` are the widths of the tensors that a crosscoder reads and writes."""
        self.config = config
        if config.subtract_b_dec and y is not None:
            raise CutawayError("a transcoder's b_dec is not subtracted from its input: set subtract_b_dec to false")
        x = _checked(x.float(), 0)
        target = x if y is None else _checked(y.float(), 0)
        self.blocks = tuple(blocks or ())
        if self.blocks and config.input_norm:
            raise CutawayError("a crosscoder cannot normalise its inputs token by token: use 'normalise'")
        self.same = y is None
        x, target = self._per_token(x, target)
        self.scaling_in = fit(x, self.blocks or (x.shape[1],), config.normalise)
        self.scaling_out = self.scaling_in if y is None else fit(target, (target.shape[1],), config.normalise)
        x = self.scaling_in.apply(x)
        target = x if y is None else self.scaling_out.apply(target)
        self.variance: float = (target - target.mean(0)).square().mean().item()
        self.parameters = initial_parameters(x, target, config, self.blocks)
        if config.decoder_norm == "unit":  # "uniform" rows and those of a crosscoder's blocks begin otherwise
            decoder = self.parameters.decoder
            decoder.div_(torch.linalg.vector_norm(decoder, dim=1, keepdim=True))
        if self.same or config.encoder_scale != "fit":  # a transcoder's first codes say nothing of what it writes
            scale_encoder(self.parameters, x, config.selector, config.encoder_scale, config.subtract_b_dec)
        device = x.device
        self.silent = torch.zeros(config.d_sae, dtype=torch.int64, device=device)
        self.active_tokens = torch.zeros(config.d_sae, dtype=torch.float64, device=device)
        self.running_threshold = torch.zeros(2, dtype=torch.float64)  # its weighted sum, and the sum of the weights
        self.steps_done = 0
        self.history: list[dict[str, float]] = []
        self.adam = self._optimiser()

    def _optimiser(self) -> torch.optim.Adam:
        config = self.config
        return torch.optim.Adam(
            list(self.parameters.tensors().values()),
            lr=config.rate(0),
            betas=config.adam_betas,
            eps=config.adam_epsilon,
            fused=True,
        )

    def prepared(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x and y in the units of training."""
        x = x.float()
        x, target = self._per_token(x, x if y is None else y.float())
        x = self.scaling_in.apply(x)
        return x, x if y is None else self.scaling_out.apply(target)

    def _per_token(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        normalised, also = per_token(x, self.config.input_norm, target)
        return normalised, (also if self.same else target)

    def step(
        self, x: Tensor, y: Tensor | None = None, *, downstream: Callable[[Tensor], Tensor] | None = None
    ) -> StepResult:
        """One optimiser step on a batch of activations as the model has them.

        `downstream` takes what the dictionary would write [n, d_out], in the model's units, to a loss.
        """
        config, parameters = self.config, self.parameters
        raw = x
        x, y = self.prepared(x, y)
        self._resample(x, y)
        rule, progress = config.selector, self.steps_done / config.steps
        result = step(
            parameters,
            rule.at(progress) if isinstance(rule, TopKRule | BatchTopKRule) else rule,
            config.terms,
            x,
            y,
            TrainingState(self.dead(), self.variance, progress),
            subtract_b_dec=config.subtract_b_dec,
            low_precision=config.low_precision,
            downstream=None if downstream is None else lambda written: downstream(self._written(written, raw)),
        )
        if not torch.isfinite(result.loss):
            _checked(x, self.steps_done)
            raise CutawayError(f"training diverged at step {self.steps_done}: lower the learning rate")
        self._update(result.gradients)
        self.silent.add_(len(x)).masked_fill_(result.active_tokens > 0, 0)
        if self.steps_done >= self._counting_from:
            self.active_tokens += result.active_tokens
        if result.threshold is not None:
            now = torch.tensor([result.threshold.item(), 1.0], dtype=torch.float64)
            self.running_threshold.lerp_(now, 1 - _THRESHOLD_MEMORY)
        self.steps_done += 1
        return result

    def _written(self, written: Tensor, raw: Tensor) -> Tensor:
        """ŷ in the units of training -> as the model has it; differentiable."""
        back = self.scaling_out.undo(written)
        return undo_per_token(back, raw.float(), self.config.input_norm) if self.same else back

    def _update(self, gradients: Parameters) -> None:
        config, parameters = self.config, self.parameters
        unit = config.decoder_norm == "unit"
        if unit:
            along = torch.linalg.vecdot(gradients.decoder, parameters.decoder)
            gradients.decoder.addcmul_(parameters.decoder, along[:, None], value=-1)
        for group in self.adam.param_groups:
            group["lr"] = config.rate(self.steps_done)
        named = parameters.tensors()
        for name, parameter in named.items():
            parameter.grad = getattr(gradients, name)
        if config.clip is not None:
            torch.nn.utils.clip_grad_norm_(list(named.values()), config.clip, foreach=True)
        self.adam.step()
        if unit:
            parameters.decoder.div_(torch.linalg.vector_norm(parameters.decoder, dim=1, keepdim=True))
        if parameters.threshold is not None:
            parameters.threshold.clamp_min_(0)

    @property
    def _counting_from(self) -> int:
        """Activations are counted in the last quarter of the steps: of the latents as they end, not as they began."""
        return self.config.steps * 3 // 4

    def dead(self) -> Tensor:
        """Latents that have been silent for `dead_after` tokens: [m]."""
        return (self.silent >= self.config.dead_after).nonzero().flatten()

    @torch.no_grad()
    def _resample(self, x: Tensor, y: Tensor) -> None:
        how, config, parameters = self.config.resample, self.config, self.parameters
        if how is None or self.steps_done not in {round(share * config.steps) for share in how.at}:
            return
        dead = (self.silent >= how.window * config.steps * config.batch).nonzero().flatten()
        if not len(dead) or not self.steps_done:
            return
        centred = x - parameters.decoder_bias if config.subtract_b_dec else x
        error = self._error(x, y)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.steps_done)
        chance = error.square().sum(1).square().cpu()
        tokens = torch.multinomial(chance, len(dead), replacement=len(dead) > len(x), generator=generator).to(x.device)
        alive = torch.ones(config.d_sae, dtype=torch.bool, device=x.device)
        alive[dead] = False
        length = how.encoder_norm * (parameters.encoder[alive].norm(dim=1).mean() if alive.any() else 1.0)
        parameters.encoder[dead] = torch.nn.functional.normalize(centred[tokens], dim=1) * length
        wanted = (y - parameters.decoder_bias)[tokens]
        norm = 1.0 if config.decoder_norm == "unit" else parameters.decoder[alive].norm(dim=1).mean()
        parameters.decoder[dead] = torch.nn.functional.normalize(wanted, dim=1) * norm
        parameters.encoder_bias[dead] = 0 if parameters.threshold is None else parameters.threshold[dead]
        fresh = [parameters.encoder, parameters.decoder, parameters.encoder_bias]
        for of_gate in (parameters.gate_scale, parameters.magnitude_bias):
            if of_gate is not None:
                of_gate[dead] = 0
                fresh.append(of_gate)
        for parameter in fresh:
            for key in ("exp_avg", "exp_avg_sq"):
                if key in self.adam.state.get(parameter, {}):
                    self.adam.state[parameter][key][dead] = 0
        self.silent[dead] = 0

    def _error(self, x: Tensor, y: Tensor) -> Tensor:
        """ŷ − y [n, d_out] of a batch in the units of training, as a finished dictionary would write it."""
        whole = self._in_training_units()
        return whole(x) - y

    def _in_training_units(self) -> Dictionary:
        p, out = self.parameters, self.parameters.decoder.shape[1]
        ports = (Port("in", p.encoder.shape[1]),)
        return Dictionary(
            W_enc=p.encoder.T,
            b_enc=p.encoder_bias,
            W_dec=p.decoder,
            b_dec=p.decoder_bias,
            selector=self._selector(),
            site="in",
            reads=ports,
            writes=ports if self.same else (Port("out", out),),
            subtract_b_dec=self.config.subtract_b_dec,
            W_skip=p.skip,
        )

    def _selector(self, scale: Tensor | float = 1.0) -> Selector:
        """The finished selector; pre-activations were multiplied by `scale`, a number or one per latent [F]."""
        rule, p = self.config.selector, self.parameters
        if isinstance(rule, TopKRule):
            return TopK(rule.k)
        if isinstance(rule, BatchTopKRule):
            total, weight = self.running_threshold.tolist()
            threshold = total / weight if weight else 0.0
            # by_norm thresholds are of h·‖D‖, which is what h becomes when the norms are folded
            factor = self._common_scale() if isinstance(scale, Tensor) else scale
            return BatchTopK(rule.k, max(0.0, threshold * factor))
        if isinstance(rule, JumpReLURule):
            assert p.threshold is not None
            return JumpReLU(p.threshold * scale)
        if isinstance(rule, GatedRule):
            assert p.gate_scale is not None
            assert p.magnitude_bias is not None
            return Gated(p.gate_scale.clone(), p.magnitude_bias * scale)
        return ReLU()

    def _common_scale(self) -> float:
        """Activations are divided by the scale of what is written: with unit decoders they are then lengths there."""
        uniform = self.scaling_out.matrix is None and not self.blocks
        return 1 / self.scaling_out.scale[0].item() if uniform else 1.0

    def dictionary(
        self, reads: Sequence[Port], writes: Sequence[Port] = (), metadata: Mapping[str, Any] | None = None
    ) -> Dictionary:
        """The dictionary as it is now, scales folded in, so that it reads and writes the model's own units.

        All selectors commute with one positive factor for all latents, so h and a are divided by the scale of what is
        written. All but TopK and BatchTopK also do with one per latent; there, and where these select by h·‖D‖, decoder
        norms are folded into the encoder, so that a is the length of what its latent adds. A crosscoder that
        does not select so keeps its own; how they compare between its blocks is kept in any case.
        """
        p = self.parameters
        factor: Tensor | float = self._common_scale()
        # rows of D in the model's units, times 1/factor so that a·D does not change
        decoder = self.scaling_out.undo_rows(p.decoder) / factor
        rule = self.config.selector
        chooses = isinstance(rule, TopKRule | BatchTopKRule)
        if rule.by_norm if chooses else not self.blocks:
            # in training units for by_norm rules, whose scores are h·‖D‖ there
            norms = (p.decoder if chooses else decoder).norm(dim=1)
            norms = torch.where(norms > 0, norms, torch.ones_like(norms))
            decoder = decoder / norms[:, None]
            factor = factor * norms
        shift = self.scaling_in.shift
        encoder = self.scaling_in.into_rows(p.encoder)
        bias = p.encoder_bias
        skip = None if p.skip is None else self._skip()
        b_dec = self.scaling_out.undo(p.decoder_bias)
        if shift is not None and not self.config.subtract_b_dec:
            bias = bias - encoder @ shift
            if p.skip is not None:
                assert skip is not None
                b_dec = b_dec - skip @ shift
        encoder = encoder * (factor[:, None] if isinstance(factor, Tensor) else factor)
        counted = (self.steps_done - self._counting_from) * self.config.batch
        reads = tuple(reads)
        return Dictionary(
            W_enc=encoder.T.contiguous(),
            b_enc=bias * factor,
            W_dec=decoder.contiguous(),
            b_dec=b_dec,
            selector=self._selector(factor),
            site=reads[0].site,
            model=dict(reads[0].model),
            sparsity=log_sparsity(self.active_tokens / counted) if counted > 0 else None,
            metadata=dict(metadata or {}),
            reads=reads if len(reads) > 1 or writes else (),
            writes=tuple(writes) if writes and tuple(writes) != reads else (),
            subtract_b_dec=self.config.subtract_b_dec,
            W_skip=skip,
            input_norm=self.config.input_norm,
        )

    def _skip(self) -> Tensor:
        """y' = x'·Sᵀ with x' = (x − μ)M and y' = (y − ν)N: y = x·(M Sᵀ N⁻¹) + …, so W_skip = (M Sᵀ N⁻¹)ᵀ."""
        assert self.parameters.skip is not None
        reads = self.scaling_in.into_rows(self.parameters.skip)  # [d_out, d_in], rows of S read x'
        return self.scaling_out.undo_rows(reads.T).T.contiguous()

    def record(self, x: Tensor, y: Tensor | None, result: StepResult) -> dict[str, float]:
        """What is known after a step on this batch: losses, variance explained, L0, dead latents."""
        prepared, target = self.prepared(x, y)
        variance = (target - target.mean(0)).square().sum().item() / len(prepared)
        return {
            "step": self.steps_done,
            "tokens": self.steps_done * self.config.batch,
            "loss": result.loss.item(),
            **{name: value.item() for name, value in result.terms.items()},
            "variance_explained": 1 - result.reconstruction.item() / max(variance, 1e-30),
            "l0": result.active_tokens.sum().item() / len(prepared),
            "dead": len(self.dead()),
            "learning_rate": self.config.rate(self.steps_done - 1),
        }

    def save(self, path: Path, source: str) -> None:
        """Write the whole state as one file, in one piece; `source` names the data, so that no other resumes it."""
        tensors = {f"parameters.{name}": tensor for name, tensor in self.parameters.tensors().items()}
        for name, parameter in self.parameters.tensors().items():
            for key, value in self.adam.state[parameter].items():
                tensors[f"adam.{name}.{key}"] = value
        for side, scaling in (("in", self.scaling_in), ("out", self.scaling_out)):
            tensors |= {f"scaling.{side}.{name}": tensor for name, tensor in scaling.tensors().items()}
        tensors |= {"silent": self.silent, "fired": self.active_tokens, "running_threshold": self.running_threshold}
        record = {
            "config": json.dumps(self.config.to_json()),
            "source": source,
            "variance": float(self.variance).hex(),
            "same": str(self.same),
            "blocks": json.dumps(self.blocks),
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
            raise BadFile(f"{path} is not a readable checkpoint ({error}): {way_out}") from error
        if record.get("config") != json.dumps(config.to_json()):
            raise BadFile(f"{path} is of a training run with another configuration: {way_out}")
        if record.get("source") != source:
            raise BadFile(f"{path} is of a training run on other activations: {way_out}")
        try:
            return cls._from(config, tensors, record)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            said = " ".join(str(error).split())[:100]
            raise BadFile(f"{path} is damaged ({type(error).__name__}: {said}): {way_out}") from error

    @classmethod
    def _from(cls, config: TrainConfig, tensors: dict[str, Tensor], record: Mapping[str, str]) -> "Trainer":
        trainer = cls.__new__(cls)
        trainer.config = config
        trainer.variance = float.fromhex(record["variance"])
        trainer.same = record["same"] == "True"
        trainer.blocks = tuple(json.loads(record["blocks"]))
        prefix = "parameters."
        named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        trainer.parameters = Parameters.of(named, trainer.blocks)
        trainer.scaling_in, trainer.scaling_out = (
            Scaling(
                **{
                    name.rpartition(".")[2]: tensor
                    for name, tensor in tensors.items()
                    if name.startswith(f"scaling.{side}.")
                }
            )
            for side in ("in", "out")
        )
        trainer.silent, trainer.active_tokens = tensors["silent"], tensors["fired"]
        trainer.running_threshold = tensors["running_threshold"].cpu()
        trainer.steps_done = int(record["steps_done"])
        trainer.history = json.loads(record["history"])
        if not isinstance(trainer.history, list) or not all(isinstance(entry, dict) for entry in trainer.history):
            raise ValueError("its history is no list of records")
        trainer.adam = trainer._optimiser()
        for name, parameter in trainer.parameters.tensors().items():
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"adam.{name}.{key}" in tensors]
            if keys:
                if len(keys) != 3:
                    raise ValueError(f"not all is there that was kept of {name}")
                state = {key: tensors[f"adam.{name}.{key}"] for key in keys}
                if any(state[key].shape != parameter.shape for key in keys if key != "step"):
                    raise ValueError(f"what is kept of {name} has another shape")
                trainer.adam.state[parameter] = state
        trainer._check_shapes()
        return trainer

    def _check_shapes(self) -> None:
        """Raise ValueError unless the parts of a trainer that was read fit each other and its configuration."""
        p, f = self.parameters, self.config.d_sae
        if p.encoder.ndim != 2 or p.decoder.ndim != 2:
            raise ValueError("encoder and decoder are matrices")
        d_in, d_out = p.encoder.shape[1], p.decoder.shape[1]
        latent = {"encoder_bias", "threshold", "gate_scale", "magnitude_bias"}
        shapes = dict.fromkeys(latent, (f,)) | {"encoder": (f, d_in), "decoder": (f, d_out)}
        shapes |= {"decoder_bias": (d_out,), "skip": (d_out, d_in)}
        for name, tensor in p.tensors().items():
            if tuple(tensor.shape) != shapes[name] or not tensor.is_floating_point():
                raise ValueError(f"{name} has the shape {list(tensor.shape)}")
        if self.silent.shape != (f,) or self.active_tokens.shape != (f,) or self.running_threshold.shape != (2,):
            raise ValueError("its counts of latents have another shape")


def _checked(x: Tensor, step: int) -> Tensor:
    if not torch.isfinite(x).all():
        raise CutawayError(
            f"the activations of batch {step} hold NaN or infinite values: load the model in float32, or look for the "
            "first site that holds them"
        )
    return x
