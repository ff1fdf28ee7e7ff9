"""A tour from end to end on a small random model: what is left behind, resuming, and what a user gets wrong."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from html_check import Page
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from cutaway.cli.main import main
from cutaway.draw.blocks import Figures, Heatmap, TourResult
from cutaway.model.language_model import load
from cutaway.observe.heads.kinds import KindScores
from cutaway.observe.heads.report import name as head_name
from cutaway.observe.heads.table import head_table
from cutaway.tour.context import Tour, read_text
from cutaway.tour.observing import _strongest
from cutaway.tour.run import NAMES, STEPS, run_tour

WORDS = (
    "the cat sat on a mat and she said that he would not go to red house one two three def return Tom Lily never blue"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a word-level tokenizer, saved as a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(["<s>", *alphabet])}
    merges: list[tuple[str, str]] = []
    for word in WORDS.split():
        whole = "Ġ"
        for letter in word:
            if whole + letter not in vocabulary:
                merges.append((whole, letter))
                vocabulary[whole + letter] = len(vocabulary)
            whole += letter
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _text(lines: int) -> str:
    """Paragraphs of 60 random words."""
    generator = torch.Generator().manual_seed(0)
    words = WORDS.split()
    drawn = torch.randint(len(words), (lines, 60), generator=generator).tolist()
    return "\n\n".join(" ".join(words[i] for i in line) for line in drawn)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(_text(lines=120))
    return file


@pytest.fixture(scope="module")
def toured(model: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TourResult]:
    out = tmp_path_factory.mktemp("runs") / "tour"
    return out, run_tour(str(model), out=out, corpus=corpus)


def test_a_tour_leaves_what_it_says(toured: tuple[Path, TourResult], model: Path) -> None:
    out, result = toured
    assert [section.id for section in result.sections] == [*NAMES, "again"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert len(manifest["model"]["weight_hash"]) == 64
    assert manifest["seed"] == 0
    assert TourResult.model_validate_json((out / "figures.json").read_text()) == result
    tensors = load_file(out / "dictionary" / "sae_weights.safetensors")
    assert tensors["W_dec"].shape == (256, 32)
    assert json.loads((out / "dictionary" / "cfg.json").read_text())["d_in"] == 32
    latents = pq.read_table(out / "latents.parquet").to_pylist()
    assert [row["latent"] for row in latents] == list(range(256))
    assert not list(out.rglob("*.tmp*"))
    assert not (out / "dictionary.training").exists()


def test_the_page_is_sound_and_whole(toured: tuple[Path, TourResult]) -> None:
    out, result = toured
    html = (out / "index.html").read_text()
    page = Page(html)
    assert page.problems == []
    for section in result.sections:
        assert section.title in html
        assert section.status != "not shown" or section.note.startswith("not shown: ")
        assert section.status == "not shown" or section.blocks, section.id
    assert f"--out {out}" in html


def test_a_random_model_is_not_shown_atlas_prompts(toured: tuple[Path, TourResult]) -> None:
    """It can do no task, so no section may pretend that it does; what needs no task is still shown."""
    _, result = toured
    by_id = {section.id: section for section in result.sections}
    for name in ("lens", "patching", "steering"):
        assert by_id[name].status == "not shown"
        assert re.search(r"right on \d+ of \d+", by_id[name].note), by_id[name].note
    assert by_id["dictionary"].status == "shown"
    assert "Sacramento" not in (result.model_dump_json())


def test_no_head_has_a_name_that_the_command_would_not_give(toured: tuple[Path, TourResult], model: Path) -> None:
    """Random weights always have a head with the largest score; that does not make it an induction head."""
    _, result = toured
    section = next(section for section in result.sections if section.id == "heads")
    table = head_table(load(str(model)), n=8, ablations=())
    figures = {item.label: item for block in section.blocks if isinstance(block, Figures) for item in block.items}
    maps = [block for block in section.blocks if isinstance(block, Heatmap)]
    for kind, label, drawn in zip(("previous", "induction"), ("previous-token", "induction"), maps, strict=True):
        carries = table.kinds[kind].heads()
        called = carries if kind == "previous" or table.induces else []
        assert figures[f"strongest {label} head"].value == (head_name(called[0]) if called else "none")
        assert list(drawn.marks) == carries
    assert figures["strongest induction head"].value == "none"
    assert "not above its control" in str(figures["strongest induction head"].detail)


def test_the_strongest_head_is_one_that_carries_the_label() -> None:
    """The largest score may be below its control; and what no prediction follows from is no induction head."""

    def values(*numbers: float) -> torch.Tensor:
        return torch.tensor([numbers])

    score, control = values(0.9, 0.5, 0.05), values(0.95, 0.1, 0.01)
    scores = KindScores(
        "induction",
        score,
        score - 0.01,
        score + 0.01,
        control,
        control - 0.01,
        control + 0.01,
        "other",
        n=4,
        destinations=9,
    )
    assert _strongest("induction", scores).value == "L0H1"
    unused = _strongest("induction", scores, False)
    assert (unused.value, unused.detail) == ("none", "the pattern: L0H1 0.50, repeated tokens are not foreseen")
    low = replace(scores, low=score - 0.5)
    assert _strongest("induction", low).detail == "largest score: L0H0 0.90, not above its control"


def test_every_effect_has_controls(toured: tuple[Path, TourResult]) -> None:
    _, result = toured
    effects = [effect for section in result.sections for effect in section.effects]
    for section in result.sections:
        effects += [block.effect for block in section.blocks if block.kind == "effect"]
    assert effects
    assert all(effect["controls"] and effect["command"] for effect in effects)


def test_a_section_alone_gives_the_same_figures(toured: tuple[Path, TourResult], model: Path, corpus: Path) -> None:
    out, result = toured
    before = (out / "index.html").read_bytes()
    for name in ("heads", "features"):
        alone = run_tour(str(model), out=out, corpus=corpus, only=name)
        (section,) = alone.sections
        first = next(s for s in result.sections if s.id == name)
        assert section.model_copy(update={"seconds": first.seconds}) == first
    assert (out / "index.html").read_bytes() == before


def test_a_stopped_tour_goes_on_and_ends_the_same(
    toured: tuple[Path, TourResult],
    model: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("CUTAWAY_QUIET", raising=False)
    made: list[str] = []

    def watched(name: str, step: Any) -> Any:
        def run(tour: Any) -> Any:
            made.append(name)
            if name == "features" and made.count("features") == 1:
                raise KeyboardInterrupt
            return step(tour)

        return run

    for name, step in list(STEPS.items()):
        monkeypatch.setitem(STEPS, name, watched(name, step))
    out = tmp_path / "run"
    arguments = ["tour", str(model), "--corpus", str(corpus), "--out", str(out)]
    assert main(arguments) == 130
    assert not (out / "index.html").exists()
    assert "goes on" not in capsys.readouterr().err
    assert main(arguments) == 0
    assert f"goes on at 5 of 8 steps ({out}, begun " in capsys.readouterr().err
    assert [made.count(name) for name in STEPS] == [1, 1, 1, 1, 2, 1, 1]
    _, whole = toured
    again = TourResult.model_validate_json((out / "figures.json").read_text())

    def figures(result: TourResult) -> list[Any]:
        text = json.dumps([s.model_dump(mode="json", exclude={"seconds"}) for s in result.sections[:-1]])
        return json.loads(text.replace(str(out), "OUT").replace(str(toured[0]), "OUT"))

    assert figures(again) == figures(whole)


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_training(model: Path, tmp_path: Path) -> None:
    """The text is long enough for half a minute of training, and the signal comes just after it has begun."""
    out, corpus = tmp_path / "run", tmp_path / "text.txt"
    corpus.write_text(_text(lines=600))
    command = [sys.executable, "-m", "cutaway", "tour", str(model), "--corpus", str(corpus), "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (out / "steps" / "patching.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stdout == ""
    assert stderr.splitlines()[-1] == "cutaway: interrupted; the same command resumes, or starts again"
    assert "Traceback" not in stderr
    done = {file.stem for file in (out / "steps").iterdir()}
    assert done == {"selftest", "lens", "heads", "patching"}
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == 0
    assert (out / "index.html").is_file()


# ---- what a user gets wrong: one sentence, exit code 2, nothing half-written


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert main(["tour", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("cutaway: ")]
    assert "Traceback" not in err
    return line


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_no_such_model(capsys: pytest.CaptureFixture[str], out: Path, tmp_path: Path) -> None:
    line = refusal(capsys, [str(tmp_path / "nothing"), "--out", str(out)])
    assert str(tmp_path / "nothing") in line
    assert not out.exists()


def test_a_folder_without_weights(capsys: pytest.CaptureFixture[str], out: Path, tmp_path: Path, model: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    line = refusal(capsys, [str(bare), "--out", str(out)])
    assert str(bare) in line
    assert "weights" in line
    assert not out.exists()


def test_weights_that_are_cut_off(capsys: pytest.CaptureFixture[str], out: Path, tmp_path: Path, model: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(model, cut)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert str(cut) in refusal(capsys, [str(cut), "--out", str(out)])
    assert not out.exists()


def test_a_model_without_a_tokenizer(
    capsys: pytest.CaptureFixture[str], out: Path, tmp_path: Path, model: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    assert "tokenizer" in refusal(capsys, [str(bare), "--out", str(out)])


def test_a_separator_between_documents(
    capsys: pytest.CaptureFixture[str], out: Path, tmp_path: Path, model: Path
) -> None:
    """It cuts the corpus, stands in the commands of the page, and is refused where it cuts nothing."""
    file = tmp_path / "text.txt"
    file.write_text("the cat sat\n\non a mat\n---\nshe said that")
    text = read_text(file, of_atlas=False, seed=0, document_separator="---")
    assert text.documents == ("the cat sat\n\non a mat", "she said that")
    assert text.hash != read_text(file, of_atlas=False, seed=0).hash
    made: dict[str, Any] = {"lm": None, "folder": SimpleNamespace(path=out), "rows": None, "seed": 0}
    tour = Tour(model="m", text=text, corpus=file, document_separator="---", **made)
    assert tour.whole_command().endswith(f"--corpus {file} --document-separator ---")
    assert "name the text file" in refusal(capsys, [str(model), "--document-separator", "---", "--out", str(out)])
    arguments = [str(model), "--corpus", str(file), "--document-separator", "***", "--out", str(out)]
    assert "stands nowhere in" in refusal(capsys, arguments)
    assert not out.exists()


@pytest.mark.parametrize("content", [b"", b" \n\n \n"])
def test_an_empty_corpus(
    capsys: pytest.CaptureFixture[str], out: Path, tmp_path: Path, model: Path, content: bytes
) -> None:
    file = tmp_path / "empty.txt"
    file.write_bytes(content)
    assert str(file) in refusal(capsys, [str(model), "--corpus", str(file), "--out", str(out)])
    assert not out.exists()


def test_a_folder_without_text(capsys: pytest.CaptureFixture[str], out: Path, tmp_path: Path, model: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert "folder" in refusal(capsys, [str(model), "--corpus", str(tmp_path / "folder"), "--out", str(out)])


def test_a_corpus_too_short_for_one_row(
    capsys: pytest.CaptureFixture[str], out: Path, tmp_path: Path, model: Path
) -> None:
    file = tmp_path / "short.txt"
    file.write_text("the cat sat")
    line = refusal(capsys, [str(model), "--corpus", str(file), "--out", str(out)])
    assert "corpus" in line
    assert not out.exists()


def test_a_corpus_of_a_few_rows_will_do(out: Path, tmp_path: Path, model: Path, corpus: Path) -> None:
    file = tmp_path / "few.txt"
    file.write_text(corpus.read_text()[:1200])
    result = run_tour(str(model), out=out, corpus=file)
    assert next(section for section in result.sections if section.id == "dictionary").status == "shown"


def test_text_that_is_not_utf8(capsys: pytest.CaptureFixture[str], out: Path, tmp_path: Path, model: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes("café ".encode("latin-1") * 50)
    line = refusal(capsys, [str(model), "--corpus", str(file), "--out", str(out)])
    assert str(file) in line
    assert "UTF-8" in line
    assert not out.exists()


def test_a_folder_that_holds_something_else(
    capsys: pytest.CaptureFixture[str], out: Path, model: Path, corpus: Path
) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("do not touch")
    for more in ([], ["--overwrite"]):
        assert str(out) in refusal(capsys, [str(model), "--corpus", str(corpus), "--out", str(out), *more])
    assert [file.name for file in out.iterdir()] == ["thesis.txt"]


def test_a_folder_that_holds_another_run(
    capsys: pytest.CaptureFixture[str], toured: tuple[Path, TourResult], model: Path, corpus: Path
) -> None:

    def times() -> dict[Path, int]:
        return {f: f.stat().st_mtime_ns for f in toured[0].rglob("*") if f.is_file() and f.name != ".lock"}

    before = times()
    line = refusal(capsys, [str(model), "--corpus", str(corpus), "--seed", "1", "--out", str(toured[0])])
    assert "--overwrite" in line
    assert times() == before


def test_an_output_that_is_a_file(capsys: pytest.CaptureFixture[str], out: Path, model: Path, corpus: Path) -> None:
    out.write_text("a file")
    assert str(out) in refusal(capsys, [str(model), "--corpus", str(corpus), "--out", str(out)])
    assert out.read_text() == "a file"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder in which nobody may write")
def test_an_output_folder_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], model: Path, corpus: Path, tmp_path: Path
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    target = locked / "run" if os.geteuid() != 0 else Path("/proc/cutaway-run")
    assert str(target) in refusal(capsys, [str(model), "--corpus", str(corpus), "--out", str(target)])


@pytest.mark.slow
def test_a_disk_that_fills_up(capsys: pytest.CaptureFixture[str], model: Path, corpus: Path, out: Path) -> None:
    """A limit on the size of files stands in for a full disk: writing the dictionary fails."""
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY)); "
        "from cutaway.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "tour", str(model), "--corpus", str(corpus), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert str(out) in done.stderr.splitlines()[-1]
    assert not (out / "index.html").exists()
    assert not (out / "dictionary" / "cfg.json").exists()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert main(command[3:]) == 0, "the same command resumes when there is room again"


def test_no_such_section(capsys: pytest.CaptureFixture[str], out: Path, model: Path) -> None:
    line = refusal(capsys, [str(model), "--only", "everything", "--out", str(out)])
    assert "patching" in line
    assert not out.exists()


def test_features_without_a_dictionary(
    capsys: pytest.CaptureFixture[str], out: Path, model: Path, corpus: Path
) -> None:
    line = refusal(capsys, [str(model), "--corpus", str(corpus), "--only", "features", "--out", str(out)])
    assert "--only dictionary" in line


def test_a_corpus_inside_the_output_folder_is_kept(
    capsys: pytest.CaptureFixture[str], out: Path, model: Path, corpus: Path
) -> None:
    out.mkdir()
    text = out / "text.txt"
    shutil.copy(corpus, text)
    refusal(capsys, [str(model), "--corpus", str(text), "--out", str(out), "--overwrite"])
    assert text.is_file()
