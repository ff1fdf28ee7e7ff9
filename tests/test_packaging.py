"""The package as users get it: light to import, whole when installed, its floors in order."""

import ast
import inspect
import shutil
import subprocess
import sys
import textwrap
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

import cutaway

ROOT = Path(__file__).resolve().parent.parent


FACES = sorted(path.parent for path in (ROOT / "src" / "cutaway").rglob("__init__.pyi"))
"""Packages that hand on names from the modules below them."""


def package_of(folder: Path) -> str:
    return ".".join(folder.relative_to(ROOT / "src").parts)


def handed_on(folder: Path) -> dict[str, str]:
    """Each name that a package's stub hands on, and the module that it comes from."""
    found = {}
    for node in ast.parse((folder / "__init__.pyi").read_text()).body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                assert alias.asname == alias.name, f"{alias.name} is private to a stub that does not say it twice"
                found[alias.name] = ".".join(filter(None, (package_of(folder), node.module)))
    return found


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = """
        import sys
        import cutaway
        cutaway.CutawayError, cutaway.__version__, dir(cutaway)
        from cutaway import causal, data, dictionaries, features, model, observe, steering, subjects, tour
        for package in (causal, data, dictionaries, features, model, observe, steering, subjects, tour):
            dir(package)
        from cutaway.artifacts import errors, files, manifest, progress, results, run_folder, statistics
        print(*sorted({"torch", "transformers", "numpy", "scipy", "sklearn", "pyarrow", "rich"} & sys.modules.keys()))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_bare_import_offers_the_packages() -> None:
    code = """
        import cutaway
        print(cutaway.dictionaries.load.__name__, cutaway.observe.__name__, cutaway.causal.__name__)
        print(cutaway.model.load is cutaway.load)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout == "load cutaway.observe cutaway.causal\nTrue\n"
    with pytest.raises(AttributeError, match="lode"):
        cutaway.lode  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("folder", FACES, ids=package_of)
def test_a_package_hands_on_what_its_modules_define(folder: Path) -> None:
    package, typed = import_module(package_of(folder)), handed_on(folder)
    assert sorted(typed) == sorted(package.__all__)
    assert set(typed) <= set(dir(package))
    below = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
    for name, home in typed.items():
        value = getattr(package, name)
        if home == package_of(folder):  # a package below this one
            assert value is import_module(f"{home}.{name}")
        else:
            assert value is getattr(import_module(home), name)
            assert name not in below, f"{name} is a module of {home} too"
        assert value.__doc__ or not (inspect.isclass(value) or inspect.isfunction(value)), name


@pytest.fixture
def lint_imports(tmp_path: Path):
    """Run import-linter on a copy of the sources, with a file added: its exit code and what it says."""

    def run(file: str | None = None, text: str = "") -> tuple[int, str]:
        shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("weights", "__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", tmp_path)
        if file is not None:
            path = tmp_path / "src" / "cutaway" / file
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            (path.parent / "__init__.py").touch()
        code = "from importlinter.cli import lint_imports_command as run; run()"
        done = subprocess.run(
            [sys.executable, "-c", code, "--no-cache", "--no-logo"],
            cwd=tmp_path,
            env={"PYTHONPATH": str(tmp_path / "src"), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    return run


def test_the_floors_are_in_order(lint_imports) -> None:
    code, says = lint_imports()
    assert code == 0, says
    assert "1 kept, 0 broken" in says


@pytest.mark.parametrize(
    ("file", "text", "culprit"),
    [
        (
            "model/up.py",
            "from cutaway.causal import patching\n",
            "cutaway.model is not allowed to import cutaway.causal",
        ),
        (
            "draw/up.py",
            "def f():\n    import cutaway.model.sites\n",
            "cutaway.draw is not allowed to import cutaway.model",
        ),
        ("attic/new.py", "", "attic"),  # a folder that no floor was given to
    ],
)
def test_a_floor_that_reaches_up_breaks_the_contract(lint_imports, file: str, text: str, culprit: str) -> None:
    code, says = lint_imports(file, text)
    assert code == 1, says
    assert culprit in says


def test_the_wheel_holds_the_weights_the_page_and_the_type_marker(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "src"], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    missing = {name.removeprefix("src/") for name in tracked if (ROOT / name).exists()} - inside
    assert not missing
    for needed in ("py.typed", "subjects/atlas/weights/model.safetensors", "draw/cutaway.css"):
        assert f"cutaway/{needed}" in inside
    assert wheel.stat().st_size < 40e6
    assert not [name for name in inside if name.endswith((".pyc", ".pkl", ".bin"))]


def test_the_licence_travels_with_the_package() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_generated_pages_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, "tools/docs.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
