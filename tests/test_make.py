"""`make` and `.ci/run` on machines that lack things, and on environments that were never finished.

Python and pip are stand-ins here that record what they are asked, so nothing is downloaded.
"""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml
from identify.identify import tags_from_path

ROOT = Path(__file__).resolve().parent.parent

# Answers `-c` as the real Python does, makes a `.venv` whose Python is itself, and writes down what pip is asked.
STAND_IN = """\
#!/bin/sh
case "$1 $2" in
  "-m venv") echo "venv" >>calls; mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; exit 0 ;;
  "-m pip") shift 2; echo "pip $*" >>calls; [ ! -e pip-fails ]; exit ;;
  "-c import cutaway") exit 0 ;;
  "-c import venv, ensurepip") [ ! -e no-venv ]; exit ;;
  "-c import sys; sys.exit(sys.version_info < (3, 11))") [ ! -e old ]; exit ;;
  "-V "*) echo "Python 3.9.2"; exit 0 ;;
  "-c "*) exec REAL "$@" ;;
  *) echo "ran $*"; exit 0 ;;
esac
"""


class Checkout:
    """A copy of what `make` needs, in a folder whose name has a space."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tools").mkdir(parents=True)
        for name in ("Makefile", "pyproject.toml", "constraints.txt", "tools/environment.sh"):
            shutil.copy(ROOT / name, folder / name)
        self.programs = folder / "programs"
        self.programs.mkdir()
        self.write("programs/python3", STAND_IN.replace("REAL", f"'{sys.executable}'"))
        for name in ("make", "sh", "cat", "head", "mkdir", "cp", "rm", "mv", "dirname", "env", "awk", "flock", "uname"):
            if found := shutil.which(name):
                (self.programs / name).symlink_to(found)

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def make(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        variables = {"PATH": str(self.programs), "HOME": str(self.folder), **environment}
        command = [str(self.programs / "make"), *arguments]
        return subprocess.run(command, cwd=self.folder, env=variables, capture_output=True, text=True, timeout=60)

    def calls(self) -> list[str]:
        """What was asked of venv and pip since the last look."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    @property
    def stamp(self) -> Path:
        return self.folder / ".venv" / "cutaway-environment"


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "my projects" / "cutaway")


PIP = "pip install --disable-pip-version-check --quiet -c constraints.txt"


def test_the_first_make_builds_the_environment_and_the_second_does_nothing(checkout: Checkout) -> None:
    done = checkout.make("test")
    assert done.returncode == 0, done.stderr
    assert checkout.calls() == ["venv", f"{PIP} -e .[dev]"]
    assert "ran -m pytest -m not slow" in done.stdout
    done = checkout.make("demo")
    assert checkout.calls() == []
    assert "ran -m cutaway tour atlas --out runs/tour" in done.stdout


def test_parallel_make_builds_it_once(checkout: Checkout) -> None:
    assert checkout.make("-j", "4", "test", "demo", "lint", "test-slow").returncode in (0, 2)
    assert checkout.calls().count("venv") == 1


def test_torch_alone_comes_from_its_index(checkout: Checkout) -> None:
    checkout.make("test", TORCH_INDEX="https://example.org/cpu")
    checkout.stamp.unlink()
    checkout.make("test", "TORCH_INDEX=https://example.org/cpu")
    once = ["venv", f"{PIP} --index-url https://example.org/cpu torch", f"{PIP} -e .[dev]"]
    assert checkout.calls() == once * 2


def test_changed_requirements_are_installed_over_the_old(checkout: Checkout) -> None:
    checkout.make("environment")
    checkout.calls()
    with open(checkout.folder / "constraints.txt", "a") as file:
        file.write("# changed\n")
    checkout.make("environment")
    assert checkout.calls() == [f"{PIP} -e .[dev]"]
    checkout.make("environment")
    assert checkout.calls() == []


def test_a_refused_update_leaves_the_environment_to_be_updated_later(checkout: Checkout) -> None:
    checkout.make("environment")
    (checkout.folder / "pip-fails").touch()
    with open(checkout.folder / "pyproject.toml", "a") as file:
        file.write("# changed\n")
    done = checkout.make("environment")
    assert done.returncode == 2
    assert "pip could not install" in done.stderr
    assert checkout.stamp.exists()
    (checkout.folder / "pip-fails").unlink()
    checkout.calls()
    checkout.make("environment")
    assert checkout.calls() == [f"{PIP} -e .[dev]"]


def test_an_environment_that_was_never_finished_is_built_anew(checkout: Checkout) -> None:
    (checkout.folder / "pip-fails").touch()
    assert checkout.make("environment").returncode == 2
    (checkout.folder / ".venv" / "half").touch()
    (checkout.folder / "pip-fails").unlink()
    checkout.calls()
    assert checkout.make("environment").returncode == 0
    assert checkout.calls() == ["venv", f"{PIP} -e .[dev]"]
    assert not (checkout.folder / ".venv" / "half").exists()


