"""`cutaway harvest`: what it leaves, that it goes on, and what it says to bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import cutaway
from cutaway.cli.main import main
from cutaway.data.harvesting.store import Store
from cutaway.model.language_model import LanguageModel


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(" ".join(f"w{2 + (3 * i + j) % 59}" for j in range(20)) for i in range(40)))
    return path


@pytest.fixture
def model(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cutaway, "load", lambda *_, **__: tiny)
    return "tiny"


def command(model: str, corpus: Path, out: Path, *more: str) -> list[str]:
    given = ["harvest", model, "--corpus", str(corpus), "--out", str(out), "--site", "blocks.1.resid_post", *more]
    return given if "--context" in more else [*given, "--context", "16"]


def test_it_leaves_a_store(
    model: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUTAWAY_QUIET", "0")
    out = tmp_path / "a"
    arguments = command(
        model, corpus, out, "--site", "blocks.0.attn.z", "--tokens", "300", "--shard-tokens", "100", "--flatten",
        "--store", "float16", "--keep-bos", "--high-norm", "3", "--json",
    )  # fmt: skip
    assert main(arguments) == 0
    said, err = capsys.readouterr()
    found: dict[str, Any] = json.loads(said)["figures"]
    store = Store.open(out, verify=True)
    assert found["tokens"] == len(store) == found["counts"]["kept"]
    assert found["sites"] == {"blocks.0.attn.z": [32], "blocks.1.resid_post": [32]}
    assert found["shards"] == 3
    assert store.dtype is torch.float16
    assert set(found["thresholds"]) == set(found["sites"])
    assert "tokens/s" in err
    assert main(arguments) == 0  # once more: it is there
    assert json.loads(capsys.readouterr().out)["figures"] == found
    arguments.remove("--json")
    assert main(arguments) == 0
    assert f"folder  {out}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--site", "blocks.0.attn.pattern"], "a number for each pair of tokens"),
        (["--site", "blocks.7.resid_post"], "layer 7"),
        (["--high-norm", "0.5"], "multiple of the median"),
        (["--context", "65"], "longer than the 64"),
        (["--format", "parquet", "--store", "bfloat16"], "Parquet has no bfloat16"),
        (["--tokens", "0"], "--tokens"),
    ],
)
def test_bad_input(
    model: str, corpus: Path, tmp_path: Path, more: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(model, corpus, tmp_path / "a", *more)) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert out == ""
    assert not (tmp_path / "a").exists()


def test_another_corpus_and_none(model: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(model, corpus, tmp_path / "a")) == 0
    other = tmp_path / "other.txt"
    other.write_text("w5 w6 " * 40)
    for place, words in ((other, "begun with another corpus"), (tmp_path / "none.txt", "does not exist")):
        capsys.readouterr()
        assert main(command(model, place, tmp_path / "a")) == 2
        assert words in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_as_torchrun_starts_them(tiny: LanguageModel, corpus: Path, tmp_path: Path) -> None:
    tiny.hf.save_pretrained(tmp_path / "model")
    assert tiny.tokenizer is not None
    tiny.tokenizer.save_pretrained(tmp_path / "model")
    arguments = command(str(tmp_path / "model"), corpus, tmp_path / "many", "--shard-tokens", "100", "--json")
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "cutaway", *arguments],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert said[0] == said[1]
    one = command(str(tmp_path / "model"), corpus, tmp_path / "one", "--shard-tokens", "100")
    assert main(one) == 0
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "many").iterdir())
    assert len(names) > 4
    for name in names[1:]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()
    assert Store.open(tmp_path / "one").manifest.id == Store.open(tmp_path / "many").manifest.id
