"""`cutaway subjects superposition`: figures as text and JSON, and the page."""

import json
from functools import cache
from pathlib import Path

import pytest

from cutaway.cli.main import main
from cutaway.dictionaries.evaluation import recovery
from cutaway.subjects.superposition import study


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The studies with few steps and small diagrams, made once: what is shown is not what is found."""
    monkeypatch.setattr(study, "toy_study", _toys)
    monkeypatch.setattr(recovery, "recovery_study", _recovery)


@cache
def _toys(*, seed: int) -> study.ToyStudy:
    return _toy_study(seed=seed % 3, effort=0.02, cells=3)


@cache
def _recovery(*, seed: int) -> recovery.RecoveryStudy:
    little = {"seeds": 2, "tokens": 2560, "cell_tokens": 512, "scored": 1024}
    return _recovery_study(seed=seed, **little, dimensions=(6, 20), active=(1, 2, 4))


_toy_study, _recovery_study = study.toy_study, recovery.recovery_study


@pytest.mark.usefixtures("quick")
def test_it_prints_and_leaves_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert main(["subjects", "superposition", "--html", str(page)]) == 0
    said = capsys.readouterr().out
    assert "trained and optimal agree in" in said
    assert "linear, control" in said
    text = page.read_text(encoding="utf-8")
    for heading in ("Five features in two dimensions", "Phase diagram", "Polytopes", "The optimum, by brute force"):
        assert f">{heading}</h2>" in text
    assert "control: linear" in text
    assert "Two toys side by side" not in text
    assert "http" not in text.split("</style>")[1], "nothing is fetched"


@pytest.mark.usefixtures("quick")
def test_json_has_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["subjects", "superposition", "--json", "--seed", "3"]) == 0
    printed = json.loads(capsys.readouterr().out)
    data = printed["figures"]
    assert printed["command"] == "cutaway subjects superposition --seed 3"
    assert len(data["phases"]["trained"]) == 3
    assert 0 <= data["phases"]["agreement"] <= 1
    assert [len(row["dimensionality"]) for row in data["sweep_120_in_20"]] == [120] * len(study.SWEEP)
    assert all(sum(counts.values()) == 120 for counts in data["polytopes"])


@pytest.mark.usefixtures("quick")
def test_dictionaries_are_trained_when_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert main(["subjects", "superposition", "--recovery", "--html", str(page)]) == 0
    said = capsys.readouterr().out
    assert "Recovered of 32 signed features by dimensions" in said
    assert said.count("random directions") >= 6
    text = page.read_text(encoding="utf-8")
    for heading in ("Two toys side by side", "Where recovery breaks down", "The control: random directions"):
        assert f">{heading}</h2>" in text
    assert "subjects superposition --recovery" in text


def test_a_folder_is_not_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["subjects", "superposition", "--html", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
