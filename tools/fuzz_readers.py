"""What cutaway reads that somebody else may have written: for each kind of file a good one, and its reader.

A `Reader` writes good files into a folder once, and reads a spoiled copy of them again and again, as far as a command
would: what is only opened when it is used is used. `mend` puts right what a hash would give away at once (a manifest's
id, a file's SHA-256), so that half of the mutations come past it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import cutaway
from cutaway.artifacts.files import write_json
from cutaway.artifacts.manifest import Manifest, file_hash, json_hash
from cutaway.artifacts.run_folder import RunFolder
from cutaway.causal.circuit import Circuit
from cutaway.cli.probe import answers, column, place, read_rows
from cutaway.cli.trace import read_facts
from cutaway.data.corpus import corpus_hash, read_corpus
from cutaway.data.harvest import harvest
from cutaway.data.journal import Folder
from cutaway.data.pair_files import read_distinct_pairs, task_from_file
from cutaway.data.pairs import align
from cutaway.data.store import Store
from cutaway.dictionaries.config import TrainConfig
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.formats.files import read_all, save
from cutaway.dictionaries.formats.inspection import facts
from cutaway.dictionaries.jobs import Job
from cutaway.dictionaries.log import read_log
from cutaway.dictionaries.recipe import Recipe, expand
from cutaway.dictionaries.rules import TopKRule
from cutaway.dictionaries.selectors import JumpReLU, TopK
from cutaway.dictionaries.sources import StoreSource, Tensors
from cutaway.dictionaries.trainer import Trainer
from cutaway.model.language_model import LanguageModel, attach, load
from cutaway.observe.probe import Calibrator, Probe, load_probe
from cutaway.observe.probe_data import probe_data
from cutaway.observe.probe_fit import Weights
from cutaway.observe.tuned_lens import TunedLens, TunedLensConfig, train_tuned_lens
from cutaway.observe.tuned_lens_files import load_tuned_lens, save_tuned_lens
from cutaway.tour.name import read_told
from cutaway.tour.run import finished_section

SITE = "blocks.0.resid_post"
_SPOKEN = "the a cat dog bird sat ran saw on under big red old kings queens is are Anna Ben went to and gave it this"
WORDS = _SPOKEN.split()
D, F = 16, 24


@dataclass(frozen=True)
class Reader:
    """`files` are the names, or patterns of names, of what is spoiled; all that `make` wrote if there are none."""

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    files: tuple[str, ...] = ("**/*",)
    mend: Callable[[Path], None] | None = None


@cache
def tiny() -> LanguageModel:
    """A Llama of two layers with a word tokenizer, in memory."""
    return attach(tiny_model(), tiny_tokenizer(), name="tiny")


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 4, hidden_size=D, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=0, pad_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(("<s>", "<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


TEXTS = [" ".join(WORDS[(i * k + k) % len(WORDS)] for i in range(12)) for k in range(1, 40)]


# Text


def _corpus(folder: Path) -> None:
    (folder / "a.txt").write_text("\n\n".join(TEXTS[:6]) + "\r\n\r\nlast é € 𝄞")
    (folder / "b.md").write_text("# Title\n\n" + TEXTS[6])
    (folder / "c.jsonl").write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS[7:12]))


def _read_corpus(folder: Path) -> None:
    corpus_hash(read_corpus(folder).documents)


def _parquet_corpus(folder: Path) -> None:
    for i, compression in enumerate(("zstd", "snappy", "none")):
        table = pa.table(
            {"text": pa.array([*TEXTS[:8], None, "é 𝄞"]), "n": list(range(10)), "extra": [[1.0, 2.0]] * 10}
        )
        pq.write_table(table, folder / f"{i}.parquet", compression=compression, row_group_size=4, use_dictionary=i == 0)


PAIR = {"clean": "the cat sat", "corrupt": "the dog sat", "answer": " on", "wrong": " under"}
MORE = {"positions": {"subject": ["cat", "dog"], "end": -1}, "answers": [" on"], "wrongs": [" under"], "template": "t"}


def _pairs(folder: Path) -> None:
    task = {"name": "a task", "pairs": [PAIR, PAIR | MORE], "held_out": [PAIR | {"clean": "a cat ran"}]}
    write_json(folder / "task.json", task)
    write_json(folder / "list.json", [PAIR, PAIR | {"clean": [4, 5], "corrupt": [4, 6], "answer": 7, "wrong": 8}])
    blimp = {"sentence_good": "x", "sentence_bad": "y", "one_prefix_prefix": "the cat saw this", "UID": "agreement"}
    blimp |= {"one_prefix_word_good": "dog", "one_prefix_word_bad": "dogs"}
    (folder / "blimp.jsonl").write_text(json.dumps(blimp) + "\n" + json.dumps(blimp) + "\n")
    agreement = {"clean_prefix": "the cat", "patch_prefix": "the cats", "clean_answer": " is", "patch_answer": " are"}
    (folder / "agreement.jsonl").write_text((json.dumps(agreement | {"case": "plural"}) + "\n") * 2)
    samples = [
        {"subject": name, "object": thing} for name, thing in zip(["Anna", "Ben", "cat", "dog"], "abcd", strict=True)
    ]
    write_json(
        folder / "relation.json",
        {"name": "r", "prompt_templates": ["{} is"], "prompt_templates_zs": ["It is {}"], "samples": samples},
    )
    (folder / "own.csv").write_text('clean,corrupt,answer,wrong\nthe cat,"the dog",on,under\na cat,a dog,on,under\n')
    (folder / "years.csv").write_text("clean,corrupted,label\nThe war from 1745 to 17,The war from 1701 to 17,45\n")
    (folder / "ioi.csv").write_text("clean,corrupted,corrupted_hard\nAnna saw Ben,x,Ben saw Ben\n")


def _read_pairs(folder: Path) -> None:
    def read(file: Path) -> None:
        found = read_distinct_pairs(file)
        if file.name == "task.json":  # the tiny tokenizer lacks the words of the others
            align(tiny(), [*found.pairs, *found.held_out])
        task_from_file(file)

    _each(folder, read)


def _each(folder: Path, read: Callable[[Path], Any]) -> None:
    for file in sorted(folder.iterdir()):
        read(file)


def _facts(folder: Path) -> None:
    write_json(folder / "facts.json", [{"prompt": "the big cat sat on", "subject": "big cat", "answer": " the"}] * 2)


def _rows(folder: Path) -> None:
    rows = [
        {"text": text, "label": "yn"[i % 2], "group": str(i % 5), "match": text.split()[2]}
        for i, text in enumerate(TEXTS[:10])
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row | {"answer": "x"}) + "\n" for row in rows))
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    (folder / "rows.tsv").write_text("\n".join(line.replace(",", "\t") for line in lines) + "\n")


def _read_rows(folder: Path) -> None:
    def read(file: Path) -> None:
        rows = read_rows(file)
        labels = [row["label"] for row in rows]
        at = place("match", rows, file)
        data = probe_data(
            tiny(), [row["text"] for row in rows], labels, position=at, groups=column(rows, "group", file)
        )
        answers(rows, data, "x", "y", file)

    _each(folder, read)


# Runs and edits


def _edits(folder: Path) -> None:
    lm = tiny()
    source = lm.run(TEXTS[:2], capture=[SITE, "blocks.1.attn.z"])
    u = torch.randn(D, generator=torch.Generator().manual_seed(0))
    edits = [
        cutaway.patch(SITE, source, positions=2, rows=[0]), cutaway.add(SITE, u, scale=2.0, positions=-1),
        cutaway.zero("blocks.1.attn.z", heads=1), cutaway.noise(SITE, std=0.1, seed=3),
        cutaway.clamp(SITE, u, minimum=0.0),
    ]  # fmt: skip
    cutaway.save_edits(folder, edits)


def _read_edits(folder: Path) -> None:
    tiny().run(TEXTS[:2], edits=cutaway.load_edits(folder))


def _run(folder: Path) -> None:
    lm = tiny()
    edits = [cutaway.zero("blocks.1.attn.z", heads=1)]
    lm.run(TEXTS[:2], capture=[SITE, "blocks.1.attn.pattern"], edits=edits).save(folder / "run")


def _read_run(folder: Path) -> None:
    run = cutaway.load_run(folder / "run")
    repr(run)
    tiny().run(TEXTS[:2], edits=cutaway.patch(SITE, run))


def _mend_run(folder: Path) -> None:
    file = folder / "run" / "run.json"
    record = json.loads(file.read_bytes())
    _sign(record["manifest"])
    plain = {key: value for key, value in record.items() if key != "hashes"}
    hashes = {name: file_hash(folder / "run" / name) for name in record["hashes"] if name != "run.json"}
    write_json(file, {**plain, "hashes": {**hashes, "run.json": json_hash(plain)}})


def _sign(manifest: dict[str, Any]) -> None:
    """Set a manifest's id to what its other fields give."""
    parts = ("kind", "model", "corpus_hash", "configuration", "seed", "version", "parents")
    manifest["id"] = json_hash({name: manifest[name] for name in parts})


