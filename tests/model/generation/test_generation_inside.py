"""Looking inside a generation: captures and log-probabilities equal a forward of the final tokens under the same edits,
whatever the cache, the padding and the batch.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from bed import BED, bed_model
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from subject import Subject, Subjects, close
from tiny import D, random_rows, tiny_model, word_tokenizer

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.model.edits.edits import Edit, Receipt
from cutaway.model.forward.run import Generation, Run
from cutaway.model.language_model import LanguageModel, attach

NEW = 5


def in_a_run(edits: list[Edit], receipts: tuple[Receipt, ...]) -> list[Edit]:
    """The edits of a generation, addressed by what they touched, for a run of all its tokens."""
    return [
        replace(
            edits[r.edit], site=r.site, rows=r.rows, positions=r.positions, phase="all", seed=_seed(edits[r.edit], r)
        )
        for r in receipts
    ]


def _seed(edit: Edit, receipt: Receipt) -> tuple[int, ...] | None:
    if edit.seed is None or len(edit.seed) == 1:
        return edit.seed
    return tuple(edit.seed[(edit.rows or range(9)).index(row)] for row in receipt.rows)


def check_inside(lm: LanguageModel, made: Generation, edits: list[Edit], sites: list[str], tolerance: float) -> Run:
    run = lm.run(made.tokens, capture=sites, edits=in_a_run(edits, made.receipts))
    assert made.sites == run.sites
    real = made.tokens.mask
    for site in sites:
        ours, theirs = made[site], run[site]
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        if site.endswith((".scores", ".pattern")):
            hidden = -torch.inf if site.endswith(".scores") else 0.0
            both = (real[:, :, None] & real[:, None, :])[:, None].expand_as(ours)
            assert bool((ours[~both] == hidden).all())
            close(ours[both], theirs[both], tolerance)
        else:
            close(ours[real], theirs[real], tolerance)
            assert not ours[~real].any()
    assert run.logits is not None
    assert made.logprobs is not None
    told = run.logits.log_softmax(-1)
    for row, (new, logprobs) in enumerate(zip(made.new_ids, made.logprobs, strict=True)):
        start = len(made.tokens.row_ids(row)) - len(new)
        expected = [float(told[row, start + i - 1, token]) for i, token in enumerate(new)]
        assert logprobs == pytest.approx(expected, abs=2e-4)
    return run


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_generation_captures_what_a_run_of_its_tokens_does(subject: Subject, use_cache: bool) -> None:
    """Every site of two layers and outside them, in a padded batch, beyond a window's width."""
    lm, prompts = subject.lm, subject.tokens("right")
    sites = [s for s in lm.sites().present() if not s.startswith("blocks.0")]
    made = lm.generate(prompts, max_new_tokens=NEW, capture=sites, decoding=cutaway.Decoding(use_cache=use_cache))
    assert made.new_ids == lm.generate(prompts, max_new_tokens=NEW).new_ids
    assert made.tokens.ids.shape == (3, 11 + NEW)
    check_inside(lm, made, [], sites, 2e-5)


def test_captures_of_edited_sites_are_after_the_edit(of_family: Subjects) -> None:
    for family in ("llama", "gpt2", "gemma2"):
        lm, prompts = of_family(family).lm, of_family(family).tokens("left")
        d = torch.linspace(-1, 1, D)
        edits = [
            cutaway.add("blocks.0.resid_post", d, phase="new"),
            cutaway.noise("blocks.1.mlp.post", 0.5, seed=[3, 4], rows=[0, 2]),
            cutaway.scale("blocks.1.attn.rot_k", 1.5, phase=(1, 3), heads=0),
            cutaway.set("blocks.2.attn.z", 0.3, positions=[0, -1], neurons=[0, 2]),
            cutaway.noise("blocks.2.attn.scores", 0.5, phase="all", heads=1),
            cutaway.zero("blocks.2.mlp.out", phase="new", positions=[1, 3], rows=1),
        ]
        sites = [edit.site for edit in edits] + ["blocks.2.resid_post", "blocks.2.attn.pattern", "logits"]
        for use_cache in (True, False):
            made = lm.generate(
                prompts, max_new_tokens=NEW, capture=sites, edits=edits, decoding=cutaway.Decoding(use_cache=use_cache)
            )
            check_inside(lm, made, edits, sites, 2e-5)
            touched = {r.edit: r.positions for r in made.receipts}
            assert touched[0] == tuple(tuple(range(n, n + NEW)) for n in (11, 7, 4))
            assert touched[2] == tuple((n + 1, n + 2) for n in (11, 7, 4))
            assert touched[5] == ((8, 10),)


