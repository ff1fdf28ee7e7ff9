"""`cutaway dictionary judge`: table, JSON, page, seeds together, settings as a frontier, and bad input."""

import json
from pathlib import Path

import pytest
import torch

import cutaway
from cutaway import dictionaries
from cutaway.cli.main import main
from cutaway.data.corpus.corpus import read_corpus, token_rows
from cutaway.data.harvesting.activations import read_activations
from cutaway.dictionaries.dictionary import Dictionary, TopK
from cutaway.model.language_model import LanguageModel

SITE = "blocks.1.resid_post"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(2, 61, (60, 30), generator=generator).tolist()
    path.write_text("\n\n".join(" ".join(f"w{word}" for word in text) for text in words))
    return path


@pytest.fixture
def saved(tiny: LanguageModel, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Two seeds with k = 4 and one with k = 8."""
    monkeypatch.setattr(cutaway, "load", lambda *_, **__: tiny)
    monkeypatch.setenv("CUTAWAY_QUIET", "1")
    x = read_activations(tiny, token_rows(tiny, read_corpus(corpus).documents, 16), SITE)
    mean = x.mean(0)
    found = {}
    for name, seed, k in (("a", 0, 4), ("b", 1, 4), ("wide", 0, 8)):
        picked = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:64]
        decoder = torch.nn.functional.normalize(x[picked] - mean, dim=1)
        one = Dictionary(
            decoder.T.contiguous() / 2, torch.zeros(64), decoder, mean, TopK(k), SITE, {"id": "tiny"},
            metadata={"training": {"seed": seed, "k": k}, "context": 16},
        )  # fmt: skip
        dictionaries.save(one, tmp_path / name)
        found[name] = str(tmp_path / name)
    return found


def words(corpus: Path, *more: str) -> list[str]:
    return [
        "dictionary",
        "judge",
        *more,
        "--model",
        "tiny",
        "--corpus",
        str(corpus),
        "--rows",
        "12",
        "--spliced-rows",
        "4",
    ]


def test_seeds_are_judged_together(saved: dict[str, str], corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(corpus, saved["a"], saved["b"])) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{saved['a']}, {saved['b']}\n")
    assert "2 seeds" in out
    assert "matched decoder cosine (signed, one-to-one assignment)" in out
    assert "random directions" in out
    assert "preset" not in out, "one setting is no frontier"


def test_settings_make_a_frontier_on_a_page(
    saved: dict[str, str], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert main([*words(corpus, *saved.values()), "--json", "--html", str(page), "--absolute"]) == 0
    found = json.loads(capsys.readouterr().out)["figures"]
    assert [one["paths"] for one in found["judged"]] == [[saved["a"], saved["b"]], [saved["wide"]]]
    assert found["context"] == 16, "as in training"
    assert [point["effects"]["l0"]["value"] for point in found["frontier"]] == pytest.approx([4, 8], abs=0.2)
    first = found["judged"][0]
    assert first["seeds"] == 2
    assert "absolute" in first["effects"]["stability_cosine"]["name"]
    for effect in first["effects"].values():
        assert effect["controls"]
        assert effect["command"].startswith("cutaway dictionary judge")
    html = page.read_text()
    for heading in ("L0 against cross-entropy recovered", "how often latents are active", "every figure", "control"):
        assert heading in html


def test_labels_of_a_file_are_probed(
    saved: dict[str, str], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "labels.csv"
    lines = [f"w{2 + i} w{3 + i % 50},{'low' if i % 50 < 25 else 'high'},g{i % 10}" for i in range(58)]
    table.write_text("\n".join(["text,label,group", *lines]))
    assert main([*words(corpus, saved["a"]), "--probe", str(table), "--json"]) == 0
    (probing,) = json.loads(capsys.readouterr().out)["figures"]["judged"][0]["probing"]
    assert probing["n"] == 58
    assert probing["groups"] == 10
    assert set(probing["effects"]) == {"1", "2", "5", "16"}
    assert len(probing["effects"]["1"]["f1"]["controls"]) == 3


def test_letters_are_probed_with_their_absorption(
    saved: dict[str, str], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every word of this model begins with w: nothing to tell apart, which is said."""
    assert main([*words(corpus, saved["a"]), "--probe", "letters"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "same" in err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "there is no dictionary to judge"),
        (["no/such/folder"], "no/such/folder"),
        (["{a}", "--probe", "nothing.csv"], "there is no such file"),
        (["{a}", "--probe", "states"], "no city of atlas's world"),
        (["{a}", "--high-norm", "0.5"], "high_norm is 0.5"),
        (["{a}", "--context", "1000"], "1000"),
        (["{a}", "--spliced-rows", "-1"], "spliced-rows"),
    ],
)
def test_bad_input_is_one_sentence(
    more: list[str], says: str, saved: dict[str, str], corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.format(**saved) for word in more]
    assert main([*words(corpus), *given]) == 2
    out, err = capsys.readouterr()
    assert says in err
    assert err.count("\n") == 1
    assert out == ""
