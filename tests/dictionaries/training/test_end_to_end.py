"""End-to-end training: loss and gradients equal plain transformers with a hook, in float64; it trains, and resumes."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import tiny_llama
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.dictionaries.training.config import TrainConfig
from cutaway.dictionaries.training.end_to_end import RowBatch, RowBatches, train_end_to_end
from cutaway.dictionaries.training.initial import initial_parameters
from cutaway.dictionaries.training.rules import TopKRule
from cutaway.dictionaries.training.step import step
from cutaway.dictionaries.training.terms import EndToEnd, Reconstruction
from cutaway.model.language_model import LanguageModel, attach

SMALL = TrainConfig(
    d_sae=48,
    selector=TopKRule(3),
    terms=(EndToEnd(), Reconstruction(weight=1e-3)),
    tokens=40 * 44,
    batch=44,
    learning_rate=3e-3,
    warmup=4,
)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return tiny_llama(seed=3)


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return torch.randint(3, 50, (32, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("site", "to"), [("blocks.1.resid_post", None), ("blocks.2.mlp.in", "blocks.2.mlp.out"), ("blocks.0.attn.z", None)]
)
def test_loss_and_gradients_equal_a_plain_hook_in_float64(rows: Tensor, site: str, to: str | None) -> None:
    single = tiny_llama(seed=3)
    lm = attach(single.hf.double(), name="double")
    writes = to or site
    source = RowBatches(lm, rows, [site, writes])
    batch = next(iter(source.batches(44)))
    assert isinstance(batch, RowBatch)
    x, y = batch[site], batch[writes]
    config = TrainConfig(d_sae=48, selector=TopKRule(3), b_dec="mean", subtract_b_dec=to is None)
    parameters = initial_parameters(x, y if to else x, config)
    run_on = source.downstream(batch, [writes])
    found = step(parameters, TopKRule(3), (EndToEnd(weight=2.0),), x, y, subtract_b_dec=to is None, downstream=run_on)

    leaves = {name: tensor.clone().requires_grad_() for name, tensor in parameters.tensors().items()}
    ids = batch.run.tokens.ids
    centred = x - leaves["decoder_bias"] if to is None else x
    h = centred @ leaves["encoder"].T + leaves["encoder_bias"]
    kept = torch.zeros_like(h).scatter(1, h.topk(3, dim=1).indices, 1.0)
    written = (h.relu() * kept) @ leaves["decoder"] + leaves["decoder_bias"]

    def put(value: Tensor) -> Tensor:
        value = value.clone()
        value[:, 1:] = written.view(len(ids), -1, value.shape[-1])
        return value

    layer = lm.hf.model.layers[int(site.split(".")[1])]
    with torch.no_grad():
        clean = lm.hf(input_ids=ids).logits[:, 1:].log_softmax(-1)
    handles = {
        "attn.z": lambda: layer.self_attn.o_proj.register_forward_pre_hook(lambda _m, a: (put(a[0]), *a[1:])),
        "mlp.in": lambda: layer.mlp.register_forward_hook(lambda _m, _a, out: put(out)),
        "resid_post": lambda: layer.register_forward_hook(
            lambda _m, _a, out: (put(out[0]), *out[1:]) if isinstance(out, tuple) else put(out)
        ),
    }
    handle = handles[site.split(".", 2)[2]]()
    try:
        spliced = lm.hf(input_ids=ids).logits[:, 1:].log_softmax(-1)
    finally:
        handle.remove()
    loss = 2.0 * (clean.exp() * (clean - spliced)).sum(-1).mean()
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    torch.testing.assert_close(found.loss, loss.detach(), rtol=1e-10, atol=1e-12)
    assert loss > 0.01
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        assert gradient is not None
        assert gradient.norm() > 1e-4, name
        torch.testing.assert_close(getattr(found.gradients, name), gradient, rtol=1e-8, atol=1e-10)
        assert leaf.grad is None
    assert all(parameter.grad is None for parameter in lm.hf.parameters())


def mean_kl(lm: LanguageModel, rows: Tensor, dictionary: Any) -> float:
    source = RowBatches(lm, rows, dictionary.site)
    batch = next(iter(source.batches(len(rows) * 11)))
    return source.downstream(batch, [dictionary.site])(dictionary(batch[dictionary.site])).item()


def test_it_lowers_the_kl_more_than_reconstruction_alone(lm: LanguageModel, rows: Tensor) -> None:
    config = replace(SMALL, tokens=150 * 44)
    trained = train_end_to_end(lm, rows, "blocks.1.resid_post", config)
    first, last = trained.history[0], trained.history[-1]
    assert last["end_to_end"] < 0.75 * first["end_to_end"]
    # the same dictionary with next to nothing of the term
    plain = replace(config, terms=(EndToEnd(weight=1e-9), Reconstruction()))
    control = train_end_to_end(lm, rows, "blocks.1.resid_post", plain)
    assert mean_kl(lm, rows, trained.dictionary) < 0.8 * mean_kl(lm, rows, control.dictionary)


def test_it_resumes_to_the_same_bits(
    lm: LanguageModel, rows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_end_to_end(lm, rows, "blocks.1.resid_post", SMALL)
    batches = RowBatches.batches

    def stopping(self: RowBatches, size: int, start: int = 0) -> Iterator[RowBatch]:
        for number, batch in enumerate(batches(self, size, start), start):
            if number == 17:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(RowBatches, "batches", stopping)
        with pytest.raises(KeyboardInterrupt):
            train_end_to_end(lm, rows, "blocks.1.resid_post", SMALL, folder=tmp_path)
    resumed = train_end_to_end(lm, rows, "blocks.1.resid_post", SMALL, folder=tmp_path)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(resumed.dictionary, name), getattr(whole.dictionary, name))


def test_what_does_not_fit_is_refused(lm: LanguageModel, rows: Tensor) -> None:
    with pytest.raises(CutawayError, match="needs the term"):
        train_end_to_end(lm, rows, "blocks.1.resid_post", replace(SMALL, terms=(Reconstruction(),)))
    with pytest.raises(CutawayError, match="less than one batch"):
        train_end_to_end(lm, rows[:2], "blocks.1.resid_post", SMALL)
    with pytest.raises(CutawayError, match="layer 7"):
        train_end_to_end(lm, rows, "blocks.7.resid_post", SMALL)
