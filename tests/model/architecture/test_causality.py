"""Attention that looks ahead: it is measured and said, and nothing takes over what later tokens would change."""

from typing import Any

import pytest
import torch
from tiny import random_rows, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.causal.circuits.runs import run_circuits
from cutaway.causal.edge_graph import EdgeGraph
from cutaway.causal.parts import first_column, shared_prefix
from cutaway.data.pairs import PromptPair, aligned
from cutaway.model.language_model import LanguageModel, attach

SITE = "blocks.1.resid_post"


def both_ways(family: str) -> PreTrainedModel:
    if family == "gemma3":
        return tiny_model("gemma3", use_bidirectional_attention=True)
    model = tiny_model("gpt2")
    model.config.is_causal = False  # the mask where rows are padded
    for block in model.transformer.h:  # type: ignore[union-attr]
        block.attn.is_causal = False  # and the kernel, which is given none where they are not
    return model


@pytest.fixture(scope="module", params=["gemma3", "gpt2"])
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return attach(both_ways(request.param), name="ahead")


def plain(lm: LanguageModel, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return lm.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def test_it_is_measured_and_said(lm: LanguageModel) -> None:
    one, other = random_rows((8,))[0], random_rows((8,))[0]
    other[-1] = (other[-1] + 1) % 60
    assert float((plain(lm, one)[:4] - plain(lm, other)[:4]).abs().max()) > 0.01
    assert not lm.causal
    test = lm.selftest()
    assert test.passed, str(test)
    assert "note: Attention is not causal" in str(test)
    assert repr(lm).endswith("attention not causal")


@pytest.mark.parametrize("family", ["gemma3", "gpt2"])
def test_it_is_seen_in_short_floats(family: str) -> None:
    assert not attach(both_ways(family).to(dtype=torch.bfloat16)).causal  # type: ignore[call-arg]
    assert attach(tiny_model(family).to(dtype=torch.bfloat16)).causal  # type: ignore[call-arg]


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "mistral", "neox"])
def test_what_looks_back_alone_says_nothing(family: str) -> None:
    lm = attach(tiny_model(family))
    hf = lm.hf.train()  # with dropout, which two rows do not share
    assert lm.causal
    assert all(module.training for module in hf.modules())
    hf.eval()
    assert lm.selftest().notes == ()
    assert "causal" not in repr(lm)
    assert lm.generate([5, 6, 7], max_new_tokens=2).new_ids[0]


def test_a_model_that_was_patched_since_is_measured_again_by_its_self_test() -> None:
    lm = attach(tiny_model("gpt2"))
    assert lm.causal
    for block in lm.hf.transformer.h:  # type: ignore[union-attr]
        block.attn.is_causal = False
    test = lm.selftest()
    assert not lm.causal
    # padded rows are given a mask, which looks back alone: such a model is not the same in a batch
    assert [row.check for row in test.failures()] == ["a row of a batch without an edit = the row alone"]


def test_a_cache_is_refused_and_without_one_the_text_is_right(lm: LanguageModel) -> None:
    rows = random_rows((9, 6))
    for call in (
        lambda: lm.generate(rows, max_new_tokens=3),
        lambda: lm.generate(rows, max_new_tokens=3, decoding=cutaway.Decoding(num_beams=2)),
        lambda: list(lm.generate_stream(rows, max_new_tokens=3)),
    ):
        with pytest.raises(CutawayError, match=r"Attention in ahead is not causal.*use_cache=False"):
            call()
    edit = cutaway.scale("blocks.0.attn.out", 2.0, phase="new")
    made = lm.generate(rows, max_new_tokens=4, capture=SITE, edits=edit, decoding=cutaway.Decoding(use_cache=False))
    for row, ids in enumerate(rows):
        whole = list(ids)
        for _ in range(4):
            logits = lm.run(
                whole, edits=[] if len(whole) == len(ids) else cutaway.scale(
                    "blocks.0.attn.out", 2.0, positions=list(range(len(ids), len(whole))))
            ).logits  # fmt: skip
            assert logits is not None
            whole.append(int(logits[0, -1].argmax()))
        assert made.tokens.row_ids(row) == whole
    run = lm.run(made.tokens, capture=SITE, edits=[
        cutaway.scale("blocks.0.attn.out", 2.0, rows=row, positions=list(range(len(ids), len(ids) + 4)))
        for row, ids in enumerate(rows)
    ])  # fmt: skip
    torch.testing.assert_close(made[SITE], run[SITE] * run.tokens.mask[..., None], atol=1e-4, rtol=1e-4)


