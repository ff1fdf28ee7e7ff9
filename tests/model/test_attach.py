"""A module that is not one of transformers, with a description: it is looked into like any other model."""

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from own_models import GPT, MODELS, Gpt, made
from torch import Tensor, nn

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.causal.discover import discover
from cutaway.causal.patching import patch_grid
from cutaway.data.harvest import harvest
from cutaway.data.pairs import PromptPair
from cutaway.dictionaries.api import train
from cutaway.model.language_model import LanguageModel, attach
from cutaway.model.own import Description
from cutaway.observe.attribution import attribute
from cutaway.observe.circuits import composition, copying_scores
from cutaway.observe.head_table import head_table
from cutaway.observe.logit_lens import logit_lens

NAMES = list(MODELS)


@pytest.fixture(params=NAMES)
def own(request: pytest.FixtureRequest) -> tuple[nn.Module, LanguageModel]:
    module, description = made(request.param)
    return module, attach(module, description=description)


def rows_of(lm: LanguageModel, n: int, length: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, lm.d_vocab_in, (n, length), generator=generator).tolist()


def answered_pairs(lm: LanguageModel, n: int = 16, length: int = 7) -> list[PromptPair]:
    """Pairs that a model does right, since its own answers are what is right."""
    found: list[PromptPair] = []
    rng = random.Random(0)
    for row in rows_of(lm, 400, length):
        other = [*row]
        other[2] = rng.randrange(lm.d_vocab_in)
        right, wrong = (int(lm.run([ids], logits="last").logits[0, 0].argmax()) for ids in (row, other))  # type: ignore[index]
        if right != wrong:
            found.append(PromptPair(tuple(row), tuple(other), right, wrong))
        if len(found) == n:
            break
    assert len(found) == n
    return found


def logits_of(module: nn.Module, ids: Any) -> Tensor:
    with torch.no_grad():
        found = module(torch.tensor(ids))
    return found[0] if isinstance(found, tuple) else found


# Reading ------------------------------------------------------------------------------------------------------------


def test_the_module_stays_what_it_was(own: tuple[nn.Module, LanguageModel]) -> None:
    module, lm = own
    before = {name: value.clone() for name, value in module.state_dict().items()}
    rows = rows_of(lm, 3, 9)
    plain = logits_of(module, rows)
    assert torch.equal(lm.run(rows).logits, plain)  # type: ignore[arg-type]
    seen = lm.run(rows, capture=lm.sites().present())
    torch.testing.assert_close(seen.logits, plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits_of(module, rows), plain)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in module.modules())
    assert lm.hf.module is module
    assert lm.selftest().passed


