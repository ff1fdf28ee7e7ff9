"""Outputs never replace inputs: what cutaway did not write stays as it is, and the command says so before any work."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import cutaway
from cutaway import CutawayError
from cutaway.cli.main import main
from cutaway.data.pairs import PromptPair
from cutaway.data.tasks.files import write_pairs
from cutaway.dictionaries import save
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.selectors import ReLU
from cutaway.draw.page import page_html, write_page
from cutaway.model.language_model import LanguageModel
from cutaway.observe.lens.files import save_tuned_lens
from cutaway.observe.lens.tuned_lens import TunedLens


@pytest.fixture(autouse=True)
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(model: str, **options: object) -> None:
        raise AssertionError("refused too late: the model was loaded")

    monkeypatch.setattr(cutaway, "load", load)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A folder of a model, and what commands read."""
    folder = tmp_path / "in"
    folder.mkdir()
    save_file({"w": torch.zeros(3)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "data.csv").write_text("text,label\na,0\nb,1\n")
    (folder / "page.html").write_text("<!doctype html><p>somebody's own page")
    (folder / "notes.md").write_text("# Notes\n")
    pair = {"clean": "w2 w3", "corrupt": "w2 w4", "answer": " w5", "wrong": " w6"}
    (folder / "pairs.json").write_text(json.dumps([pair]))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "data.csv", "page.html", "notes.md"])
@pytest.mark.parametrize(
    "words",
    [
        ["check", "atlas", "--html"],
        ["lens", "atlas", "text", "--html"],
        ["heads", "atlas", "--html"],
        ["attribute", "atlas", "text", "--html"],
        ["saliency", "atlas", "text", "--html"],
        ["probe", "atlas", "data.csv", "--html"],
        ["probe", "atlas", "data.csv", "--out"],
        ["tasks", "atlas", "--html"],
        ["tasks", "atlas", "--task", "ioi", "--out"],
        ["patch", "atlas", "--pairs", "pairs.json", "--html"],
        ["trace", "atlas", "--html"],
        ["circuit", "atlas", "--pairs", "pairs.json", "--html"],
        ["circuit", "atlas", "--pairs", "pairs.json", "--out"],
        ["dictionary", "inspect", "atlas/blocks.3.resid_post", "--html"],
        ["dictionary", "judge", "atlas/blocks.3.resid_post", "--model", "atlas", "--corpus", "notes.md", "--html"],
        ["dictionary", "convert", "--overwrite", "atlas/blocks.3.resid_post"],
        ["subjects", "superposition", "--html"],
        ["subjects", "evaluate", "atlas", "--out"],
        ["subjects", "text", "atlas", "--out"],
    ],
    ids=lambda words: " ".join(words[:2] + words[-1:]),
)
def test_a_file_that_is_not_ours_stays(
    words: list[str], name: str, inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(inputs)
    before = contents(inputs)
    assert main([*words, name]) == 2
    error = capsys.readouterr().err
    assert error.startswith("cutaway: ")
    assert error.count("\n") == 1
    assert name in error
    assert contents(inputs) == before


@pytest.mark.parametrize("option", ["--pairs", "--held-out", "--evaluate"])
def test_what_circuit_reads_is_not_what_it_writes(
    option: str, inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(inputs)
    (inputs / "c.json").write_text('{\n  "format": "cutaway circuit"\n}')
    words = ["circuit", "atlas", "--pairs", "c.json" if option == "--pairs" else "pairs.json"]
    words += [] if option == "--pairs" else [option, "c.json"]
    assert main([*words, "--out", "../in/./c.json"]) == 2
    assert f"{option} and --out both name" in capsys.readouterr().err
    assert main(["tasks", "atlas", "--task", "pairs.json", "--out", "./pairs.json"]) == 2
    assert "--task and --out both name" in capsys.readouterr().err


def test_our_own_page_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.touch()
    for title in ("one", "two"):
        write_page(page, page_html(title=title, sections=[], command="cutaway check " + "x" * 9000))
        assert f"<title>{title}</title>" in page.read_text()


def test_pairs_replace_pairs_alone(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    first, second = (PromptPair("w2", "w3", answer, " w9") for answer in (" w4", " w5"))
    write_pairs(path, [first], name="own")
    write_pairs(path, [first], name="own", replace=False)
    with pytest.raises(CutawayError, match="holds other pairs"):
        write_pairs(path, [second], name="own", replace=False)
    write_pairs(path, [second], name="own")
    path.write_text("{}")
    with pytest.raises(CutawayError, match="holds no prompt pairs"):
        write_pairs(path, [second])


def test_nothing_is_saved_into_a_models_folder_or_over_another_kind(
    inputs: Path, tmp_path: Path, tiny: LanguageModel
) -> None:
    run = tiny.run([[2, 3]], capture="blocks.0.resid_post", edits=cutaway.zero("blocks.1.mlp.out"))
    lens = TunedLens(torch.zeros(3, 32, 32), torch.zeros(3, 32), tiny.identity(), "tiny", None, {})
    kinds = {
        "run": run.save,
        "edits": lambda folder: cutaway.save_edits(folder, run.edits),
        "lens": lambda folder: save_tuned_lens(lens, folder),
    }
    files = {"run": "run.json", "edits": "edits.safetensors", "lens": "manifest.json"}
    before = contents(inputs)
    for kind, keep in kinds.items():
        with pytest.raises(CutawayError, match="as a model's folder does"):
            keep(inputs)
        other = tmp_path / kind
        other.mkdir()
        (other / files[kind]).write_text('{"mine": 1}')
        with pytest.raises(CutawayError, match=f"{files[kind]} exists and is no"):
            keep(other)
        assert contents(other) == {files[kind]: b'{"mine": 1}'}
        (other / files[kind]).unlink()
        keep(other)
        keep(other)  # its own is replaced
    assert contents(inputs) == before


def test_overwriting_takes_only_what_save_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(8, 4, generator=generator)
    one = Dictionary(
        W_enc=w.T.clone(), b_enc=torch.zeros(8), W_dec=w, b_dec=torch.zeros(4), selector=ReLU(),
        site="blocks.0.resid_post", model={"id": "tiny"}, subtract_b_dec=False,
    )  # fmt: skip
    folder = save(one, tmp_path / "models" / "mine")
    (tmp_path / "models" / "thesis.tex").write_text("years of work")
    with pytest.raises(CutawayError, match=r"holds thesis\.tex too"):
        save(one, tmp_path / "models", overwrite=True)
    (folder / "notes.txt").write_text("kept")
    with pytest.raises(CutawayError, match=r"holds notes\.txt too"):
        save(one, folder, overwrite=True)
    (folder / "notes.txt").unlink()
    theirs = shutil.copytree(folder, tmp_path / "theirs")
    cfg = json.loads((theirs / "cfg.json").read_text())
    (theirs / "cfg.json").write_text(json.dumps(cfg).replace("cutaway", "x"))
    with pytest.raises(CutawayError, match="not a dictionary's folder"):
        save(one, theirs, overwrite=True)
    link = tmp_path / "link"
    link.symlink_to(folder)
    with pytest.raises(CutawayError, match="not a dictionary's folder"):
        save(one, link, overwrite=True)
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    assert main(["dictionary", "convert", str(folder), "models/../models/mine", "--overwrite"]) == 2
    assert "which is read" in capsys.readouterr().err
    assert contents(tmp_path) == before
    save(one, folder, overwrite=True)
    assert np.array_equal(cutaway.dictionaries.load(folder).W_dec, w)
