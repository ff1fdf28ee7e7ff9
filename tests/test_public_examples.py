"""The examples in the docstrings of what packages hand on run, and show what they say; faces are light to import."""

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import cutaway

SOURCE = Path(cutaway.__file__).parent
FACES = sorted(path.parent.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("__init__.pyi"))


def face(name: str) -> str:
    return "cutaway" if name == "." else f"cutaway.{name.replace('/', '.')}"


def handed_on(name: str) -> list[str]:
    tree = ast.parse((SOURCE / name / "__init__.pyi").read_text(encoding="utf-8"))
    return [alias.asname or alias.name for n in tree.body if isinstance(n, ast.ImportFrom) for alias in n.names]


@pytest.mark.parametrize("name", FACES)
def test_the_names_of_a_face_are_there_and_its_examples_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # some examples save a file
    package = importlib.import_module(face(name))
    names = handed_on(name)
    assert sorted(package.__all__) == sorted(names)
    values = {one: getattr(package, one) for one in names}
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for one, value in values.items():
        if getattr(value, "__module__", "").startswith("cutaway") and hasattr(value, "__doc__"):
            for test in finder.find(value, one, globs={"cutaway": cutaway, **values}):
                runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


def test_importing_every_face_loads_no_torch() -> None:
    imports = "; ".join(f"import {face(name)}" for name in FACES)
    code = f"import sys; {imports}; print(sorted({{'torch', 'transformers', 'numpy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