# Folders of commands


def _run_folder(folder: Path) -> None:
    section = {"id": "lens", "title": "Lens", "question": "?", "lead": "x", "seconds": 1.0, "command": "cutaway"}
    line = {
        "kind": "line",
        "series": [{"name": "a", "x": [1.0, 2.0], "y": [1.0, None]}],
        "x_label": "x",
        "y_label": "y",
    }
    section |= {"blocks": [{"kind": "text", "text": "words"}, line | {"caption": "c"}]}
    told = {"latent": 3, "concepts": ["cat", "dog"], "auroc": [0.9, 0.8], "precision": [1.0, 0.5], "recall": [0.1, 0.2]}
    with _open_tour(folder / "run") as run:
        pq.write_table(pa.Table.from_pylist([told | {"maximum": 2.0, "density": 0.1}] * 3), run.file("latents.parquet"))
        run.save_step("lens", section, files=("latents.parquet",))


def _open_tour(path: Path) -> RunFolder:
    return RunFolder.open(path, command="tour", configuration={"model": {"id": "tiny"}, "seed": 0})


def _read_run_folder(folder: Path) -> None:
    with _open_tour(folder / "run") as run:
        finished_section(run, "lens")
        read_told(run.path / "latents.parquet")


def _mend_run_folder(folder: Path) -> None:
    file = folder / "run" / "steps" / "lens.sha256"
    write_json(file, {name: file_hash(folder / "run" / name) for name in json.loads(file.read_bytes())})


