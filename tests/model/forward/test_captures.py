"""Captured values equal what transformers itself returns and what hand-written hooks see."""

import copy

import pytest
import torch
from hand_hooks import eager_copy
from hypothesis import given, settings
from hypothesis import strategies as st
from subject import Subject, Subjects, close, plain
from tiny import LAYERS, tiny_config, tiny_model

from cutaway.artifacts.errors import CutawayError
from cutaway.model.attention.dispatch import allowed
from cutaway.model.language_model import LanguageModel, attach
from cutaway.model.tokens import Tokens, pad_rows


@pytest.mark.parametrize("side", ["right", "left"])
def test_streams_and_patterns_are_those_of_transformers(subject: Subject, side: str) -> None:
    tokens = subject.tokens(side)
    lm, real = subject.lm, tokens.mask
    theirs = plain(eager_copy(subject.hf), tokens, output_hidden_states=True, output_attentions=True)
    run = lm.run(tokens, capture=["blocks.*.resid_pre", "blocks.*.resid_post", "blocks.*.attn.pattern"])
    for layer in range(LAYERS):
        assert torch.equal(run[f"blocks.{layer}.resid_pre"][real], theirs.hidden_states[layer][real])
        pattern = run[f"blocks.{layer}.attn.pattern"].transpose(1, 2)[real]
        assert torch.equal(pattern, theirs.attentions[layer].transpose(1, 2)[real])
        if layer + 1 < LAYERS:
            assert torch.equal(run[f"blocks.{layer}.resid_post"][real], theirs.hidden_states[layer + 1][real])
    final = subject.hf.get_submodule(subject.by_hand.names.final)
    with torch.no_grad():
        assert torch.equal(final(run[f"blocks.{LAYERS - 1}.resid_post"])[real], theirs.hidden_states[-1][real])
    assert run.logits is not None
    assert torch.equal(run.logits[real], theirs.logits[real])


@pytest.mark.parametrize("side", ["right", "left"])
def test_every_site_is_what_hand_written_hooks_see(subject: Subject, side: str) -> None:
    tokens = subject.tokens(side)
    sites = subject.lm.sites().present()
    run = subject.lm.run(tokens, capture=sites)
    expected = subject.by_hand.values(tokens.ids, tokens.mask, sites)
    assert run.sites == tuple(sites)
    for site in sites:
        ours, theirs = run[site], expected[site].expand_as(run[site])
        if site.endswith((".scores", ".pattern")):
            ours, theirs = ours.transpose(1, 2), theirs.transpose(1, 2)
        close(ours[tokens.mask], theirs[tokens.mask])


def test_captures_beside_the_models_own_kernel(subject: Subject) -> None:
    """Without scores or pattern, attention stays the model's own kernel: the logits are the same bits."""
    tokens = subject.tokens("right")
    sites = [s for s in subject.lm.sites().present() if not s.endswith((".scores", ".pattern"))]
    run = subject.lm.run(tokens, capture=sites)
    expected = subject.by_hand.values(tokens.ids, tokens.mask, sites)
    assert run.logits is not None
    assert torch.equal(run.logits, plain(subject.hf, tokens).logits)
    for site in sites:
        close(run[site][tokens.mask], expected[site].expand_as(run[site])[tokens.mask], 3e-5)


def test_shapes_and_sizes_are_those_announced(subject: Subject) -> None:
    tokens, table = subject.tokens(), subject.lm.sites()
    run = subject.lm.run(tokens, capture=table.present())
    b, p = tokens.ids.shape
    sizes: dict[str | int, int] = {"b": b, "p": p, "q": p, "k": p}
    for name in run.sites:
        assert run[name].shape == tuple(sizes.get(part, part) for part in table[name].shape), name


def test_a_window_hides_keys_in_the_layers_that_have_one(of_family: Subjects) -> None:
    subject = of_family("gemma2")
    tokens = subject.tokens(rows=[subject.rows[0]])
    run = subject.lm.run(tokens, capture="blocks.*.attn.scores")
    seen = [(run[f"blocks.{layer}.attn.scores"][0, 0, -1] > -torch.inf).sum().item() for layer in range(LAYERS)]
    assert seen == [5, 11, 5]


