"""The standard library as text: what is in, what is out, and the hash that names it."""

import hashlib
import platform
import sysconfig
from pathlib import Path

import pytest

from cutaway.data.corpus import python_library
from cutaway.data.corpus.python_library import (
    Document,
    docstrings,
    standard_library,
    standard_library_manifest,
)
from cutaway.subjects.world.held_out import held_out_document


def test_docstrings_of_a_module():
    source = (
        '"""Module."""\nclass A:\n    """Class."""\n    def f(self):\n        """Method\n        two."""\nx = "no"\n'
    )
    assert docstrings(source) == "Module.\n\nClass.\n\nMethod\ntwo."
    assert docstrings("x = 1") == ""
    assert docstrings("def broken(:") == ""


def test_the_library_has_its_modules_and_not_its_tests():
    found = {document.name: document.text for document in standard_library()}
    assert found["json/decoder.py"] == (Path(sysconfig.get_paths()["stdlib"]) / "json" / "decoder.py").read_text(
        "utf-8"
    )
    assert "docstrings:json/decoder.py" in found
    assert "topic:if" in found
    assert len(found) > 500
    folders = {part for name in found for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "pydoc_data"}
    assert all(len(text) > 200 for name, text in found.items() if not name.startswith("topic:"))


def test_held_out_files_take_their_docstrings_along():
    names = [document.name for document in standard_library()]
    apart = [name for name in names if held_out_document(name)]
    assert 0.01 < len(apart) / len(names) < 0.06
    for name in names:
        if name.startswith("docstrings:"):
            assert held_out_document(name) == held_out_document(name.removeprefix("docstrings:"))


def test_the_manifest_names_version_and_text(monkeypatch):
    manifest = standard_library_manifest()
    assert manifest["python"] == platform.python_version()
    assert manifest["documents"] == len(standard_library())
    digest = hashlib.sha256()
    for document in standard_library():
        for part in document:
            data = part.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
    assert manifest["sha256"] == digest.hexdigest()
    monkeypatch.setattr(python_library, "standard_library", lambda: (Document("a.py", "bc"),))
    standard_library_manifest.cache_clear()
    one = standard_library_manifest()["sha256"]
    monkeypatch.setattr(python_library, "standard_library", lambda: (Document("a.pyb", "c"),))
    standard_library_manifest.cache_clear()
    assert standard_library_manifest()["sha256"] != one
    standard_library_manifest.cache_clear()


def test_the_study_held_out_the_same_files(shared):
    """The study kept 3 % of files by this hash; its order and choice of files were the same."""
    import zlib

    names = [document.name for document in standard_library() if not document.name.startswith("docstrings:")]
    expected = [name for name in names if zlib.crc32(f"sd{name}".encode()) % 10007 < 0.03 * 10007]
    assert [name for name in names if held_out_document(name)] == expected


@pytest.mark.parametrize("name", ["json/decoder.py", "topic:if"])
def test_a_name_always_falls_on_the_same_side(name):
    assert held_out_document(name) is held_out_document(name)
