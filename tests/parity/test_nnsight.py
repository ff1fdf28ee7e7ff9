"""Module outputs and inputs as nnsight's trace sees them are our sites."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peer_models import rows, save
from safetensors.torch import load_file, save_file
from torch import Tensor

import cutaway

KINDS = ("gpt2", "llama", "qwen3", "neox")
THEIRS = """
import os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
import nnsight, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_grad_enabled(False)
root, kinds = sys.argv[1], sys.argv[2].split(",")
ids = load_file(f"{root}/ids.safetensors")["ids"]
first = lambda x: x[0] if isinstance(x, tuple) else x
for kind in kinds:
    hf = AutoModelForCausalLM.from_pretrained(f"{root}/{kind}").eval()
    lm = nnsight.LanguageModel(hf, tokenizer=AutoTokenizer.from_pretrained(f"{root}/{kind}"))
    layers = {"gpt2": lambda: lm.transformer.h, "neox": lambda: lm.gpt_neox.layers}.get(kind, lambda: lm.model.layers)()
    parts = {"gpt2": ("attn", "c_proj"), "neox": ("attention", "dense")}.get(kind, ("self_attn", "o_proj"))
    attention = [getattr(layer, parts[0]) for layer in layers]
    projection = [getattr(module, parts[1]) for module in attention]
    out = {}
    with lm.trace(ids):
        streams = nnsight.save([layer.output for layer in layers])
        logits = lm.output.save()
    with lm.trace(ids):
        z = nnsight.save([module.input for module in projection])
    with lm.trace(ids):
        written = nnsight.save([module.output for module in projection])
    with lm.trace(ids):
        patched = layers[1].output
        patched = patched[0] if isinstance(patched, tuple) else patched
        patched[:, 3] = 0
        edited = lm.output.save()
    for i in range(len(layers)):
        out |= {f"resid_post.{i}": first(streams[i]), f"z.{i}": z[i], f"out.{i}": written[i]}
    out |= {"logits": logits.logits, "edited": edited.logits}
    save_file({k: v.contiguous().clone() for k, v in out.items()}, f"{root}/{kind}.safetensors")
"""


def error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()


def test_outputs_inputs_and_an_edit_are_the_same(peer: Callable[[str], Path], tmp_path: Path) -> None:
    """Layer outputs are resid_post; the output projection reads z and writes attn.out; zeroing one token's stream
    after layer 1 gives the same logits.
    """
    python = peer("nnsight")
    models = {kind: save(kind, tmp_path / kind) for kind in KINDS}
    ids = rows(2, 11)
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    done = subprocess.run(
        [python, "-c", THEIRS, str(tmp_path), ",".join(KINDS)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-4_000:]
    for kind, model in models.items():
        lm = cutaway.attach(model)
        theirs = load_file(tmp_path / f"{kind}.safetensors")
        run = lm.run(ids, capture=["blocks.*.resid_post", "blocks.*.attn.z", "blocks.*.attn.out"])
        for layer in range(lm.n_layers):
            for ours, name in (("resid_post", "resid_post"), ("attn.z", "z"), ("attn.out", "out")):
                value = run[f"blocks.{layer}.{ours}"]
                assert error(value.flatten(2), theirs[f"{name}.{layer}"]) <= 1e-5, (kind, layer, ours)
        assert run.logits is not None
        assert error(run.logits, theirs["logits"]) <= 1e-5, kind
        edited = lm.run(ids, edits=cutaway.zero("blocks.1.resid_post", positions=3)).logits
        assert edited is not None
        assert error(edited, theirs["edited"]) <= 1e-5, kind
        with pytest.raises(AssertionError):  # the edit shows, so that its equality says something
            assert torch.allclose(edited, run.logits, atol=1e-3)
