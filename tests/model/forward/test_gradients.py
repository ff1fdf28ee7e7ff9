"""Gradients equal autograd through hand-written hooks, and leave no trace on the model."""

import pytest
import torch
from subject import Subject, Subjects, close
from tiny import V, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.model.language_model import LanguageModel, attach

WEIGHTS = torch.randn(V, generator=torch.Generator().manual_seed(9))


def metric_at(columns: list[int]):
    """A curved function of the logits at one column a row: one number a row."""

    def metric(logits: Tensor) -> Tensor:
        chosen = logits[torch.arange(len(logits)), columns] if logits.shape[1] > 1 else logits[:, 0]
        return (chosen.tanh() * WEIGHTS).sum(-1) + chosen.log_softmax(-1)[:, 7]

    return metric


@pytest.mark.parametrize("side", ["right", "left"])
def test_gradients_at_every_site_equal_autograd(subject: Subject, side: str) -> None:
    tokens, sites = subject.tokens(side), subject.lm.sites().present()
    metric = metric_at([10, 6, 3] if side == "right" else [10, 10, 10])
    run = subject.lm.run(tokens, capture=sites, grad=metric)
    expected = subject.by_hand.gradients(tokens.ids, tokens.mask, sites, metric)
    assert {*run.grads} == {*sites}
    for site in sites:
        ours, theirs = run.grads[site], expected[site]
        assert ours.shape == run[site].shape
        assert not ours.requires_grad
        if site.endswith((".scores", ".pattern")):
            ours, theirs = ours.transpose(1, 2), theirs.transpose(1, 2)
        assert float(theirs.abs().max()) > 0
        close(ours[tokens.mask], theirs[tokens.mask], 1e-4)


def test_the_last_token_alone_gives_the_same_gradients(subject: Subject) -> None:
    tokens, sites = subject.tokens(), ["embed", "blocks.*.resid_post", "blocks.1.attn.z"]
    full = subject.lm.run(tokens, capture=sites, grad=metric_at([10, 6, 3]))
    last = subject.lm.run(tokens, capture=sites, grad=metric_at([10, 6, 3]), logits="last")
    for site in full.sites:
        close(last.grads[site], full.grads[site], 1e-5)


def test_gradients_pass_through_edits(subject: Subject) -> None:
    """An edit cuts what it replaces and carries what it changes."""
    tokens = subject.tokens()
    site, below, d = "blocks.1.resid_post", "blocks.0.resid_post", torch.linspace(-1, 1, subject.lm.d_model)
    edits = [cutaway.scale(site, 0.5, positions=1), cutaway.set(site, d, positions=-1)]
    metric = metric_at([10, 6, 3])
    run = subject.lm.run(tokens, capture=[below, site], edits=edits, grad=metric)

    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 1] = x[:, 1] * 0.5
        for row, column in enumerate((10, 6, 3)):
            x[row, column] = d
        return x

    expected = subject.by_hand.gradients(tokens.ids, tokens.mask, [below, site], metric, {site: change})
    for name in (below, site):
        close(run.grads[name][tokens.mask], expected[name][tokens.mask], 1e-4)
    assert float(run.grads[below][0, 10].abs().max()) == 0  # the last token's stream is replaced


@pytest.mark.parametrize("part", ["resid_mid", "attn.result", "ln2.scale", "ln1.normalized", "attn.scores"])
def test_gradients_at_an_edited_site_that_no_module_returns(of_family: Subjects, part: str) -> None:
    subject = of_family("llama")
    tokens, site = subject.tokens(), f"blocks.1.{part}"
    metric = metric_at([10, 6, 3])
    names = ["blocks.0.resid_post", site]
    run = subject.lm.run(tokens, capture=names, edits=cutaway.scale(site, 1.3), grad=metric)
    expected = subject.by_hand.gradients(tokens.ids, tokens.mask, names, metric, {site: lambda x: x * 1.3})
    for name in names:
        ours, theirs = run.grads[name], expected[name]
        if part == "attn.scores" and name == site:
            ours, theirs = ours.transpose(1, 2), theirs.transpose(1, 2)
        close(ours[tokens.mask], theirs[tokens.mask], 1e-4)


def test_a_finite_difference_agrees(of_family: Subjects) -> None:
    """The gradient says how far the metric moves: in float64, against two edited runs."""
    model = tiny_model("gpt2").double()
    lm = attach(model)
    site, metric = "blocks.0.attn.out", metric_at([5])
    row = of_family("gpt2").rows[0][:6]
    step = 1e-4 * torch.randn(lm.d_model, dtype=torch.float64)
    grad = lm.run(row, capture=site, grad=metric).grads[site][0, 2]
    up, down = (lm.run(row, edits=cutaway.add(site, step, s, positions=2)).logits for s in (1.0, -1.0))
    assert up is not None
    assert down is not None
    moved = float(metric(up) - metric(down)) / 2
    assert moved == pytest.approx(float(grad @ step), rel=1e-6)


