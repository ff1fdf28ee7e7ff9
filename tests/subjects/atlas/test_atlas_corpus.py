"""The corpus on disk: the same whoever writes it, each document once, resumable, refused for another plan."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer

from cutaway.artifacts.errors import CutawayError
from cutaway.data.corpus.python_library import Document
from cutaway.subjects.atlas.training import corpus
from cutaway.subjects.atlas.training.corpus import (
    CorpusPlan,
    build_corpus,
    read_stream,
    training_documents,
    world_tokens_for,
)
from cutaway.subjects.world.corpus import PARTS, WORLD_VERSION, fingerprint
from cutaway.subjects.world.held_out import held_out_document

PLAN = CorpusPlan(world_tokens=30_000, seed=2, vocabulary=1500)


@pytest.fixture(autouse=True)
def little_real_text(monkeypatch):
    """Five documents instead of 25 MB: what is tested here does not depend on which."""
    texts = [Document(f"m{i}.py", f"import os\n\n\ndef f{i}(x):\n    return x + {i}\n" * 40) for i in range(5)]
    monkeypatch.setattr(corpus, "training_documents", lambda: texts)


def documents_of(stream):
    ends = np.flatnonzero(stream == 0) + 1
    assert ends[-1] == len(stream)
    return [tuple(piece.tolist()) for piece in np.split(stream, ends[:-1])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("corpus")


def test_each_document_once_in_the_shares_of_the_world(folder):
    manifest = build_corpus(folder, PLAN)
    stream = read_stream(folder, "world")
    assert manifest["tokens"]["world"] == len(stream) == pytest.approx(PLAN.world_tokens, rel=0.1)
    found = documents_of(np.asarray(stream))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    per_token = manifest["characters_per_token"]
    expected = []
    for job in corpus._jobs(PLAN, per_token)[1:]:
        expected += [(*tokenizer.encode(text).ids, 0) for text in corpus.documents(job.part, job.seed, job.characters)]
    assert sorted(found) == sorted(expected)
    assert found != expected
    shares = {part: n / len(stream) for part, n in manifest["tokens_of_parts"].items() if part != "real_text"}
    for name, part in PARTS.items():
        assert shares[name] == pytest.approx(part.share, abs=0.06)
    assert not (folder / "shards").exists()


def test_a_finished_corpus_is_used_again_and_another_plan_refused(folder):
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    build_corpus(folder, PLAN)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with pytest.raises(CutawayError, match="another corpus"):
        build_corpus(folder, CorpusPlan(world_tokens=30_000, seed=3, vocabulary=1500))


def test_the_manifest_holds_version_and_fingerprint_and_other_text_is_another_corpus(folder, monkeypatch):
    manifest = build_corpus(folder, PLAN)
    assert (manifest["world"], manifest["fingerprint"]) == (WORLD_VERSION, fingerprint())
    monkeypatch.setattr(corpus, "fingerprint", lambda: "0" * 64)  # the same version, but a frame was changed
    with pytest.raises(CutawayError, match="another corpus"):
        build_corpus(folder, PLAN)


def test_an_interrupted_corpus_keeps_its_pieces_and_ends_the_same(folder, tmp_path, monkeypatch):
    real, written = corpus._write_shard, []

    def breaking(job):
        if len(written) == 6:
            raise KeyboardInterrupt
        written.append(job.name)
        real(job)

    monkeypatch.setattr(corpus, "_write_shard", breaking)
    with pytest.raises(KeyboardInterrupt):
        build_corpus(tmp_path, PLAN)
    monkeypatch.setattr(corpus, "_write_shard", lambda job: (written.append(job.name), real(job)))
    manifest = build_corpus(tmp_path, PLAN)
    assert len(written) == len(set(written))
    assert manifest == json.loads((folder / "manifest.json").read_text())
    for name in ("world.bin", "real_text.bin", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_processes_write_what_one_writes(folder, tmp_path):
    jobs = corpus._jobs(PLAN, 4.0)[1:7]
    for number, processes in enumerate((1, 2)):
        target = tmp_path / str(number)
        (target / "shards").mkdir(parents=True)
        (target / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
        corpus._generate(target, jobs, processes)
    for job in jobs:
        alone, together = (corpus._read_shard(tmp_path / n / "shards", job.name) for n in "01")
        assert (alone[0] == together[0]).all()
        assert (alone[1] == together[1]).all()


def test_held_out_documents_are_not_in_the_training_text():
    names = {document.name for document in training_documents()}
    assert names
    assert not any(held_out_document(name) for name in names)


def test_world_tokens_are_the_share_of_rows():
    assert world_tokens_for(1_000_000) == 800_000
