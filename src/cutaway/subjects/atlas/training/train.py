"""Train atlas: from the world's generator to a folder that loads like any other model.

A plain `LlamaForCausalLM`, so what is trained is what is loaded. AdamW or Muon (Jordan et al. 2024), warm-up, cosine,
clipping, bfloat16 where the processor is faster with it; what assistants say can weigh more. It starts from random
weights, or from a folder of trained ones, whose tokenizer it keeps. A run that was stopped, by Ctrl-C or by a kill,
goes on from its last checkpoint and ends with the weights it would have had.
"""

import copy
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.files import (
    note_written,
    scratch_folder,
    write_json,
)
from cutaway.artifacts.manifest import code_version, file_hash
from cutaway.artifacts.progress import Progress
from cutaway.artifacts.run_folder import RunFolder
from cutaway.model.devices import usable_device
from cutaway.subjects.atlas.shipped import MANIFEST, read_manifest, weights_folder
from cutaway.subjects.atlas.tokenizer import BOS, END, PAD, VOCABULARY, save_pretrained
from cutaway.subjects.atlas.training.batches import (
    TURNS,
    UNMASKED_SHARE,
    Batches,
    share_of_rows,
    target_weights,
)
from cutaway.subjects.atlas.training.checkpoint import CHECKPOINT, LOG, load_checkpoint, read_records, save_checkpoint
from cutaway.subjects.atlas.training.corpus import TOKENIZER, CorpusPlan, build_corpus, read_stream, world_tokens_for
from cutaway.subjects.atlas.training.loss import linear_cross_entropy

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
WARMUP_STEPS = 200
LAST_RATE = 0.03  # of the peak, at the end of the cosine
CLIP = 1.0
PEAK_RATE = 2.5e-3
PEAK_ROWS = 128  # the batch that PEAK_RATE is for
Optimizer = Literal["adamw", "muon"]
_WEIGHTS = "model.safetensors"
_WRITES = (
    CHECKPOINT, LOG, MANIFEST, "corpus", "config.json", "generation_config.json", "model.safetensors",
    "tokenizer*", "special_tokens_map.json", "chat_template*",
)  # fmt: skip
_MICROBATCH_ON_CPU = 16  # rows at a time: more spill out of the caches and gain nothing
_ROWS_ON_CPU = 16
_STEPS_BETWEEN_RECORDS = 10


