"""The scripts in examples/ run as they stand, offline, and print what they promise."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PROMISED = {
    "look_inside.py": ["blocks.*.resid_post (8 layers)", "' Austin'"],
    "patch_a_fact.py": [" Sacramento", "mean |Δ|", "random position"],
    "steer_generation.py": ["warm - cold × +1", "random, same length × +1", "unsteered"],
    "harvest_and_probe.py": ["blocks.3.resid_post", "length of its vector", "shuffled labels", "bag of tokens"],
    "superposition_numpy.py": ["2 of 5 features in 2 dimensions", "5 of 5 features", "[0.4 0.4 0.4 0.4 0.4]"],
    "attention.py": ["induction", "2 random heads", "comes after the same token earlier"],
}


def test_every_script_has_a_test():
    own = {path.name[len("test_") :] for path in Path(__file__).parent.glob("test_*.py")}
    assert {path.name for path in EXAMPLES.glob("*.py")} <= set(PROMISED) | own


@pytest.mark.parametrize("name", sorted(PROMISED))
def test_an_example_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    said = capsys.readouterr().out
    for text in PROMISED[name]:
        assert text in said
    assert len((EXAMPLES / name).read_text().splitlines()) < 60
