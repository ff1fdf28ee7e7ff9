"""`cutaway patch`: the table, its JSON and its page, for tasks and pairs of one's own; and what is refused."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import cutaway
from cutaway.cli.main import main
from cutaway.model.language_model import LanguageModel

TWO_HOP = ["patch", "atlas", "--task", "two-hop capitals", "--n", "10"]
PROMPT = "The capital of the state containing {} is"
CAPITALS = {"Dallas": "Austin", "Oakland": "Sacramento", "Tampa": "Tallahassee", "Tucson": "Phoenix"}


@pytest.fixture(autouse=True)
def loaded_once(atlas: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutaway, "load", lambda model, **options: atlas)


def _own(path: Path, **changes: Any) -> Path:
    pairs = [
        {
            "clean": PROMPT.format(a), "corrupt": PROMPT.format(b), "answer": f" {CAPITALS[a]}",
            "wrong": f" {CAPITALS[b]}", "positions": {"city": [a, b]}, **changes,
        }
        for a in CAPITALS for b in CAPITALS if a != b
    ]  # fmt: skip
    path.write_text(json.dumps(pairs))
    return path


def test_the_table_says_what_a_cell_means_and_where_the_answer_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(TWO_HOP) == 0
    out = capsys.readouterr().out
    assert "0: the logit difference stays as after the corrupt prompt; 1: it is all brought back" in out
    assert "right on" in out
    first = next(line for line in out.splitlines() if line.startswith("  L0"))
    values = [float(word) for word in first.split()[1:]]
    assert values[7] > 0.9  # the city, before any layer but one
    assert max(values[:7]) < 0.05
    assert "control: random position" in out
    assert "chosen on half of the pairs" in out


@pytest.mark.parametrize(
    ("words", "columns", "part"),
    [
        (["--over", "heads", "--at", "last", "--direction", "noise"], 8, "attn.z head"),
        (["--over", "components", "--metric", "probability_difference", "--self-repair", "2"], 2, ".out"),
        (["--over", "neurons", "--layer", "3", "--at", "city", "--top", "4"], 8, "mlp.post neuron"),
        (["--role", "city", "--role", "last", "--site", "blocks.{l}.attn.v", "--head", "2"], 2, "attn.v head 2"),
    ],
)
def test_json_and_page(
    words: list[str], columns: int, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert main([*TWO_HOP, *words, "--json", "--html", str(page)]) == 0
    printed = json.loads(capsys.readouterr().out)
    data = printed["figures"]
    assert len(data["columns"]) == columns
    assert data["task_accuracy"]["n"] == 10
    one = data["largest"][0]
    assert part in one["effect"]["name"]
    assert one["effect"]["choices"]["evaluation"] == "10 pairs of two-hop capitals, seed 0"
    assert one["effect"]["controls"][0]["n"] == 10
    assert 0 < one["p"] <= one["q"] <= 1
    assert one["ratio_of_means"] == pytest.approx(one["effect"]["value"], abs=0.1)
    assert printed["command"].startswith("cutaway patch atlas --task 'two-hop capitals'")
    text = page.read_text()
    assert text.count("<h1>") == 1
    assert "1: it" in text  # what the numbers mean is in words
    assert "The six choices" in text
    assert ("Self-repair" in text) == ("--self-repair" in words)
    assert len((data["self_repair"] or {"heads": []})["heads"]) == (2 if "--self-repair" in words else 0)
    figures = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    assert "nan" not in figures.lower().replace("tennant", "")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--ablation", "zero"],
            "Each cell runs the clean prompt with zero in place of the activation at one head, at every",
        ),
        (
            ["--ablation", "noise", "--std", "2"],
            "gaussian noise of 2 standard deviations of the site, seed 0, on the act",
        ),
        (
            ["--metric", "kl"],
            "0: the KL from the clean run stays as after the clean prompt; 1: it falls to that of the cor",
        ),
        (["--at", "city"], "with the corrupt prompt's activation at one head, at “city”"),
    ],
)
def test_what_a_cell_is_is_said_in_words(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TWO_HOP, "--over", "heads", "--layer", "1", "--direction", "noise", *words]) == 0
    assert says in capsys.readouterr().out


def test_pairs_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _own(tmp_path / "cities.json", template="two hops")
    words = [
        "patch",
        "atlas",
        "--pairs",
        str(path),
        "--over",
        "heads",
        "--at",
        "last",
        "--direction",
        "noise",
        "--json",
    ]
    assert main(words) == 0
    own = json.loads(capsys.readouterr().out)["figures"]
    assert own["evaluation"] == "12 pairs of cities.json"
    assert own["at"] == "last"
    assert main([*words, "--n", "9"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"]["n"] == 9
    found = {}
    for ablation in ("mean_by_template", "zero"):
        assert main([*words, "--ablation", ablation]) == 0
        found[ablation] = json.loads(capsys.readouterr().out)["figures"]["mean"]
    assert own["mean"] != found["mean_by_template"] != found["zero"]


def _reversed(path: Path) -> Path:
    """The capitals, but each pair calls the other state's capital right: the model is right on none."""
    pairs = json.loads(_own(path).read_text())
    path.write_text(json.dumps([{**pair, "answer": pair["wrong"], "wrong": pair["answer"]} for pair in pairs]))
    return path


