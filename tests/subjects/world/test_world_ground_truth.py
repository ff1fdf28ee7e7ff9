"""Each behaviour has its rule, and the page of the world says what the code says."""

from pathlib import Path

import pytest

from cutaway.subjects.world import ground_truth, variety
from cutaway.subjects.world.corpus import PARTS, WORLD_VERSION
from cutaway.subjects.world.ground_truth import GROUND_TRUTH
from cutaway.subjects.world.items.sets import item_sets

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "world.md").read_text(encoding="utf-8")


def test_every_set_of_items_has_one_rule():
    names = list(item_sets(n=1))
    for name in names:
        assert sum(name.startswith(row.sets) for row in GROUND_TRUTH) == 1, name
    for row in GROUND_TRUTH:
        assert all(any(name.startswith(prefix) for name in names) for prefix in row.sets), row.behaviour
    assert ground_truth.ground_truth("ioi/held_out").behaviour == "Indirect object"
    with pytest.raises(KeyError):
        ground_truth.ground_truth("poems")


def test_the_page_has_the_tables_of_the_code():
    assert ground_truth.markdown() in PAGE
    assert variety.markdown() in PAGE
    assert f"version {WORLD_VERSION}" in PAGE
    for part in PARTS.values():
        assert f"| `{part.name}` | {part.share:.0%} |" in PAGE, part.name
