"""Attention internals of attached models whose attention modules have adapters: runs, and generation from a cache."""

import pytest
import torch
from attention_models import HEADS, LAYERS, batch, eager, forward, same, small

import cutaway

ADAPTED = ("gptj", "codegen", "gpt_neo", "bloom", "mpt", "falcon", "falcon_new", "xglm")


@pytest.mark.parametrize("name", ADAPTED)
def test_runs_show_what_transformers_returns(name: str) -> None:
    model = small(name)
    lm, tokens = cutaway.attach(model), batch((9, 4), "left")
    run = lm.run(tokens, capture=["blocks.*.attn.pattern", "blocks.*.attn.z", "blocks.*.attn.v"])
    with torch.no_grad():
        theirs = forward(eager(model), tokens, output_attentions=True)
    real = tokens.mask
    assert run.logits is not None
    assert same(run.logits[real], theirs.logits[real])
    for layer in range(LAYERS):
        pattern, value, z = (run[f"blocks.{layer}.attn.{part}"] for part in ("pattern", "v", "z"))
        assert same(pattern.transpose(1, 2)[real], theirs.attentions[layer].transpose(1, 2)[real])
        if name == "mpt":  # clips what it has projected
            value = value.clamp(-1.5, 1.5)
        value = value.repeat_interleave(HEADS // value.shape[2], 2)
        expected = torch.einsum("bhqk,bkhe->bqhe", pattern, value)
        assert torch.allclose(expected[real], z[real], rtol=1e-5, atol=1e-5)
    assert lm.selftest().passed


@pytest.mark.parametrize("name", ADAPTED)
def test_cached_generation_is_uncached_generation_under_edits(name: str) -> None:
    lm = cutaway.attach(small(name))
    rows = [[5, 9, 13, 7, 22], [8, 30]]
    generator = torch.Generator().manual_seed(3)
    width = lm.d_head
    for edit in (
        cutaway.add("blocks.0.attn.rot_k", torch.randn(width, generator=generator) * 2),
        cutaway.add("blocks.1.attn.rot_q", torch.randn(width, generator=generator) * 2, phase="new"),
        cutaway.zero("blocks.1.attn.pattern", heads=[1, 2]),
        cutaway.scale("blocks.0.attn.scores", 3.0, rows=1),
    ):
        texts = [
            lm.generate(rows, edits=edit, max_new_tokens=6, decoding=cutaway.Decoding(use_cache=use_cache)).new_ids
            for use_cache in (True, False)
        ]
        assert texts[0] == texts[1]
