"""What patching finds in trained models: the heads that carry an answer, and how."""

from pathlib import Path

import pytest

import cutaway
from cutaway.artifacts.statistics import sign_flip_p
from cutaway.causal.patching.patch import Parts, patch_grid
from cutaway.causal.patching.self_repair import self_repair
from cutaway.data.tasks.tasks import find_task, readable_pairs
from cutaway.model.language_model import LanguageModel


def test_one_head_of_atlas_carries_the_year(atlas: LanguageModel) -> None:
    """Study: greater-than, 16 pairs: L1H4 suffices for 0.38 of the logit difference, the next head for under 0.1; what
    it loses is read on by the MLPs above, so that the total effect is many times the direct one.
    """
    pairs = readable_pairs(atlas, find_task("greater than"), 16)
    grid = patch_grid(atlas, pairs, over="heads")
    first, second = grid.top(2)
    assert first.cell.part == "blocks.1.attn.z head 4"
    assert first.effect.interval is not None
    assert first.effect.controls[0].interval is not None
    assert first.effect.interval[0] > 0.2 > first.effect.controls[0].interval[1]
    assert abs(second.effect.value) < 0.2
    assert first.p_of_all < 0.01
    difference = (grid.values - grid.random_values)[1, 4].double()
    assert first.p == sign_flip_p(difference[~difference.isnan()].numpy())
    p = grid.p.flatten().numpy()
    assert first.q == pytest.approx(min(len(p) * t / (p <= t).sum() for t in p if t >= first.p))
    assert first.q >= first.p
    found = self_repair(atlas, pairs, heads=[(1, 4)], draws=2)
    direct, total, repair = found.effects()
    assert total.value > 3 * direct.value > 0
    assert repair.value < 0
    assert "MLP" in found.made_up(1)[0].name


def test_one_head_of_a_web_text_model_carries_number_to_the_verb(shared: Path) -> None:
    """Study: agreement: noising L3H0 at the last token costs 0.32; its values carry it, its pattern nothing (0.01)."""
    lm = cutaway.load(shared / "models" / "webtext-gpt2")
    pairs = readable_pairs(lm, find_task("agreement"), 24)
    at_last = patch_grid(lm, pairs, over="heads", roles="last", direction="noise")
    first = at_last.top(1)[0]
    assert first.cell.part == "blocks.3.attn.z head 0"
    assert first.effect.interval is not None
    assert first.effect.interval[0] > 0.2
    values, pattern = (
        patch_grid(
            lm, pairs, over="heads", site=f"blocks.{{l}}.attn.{part}", direction="noise", parts=Parts(layers=[3])
        )
        for part in ("v", "pattern")
    )
    assert values.mean[0, 0] > 0.2
    assert abs(pattern.mean[0, 0]) < 0.1