def test_pattern_and_scores_are_those_of_the_module() -> None:
    """By hand from the first layer's weights, for each way in which the three compute attention."""
    for name in NAMES:
        module, description = made(name)
        lm = attach(module, description=description)
        run = lm.run(rows_of(lm, 2, 6), capture=lm.sites().present())
        q, k, v = (run[f"blocks.0.attn.{part}"].double() for part in ("rot_q", "rot_k", "v"))
        scale = description.scale or q.shape[-1] ** -0.5
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k) * scale
        scores = scores.masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -math.inf)
        assert torch.equal(run["blocks.0.attn.scores"] == -math.inf, scores == -math.inf)
        torch.testing.assert_close(run["blocks.0.attn.scores"].double().exp(), scores.exp(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(run["blocks.0.attn.pattern"].double(), scores.softmax(-1), rtol=1e-4, atol=1e-6)
        z = torch.einsum("bhqk,bkhe->bqhe", scores.softmax(-1), v)
        torch.testing.assert_close(run["blocks.0.attn.z"].double(), z, rtol=1e-4, atol=1e-5)


def test_an_edit_of_the_pattern_has_its_effect(own: tuple[nn.Module, LanguageModel]) -> None:
    """Attention to the first token alone, by hand: its value, through the output projection."""
    _, lm = own
    rows = rows_of(lm, 2, 5)
    layer = lm.n_layers - 1
    base = lm.run(rows, capture=[f"blocks.{layer}.attn.v", f"blocks.{layer}.attn.z"])
    first = torch.zeros(5)
    first[0] = 1.0
    run = lm.run(rows, edits=cutaway.set(f"blocks.{layer}.attn.pattern", first, heads=1), capture="blocks.*.attn.z")
    z = run[f"blocks.{layer}.attn.z"]
    torch.testing.assert_close(z[:, :, 1], base[f"blocks.{layer}.attn.v"][:, :1, 1].expand_as(z[:, :, 1]))
    torch.testing.assert_close(z[:, :, 0], base[f"blocks.{layer}.attn.z"][:, :, 0])
    assert run.receipts[0].mean_abs_delta > 0


def test_padded_rows_are_what_each_is_alone(own: tuple[nn.Module, LanguageModel]) -> None:
    _, lm = own
    rows = [row[:n] for row, n in zip(rows_of(lm, 3, 8), (8, 3, 5), strict=True)]
    together = lm.run(rows, logits="last", capture="blocks.*.resid_post")
    for i, row in enumerate(rows):
        alone = lm.run([row], logits="last", capture="blocks.*.resid_post")
        torch.testing.assert_close(together.logits[i], alone.logits[0], rtol=1e-5, atol=1e-5)  # type: ignore[index]
        torch.testing.assert_close(together.last("blocks.0.resid_post")[i], alone.last("blocks.0.resid_post")[0])


def test_gradients_are_autograds(own: tuple[nn.Module, LanguageModel]) -> None:
    _, lm = own
    row = rows_of(lm, 1, 6)
    sites = ["embed", "blocks.0.attn.pattern", "blocks.0.attn.z", "blocks.0.mlp.post"]
    sites += ["pos_embed"] if lm.family.has_positions else []
    run = lm.run(row, capture=sites, logits="last", grad=lambda logits: logits[:, -1, 2].double())
    for site in sites:
        grid = site.endswith("pattern")
        step = torch.zeros_like(run[site])
        at = (0, 0, 5, 2) if grid else (0, *(n - 1 for n in step.shape[1:]))
        step[at] = 1e-2
        up, down = (
            lm.run(row, edits=cutaway.set(site, value[0].transpose(0, 1) if grid else value[0]), logits="last").logits
            for value in (run[site] + step, run[site] - step)
        )
        assert up is not None
        assert down is not None
        slope = float(up[0, -1, 2] - down[0, -1, 2]) / 2e-2
        assert float(run.grads[site][at]) == pytest.approx(slope, rel=0.05, abs=2e-3), site


def test_generation_is_the_loop_written_out() -> None:
    for name in ("gpt", "bare", "unequal"):
        module, description = made(name)
        lm = attach(module, description=description)
        row = rows_of(lm, 1, 4)[0]
        found = lm.generate([row], max_new_tokens=6, capture="blocks.0.resid_post")
        wanted = [*row]
        for _ in range(6):
            wanted.append(int(logits_of(module, [wanted])[0, -1].argmax()))
        assert list(found.new_ids[0]) == wanted[4:]
        again = lm.run([wanted], capture="blocks.0.resid_post")["blocks.0.resid_post"]
        torch.testing.assert_close(found["blocks.0.resid_post"], again)


# The instruments ----------------------------------------------------------------------------------------------------


def test_lens_heads_patch_circuit_train(own: tuple[nn.Module, LanguageModel], tmp_path: Path) -> None:
    module, lm = own
    pairs = answered_pairs(lm)
    lens = logit_lens(lm, [list(pairs[0].clean)], 3)
    wanted = logits_of(module, [list(pairs[0].clean)])[0, -1].log_softmax(-1)
    assert int(lens.top_ids[-1, 0, -1, 0]) == int(wanted.argmax()) == pairs[0].answer
    assert f"#{pairs[0].answer}" in lens.table()

    table = head_table(lm, n=4, length=3)
    assert table.kinds["previous"].score.shape == (lm.n_layers, lm.n_heads)
    pattern = lm.run([[3, 5, 7]], capture="blocks.0.attn.pattern")["blocks.0.attn.pattern"]
    assert float(pattern[0, 0, 0, 0]) == 1.0
    assert copying_scores(lm).score.shape == (lm.n_layers, lm.n_heads)
    if lm.n_layers > 1:
        composition(lm)

    parts = attribute(lm, [list(pairs[0].clean)], pairs[0].answer, pairs[0].wrong, by="head")
    assert abs(float(parts.total[0]) - sum(float(p.values[0, 0].sum()) for p in parts.groups)) < 1e-3

    grid = patch_grid(lm, pairs, over="positions")
    difference = grid.clean - grid.corrupt  # by hand: the clean stream at the only token that differs, behind layer 0
    rows, others = ([list(ids) for ids in side] for side in zip(*((p.clean, p.corrupt) for p in pairs), strict=True))
    source = lm.run(rows, capture="blocks.0.resid_post")
    patched = lm.run(others, edits=cutaway.patch("blocks.0.resid_post", source, positions=2), logits="last").logits
    assert patched is not None
    moved = torch.stack([patched[i, 0, p.answer] - patched[i, 0, p.wrong] for i, p in enumerate(pairs)]) - grid.corrupt
    kept = ~grid.values[0, 2].isnan()  # the others' clean and corrupt run hardly differ
    assert int(kept.sum()) >= 8
    wanted = (moved / difference)[kept].to(grid.values.dtype)
    torch.testing.assert_close(grid.values[0, 2][kept], wanted, rtol=1e-3, atol=1e-3)
    patch_grid(lm, pairs, over="heads")

    circuit = discover(lm, pairs[:8], pairs[8:], fraction=0.6, draws=5, force=True)
    whole = discover(lm, pairs[:8], pairs[8:], fraction=1.0, draws=5, force=True, deep=False)
    assert circuit.mask.sum() < whole.mask.sum()
    assert circuit.evidence is not None

    rows = torch.tensor(rows_of(lm, 200, 10))
    store = harvest(lm, rows.tolist(), "blocks.0.resid_post", tokens=300)
    torch.testing.assert_close(store[0]["blocks.0.resid_post"], lm.run(rows[:1], capture="blocks.0.resid_post")["blocks.0.resid_post"][0, 1])  # fmt: skip
    trained = train(lm, "blocks.0.mlp.out", corpus=rows, d_sae=32, k=4, tokens=4096, batch=128, out=tmp_path / "sae")
    last = trained["blocks.0.mlp.out"].history[-1]
    assert last["variance_explained"] > 0.3
