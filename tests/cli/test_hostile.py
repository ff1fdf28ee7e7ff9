"""Damaged and hostile input: one sentence and exit code 2, whoever wrote it. `tests/test_fuzz.py` spoils the bytes."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.files import parse_json, read_json, write_json, write_text
from cutaway.artifacts.manifest import json_hash
from cutaway.causal.circuits.circuit import Circuit
from cutaway.cli.causal.trace import read_facts
from cutaway.cli.main import main
from cutaway.cli.observe.probe import read_rows
from cutaway.data.corpus.documents import documents_of
from cutaway.data.harvesting.store import Store
from cutaway.data.tasks.files import read_pairs
from cutaway.dictionaries import load, train
from cutaway.observe.lens.files import load_tuned_lens
from cutaway.observe.probes.probe import load_probe

LONG = "x" * 300


def refused(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("cutaway: ")
    return err


def test_a_working_directory_that_is_gone_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # and back again in the end
    (tmp_path / "gone").mkdir()
    os.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "the working directory is gone" in refused(capsys, ["dictionary", "inspect", "here"])


@pytest.mark.parametrize(
    "words",
    [
        ["dictionary", "inspect", LONG],
        ["train", "--recipe", LONG, "--out", "out"],
        ["train", "atlas", LONG, "--site", "blocks.0.resid_post", "--out", "out"],
        ["train", "--store", LONG, "--out", "out"],
        ["sites", LONG],
        ["sites", "./" + LONG],
        ["trace", "atlas", "--prompts", LONG + ".json"],
        ["probe", "atlas", LONG + ".csv"],
        ["lens", "atlas", "text", "--html", LONG],
        ["dictionary", "convert", "atlas/blocks.3.resid_post", LONG],
    ],
    ids=lambda words: " ".join(words).replace(LONG, "LONG"),
)
def test_names_that_no_file_can_have(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "Traceback" not in refused(capsys, words)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "read",
    [cutaway.load, cutaway.load_run, cutaway.load_edits, read_pairs, documents_of, load_tuned_lens, load, Store.open,
     load_probe, Circuit.load],
    ids=lambda read: getattr(read, "__qualname__", str(read)),
)  # fmt: skip
def test_names_that_no_file_can_have_in_python(read: Callable[[str], Any]) -> None:
    for name in (LONG, f"{LONG}/{LONG}.json", "no/such/folder"):
        with pytest.raises(CutawayError) as raised:
            read(name)
        assert "\n" not in str(raised.value)


def test_a_folder_of_a_corpus_that_may_not_be_looked_into_is_named_and_not_left_out() -> None:
    open_to_all = Path(tempfile.mkdtemp())  # pytest's own folders are closed to nobody, whatever rights they are given
    open_to_all.chmod(0o755)
    closed = open_to_all / "b"
    closed.mkdir()
    for folder in (open_to_all, closed):
        (folder / "a.txt").write_text("some text")
    was = os.geteuid()
    try:
        for path, rights in ((closed, 0o000), (open_to_all / "a.txt", 0o000)):
            path.chmod(rights)
            if was == 0:
                os.seteuid(65534)
            with pytest.raises(CutawayError, match=f"{path} could not be read: Permission denied"):
                list(documents_of(open_to_all))
            if was == 0:
                os.seteuid(0)
            path.chmod(0o755)
    finally:
        if was == 0:
            os.seteuid(0)
        shutil.rmtree(open_to_all)


def test_a_dictionary_beyond_the_memory_is_refused_before_it_is_made() -> None:
    x = torch.randn(64, 16)
    with pytest.raises(CutawayError, match=r"takes [\d,.]+ GiB, and [\d,.]+ GiB are free \(d_sae is 1,073,741,824\)"):
        train(x, "blocks.0.resid_post", d_sae=2**30, tokens=64, batch=32, k=4)
    for name, value in {"d_sae": 10**12, "tokens": 10**30, "batch": 10**20}.items():
        with pytest.raises(CutawayError, match=f"{name} = {value}"):
            train(x, "blocks.0.resid_post", **{"d_sae": 32, "tokens": 64, "batch": 32, "k": 4, name: value})


def test_numbers_that_no_loop_can_reach_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--tokens" in refused(capsys, ["train", "atlas", "--tokens", str(10**30), "--out", "out"])


def test_a_sentence_that_quotes_several_lines_is_one() -> None:
    assert str(CutawayError("the column a\nb\u2028c is missing")) == "the column a b c is missing"


@pytest.mark.parametrize("layers", [10**9, 10**30, 3])
def test_a_tuned_lens_of_other_layers_than_it_says_is_refused_at_once(tmp_path: Path, layers: int) -> None:
    config = {"base_model_name_or_path": "a", "d_model": 4, "num_hidden_layers": layers, "bias": True}
    write_json(tmp_path / "config.json", config)
    torch.save(
        {f"{i}.{n}": torch.zeros(shape) for i in range(2) for n, shape in (("weight", (4, 4)), ("bias", 4))},
        tmp_path / "params.pt",
    )
    began = time.monotonic()
    with pytest.raises(CutawayError, match=r"does not fit its config\.json.*(too few for|is missing)"):
        load_tuned_lens(tmp_path)
    assert time.monotonic() - began < 5


def adapter(folder: Path, base: Path) -> None:
    folder.mkdir(exist_ok=True)
    write_json(folder / "adapter_config.json", {"base_model_name_or_path": str(base), "peft_type": "LORA"})
    save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors")


def test_adapters_that_name_themselves_or_each_other_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    itself, one, other = tmp_path / "itself", tmp_path / "one", tmp_path / "other"
    adapter(itself, itself)
    adapter(one, other)
    adapter(other, one)
    for folder in (itself, one):
        with pytest.raises(CutawayError, match="as its base model, which is an adapter itself"):
            cutaway.load(folder)
    (itself / "adapter_config.json").write_text("[1]")
    with pytest.raises(CutawayError, match="does not name its base model"):
        cutaway.load(itself)


SURROGATE = "half \ud834 of a pair"
PAIR = {"clean": "the cat", "corrupt": "the dog", "answer": " sat", "wrong": " ran"}
READ: dict[str, tuple[Any, Callable[[Path], Any]]] = {
    "corpus.jsonl": ({"text": SURROGATE}, lambda path: list(documents_of(path))),
    "pairs.json": ([PAIR | {"clean": SURROGATE}], read_pairs),
    "answers.json": ([PAIR, PAIR | {"answers": [SURROGATE], "wrongs": [" x"]}], read_pairs),
    "blimp.jsonl": (
        {"sentence_good": "", "sentence_bad": "", "one_prefix_prefix": f"{SURROGATE} this", "one_prefix_word_good": "a"}
        | {"one_prefix_word_bad": "b"},
        read_pairs,
    ),
    "rows.jsonl": ({"text": SURROGATE, "label": "a"}, read_rows),
    "labels.jsonl": ({"text": "a text", "label": SURROGATE}, read_rows),
    "facts.json": ([{"prompt": SURROGATE, "subject": "half"}], read_facts),
}


@pytest.mark.parametrize("name", READ)
def test_half_of_a_surrogate_pair_is_refused_where_text_is_read(tmp_path: Path, name: str) -> None:
    value, read = READ[name]
    (tmp_path / name).write_text(json.dumps(value))
    with pytest.raises(CutawayError, match="half of a surrogate pair") as raised:
        read(tmp_path / name)
    assert "\n" not in str(raised.value)
    str(raised.value).encode()


def test_half_of_a_surrogate_pair_in_a_name_is_written_and_hashed(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"corpus": SURROGATE})
    assert read_json(tmp_path / "a.json") == {"corpus": SURROGATE}
    write_text(tmp_path / "a.html", f"<p>{SURROGATE}</p>")
    assert (tmp_path / "a.html").read_text() == "<p>half ? of a pair</p>"
    assert json_hash({"corpus": SURROGATE}) != json_hash({"corpus": "half"})


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("[" * 300 + "]" * 300, "nested too deeply"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a":' * 200 + "1" + "}" * 200, "nested too deeply"),
        ("9" * 5000, "too many digits"),
        ("[1, ", "line 1, column"),
        (b'"\xff"', "byte 1 is not UTF-8"),
    ],
    ids=["300", "100,000", "objects", "digits", "cut short", "no text"],
)
def test_json_that_could_be_read_but_not_used_is_refused(data: Any, says: str) -> None:
    with pytest.raises(CutawayError, match=says):
        parse_json(data, "a file")
    assert parse_json("[" * 90 + "]" * 90, "a file")


def test_a_table_with_a_cell_of_any_length_or_numbers_of_any_size_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x" * 200_000 + ",label\na,b\n")
    with pytest.raises(CutawayError, match="field larger than field limit"):
        read_rows(tmp_path / "a.csv")
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": ' + "9" * 5000 + "}\n")
    with pytest.raises(CutawayError, match="line 1 is not usable: it holds a number of too many digits"):
        read_rows(tmp_path / "a.jsonl")
