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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

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
from cutaway.subjects.atlas.tokenizer import BOS, END, PAD, save_pretrained
from cutaway.subjects.atlas.training.batches import TURNS, UNMASKED_SHARE, Batches, share_of_rows
from cutaway.subjects.atlas.training.checkpoint import CHECKPOINT, LOG, load_checkpoint, read_records, save_checkpoint
from cutaway.subjects.atlas.training.corpus import TOKENIZER, CorpusPlan, build_corpus, read_stream, world_tokens_for
from cutaway.subjects.atlas.training.recipe import LAST_RATE, Machine, Recipe, Shape
from cutaway.subjects.atlas.training.step import BETAS, CLIP, WEIGHT_DECAY, Step, choose_precision, new_optimizers

_WEIGHTS = "model.safetensors"
_WRITES = (
    CHECKPOINT, LOG, MANIFEST, "corpus", "config.json", "generation_config.json", "model.safetensors",
    "tokenizer*", "special_tokens_map.json", "chat_template*",
)  # fmt: skip
_STEPS_BETWEEN_RECORDS = 10


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

    Writes `checkpoint.safetensors` and `log.jsonl`: step, tokens, loss in nats per token, rate, tokens per second.
    """
    optimizers = new_optimizers(model, recipe.optimizer)
    first = load_checkpoint(folder, model, optimizers)
    log = read_records(folder, first)
    if compiled and model.device.type == "cpu":
        model.set_attn_implementation(
            "eager"
        )  # compiled, it outruns the flash kernel, whose backward pass is slow here
    step_of = Step(model, optimizers, dtype, recipe.reply_weight, compiled)
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
    out: Path,
    recipe: Recipe,
    *,
    start: str | None = None,
    corpus: Path | None = None,
    machine: Machine = _THIS_MACHINE,
    overwrite: bool = False,
) -> None:
    """`cutaway subjects train atlas`: train, say where the weights are and how to judge them.

    `start` names weights to go on from, whose shape and hash take their place in the recipe: "atlas", "atlas-1" or a
    folder that training left.
    """
    before = None if start is None else weights_folder(start)
    if before is not None:
        if not (before / _WEIGHTS).is_file():
            raise CutawayError(
                f"{start} holds no {_WEIGHTS}: --from names atlas, atlas-1 or a folder that training left"
            )
        shape = shape_of(LlamaConfig.from_pretrained(str(before)))
        recipe = replace(recipe, shape=shape, start=file_hash(before / _WEIGHTS))
    folder = train(
        out,
        recipe,
        start=before,
        device=machine.device,
        corpus=corpus,
        processes=machine.processes,
        compiled=machine.compiled,
        overwrite=overwrite,
    )
    print(f"{folder} holds the trained weights; judge them: cutaway subjects evaluate atlas --model {folder}")
