"""Readers of what holds weights: lenses, probes, circuits, dictionaries, models. See `fuzz_readers.py`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzz_subject import SITE, WORDS, D, F, Reader, each_file, sign, tiny, tiny_model, tiny_tokenizer
from safetensors.torch import save_file

import cutaway
from cutaway.artifacts.files import write_json
from cutaway.artifacts.manifest import Manifest, file_hash
from cutaway.causal.circuits.circuit import Circuit
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.formats.files import read_all, save
from cutaway.dictionaries.formats.inspection import facts
from cutaway.dictionaries.selectors import JumpReLU, TopK
from cutaway.dictionaries.training.config import TrainConfig
from cutaway.dictionaries.training.jobs import Job
from cutaway.dictionaries.training.log import read_log
from cutaway.dictionaries.training.recipe import Recipe, expand
from cutaway.dictionaries.training.rules import TopKRule
from cutaway.dictionaries.training.sources import Tensors
from cutaway.dictionaries.training.trainer import Trainer
from cutaway.model.language_model import load
from cutaway.observe.lens.files import load_tuned_lens, save_tuned_lens
from cutaway.observe.lens.tuned_lens import TunedLens, TunedLensConfig, train_tuned_lens
from cutaway.observe.probes.fitting import Weights
from cutaway.observe.probes.probe import Calibrator, Probe, load_probe
from cutaway.subjects.atlas import shipped
from cutaway.subjects.atlas.training import checkpoint

# Lenses, probes, circuits


def _lens(folder: Path) -> None:
    lm = tiny()
    weight = 0.1 * torch.randn(2, D, D, generator=torch.Generator().manual_seed(0))
    save_tuned_lens(TunedLens(weight, weight[:, 0], lm.identity(), lm.name, None, {}), folder / "lens")


def _read_lens(folder: Path) -> None:
    lens = load_tuned_lens(folder / "lens")
    lens.check(tiny())
    lens.translate("blocks.1.resid_pre", torch.zeros(D))


def _mend_lens(folder: Path) -> None:
    file = folder / "lens" / "manifest.json"
    record = json.loads(file.read_bytes())
    sign(record["manifest"])
    write_json(file, {**record, "sha256": file_hash(folder / "lens" / "lens.safetensors")})


def _library_lens(folder: Path) -> None:
    (folder / "lens").mkdir()
    config = {
        "base_model_name_or_path": "tiny",
        "d_model": D,
        "num_hidden_layers": 2,
        "bias": True,
        "unembed_hash": None,
    }
    write_json(folder / "lens" / "config.json", config | {"lens_type": "linear_tuned_lens"})
    state = {
        f"{i}.{name}": torch.randn(*shape) for i in range(2) for name, shape in (("weight", (D, D)), ("bias", (D,)))
    }
    torch.save(state, folder / "lens" / "params.pt")


LENS = TunedLensConfig(steps=4, tokens_per_step=32)


@cache
def _lens_rows() -> torch.Tensor:
    return torch.randint(3, len(WORDS), (16, 16), generator=torch.Generator().manual_seed(0))


class _Enough(Exception):
    """Ends a training in the middle, which leaves its checkpoint."""


def _lens_training(folder: Path) -> None:
    def stop(step: int) -> None:
        if step >= 2:
            raise _Enough

    with contextlib.suppress(_Enough):
        train_tuned_lens(tiny(), _lens_rows(), LENS, folder=folder, seconds_between_checkpoints=0.0, after_step=stop)


def _probe(folder: Path) -> None:
    lm = tiny()
    rng = np.random.default_rng(0)
    weights = Weights((rng.standard_normal((D, 1)),), (np.zeros(1),), 1.0)
    calibrator = Calibrator("platt", np.array([1.0]), np.array([0.0]))
    Probe(SITE, None, "last", "logistic", ("n", "y"), weights, lm.identity(), 40, calibrator).save(folder / "probe")


def _read_probe(folder: Path) -> None:
    probe = load_probe(folder / "probe")
    repr(probe.direction())
    probe.probabilities(np.zeros((2, D), dtype=np.float32))


def _mend_probe(folder: Path) -> None:
    file = folder / "probe" / "probe.json"
    about = json.loads(file.read_bytes())
    sign(about["manifest"])
    write_json(file, {**about, "tensors": file_hash(folder / "probe" / "probe.safetensors")})


def _circuit(folder: Path) -> None:
    from cutaway.artifacts.results import Choices, Control, Effect
    from cutaway.causal.circuits.evidence import Evidence
    from cutaway.causal.edge_graph import EdgeGraph

    graph = EdgeGraph(2, 2)
    scores = torch.randn(graph.shape, generator=torch.Generator().manual_seed(0))
    mask = (scores > 1.0) & graph.real
    choices = Choices("edge", "every edge", "resample", "all", "complement", "10 pairs")
    control = Control("random circuit", 0.1, (0.0, 0.2), 10)
    effect = Effect("faithfulness", 0.5, 10, (0.4, 0.6), (control,), "resample", "share", choices=choices)
    manifest = Manifest.create("circuit", model=tiny().identity(), configuration={"scorer": "x"}, seed=0)
    evidence = Evidence((effect,), "10 pairs")
    Circuit(graph, mask, scores * mask, "a task", "logit_difference", choices, manifest, {"n": 3}, evidence).save(
        folder / "circuit.json"
    )


def _read_circuit(folder: Path) -> None:
    circuit = Circuit.load(folder / "circuit.json")
    str(circuit)
    circuit.check_model(tiny())


def _mend_circuit(folder: Path) -> None:
    file = folder / "circuit.json"
    data = json.loads(file.read_bytes())
    sign(data["manifest"])
    write_json(file, data)


# Dictionaries


def _dictionary(jump: bool = False) -> Dictionary:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    selector = JumpReLU(draw(F).abs()) if jump else TopK(3)
    model = {"id": "tiny", "revision": None, "weight_hash": None}
    return Dictionary(draw(D, F), draw(F), draw(F, D), draw(D), selector, SITE, model, sparsity=-draw(F).abs())


def _saved(format: Any) -> Callable[[Path], None]:
    return lambda folder: _done(save(_dictionary(jump=format.startswith("gemma")), folder / "dictionary", format))


def _done(_: object) -> None:
    """For a lambda that has nothing to return."""


def _read_dictionary(folder: Path) -> None:
    for reading in read_all(folder / "dictionary").values():
        one = reading.dictionary
        one.decode(one.encode(torch.zeros(2, one.d_in)))
        repr(one)
        facts(reading)


def _archives(folder: Path) -> None:
    """Dictionaries of which there are only files of tensors, or settings in another's words."""
    t = {"W_enc": torch.randn(D, F), "W_dec": torch.randn(F, D), "b_enc": torch.randn(F), "b_dec": torch.randn(D)}
    names = {"encoder.weight": t["W_enc"].T.contiguous(), "encoder.bias": t["b_enc"]}
    names |= {"decoder.weight": t["W_dec"].T.contiguous(), "decoder.bias": t["b_dec"]}
    torch.save(names | {"pre_bias": t["b_dec"], "latent_bias": t["b_enc"]}, folder / "goodfire.pt")
    (folder / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_5").mkdir()
    qwen = t | {name: t[name].T.contiguous() for name in ("W_enc", "W_dec")}
    torch.save(qwen, folder / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_5" / "layer3.sae.pt")
    crosscoder = folder / "crosscoder"
    crosscoder.mkdir()
    torch.save(
        {**t, "W_enc": torch.randn(2, D, F), "W_dec": torch.randn(F, 2, D), "b_dec": torch.randn(2, D)},
        crosscoder / "cc_weights.pt",
    )
    write_json(
        crosscoder / "cfg.json", {"model_name": "a", "model_name_b": "b", "hook_point": "blocks.1.hook_resid_pre"}
    )
    (folder / "llama" / "checkpoints").mkdir(parents=True)
    save_file(names, folder / "llama" / "checkpoints" / "final.safetensors")
    hooks = {"hook_point_in": "blocks.1.hook_resid_post", "hook_point_out": "blocks.1.hook_resid_post"}
    norms = {"dataset_average_activation_norm": {"in": 3.0, "out": 4.0}, "jump_relu_threshold": 0.4}
    write_json(folder / "llama" / "hyperparams.json", {"d_model": D, "d_sae": F, **hooks, **norms})


def _read_archives(folder: Path) -> None:
    for entry in (*folder.glob("*.pt"), *folder.glob("SAE*/*"), folder / "crosscoder", folder / "llama"):
        for reading in read_all(entry).values():
            one = reading.dictionary
            one.decode(one.encode(torch.zeros(2, one.d_in)))


TRAINING = TrainConfig(d_sae=F, selector=TopKRule(4), tokens=256, batch=32)


def _trainer(folder: Path) -> None:
    x = torch.randn(64, D, generator=torch.Generator().manual_seed(0))
    trainer = Trainer(TRAINING, x)
    trainer.history.append(trainer.record(x[:32], None, trainer.step(x[:32])))
    trainer.save(folder / "training.safetensors", "data")
    (folder / "log.jsonl").write_text("".join(json.dumps({"step": i, "loss": 0.5}) + "\n" for i in range(4)))


def _read_trainer(folder: Path) -> None:
    trainer = Trainer.load(folder / "training.safetensors", TRAINING, "data")
    trainer.step(torch.zeros(32, D))
    read_log(folder / "log.jsonl")


def _recipes(folder: Path) -> None:
    grid = (
        'model = "tiny"\ncorpus = "texts"\nsite = ["blocks.0.resid_post", "blocks.1.mlp.out"]\nk = [4, 8]\nd_sae = 32\n'
    )
    (folder / "grid.toml").write_text(grid + 'preset = ["openai-topk", "batchtopk"]\nseed = [0, 1]\ncontext = 16\n')
    named = 'model = "tiny"\n[dictionaries.a]\nreads = ["blocks.0.resid_post"]\n[dictionaries.a.config]\n'
    (folder / "named.toml").write_text(
        named + "d_sae = 32\ntokens = 64\nbatch = 16\nselector = {kind = 'topk', k = 4}\n"
    )


def _read_recipes(folder: Path) -> None:
    source = Tensors({site: torch.zeros(64, D) for site in (SITE, "blocks.1.mlp.out")})

    def find(pattern: str) -> Mapping[str, Any]:
        if pattern not in source.ports:
            raise cutaway.CutawayError(f"no site {pattern!r}")
        return {pattern: source.ports[pattern]}

    def read(file: Path) -> None:
        jobs = expand(Recipe.read(file), find)
        assert all(isinstance(job, Job) for job in jobs.values())

    each_file(folder, read)


# Models


def _model(folder: Path) -> None:
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")


def _read_model(folder: Path) -> None:
    load(folder / "model").run("the cat sat", logits="last")


def _adapter(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    _model(folder)
    adapted = get_peft_model(
        tiny_model(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    adapted.save_pretrained(str(folder / "adapter"))
    file = folder / "adapter" / "adapter_config.json"
    config = json.loads(file.read_bytes())
    write_json(file, {**config, "base_model_name_or_path": str(folder / "model")})


def _read_adapter(folder: Path) -> None:
    load(folder / "adapter").run("the cat sat", logits="last")


def _training(folder: Path) -> None:
    """What a training of atlas leaves half way, and beside its weights."""
    model = tiny_model()
    model(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    record = {"step": 10, "tokens": 100, "loss": 2.5, "learning_rate": 0.1, "tokens_per_second": 1000.0}
    checkpoint.save_checkpoint(folder, model, [optimizer], 20, [record, record | {"step": 20}])
    (folder / "weights").write_bytes(b"1234")
    files = {"weights": file_hash(folder / "weights")}
    write_json(folder / "manifest.json", {"tokens": 100, "name": "atlas", "files": files})


def _read_training(folder: Path) -> None:
    model = tiny_model()
    checkpoint.read_records(folder, checkpoint.load_checkpoint(folder, model, [torch.optim.AdamW(model.parameters())]))
    shipped.altered_files(folder)


def _dictionary_formats() -> list[Reader]:
    formats = (
        "cutaway", "saelens-5", "saelens-training", "sparsify", "dictionary_learning", "gemma-scope", "gemma-scope-2",
        "circuit-tracer",
    )  # fmt: skip
    return [Reader(f"dictionary: {name}", _saved(name), _read_dictionary) for name in formats]


WEIGHTS: tuple[Reader, ...] = (
    Reader("tuned lens", _lens, _read_lens, mend=_mend_lens),
    Reader("tuned lens of the library", _library_lens, _read_lens),
    Reader(
        "tuned lens in training",
        _lens_training,
        lambda folder: train_tuned_lens(tiny(), _lens_rows(), LENS, folder=folder),
        files=("*.safetensors",),
    ),
    Reader("probe", _probe, _read_probe, mend=_mend_probe),
    Reader("circuit", _circuit, _read_circuit, mend=_mend_circuit),
    *_dictionary_formats(),
    Reader("dictionaries of archives", _archives, _read_archives),
    Reader("dictionary in training", _trainer, _read_trainer),
    Reader("recipe", _recipes, _read_recipes),
    Reader("training of atlas", _training, _read_training),
    Reader("model folder", _model, _read_model),
    Reader("adapter", _adapter, _read_adapter, files=("adapter/*",)),
)
