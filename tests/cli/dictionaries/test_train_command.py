"""`cutaway train`: what it leaves, that it goes on and shows where it is, and what it says to bad input."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import cutaway
from cutaway.cli.main import main
from cutaway.data.harvesting.harvest import harvest
from cutaway.dictionaries import load
from cutaway.dictionaries.training.log import read_log
from cutaway.model.language_model import LanguageModel

SITE = "blocks.1.resid_post"
SMALL = ["--context", "16", "--batch", "64", "--tokens", "2560", "--d-sae", "64", "--set", "sample=64", "calibrate=256"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(" ".join(f"w{2 + (3 * i + j * j) % 59}" for j in range(20)) for i in range(100)))
    return path


@pytest.fixture
def model(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cutaway, "load", lambda *_, **__: tiny)
    return "tiny"


def command(model: str, corpus: Path, out: Path, *more: str) -> list[str]:
    small = list(SMALL)
    for option in ("--batch", "--context", "--tokens"):
        if option in more:
            place = small.index(option)
            del small[place : place + 2]
    return ["train", model, "--corpus", str(corpus), "--site", SITE, "--out", str(out), *small, *more]


def test_a_grid_on_one_forward(
    model: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUTAWAY_QUIET", "0")
    out = tmp_path / "a"
    arguments = command(
        model, corpus, out, "--site", "blocks.0.attn.z", "--preset", "batchtopk", "--preset", "saprmarks",
        "--k", "4", "8", "--high-norm", "20", "--json",
    )  # fmt: skip
    assert main(arguments) == 0
    said, err = capsys.readouterr()
    found: dict[str, Any] = json.loads(said)["figures"]["dictionaries"]
    names = {
        f"{site}-{end}" for site in (SITE, "blocks.0.attn.z") for end in ("batchtopk-k4", "batchtopk-k8", "saprmarks")
    }
    assert set(found) == names
    for word in ("tokens/s", "loss", "L0", "variance explained", "dead"):
        assert word in err
    for name in names:
        dictionary = load(out / name)
        assert dictionary.site == name.split("-")[0]
        assert (dictionary.d_in, dictionary.d_sae) == (32, 64)
        records = read_log(out / "logs" / f"{name}.jsonl")
        assert [record["step"] for record in records] == list(range(1, 41))
        assert {"loss", "reconstruction", "variance_explained", "l0", "dead_share", "tokens_per_second"} <= set(
            records[-1]
        )
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["model"]["weight_hash"]
    assert not (out / "checkpoints").exists()
    before = (out / f"{SITE}-saprmarks" / "sae_weights.safetensors").read_bytes()
    assert main(arguments) == 0  # once more: it is all there
    assert set(json.loads(capsys.readouterr().out)["figures"]["dictionaries"]) == names
    again = ["train", "--recipe", str(out / "recipe.toml"), "--out", str(tmp_path / "b")]
    assert main(again) == 0  # what was left behind makes it again
    assert (tmp_path / "b" / f"{SITE}-saprmarks" / "sae_weights.safetensors").read_bytes() == before


def test_transcoder_and_crosscoder_beside_each_other(
    model: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a"
    arguments = ["train", model, "--corpus", str(corpus), "--out", str(out), *SMALL, "--site", "blocks.1.mlp.in"]
    arguments += ["--to", "blocks.1.mlp.out", "--crosscoder", f"blocks.0.resid_post,{SITE}"]
    assert main([*arguments, "--preset", "skip-transcoder", "crosscoder-2024"]) == 0
    assert "folder: " in capsys.readouterr().out
    transcoder = load(out / "blocks.1.mlp.in-to-blocks.1.mlp.out-skip-transcoder")
    crosscoder = load(out / f"blocks.0.resid_post+{SITE}-crosscoder-2024")
    assert (transcoder.kind, crosscoder.kind) == ("skip_transcoder", "crosscoder")
    assert [port.site for port in transcoder.outputs] == ["blocks.1.mlp.out"]
    assert [port.site for port in crosscoder.inputs] == ["blocks.0.resid_post", SITE]


def test_it_judges_on_rows_that_it_kept_out(
    model: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a"
    grid = ["--preset", "batchtopk", "--k", "2", "4", "--seed", "0", "1", "--held-out", "8"]
    assert main(command(model, corpus, out, *grid)) == 0
    said = capsys.readouterr().out
    assert "FVU" in said
    found = json.loads((out / "judged.json").read_text())
    assert len(found["judged"]) == 2  # seeds of one setting are judged together
    assert len(found["frontier"]["points"] if isinstance(found["frontier"], dict) else found["frontier"]) == 2
    assert "batchtopk" in (out / "judged.html").read_text()
    command_again = ["dictionary", "judge", str(out), "--model", model, "--corpus", str(corpus), "--rows", "8"]
    assert main([*command_again, "--spliced-rows", "0", "--json"]) == 0  # the folder stands for its dictionaries
    assert len(json.loads(capsys.readouterr().out)["figures"]["judged"]) == 2


def test_from_a_store(tiny: LanguageModel, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = harvest(tiny, corpus, [SITE, "blocks.0.attn.z"], out=tmp_path / "store", context=16)
    arguments = ["train", "--store", str(tmp_path / "store"), "--site", "blocks.0.attn.z", *SMALL[2:]]
    assert main([*arguments, "--out", str(tmp_path / "a")]) == 0
    dictionary = load(tmp_path / "a" / "blocks.0.attn.z")
    assert (dictionary.site, dictionary.d_in) == ("blocks.0.attn.z", 32)
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["parents"] == [store.manifest.id]
    assert main([*arguments, "--dry-run"]) == 0
    assert "the model reads" not in capsys.readouterr().out
    assert main([*arguments, "--high-norm", "5", "--out", str(tmp_path / "b")]) == 2
    assert "'high_norm' goes with a model" in capsys.readouterr().err
    assert main([*arguments, "--site", "blocks.2.resid_post", "--out", str(tmp_path / "b")]) == 2
    assert "there are" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_print_recipe_and_dry_run_leave_nothing(
    model: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(model, corpus, tmp_path / "a", "--preset", "batchtopk", "saprmarks")
    assert main([*arguments, "--print-recipe"]) == 0
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(capsys.readouterr().out)
    assert main(["train", "--recipe", str(recipe), "--print-recipe"]) == 0
    assert capsys.readouterr().out == recipe.read_text()
    assert main([*arguments, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "time    about" in out
    assert main([*arguments, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["figures"]
    one, other = found["dictionaries"]
    weights = 64 * 32 * 2 + 64 + 32
    assert one["parameters"] == other["parameters"] == weights
    assert one["state"] == 4 * 4 * weights
    assert one["flops"] == [2 * 32 * 64 + 32 * 2 * 4 * 32] * 2  # encoding, and for k = 32 active latents the rest
    assert found["seconds"] > 0
    assert found["fresh"] == (2560 + 256) // 4
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--site", "blocks.7.resid_post"], "layer 7"),
        (["--site", "blocks.1.attn.pattern"], "number for each pair of tokens"),
        (["--preset", "nonsense"], "not a preset"),
        (["--batch", "100000", "--tokens", "200000"], "less than one batch of 100000"),
        (["--k", "65"], "k = 65"),
        (["--k", "0"], "--k"),
        (["--set", "warmup"], "NAME=VALUE"),
        (["--set", "warmpu=3"], "'warmpu' is not a field"),
        (["--set", "decoder_norm=long"], "decoder_norm"),
        (["--high-norm", "0.5"], "multiple of the median"),
        (["--context", "65"], "longer than the 64"),
        (["--recipe", "/none.toml"], "/none.toml does not exist"),
    ],
)
def test_bad_input(
    model: str, corpus: Path, tmp_path: Path, more: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(model, corpus, tmp_path / "a", *more)) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert err.count("\n") == 1
    assert out == ""
    assert not (tmp_path / "a").exists()


def test_without_a_folder_or_a_corpus(model: str, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", model, "--site", SITE, "--corpus", str(corpus)]) == 2
    assert "--out" in capsys.readouterr().err
    assert main(["train", model, "--site", SITE, "--out", "a"]) == 2
    assert "corpus" in capsys.readouterr().err
    assert main(["train", "--site", SITE, "--out", "a"]) == 2
    assert "model" in capsys.readouterr().err


def test_another_run_in_the_folder(
    model: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a"
    assert main(command(model, corpus, out)) == 0
    assert main(command(model, corpus, out, "--k", "4")) == 2
    assert "another configuration" in capsys.readouterr().err
    (out / "mine.txt").write_text("mine")
    assert main(command(model, corpus, out, "--k", "4", "--overwrite")) == 0
    assert (out / "mine.txt").exists()
    assert load(out / SITE).selector.k == 4  # type: ignore[union-attr]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    assert main(command(model, corpus, tmp_path / "other")) == 2
    assert "not a run folder" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["checkpoint", "dictionary", "log"])
def test_a_full_disk(
    model: str,
    corpus: Path,
    tmp_path: Path,
    place: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    out = tmp_path / "a"
    with monkeypatch.context() as patch:
        if place == "log":
            import builtins

            real = builtins.open

            def refusing(file: Any, *arguments: Any, **options: Any) -> Any:
                if str(file).endswith(".jsonl"):
                    raise full
                return real(file, *arguments, **options)

            patch.setattr(builtins, "open", refusing)
        else:
            import safetensors.torch

            real_save = safetensors.torch.save_file

            def save(tensors: Any, name: Any, *arguments: Any, **options: Any) -> Any:
                if ("checkpoints" in str(name)) == (place == "checkpoint"):
                    raise full
                return real_save(tensors, name, *arguments, **options)

            patch.setattr(safetensors.torch, "save_file", save)
        assert main(command(model, corpus, out)) == 2
    err = capsys.readouterr().err
    (said,) = (line for line in err.splitlines() if not line.startswith("training"))  # progress, unless it is off
    assert "the disk is full" in said
    assert not (out / SITE).exists()
    assert not list(out.rglob("*.tmp"))
    assert main(command(model, corpus, out)) == 0  # with room again it goes on
    assert load(out / SITE).d_sae == 64


STARTED = """
import sys
sys.path.insert(0, {here!r})
import conftest
import cutaway, cutaway.artifacts.hub, torch
torch.set_num_threads(1)
lm = conftest.tiny.__wrapped__()
cutaway.load = lambda *_, **__: lm
cutaway.artifacts.hub.answers = lambda: True  # "tiny" could be a name of the hub's
from cutaway.cli.main import main
sys.exit(main({arguments!r}))
"""


def start(arguments: list[str]) -> subprocess.Popen[str]:
    code = STARTED.format(here=str(Path(__file__).parents[2]), arguments=arguments)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUTAWAY_QUIET": "1"},
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert path.exists(), process.communicate(timeout=10)[1]


def test_ctrl_c_goes_on_and_two_trainers_do_not_share_a_folder(
    model: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a"
    long = command(model, corpus, out, "--tokens", "10000000")
    process = start(long)
    log = out / "logs" / f"{SITE}.jsonl"
    wait_for(log, process)
    while not log.read_text():
        time.sleep(0.02)
    assert main(long) == 2  # a second trainer, in this process
    err = capsys.readouterr().err
    assert f"another process (process {process.pid}) is at work" in err
    process.send_signal(signal.SIGINT)
    said, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "the same command resumes" in err
    assert said == ""
    assert list(out.rglob("trainer.safetensors"))


def test_a_logger_that_is_not_installed(
    model: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for name in ("wandb", "tensorboard"):
        assert main(command(model, corpus, tmp_path / name, "--log", name)) == 2
        assert f"cutaway[{name}]" in capsys.readouterr().err
