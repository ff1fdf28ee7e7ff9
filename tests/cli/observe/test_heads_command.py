"""`cutaway heads`: the table, JSON and page; what is refused before any work."""

import json
from pathlib import Path

import pytest

import cutaway
from cutaway.cli.main import main
from cutaway.model.language_model import LanguageModel

QUICK = ["--n", "3", "--length", "12"]


@pytest.fixture(autouse=True)
def loaded_once(atlas: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    load = cutaway.load
    monkeypatch.setattr(cutaway, "load", lambda model, **options: atlas if model == "atlas" else load(model, **options))


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["heads", "atlas", "--kind", "induction", "previous", "--top", "2", "--ablate", "mean", *QUICK]) == 0
    out = capsys.readouterr().out
    assert out.startswith("heads of atlas: 8 layers × 8\n")
    assert "L3H7" in out
    assert "L7H3" in out
    assert "Δ mean" in out
    assert "Δ zero" not in out
    assert "duplicate:" not in out
    assert "Induction: " in out
    assert "composition in atlas; random heads" in out


def test_json_has_everything_and_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["heads", "atlas", "Dallas is in Texas", "--needle", "Dallas", "--ablate", "none", "--json", *QUICK]) == 0
    )
    printed = json.loads(capsys.readouterr().out)
    found = printed["figures"]
    assert found["kinds"]["retrieval"]["n"] == 1
    assert found["kinds"]["retrieval"]["labelled"] == []  # one prompt has no interval
    assert [3, 7] in found["kinds"]["previous"]["labelled"]
    assert found["effects"] == {}
    assert found["composition"]["top"]["k"][0][1].startswith("L7")
    assert printed["command"] == (
        "cutaway heads atlas 'Dallas is in Texas' --ablate none --needle Dallas --length 12 --n 3"
    )


def test_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "heads.html"
    prompt = "The capital of <b>Texas</b> is"
    assert main(["heads", "atlas", prompt, "--ablate", "zero", "--html", str(path), *QUICK]) == 0
    assert f"page: {path}" in capsys.readouterr().out
    page = path.read_text(encoding="utf-8")
    assert "<b>Texas" not in page
    for said in ("induction heads", "Zero ablation: second copy", "Zero ablation: text", "cw-att-grid", "Composition"):
        assert said in page
    assert "L3H7" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


STORY = "Tom has a red dog. The red dog of Tom likes Tom. Tom likes the red dog."


def test_heads_are_scored_on_files_and_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, page = tmp_path / "stories.txt", tmp_path / "heads.html"
    corpus.write_text("\n---\n".join(f"{STORY}\n\nDay {i}: {STORY}" for i in range(12)))
    words = ["heads", "atlas", "--kind", "induction", "previous", "--ablate", "mean", *QUICK, "--on", str(corpus)]
    options = ["--rows", "4", "--context", "32", "--document-separator", "---"]
    assert main([*words, *options, "--html", str(page)]) == 0
    out, err = capsys.readouterr()
    assert "cutaway:" not in err
    assert "previous (text): attention to the token before, on the text; ablated for the text; " in out
    assert "tokens of 4 sequences" in out
    assert "On the text, an induction pattern: " in out
    html = page.read_text(encoding="utf-8")
    assert "induction (text) heads" in html
    assert "and on 4 sequences of text" in html
    shown = f"--on {corpus} --length 12 --n 3 --rows 4 --context 32"
    assert shown in html
    assert "--document-separator=---" in html
    assert main([*words[:-1], str(corpus), *options, "--on", STORY, "--on", STORY[:40], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["figures"]["kinds"]
    assert found["induction (text)"]["n"] == 6
    assert found["previous (text)"]["labelled"][0] == [3, 7]
    assert found["previous"]["n"] == 3


def test_it_says_that_random_tokens_are_far_off(capsys: pytest.CaptureFixture[str]) -> None:
    """As on any model of text: its loss on them is above that of an even guess."""
    words = ["heads", "atlas", "--kind", "induction", "--ablate", "none", *QUICK]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "Warning: the loss on random tokens is " in out
    assert "; --on TEXT " in out
    assert main([*words, "--on", STORY]) == 0
    out = capsys.readouterr().out
    assert "Warning: the loss on random tokens is " in out
    assert "--on TEXT" not in out
    assert "one sequence, so no interval and no label" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--kind", "retrieval"], "--needle"),
        (["--needle", "x"], "give the prompt too"),
        (["The end", "--needle", "Zanzibar"], "none of the prompts"),
        (["--length", "100000"], "does not fit"),
        (["--on", "nothing-here.txt"], "there is no such file"),
        (["--document-separator", "---"], "--on"),
        (["--on", ""], "--on is empty"),
        (["--kind", "nonsense"], "nonsense"),
        (["--ablate", "half"], "half"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["heads", "atlas", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.count("\n") == 1 or "nonsense" in err or "half" in err