@pytest.mark.slow
@pytest.mark.parametrize("family", BED)
def test_every_family_generates_what_a_run_of_its_tokens_computes(family: str) -> None:
    """Under the cache of each, whatever its kind, left padded, with edits of new tokens and noise."""
    lm = attach(bed_model(family))
    assert lm.hf.generation_config is not None
    lm.hf.generation_config.eos_token_id = None
    last = f"blocks.{lm.n_layers - 1}."
    sites = [s for s in lm.sites().present() if s.startswith(last) or not s.startswith("blocks.")]
    if family == "mpt":  # whose position bias counts from the last key, so its scores shift as keys come
        sites.remove(f"{last}attn.scores")
    edits = [
        cutaway.add("blocks.0.resid_post", torch.linspace(-0.3, 0.3, lm.d_model), phase="new"),
        cutaway.noise(f"{last}mlp.out", 0.1, rows=0, seed=3),
    ]
    prompts = [[5, 9, 17, 33, 4, 60, 71, 12, 8], [90, 3, 44, 21, 7]]
    made = lm.generate(prompts, max_new_tokens=NEW, capture=sites, edits=edits)
    check_inside(lm, made, edits, sites, 5e-5)  # a pattern errs by what large scores round off


def test_sequences_of_one_prompt_are_captured_each(llama: LanguageModel) -> None:
    prompts = random_rows((6, 4))
    edits = [cutaway.noise("blocks.1.resid_post", 1.0, rows=1)]
    made = llama.generate(
        prompts, max_new_tokens=NEW, temperature=1.0, num_return_sequences=3, capture="blocks.*.resid_post", edits=edits
    )
    assert len({*made.new_ids}) == 6
    check_inside(llama, made, edits, [f"blocks.{i}.resid_post" for i in range(3)], 2e-5)
    assert made.stack("blocks.*.resid_post").shape == (3, 6, 11, D)
    assert torch.equal(made.last("blocks.1.hook_resid_post")[4], made["blocks.1.resid_post"][4, 4 + NEW - 1])
    with pytest.raises(CutawayError, match="This generation did not capture 'embed'"):
        made["embed"]
    with pytest.raises(CutawayError, match=r"above the limit .*limit_bytes"):
        llama.generate(prompts, capture="blocks.*.mlp.post", decoding=cutaway.Decoding(limit_bytes=1000))
    with pytest.raises(CutawayError, match="no site"):
        llama.generate(prompts, capture="blocks.0.nothing")


def test_a_generation_is_a_source_of_patches(llama: LanguageModel) -> None:
    site = "blocks.1.resid_post"
    made = llama.generate([5, 6, 7], max_new_tokens=3, capture=site)
    run = llama.run(made.tokens, edits=cutaway.patch(site, made), capture=site)
    assert torch.equal(run[site], made[site])


