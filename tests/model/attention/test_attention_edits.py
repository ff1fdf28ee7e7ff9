"""Edits inside attention, against the same change made by hand inside an untouched eager model; and what is left
behind afterwards: nothing.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from attention_models import HEADS, LAYERS, attentions, batch, eager, everywhere, forward, look, same, small
from torch import Tensor
from transformers import PreTrainedModel

import cutaway
from cutaway.model.attention import adapters
from cutaway.model.attention.dispatch import check_dispatch

ADAPTED = ("gptj", "codegen", "gpt_neo", "bloom", "mpt", "falcon", "falcon_alibi", "falcon_new", "xglm", "gpt2_upcast")
DISPATCHED = ("llama", "gpt2", "gemma2", "mistral", "deepseek_v3", "gpt_oss", "granite_swa", "flint")
ALL = (*ADAPTED, *DISPATCHED)
Change = Callable[[Tensor], Tensor]


@contextmanager
def softmax_by_hand(layer: int, before: Change | None = None, after: Change | None = None) -> Iterator[None]:
    """Change what goes into, or comes out of, the softmax of one layer's attention in every model of this process."""
    own, calls = torch.nn.functional.softmax, [-1]

    def changed(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if logits.ndim == 2:  # a router's
            return own(logits, *args, **kwargs)
        calls[0] += 1
        if calls[0] != layer:
            return own(logits, *args, **kwargs)
        grid = logits.view(-1, HEADS, *logits.shape[-2:])  # XGLM folds the heads into the batch
        weights = own(grid if before is None else before(grid), *args, **kwargs)
        return (weights if after is None else after(weights)).view(logits.shape)

    torch.nn.functional.softmax = changed
    try:
        yield
    finally:
        torch.nn.functional.softmax = own


def near(left: Tensor, right: Tensor, tolerance: float = 2e-5) -> None:
    assert float((left - right).detach().abs().max()) <= tolerance * float(right.detach().abs().max())


@pytest.mark.parametrize("name", ALL)
def test_an_edit_of_scores_is_the_same_change_by_hand(name: str) -> None:
    """Two query positions of one row's scores move by a random amount; masked cells stay masked."""
    model, tokens = eager(small(name)), batch((9, 6), "left")
    delta = torch.randn(HEADS, 9, generator=torch.Generator().manual_seed(1)) * 2
    columns = tokens.column(1, 2), tokens.column(1, -1)

    def before(logits: Tensor) -> Tensor:
        moved = logits.clone()
        for column in columns:
            moved[1, :, column, :9] += delta  # a tenth column is the sinks'
        return moved

    with torch.no_grad(), softmax_by_hand(1, before=before):
        if name == "granite_swa":  # its sinks read the scores a second time
            with pytest.MonkeyPatch.context() as patch:
                own, calls = torch.logsumexp, [-1]

                def total(logits: Tensor, **kwargs: Any) -> Tensor:
                    calls[0] += 1
                    return own(before(logits) if calls[0] == 1 else logits, **kwargs)

                patch.setattr(torch, "logsumexp", total)
                wanted = forward(model, tokens).logits
        else:
            wanted = forward(model, tokens).logits
    edit = cutaway.add("blocks.1.attn.scores", delta, rows=1, positions=[2, -1])
    run = look(model, tokens, ["blocks.1.attn.scores", "blocks.1.attn.pattern"], [edit])
    near(run.out.logits[tokens.mask], wanted[tokens.mask])
    scores, pattern = run.values["blocks.1.attn.scores"], run.values["blocks.1.attn.pattern"]
    plain = look(model, tokens, ["blocks.1.attn.scores"])
    hidden = plain.values["blocks.1.attn.scores"] == -torch.inf
    assert torch.equal(scores == -torch.inf, hidden)
    real = tokens.mask[:, None, :, None].expand_as(hidden)
    assert bool((pattern[hidden & real] == 0).all())
    receipts = run.execution.receipts(tokens.first)
    assert receipts[0].positions == ((2, 5),)
    with torch.no_grad():
        assert float((wanted - forward(model, tokens).logits).abs().max()) > 1e-2


@pytest.mark.parametrize("name", ALL)
def test_an_edit_of_a_pattern_is_the_same_change_by_hand(name: str) -> None:
    model, tokens = eager(small(name)), batch((9,))

    def after(weights: Tensor) -> Tensor:
        changed = weights.clone()
        changed[:, [0, 2], 4] *= 0.25
        return changed

    with torch.no_grad(), softmax_by_hand(0, after=after):
        wanted = forward(model, tokens).logits
    edit = cutaway.scale("blocks.0.attn.pattern", 0.25, positions=4, heads=[0, 2])
    run = look(model, tokens, ["blocks.0.attn.pattern"], [edit])
    near(run.out.logits, wanted)
    assert float((wanted - look(model, tokens, ["blocks.0.attn.pattern"]).out.logits).abs().max()) > 1e-3


def scale_of(model: PreTrainedModel, name: str, query: Tensor) -> float:
    if name == "gpt_neo":
        return 1.0
    return float(getattr(attentions(model)[1], "scaling", query.shape[-1] ** -0.5))


@pytest.mark.parametrize("name", [n for n in ALL if n != "gemma2"])
@pytest.mark.parametrize("part", ["rot_q", "rot_k"])
def test_an_edit_of_a_query_or_key_moves_its_scores(name: str, part: str) -> None:
    """scores = scale q·k + bias, so a move δ of one changes them by scale δ·k, or scale q·δ for the heads of a group;
    and what follows is what follows from those scores.
    """
    model, tokens = eager(small(name)), batch((9,))
    site = f"blocks.1.attn.{part}"
    sites = [site, "blocks.1.attn.rot_q", "blocks.1.attn.rot_k", "blocks.1.attn.scores"]
    plain = look(model, tokens, sites).values
    delta = torch.randn(plain[site].shape[-1], generator=torch.Generator().manual_seed(2))
    edit = cutaway.add(site, delta, 1.5, positions=3, heads=1 if plain[site].shape[2] > 1 else 0)
    run = look(model, tokens, sites, [edit])
    query, key = run.values["blocks.1.attn.rot_q"].double(), run.values["blocks.1.attn.rot_k"].double()
    groups = HEADS // key.shape[2]
    assert groups == {"falcon": 4, "falcon_new": 2, "llama": 2}.get(name, groups)
    moved = torch.einsum("bqhe,bkhe->bhqk", query, key.repeat_interleave(groups, 2))
    was = torch.einsum(
        "bqhe,bkhe->bhqk",
        plain["blocks.1.attn.rot_q"].double(),
        plain["blocks.1.attn.rot_k"].double().repeat_interleave(groups, 2),
    )
    expected = plain["blocks.1.attn.scores"] + scale_of(model, name, query) * (moved - was)
    seen = expected > -torch.inf
    scores = run.values["blocks.1.attn.scores"]
    near(scores.double()[seen], expected[seen])
    assert float((moved - was).abs().max()) > 1e-2
    by_query = scores.masked_fill(~seen, 0.0).transpose(1, 2)  # masked cells stay masked
    again = look(model, tokens, (), [cutaway.set("blocks.1.attn.scores", by_query)])
    near(run.out.logits, again.out.logits)


@pytest.mark.parametrize("name", ["falcon", "falcon_new"])
def test_queries_and_keys_alone_leave_sdpa(name: str) -> None:
    model, tokens = small(name), batch((9, 5), "left")
    with torch.no_grad():
        plain = forward(model, tokens).logits
    run = look(model, tokens, everywhere("rot_q", "rot_k"))
    assert same(run.out.logits, plain)
    zeroed = look(model, tokens, (), [cutaway.zero("blocks.0.attn.rot_k")]).out.logits
    by_scores = look(model, tokens, ["blocks.0.attn.scores"], [cutaway.zero("blocks.0.attn.rot_k")]).out.logits
    near(zeroed[tokens.mask], by_scores[tokens.mask])
    assert float((zeroed - plain)[tokens.mask].abs().max()) > 1e-3


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("part", ["scores", "pattern", "rot_q", "rot_k"])
def test_gradients_are_those_of_an_edit(name: str, part: str) -> None:
    """The derivative along scale(site, 1 + ε) at one position, by autograd and by a difference of two edited runs."""
    model, tokens = small(name), batch((7,))
    site = f"blocks.1.attn.{part}"
    run = look(model, tokens, [site], gradients=True)
    value = run.values[site]

    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1, :10].double().square().sum()

    (gradient,) = torch.autograd.grad(metric(run.out.logits), value)
    at = (slice(None), slice(None), 4) if part in ("scores", "pattern") else (slice(None), 4)
    seen = value[at] > -torch.inf
    along = float((gradient[at][seen].double() * value.detach()[at][seen].double()).sum())
    step = 1e-2
    up, down = (
        float(metric(look(model, tokens, (), [cutaway.scale(site, 1 + sign * step, positions=4)]).out.logits))
        for sign in (1, -1)
    )
    size = float(gradient[at][seen].double().norm() * value.detach()[at][seen].double().norm())
    assert abs(along - (up - down) / (2 * step)) < 2e-2 * size + 1e-4


