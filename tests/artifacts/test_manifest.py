"""A manifest's id is a hash of what determines the result, and of nothing else."""

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from cutaway import __version__
from cutaway.artifacts import manifest as module
from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.manifest import Manifest, ModelIdentity, code_version, json_hash, weight_hash

MODEL = ModelIdentity("atlas", None, "ab" * 32)
EVERYTHING: dict[str, Any] = {
    "kind": "dictionary",
    "model": MODEL,
    "corpus_hash": "cd" * 32,
    "configuration": {"k": 32, "layer": 4, "rate": 1e-3},
    "seed": 1,
    "parents": ("ef" * 32,),
}


def test_the_same_making_has_the_same_id_whenever_and_by_whatever_command() -> None:
    first = Manifest.create(**EVERYTHING, command="cutaway tour")
    second = Manifest.create(**{**EVERYTHING, "configuration": {"rate": 1e-3, "layer": 4, "k": 32}}, command="other")
    assert first.id == second.id
    assert replace(first, created="2001-01-01T00:00:00+00:00").recomputed_id() == first.id
    assert len(first.id) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "probe"},
        {"model": None},
        {"model": replace(MODEL, weight_hash="00" * 32)},
        {"corpus_hash": None},
        {"configuration": {"k": 32, "layer": 4, "rate": 2e-3}},
        {"seed": 2},
        {"parents": ()},
    ],
)
def test_anything_that_determines_the_result_changes_the_id(change: dict[str, Any]) -> None:
    assert Manifest.create(**EVERYTHING).id != Manifest.create(**{**EVERYTHING, **change}).id


def test_the_version_of_the_code_is_part_of_the_id() -> None:
    manifest = Manifest.create(**EVERYTHING)
    assert replace(manifest, version="9.9.9").recomputed_id() != manifest.id


def test_a_manifest_survives_json_and_notices_tampering() -> None:
    manifest = Manifest.create(**EVERYTHING, command="cutaway tour")
    data = manifest.to_json()
    assert Manifest.from_json(data) == manifest
    assert Manifest.from_json(Manifest.create("corpus").to_json()).model is None
    with pytest.raises(CutawayError, match="changed after it was written"):
        Manifest.from_json({**data, "seed": 7})
    for broken in ({}, {**data, "model": 3}, {**data, "parents": None}, {**data, "more": 1}, {**data, "id": 5}, []):
        with pytest.raises(CutawayError, match="manifest is damaged"):
            Manifest.from_json(broken)  # type: ignore[arg-type]


def test_the_weight_hash_follows_every_byte_and_not_the_order(tmp_path: Path) -> None:
    a, b = np.zeros(10, np.float32), np.ones(3, np.float32)
    pairs = [("a", a.tobytes()), ("b", b.tobytes())]
    assert weight_hash(pairs) == weight_hash(reversed(pairs))
    assert weight_hash(pairs) != weight_hash([("a", b.tobytes()), ("b", a.tobytes())])
    assert weight_hash(pairs) != weight_hash([("c", a.tobytes()), ("b", b.tobytes())])

    for name, array in [("model-1.safetensors", a), ("model-2.safetensors", b)]:
        save_file({"x": array}, tmp_path / name)
    whole = weight_hash(tmp_path)
    assert weight_hash(tmp_path / "model-1.safetensors") != weight_hash(tmp_path / "model-2.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert weight_hash(tmp_path) == whole
    a[3] = 1e-30
    save_file({"x": a}, tmp_path / "model-1.safetensors")
    assert weight_hash(tmp_path) != whole


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CutawayError, match="no safetensors"):
        weight_hash(tmp_path)


def test_json_hash_is_of_the_canonical_form() -> None:
    # sha256 of {"a":1,"b":["ü",null]} in UTF-8, by sha256sum
    expected = subprocess.run(
        ["sha256sum"], input='{"a":1,"b":["ü",null]}'.encode(), capture_output=True, check=True
    ).stdout.split()[0]
    assert json_hash({"b": ("ü", float("nan")), "a": 1}) == expected.decode()


def test_the_version_names_the_commit_only_in_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version_from(root: Path) -> str:
        monkeypatch.setattr(module, "__file__", str(root / "src" / "cutaway" / "artifacts" / "manifest.py"))
        code_version.cache_clear()
        try:
            return code_version()
        finally:
            monkeypatch.undo()
            code_version.cache_clear()

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    assert version_from(tmp_path) == __version__
    git("init", "-q")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text("1")
    git("add", ".")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "--short=8", "HEAD")
    assert version_from(tmp_path) == f"{__version__}+g{commit}"
    (tmp_path / "src" / "a.py").write_text("2")
    assert version_from(tmp_path) == f"{__version__}+g{commit}.dirty"
