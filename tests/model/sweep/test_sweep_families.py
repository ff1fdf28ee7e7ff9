"""A sweep over every family of the test bed: every shortcut holds, and the numbers are those of one run a cell."""

import random

import pytest
import torch
from bed import BED, LAYERS, bed_model

import cutaway
from cutaway.model.language_model import attach

ROWS = ([5, 9, 17, 33, 4, 60, 71, 12, 8], [90, 3, 44, 21, 7])


@pytest.mark.parametrize("family", list(BED))
def test_a_sweep_equals_one_run_a_cell(family: str) -> None:
    lm = attach(bed_model(family), name=family)
    rng = random.Random(0)
    parts = ("resid_pre", "attn.z", "attn.out", "mlp.in", "mlp.out", "resid_post")
    cells = [
        cutaway.scale(f"blocks.{layer}.{part}", 0.5, positions=rng.choice([None, 2, 4]))
        for layer in range(LAYERS)
        for part in parts
    ]
    tokens = lm.tokens(ROWS)
    found = lm.sweep(tokens, cells, lambda logits, _: logits)
    wanted = []
    for cell in cells:
        logits = lm.run(tokens, edits=cell, logits="last").logits
        assert logits is not None
        wanted.append(logits[:, 0])
    expected = torch.stack(wanted)
    scale = float(expected.abs().max())
    assert float((found.values - expected).abs().max()) <= 2e-5 * scale, found.notes
    assert found.notes == ()
    assert found.prefix_reused
