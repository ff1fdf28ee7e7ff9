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
from cutaway.causal.circuits.discovery import Search, discover
from cutaway.causal.circuits.evidence import Evaluation
from cutaway.causal.patching.patch import patch_grid
from cutaway.data.harvesting.harvest import harvest
from cutaway.data.pairs import PromptPair
from cutaway.dictionaries.training.api import train
from cutaway.model.language_model import LanguageModel, attach
from cutaway.observe.attribution.attribution import attribute
from cutaway.observe.heads.circuits import composition, copying_scores
from cutaway.observe.heads.table import head_table
from cutaway.observe.lens.logit_lens import logit_lens
from cutaway.observe.random_weights import untrained

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
    assert not any(
        part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in module.modules()
    )
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
        with pytest.raises(CutawayError, match="takes no attention_mask, so it cannot read left-padded rows together"):
            lm.generate([[1, 2, 3], [4, 5]], max_new_tokens=2)


# The instruments ----------------------------------------------------------------------------------------------------


def test_lens_heads_patch_circuit_train(own: tuple[nn.Module, LanguageModel], tmp_path: Path) -> None:
    module, lm = own
    pairs = answered_pairs(lm)
    ids = [int(one) for one in pairs[0].clean]
    lens = logit_lens(lm, [ids], 3)
    wanted = logits_of(module, [ids])[0, -1].log_softmax(-1)
    assert int(lens.top_ids[-1, 0, -1, 0]) == int(wanted.argmax()) == pairs[0].answer
    assert f"#{pairs[0].answer}" in lens.table()

    table = head_table(lm, n=4, length=3)
    assert table.kinds["previous"].score.shape == (lm.n_layers, lm.n_heads)
    pattern = lm.run([[3, 5, 7]], capture="blocks.0.attn.pattern")["blocks.0.attn.pattern"]
    assert float(pattern[0, 0, 0, 0]) == 1.0
    assert copying_scores(lm).score.shape == (lm.n_layers, lm.n_heads)
    if lm.n_layers > 1:
        composition(lm)

    parts = attribute(lm, [ids], pairs[0].answer, pairs[0].wrong, by="head")
    assert abs(float(parts.total[0]) - sum(float(p.values[0, 0].sum()) for p in parts.groups)) < 1e-3

    grid = patch_grid(lm, pairs, over="positions")
    difference = grid.clean - grid.corrupt  # by hand: the clean stream at the only token that differs, behind layer 0
    rows, others = ([list(ids) for ids in side] for side in zip(*((p.clean, p.corrupt) for p in pairs), strict=True))
    source = lm.run(rows, capture="blocks.0.resid_post")
    patched = lm.run(others, edits=cutaway.patch("blocks.0.resid_post", source, positions=2), logits="last").logits
    assert patched is not None
    ends = [(int(p.answer), int(p.wrong)) for p in pairs]
    moved = torch.stack([patched[i, 0, a] - patched[i, 0, b] for i, (a, b) in enumerate(ends)]) - grid.corrupt
    kept = ~grid.values[0, 2].isnan()  # the others' clean and corrupt run hardly differ
    assert int(kept.sum()) >= 8
    wanted = (moved / difference)[kept].to(grid.values.dtype)
    torch.testing.assert_close(grid.values[0, 2][kept], wanted, rtol=1e-3, atol=1e-3)
    patch_grid(lm, pairs, over="heads")

    circuit = discover(lm, pairs[:8], pairs[8:], size=0.6, evaluation=Evaluation(5), force=True)
    whole = discover(lm, pairs[:8], pairs[8:], size=1.0, evaluation=Evaluation(5, deep=False), force=True)
    assert circuit.mask.sum() < whole.mask.sum()
    assert circuit.evidence is not None

    rows = torch.tensor(rows_of(lm, 200, 10))
    store = harvest(lm, rows.tolist(), "blocks.0.resid_post", tokens=300)
    stream = lm.run(rows[:1], capture="blocks.0.resid_post")["blocks.0.resid_post"]
    torch.testing.assert_close(store[0]["blocks.0.resid_post"], stream[0, 1])  # the first position is left out
    trained = train(lm, "blocks.0.mlp.out", corpus=rows, d_sae=32, k=4, tokens=4096, batch=128, out=tmp_path / "sae")
    last = trained["blocks.0.mlp.out"].history[-1]
    assert last["variance_explained"] > 0.3


