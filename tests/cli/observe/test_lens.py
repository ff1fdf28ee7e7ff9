"""`cutaway lens`: reading, training and judging, and what is refused."""

import json
from pathlib import Path

import pytest

import cutaway
from cutaway.cli.main import main
from cutaway.model.language_model import LanguageModel

PROMPT = "The capital of the state containing Dallas is"


@pytest.fixture
def of_atlas(atlas: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutaway, "load", lambda model, **options: atlas)


@pytest.fixture
def of_tiny(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutaway, "load", lambda model, **options: tiny)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(" ".join(f"w{2 + (i * i + 3 * j) % 59}" for j in range(40)) for i in range(60)))
    return path


def test_the_two_hops_are_read_layer_by_layer(of_atlas: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lens", "atlas", PROMPT, "--target", " Texas", "--target", " Austin"]) == 0
    lines = capsys.readouterr().out.splitlines()
    layers = {line.split()[0]: line for line in lines[2:]}
    assert "' TX'" in layers["blocks.3.resid_post"]
    assert "' Austin'" in layers["blocks.7.resid_post"]
    assert layers["blocks.7.resid_post"].split()[-1] == "0"


def test_json_and_page(of_atlas: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "lens.html"
    assert (
        main(
            [
                "lens",
                "atlas",
                PROMPT,
                "--mid",
                "--json",
                "--html",
                str(page),
                "--position",
                "-2,",
            ]
        )
        == 2
    )
    capsys.readouterr()
    words = ["lens", "atlas", PROMPT, "--mid", "--json", "--html", str(page), "--position", "7", "--position", "8"]
    assert main(words) == 0
    data = json.loads(capsys.readouterr().out)["figures"]["logit_lens"]
    assert data["positions"] == [7, 8]
    assert len(data["layers"]) == 17
    assert data["followed"][0]["token"] == " Austin", "the model's own answer is followed"
    assert data["followed"][0]["rank"][-1][-1] == 0
    assert data["kl"][-1] == [0, 0]
    text = page.read_text()
    assert "inside L3" in text
    assert "nan" not in text


def test_a_tuned_lens_is_trained_judged_read_again_and_kept_from_other_models(
    of_tiny: None, text: Path, tmp_path: Path, atlas: LanguageModel, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, page = tmp_path / "lens", tmp_path / "page.html"
    train = ["lens", "tiny", "--train", str(text), "--out", str(out), "--steps", "4", "--batch", "64"]
    train += ["--context", "16", "--held-out", "4"]
    assert main([*train, "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "KL(final ‖ lens) in nats, tiny, 4 held-out rows" in printed
    assert "On held-out text" in page.read_text()
    saved = (out / "lens.safetensors").read_bytes()
    assert main([*train, "--json"]) == 0, "the same command finds it finished"
    data = json.loads(capsys.readouterr().out)["figures"]
    assert len(data["evaluation"]["effects"]) == 3
    assert data["evaluation"]["effects"][0]["controls"][0]["name"] == "logit lens"
    assert (out / "lens.safetensors").read_bytes() == saved

    assert main(["lens", "tiny", "w3 w4 w5", "--tuned", str(out), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)["figures"]
    assert data["tuned_lens"]["kl"][-1] == [0] * 3 == data["logit_lens"]["kl"][-1]
    assert data["tuned_lens"]["kl"][0] != data["logit_lens"]["kl"][0]

    assert main([*train[:-1], "5"]) == 2
    assert "another configuration" in capsys.readouterr().err
    monkeypatch.setattr(cutaway, "load", lambda model, **options: atlas)
    assert main(["lens", "atlas", PROMPT, "--tuned", str(out)]) == 2
    assert "with 3 layers of width 32; atlas has 8 of width 256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "give a prompt, or a text with --train"),
        (["w3", "--train", "x.txt"], "name it with --out"),
        (["w3", "--train", "x.txt", "--out", "y", "--tuned", "z"], "give one of them"),
        (["w3", "--mid", "--tuned", "z"], "leave --mid out"),
        (["w3", "--tuned", "/no/such/folder"], "/no/such/folder does not exist"),
        (["w3", "--position", "3"], "Position 3 is outside row 0"),
        (["w3", "--target", "w3 w4"], "'w3 w4' is 2 tokens of tiny: 'w3' (3), 'w4' (4)"),
        (["--train", "/no/such/text", "--out", "y"], "/no/such/text does not exist"),
        (["w3", "--steps", "0", "--train", "x", "--out", "y"], "--steps"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    of_tiny: None, words: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["lens", "tiny", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
