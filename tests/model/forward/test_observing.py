"""Observe, never replace: the attached model stays what it was, whatever is run on it, also after an error."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hand_hooks import positions_of
from subject import Subject, Subjects, close, plain
from tiny import LAYERS, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.model.forward.current import active
from cutaway.model.forward.execution import Execution
from cutaway.model.forward.hooks import Hooks
from cutaway.model.language_model import LanguageModel, attach
from cutaway.model.tokens import Tokens


def state(model: PreTrainedModel) -> dict[str, Any]:
    """Everything about a model that a run could leave changed."""
    return {
        "modules": [(name, id(m), type(m)) for name, m in model.named_modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "attributes": [(name, sorted(m.__dict__)) for name, m in model.named_modules()],
        "configs": [(name, id(m.config)) for name, m in model.named_modules() if hasattr(m, "config")],
        "forwards": [name for name, m in model.named_modules() if "forward" in m.__dict__],
        "config": copy.deepcopy(model.config.to_dict()),
        "attention": model.config._attn_implementation,
        "training": [m.training for m in model.modules()],
        "keys": list(model.state_dict()),
        "weights": [(id(p), p.data_ptr(), p._version, p.requires_grad) for p in model.parameters()],
        "generation": model.generation_config.to_dict() if model.generation_config else None,
    }


def no_trace(model: PreTrainedModel, before: dict[str, Any]) -> None:
    after = state(model)
    for key, value in before.items():
        assert after[key] == value, key
    assert active() is None


def everything(lm: LanguageModel, tokens: Tokens) -> list[Callable[[], Any]]:
    """Calls of every kind."""
    run = lm.run(tokens, capture="blocks.*.resid_pre")
    edit = cutaway.add("blocks.1.attn.rot_q", torch.ones(lm.d_head), positions=0)
    return [
        lambda: lm.run(tokens),
        lambda: lm.run(tokens, capture=lm.sites().present(), edits=edit),
        lambda: lm.run(tokens, capture="blocks.0.attn.pattern", logits=None),
        lambda: lm.run(tokens, edits=cutaway.zero("blocks.2.mlp.out"), resume=run, logits="last"),
        lambda: lm.run(tokens, capture="blocks.*.attn.scores", grad=lambda x: x[:, 0].sum()),
        lambda: lm.generate(tokens, max_new_tokens=3, edits=edit),
        lambda: lm.selftest(),
        lambda: lm.identity(),
    ]


def test_attaching_changes_nothing(subject: Subject) -> None:
    model = tiny_model(subject.family)
    before, tokens = state(model), subject.tokens("left")
    logits = plain(model, tokens).logits
    lm = attach(model)
    no_trace(model, before)
    untouched = lm.run(tokens).logits
    assert untouched is not None
    assert torch.equal(untouched, logits)
    assert lm.hf is model


def test_calls_of_every_kind_leave_the_model_as_it_was(subject: Subject) -> None:
    model = tiny_model(subject.family)
    before, tokens = state(model), subject.tokens("left")
    logits = plain(model, tokens).logits
    for call in everything(attach(model), tokens):
        call()
        no_trace(model, before)
    assert torch.equal(plain(model, tokens).logits, logits)
    states = plain(model, tokens, output_hidden_states=True).hidden_states
    assert len(states) == LAYERS + 1


class Broken(Exception):
    pass


@pytest.mark.parametrize("where", ["a layer", "an attention", "the head", "the metric", "an edit"])
def test_an_exception_leaves_no_trace(
    fresh_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    model, lm = fresh_llama, attach(fresh_llama)
    tokens = lm.tokens([[5, 6, 7], [8, 9]])
    base = lm.run(tokens, capture="blocks.0.resid_post")
    logits = base.logits

    def fail(*_: Any, **__: Any) -> Any:
        raise Broken

    metric = (lambda x: fail()) if where == "the metric" else (lambda x: x.sum())
    names = {"a layer": "model.layers.1", "an attention": "model.layers.2.self_attn", "the head": "lm_head"}
    handle = model.get_submodule(names[where]).register_forward_hook(fail) if where in names else None
    before = state(model)
    if where == "an edit":
        monkeypatch.setattr("cutaway.model.edits.resolve.changed", fail)
    edits = cutaway.zero("blocks.1.attn.scores", positions=0)
    for options in (
        {"capture": lm.sites().present(), "edits": edits, "grad": metric},
        {"edits": edits, "resume": base, "capture": "blocks.2.mlp.out", "grad": metric},
    ):
        with pytest.raises(Broken):
            lm.run(tokens, **options)
        no_trace(model, before)
    if where != "the metric":
        with pytest.raises(Broken):
            lm.generate(tokens, max_new_tokens=2, edits=edits)
        no_trace(model, before)
    if handle is not None:
        handle.remove()
    monkeypatch.undo()
    after = lm.run(tokens).logits
    assert after is not None
    assert logits is not None
    assert torch.equal(after, logits)


def test_a_refused_edit_leaves_no_trace(fresh_llama: PreTrainedModel) -> None:
    """Its shape is found not to fit in the middle of the forward pass."""
    lm = attach(fresh_llama)
    before = state(fresh_llama)
    with pytest.raises(CutawayError, match="shape"):
        lm.run([5, 6, 7], edits=cutaway.set("blocks.1.attn.pattern", torch.ones(5)))
    with pytest.raises(CutawayError, match="touched nothing"):
        lm.generate([5, 6, 7], max_new_tokens=2, edits=cutaway.zero("blocks.1.mlp.out", phase=(1, 2)))
    no_trace(fresh_llama, before)


# The user's own hooks


def test_the_users_hooks_stay_and_are_seen(fresh_llama: PreTrainedModel) -> None:
    lm, calls = attach(fresh_llama), []

    def doubled(_m: nn.Module, _args: Any, output: Tensor) -> Tensor:
        calls.append(output.shape)
        return output * 2

    mlp = fresh_llama.get_submodule("model.layers.1.mlp")
    plain_run = lm.run([5, 6, 7], capture="blocks.1.mlp.out")
    handle = mlp.register_forward_hook(doubled)
    before = state(fresh_llama)
    run = lm.run([5, 6, 7], capture="blocks.1.mlp.out")
    assert torch.equal(run["blocks.1.mlp.out"], 2 * plain_run["blocks.1.mlp.out"])
    assert run.logits is not None
    assert torch.equal(run.logits, plain(fresh_llama, run.tokens).logits)
    assert calls == [(1, 3, 32)] * 2
    no_trace(fresh_llama, before)
    handle.remove()


def test_a_run_inside_a_users_hook_is_a_run_of_its_own(of_family: Subjects) -> None:
    """A hook that looks into the same model while another run, or a generation, is under way."""
    model = tiny_model("gpt2")
    lm, other = attach(model), attach(copy.deepcopy(model))
    outer = cutaway.add("blocks.1.resid_post", torch.linspace(-1, 1, lm.d_model), positions=[0, -1])
    inner = cutaway.zero("blocks.2.attn.out", phase="all")
    found: list[Tensor] = []

    def look(_m: nn.Module, _args: Any, _output: Any) -> None:
        if len(found) < 40 and not busy:
            busy.append(1)
            logits = lm.run([9, 8, 7, 6, 5], edits=inner, capture="blocks.*.attn.pattern").logits
            assert logits is not None
            found.append(logits)
            busy.clear()

    busy: list[int] = []
    handle = model.get_submodule("transformer.h.0").register_forward_hook(look)
    try:
        run = lm.run([[5, 6, 7], [8, 9, 10]], edits=outer, capture="blocks.*.resid_post")
        text = lm.generate([[5, 6, 7], [8, 9]], edits=outer, max_new_tokens=6)
        steered = cutaway.scale("blocks.1.resid_post", 3.0, phase=(1, 4))
        later = lm.generate([[5, 6, 7], [8, 9]], edits=steered, max_new_tokens=6)
    finally:
        handle.remove()
    alone = other.run([[5, 6, 7], [8, 9, 10]], edits=outer, capture="blocks.*.resid_post")
    expected = other.run([9, 8, 7, 6, 5], edits=inner).logits
    assert len(found) > 5
    assert expected is not None
    assert all(torch.allclose(logits, expected, atol=1e-5) for logits in found)
    assert run.logits is not None
    assert alone.logits is not None
    assert torch.equal(run.logits, alone.logits)
    assert run.receipts == alone.receipts
    assert text.new_ids == other.generate([[5, 6, 7], [8, 9]], edits=outer, max_new_tokens=6).new_ids
    expected_later = other.generate([[5, 6, 7], [8, 9]], edits=steered, max_new_tokens=6)
    assert later.new_ids == expected_later.new_ids
    assert later.receipts == expected_later.receipts


# Threads


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_threads_get_their_own_results(of_family: Subjects, family: str) -> None:
    model = tiny_model(family)
    lm, before = attach(model), state(model)
    inputs = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [4, 5, 6, 7, 8, 9]]
    d = torch.linspace(-1, 1, lm.d_model)
    base = [lm.run(ids, capture="blocks.*.resid_pre") for ids in inputs]

    def job(i: int) -> tuple[Tensor, Tensor, Any, Any]:
        ids = inputs[i % 4]
        edits = [cutaway.add(f"blocks.{i % LAYERS}.resid_post", d, 1.0 + i, positions=-1)]
        if i % 3 == 0:
            edits.append(cutaway.zero("blocks.1.attn.rot_q", heads=i % 4))
        run = lm.run(
            ids,
            edits=edits,
            capture=["blocks.1.attn.pattern", "blocks.2.resid_post"],
            grad=(lambda x: x[:, -1, i].sum()) if i % 2 else None,
            resume=base[i % 4] if i % 5 == 0 else None,
        )
        text = lm.generate(ids, edits=edits[:1], max_new_tokens=3 + i % 3) if i % 4 == 1 else None
        assert run.logits is not None
        return run.logits, run["blocks.1.attn.pattern"], run.receipts, text and (text.new_ids, text.receipts)

    alone = [job(i) for i in range(24)]
    gate = threading.Barrier(4)

    def together(i: int) -> tuple[Tensor, Tensor, Any, Any]:
        if i < 4:
            gate.wait(10)
        return job(i)

    with ThreadPoolExecutor(4) as pool:
        crowd = list(pool.map(together, [*range(24), *range(24)]))
    for i, (logits, pattern, receipts, text) in enumerate(crowd):
        assert torch.equal(logits, alone[i % 24][0])
        assert torch.equal(pattern, alone[i % 24][1])
        assert receipts == alone[i % 24][2]
        assert text == alone[i % 24][3]
    no_trace(model, before)


def test_sampling_in_threads_follows_each_seed(fresh_llama: PreTrainedModel) -> None:
    lm = attach(fresh_llama)
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0}
    alone = [lm.generate([5, 6, 7], seed=i, **options).new_ids for i in range(6)]
    assert len({*alone}) > 3
    with ThreadPoolExecutor(3) as pool:
        crowd = list(pool.map(lambda i: lm.generate([5, 6, 7], seed=i, **options).new_ids, [*range(6)] * 2))
    assert crowd == alone * 2


def test_a_plain_call_in_another_thread_is_not_edited(fresh_llama: PreTrainedModel) -> None:
    """A forward of the bare model while an edited run is in the middle of its own."""
    lm = attach(fresh_llama)
    tokens = lm.tokens([[5, 6, 7]])
    expected = plain(fresh_llama, tokens).logits
    seen: list[Tensor] = []

    def elsewhere(_m: nn.Module, _args: Any, _output: Any) -> None:
        if threading.current_thread() is threading.main_thread() and not seen:
            thread = threading.Thread(target=lambda: seen.append(plain(fresh_llama, tokens).logits))
            thread.start()
            thread.join()

    handle = fresh_llama.get_submodule("model.layers.0").register_forward_hook(elsewhere)
    edits = [cutaway.zero("blocks.1.attn.scores"), cutaway.set("blocks.0.mlp.out", 3.0)]
    run = lm.run(tokens, edits=edits, capture="blocks.2.resid_post")
    handle.remove()
    assert torch.equal(seen[0], expected)
    assert run.logits is not None
    assert not torch.allclose(run.logits, expected)


def test_two_attachments_of_one_model_agree(fresh_llama: PreTrainedModel) -> None:
    one, two = attach(fresh_llama), attach(fresh_llama)
    edit = cutaway.zero("blocks.1.attn.out")
    left, right = one.run([5, 6], edits=edit).logits, two.run([5, 6], edits=edit).logits
    assert left is not None
    assert right is not None
    assert torch.equal(left, right)


# What a run says about itself


def test_position_ids_come_from_the_mask(of_family: Subjects) -> None:
    """Left padding would otherwise shift the learned positions of GPT-2."""
    subject = of_family("gpt2")
    tokens = subject.tokens("left")
    assert torch.equal(tokens.position_ids, positions_of(tokens.mask))
    run = subject.lm.run(tokens)
    with torch.no_grad():
        naive = subject.hf(input_ids=tokens.ids, attention_mask=tokens.mask.long()).logits
    assert run.logits is not None
    assert float((run.logits - naive)[tokens.mask].abs().max()) > 0.1
    close(run.logits[2][tokens.mask[2]], plain(subject.hf, subject.tokens(rows=[subject.rows[2]])).logits[0])


def test_hooks_see_and_change_the_forward_of_their_own_execution_alone(llama: LanguageModel) -> None:
    tokens, layer = llama.tokens([[5, 6, 7]]), llama.family.layers[1]
    plain = llama.run(tokens, capture="blocks.1.resid_pre")
    hooks, seen = Hooks(), list[torch.Tensor]()
    hooks.before(layer.module, lambda x: seen.append(x.clone()))
    hooks.after(layer.mlp, torch.zeros_like)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return llama.hf(input_ids=tokens.ids).logits

    changed = Execution(llama, (), (), tokens.mask, watch=hooks).forward(logits)
    assert torch.equal(changed, llama.run(tokens, edits=cutaway.zero("blocks.1.mlp.out")).all_logits)
    assert torch.equal(seen.pop(), plain["blocks.1.resid_pre"])
    with Execution(llama, (), (), tokens.mask, watch=hooks).observing():
        assert torch.equal(llama.run(tokens).all_logits, plain.all_logits)
    assert torch.equal(logits(), plain.all_logits)
    assert not seen
    assert not layer.module._forward_pre_hooks
    assert not layer.mlp._forward_hooks
