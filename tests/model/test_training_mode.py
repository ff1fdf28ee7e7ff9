"""A model in training mode, with and without gradient checkpointing, is the same function where it has no dropout."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import random_rows, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

import cutaway
from cutaway.causal.parts import shared_prefix
from cutaway.model.language_model import LanguageModel, attach

SITES = [
    *("blocks.0.attn.pattern", "blocks.0.attn.scores", "blocks.0.ln1.scale", "blocks.1.ln2.normalized"),
    *("blocks.0.attn.result", "blocks.0.attn.z", "blocks.1.mlp.post", "blocks.0.resid_mid", "blocks.1.resid_post"),
]
IDS = torch.tensor(random_rows((6, 6), seed=3))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def calm(request: pytest.FixtureRequest) -> LanguageModel:
    changes: dict[str, Any] = (
        {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if request.param == "gpt2" else {}
    )
    return attach(tiny_model(request.param, **changes))


@pytest.fixture(params=[False, True], ids=["plain", "checkpointing"])
def training(calm: LanguageModel, request: pytest.FixtureRequest) -> Iterator[LanguageModel]:
    """The same model in training mode; put back afterwards."""
    if request.param:
        calm.hf.gradient_checkpointing_enable()
    calm.hf.train()
    yield calm
    assert calm.hf.is_gradient_checkpointing == request.param
    assert calm.hf.training
    calm.hf.gradient_checkpointing_disable()
    calm.hf.eval()


def greedy(hf: PreTrainedModel, ids: Tensor, new: int) -> Tensor:
    for _ in range(new):
        with torch.no_grad():
            ids = torch.cat([ids, hf(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


def test_generation_with_a_cache(training: LanguageModel) -> None:
    right = greedy(training.hf, IDS, 6)
    made = training.generate(IDS, max_new_tokens=6, capture="blocks.1.resid_post")
    assert torch.equal(made.tokens.ids, right)
    assert torch.equal(training.generate(IDS, max_new_tokens=6).tokens.ids, right)  # where nothing is observed
    run = training.run(right, capture="blocks.1.resid_post")
    torch.testing.assert_close(made["blocks.1.resid_post"], run["blocks.1.resid_post"], atol=1e-4, rtol=1e-4)
    assert shared_prefix(training, training.tokens(IDS), 3) is not None


def test_gradients_at_every_kind_of_site(training: LanguageModel) -> None:
    def grads() -> dict[str, Tensor]:
        run = training.run(IDS, capture=SITES, grad=lambda logits: logits[:, -1, 5], logits="last")
        return {site: run.grads[site] for site in SITES}

    found = grads()
    training.hf.eval()
    right = grads()
    training.hf.train()
    for site in SITES:
        assert bool(right[site].any()), site
        torch.testing.assert_close(found[site], right[site], atol=1e-5, rtol=1e-4)


def test_a_training_step_with_an_edit(training: LanguageModel) -> None:
    """The gradients of weights behind an edit are those under a hook written by hand."""
    move = torch.linspace(-2, 2, training.d_model)
    weight = next(training.family.layers[1].mlp.parameters())
    steps: list[Tensor] = []

    def loss(logits: Tensor) -> Tensor:
        value = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        steps.extend(torch.autograd.grad(value, [weight], retain_graph=True))
        return value

    site = "blocks.0.resid_post"
    run = training.run(IDS, edits=cutaway.add(site, move), capture=site, grad=loss)

    def hook(_module: object, _args: object, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        return output + move if isinstance(output, Tensor) else (output[0] + move, *output[1:])

    handle = training.family.layers[0].module.register_forward_hook(hook)
    value = loss(training.hf(input_ids=IDS, use_cache=False).logits)
    handle.remove()
    assert run.logits is not None
    torch.testing.assert_close(steps[0], steps[1], atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(loss_of(run.logits), value.detach())


def loss_of(logits: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
