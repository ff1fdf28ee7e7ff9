"""The command that is recorded with a figure measures the same figure again."""

import inspect
import json
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import cutaway
from cutaway.cli.asked import command_line
from cutaway.cli.main import app, main
from cutaway.model.language_model import LanguageModel

PROMPT = "The capital of the state containing Dallas is"
SCHEMA = json.loads((Path(inspect.getfile(main)).parent / "result.schema.json").read_text())
DICTIONARY = "atlas/blocks.3.resid_post"
COMMANDS = [
    ["check", "atlas", "--dtype", "float32"],
    ["sites", "atlas"],
    ["lens", "atlas", PROMPT, "--position", "-1", "--position", "-2", "--top", "2", "--mid"],
    ["lens", "atlas", "--", "- a text that begins like an option"],
    ["heads", "atlas", PROMPT, "--kind", "previous", "--ablate", "none", "--n", "3", "--seed", "2"],
    ["attribute", "atlas", PROMPT, "--answer", " Austin", "--draws", "4", "--dtype", "float32"],
    ["attribute", "atlas", PROMPT, "--by", "head", "--ablate", "2", "--reference", "text.txt", "--seed", "1"],
    ["attribute", "atlas", PROMPT, "--answer=--", "--against", "mean", "--position", "-2"],
    ["saliency", "atlas", PROMPT, "--method", "occlusion", "--baseline", "delete", "--seeds", "1", "--draws", "3"],
    ["saliency", "atlas", PROMPT, "--method", "gradient-x-input", "--dtype", "bfloat16", "--seeds", "1"],
    ["probe", "atlas", "rows.csv", "--site", "blocks.3.resid_post", "--folds", "3", "--draws", "2", "--seed", "4"],
    ["tasks", "atlas", "--task", "two hop", "--task", "pronoun", "--n", "9", "--split", "search"],
    ["patch", "atlas", "--task", "two hop", "--n", "8", "--role", "last", "--layer", "3", "--layer", "5"],
    ["patch", "atlas", "--task", "two hop", "--n", "8", "--over", "heads", "--layer", "6", "--direction", "noise"],
    ["trace", "atlas", PROMPT, "--subject", "Dallas", "--answer", " Austin", "--noise", "2.5"],
    ["circuit", "atlas", "--task", "two hop", "--size", "30", "--n", "8", "--quick", "--draws", "2"],
    ["dictionary", "inspect", DICTIONARY],
    ["dictionary", "inspect", DICTIONARY, "--model", "atlas", "--tokens", "256", "--dtype", "bfloat16"],
    ["dictionary", "inspect", DICTIONARY, "--model", "atlas", "--corpus", "text.txt", "--tokens", "300"],
    ["harvest", "atlas", "--corpus", "text.txt", "--site", "blocks.1.resid_post", "--out", "h", "--tokens", "999"],
]  # fmt: skip


@pytest.fixture(autouse=True)
def loaded_once(atlas: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped model, once in each number format."""
    load, known = cutaway.load, {}

    def loaded(model: str, *, dtype: str | None = None, **options: Any) -> LanguageModel:
        if dtype not in known:
            known[dtype] = atlas if dtype in (None, "float32") else load(model, dtype=dtype, **options)
        return known[dtype]

    monkeypatch.setattr(cutaway, "load", loaded)


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cities = ("Oakland", "Miami", "Dallas", "Boston")
    sentences = [f"The capital of the state containing {city} is near {other}." for city in cities for other in cities]
    Path("text.txt").write_text(f"{inspect.getsource(inspect)}\n\n" + "\n\n".join(sentences))
    rows = [f"{sentence},{'Dallas' in sentence}" for sentence in sentences]
    Path("rows.csv").write_text("\n".join(["text,label", *rows]))


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[:2]))
@pytest.mark.usefixtures("inputs")
def test_a_recorded_command_measures_the_same_again(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_with_json(words)) in (0, 1)
    first = _timeless(json.loads(capsys.readouterr().out))
    jsonschema.validate(first, SCHEMA)
    program, *again = shlex.split(first["command"])
    assert program == "cutaway"
    assert main(_with_json(again)) in (0, 1)
    assert _timeless(json.loads(capsys.readouterr().out)) == first


def _timeless(printed: dict[str, Any]) -> dict[str, Any]:
    """Without the manifest of a circuit, which says when it was found."""
    if "manifest" in printed["figures"]:
        del printed["figures"]["manifest"]
    return printed


def _with_json(words: list[str]) -> list[str]:
    at = words.index("--") if "--" in words else len(words)
    return [*words[:at], "--json", *words[at:]]


@pytest.mark.parametrize(
    "words",
    [
        *COMMANDS,
        ["heads", "text", "--module", "own.py:make", "--on", "a b", "--on", "c.txt"],
        ["train", "atlas", "--out", "o", "--corpus", "c", "--site", "x", "--site", "y", "--set", "warmup=5"],
        ["subjects", "superposition", "--recovery"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
@pytest.mark.usefixtures("inputs")
def test_a_recorded_command_is_parsed_to_the_same_arguments(words: list[str]) -> None:
    line, bound = _recorded([*words, "--json"] if "--" not in words else words)
    again, bound_again = _recorded(shlex.split(line)[1:])
    assert again == line
    bound.arguments.pop("json", None)
    assert bound_again.arguments == bound.arguments


def _recorded(words: list[str]) -> tuple[str, inspect.BoundArguments]:
    _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    path, apps, _ = app.parse_commands(words)
    names = {one.field_info.name: one.name for one in apps[-1].assemble_argument_collection()}
    return command_line(path, bound, names), bound