@pytest.mark.parametrize("damage", ["gone", "broken", "moved"])
def test_a_broken_environment_is_built_anew(checkout: Checkout, damage: str) -> None:
    checkout.make("environment")
    checkout.calls()
    python = checkout.folder / ".venv" / "bin" / "python"
    if damage == "gone":
        python.unlink()
    elif damage == "broken":
        python.write_text("#!/no/such/python\n")
    else:
        checkout.stamp.write_text(checkout.stamp.read_text().replace("cutaway", "elsewhere", 1))
    assert checkout.make("environment").returncode == 0
    assert checkout.calls()[0] == "venv"


@pytest.mark.parametrize(
    ("lacks", "says"),
    [
        ("python3", "python3 is missing: install Python 3.11 or newer (Debian: apt-get install python3 python3-venv)"),
        ("old", "python3 is too old (Python 3.9.2): Python 3.11 or newer is needed, name one with PYTHON=..."),
        ("no-venv", "python3 cannot make virtual environments: install python3-venv"),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(checkout: Checkout, lacks: str, says: str) -> None:
    if lacks == "python3":
        (checkout.programs / "python3").unlink()
    else:
        (checkout.folder / lacks).touch()
    for target in ("demo", "test"):
        done = checkout.make(target)
        assert done.returncode == 2
        first, *rest = done.stderr.splitlines()
        assert first.startswith(says)
        assert all(line.startswith("make: ***") for line in rest)
    assert not (checkout.folder / ".venv").exists()


def test_another_python_can_be_named(checkout: Checkout) -> None:
    (checkout.programs / "python3").rename(checkout.programs / "python3.12")
    assert checkout.make("environment").returncode == 2
    assert checkout.make("environment", "PYTHON=python3.12").returncode == 0
    assert checkout.calls()[0] == "venv"


def test_plain_make_lists_its_targets(checkout: Checkout) -> None:
    done = checkout.make()
    assert done.returncode == 0
    for target in ("demo", "test", "test-slow", "lint", "parity", "bench", "docs", "clean", "help"):
        assert f"make {target} " in done.stdout
    assert checkout.calls() == []


class Landing:
    """A small project with the real `.ci/run`; types and floors are taken as checked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / ".ci").mkdir(parents=True)
        (folder / "tools").mkdir()
        shutil.copy(ROOT / ".ci" / "run", folder / ".ci" / "run")
        for name in ("skips.py", "surface.py"):
            shutil.copy(ROOT / "tools" / name, folder / "tools" / name)
        subprocess.run(["git", "init", "-q", str(folder)], check=True)
        self.write("Makefile", (ROOT / "Makefile").read_text().replace("sh tools/environment.sh", "true"))
        self.write(
            ".venv/bin/python", f'#!/bin/sh\n[ "$2" = pyright ] && exit 0\nexec "{sys.executable}" "$@"\n', mode=0o755
        )
        for name in ("lint-imports", "pre-commit"):
            self.write(f".venv/bin/{name}", "#!/bin/sh\n", mode=0o755)
        self.write("programs/chromium", "#!/bin/sh\n", mode=0o755)
        self.write("ruff.toml", "line-length = 120\n")
        self.write("pytest.ini", "[pytest]\naddopts = -q -p no:cacheprovider\nmarkers =\n  slow: s\n  parity: p\n")
        self.write("tests/test_it.py", "def test_it() -> None:\n    assert 1 + 1 == 2\n")
        self.announce("")

    def write(self, name: str, text: str, mode: int = 0o644) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        path.chmod(mode)

    def announce(self, line: str) -> None:
        tables = "".join(f"[{suite}.without-shared]\n{line}\n" for suite in ("test", "slow"))
        self.write(".ci/skips.toml", tables)

    def run(self, **environment: str) -> subprocess.CompletedProcess[str]:
        variables = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "MAKE"))},
            "PATH": f"{self.folder / 'programs'}:{os.environ['PATH']}",
            "CUTAWAY_SHARED": str(self.folder / "no-such-folder"),
            "CI": "true",
            **environment,
        }
        command = ["bash", ".ci/run"]
        return subprocess.run(
            command,
            cwd=self.folder,
            env=variables,
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
        )


@pytest.fixture
def landing(tmp_path: Path) -> Landing:
    return Landing(tmp_path / "a project")


SKIPPING = """\
import pytest


def test_it() -> None:
    pytest.skip("no peer")


def test_that() -> None:
    pytest.skip("no peer")
"""


def test_ci_passes_when_all_is_well_and_shows_the_closing_line(landing: Landing) -> None:
    done = landing.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pytest (test): 1 passed in" in done.stdout
    assert "test: 0 tests skipped" in done.stdout
    assert "there are no slow tests" in done.stdout


def test_ci_fails_when_a_test_fails_but_goes_on(landing: Landing) -> None:
    landing.write("tests/test_it.py", "def test_it() -> None:\n    assert 1 + 1 == 3\n")
    done = landing.run()
    assert done.returncode == 1
    assert "pytest (test): 1 failed in" in done.stdout
    assert "there are no slow tests" in done.stdout


@pytest.mark.slow
def test_ci_fails_when_no_test_was_found(landing: Landing) -> None:
    landing.write("tests/test_it.py", "")
    assert landing.run().returncode == 1


@pytest.mark.slow
def test_ci_fails_for_lint_alone(landing: Landing) -> None:
    landing.write("tests/test_it.py", "import os\n\n\ndef test_it() -> None:\n    assert 1 + 1 == 2\n")
    done = landing.run()
    assert done.returncode == 1
    assert "pytest (test): 1 passed" in done.stdout


def test_ci_fails_when_the_number_of_skips_grows_unannounced(landing: Landing) -> None:
    landing.write("tests/test_it.py", SKIPPING)
    landing.announce('"no peer" = 1')
    done = landing.run()
    assert done.returncode == 1
    assert "2 tests are skipped because of “no peer”, 1 are announced" in done.stdout
    assert "pytest (test): 2 skipped in" in done.stdout
    assert "skips        FAILED" in done.stdout


def test_a_skip_is_counted_by_the_reason_it_gives(landing: Landing) -> None:
    landing.write("tests/test_it.py", SKIPPING + "\n\n@pytest.mark.xfail\ndef test_x() -> None:\n    assert 0\n")
    report = landing.folder / "report.xml"
    subprocess.run([sys.executable, "-m", "pytest", f"--junitxml={report}"], cwd=landing.folder, capture_output=True)
    for line, code in [
        ("", 1),
        ('"no peer" = 1', 1),
        ('"no peer" = 2', 0),
        ('"no peer" = 9', 0),
        ('"no" = 2', 0),
        ('"other" = 2', 1),
    ]:
        landing.announce(line)
        done = subprocess.run(
            [sys.executable, "tools/skips.py", str(report), "test"],
            cwd=landing.folder,
            env={**os.environ, "CUTAWAY_SHARED": str(landing.folder)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, (line, done.stdout, done.stderr)
        assert "test: 2 tests skipped (without-shared" in done.stdout


@pytest.mark.slow
def test_ci_runs_the_slow_tests_and_fails_with_them(landing: Landing) -> None:
    slow = "import pytest\n\n\n@pytest.mark.slow\ndef test_slow() -> None:\n    assert {}\n"
    landing.write("tests/test_slow.py", slow.format("True"))
    done = landing.run()
    assert done.returncode == 0, done.stdout
    assert "pytest (slow): 1 passed, 1 deselected in" in done.stdout
    landing.write("tests/test_slow.py", slow.format("not True"))
    assert landing.run().returncode == 1


@pytest.mark.slow
def test_slow_tests_that_run_out_of_time_are_a_failure(landing: Landing) -> None:
    landing.write(
        "tests/test_slow.py",
        """\
        import time

        import pytest


        @pytest.mark.slow
        def test_first() -> None:
            pass


        @pytest.mark.slow
        def test_long() -> None:
            time.sleep(100)
        """,
    )
    done = landing.run(CUTAWAY_CI_SECONDS="25")
    # On a slow machine nothing is left for them: not run is no better than cut.
    assert re.search(r"slow         FAILED.*the 0 minutes are over", done.stdout), done.stdout
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"fine\n", ""),
        (b"", ""),
        (b"a \n", "trailing-whitespace"),
        (b"a\r\nb\n", "line-endings"),
        (b"a", "end-of-file"),
        (b"a\n\n", "end-of-file"),
        (b"a\n<<<<<<< ours\n", "merge-conflict"),
        (b"\0binary ", ""),
        (b"\0" * 1_000_001, "large-files"),
    ],
)
def test_what_no_file_may_have(tmp_path: Path, content: bytes, says: str) -> None:
    """The hooks of .pre-commit-config.yaml, each on the files that it asks for."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    file = tmp_path / "f"
    complains = []
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    for hook in repository["hooks"]:
        file.write_bytes(content)
        if "types_or" in hook or not set(hook.get("types", ())) <= tags_from_path(str(file)):
            continue
        command = [sys.executable, *hook["entry"].split()[1:], "f"]
        if subprocess.run(command, cwd=tmp_path, capture_output=True).returncode:
            complains.append(hook["id"])
    assert complains == [says] * bool(says)
