"""Saliency against autograd and loops written out; completeness in float64; checks that can tell good from bad maps."""

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from cutaway.artifacts.errors import CutawayError
from cutaway.model.language_model import LanguageModel, attach
from cutaway.observe.saliency_maps.methods import (
    METHODS,
    NOT_SHOWN,
    baseline_vector,
    gradient_x_input,
    integrated_gradients,
    occlusion,
    question,
    saliency_map,
)
from cutaway.observe.saliency_maps.report import SaliencyChecks, deletion, rank_correlation, saliency

IDS = [5, 17, 60, 5, 33, 90]
A, B = 20, 30


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTAWAY_QUIET", "1")


@pytest.fixture(scope="module")
def wide() -> LanguageModel:
    """A GPT-2 in float64 throughout: its norms are torch's, which stay in float64."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() == 2 else 1)
    return attach(model, name="wide")


def by_hand(lm: LanguageModel, embeddings: torch.Tensor) -> torch.Tensor:
    """The logit difference from embeddings [1, p, d], straight through transformers."""
    logits = lm.hf(inputs_embeds=embeddings).logits[0, -1]
    return logits[A] - logits[B]


def embedded(lm: LanguageModel, ids: list[int]) -> torch.Tensor:
    return lm.hf.get_input_embeddings()(torch.tensor([ids])).detach()  # type: ignore[operator]


def test_nothing_to_attribute_to_and_too_fine_an_integral(atlas: LanguageModel) -> None:
    with pytest.raises(CutawayError, match="beginning-of-text alone"):
        question(atlas, [atlas.bos_id or 0], 5)
    with pytest.raises(CutawayError, match="takes 1 to 4096"):
        integrated_gradients(atlas, question(atlas, [5, 6], 7), steps=10**8)
    with pytest.raises(CutawayError, match="not valid Unicode"):
        question(atlas, [5, 6], "\ud800")


def test_gradient_times_input_is_autograds(wide: LanguageModel) -> None:
    x = embedded(wide, IDS).requires_grad_()
    (slope,) = torch.autograd.grad(by_hand(wide, x), x)
    found = gradient_x_input(wide, question(wide, IDS, A, B))
    np.testing.assert_allclose(found.values, (x * slope).sum(-1)[0].detach().numpy(), rtol=1e-9)
    assert found.value == pytest.approx(float(by_hand(wide, x).detach()))
    assert "minus" in found.what


@pytest.mark.parametrize("baseline", ["zero", "mean"])
def test_integrated_gradients_sum_to_the_difference(wide: LanguageModel, baseline) -> None:
    found = integrated_gradients(wide, question(wide, IDS, A, B), baseline=baseline, steps=300)
    x = embedded(wide, IDS)
    start = baseline_vector(wide, baseline).expand_as(x)
    assert found.value - (found.baseline_value or 0.0) == pytest.approx(
        float(by_hand(wide, x) - by_hand(wide, start)), rel=1e-9
    )
    assert abs(found.gap or 0.0) < 1e-8 * abs(found.value - (found.baseline_value or 0.0)) or abs(found.gap or 1) < 1e-7


def test_integrated_gradients_are_a_sum_over_the_way_written_out(wide: LanguageModel) -> None:
    """Many small midpoint steps give each token what the quadrature gives it."""
    x = embedded(wide, IDS)
    start = baseline_vector(wide, "mean").expand_as(x)
    total = torch.zeros_like(x)
    n = 2000
    for k in range(n):
        here = (start + (k + 0.5) / n * (x - start)).requires_grad_()
        total += torch.autograd.grad(by_hand(wide, here), here)[0] / n
    oracle = ((x - start) * total).sum(-1)[0].numpy()
    found = integrated_gradients(wide, question(wide, IDS, A, B), baseline="mean", steps=128)
    np.testing.assert_allclose(found.values, oracle, rtol=1e-3, atol=1e-4)


def test_more_steps_come_closer_and_unasked_they_are_enough(wide: LanguageModel) -> None:
    asked = question(wide, IDS, A, B)
    gaps = [abs(integrated_gradients(wide, asked, baseline="mean", steps=n).gap or 0.0) for n in (1, 2, 4, 16)]
    assert gaps[3] < 1e-4 * gaps[0]
    assert gaps[2] < gaps[1] < gaps[0]
    alone = integrated_gradients(wide, asked, baseline="mean")
    assert abs(alone.gap or 0.0) <= 0.01 * abs(alone.value - (alone.baseline_value or 0.0))
    with pytest.raises(CutawayError, match="steps is 0"):
        integrated_gradients(wide, asked, steps=0)


def test_occlusion_is_a_loop(wide: LanguageModel) -> None:
    x, asked = embedded(wide, IDS), question(wide, IDS, A, B)
    mean = wide.hf.get_input_embeddings().weight.detach().mean(0)  # type: ignore[union-attr,operator]
    torch.testing.assert_close(baseline_vector(wide, "mean"), mean)
    whole = float(by_hand(wide, x))
    replaced, deleted = [], []
    for i in range(len(IDS)):
        other = x.clone()
        other[0, i] = mean
        replaced.append(whole - float(by_hand(wide, other)))
        deleted.append(whole - float(by_hand(wide, embedded(wide, [t for j, t in enumerate(IDS) if j != i]))))
    np.testing.assert_allclose(occlusion(wide, asked, replace="mean").values, replaced, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(occlusion(wide, asked, replace="delete").values, deleted, rtol=1e-9, atol=1e-9)
    with pytest.raises(CutawayError, match="leaves nothing"):
        occlusion(wide, question(wide, [5], A), replace="delete")


def test_a_token_that_no_answer_can_see_gets_nothing_and_the_only_one_gets_all() -> None:
    """Planted: without attention (its output projection zero) only the last token reaches the answer."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    with torch.no_grad():
        for block in model.transformer.h.children():
            block.get_parameter("attn.c_proj.weight").zero_()
    lm = attach(model)
    for method in METHODS:
        found = saliency_map(lm, question(lm, IDS, A, B), method, baseline="mean", steps=32)
        np.testing.assert_allclose(found.values[:-1], 0.0, atol=1e-6)
        assert abs(found.values[-1]) > 1e-3


