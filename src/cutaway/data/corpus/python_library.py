"""Real text that every user has: the running interpreter's standard library, its docstrings and its language reference.

Nothing is shipped or downloaded, so another version of Python gives another text: the manifest names version and hash.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import sysconfig
from functools import cache
from pathlib import Path
from typing import NamedTuple

_SKIPPED_FOLDERS = frozenset(
    [
        "test",
        "tests",
        "idle_test",
        "idlelib",
        "lib2to3",
        "encodings",
        "site-packages",
        "dist-packages",
        "turtledemo",
        "__pycache__",
        "pydoc_data",
    ]
)
_SHORTEST = 200  # characters; shorter files are little but a licence line


class Document(NamedTuple):
    name: str  # relative path, "topic:..." or "docstrings:..."
    text: str


def _source_files(root: Path) -> list[Path]:
    """Python files of the library in a fixed order."""
    out = []
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        folders = path.relative_to(root).parts[:-1]
        if not any(folder in _SKIPPED_FOLDERS or folder.startswith("config-") for folder in folders):
            out.append(path)
    return out


def docstrings(source: str) -> str:
    """The docstrings of a module, its classes and functions, a blank line between; "" when it does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for text in found if text)


@cache
def standard_library() -> tuple[Document, ...]:
    """Source files of the standard library, the docstrings of each, and the topics of the language reference.

    Tests, the IDLE editor, codecs and installed packages are left out, as are files that are not UTF-8. The docstrings
    stand in the sources too; as documents of their own they are prose without code around it.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    sources: list[Document] = []
    prose: list[Document] = []
    for path in _source_files(root):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        name = path.relative_to(root).as_posix()
        if len(text) > _SHORTEST:
            sources.append(Document(name, text))
            words = docstrings(text)
            if len(words) > _SHORTEST:
                prose.append(Document(f"docstrings:{name}", words))
    return (*sources, *prose, *_topics())


def _topics() -> list[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave the reference out
        return []
    return [Document(f"topic:{name}", text) for name, text in sorted(topics.items())]


@cache
def standard_library_manifest() -> dict[str, str | int]:
    """Which real text this is: Python version, number of documents and characters, SHA-256 of names and texts."""
    digest = hashlib.sha256()
    found = standard_library()
    for document in found:
        for part in document:
            encoded = part.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "documents": len(found),
        "characters": sum(len(document.text) for document in found),
        "sha256": digest.hexdigest(),
    }
