"""The first session of the docs is what a person gets who finds everything by completion."""

from pathlib import Path

import first_session
import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_the_page_is_the_session(tmp_path: Path) -> None:
    made = first_session.page(tmp_path)
    assert (tmp_path / "grid.svg").read_text().startswith("<svg ")
    page = (DOCS / first_session.PAGE).read_text(encoding="utf-8")
    assert first_session.without_numbers(page) == first_session.without_numbers(made)


def test_what_completion_does_not_offer_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [("", "import cutaway"), ("cutaway.", "cutaway.load_everything")]
    monkeypatch.setattr(first_session, "STEPS", steps)
    with pytest.raises(LookupError, match="does not offer load_everything"):
        first_session.session(tmp_path)