@settings(max_examples=80)
@given(
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(0, 5),
    st.none() | st.integers(1, 7),
    st.sampled_from(["none", "rows", "bool", "float"]),
    st.integers(0, 1000),
)
def test_what_a_query_sees_whatever_form_the_mask_has(
    b: int, n_queries: int, cached: int, window: int | None, form: str, seed: int
) -> None:
    """Kernels are given no mask, one a row, or a grid of booleans or of numbers; brute force says what each allows."""
    n_keys = cached + n_queries
    generator = torch.Generator().manual_seed(seed)
    real = torch.rand(b, n_keys, generator=generator) < 0.7
    grid = torch.rand(b, 1, n_queries, n_keys, generator=generator) < 0.6
    lowest = torch.finfo(torch.float32).min
    masks = {"none": None, "rows": real, "bool": grid, "float": torch.zeros(grid.shape).masked_fill(~grid, lowest)}
    found = allowed(masks[form], n_queries, n_keys, window, torch.device("cpu")).expand(b, 1, n_queries, n_keys)
    for row in range(b):
        for q in range(n_queries):
            for k in range(n_keys):
                at = cached + q
                causal = k <= at and (window is None or at - k < window)
                wanted = {"none": causal, "rows": causal and bool(real[row, k])}.get(form, bool(grid[row, 0, q, k]))
                assert bool(found[row, 0, q, k]) == wanted


def test_two_models_on_one_configuration_do_not_touch_each_other() -> None:
    config = tiny_config("llama")
    first, second = tiny_model("llama", config=config), tiny_model("llama", seed=1, config=config)
    lm, other = attach(first), attach(second)
    tokens = lm.tokens([[5, 6, 7, 8], [9, 10]])
    before = [plain(m, tokens).logits for m in (first, second)]
    stored = config.to_dict()
    one = lm.run(tokens, capture=["blocks.*.attn.pattern", "blocks.0.attn.rot_q"])
    two = other.run(tokens, capture="blocks.*.attn.pattern")
    theirs = plain(eager_copy(second), tokens, output_attentions=True).attentions
    assert torch.equal(two.stack("blocks.*.attn.pattern")[..., :2, :2], torch.stack(theirs)[..., :2, :2])
    assert not torch.equal(one["blocks.0.attn.pattern"], two["blocks.0.attn.pattern"])
    assert first.config is second.config is config
    assert config._attn_implementation == "sdpa"
    assert config.to_dict() == stored
    for model, logits in zip((first, second), before, strict=True):
        assert torch.equal(plain(model, tokens).logits, logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "gemma2"])
def test_patterns_are_eagers_in_short_floats(of_family: Subjects, family: str, dtype: torch.dtype) -> None:
    model = copy.deepcopy(of_family(family).hf).to(dtype=dtype)  # type: ignore[call-arg]
    lm = attach(model)
    tokens = lm.tokens([of_family(family).rows[0]])
    run = lm.run(tokens, capture=["blocks.*.attn.pattern", "blocks.*.resid_pre"])
    theirs = plain(eager_copy(model), tokens, output_attentions=True, output_hidden_states=True)
    for layer in range(LAYERS):
        assert torch.equal(run[f"blocks.{layer}.attn.pattern"], theirs.attentions[layer])
        assert run[f"blocks.{layer}.resid_pre"].dtype == dtype
        assert torch.equal(run[f"blocks.{layer}.resid_pre"], theirs.hidden_states[layer])


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_a_captured_pattern_keeps_float64(of_family: Subjects, family: str) -> None:
    """Eager kernels take their softmax in fp32; in float64 the captured one equals SDPA, which does not."""
    model = copy.deepcopy(of_family(family).hf).double()
    lm = attach(model)
    tokens = of_family(family).tokens("left")
    run = lm.run(tokens, capture="blocks.*.attn.pattern")
    assert run.logits is not None
    close(run.logits[tokens.mask], plain(model, tokens).logits[tokens.mask], 1e-13)


def test_captures_alias_nothing(subject: Subject) -> None:
    tokens = subject.tokens()
    sites = subject.lm.sites().present()
    run = subject.lm.run(tokens, capture=sites)
    kept = {name: run[name].clone() for name in sites}
    parameters = {p.untyped_storage().data_ptr() for p in subject.hf.parameters()}
    storages = [run[name].untyped_storage().data_ptr() for name in sites]
    assert len({*storages}) == len(storages)
    assert not parameters & {*storages}
    assert run.logits is not None
    assert run.logits.untyped_storage().data_ptr() not in storages
    for name in sites[::2]:
        run[name].fill_(7.0)
    for name in sites[1::2]:
        assert torch.equal(run[name], kept[name])
    again = subject.lm.run(tokens, capture=sites)
    assert all(torch.equal(again[name], kept[name]) for name in sites)


