"""Rotary angles that depend on the length: what may share a batch or a cache is right, and what may not is refused.

What is right is the plain model, one row at a time, on the whole text at every step.
"""

from typing import Any

import pytest
import torch
from tiny import V, random_rows, tiny_model
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedModel

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.causal.parts import shared_prefix
from cutaway.model.architecture.ropes import find_ropes
from cutaway.model.language_model import LanguageModel, attach

LIMIT = 16
SITE = "blocks.1.resid_post"
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0, 8.0, 20.0, 40.0],
    "original_max_position_embeddings": LIMIT,
}  # fmt: skip


def phi(**changes: Any) -> PreTrainedModel:
    """A model that drops its cache where its angles change."""
    config = Phi3Config(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        original_max_position_embeddings=LIMIT,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        rope_parameters=LONGROPE,
        **changes,
    )
    torch.manual_seed(0)
    model = Phi3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    return model


@pytest.fixture(scope="module")
def rereading() -> LanguageModel:
    return attach(phi(), name="phi")


@pytest.fixture(scope="module")
def keeping() -> LanguageModel:
    """A model that keeps its cache, old angles and all."""
    return attach(tiny_model("llama", rope_parameters=LONGROPE), name="long llama")


@pytest.fixture(scope="module", params=["rereading", "keeping"])
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return request.getfixturevalue(request.param)


def alone(lm: LanguageModel, ids: list[int]) -> Tensor:
    """Logits of the plain model [p, V]."""
    with torch.no_grad():
        return lm.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def stream(lm: LanguageModel, ids: list[int], add: Tensor | None = None, start: int = 0) -> tuple[Tensor, Tensor]:
    """The stream behind layer 1 and the logits of a plain forward, `add` added behind layer 0 from `start` on."""
    seen = []

    def note(_module: Any, _args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).clone())

    def change(_module: Any, _args: Any, output: Any) -> Any:
        value = (output[0] if isinstance(output, tuple) else output).clone()
        value[:, start:] += 0 if add is None else add
        return (value, *output[1:]) if isinstance(output, tuple) else value

    layers = lm.hf.model.layers  # type: ignore[union-attr]
    handles = [layers[0].register_forward_hook(change), layers[1].register_forward_hook(note)]
    logits = alone(lm, ids)
    for handle in handles:
        handle.remove()
    return seen[0][0], logits


def test_the_limits_are_found_and_only_where_there_are_any(rereading: LanguageModel, keeping: LanguageModel) -> None:
    assert rereading.ropes is not None
    assert keeping.ropes is not None
    assert rereading.ropes.switches == keeping.ropes.switches == (LIMIT,)
    assert rereading.ropes.rereads
    assert not keeping.ropes.rereads
    plain = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for rope in (None, plain | {"original_max_position_embeddings": LIMIT}):
        assert find_ropes(tiny_model("llama", rope_parameters=rope)) is None
    assert find_ropes(tiny_model("gpt2")) is None
    per_kind = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": LONGROPE}
    model = tiny_model("gemma3", head_dim=8, rope_parameters=per_kind)
    found = find_ropes(model)
    assert found is not None
    assert found.switches == (LIMIT,)