def test_an_untrained_twin_begins_as_its_modules_do() -> None:
    module, description = made("gpt")
    lm = attach(module, description=description)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    twin = untrained(lm, seed=3)
    fresh = {name.removeprefix("module."): value for name, value in twin.hf.state_dict().items()}
    assert torch.equal(fresh["ln_f.weight"], torch.ones(16))
    assert not torch.equal(fresh["head.weight"], before["head.weight"])
    assert float(fresh["head.weight"].abs().max()) <= 0.25  # torch's own bound, 1/√16
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    module, description = made("bare")
    with pytest.raises(CutawayError, match="nothing says how pos begins"):
        untrained(attach(module, description=description))


def test_the_mode_of_the_module_is_its_users() -> None:
    module, description = made("gpt")
    module.train()
    lm = attach(module, description=description)
    assert lm.hf.training
    assert module.training
    module.eval()
    assert not lm.hf.training
    lm.hf.train()
    assert module.training


# What is refused ----------------------------------------------------------------------------------------------------


def refused(**changes: Any) -> str:
    """What is said to a GPT whose description has these fields instead."""
    torch.manual_seed(0)
    module = Gpt(layers=1).eval()
    with pytest.raises(CutawayError) as error:
        attach(module, description=replace(GPT, **changes))
    said = str(error.value)
    assert "docs/your-own-model.md" in said
    assert said.count("docs/") == 1
    assert "\n" not in said
    return said


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"blocks": "blocks"}, "has no module 'blocks'; it has wte, wpe, h, ln_f, head"),
        ({"blocks": "head"}, "blocks='head' is a Linear, not a list"),
        ({"output": "attn.projection"}, "attn has no module 'projection'; it has qkv, proj"),
        ({"norm1": None}, "resid_pre = attn.in, without a norm between"),
        ({"final_norm": None}, "W_U = logits"),
        ({"norm1": "ln_2", "norm2": "ln_1"}, "at layer 0: resid_pre + attn.out = resid_mid"),
        ({"n_heads": 2, "scale": None}, "attention module Attention calls neither"),
        ({"n_heads": 3}, "which 3 heads do not share"),
        ({"qkv_by_head": True}, "attn.rot_q is attn.q turned"),
        ({"scale": 0.25}, "scaled = attn.scores"),
        ({"causal": False}, "it says causal=False, and another last token changes no logit before it"),
        ({"parallel": True}, "at layer 0"),
        ({"context": 25}, "its forward raises IndexError"),
        ({"mlp_in": "mlp.2"}, "mlp_in='mlp.2' reads 64 numbers, and 16 are there"),
        ({"mlp_in": "mlp.1"}, "GELU does not say how many numbers it reads"),
        ({"attention": "mlp"}, "attention module Sequential calls neither"),
        ({"unembed": "ln_f"}, "LayerNorm"),
        ({"embed": "wpe"}, "its forward raises IndexError: index out of range"),
    ],
)
def test_a_wrong_description_is_refused_with_the_reason(changes: dict[str, Any], says: str) -> None:
    assert says in refused(**changes)


def test_fields_are_checked() -> None:
    for fields, says in [
        ({"n_heads": 4}, "lacks context"),
        ({"n_heads": 4, "context": 8, "qvk": "c"}, "no field 'qvk'; did you mean qkv?"),
        ({"n_heads": 0, "context": 8, "qkv": "c"}, "n_heads is a whole number from 1 on, not 0"),
        ({"n_heads": 4, "context": 8}, "name one or the other"),
        ({"n_heads": 4, "context": 8, "q": "q", "v": "v"}, "name one or the other"),
        ({"n_heads": 4, "context": 8, "qkv": "c", "n_kv_heads": 3}, "does not divide"),
        ({"n_heads": 4, "context": 8, "qkv": 3}, "qkv is the name of a module"),
        ({"n_heads": 4, "context": 8, "qkv": "c", "causal": 1}, "causal is True or False"),
        (["n_heads"], "not a list"),
    ]:
        with pytest.raises(CutawayError, match=r"docs/your-own-model\.md") as error:
            attach(Gpt(), description=fields)  # type: ignore[arg-type]
        assert says in str(error.value)