def test_one_row_alone_equals_the_row_in_a_batch(subject: Subject) -> None:
    tokens = subject.tokens("left")
    sites = ["blocks.*.resid_post", "blocks.*.attn.z", "blocks.*.mlp.post"]
    batch = subject.lm.run(tokens, capture=sites)
    assert batch.logits is not None
    for row, ids in enumerate(subject.rows):
        alone = subject.lm.run(ids, capture=sites)
        assert alone.logits is not None
        close(batch.logits[row][tokens.mask[row]], alone.logits[0])
        for site in alone.sites:
            close(batch[site][row][tokens.mask[row]], alone[site][0])


@pytest.mark.parametrize("side", ["right", "left"])
def test_last_is_each_rows_last_real_token(subject: Subject, side: str) -> None:
    tokens = subject.tokens(side)
    full = subject.lm.run(tokens, capture=["blocks.1.resid_post", "blocks.1.attn.pattern"])
    last = subject.lm.run(tokens, capture="logits", logits="last")
    cut = subject.lm.run(tokens, logits="last")
    columns = [10, 6, 3] if side == "right" else [10, 10, 10]
    assert full.logits is not None
    assert last.logits is not None
    assert cut.logits is not None
    assert cut.logits.shape == (3, 1, subject.lm.d_vocab)
    for row, column in enumerate(columns):
        close(cut.logits[row, 0], full.logits[row, column])
        close(last.logits[row, 0], full.logits[row, column])
        assert torch.equal(full.last("blocks.1.resid_post")[row], full["blocks.1.resid_post"][row, column])
        pattern = full.last("blocks.1.attn.pattern")[row]
        assert torch.equal(pattern, full["blocks.1.attn.pattern"][row, :, column])


def test_stacking_layers(llama: LanguageModel) -> None:
    run = llama.run([5, 6, 7], capture=["blocks.*.mlp.out", "blocks.1.resid_pre"])
    stack = run.stack("blocks.*.mlp.out")
    assert stack.shape == (LAYERS, 1, 3, llama.d_model)
    assert all(torch.equal(stack[i], run[f"blocks.{i}.mlp.out"]) for i in range(LAYERS))


def test_weights_by_name(subject: Subject) -> None:
    """w_q, w_k, w_v, w_o and output_directions turn what a module reads into what it writes."""
    lm = subject.lm
    tokens = subject.tokens(rows=[subject.rows[0]])
    run = lm.run(tokens, capture=lm.sites().present())
    for layer in range(LAYERS):
        x = run[f"blocks.{layer}.attn.in"][0]
        for part, weight in (("q", lm.w_q(layer)), ("k", lm.w_k(layer)), ("v", lm.w_v(layer))):
            here = run[f"blocks.{layer}.attn.{part}"][0]
            by_weight = torch.einsum("pd,hde->phe", x, weight)
            bias = here - by_weight  # one vector a head, the same at each position
            assert float((bias - bias[:1]).abs().max()) < 1e-5 * float(here.abs().max())
            assert (float(bias.abs().max()) > 0.1) == (subject.family in ("qwen2", "gpt2", "neox", "neox_sequential"))
        result = torch.einsum("phe,hed->phd", run[f"blocks.{layer}.attn.z"][0], lm.w_o(layer))
        close(run[f"blocks.{layer}.attn.result"][0], result)
    stream = run[f"blocks.{LAYERS - 1}.resid_post"]
    assert run.logits is not None
    close(lm.unembed(stream), run.logits)
    site = "logits" if lm.family.final_softcap is None else "logits_precap"
    final = subject.hf.get_submodule(subject.by_hand.names.final)
    with torch.no_grad():
        close(final(stream) @ lm.output_directions([3, 50]).T, run[site][..., [3, 50]])


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_at_each_rows_last_token_however_the_run_kept_them(llama: LanguageModel, side: str) -> None:
    rows = [[4, 9, 7, 11, 5], [8, 3]]
    tokens = Tokens(*pad_rows(rows, 1, side), tuple(tuple(str(i) for i in row) for row in rows))
    whole, last = llama.run(tokens), llama.run(tokens, logits="last")
    assert whole.logits is not None
    expected = torch.stack([whole.logits[row, int(column)] for row, column in enumerate(tokens.last)])
    assert torch.equal(whole.last_logits, expected)
    close(last.last_logits, expected)
    assert whole.all_logits is whole.logits
    with pytest.raises(CutawayError, match="last tokens alone"):
        _ = last.all_logits
    with pytest.raises(CutawayError, match="no logits; run with logits='last'"):
        _ = llama.run(tokens, capture="embed", logits=None).last_logits
