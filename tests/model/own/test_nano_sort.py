"""A real model with intermediate values that its author published: they match, site by site."""

import base64
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from cutaway.causal.accuracy import task_accuracy
from cutaway.causal.task_results import try_tasks
from cutaway.data.pairs import PromptPair
from cutaway.data.tasks.registry import all_tasks
from cutaway.model.language_model import LanguageModel, attach
from cutaway.model.own.weights import from_weights


def tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one of the author's files: base64 of little-endian fp32, with a shape."""
    found = {}
    for name, entry in json.loads(path.read_text()).items():
        if name != "config":
            data = torch.frombuffer(bytearray(base64.b64decode(entry["data"])), dtype=torch.float32)
            found[name] = data.reshape(entry["shape"])
    return found


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Tensor]:
    return tensors(shared / "models" / "nano-sort" / "gpt-nano-sort-t0-partials.json")


def by_transformerlens(weights: dict[str, Tensor], layers: int, heads: int) -> dict[str, Tensor]:
    """The same weights under TransformerLens' names: a matrix a head, [in, out]."""
    found = {
        "embed.W_E": weights["transformer.wte.weight"],
        "pos_embed.W_pos": weights["transformer.wpe.weight"],
        "ln_final.w": weights["transformer.ln_f.weight"],
        "ln_final.b": weights["transformer.ln_f.bias"],
        "unembed.W_U": weights["lm_head.weight"].T,
    }
    for layer in range(layers):
        old, new = f"transformer.h.{layer}.", f"blocks.{layer}."
        fused = (weights[f"{old}attn.c_attn.{end}"].chunk(3) for end in ("weight", "bias"))
        for part, w, b in zip("QKV", *fused, strict=True):
            found[f"{new}attn.W_{part}"] = torch.stack([rows.T for rows in w.chunk(heads)])
            found[f"{new}attn.b_{part}"] = torch.stack(b.chunk(heads))
        found[f"{new}attn.W_O"] = torch.stack(weights[f"{old}attn.c_proj.weight"].T.chunk(heads))
        found[f"{new}attn.b_O"] = weights[f"{old}attn.c_proj.bias"]
        for theirs, ours in (("c_fc", "in"), ("c_proj", "out")):
            found[f"{new}mlp.W_{ours}"] = weights[f"{old}mlp.{theirs}.weight"].T
            found[f"{new}mlp.b_{ours}"] = weights[f"{old}mlp.{theirs}.bias"]
        for theirs, ours in (("ln_1", "ln1"), ("ln_2", "ln2")):
            found |= {f"{new}{ours}.{end[0]}": weights[f"{old}{theirs}.{end}"] for end in ("weight", "bias")}
    return found


