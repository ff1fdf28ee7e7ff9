"""docs/parity.md says what is so: every family it lists is measured again and held to the tolerances."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

import families_page as families  # noqa: E402

PAGE = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
ROWS = {cells[0]: cells for line in PAGE.splitlines() if len(cells := line.strip("| ").split(" | ")) == 8}


def test_the_page_lists_the_test_bed() -> None:
    assert [name for name in ROWS if name != "family"] == families.families()
    assert "All within tolerance." in PAGE


@pytest.mark.parametrize("family", families.families())
def test_a_familys_numbers_hold(family: str) -> None:
    found = families.measure(family)
    assert found.passed, found
    printed = ROWS[family]
    assert printed[:3] == list(found.row[:3])
    assert printed[6] == found.row[6]
    for text, now in zip((*printed[3:6], printed[7]), (*found.residuals.values(), found.dla), strict=True):
        assert now <= 20 * float(text), f"{family}: {now:.1e} where the page says {text}"
