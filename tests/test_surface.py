"""tools/surface.py counts what it says, on a small package whose faults are known."""

from pathlib import Path

import pytest
import reference
import surface

FILES = {
    "__init__.py": '"""Top."""\n',
    "__init__.pyi": 'from . import data as data\n__all__ = ["data"]\n',
    "data/__init__.py": '"""Face."""\n',
    "data/__init__.pyi": "from .read import Kept as Kept, read as read, size as size\n",
    "data/read.py": '''
"""Reading."""
from typing import Any, TYPE_CHECKING
from dataclasses import dataclass
if TYPE_CHECKING:
    from cutaway.data.write import write
from cutaway.data.more import size

@dataclass
class Kept:
    """Kept."""
    told: int
    """How many."""
    untold: int

    def load(self, path: str) -> None:
        """Load it."""

def read(source: Any, sites: str, *, command: str, a=1, b=1, c=1, d=1, e=1, f=1, g=1, h=1) -> None:
    """Read.

    Args:
        source: Where from,
            at length: a path.
        sites: What.
        command, a: Both.
    """

def _private(a: Any) -> None: ...
''',
    "data/write.py": '"""Writing."""\nfrom .read import Kept\ndef write(kept: Kept) -> None:\n    """Write."""\n',
    "data/more.py": '"""More."""\ndef size() -> None:\n    """Size."""\n    from cutaway.data.read import read\n',
}


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str] | int]:
    for name, text in FILES.items():
        path = tmp_path / "src" / "cutaway" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.lstrip())
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text(
        "from cutaway.data import read\n>>> from cutaway.data.read import read\n"
    )
    monkeypatch.setattr(surface, "ROOT", tmp_path)
    monkeypatch.setattr(surface, "SOURCE", tmp_path / "src" / "cutaway")
    modules = surface.read_modules()
    return surface.measure(modules, {package: surface.public_names(modules, package) for package in surface.FACES})


def test_each_measure_finds_its_faults_and_no_more(found: dict[str, list[str] | int]) -> None:
    assert found["packages without a face"] == []
    assert found["names that hide a module"] == ["cutaway.data.read"]
    assert found["functions with more than ten parameters"] == ["11 cutaway.data.read.read"]
    undocumented = [f"cutaway.data.read: read({name})" for name in "bcdefgh"]
    kept = ["cutaway.data.read: Kept.untold", "cutaway.data.read: Kept.load(path)"]
    assert found["undocumented parameters"] == [*kept, *undocumented]
    assert found["imports past a face"] == ["docs/page.md:2: cutaway.data.read"]
    assert found["files in the fullest folder"] == 4
    assert found["circles"] == ["cutaway.data.read ↔ cutaway.data.write"]
    assert found["circles through function-level imports"] == [
        "cutaway.data.more ↔ cutaway.data.read ↔ cutaway.data.write"
    ]
    assert found["command as a parameter"] == ["cutaway.data.read.read"]
    assert found["inputs typed Any"] == ["cutaway.data.read: read(source)"]


def test_check_fails_past_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    assert surface.main(["--check"]) == 0
    monkeypatch.setitem(surface.BOUNDS, "lines of the longest file", (10, 10))
    assert surface.main(["--check"]) == 1


def test_a_reference_page_says_what_the_docstring_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = '''
"""Reading."""
def read(path: "Path", *names: str, deep: bool = False, **options: int) -> dict[str, list[tuple[int, int]]]:
    """Read a file.

    Two words more.

    Args:
        path: Where from,
            at length.
        names: Which.
        deep, options: Both: how.

    Returns:
        What
        was read.

    Raises:
        BadFile: It is none.

    Example:
        >>> read("a")
        {}
    """
'''
    package = tmp_path / "src" / "cutaway" / "data"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('"""Data.\n\nAll of it.\n"""\n')
    (package / "__init__.pyi").write_text("from .files import read as read\n")
    (package / "files.py").write_text(read.lstrip())
    monkeypatch.setattr(surface, "SOURCE", tmp_path / "src" / "cutaway")
    made = reference.pages()
    assert "| [`cutaway.data`](data.md) | Data. |" in made["README.md"]
    page = made["data.md"]
    signature = "read(path: Path, *names: str, deep: bool = False, **options: int)"
    assert f"## `read`\n\n```pyi\n{signature}" not in page  # it is too long for a line
    assert "    path: Path,\n    *names: str,\n    deep: bool = False,\n    **options: int,\n) -> dict[str," in page
    assert "Read a file.\n\nTwo words more.\n\n**Args**\n\n- `path`: Where from, at length.\n- `names`: Which." in page
    assert (
        "- `deep, options`: Both: how.\n\n**Returns** What was read.\n\n**Raises**\n\n- `BadFile`: It is none." in page
    )
    assert '**Example**\n\n```python no-run\n>>> read("a")\n{}\n```' in page