def test_rows_on_one_side_are_what_they_are_alone_and_others_are_refused(lm: LanguageModel) -> None:
    for lengths in ((7, LIMIT), (LIMIT + 1, 40)):
        rows = random_rows(lengths)
        run = lm.run(rows)
        assert run.logits is not None
        for row, ids in enumerate(rows):
            torch.testing.assert_close(run.logits[row, : len(ids)], alone(lm, ids), atol=1e-5, rtol=1e-4)
    mixed = random_rows((7, LIMIT + 1))
    tokens = lm.tokens(mixed)
    with torch.no_grad():  # what is refused would be wrong
        off = lm.hf(input_ids=tokens.ids, attention_mask=tokens.mask.long(), use_cache=False).logits[0, 6]
    assert float((off - alone(lm, mixed[0])[-1]).abs().max()) > 0.05 * float(off.abs().max())
    words = rf"more than {LIMIT} tokens by other rotary angles.*rows of 7 and {LIMIT + 1} tokens.*apart"
    edit = cutaway.zero("blocks.1.mlp.out", positions=-1)
    for call in (
        lambda: lm.run(mixed, capture=SITE, logits=None),
        lambda: lm.run(mixed, edits=edit),
        lambda: lm.sweep(mixed, [edit], lambda logits, _: logits[:, 0]),
        lambda: lm.generate(mixed, max_new_tokens=1),
        lambda: lm.generate(mixed, max_new_tokens=1, decoding=cutaway.Decoding(use_cache=False)),
        lambda: list(lm.generate_stream(mixed, max_new_tokens=1)),
    ):
        with pytest.raises(CutawayError, match=words):
            call()


def test_a_sweep_takes_over_what_has_the_same_angles(lm: LanguageModel) -> None:
    row = random_rows((LIMIT + 4,))
    cells = [cutaway.scale(f"blocks.{layer}.attn.out", 2.0, positions=-2) for layer in (0, 1)]
    found = lm.sweep(row, cells, lambda logits, _: logits)
    assert any(batch.start > LIMIT for batch in found.batches)
    for cell, value in zip(cells, found.values, strict=True):
        run = lm.run(row, edits=cell, logits="last")
        assert run.logits is not None
        torch.testing.assert_close(value, run.logits[:, 0].cpu(), atol=1e-4, rtol=1e-4)


def test_a_prefix_of_other_angles_is_not_shared(lm: LanguageModel) -> None:
    tokens = lm.tokens(random_rows((LIMIT + 4, LIMIT + 4)))
    assert shared_prefix(lm, tokens, LIMIT, check=False) is None
    assert shared_prefix(lm, tokens, LIMIT + 1) is not None
    assert shared_prefix(lm, lm.tokens(random_rows((LIMIT, LIMIT))), 5) is not None


@pytest.mark.parametrize(("use_cache", "edited"), [(True, False), (True, True), (False, False), (False, True)])
def test_a_generation_past_the_limit_is_that_of_the_whole_text_at_every_step(
    rereading: LanguageModel, keeping: LanguageModel, use_cache: bool, edited: bool
) -> None:
    for lm in (rereading,) if use_cache else (rereading, keeping):
        rows, new = random_rows((12, 12), seed=1), 10
        d = torch.linspace(-1, 3, lm.d_model)
        edits = [cutaway.add("blocks.0.resid_post", d, phase="new")] if edited else []
        made = lm.generate(
            rows, max_new_tokens=new, edits=edits, capture=SITE, decoding=cutaway.Decoding(use_cache=use_cache)
        )
        plain = lm.generate(rows, max_new_tokens=new, edits=edits, decoding=cutaway.Decoding(use_cache=use_cache))
        assert plain.new_ids == made.new_ids
        for row, ids in enumerate(rows):
            whole = list(ids)
            for _ in range(new):
                whole.append(int(stream(lm, whole, d if edited else None, len(ids))[1][-1].argmax()))
            assert made.tokens.row_ids(row) == whole
            right = stream(lm, whole, d if edited else None, len(ids))[0]
            torch.testing.assert_close(made[SITE][row], right, atol=1e-4, rtol=1e-4)
        if edited:
            assert made.receipts[0].n_tokens == new * len(rows)
            assert made.receipts[0].positions == (tuple(range(12, 12 + new)),) * 2