def test_captures_stop_where_the_text_does() -> None:
    """Rows that end are captured up to their end; the token that completes a stop text is read too."""
    lm = attach(tiny_model("llama", vocab_size=20), word_tokenizer())
    push = torch.zeros(20)
    push[2] = 1e4
    ends = [cutaway.add("logits", push, phase=(1, 12), rows=1)]
    sites = ["blocks.2.resid_post", "blocks.1.attn.pattern"]
    made = lm.generate(["the cat", "a big dog ran"], max_new_tokens=6, edits=ends, capture=sites)
    assert [len(new) for new in made.new_ids] == [6, 2]
    run = lm.run(made.tokens, capture=sites)
    close(made[sites[0]][made.tokens.mask], run[sites[0]][made.tokens.mask], 2e-5)
    free = lm.generate("the cat", max_new_tokens=8)
    word = free.texts[0].split()[2]
    at = lm.token_strings(free.new_ids[0]).index(word)
    stopped = lm.generate("the cat", max_new_tokens=8, stop=word, capture=sites)
    assert stopped.new_ids[0] == free.new_ids[0][: at + 1]
    assert stopped.texts[0] == free.texts[0][: free.texts[0].index(word)]
    check_inside(lm, stopped, [], sites, 2e-5)
    assert lm.generate("the cat", max_new_tokens=8, stop=["no such", word]).new_ids == stopped.new_ids


# Random edits


@st.composite
def edits_of_generations(draw: st.DrawFn) -> Edit:
    """An edit that can be replayed row by row: any kind but patches, anywhere in prompt and new tokens."""
    site = f"blocks.{draw(st.integers(0, 2))}." + draw(
        st.sampled_from(
            ["resid_pre", "resid_mid", "attn.v", "attn.rot_k", "attn.z", "attn.scores", "mlp.post", "mlp.out"]
        )
    )
    where: dict[str, Any] = {}
    phase = draw(st.sampled_from(["all", "prompt", "new", (1, 3)]))
    where["phase"] = phase
    if phase in ("new", (1, 3)):
        low, high = (0, NEW - 1) if phase == "new" else phase
        numbers = st.lists(st.integers(low, high - 1), min_size=1, unique=True)
        where["positions"] = draw(st.none() | st.just(slice(1, 3)) | numbers)
    else:
        where["positions"] = draw(st.none() | st.sampled_from([0, -1, [1, 3], [-2, 0], slice(2, None), slice(-3, -1)]))
    if draw(st.booleans()):
        where["rows"] = draw(st.lists(st.integers(0, 2), min_size=1, unique=True))
    if ".attn." in site and draw(st.booleans()):
        where["heads"] = draw(st.integers(0, 1))
    if "scores" not in site and draw(st.booleans()):
        where["neurons"] = draw(st.lists(st.integers(0, 7), min_size=1, unique=True))
    kind = draw(st.sampled_from(["scale", "zero", "noise", "function", "set"]))
    if kind == "scale":
        return cutaway.scale(site, draw(st.floats(-2, 2)), **where)
    if kind == "zero":
        return cutaway.zero(site, **where)
    if kind == "noise":
        return cutaway.noise(site, draw(st.floats(0, 2)), seed=draw(st.integers(0, 99)), **where)
    if kind == "function":
        return cutaway.function(site, torch.tanh, **where)
    return cutaway.set(site, draw(st.floats(-1, 1)), **where)


def alone(edit: Edit, row: int) -> list[Edit]:
    """What is left of an edit for one row by itself."""
    if edit.rows is None:
        return [edit]
    return [replace(edit, rows=(0,))] if row in edit.rows else []


def decided(made: Generation) -> bool:
    """Whether the best token was clearly best at every step."""
    ends = made.tokens.lengths.tolist()
    chosen = [made["logits"][row, end - NEW - 1 : end - 1] for row, end in enumerate(ends)]
    top = torch.cat(chosen).topk(2).values
    return bool((top[:, 0] - top[:, 1] > 1e-3).all())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.data())
def test_random_edits_hold_whatever_the_cache_and_the_batch(of_family: Subjects, family: str, drawn: Any) -> None:
    """Cached equals uncached equals each row alone, and what is captured is what a run of the final tokens computes."""
    subject = of_family(family)
    lm, prompts = subject.lm, subject.tokens("left")
    edits = drawn.draw(st.lists(edits_of_generations(), min_size=1, max_size=3))
    sites = [*dict.fromkeys(edit.site for edit in edits), "blocks.2.resid_post", "logits"]
    cached = lm.generate(prompts, max_new_tokens=NEW, edits=edits, capture=sites)
    check_inside(lm, cached, edits, sorted(sites, key=lm.sites().order), 5e-5)
    assume(decided(cached))
    uncached = lm.generate(prompts, max_new_tokens=NEW, edits=edits, decoding=cutaway.Decoding(use_cache=False))
    assert uncached.new_ids == cached.new_ids
    for row, ids in enumerate(subject.rows):
        own = [e for edit in edits for e in alone(edit, row)]
        single = lm.generate(ids, max_new_tokens=NEW, edits=own, capture="logits")
        assert single.new_ids[0] == cached.new_ids[row]
        n = len(ids) + NEW
        close(single["logits"][0], cached["logits"][row, :n], 5e-5)


