"""Generation step by step is generate's own, can be left at any step, and disturbs nothing meanwhile."""

import threading
from typing import Any

import pytest
import torch
from subject import Subject, Subjects
from tiny import D, tiny_model, word_tokenizer

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.model.language_model import LanguageModel, attach

NEW = 6


def hooks(lm: LanguageModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.hf.modules())


def waiting() -> int:
    return sum(thread.name == "cutaway generation" for thread in threading.enumerate())


def test_steps_are_the_tokens_of_generate(subject: Subject) -> None:
    edits = [cutaway.scale("blocks.1.resid_post", 1.5, phase="new"), cutaway.noise("blocks.0.mlp.out", 0.3)]
    for options in ({}, {"temperature": 1.0, "seed": 3, "num_return_sequences": 2}):
        whole = subject.lm.generate(subject.tokens("left"), max_new_tokens=NEW, edits=edits, **options)
        stream = subject.lm.generate_stream(subject.tokens("left"), max_new_tokens=NEW, edits=edits, **options)
        steps = list(stream)
        assert [step.step for step in steps] == list(range(NEW))
        assert tuple(zip(*(step.ids for step in steps), strict=True)) == whole.new_ids
        assert stream.generation.new_ids == whole.new_ids
        assert stream.generation.receipts == whole.receipts
        assert stream.generation.logprobs == whole.logprobs
        assert list(stream) == []
    assert hooks(subject.lm) == waiting() == 0


@pytest.fixture(scope="module")
def speaker() -> LanguageModel:
    return attach(tiny_model("llama", vocab_size=20), word_tokenizer())


def test_pieces_make_the_texts(speaker: LanguageModel) -> None:
    push = torch.zeros(20)
    push[2] = 1e4  # ends the second row after three tokens
    edit = cutaway.add("logits", push, phase=(2, 12), rows=1)
    prompts, options = ["the cat", "a big dog ran"], {"max_new_tokens": 8, "edits": edit}
    stream = speaker.generate_stream(prompts, **options)  # type: ignore[arg-type]
    steps = list(stream)
    whole = speaker.generate(prompts, **options)  # type: ignore[arg-type]
    assert tuple("".join(pieces) for pieces in zip(*(s.pieces for s in steps), strict=True)) == whole.texts
    assert [s.ids[1] is None for s in steps] == [False] * 3 + [True] * 5
    assert stream.generation.texts == whole.texts
    word = whole.texts[0].split()[3]
    cut = speaker.generate("the cat", max_new_tokens=8, stop=word)
    stream = speaker.generate_stream("the cat", max_new_tokens=8, stop=word)
    assert "".join(step.pieces[0] for step in stream) == cut.texts[0] == stream.generation.texts[0]
    assert word not in cut.texts[0]


def test_bytes_of_one_character_wait_for_each_other() -> None:
    lm = cutaway.load("atlas")
    prompts = ["The capital of the state containing Dallas is", "Tom"]
    for options in ({}, {"temperature": 2.5, "seed": 1}):
        stream = lm.generate_stream(prompts, max_new_tokens=12, **options)
        pieces = list(zip(*(step.pieces for step in stream), strict=True))
        assert (
            tuple("".join(row) for row in pieces)
            == stream.generation.texts
            == lm.generate(prompts, max_new_tokens=12, **options).texts
        )


def test_leaving_early_keeps_what_was_made(of_family: Subjects) -> None:
    subject = of_family("gemma2")
    lm, prompts = subject.lm, subject.tokens("left")
    capture = ["blocks.1.resid_post", "blocks.1.attn.pattern"]
    whole = lm.generate(prompts, max_new_tokens=NEW, capture=capture)
    captures: list[dict[str, Any]] = [{}, {"capture": capture}]
    for captured in captures:
        with lm.generate_stream(prompts, max_new_tokens=NEW, **captured) as stream:
            for step in stream:
                if step.step == 2:
                    break
        made = stream.generation
        assert made.new_ids == tuple(row[:3] for row in whole.new_ids)
        assert [len(row) for row in made.logprobs or ()] == [3, 3, 3]
        if captured:
            run = lm.run(made.tokens, capture=capture)
            torch.testing.assert_close(made[capture[0]][made.tokens.mask], run[capture[0]][made.tokens.mask])
        assert next(iter(stream), None) is None
    assert hooks(lm) == waiting() == 0


def test_a_stream_that_is_dropped_leaves_nothing_behind(llama: LanguageModel) -> None:
    stream = llama.generate_stream([5, 6, 7], max_new_tokens=NEW, edits=cutaway.zero("embed", positions=0))
    next(stream)
    assert waiting() == 1
    thread = next(t for t in threading.enumerate() if t.name == "cutaway generation")
    del stream
    thread.join(10)
    assert hooks(llama) == waiting() == 0
    unused = llama.generate_stream([5, 6, 7], max_new_tokens=NEW)
    unused.close()
    with pytest.raises(CutawayError, match="before its first step"):
        _ = unused.generation


def test_runs_between_the_steps_are_not_the_streams(llama: LanguageModel) -> None:
    site = "blocks.1.attn.pattern"
    edit = cutaway.add("blocks.1.resid_post", torch.linspace(-3, 3, D))
    clean = llama.run([8, 9], capture=site)
    expected = llama.generate([5, 6, 7], max_new_tokens=NEW, edits=edit, capture=site)
    stream = llama.generate_stream([5, 6, 7], max_new_tokens=NEW, edits=edit, capture=site)
    for _ in stream:
        between = llama.run([8, 9], capture=site)
        assert torch.equal(between.logits, clean.logits)  # type: ignore[arg-type]
        assert torch.equal(between[site], clean[site])
        plain = llama.hf(torch.tensor([[8, 9]])).logits
        torch.testing.assert_close(plain, clean.logits, rtol=1e-5, atol=1e-5)
    assert stream.generation.new_ids == expected.new_ids
    assert torch.equal(stream.generation[site], expected[site])


def test_what_goes_wrong_is_raised_where_the_steps_are_asked_for(llama: LanguageModel) -> None:
    def fails(x: Any) -> Any:
        raise ValueError("the function's own")

    stream = llama.generate_stream([5, 6, 7], edits=cutaway.function("blocks.0.mlp.out", fails))
    with pytest.raises(ValueError, match="the function's own"):
        next(stream)
    with pytest.raises(ValueError, match="the function's own"):
        _ = stream.generation
    for options, words in (
        ({"num_beams": 2}, "cannot be streamed"),
        ({"edits": cutaway.zero("blocks.9.mlp.out")}, "layer 9"),
        ({"max_new_tokens": 0}, "at least 1"),
    ):
        with pytest.raises(CutawayError, match=words):
            next(llama.generate_stream([5, 6, 7], **options))  # type: ignore[arg-type]
    assert hooks(llama) == waiting() == 0
