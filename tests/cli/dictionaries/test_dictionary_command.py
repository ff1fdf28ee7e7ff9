"""`cutaway dictionary`: inspect and convert."""

import json
from pathlib import Path

import pytest
import torch

import cutaway
from cutaway.cli.main import main
from cutaway.dictionaries import load, save
from cutaway.dictionaries.dictionary import Dictionary, Gated, Port, ReLU, TopK
from cutaway.model.language_model import LanguageModel


@pytest.fixture
def of_tiny(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutaway, "load", lambda model, **options: tiny)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(" ".join(f"w{2 + (i * i + 3 * j) % 59}" for j in range(40)) for i in range(60)))
    return path


def a_dictionary(seed: int = 0, **changes: object) -> Dictionary:
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(64, 32, generator=generator), dim=1)
    fields = {"selector": TopK(4), "site": "blocks.1.resid_post", "model": {"id": "tiny"}} | changes
    return Dictionary(W_dec.T.contiguous(), torch.zeros(64), W_dec, torch.zeros(32), **fields)  # type: ignore[arg-type]


def test_files_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(a_dictionary(), tmp_path / "d", "sparsify")
    assert main(["dictionary", "inspect", str(folder)]) == 0
    printed = capsys.readouterr().out
    for line in (
        "format             sparsify",
        "kind               sae, topk k=4",
        "expected L0        4 (k of topk)",
        "encoder · decoder  1.000, signed, mean over latents",
        "encoder.weight  [64, 32]   float32  W_enc [d_in, F], transposed",
        "give --model to measure how well it fits",
    ):
        assert line in printed, printed
    assert main(["dictionary", "inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"]["tensors"][0]["name"] == "encoder.weight"


def test_a_folder_that_holds_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(a_dictionary(), tmp_path / "run" / "one", "sparsify")
    assert main(["dictionary", "inspect", str(tmp_path / "run")]) == 0
    assert "run/one" in capsys.readouterr().out
    save(a_dictionary(1), tmp_path / "run" / "two", "sparsify")
    assert main(["dictionary", "inspect", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.endswith("run is no dictionary, but holds 2: name one of one, two\n")
    (tmp_path / "empty").mkdir()
    assert main(["dictionary", "inspect", str(tmp_path / "empty")]) == 2
    assert "empty holds no dictionary: looked for" in capsys.readouterr().err


def test_with_a_model_and_a_page(of_tiny: None, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, page = save(a_dictionary(), tmp_path / "d"), tmp_path / "page.html"
    words = ["dictionary", "inspect", str(folder), "--model", "tiny", "--corpus", str(text), "--tokens", "300"]
    words += ["--context", "20"]
    code = main([*words, "--html", str(page)])
    printed = capsys.readouterr().out
    assert "random directions" in printed
    assert "times √d / mean norm" in printed
    assert "Elsewhere" in page.read_text()
    assert "nan" not in page.read_text()
    assert main([*words, "--json"]) == code
    data = json.loads(capsys.readouterr().out)["figures"]
    assert (data["measured"]["n_rows"], data["measured"]["fits"]) == (15, code == 0)
    assert len(data["measured"]["effects"]) == 3
    assert {one["name"] for one in data["measured"]["sites"]} >= {"blocks.1.resid_pre", "blocks.1.mlp.in"}


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(a_dictionary(), tmp_path / "d")
    out = tmp_path / "out"
    assert main(["dictionary", "convert", str(folder), str(out), "--format", "dictionary_learning"]) == 0
    assert "blocks.1.resid_post" in capsys.readouterr().out
    x = torch.randn(9, 32)
    torch.testing.assert_close(load(out)(x), load(folder)(x))
    assert main(["dictionary", "convert", str(folder), str(out)]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["dictionary", "convert", str(folder), str(out), "--overwrite", "--site", "blocks.2.mlp.out"]) == 0
    assert load(out).site == "blocks.2.mlp.out"
    gated = save(a_dictionary(selector=Gated(torch.zeros(64), torch.zeros(64))), tmp_path / "gated")
    assert main(["dictionary", "convert", str(gated), str(tmp_path / "x"), "--format", "sparsify"]) == 2
    assert "this one is gated: save it as format='saelens'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_set_is_converted_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cutaway.dictionaries import load_all, save_all

    model = {"id": "tiny"}
    layers = [
        a_dictionary(i, selector=ReLU(), site=f"blocks.{i}.mlp.in", subtract_b_dec=False,
                     reads=(Port(f"blocks.{i}.mlp.in", 32, model),), writes=(Port(f"blocks.{i}.mlp.out", 32, model),))
        for i in range(2)
    ]  # fmt: skip
    folder = save_all(layers, tmp_path / "set", "circuit-tracer")
    assert (
        main(["dictionary", "convert", str(folder), str(tmp_path / "out"), "--format", "gemma-scope-2", "--json"]) == 0
    )
    assert len(json.loads(capsys.readouterr().out)["figures"]["dictionaries"]) == 2
    found = load_all(tmp_path / "out")
    assert list(found) == ["blocks.0.mlp.in", "blocks.1.mlp.in"]
    x = torch.randn(9, 32)
    for before, after in zip(layers, found.values(), strict=True):
        torch.testing.assert_close(after(x), before(x))
    assert main(["dictionary", "inspect", str(folder)]) == 2
    assert "holds 2 transcoders" in capsys.readouterr().err
    assert main(["dictionary", "inspect", str(tmp_path / "nothing")]) == 2
    assert "does not exist" in capsys.readouterr().err
