"""The command line: what goes wrong is one sentence and an exit code, what goes right is on stdout alone."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import cutaway.tour
from cutaway import CutawayError, __version__
from cutaway.cli import main as module
from cutaway.cli.main import main
from cutaway.cli.model.sites import layer_ranges


def python(code: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def command(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(module, "execute", command)


def test_ctrl_c_while_a_library_is_imported_ends_at_once() -> None:
    done = python(
        """
        import importlib.machinery, os, signal, sys, types
        from cutaway.cli import main as module

        def command(*_, **__):
            half = types.ModuleType("torch")
            half.__spec__ = importlib.machinery.ModuleSpec("torch", None)
            half.__spec__._initializing = True
            sys.modules["torch"] = half
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except BaseException:  # as from a static initialiser
                os.abort()

        module.execute = command
        module.main([])
        """
    )
    assert done.returncode == 130
    assert done.stderr == "cutaway: interrupted; the same command resumes, or starts again\n"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["tour", "--help"], ["subjects", "--help"], ["subjects", "train", "-h"]]
)
def test_help_and_version_load_neither_torch_nor_transformers(arguments: list[str]) -> None:
    done = python(
        """
        import sys
        from cutaway.cli.main import main
        code = main(sys.argv[1:])
        heavy = {"torch", "transformers", "numpy", "scipy", "sklearn", "pyarrow"} & sys.modules.keys()
        print("loaded:", *sorted(heavy))
        sys.exit(code)
        """,
        *arguments,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"
    assert len(done.stdout.splitlines()) > 1


def test_every_command_is_listed_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command, says in [
        ("tour", "Look"),
        ("check", "Load a model"),
        ("sites", "Print the names"),
        ("subjects", "Make"),
    ]:
        assert f"{command} " in text
        assert says in text
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tuor"], 'Unknown command "tuor". Did you mean "tour"?'),
        (["tour", "--ouy", "x"], "Unknown option: --ouy. Did you mean --out?"),
        (["tour", "--seed", "many"], 'unable to convert "many" into int'),
        (["tour", "--corpus", "/no/such/file"], "does not exist"),
        (["check"], "name a model: “atlas”, a folder, a hub id, or a function of yours with --module"),
        (["trace"], "requires an argument"),
        (["subjects", "train", "cairn"], 'Choose from: "atlas"'),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("cutaway: ")
    assert says in err
    assert err.count("\n") == 1


def test_what_the_user_can_mend_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, CutawayError("no such model: name a folder"))
    assert main([]) == 2
    assert capsys.readouterr() == ("", "cutaway: no such model: name a folder\n")


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main([])


def test_ctrl_c_is_one_line_and_exit_code_130() -> None:
    code = """
        import sys, time, types
        import cutaway.tour
        from cutaway.cli.main import main

        def run_tour(*_, **__):
            print("running", flush=True)
            time.sleep(30)

        cutaway.tour.run_tour = run_tour
        sys.exit(main(["tour"]))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a runner in the background ignores it
        env={name: value for name, value in os.environ.items() if name != "CUTAWAY_QUIET"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err == "loading atlas\ncutaway: interrupted; the same command resumes, or starts again\n"


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = """
        import sys
        from cutaway.cli import main as module

        def command(*_, **__):
            for _ in range(100_000):
                print("a line of a long table")

        module.execute = command
        sys.exit(module.main([]))
    """
    done = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" | head -n 1; exit "${PIPESTATUS[0]}"', sys.executable, textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "a line of a long table\n", "")


def test_a_terminal_that_cannot_show_a_sign_is_no_error() -> None:
    code = """
        import sys
        from cutaway.cli import main as module
        module.execute = lambda *_, **__: print("“α”")
        sys.exit(module.main([]))
    """
    done = python(code, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, "\\u201c\\u03b1\\u201d\n")


def test_the_libraries_are_silenced_but_the_users_settings_win() -> None:
    code = """
        import os, sys, warnings
        from cutaway.cli.main import silence_libraries
        silence_libraries()
        import logging
        import transformers
        from transformers.utils import logging as theirs
        from huggingface_hub.utils import are_progress_bars_disabled
        warnings.warn("chatter")
        print(theirs.get_verbosity() == logging.ERROR, are_progress_bars_disabled(), theirs.is_progress_bar_enabled())
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRANSFORMERS_", "HF_", "PYTHONWARN"))}
    silent = python(code, env=environment)
    assert silent.stdout.split() == ["True", "True", "False"]
    assert silent.stderr == ""
    loud = python(code, env={**environment, "TRANSFORMERS_VERBOSITY": "info", "HF_HUB_DISABLE_PROGRESS_BARS": "0"})
    assert loud.stdout.split()[:2] == ["False", "False"]


@pytest.fixture
def toured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple, dict[str, Any]]]:
    """Calls of `run_tour`, which here prints chatter on stderr and returns a result with figures."""
    calls: list[tuple[tuple, dict[str, Any]]] = []

    def run_tour(*arguments: object, **options: Any) -> SimpleNamespace:
        calls.append((arguments, options))
        print("progress", file=sys.stderr)
        return SimpleNamespace(model_dump=lambda mode: {"sections": []})

    monkeypatch.setattr(cutaway.tour, "run_tour", run_tour, raising=False)
    return calls


def test_tour_says_where_its_page_is(
    toured: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["tour"]) == 0
    assert toured.pop() == (
        ("atlas",),
        {
            "out": Path("runs/tour-atlas"),
            "corpus": None,
            "document_separator": None,
            "seed": 0,
            "overwrite": False,
            "only": None,
        },
    )
    assert str(tmp_path / "runs" / "tour-atlas" / "index.html") in capsys.readouterr().out

    (tmp_path / "text.txt").write_text("a")
    assert main(["tour", "org/name", "--out", "there", "--corpus", "text.txt", "--seed", "3", "--overwrite"]) == 0
    assert toured.pop() == (
        ("org/name",),
        {
            "out": Path("there"),
            "corpus": Path("text.txt"),
            "document_separator": None,
            "seed": 3,
            "overwrite": True,
            "only": None,
        },
    )


def test_tour_json_is_all_there_is_on_stdout(toured: list, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tour", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["command"], found["model"], found["figures"]) == ("cutaway tour", "atlas", {"sections": []})
    assert err == "progress\n"


@pytest.mark.parametrize(
    ("model", "folder"),
    [("org/My Model", "tour-My-Model"), ("./gpt2/", "tour-gpt2"), ("..", "tour-x"), ("/", "tour-model")],
)
def test_the_folder_of_a_tour_is_named_after_its_model(
    toured: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, folder: str
) -> None:
    inside = tmp_path / "x" / "here"
    (inside / "gpt2").mkdir(parents=True)
    monkeypatch.chdir(inside)
    assert main(["tour", model]) == 0
    assert toured.pop()[1]["out"] == Path("runs") / folder


@pytest.mark.parametrize(
    ("layers", "text"), [([], ""), ([3], "3"), ([0, 1, 2], "0-2"), ([0, 1, 2, 5, 7, 8], "0-2, 5, 7-8")]
)
def test_layers_are_printed_as_ranges(layers: list[int], text: str) -> None:
    assert layer_ranges(layers) == text


def test_module_and_script_are_the_same_command() -> None:
    def run(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    script = Path(sys.executable).parent / "cutaway"
    assert run(sys.executable, "-m", "cutaway", "--version") == run(str(script), "--version") == f"{__version__}\n"


def test_help_is_quick() -> None:
    """Well under half a second on an idle machine; the limit allows for a busy one."""

    def seconds(run: Callable[[], object]) -> float:
        before = os.times()
        run()
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds(lambda: python("from cutaway.cli.main import main; main(['--help'])")) for _ in range(3)) < 0.5


def test_a_closed_stdout_is_no_failure() -> None:
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m cutaway --version >&-"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_behind_stdout_is_one_sentence() -> None:
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m cutaway --help > /dev/full"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["cutaway: the output could not be written: the disk is full"]


def test_an_interrupt_that_a_library_turns_into_its_own_error_is_still_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_tour(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt as error:
            raise ModuleNotFoundError("could not import") from error

    monkeypatch.setattr("cutaway.tour.run_tour", run_tour)
    before = signal.getsignal(signal.SIGINT)
    assert main(["tour"]) == 130
    assert capsys.readouterr().err == "cutaway: interrupted; the same command resumes, or starts again\n"
    assert signal.getsignal(signal.SIGINT) is before