def test_other_things_that_are_refused() -> None:
    with pytest.raises(CutawayError, match=r"or a module with description=.*docs/your-own-model.md"):
        attach(Gpt())

    class Last(Gpt):
        def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
            return super().forward(ids)[0][:, -1:], None

    with pytest.raises(CutawayError, match=r"returns \[3, 1, 21\], not logits \[3, 24, 21\]"):
        attach(Last(), description=GPT)

    class Leaky(Gpt):
        def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
            logits = super().forward(ids)[0]
            return logits + logits.mean(1, keepdim=True), None

    with pytest.raises(CutawayError, match="it says causal=True, and another last token changes the logits before it"):
        attach(Leaky(), description=GPT)

    class Called(Gpt):
        def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
            x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
            for block in self.h:
                x = block.forward(x)
            return self.head(self.ln_f(x)), None

    with pytest.raises(CutawayError, match="does not call the module that blocks='h' names"):
        attach(Called(), description=GPT)


def test_a_context_that_is_too_long_to_be_tried_shows_when_it_is_used() -> None:
    torch.manual_seed(0)
    lm = attach(Gpt(context=70).eval(), description=replace(GPT, context=100))
    assert lm.run([[1] * 70]).logits is not None
    with pytest.raises(CutawayError, match=r"not as described: on ids \[1, 90\] its forward raises IndexError"):
        lm.run([[1] * 90])


def test_absent_norms_say_so_by_name() -> None:
    module, description = made("bare")
    lm = attach(module, description=description)
    for site, reason in [
        ("ln_final.scale", "no norm before the unembedding"),
        ("blocks.0.ln1.normalized", "no norm before attention"),
        ("blocks.0.ln2.scale", "no norm before the MLP"),
    ]:
        with pytest.raises(CutawayError, match=reason):
            lm.run([[1, 2]], capture=site)


def test_ids_stand_for_text_and_text_is_refused_in_a_sentence(own: tuple[nn.Module, LanguageModel]) -> None:
    _, lm = own
    tokens = lm.tokens("#3 #5 #1")
    assert tokens.ids.tolist() == [[3, 5, 1]]
    assert tokens.strings == (("#3", "#5", "#1"),)
    with pytest.raises(CutawayError, match="'three' is no token id, and this model has no tokenizer"):
        lm.tokens("#3 three")
    with pytest.raises(CutawayError, match=f"between 0 and {lm.d_vocab_in - 1}"):
        lm.tokens(f"#{lm.d_vocab_in}")


def test_the_ids_that_are_read_and_those_that_are_answered_are_told_apart() -> None:
    module, description = made("unequal")
    lm = attach(module, description=description)
    assert (lm.d_vocab_in, lm.d_vocab) == (12, 10)
    assert "12 in, 10 out" in repr(lm)
    assert lm.run([[11, 10, 3]]).logits.shape == (1, 3, 10)  # type: ignore[union-attr]
    with pytest.raises(CutawayError, match="between 0 and 9, those that Unequal answers with"):
        lm.output_directions([10])
    pair = PromptPair((11, 2, 3), (10, 2, 3), 10, 1)
    with pytest.raises(CutawayError, match="no token 10"):
        patch_grid(lm, [pair])


def test_a_model_that_sees_both_ways() -> None:
    """Rows of unequal length cannot stand together without a mask, and the self-test passes without causality."""

    class Both(Gpt):
        def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Tensor, "tril", lambda self: self)
                return super().forward(ids)

    torch.manual_seed(0)
    lm = attach(Both().eval(), description=replace(GPT, causal=False))
    assert lm.selftest().passed
    assert float(lm.run([[1, 2, 3]], capture="blocks.0.attn.pattern")["blocks.0.attn.pattern"][0, 0, 0, 2]) > 0
    with pytest.raises(
        CutawayError, match="takes no attention_mask, so it cannot read rows of unequal length together"
    ):
        lm.run([[1, 2, 3], [4, 5]])


def test_keys_that_heads_share() -> None:
    module, description = made("unequal", kv=2)
    lm = attach(module, description=replace(description, n_kv_heads=2))
    assert lm.sites()["blocks.0.attn.rot_k"].shape[2] == 2
    assert lm.run([[1, 2, 3]], capture="blocks.0.attn.rot_k")["blocks.0.attn.rot_k"].shape == (1, 3, 2, 4)
    pairs = answered_pairs(lm)
    with pytest.raises(CutawayError, match="grouped=True"):
        discover(lm, pairs[:8], pairs[8:], size=0.5, evaluation=Evaluation(5, deep=False), force=True)
    quick = Evaluation(5, deep=False)
    discover(lm, pairs[:8], pairs[8:], size=0.5, search=Search(grouped=True), evaluation=quick, force=True)
