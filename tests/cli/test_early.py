"""Options are checked before a model is loaded, and what is loaded is said before anything heavy is imported."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import cutaway
from cutaway.cli.main import main

COMMANDS = [
    "check atlas",
    "sites atlas",
    "lens atlas text",
    "heads atlas",
    "attribute atlas text",
    "saliency atlas text",
    "probe atlas rows.csv",
    "tasks atlas",
    "patch atlas --task ioi",
    "trace atlas",
    "circuit atlas --task ioi",
    "harvest atlas --corpus rows.csv --site blocks.1.resid_post --out o",
    "train atlas --site blocks.1.resid_post --corpus rows.csv --out o",
    "dictionary inspect atlas/blocks.1.resid_post --model atlas",
    "dictionary judge atlas/blocks.1.resid_post --model atlas --corpus rows.csv",
    "subjects evaluate atlas",
    "tour atlas",
]


def test_what_is_loaded_is_said_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\na,0\nb,1\n")
    code = """
        import sys
        from cutaway.cli import main as module, options

        class Said(Exception):
            pass

        def is_quiet():
            print(*sorted({"torch", "transformers", "numpy", "scipy", "sklearn"} & sys.modules.keys()))
            raise Said

        options.is_quiet = is_quiet
        for line in sys.argv[1:]:
            try:
                print(line, module.main(line.split()))
            except Said:
                print(line)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *COMMANDS],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout.splitlines() == [said for line in COMMANDS for said in ("", line)], done.stderr


def test_the_line_is_on_stderr_and_silence_can_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for quiet, said in ((False, "loading some-model\n"), (True, "")):
        monkeypatch.setattr("cutaway.cli.options.is_quiet", lambda quiet=quiet: quiet)
        assert main(["sites", "/absent/some-model"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"{said}cutaway: ")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("check", "name a model"),
        ("check atlas --dtype float31", "--dtype"),
        ("lens atlas", "there is nothing to read"),
        ("heads atlas --needle x", "--needle is a piece of a prompt"),
        ("heads atlas --on absent.txt", "no such file"),
        ("attribute atlas", "there is no prompt"),
        ("attribute atlas a b c --answer x --answer y", "2 answers for 3 prompts"),
        ("saliency atlas a b c --answer x --answer y", "2 answers for 3 prompts"),
        ("probe atlas rows.csv --use", "--use measures answers"),
        ("probe atlas rows.csv --use --answer x", "give --wrong"),
        ("probe atlas rows.csv --use --kind mlp", "no one direction"),
        ("tasks atlas --task chess", "no task is called"),
        ("patch atlas --task chess", "no task is called"),
        ("patch atlas --task ioi --metric loss", "metric"),
        ("trace atlas --answer x", "needs a prompt"),
        ("trace atlas --noise 0", "hides nothing"),
        ("circuit atlas --task chess", "no task is called"),
        ("circuit atlas --task ioi --metric loss", "metric"),
        ("harvest atlas --corpus absent.txt --site blocks.1.resid_post --out o", "absent.txt"),
        ("train atlas --site blocks.1.resid_post --corpus rows.csv", "--out FOLDER"),
        ("dictionary inspect atlas/blocks.1.resid_post --model atlas --document-separator x", "--corpus names"),
        ("dictionary judge --model atlas --corpus rows.csv", "no dictionary to judge"),
    ],
)
def test_a_wrong_option_is_refused_before_the_model_is_loaded(
    line: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cutaway, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("text,label\na,0\nb,1\n")
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.count("\n") == 1