# What is left behind


def state(model: PreTrainedModel) -> Any:
    return [
        (name, sorted(module.__dict__), id(module.__dict__.get("config")), len(module._forward_hooks))
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("name", ["llama", *ADAPTED])
def test_nothing_is_left_behind_even_after_an_error(name: str) -> None:
    model, tokens = small(name), batch((9,))
    before = state(model)
    settings = model.config.to_dict()
    with torch.no_grad():
        plain = forward(model, tokens).logits
    look(model, tokens, everywhere("pattern", "rot_k"), [cutaway.zero("blocks.0.attn.pattern", heads=0)])
    assert state(model) == before
    with pytest.raises(cutaway.CutawayError, match="fits neither"):
        look(model, tokens, (), [cutaway.set("blocks.1.attn.scores", torch.ones(HEADS, 5))])
    assert state(model) == before
    assert model.config.to_dict() == settings
    with torch.no_grad():
        assert same(forward(model, tokens).logits, plain)


@pytest.mark.parametrize("name", ["llama", "gptj", "gpt_neo", "bloom", "falcon"])
def test_runs_inside_runs_and_threads_do_not_mix(name: str) -> None:
    """While one run edits a pattern, plain forwards inside it and in another thread are plain, and a second run there
    sees its own edits.
    """
    model, tokens = small(name), batch((9,))
    edit, other = cutaway.zero("blocks.0.attn.pattern"), cutaway.scale("blocks.0.attn.pattern", 0.5)
    with torch.no_grad():
        plain = forward(model, tokens).logits
    alone = look(model, tokens, (), [edit]).out.logits
    half = look(model, tokens, (), [other]).out.logits
    found: dict[str, Tensor] = {}

    def inside(*_: Any) -> None:
        if "nested" in found:
            return
        found["nested"] = torch.empty(0)  # the runs below pass here too
        found["nested"] = look(model, tokens, (), [other]).out.logits

        def elsewhere() -> None:
            with torch.no_grad():
                found["thread"] = forward(model, tokens).logits
            found["second"] = look(model, tokens, (), [other]).out.logits

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    handle = attentions(model)[0].register_forward_pre_hook(inside)
    outer = look(model, tokens, (), [edit]).out.logits
    handle.remove()
    assert same(outer, alone)
    assert same(found["nested"], half)
    assert same(found["second"], half)
    assert same(found["thread"], plain)


@pytest.mark.parametrize("name", ["falcon", "gptj", "deepseek_v32"])
def test_two_models_on_one_configuration(name: str) -> None:
    first = small(name)
    second = type(first)(first.config).eval()
    assert second.config is first.config
    tokens = batch((9,))
    with torch.no_grad():
        plain = forward(second, tokens).logits
    seen = []

    def look_at_the_other(*_: Any) -> None:
        with torch.no_grad():
            seen.append(forward(second, tokens).logits)

    handle = attentions(first)[1].register_forward_pre_hook(look_at_the_other)
    look(first, tokens, everywhere("pattern"), [cutaway.zero("blocks.1.attn.pattern")])
    handle.remove()
    assert same(seen[0], plain)


def test_a_forward_that_accelerate_has_wrapped_still_runs() -> None:
    """Its wrapper moves inputs and weights to where they are needed, so it must stay in front."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, tokens = small("bloom"), batch((9,))
    expected = look(model, tokens, everywhere("pattern")).values["blocks.1.attn.pattern"]
    calls = []

    class Counting(hooks.ModelHook):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return args, kwargs

    for attention in attentions(model):
        hooks.add_hook_to_module(attention, Counting())
    run = look(model, tokens, everywhere("pattern"))
    assert len(calls) == LAYERS
    assert same(run.values["blocks.1.attn.pattern"], expected)
    with torch.no_grad():
        assert same(run.out.logits, forward(model, tokens).logits)


def test_a_setting_that_an_adapter_does_not_follow_is_refused() -> None:
    model = small("bloom", pretraining_tp=2, slow_but_exact=True)
    with pytest.raises(cutaway.CutawayError, match="slow_but_exact"):
        look(model, batch((9,)), everywhere("pattern"))


def test_flash_modules_have_no_adapter() -> None:
    """They inherit from the adapted classes and compute something else."""
    from transformers.models.gptj.modeling_gptj import GPTJFlashAttention2

    model = small("gptj")
    module = GPTJFlashAttention2(model.config, 0)
    assert adapters.find(module) is None
    with pytest.raises(cutaway.CutawayError, match="GPTJFlashAttention2 does not dispatch"):
        check_dispatch(model, module)
