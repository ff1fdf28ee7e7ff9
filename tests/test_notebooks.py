"""The notebooks run from top to bottom, offline, and hold no outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SAYS = {
    "1_first_look": ["logit lens of atlas", "' TX'", "direct logit attribution", "without L7H3"],
    "2_patching_and_circuits": ["right on", "faithfulness", "latents of the circuit off"],
    "3_train_and_judge_a_dictionary": ["TopK", "penalty"],
    "4_five_steps": ["AUROC", "best of shuffled labels"],
    "5_steering": ["refus", "random"],
    "6_your_own_model": ["loss on the second eight", "without all heads of layer 1"],
}


def test_there_are_six_and_none_holds_outputs() -> None:
    assert [path.stem for path in NOTEBOOKS] == sorted(SAYS)
    for path in NOTEBOOKS:
        book = nbformat.read(path, as_version=4)
        assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in book.cells)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CUTAWAY_QUIET", "1")
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "\n".join(
        output.get("text") or output.get("data", {}).get("text/plain", "")
        for cell in book.cells
        for output in cell.get("outputs", [])
    )
    for words in SAYS[path.stem]:
        assert words in said, said[-2000:]