def test_generations_that_would_slip_are_refused_with_what_still_fits(
    rereading: LanguageModel, keeping: LanguageModel
) -> None:
    prompt = random_rows((12,))
    with pytest.raises(CutawayError, match=r"cache would keep the old ones.*use_cache=False, or make at most 5 new"):
        keeping.generate(prompt, max_new_tokens=6)
    with pytest.raises(CutawayError, match=r"use_cache=False, or make at most 4 new"):
        keeping.generate(prompt, max_new_tokens=5, capture=SITE)
    with pytest.raises(CutawayError, match=r"use_cache=False$|use_cache=False\."):
        keeping.generate(random_rows((LIMIT,)), max_new_tokens=1, capture=SITE)
    kept = keeping.generate(prompt, max_new_tokens=5)
    assert (
        kept.new_ids == keeping.generate(prompt, max_new_tokens=5, decoding=cutaway.Decoding(use_cache=False)).new_ids
    )
    made = keeping.generate(prompt, max_new_tokens=4, capture=SITE)
    right = stream(keeping, made.tokens.row_ids(0))[0]
    torch.testing.assert_close(made[SITE][0], right, atol=1e-4, rtol=1e-4)
    long = random_rows((LIMIT + 1,))
    assert len(keeping.generate(long, max_new_tokens=6).new_ids[0]) == 6
    apart = random_rows((9, 12))
    for lm in (rereading, keeping):
        for use_cache in (True, False):
            with pytest.raises(CutawayError, match=r"9 and 12 tokens would not get there together.*at most 5 new"):
                lm.generate(apart, max_new_tokens=6, decoding=cutaway.Decoding(use_cache=use_cache))
        texts = lm.generate(apart, max_new_tokens=5).new_ids
        assert texts == tuple(lm.generate(row, max_new_tokens=5).new_ids[0] for row in apart)


def test_beams_and_samples_past_the_limit(rereading: LanguageModel) -> None:
    prompt = random_rows((12,), seed=2)
    choices: list[dict[str, Any]] = [{"num_beams": 3}, {"temperature": 1.0, "num_return_sequences": 3}]
    for options in choices:
        cached, whole = (
            rereading.generate(
                prompt, max_new_tokens=8, **options, decoding=cutaway.Decoding(use_cache=use_cache)
            ).new_ids
            for use_cache in (True, False)
        )
        assert cached == whole


def test_dynamic_angles_are_refused_where_they_hang_on_what_was_read_before() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    lm = attach(tiny_model("llama", rope_parameters=rope, max_position_embeddings=LIMIT), name="dynamic llama")
    assert lm.ropes is not None
    assert lm.ropes.stretches == LIMIT
    assert lm.selftest().passed
    short, longer, longest = random_rows((9, 20, 30))
    lm.context_length = 64  # as of a model whose configuration names more than its rotary embedding does
    fresh = alone(lm, longer)
    alone(lm, longest)
    assert float((alone(lm, longer) - fresh).abs().max()) > 1e-3  # this is why
    for call in (lambda: lm.run(longer), lambda: lm.run([short, longer]), lambda: lm.generate(longer)):
        with pytest.raises(CutawayError, match=rf"Above {LIMIT} tokens the rotary angles of dynamic llama"):
            call()
    logits = lm.run(short).logits
    assert logits is not None
    torch.testing.assert_close(logits[0], alone(lm, short), atol=1e-5, rtol=1e-4)


def test_the_self_test_says_so_and_fails_where_nobody_knows(lm: LanguageModel) -> None:
    test = lm.selftest()
    assert test.passed, str(test)
    assert len(test.notes) == 1
    assert f"note: Rotary angles depend on the length: texts of more than {LIMIT} tokens" in str(test)
    plain = tiny_model("llama")
    known = attach(plain).selftest()
    assert known.notes == ()
    rotary: Any = plain.model.rotary_emb  # type: ignore[union-attr]
    right = rotary.forward

    def turns(x: Tensor, position_ids: Tensor) -> Any:
        return right(x, position_ids * (2 if int(position_ids.max()) >= 40 else 1))

    rotary.forward = turns
    unknown = attach(plain).selftest()
    assert [row.check for row in unknown.failures()] == ["a row of a batch without an edit = the row alone"]
    assert len(unknown.checks) == len(known.checks)
