"""Heads ablated many at once against one at a time."""

import pytest
import torch

from cutaway.artifacts.errors import CutawayError
from cutaway.model.forward.run import Run
from cutaway.model.language_model import LanguageModel
from cutaway.observe.heads.ablation import ablate_each_head, text_loss
from cutaway.observe.heads.report import ablation_edits, head_means, repeated_tokens, second_half_loss


@pytest.mark.parametrize("batch_bytes", [2**28, 1])
def test_many_at_once_equals_one_at_a_time(tiny: LanguageModel, batch_bytes: int) -> None:
    tokens = repeated_tokens(tiny, 3, 6)
    found = ablate_each_head(tiny, tokens, batch_bytes=batch_bytes)
    before = second_half_loss(tiny.run(tokens))
    means = head_means(tiny, tokens)
    for ablation, at in (("zero", None), ("mean", means)):
        for layer in range(tiny.n_layers):
            for head in range(tiny.n_heads):
                alone = tiny.run(tokens, edits=ablation_edits(tiny, [(layer, head)], at))
                expected = (second_half_loss(alone) - before).double()
                torch.testing.assert_close(found[ablation].change[layer, head], expected, atol=2e-5, rtol=1e-4)
    assert found["zero"].base.tolist() == pytest.approx(before.tolist())


def test_prompts_of_different_lengths_and_a_metric_of_ones_own(llama: LanguageModel) -> None:
    """The metric sees the prompts as they were given, row by row, whatever the batch."""
    rows, answers = [[5, 6, 7, 8, 9], [10, 11, 12]], torch.tensor([20, 30])

    def metric(run: Run) -> torch.Tensor:
        assert run.tokens.ids.shape == (2, 5)
        assert run.logits is not None
        return run.logits[torch.arange(2), run.tokens.last, answers]

    heads = [(2, 1), (0, 3)]
    found = ablate_each_head(llama, rows, metric, heads=heads, ablations=["zero"], units="logit")["zero"]
    before = metric(llama.run(rows))
    for head in heads:
        expected = metric(llama.run(rows, edits=ablation_edits(llama, [head]))) - before
        torch.testing.assert_close(found.change[head], expected.double(), atol=2e-5, rtol=1e-4)
    assert int(found.change.isnan().sum()) == 2 * (12 - 2)
    assert found.others([(2, 1), (1, 1)], "others").n == 1  # pyright: ignore[reportOptionalMemberAccess]
    effect = found.effect((2, 1), found.others([(0, 3)], "others"))
    assert effect.require_controls().units == "logit"
    assert effect.value == pytest.approx(found.change[2, 1].mean().item())
    assert found.others([(1, 1)], "nothing measured") is None


def test_text_loss_is_over_real_tokens(llama: LanguageModel) -> None:
    rows = [[5, 6, 7, 8, 9], [10, 11, 12]]
    run = llama.run(rows)
    for row, ids in enumerate(rows):
        logits = llama.run([ids]).logits
        assert logits is not None
        log_p = logits[0].double().log_softmax(-1)
        expected = -sum(log_p[i, ids[i + 1]].item() for i in range(len(ids) - 1)) / (len(ids) - 1)
        assert text_loss(run)[row].item() == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_ablated(llama: LanguageModel) -> None:
    with pytest.raises(CutawayError, match="no head L7H0"):
        ablate_each_head(llama, [[5, 6, 7]], text_loss, heads=[(7, 0)])
    with pytest.raises(CutawayError, match="one number for each row"):
        ablate_each_head(llama, [[5, 6, 7]], lambda run: run.logits)  # type: ignore[arg-type, return-value]
    with pytest.raises(CutawayError, match="'mean' or 'zero'"):
        ablate_each_head(llama, [[5, 6, 7]], text_loss, ablations=["half"])  # type: ignore[list-item]