def test_the_wrong_answer_may_be_nothing_or_the_mean(wide: LanguageModel) -> None:
    logits = wide.run([IDS], logits="last").logits
    assert logits is not None
    assert gradient_x_input(wide, question(wide, IDS, A)).value == pytest.approx(float(logits[0, 0, A]))
    against = gradient_x_input(wide, question(wide, IDS, A, "mean")).value
    assert against == pytest.approx(float(logits[0, 0, A] - logits[0, 0].mean()))


def test_what_cannot_be_asked_is_one_sentence(wide: LanguageModel) -> None:
    asked = question(wide, IDS, A, B)
    with pytest.raises(CutawayError, match="one prompt at a time"):
        question(wide, [IDS, IDS], A)
    with pytest.raises(CutawayError, match="also the wrong answer"):
        question(wide, IDS, A, A)
    with pytest.raises(CutawayError, match="no token id"):
        question(wide, IDS, 5000)
    with pytest.raises(CutawayError, match="no padding token"):
        integrated_gradients(wide, asked, baseline="pad")
    with pytest.raises(CutawayError, match="no baseline embedding 'delete'"):
        integrated_gradients(wide, asked, baseline="delete")
    with pytest.raises(CutawayError, match="no saliency method 'lime'"):
        saliency(wide, [IDS], A, methods=["lime"])  # type: ignore[list-item]
    with pytest.raises(CutawayError, match="occlusion alone"):
        saliency(wide, [IDS], A, baseline="delete")


# Checks


def test_rank_correlation_is_spearmans_and_says_when_it_is_none() -> None:
    assert rank_correlation(np.array([1.0, 2.0, 5.0]), np.array([0.1, 0.2, 0.3])) == pytest.approx(1.0)
    assert np.isnan(rank_correlation(np.array([1.0, 1.0, 1.0]), np.array([0.1, 0.2, 0.3])))
    assert np.isnan(rank_correlation(np.array([1.0, 2.0]), np.array([0.1, 0.2])))


def test_the_checks_leave_the_model_alone_and_stand_beside_each_map(wide: LanguageModel) -> None:
    before = {name: value.clone() for name, value in wide.hf.state_dict().items()}
    found = saliency(wide, [IDS, IDS[::-1]], A, B, baseline="mean", steps=16, checks=SaliencyChecks(draws=5))
    assert all(torch.equal(value, before[name]) for name, value in wide.hf.state_dict().items())
    assert all(not module._forward_hooks for module in wide.hf.modules())
    for report in found.methods:
        assert [stage.randomised for stage in report.stages] == ["layer 1", "layers 0–1", "everything"]
        assert report.not_shown == NOT_SHOWN[report.method]
        assert report.deletion.controls[0].name == "as many random tokens"
        assert len(report.maps) == 2
    assert set(found.agreement) == {(a, b) for i, a in enumerate(METHODS) for b in METHODS[i + 1 :]}
    text = str(found)
    assert text.count("what it does not show") == 3
    assert "sum off by" in text


def test_sanity_is_one_where_training_changed_nothing(wide: LanguageModel) -> None:
    """A model that is its own untrained one: every stage correlates perfectly. The check can say that a map is bad."""
    from cutaway.observe.random_weights import untrained

    fresh = untrained(wide, 0)
    found = saliency(fresh, [IDS], A, B, methods=["gradient-x-input", "occlusion"], checks=SaliencyChecks(1, 2))
    assert all(stage.signed == pytest.approx(1.0) for one in found.methods for stage in one.stages)
    other = saliency(wide, [IDS], A, B, methods=["occlusion"], checks=SaliencyChecks(2, 2))
    assert abs(other.methods[0].stages[-1].signed) < 0.9


def test_deleting_what_matters_costs_more_than_deleting_at_random(wide: LanguageModel) -> None:
    asked = [question(wide, ids, A, B) for ids in (IDS, IDS[::-1], [3, 9, 44, 61, 70, 12])]
    maps = [occlusion(wide, one) for one in asked]
    found = deletion(wide, asked, maps, SaliencyChecks(share=0.2, draws=30))  # one token: the very one that costs most
    assert found.value == pytest.approx(np.mean([m.values.max() for m in maps]))
    assert found.value > found.controls[0].value
    assert found.n == 3