# Sampling, row by row


def test_a_sample_is_the_same_alone_and_in_a_batch(subject: Subject) -> None:
    lm = subject.lm
    options: dict[str, Any] = {"max_new_tokens": NEW, "temperature": 1.0, "top_k": 20, "seed": 4}
    together = lm.generate(subject.tokens("left"), **options)
    for row, ids in enumerate(subject.rows):
        assert lm.generate(ids, **options).new_ids[0] == together.new_ids[row]
    several = lm.generate(subject.tokens("right"), num_return_sequences=3, **options)
    assert several.new_ids[::3] == together.new_ids
    assert len({*several.new_ids}) > 5


# Beams


def test_beams_are_transformers_own(of_family: Subjects) -> None:
    for family in ("llama", "gemma2"):
        subject = of_family(family)
        prompts = subject.tokens("left")
        ours = subject.lm.generate(
            prompts, max_new_tokens=NEW, num_return_sequences=2, decoding=cutaway.Decoding(num_beams=3)
        )
        theirs = subject.hf.generate(  # type: ignore[operator]
            input_ids=prompts.ids,
            attention_mask=prompts.mask.long(),
            max_new_tokens=NEW,
            num_beams=3,
            num_return_sequences=2,
            do_sample=False,
            pad_token_id=1,
        )
        assert ours.new_ids == tuple(tuple(row) for row in theirs[:, prompts.ids.shape[1] :].tolist())
        assert ours.logprobs is None
        edits = [
            cutaway.add("blocks.1.resid_post", torch.linspace(-2, 2, D), phase="new"),
            cutaway.zero("blocks.0.mlp.out", positions=[[0], [1, 2], [3]]),
        ]
        cached, uncached = (
            subject.lm.generate(
                prompts, max_new_tokens=NEW, edits=edits, decoding=cutaway.Decoding(num_beams=3, use_cache=use_cache)
            )
            for use_cache in (True, False)
        )
        assert cached.new_ids == uncached.new_ids
        assert cached.receipts[1].positions == ((0,), (1, 2), (3,))
        for row, ids in enumerate(subject.rows):
            own = [edits[0], cutaway.zero("blocks.0.mlp.out", positions=[[0], [1, 2], [3]][row])]
            assert (
                subject.lm.generate(ids, max_new_tokens=NEW, edits=own, decoding=cutaway.Decoding(num_beams=3)).new_ids[
                    0
                ]
                == cached.new_ids[row]
            )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 0}, "at least 1"),
        ({"num_beams": 2, "edits": cutaway.zero("embed", rows=0)}, "no edits of single rows"),
        ({"num_beams": 2, "edits": cutaway.noise("embed", 1.0)}, "Noise depends"),
        ({"num_beams": 2, "capture": "embed"}, "neither sampled nor captured"),
        ({"num_beams": 2, "temperature": 1.0}, "neither sampled nor captured"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_beams of as many"),
        ({"stop": "x"}, "no tokenizer"),
        ({"stop": ""}, "a text at which to stop"),
        ({"stop": [3]}, "a text at which to stop"),
        ({"seed": 1.5}, "whole number"),
        ({"temperature": float("inf")}, "finite"),
    ],
)
def test_settings_that_do_not_fit_are_refused(llama: LanguageModel, options: dict[str, Any], words: str) -> None:
    with pytest.raises(CutawayError, match=words):
        llama.generate([5, 6, 7], **options)