def test_sweeps_run_every_token(lm: LanguageModel) -> None:
    tokens = lm.tokens(random_rows((9, 9)))
    cells = [cutaway.scale(f"blocks.{layer}.mlp.out", 3.0, positions=[6]) for layer in (0, 1)]
    found = lm.sweep(tokens, cells, lambda logits, _: logits)
    assert found.notes == ("no prefix was reused: attention is not causal",)
    assert all(batch.start == 0 for batch in found.batches)
    for cell, value in zip(cells, found.values, strict=True):
        run = lm.run(tokens, edits=cell, logits="last")
        assert run.logits is not None
        torch.testing.assert_close(value, run.logits[:, 0], atol=1e-4, rtol=1e-4)


def test_circuits_share_no_prefix(lm: LanguageModel) -> None:
    pairs = aligned(lm, [PromptPair((4, 5, 6, 7, 8), (4, 5, 6, 17, 8), 8, 9)])
    assert first_column(lm, pairs) == 0
    assert shared_prefix(lm, pairs.clean, 3, check=False) is None
    graph = EdgeGraph.of(lm)
    # nothing in the circuit: the whole corrupt run, and all of it: the clean one
    masks = torch.stack([torch.zeros(graph.shape), graph.real]).bool()
    some = graph.real.clone()
    some[0, -1] = False  # the embedding's edge to the logits carries the corrupt prompt's
    runs = run_circuits(lm, pairs, torch.cat([masks, some[None]]), "logit_difference", graph=graph)
    ends = [lm.run(tokens, logits="last", capture="blocks.0.resid_pre") for tokens in (pairs.corrupt, pairs.clean)]
    for found, run in zip(runs.values[:2], ends, strict=True):
        assert run.logits is not None
        torch.testing.assert_close(found, (run.logits[:, 0, 8] - run.logits[:, 0, 9]).float())
    clean = lm.run(pairs.clean, capture=f"blocks.{lm.n_layers - 1}.resid_post")
    moved = (
        clean[f"blocks.{lm.n_layers - 1}.resid_post"][:, -1]
        + (ends[0]["blocks.0.resid_pre"] - ends[1]["blocks.0.resid_pre"])[:, -1]
    )
    logits = lm.unembed(moved)
    torch.testing.assert_close(runs.values[2], (logits[:, 8] - logits[:, 9]).float())


def test_dropout_stands_behind_the_pattern() -> None:
    """In training mode the pattern is what the softmax gave: z is of what dropout left of it."""
    model: Any = tiny_model("llama", attention_dropout=0.5)
    lm = attach(model)
    names = ["blocks.0.attn.pattern", "blocks.0.attn.v", "blocks.0.attn.z"]
    off = []
    for training in (False, True):
        model.train(training)
        run = lm.run([[5, 6, 7, 8, 9, 10]], capture=names)
        pattern, v, z = (run[name] for name in names)
        torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]))
        mixed = torch.einsum("bhqk,bkhe->bqhe", pattern, v.repeat_interleave(lm.n_heads // lm.n_kv_heads, 2))
        off.append(float((mixed - z).abs().max() / z.abs().max()))
    assert "note: The model is in training mode: with dropout" in str(lm.selftest())
    assert off[0] < 1e-5
    assert off[1] > 0.1
    assert "before any dropout" in lm.sites()["blocks.0.attn.pattern"].meaning
