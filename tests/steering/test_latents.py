"""A clamped latent reads as clamped; the dose curve is the probability of the concept; controls are alike."""

from dataclasses import replace

import pytest
import torch

from cutaway.artifacts.errors import CutawayError
from cutaway.dictionaries.dictionary import BatchTopK, Dictionary, Gated, JumpReLU, Port
from cutaway.model.edits.edits import clamp_latent
from cutaway.model.language_model import LanguageModel
from cutaway.steering.latents import Concept, Doses, SimilarLatents, similar_latents, steer_latent

PROMPTS = [[0, 5, 9, 11], [0, 7, 33], [0, 50, 51, 52, 53]]


def test_the_clamped_latent_reads_its_value(tiny: LanguageModel, dictionary: Dictionary) -> None:
    site = dictionary.site
    free = tiny.run(PROMPTS, capture=site)[site]
    before = dictionary.pre_activations(free)[..., 3].relu()
    run = tiny.run(PROMPTS, capture=site, edits=clamp_latent(dictionary, 3, 2.5))
    moved = (run[site] - free)[run.tokens.mask]
    expected = (2.5 - before)[run.tokens.mask][:, None] * dictionary.W_dec[3]
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-4)


def test_any_selector_with_one_threshold_can_be_clamped_and_others_say_why_not(
    tiny: LanguageModel, dictionary: Dictionary
) -> None:
    site = dictionary.site
    free = tiny.run(PROMPTS, capture=site)[site]
    for kind, subtract in ((BatchTopK, True), (JumpReLU, False)):
        other = replace(dictionary, subtract_b_dec=subtract)
        positive = other.pre_activations(free)[..., 3].relu().unique()
        # Some active tokens lie below it, some above; between two values, since an observed one rounds to either side.
        high = float(positive[len(positive) // 2 :][:2].mean())
        theta = torch.full((dictionary.d_sae,), 9.0).index_fill(0, torch.tensor(3), high)
        other = replace(other, selector=BatchTopK(4, high) if kind is BatchTopK else JumpReLU(theta))
        before = other.encode(free)[..., 3]
        assert 0 < int((before > 0).sum()) < int((other.pre_activations(free)[..., 3] > 0).sum())
        run = tiny.run(PROMPTS, capture=site, edits=clamp_latent(other, 3, 2.5))
        expected = (2.5 - before)[run.tokens.mask][:, None] * other.W_dec[3]
        torch.testing.assert_close((run[site] - free)[run.tokens.mask], expected, rtol=1e-4, atol=1e-4)
    gated = replace(dictionary, selector=Gated(torch.zeros(dictionary.d_sae), torch.zeros(dictionary.d_sae)))
    with pytest.raises(CutawayError, match="with a gate cannot be clamped"):
        clamp_latent(gated, 3, 1.0)
    elsewhere = (Port("blocks.1.mlp.out", dictionary.d_out),)
    with pytest.raises(CutawayError, match=r"latent of a transcoder .* add its decoder to blocks.1.mlp.out"):
        clamp_latent(replace(dictionary, writes=elsewhere, subtract_b_dec=False), 3, 1.0)


def test_similar_latents_are_other_latents_of_like_density() -> None:
    density = torch.cat([torch.linspace(0.001, 0.1, 200), torch.zeros(20)])
    for seed in range(5):
        drawn = similar_latents(density, 100, 6, seed, without=[101])
        assert len(set(drawn)) == 6
        assert not {100, 101} & set(drawn)
        assert all(0.5 < density[i] / density[100] < 2 for i in drawn)
    with pytest.raises(CutawayError, match="too few"):
        similar_latents(torch.tensor([0.1, 0.1, 0.0]), 0, 3)


def test_dose_curve_is_the_probability_of_the_concept(tiny: LanguageModel, dictionary: Dictionary) -> None:
    density = torch.full((dictionary.d_sae,), 0.05)
    found = steer_latent(
        tiny, dictionary, 3, PROMPTS, Concept((8, 9)), doses=Doses(4.0, (0.5, 2.0)),
        controls=SimilarLatents(density, 3), neutral=[[0, 2, 3, 4, 5]], max_new_tokens=3,
    )  # fmt: skip
    assert [dose.value for dose in found.doses] == [2.0, 8.0]
    for dose in found.doses:
        run = tiny.run(PROMPTS, edits=clamp_latent(dictionary, 3, dose.value), logits="last")
        assert run.logits is not None
        expected = run.logits[:, 0].softmax(-1)[:, [8, 9]].sum(-1).mean().item()
        assert dose.effect.value == pytest.approx(expected, rel=1e-4)
        assert {control.n for control in dose.effect.require_controls().controls} == {3}
        assert dose.side_effects is not None
    assert 3 not in found.random_latents
    assert found.doses[0].side_effects.kl < found.doses[1].side_effects.kl  # type: ignore[union-attr]
    assert "P(the concept)" in str(found)


def test_a_null_result_is_not_called_an_effect(tiny: LanguageModel, dictionary: Dictionary) -> None:
    """A dose of the activation's own size on a token the latent has nothing to do with: no dose `moved` it, or it did
    by more than every random latent."""
    density = torch.full((dictionary.d_sae,), 0.05)
    found = steer_latent(
        tiny, dictionary, 3, PROMPTS, Concept((8,)), doses=Doses(0.01, (0.01,)), controls=SimilarLatents(density, 8)
    )
    assert found.moved is None


def test_a_latent_that_writes_the_concept_moves_it(tiny: LanguageModel, dictionary: Dictionary) -> None:
    """Its decoder is made the unembedding of token 8 at the last layer, so that clamping it must raise token 8."""
    row = tiny.output_directions(torch.tensor([8]))[0].detach()
    planted = replace(dictionary, W_dec=dictionary.W_dec.clone(), site="blocks.2.resid_post")
    planted.W_dec[3] = row / row.norm()
    density = torch.full((dictionary.d_sae,), 0.05)
    found = steer_latent(
        tiny, planted, 3, PROMPTS * 4, Concept((8,)), doses=Doses(20.0, (1.0, 3.0)), controls=SimilarLatents(density)
    )
    assert found.moved is not None
    assert found.moved.effect.value > 0.5
