"""`--module FILE.py:function`: a model of one's own in the commands, by ids."""

import json
import random
from pathlib import Path

import pytest

from cutaway.cli.main import main
from cutaway.model.own.file import load_module

OWN_MODELS = Path(__file__).parents[1] / "helpers"
NAMES = ("gpt", "bare", "unequal")


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A file with a function for each model, which imports a file beside it."""
    (tmp_path / "own_parts.py").write_text((OWN_MODELS / "own_models.py").read_text())
    path = tmp_path / "mine.py"
    functions = "\n\n".join(f"def {name}():\n    return made({name!r})" for name in NAMES)
    path.write_text(f"from own_parts import made\n\n\n{functions}\n")
    return path


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    code = main(words)
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


@pytest.mark.parametrize("name", NAMES)
def test_each_command_takes_it(name: str, program: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm = load_module(f"{program}:{name}")
    own = ["--module", f"{program}:{name}"]
    rng, pairs = random.Random(0), []
    while len(pairs) < 16:
        row = [rng.randrange(lm.d_vocab_in) for _ in range(6)]
        other = [row[0], rng.randrange(lm.d_vocab_in), *row[2:]]
        logits = lm.run([row, other], logits="last").logits
        assert logits is not None
        right, wrong = logits[:, 0].argmax(-1).tolist()
        if right != wrong:
            texts = (" ".join(f"#{i}" for i in ids) for ids in (row, other))
            clean, corrupt = texts
            pairs.append({"clean": clean, "corrupt": corrupt, "answer": f"#{right}", "wrong": f"#{wrong}"})
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    documents = [" ".join(f"#{rng.randrange(lm.d_vocab_in)}" for _ in range(8)) for _ in range(150)]
    (tmp_path / "corpus.txt").write_text("\n\n".join(documents))

    card = json.loads(run(["check", *own, "--json"], capsys))["figures"]
    assert card["passed"]
    assert card["card"]["architecture"] == type(lm.hf.module).__name__
    assert card["card"]["vocabulary"] == lm.d_vocab
    assert "absent" in run(["sites", *own], capsys)

    prompt = pairs[0]["clean"]
    printed = json.loads(run(["lens", prompt, *own, "--target", pairs[0]["answer"], "--json"], capsys))
    lens = printed["figures"]
    assert printed["command"].startswith(f"cutaway lens '{prompt}' --target '{pairs[0]['answer']}' --module {program}")
    assert json.dumps(pairs[0]["answer"]) in json.dumps(lens["logit_lens"])

    page = tmp_path / "heads.html"
    table = run(["heads", prompt, *own, "--length", "3", "--n", "4", "--html", str(page)], capsys)
    assert "previous" in table
    assert page.stat().st_size > 5_000

    pairs_of = ["--pairs", str(tmp_path / "pairs.json")]
    assert "blocks.{l}.resid_post" in run(["patch", *own, *pairs_of], capsys)
    circuit = tmp_path / "circuit.json"
    options = ["--size", "60%", "--draws", "5", "--quick", "--out", str(circuit)]
    assert "circuit" in run(["circuit", *own, *pairs_of, *options], capsys)
    again = run(["circuit", *own, *pairs_of, "--evaluate", str(circuit), "--draws", "5", "--quick"], capsys)
    assert "faithfulness" in again

    folder = tmp_path / "sae"
    words = ["train", *own, "--site", "blocks.0.mlp.out", "--corpus", str(tmp_path / "corpus.txt"), "--context", "8"]
    words += ["--d-sae", "24", "--k", "4", "--tokens", "2048", "--batch", "64", "--held-out", "16"]
    words += ["--out", str(folder)]
    assert "variance explained" in run(words, capsys)
    assert json.loads((folder / "judged.json").read_text())["judged"]
    assert main(["train", "--recipe", str(folder / "recipe.toml"), "--out", str(tmp_path / "other")]) == 2
    assert "name it with --module too if it may run" in capsys.readouterr().err


def test_what_is_refused(program: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program.write_text(
        "from own_parts import GPT, Gpt\n\n\ndef bare():\n    return Gpt()\n\n\ndef nothing():\n    pass\n\n\n"
        "def four():\n    return Gpt(), GPT, None, 1\n\n\ndef fails():\n    return Gpt(wrong=1)\n\n\n"
        "three = 3\n"
    )
    for spec, says in [
        (f"{program}", "name a file and a function in it"),
        (f"{program}:", "name a file and a function in it"),
        ("nobody.py:model", "there is no file nobody.py"),
        (f"{program}:missing", "has no function missing; it has bare, nothing, four, fails"),
        (f"{program}:three", "has no function three"),
        (f"{program}:nothing", "returned nothing; it returns a module, (module, description)"),
        (f"{program}:four", "returned a tuple of Gpt, Description, NoneType, int"),
        (f"{program}:fails", "raised TypeError, line 17: "),
        (f"{program}:bare", "or a module with description=, not a Gpt"),
    ]:
        assert main(["check", "--module", spec]) == 2
        said = capsys.readouterr().err
        assert says in said, said
        assert said.count("\n") == 1
    assert main(["check", "atlas", "--module", f"{program}:bare"]) == 2
    assert "stands in the place of the model: leave 'atlas' out" in capsys.readouterr().err
    assert main(["lens", "atlas", "#1", "--module", f"{program}:bare"]) == 2
    assert "leave 'atlas' out" in capsys.readouterr().err
    assert main(["check"]) == 2
    assert "name a model" in capsys.readouterr().err
    (tmp_path / "broken.py").write_text("def model(:\n")
    assert main(["check", "--module", f"{tmp_path / 'broken.py'}:model"]) == 2
    assert "raised SyntaxError" in capsys.readouterr().err


def test_text_and_tokenizer(program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lens", "hello there", "--module", f"{program}:gpt"]) == 2
    assert "'hello' is no token id, and this model has no tokenizer" in capsys.readouterr().err
    program.write_text(
        "from own_parts import made\nfrom tokenizers import Tokenizer, models, pre_tokenizers\n"
        "from transformers import PreTrainedTokenizerFast\n\n\ndef gpt():\n"
        "    words = {f'w{i}': i for i in range(21)}\n"
        "    tokenizer = Tokenizer(models.WordLevel(words, unk_token='w0'))\n"
        "    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()\n"
        "    return (*made('gpt'), PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token='w0'))\n"
    )
    out = run(["lens", "w3 w5 w7", "--module", f"{program}:gpt", "--target", "w9"], capsys)
    assert "w9" in out