def test_a_task_that_the_model_cannot_do_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["patch", "atlas", "--pairs", str(_reversed(tmp_path / "cities.json")), "--over", "heads", "--layer", "1"]
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert "cannot do 12 pairs of cities.json: it is right on 0 of 12" in err
    assert "force it (--force) if you must" in err
    assert err.strip().count("\n") == 0
    assert out == ""


def test_forced_all_the_same_it_says_so_in_red_and_has_no_p(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    words = ["patch", "atlas", "--pairs", str(_reversed(tmp_path / "cities.json")), "--over", "heads", "--layer", "1"]
    assert main([*words, "--force", "--json", "--html", str(page)]) == 0
    printed = json.loads(capsys.readouterr().out)
    data = printed["figures"]
    assert "it is right on 0 of 12" in data["unable"]
    assert {value for row in (*data["p"], *data["q"], *data["p_of_all"]) for value in row} == {None}
    assert {(one["p"], one["q"], one["p_of_all"]) for one in data["largest"]} == {(None, None, None)}
    assert "--force" in printed["command"]
    text = page.read_text()
    assert 'class="cw-alarm">atlas cannot do 12 pairs of cities.json: it is right on 0 of 12' in text
    assert "No p: the model cannot do the task" in text
    assert ">p of all</th>" not in text
    assert main([*words, "--force"]) == 0
    out, err = capsys.readouterr()
    assert "cannot do" in out
    assert "cannot do" in err
    assert "no p: the model cannot do the task" in out


def test_the_readmes_example_is_of_a_task_that_the_model_can_do(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    line = next(line for line in readme.splitlines() if line.startswith("cutaway patch "))
    words = shlex.split(line.split("  #")[0])[1:]
    assert "atlas" in words
    assert main([*words, "--n", "8", "--layer", "1", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)["figures"]
    assert data["task_accuracy"]["value"] == 1
    assert data["unable"] == ""


def test_without_one_wording_the_roles_are_the_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["patch", "atlas", "--task", "world indirect object", "--n", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"]["columns"] == ["IO", "S1", "S2", "last"]
    assert main(["patch", "atlas", "--task", "world indirect object", "--n", "12", "--by-token", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)["figures"]
    assert data["columns"][0].startswith("0 ")
    assert data["evaluation"].endswith("of one wording")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--n", "12"], "either --task NAME or --pairs"),
        (["--task", "ioi", "--pairs", "FILE"], "either --task NAME or --pairs"),
        (["--task", "chess"], "no task is called 'chess'; there are two-hop capitals"),
        (["--task", "two-hop capitals", "--n", "4"], "4 usable pairs are too few for an interval"),
        (["--pairs", "FILE", "--site", "blocks.{l}.attn.zz"], "There is no site"),
        (["--pairs", "FILE", "--site", "embed"], "names no layer to sweep"),
        (["--pairs", "FILE", "--role", "verb"], "no position is named 'verb'; the pairs name city, last"),
        (["--pairs", "FILE", "--over", "heads", "--head", "9"], "has no head 9; its heads are 0 to 7"),
        (["--pairs", "FILE", "--over", "heads", "--layer", "11"], "layers are 0 to 7"),
        (["--pairs", "FILE", "--over", "heads", "--role", "city"], "--at says where"),
        (["--pairs", "FILE", "--at", "city"], "name --role"),
        (["--pairs", "FILE", "--over", "heads", "--ablation", "zero"], "take direction 'noise'"),
        (["--pairs", "FILE", "--ablation", "median"], 'Invalid value "median"'),
        (["--pairs", "FILE", "--metric", "accuracy"], 'Choose from: "logit_difference"'),
        (["--pairs", "FILE", "--over", "rows"], "Choose from"),
        (["--pairs", "FILE", "--metric", "nll", "--direction", "noise", "--ablation", "mean_by_template"], "template"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(_own(tmp_path / "cities.json"))
    assert main(["patch", "atlas", *(path if word == "FILE" else word for word in words)]) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.strip().count("\n") == 0
    assert captured.out == ""


def test_pairs_that_do_not_align_are_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _own(tmp_path / "long.json", corrupt="The capital of the big state containing Reno is", positions={})
    assert main(["patch", "atlas", "--pairs", str(path)]) == 2
    assert "clean and corrupt must have the same number of tokens" in capsys.readouterr().err


def test_a_metric_that_does_not_tell_the_prompts_apart_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(_own(tmp_path / "dull.json", answer=" dog", wrong=" cat"))
    words = ["patch", "atlas", "--pairs", path, "--force"]
    assert main([*words, "--metric", "probability"]) == 2  # neither prompt has a dog in it
    assert "probability does not tell the clean prompts from the corrupt ones" in capsys.readouterr().err