def _store(file_format: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        sites = [SITE, "blocks.0.attn.z"]
        harvest(tiny(), TEXTS, sites, out=folder / "store", context=16, shard_tokens=150, file_format=file_format)

    return make


def _read_store(folder: Path) -> None:
    store = Store.open(folder / "store")
    repr(store)
    assert len(store[:].values) == len(store.sites)
    for _ in store.batches(64):
        pass
    if len(store) >= 16:
        next(StoreSource(store).batches(16))


def _mend_store(folder: Path) -> None:
    file = folder / "store" / "manifest.json"
    info = json.loads(file.read_bytes())
    _sign(info["manifest"])
    for shard in info["shards"]:
        shard["bytes"] = (folder / "store" / shard["file"]).stat().st_size
    write_json(file, info)


HEADER = {
    "fingerprint": "f", "source": "texts", "model": {"id": "tiny"}, "version": "1",
    "settings": {"dtype": "float32", "format": "safetensors", "sites": {SITE: [D]}},
}  # fmt: skip


def _journal(folder: Path) -> None:
    lines: list[Any] = [{"header": HEADER, "thresholds": {SITE: 3.0}}]
    written = {"rows": 3, "high_norm": {SITE: 1}, "documents": 2, "prefix": "0", "sha256": "0"}
    for number in range(3):
        file = folder / "store" / f"shard-{number:06d}.safetensors"
        file.parent.mkdir(exist_ok=True)
        save_file({SITE: torch.zeros(3, D)}, file)
        lines.append({"shard": number, **written, "bytes": file.stat().st_size})
    counts = {"read": 12, "kept": 9, "bos": 0, "first_position": 3}
    lines.append({"end": 3, "counts": counts, "corpus_hash": "0", "documents": 2})
    (folder / "store" / "journal-00000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _read_journal(folder: Path) -> None:
    with Folder(folder / "store", HEADER, 0, 1) as taken:
        if not taken.complete and len(taken.done) == 3:
            taken._merge(lambda corpus, documents: Manifest.create("activations", corpus_hash=corpus))


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
    _sign(record["manifest"])
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
    _sign(about["manifest"])
    write_json(file, {**about, "tensors": file_hash(folder / "probe" / "probe.safetensors")})


def _circuit(folder: Path) -> None:
    from cutaway.artifacts.results import Choices, Control, Effect
    from cutaway.causal.circuit_evidence import Evidence
    from cutaway.causal.graph import Graph

    graph = Graph(2, 2)
    scores = torch.randn(graph.shape, generator=torch.Generator().manual_seed(0))
    mask = (scores > 1.0) & graph.real
    choices = Choices("edge", "every edge", "resample", "all", "complement", "10 pairs")
    control = Control("random circuit", 0.1, (0.0, 0.2), 10)
    effect = Effect("faithfulness", 0.5, 10, (0.4, 0.6), (control,), "resample", "share", choices=choices)
    manifest = Manifest.create("circuit", model=tiny().identity(), configuration={"scorer": "x"}, seed=0)
    evidence = Evidence("10 pairs", (effect,))
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
    _sign(data["manifest"])
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

    _each(folder, read)


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


def _dictionary_formats() -> list[Reader]:
    formats = (
        "cutaway", "saelens-5", "saelens-training", "sparsify", "dictionary_learning", "gemma-scope", "gemma-scope-2",
        "circuit-tracer",
    )  # fmt: skip
    return [Reader(f"dictionary: {name}", _saved(name), _read_dictionary) for name in formats]


READERS: tuple[Reader, ...] = (
    Reader("corpus: .txt, .md, .jsonl", _corpus, _read_corpus),
    Reader("corpus: .parquet", _parquet_corpus, _read_corpus),
    Reader("pairs and tasks", _pairs, _read_pairs),
    Reader("facts to trace", _facts, lambda folder: read_facts(folder / "facts.json")),
    Reader("rows of a probe", _rows, _read_rows),
    Reader("edits", _edits, _read_edits),
    Reader("run", _run, _read_run, mend=_mend_run),
    Reader("run folder of a tour", _run_folder, _read_run_folder, mend=_mend_run_folder),
    Reader("store: safetensors", _store("safetensors"), _read_store, mend=_mend_store),
    Reader("store: Parquet", _store("parquet"), _read_store, mend=_mend_store),
    Reader("journal of a harvest", _journal, _read_journal),
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
    Reader("model folder", _model, _read_model),
    Reader("adapter", _adapter, _read_adapter, files=("adapter/*",)),
)
