"""What cutaway reads that somebody else may have written: for each kind of file a good one, and its reader.

A `Reader` writes good files into a folder once, and reads a spoiled copy of them again and again, as far as a command
would: what is only opened when it is used is used. `mend` puts right what a hash would give away at once (a manifest's
id, a file's SHA-256), so that half of the mutations come past it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from fuzz_subject import SITE, TEXTS, D, Reader, each_file, sign, tiny
from fuzz_weights import WEIGHTS
from safetensors.torch import save_file

import cutaway
from cutaway.artifacts.files import write_json
from cutaway.artifacts.manifest import Manifest, file_hash, json_hash
from cutaway.artifacts.run_folder import RunFolder
from cutaway.cli.causal.trace import read_facts
from cutaway.cli.observe.probe import answers, column, place
from cutaway.data.corpus.corpus import corpus_hash, read_corpus
from cutaway.data.harvesting.harvest import harvest
from cutaway.data.harvesting.journal import Folder
from cutaway.data.harvesting.settings import Storage
from cutaway.data.harvesting.store import Store
from cutaway.data.labelled.rows import read_rows
from cutaway.data.pairs import aligned
from cutaway.data.tasks.files import read_distinct_pairs, task_from_file
from cutaway.dictionaries.training.sources import StoreSource
from cutaway.observe.probes.data import probe_data
from cutaway.tour.dictionary import read_matched
from cutaway.tour.run import finished_section

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
            aligned(tiny(), [*found.pairs, *found.held_out])
        task_from_file(file)

    each_file(folder, read)


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
        if "words" in rows[0]:  # read another way
            return
        labels = [row["label"] for row in rows]
        at = place("match", rows, file)
        data = probe_data(
            tiny(), [row["text"] for row in rows], labels, position=at, groups=column(rows, "group", file)
        )
        answers(rows, data, "x", "y", file)

    each_file(folder, read)


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
    sign(record["manifest"])
    plain = {key: value for key, value in record.items() if key != "hashes"}
    hashes = {name: file_hash(folder / "run" / name) for name in record["hashes"] if name != "run.json"}
    write_json(file, {**plain, "hashes": {**hashes, "run.json": json_hash(plain)}})


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
        read_matched(run.path / "latents.parquet")


def _mend_run_folder(folder: Path) -> None:
    file = folder / "run" / "steps" / "lens.sha256"
    write_json(file, {name: file_hash(folder / "run" / name) for name in json.loads(file.read_bytes())})


def _store(file_format: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        sites = [SITE, "blocks.0.attn.z"]
        harvest(
            tiny(),
            TEXTS,
            sites,
            out=folder / "store",
            context=16,
            storage=Storage(shard_tokens=150, file_format=file_format),
        )

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
    sign(info["manifest"])
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
    *WEIGHTS,
)
