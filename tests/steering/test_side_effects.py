"""Side effects of an edit against a loop in float64."""

import pytest
import torch

from cutaway.model.edits.edits import add
from cutaway.model.language_model import LanguageModel
from cutaway.steering.side_effects import side_effects_of

TEXT = [[0, 5, 9, 11, 40, 22], [0, 7, 33], [0, 50, 51, 52]]


def test_no_edit_costs_nothing(tiny: LanguageModel) -> None:
    free = side_effects_of(tiny, TEXT, ())
    assert free.kl == pytest.approx(0, abs=1e-6)
    assert free.loss == pytest.approx(free.loss_edited)


def test_side_effects_are_their_definition(tiny: LanguageModel) -> None:
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    edit = add("blocks.1.resid_post", direction, scale=2.0)
    found = side_effects_of(tiny, TEXT, edit, batch_rows=2)
    kls, losses, edited = [], [], []
    for ids in TEXT:
        p, q = (tiny.run([ids], edits=e).logits[0].double().log_softmax(-1) for e in ((), edit))  # type: ignore[index]
        kls.append((p.exp() * (p - q)).sum(-1).mean().item())
        losses += [-p[i, ids[i + 1]].item() for i in range(len(ids) - 1)]
        edited += [-q[i, ids[i + 1]].item() for i in range(len(ids) - 1)]
    assert found.kl == pytest.approx(sum(kls) / 3, rel=1e-3)
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert found.loss_edited == pytest.approx(sum(edited) / len(edited), rel=1e-4)
    assert (found.n_tokens, found.n_rows) == (10, 3)
    assert found.interval[0] <= found.kl <= found.interval[1]
