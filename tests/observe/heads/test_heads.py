"""Head scores against a loop over their definition; ablation against hand-written hooks; known heads of real models."""

import numpy as np
import pytest
import torch

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.model.language_model import LanguageModel
from cutaway.observe.heads.report import (
    ablate_heads,
    ablation_edits,
    head_means,
    head_report,
    head_scores,
    random_heads,
    repeated_tokens,
    second_half_loss,
)


def test_scores_are_their_definition(tiny: LanguageModel) -> None:
    t, n = 7, 6
    scores = head_scores(tiny, n=n, length=t, seed=3)
    tokens = repeated_tokens(tiny, n, t, seed=3)
    run = tiny.run(tokens, capture="blocks.*.attn.pattern", logits="all")
    for layer in range(tiny.n_layers):
        pattern = run[f"blocks.{layer}.attn.pattern"]
        for head in range(tiny.n_heads):
            sums = {"previous": [], "duplicate": [], "induction": []}
            for row in range(n):
                ids = tokens.ids[row].tolist()
                for i in range(1, len(ids)):
                    sums["previous"].append(pattern[row, head, i, i - 1].item())
                    if i > t:
                        (same,) = [j for j in range(1, i) if ids[j] == ids[i]]
                        sums["duplicate"].append(pattern[row, head, i, same].item())
                        sums["induction"].append(pattern[row, head, i, same + 1].item())
            for kind, values in sums.items():
                assert getattr(scores, kind)[layer, head].item() == pytest.approx(np.mean(values), abs=1e-6)


def test_losses_are_of_the_two_copies(llama: LanguageModel) -> None:
    t = 6
    tokens = repeated_tokens(llama, 5, t, seed=1)
    logits = llama.run(tokens).logits
    assert logits is not None
    log_p = logits.double().log_softmax(-1)
    first = [-log_p[r, i - 1, tokens.ids[r, i]].item() for r in range(5) for i in range(1, t + 1)]
    second = [-log_p[r, i - 1, tokens.ids[r, i]].item() for r in range(5) for i in range(t + 2, 2 * t + 1)]
    scores = head_scores(llama, 5, t, seed=1)
    assert scores.first_loss == pytest.approx(np.mean(first), rel=1e-5)
    assert scores.second_loss == pytest.approx(np.mean(second), rel=1e-5)


def test_repeated_tokens_repeat_and_fit(tiny: LanguageModel) -> None:
    tokens = repeated_tokens(tiny, 3, seed=2)
    t = (tokens.ids.shape[1] - 1) // 2
    assert tokens.ids.shape[1] <= tiny.context_length
    assert torch.equal(tokens.ids[:, 1 : t + 1], tokens.ids[:, t + 1 :])
    for row in tokens.ids[:, 1 : t + 1].tolist():
        assert len(set(row)) == t
        assert not {tiny.bos_id, tiny.pad_id} & set(row)
    with pytest.raises(CutawayError, match="does not fit"):
        repeated_tokens(tiny, 3, length=500)


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_ablation_equals_a_hand_written_hook(llama: LanguageModel, ablation: str) -> None:
    """Llama's o_proj reads the heads side by side: overwrite two of them there."""
    tokens = repeated_tokens(llama, 4, 8)
    heads = [(0, 3), (2, 0), (2, 1)]
    means = head_means(llama, tokens)
    h = llama.d_head

    def overwrite(layer: int):
        def hook(_, args):
            z = args[0].clone()
            for at, head in heads:
                if at == layer:
                    z[..., head * h : (head + 1) * h] = 0 if ablation == "zero" else means[layer][head]
            return (z,)

        return hook

    layers = llama.hf.model.layers
    handles = [layers[i].self_attn.o_proj.register_forward_pre_hook(overwrite(i)) for i in (0, 2)]
    try:
        expected = second_half_loss(llama.run(tokens))
    finally:
        for handle in handles:
            handle.remove()
    before = second_half_loss(llama.run(tokens))
    edits = ablation_edits(llama, heads, means if ablation == "mean" else None)
    torch.testing.assert_close(second_half_loss(llama.run(tokens, edits=edits)), expected, rtol=1e-5, atol=1e-5)
    effect = ablate_heads(llama, heads, tokens, ablation=ablation, draws=3)  # type: ignore[arg-type]
    assert effect.value == pytest.approx((expected - before).mean().item(), abs=1e-5)
    assert effect.n == 4
    assert effect.ablation == f"{ablation} ablation"
    assert effect.require_controls().controls[0].n == 3
    assert effect.interval is not None
    assert effect.interval[0] <= effect.value <= effect.interval[1]


def test_random_heads_are_others(llama: LanguageModel) -> None:
    named = [(0, 0), (1, 2)]
    for seed in range(20):
        drawn = random_heads(llama, 5, named, np.random.default_rng(seed))
        assert len(set(drawn)) == 5
        assert not set(drawn) & set(named)
    everything = [(layer, head) for layer in range(3) for head in range(4)]
    with pytest.raises(CutawayError, match="too few"):
        random_heads(llama, 1, everything, np.random.default_rng(0))


def test_no_such_head(llama: LanguageModel) -> None:
    with pytest.raises(CutawayError, match="L3H0"):
        ablate_heads(llama, [(3, 0)])


def test_atlas_has_induction_heads_that_matter() -> None:
    """Study: induction L7H3 .95, previous-token L3H7 .99; ablating the top three costs what random heads do not."""
    report = head_report(cutaway.load("atlas"), top=3, draws=4)
    heads = {kind: [head for head, _ in report.scores.top(kind)] for kind in ("induction", "previous")}
    assert (7, 3) in heads["induction"]
    assert (3, 7) in heads["previous"]
    assert report.scores.second_loss < 0.1 < report.scores.first_loss
    for effect in report.effects:
        if effect.ablation == "zero ablation":
            assert effect.interval is not None
            assert effect.interval[0] > effect.controls[0].value
    assert len(report.heads) == 6
    assert len(report.to_json()["effects"]) == 4


def test_stories260k_has_no_induction(shared) -> None:
    """A vocabulary of 512 and no BOS problems: previous-token heads L3H6 and L1H3, no induction."""
    stories = cutaway.load(shared / "models" / "stories260K")
    scores = head_scores(stories, 8, 40)
    assert {head for head, _ in scores.top("previous", 2)} == {(3, 6), (1, 3)}
    assert scores.induction.max() < 0.3
    assert scores.second_loss > scores.first_loss - 1