def test_a_site_the_metric_does_not_see_has_gradient_zero(llama: LanguageModel) -> None:
    run = llama.run([5, 6, 7], capture=["ln_final.normalized", "embed"], grad=lambda logits: logits[:, 0, 3])
    assert float(run.grads["embed"][0, 0].abs().max()) > 0
    assert not run.grads["embed"][0, 1:].any()
    only = llama.run([5, 6, 7], capture=["embed", "blocks.2.mlp.out"], grad=lambda logits: logits[:, 0, 3])
    assert not only.grads["blocks.2.mlp.out"][0, 1:].any()


def test_a_sum_and_one_number_a_row_are_the_same(llama: LanguageModel) -> None:
    rows = [[5, 6, 7], [8, 9]]
    each = llama.run(rows, capture="embed", grad=lambda logits: logits[:, 1, 3])
    total = llama.run(rows, capture="embed", grad=lambda logits: logits[:, 1, 3].sum())
    assert torch.equal(each.grads["embed"], total.grads["embed"])


def flags(model: PreTrainedModel) -> list[tuple[str, bool, int | None]]:
    return [(n, p.requires_grad, None if p.grad is None else p.grad._version) for n, p in model.named_parameters()]


@pytest.mark.parametrize("how", ["trained", "frozen", "half frozen"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_parameters_keep_their_flags_and_gradients(family: str, how: str) -> None:
    model = tiny_model(family)
    lm, metric = attach(model), metric_at([2])
    expected = lm.run([5, 6, 7], capture="embed", grad=metric).grads["embed"]
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(how == "trained" or (how == "half frozen" and i % 2 == 0))
        if i % 3 == 0:
            parameter.grad = torch.full_like(parameter, 2.0)
    before = flags(model)
    kept = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    run = lm.run([5, 6, 7], capture="embed", grad=metric)
    close(run.grads["embed"], expected, 1e-6)

    def broken(logits: Tensor) -> Tensor:
        raise ZeroDivisionError("in the metric")

    with pytest.raises(ZeroDivisionError):
        lm.run([5, 6, 7], capture="embed", grad=broken)
    with torch.no_grad():
        inside = lm.run([5, 6, 7], capture="embed", grad=metric)
        assert not torch.is_grad_enabled()
    close(inside.grads["embed"], expected, 1e-6)
    assert flags(model) == before
    for parameter, grad in zip(model.parameters(), kept, strict=True):
        assert grad is None or (parameter.grad is not None and torch.equal(parameter.grad, grad))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.is_grad_enabled()


def test_values_of_a_run_with_gradients_are_those_of_one_without(subject: Subject) -> None:
    tokens, sites = subject.tokens(), subject.lm.sites().present()
    with_grad = subject.lm.run(tokens, capture=sites, grad=metric_at([10, 6, 3]))
    without = subject.lm.run(tokens, capture=sites)
    for site in sites:
        assert not with_grad[site].requires_grad
        close(with_grad[site], without[site])
    assert with_grad.logits is not None
    assert not with_grad.logits.requires_grad


def test_without_a_metric_nothing_is_kept_for_a_backward_pass(llama: LanguageModel) -> None:
    run = llama.run([5, 6], capture=["embed", "blocks.1.attn.pattern"])
    assert not run.grads
    assert run.logits is not None
    assert not any(t.requires_grad for t in (run.logits, run["embed"], run["blocks.1.attn.pattern"]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"grad": lambda x: x.sum(), "capture": "embed", "logits": None}, "needs logits"),
        ({"grad": lambda x: x.sum()}, "capture"),
        ({"grad": lambda x: x.detach().sum(), "capture": "embed"}, "differentiable"),
        ({"grad": lambda x: 3.0, "capture": "embed"}, "tensor"),
        ({"grad": lambda x: x.argmax(-1), "capture": "embed"}, "differentiable"),
        ({"grad": lambda x: x[:, 0, 0].mul(float("nan")), "capture": "embed"}, "NaN"),
    ],
)
def test_a_metric_that_cannot_be_used_is_refused(llama: LanguageModel, options: dict, words: str) -> None:
    with pytest.raises(CutawayError, match=words):
        llama.run([5, 6], **options)


def test_the_users_graph_is_not_freed_or_joined(fresh_llama: PreTrainedModel) -> None:
    """A run inside a training step leaves the step's own graph alone."""
    lm = attach(fresh_llama)
    ids = torch.tensor([[5, 6, 7]])
    loss = fresh_llama(input_ids=ids).logits.sum()
    lm.run(ids, capture="embed", grad=lambda logits: logits.sum())
    loss.backward()
    mine = next(fresh_llama.parameters()).grad
    assert mine is not None
    again = tiny_model("llama")
    again(input_ids=ids).logits.sum().backward()
    theirs = next(again.parameters()).grad
    assert theirs is not None
    assert torch.equal(mine, theirs)