@dataclass(frozen=True)
class Shape:
    """The architecture: Llama with tied embeddings and as many key-value heads as heads."""

    d_model: int = 256
    layers: int = 8
    heads: int = 8
    d_mlp: int = 672
    vocabulary: int = VOCABULARY
    positions: int = 512


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the weights, given a corpus and a machine's arithmetic."""

    tokens: int
    seed: int = 0
    context: int = 256
    rows: int = PEAK_ROWS
    shape: Shape = field(default_factory=Shape)
    peak: float = PEAK_RATE
    optimizer: Optimizer = "adamw"
    """"muon" steps the layers' matrices by orthogonalised momentum, at AdamW's root mean square; the rest by AdamW."""
    reply_weight: float = 1.0
    """What a token of an assistant's reply weighs in the loss; any other weighs 1."""
    start: str | None = None
    """SHA-256 of the weights that training goes on from; None for random ones."""

    @property
    def steps(self) -> int:
        return max(1, round(self.tokens / (self.rows * self.context)))

    @property
    def warmup_steps(self) -> int:
        return max(1, min(WARMUP_STEPS, self.steps // 10))

    @property
    def highest_rate(self) -> float:
        """The learning rate at its peak: `peak` is for 128 rows, and it goes with the square root of the batch."""
        return self.peak * math.sqrt(self.rows / PEAK_ROWS)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then cosine to 3 % of the peak."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        cosine = (1 + math.cos(math.pi * step / self.steps)) / 2
        return self.highest_rate * warm * (LAST_RATE + (1 - LAST_RATE) * cosine)


@dataclass(frozen=True)
class Machine:
    """What a training runs on; it does not determine the weights beyond arithmetic."""

    device: str | None = None
    """Such as "cpu" or "cuda"; None is a GPU if there is one."""
    processes: int | None = None
    """How many processes make the corpus; None is one per core."""
    compiled: bool = False
    """Whether the model is compiled with torch.compile."""


_THIS_MACHINE = Machine()


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training, after the checkpoint was written."""


def new_model(shape: Shape, seed: int) -> LlamaForCausalLM:
    """An untrained model: normal(0, 0.02), what writes to the stream smaller by √(2·layers) (Radford et al. 2019)."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.positions,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=BOS,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                continue
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * shape.layers) if writes else 0.02
            parameter.normal_(0.0, std, generator=generator)
    generation = model.generation_config
    assert generation is not None
    # plain text ends with the document's end, an answer with the turn's
    generation.bos_token_id, generation.pad_token_id = BOS, PAD
    generation.eos_token_id = [END, BOS]
    generation.do_sample = False
    return model


def trained_model(folder: Path, shape: Shape) -> LlamaForCausalLM:
    """The weights of a folder as they are trained on: in float32. Raises `CutawayError` when their shape is another."""
    model = LlamaForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    found = shape_of(model.config)
    if found != shape:
        raise CutawayError(f"the weights in {folder} have the shape {found}, not {shape}")
    return model


def shape_of(config: Any) -> Shape:
    """The `Shape` of a Hugging Face configuration."""
    return Shape(
        d_model=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        d_mlp=config.intermediate_size,
        vocabulary=config.vocab_size,
        positions=config.max_position_embeddings,
    )


def train(
    out: Path,
    recipe: Recipe,
    *,
    start: Path | None = None,
    device: str = "cpu",
    corpus: Path | None = None,
    processes: int | None = None,
    compiled: bool = False,
    overwrite: bool = False,
    checkpoint_seconds: float = 60.0,
) -> Path:
    """Train atlas and leave a loadable folder at `out`; the same call goes on with a run that was stopped.

    `corpus` is a folder to build the corpus in, or to find it in: runs with other seeds can share it (default: inside
    `out`). `start` is the folder of the weights that `recipe.start` names, whose tokenizer the corpus is then cut with.
    `overwrite` begins again. Raises `CutawayError` when `out` holds a run of another recipe, and `Interrupted`
    on Ctrl-C, once the checkpoint is written.
    """
    if recipe.context > recipe.shape.positions:
        raise CutawayError(f"a context of {recipe.context} exceeds the model's {recipe.shape.positions} positions")
    if recipe.tokens < recipe.rows * recipe.context:
        raise CutawayError(f"{recipe.tokens:,} tokens are less than one step of {recipe.rows} x {recipe.context}")
    if (start is None) != (recipe.start is None) or (start and file_hash(start / _WEIGHTS) != recipe.start):
        raise CutawayError(f"{start} does not hold the weights that the recipe starts from")
    configuration = {**asdict(recipe), "device": usable_device(device).type, "compiled": compiled}
    with RunFolder.open(
        out, command="subjects train", configuration=configuration, writes=_WRITES, resume=not overwrite
    ) as run:
        if run.step("export"):
            return out
        commits: list[str] = run.step("commits") or []
        if code_version() not in commits:  # a run may go on after the code has changed: the manifest names them all
            commits = run.save_step("commits", [*commits, code_version()])
        made = corpus is None
        corpus = corpus or run.take("corpus")
        about = build_corpus(
            corpus,
            CorpusPlan(
                world_tokens_for(recipe.tokens),
                vocabulary=recipe.shape.vocabulary,
                tokenizer=None if start is None else file_hash(start / TOKENIZER),
            ),
            processes=processes or os.cpu_count() or 1,
            tokenizer=None if start is None else start / TOKENIZER,
        )
        batches = Batches(
            read_stream(corpus, "world"),
            read_stream(corpus, "real_text"),
            rows=recipe.rows,
            context=recipe.context,
            vocabulary=recipe.shape.vocabulary,
            seed=recipe.seed,
        )
        model = new_model(recipe.shape, recipe.seed) if start is None else trained_model(start, recipe.shape)
        torch.nn.Module.to(model, device)  # transformers types its own .to wrongly
        # measured once: a resumed run must not choose anew
        precision = run.step("precision") or run.save_step("precision", {"dtype": choose_precision(model, batches)})
        loss = fit(
            model,
            recipe,
            batches,
            dtype=getattr(torch, precision["dtype"]),
            folder=run.path,
            compiled=compiled,
            checkpoint_seconds=checkpoint_seconds,
        )
        manifest = _manifest(recipe, about, precision["dtype"], loss, commits, start)
        export(model, Tokenizer.from_file(str(corpus / "tokenizer.json")), out, manifest)
        run.save_step("export", {"loss": loss}, files=(_WEIGHTS,))
        run.discard(CHECKPOINT)
        if made:
            run.discard("corpus")
    return out


def fit(
    model: LlamaForCausalLM,
    recipe: Recipe,
    batches: Callable[[int], tuple[Any, Any]],
    *,
    dtype: torch.dtype,
    folder: Path,
    compiled: bool = False,
    checkpoint_seconds: float = 60.0,
) -> float:
    """Train in place from the checkpoint in `folder`, or from the start; returns the mean loss of the last tenth.

    Writes `checkpoint.safetensors` and `log.jsonl`: step, tokens, loss in nats a token, learning rate, tokens a second.
    """
    optimizers = _optimizers(model, recipe.optimizer)
    first = load_checkpoint(folder, model, optimizers)
    log = read_records(folder, first)
    if compiled and model.device.type == "cpu":
        model.set_attn_implementation("eager")  # compiled, it is 1.4 times faster than the flash kernel of processors
    step_of = _Step(model, optimizers, dtype, recipe.reply_weight, compiled)
    tokens_per_step = recipe.rows * recipe.context
    label = "training" if not first else f"training from {first * tokens_per_step / 1e6:.1f}M tokens"
    recent: list[float] = []
    started = saved = time.monotonic()
    with (
        _interrupts() as interrupted,
        Progress(label, (recipe.steps - first) * tokens_per_step, unit="tok") as progress,
    ):
        for step in range(first, recipe.steps):
            recent.append(step_of(*batches(step), rate=recipe.learning_rate(step)))
            done = step + 1
            progress.advance(tokens_per_step, note=f"loss {sum(recent) / len(recent):.3f}")
            last = done == recipe.steps
            if last or done % _STEPS_BETWEEN_RECORDS == 0:
                seconds, started = time.monotonic() - started, time.monotonic()
                record = {
                    "step": done,
                    "tokens": done * tokens_per_step,
                    "loss": sum(recent) / len(recent),
                    "learning_rate": recipe.learning_rate(step),
                    "tokens_per_second": len(recent) * tokens_per_step / max(seconds, 1e-9),
                }
                log.append(record)
                recent = []
            if last or interrupted() or time.monotonic() - saved >= checkpoint_seconds:
                save_checkpoint(folder, model, optimizers, done, log)
                saved = time.monotonic()
            if interrupted() and not last:
                raise Interrupted(f"stopped after {done:,} of {recipe.steps:,} steps; the same command goes on")
    tail = log[-max(1, len(log) // 10) :]
    return sum(record["loss"] for record in tail) / len(tail)


class _Step:
    """One optimizer step of a model; returns the weighted mean loss of its counted targets, in nats."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        optimizers: Sequence[torch.optim.Optimizer],
        dtype: torch.dtype,
        reply_weight: float = 1.0,
        compiled: bool = False,
    ) -> None:
        self.model, self.optimizers, self.dtype, self.reply_weight = model, optimizers, dtype, reply_weight
        self.trunk = torch.compile(model.model) if compiled else model.model
        self.compile = torch.compile if compiled else None

    def __call__(self, inputs: Any, targets: Any, *, rate: float) -> float:
        device = self.model.device
        weights = target_weights(inputs, targets, self.reply_weight)
        arrays = (inputs, targets, weights)
        ids, wanted, weighing = (torch.from_numpy(array).to(device, non_blocking=True) for array in arrays)
        size = len(ids) if device.type != "cpu" else _MICROBATCH_ON_CPU
        counted = float(weights.sum())
        head = self.model.lm_head.weight
        total = 0.0
        for rows in range(0, len(ids), size):
            piece = slice(rows, rows + size)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                hidden = self.trunk(input_ids=ids[piece], use_cache=False).last_hidden_state
            summed = linear_cross_entropy(
                hidden, head, wanted[piece], weighing[piece], self.dtype, compile=self.compile
            )
            loss = summed / counted
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return total


def _optimizers(model: LlamaForCausalLM, kind: Optimizer) -> list[torch.optim.Optimizer]:
    parameters = dict(model.named_parameters())
    matrices = [name for name, parameter in parameters.items() if parameter.dim() >= 2]
    orthogonal = [name for name in matrices if kind == "muon" and "layers." in name]
    decayed = [parameters[name] for name in matrices if name not in orthogonal]
    gains = [parameter for parameter in parameters.values() if parameter.dim() < 2]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": gains, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=True)]
    if kind == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise CutawayError(f"torch {torch.__version__} has no Muon: --optimizer adamw, or torch 2.9 and later")
        optimizers.append(
            torch.optim.Muon(
                [parameters[name] for name in orthogonal],
                lr=0.0,
                weight_decay=WEIGHT_DECAY,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return optimizers


def choose_precision(model: LlamaForCausalLM, batches: Callable[[int], tuple[Any, Any]]) -> str:
    """ "bfloat16" where the device has it and a step is measured to be faster with it, else "float32".

    Steps a copy; the model stays as it was.
    """
    if not _has_bfloat16(model.device):
        return "float32"
    inputs, targets = batches(0)
    inputs, targets = inputs[:_MICROBATCH_ON_CPU], targets[:_MICROBATCH_ON_CPU]
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        trial = copy.deepcopy(model)
        step = _Step(trial, _optimizers(trial, "adamw"), dtype)
        times = []
        for _ in range(3):  # the first one warms up
            start = time.perf_counter()
            step(inputs, targets, rate=0.0)
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times[1:])
    return "bfloat16" if seconds[torch.bfloat16] < seconds[torch.float32] else "float32"


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if device.type != "cpu":
        return False
    # private in torch, but the only place that knows; without it bfloat16 is emulated and slower
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check is not None and check() for check in checks)


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C was pressed: a first press waits for the step, a second does not."""
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    try:
        before = signal.signal(signal.SIGINT, press)
    except ValueError:  # not the main thread
        yield lambda: False
        return
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path, manifest: dict[str, Any]) -> None:
    """Write fp16 safetensors, config, tokenizer, chat template and manifest, laid out as the shipped weights are."""
    with scratch_folder(folder / "export") as staging:
        copy.deepcopy(model).cpu().half().save_pretrained(str(staging))
        save_pretrained(tokenizer, staging)
        written = sorted(staging.iterdir())
        for file in written:
            file.chmod(0o644)  # safetensors makes its file readable by its owner alone
            note_written(folder / file.name, file)
            os.replace(file, folder / file.name)
    hashes = {file.name: file_hash(folder / file.name) for file in written}
    write_json(folder / MANIFEST, {**manifest, "files": hashes})


def _manifest(
    recipe: Recipe, corpus: dict[str, Any], dtype: str, loss: float, commits: Sequence[str], start: Path | None
) -> dict[str, Any]:
    before = {"weights_sha256": recipe.start, **_history(start)} if start is not None else None
    return {
        "name": "atlas",
        "origin": "cutaway subjects train atlas" + (" --from other weights" if before else ""),
        "start": before,
        "corpus": corpus,
        "seed": recipe.seed,
        "tokens": recipe.steps * recipe.rows * recipe.context,
        "commit": ", then ".join(commits),
        "training": {
            **asdict(recipe),
            "steps": recipe.steps,
            "learning_rate": recipe.highest_rate,
            "betas": BETAS,
            "weight_decay": WEIGHT_DECAY,
            "warmup_steps": recipe.warmup_steps,
            "schedule": f"cosine to {LAST_RATE:.0%}",
            "clip": CLIP,
            "precision": dtype,
            "share_of_rows": {kind: share_of_rows(kind) for kind in dict.fromkeys(TURNS)},
            "first_halves_of_repeats_in_loss": UNMASKED_SHARE,
            "final_loss": loss,
        },
    }


def _history(folder: Path) -> dict[str, Any]:
    """What the manifest of the weights that were started from says of them."""
    before = read_manifest(folder) if (folder / MANIFEST).is_file() else {}
    return {key: before[key] for key in ("name", "origin", "tokens", "commit") if key in before}


def train_command(
    *,
    out: Path,
    tokens: int,
    start: str | None = None,
    peak: float = PEAK_RATE,
    optimizer: Optimizer = "adamw",
    reply_weight: float = 1.0,
    seed: int = 0,
    rows: int | None = None,
    context: int = 256,
    corpus: Path | None = None,
    machine: Machine = _THIS_MACHINE,
    overwrite: bool = False,
) -> None:
    """`cutaway subjects train atlas`: train, say where the weights are and how to judge them.

    `rows` of `context` tokens make a step: 128 on a GPU, 16 elsewhere, where steps are slow and many are better.
    `start` names weights to go on from: "atlas", "atlas-1" or a folder that training left.
    """
    before = None if start is None else weights_folder(start)
    if before is not None and not (before / _WEIGHTS).is_file():
        raise CutawayError(f"{start} holds no {_WEIGHTS}: --from names atlas, atlas-1 or a folder that training left")
    device = machine.device or ("cuda" if torch.cuda.is_available() else "cpu")
    recipe = Recipe(
        tokens=tokens,
        seed=seed,
        context=context,
        rows=rows or (PEAK_ROWS if device.startswith("cuda") else _ROWS_ON_CPU),
        shape=Shape() if before is None else shape_of(LlamaConfig.from_pretrained(str(before))),
        peak=peak,
        optimizer=optimizer,
        reply_weight=reply_weight,
        start=None if before is None else file_hash(before / _WEIGHTS),
    )
    folder = train(
        out,
        recipe,
        start=before,
        device=device,
        corpus=corpus,
        processes=machine.processes,
        compiled=machine.compiled,
        overwrite=overwrite,
    )
    print(f"{folder} holds the trained weights; judge them: cutaway subjects evaluate atlas --model {folder}")