@pytest.fixture(scope="module", params=["gpt2", "weights"])
def sorter(shared: Path, request: pytest.FixtureRequest) -> LanguageModel:
    """The sorter as a GPT-2: its linear layers are stored [out, in], GPT-2's [in, out]; and from its weights under
    TransformerLens' names.
    """
    path = shared / "models" / "nano-sort" / "gpt-nano-sort-model.json"
    settings: dict[str, Any] = json.loads(path.read_text())["config"]
    if request.param == "weights":
        named = by_transformerlens(tensors(path), settings["n_layer"], settings["n_head"])
        module, description = from_weights(named, act_fn="gelu_new")
        return attach(module, description=description, name="nano-sort")
    config = GPT2Config(
        vocab_size=settings["vocab_size"],
        n_embd=settings["n_embd"],
        n_layer=settings["n_layer"],
        n_head=settings["n_head"],
        n_positions=settings["block_size"],
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    model = GPT2LMHeadModel(config).eval()
    weights = {k: v for k, v in tensors(path).items() if not k.endswith(".attn.bias")}  # that one is the causal mask
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    weights = {k: v.T.contiguous() if k.endswith(turned) else v for k, v in weights.items()}
    model.load_state_dict(weights, strict=True)
    return attach(model, name="nano-sort")


def test_the_authors_values_are_ours(sorter: LanguageModel, golden: dict[str, Tensor]) -> None:
    """The first layer in full, then each block's output, the final norm and the logits."""
    run = sorter.run(golden["idx"].long(), capture=sorter.sites().present())
    first = "blocks.0"
    heads = {name: golden[name].transpose(1, 2) for name in ("q", "k", "v")}  # [b H p h] -> [b p H h]
    expected = {
        "embed": golden["tok_emb"],
        "pos_embed": golden["pos_emb"].expand(3, -1, -1),
        f"{first}.resid_pre": golden["x"],
        f"{first}.attn.in": golden["ln1"],
        f"{first}.attn.q": heads["q"],
        f"{first}.attn.k": heads["k"],
        f"{first}.attn.v": heads["v"],
        f"{first}.attn.rot_q": heads["q"],
        f"{first}.attn.scores": golden["att"],
        f"{first}.attn.pattern": golden["attSm"],
        f"{first}.attn.z": golden["y"].unflatten(-1, (3, -1)),
        f"{first}.attn.out": golden["yProj"],
        f"{first}.resid_mid": golden["attnResid"],
        f"{first}.mlp.in": golden["ln2"],
        f"{first}.mlp.pre": golden["fc"],
        f"{first}.mlp.post": golden["gelu"],
        f"{first}.mlp.out": golden["mlp"],
        f"{first}.resid_post": golden["block0"],
        "blocks.1.resid_post": golden["block1"],
        "blocks.2.resid_post": golden["block2"],
        "logits": golden["lm_head"],
    }
    for site, value in expected.items():
        ours = run[site]
        assert ours.shape == value.shape, site
        hidden = value == -torch.inf
        assert torch.equal(ours == -torch.inf, hidden), site
        left, right = ours.masked_fill(hidden, 0), value.masked_fill(hidden, 0)
        torch.testing.assert_close(left, right, rtol=1e-5, atol=2e-5, msg=lambda text, site=site: f"{site}: {text}")
    norm = sorter.family.ln_final
    assert norm is not None
    assert norm.weight is not None
    assert norm.bias is not None
    gained = run["ln_final.normalized"] * norm.weight + norm.bias
    torch.testing.assert_close(gained, golden["ln_f"], rtol=1e-5, atol=2e-5)
    assert run.logits is not None
    torch.testing.assert_close(run.logits.softmax(-1), golden["probs"], rtol=1e-4, atol=1e-6)


def test_the_sorter_sorts(sorter: LanguageModel) -> None:
    """Six digits in, the same digits in order out: the last of the prompt and five new tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 3, (32, 6), generator=generator).tolist()
    run = sorter.run([[*row, *sorted(row)[:-1]] for row in rows])
    assert run.logits is not None
    answers = run.logits[:, 5:].argmax(-1).tolist()
    assert sum(answer == sorted(row) for answer, row in zip(answers, rows, strict=True)) >= 31
    assert sorter.selftest().passed


def test_it_does_its_task_and_no_other(sorter: LanguageModel) -> None:
    """Pairs of token ids: six digits and the sorted ones so far; one digit of the six decides what comes next."""
    rng = random.Random(0)
    pairs = []
    while len(pairs) < 60:
        row = [rng.randrange(3) for _ in range(6)]
        other = [*row]
        other[rng.randrange(6)] = rng.randrange(3)
        shown = rng.randrange(6)
        ours, theirs = sorted(row), sorted(other)
        if ours[:shown] == theirs[:shown] and ours[shown] != theirs[shown]:
            clean, corrupt = ((*numbers, *ours[:shown]) for numbers in (row, other))
            pairs.append(PromptPair(clean, corrupt, ours[shown], theirs[shown]))
    found = task_accuracy(sorter, pairs, criterion="top1")
    assert found.value == 1
    assert found.control is not None
    assert found.control < 0.5
    assert found.logit_difference_interval[0] > 2
    for result in try_tasks(sorter, all_tasks(), n=8):
        assert not result.able
        assert any(why in result.reason for why in ("no tokenizer", "too few tokens", "no chat template"))
