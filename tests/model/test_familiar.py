"""What people know from TransformerLens, SAELens, nnsight: the same result, or the call that does it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import tiny_model
from transformers import PreTrainedTokenizerFast

import cutaway
from cutaway.artifacts.errors import CutawayError, NoSuchSite
from cutaway.model.familiar import GENERATE_OPTIONS, LOAD_OPTIONS, MODEL, RUN, RUN_OPTIONS
from cutaway.model.language_model import LanguageModel, attach

IDS = [5, 6, 7]


@pytest.fixture
def speaker(words: PreTrainedTokenizerFast) -> Any:
    """A model whose tokenizer puts a beginning-of-text token; typed as the stranger whose names it is asked for."""
    return attach(tiny_model("llama"), words)


# The same thing: the result


def test_tokens_and_settings(speaker: Any) -> None:
    ids = speaker.tokens("the cat").ids
    assert torch.equal(speaker.to_tokens("the cat"), ids)
    assert torch.equal(speaker.to_tokens("the cat", prepend_bos=False), speaker.tokens("the cat", bos=False).ids)
    assert speaker.to_str_tokens("the cat") == list(speaker.tokens("the cat").strings[0])
    assert len(speaker.to_str_tokens(["the cat", "the cat"])) == 2
    assert speaker.to_string(ids[0, 1:]) == speaker.tokenizer.decode(ids[0, 1:].tolist())
    assert speaker.to_single_token("cat") == int(ids[0, -1])
    cfg = speaker.cfg
    assert (cfg.n_layers, cfg.d_model, cfg.n_heads) == (speaker.n_layers, speaker.d_model, speaker.n_heads)
    assert (cfg.n_ctx, cfg.d_vocab) == (speaker.context_length, speaker.d_vocab_in)
    with pytest.raises(AttributeError, match=r"lm\.hf\.config"):
        cfg.act_fn  # noqa: B018


def test_calling_and_running_with_a_cache(speaker: Any) -> None:
    run = speaker.run("the cat", capture="blocks.*.resid_post")
    assert torch.equal(speaker("the cat"), run.logits)
    assert speaker("the cat", return_type=None) is None
    logits, cache = speaker.run_with_cache("the cat", names_filter=lambda name: name.endswith("hook_resid_post"))
    assert torch.equal(logits, run.logits)
    assert cache.sites == run.sites
    assert torch.equal(cache["resid_post", 1], run["blocks.1.resid_post"])
    everything = speaker.run_with_cache("the cat")[1]
    assert everything.sites == tuple(speaker.sites().present())
    assert speaker.run_with_cache("the cat", names_filter="blocks.0.hook_resid_pre")[1].sites == ("blocks.0.resid_pre",)


def test_a_text_that_transformerlens_would_begin_otherwise_is_asked_about(words: PreTrainedTokenizerFast) -> None:
    words._tokenizer.post_processor = None  # type: ignore[attr-defined]  # it puts no beginning-of-text token
    plain: Any = attach(tiny_model("llama"), words)
    assert plain.bos_id is not None
    assert plain.tokens("the cat").row_ids(0)[0] != plain.bos_id
    for call in (lambda: plain.to_tokens("the cat"), lambda: plain("the cat"), lambda: plain.run_with_cache("the cat")):
        with pytest.raises(CutawayError, match=r"bos=True\) or bos=False"):
            call()
    assert torch.equal(plain.to_tokens("the cat", prepend_bos=True), plain.tokens("the cat", bos=True).ids)
    assert torch.equal(plain(IDS), plain.run(IDS).logits)  # ids are what they are


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"do_sample": False, "temperature": 0.7}, {}),
        ({"do_sample": True}, {"temperature": 1.0}),
        (
            {"do_sample": True, "temperature": 0.7, "top_k": 5},
            {"temperature": 0.7, "decoding": cutaway.Decoding(top_k=5)},
        ),
        ({"use_past_kv_cache": False}, {"decoding": cutaway.Decoding(use_cache=False)}),
        ({"num_beams": 2, "limit_bytes": 9}, {"decoding": cutaway.Decoding(num_beams=2, limit_bytes=9)}),
        ({"stop_at_eos": True, "verbose": False}, {}),
    ],
)
def test_options_of_generate(llama: LanguageModel, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    made = llama.generate(IDS, max_new_tokens=4, **theirs)
    assert made.new_ids == llama.generate(IDS, max_new_tokens=4, **ours).new_ids
    with pytest.raises(TypeError, match="unexpected keyword argument 'tempo'"):
        llama.generate(IDS, tempo=1)  # type: ignore[call-arg]


def test_options_of_run_and_load(speaker: Any) -> None:
    assert torch.equal(
        speaker.run("the cat", prepend_bos=False, return_type="logits").logits, speaker.run("the cat", bos=False).logits
    )
    assert speaker.run("the cat", names_filter="blocks.0.resid_pre").sites == ("blocks.0.resid_pre",)
    with pytest.raises(TypeError, match="give one of them"):
        speaker.run("the cat", bos=True, prepend_bos=True)
    for named in (cutaway.load("atlas", torch_dtype="bfloat16", fold_ln=False),):  # type: ignore[call-arg]
        assert named.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="weights stay as they are"):
        cutaway.load("atlas", fold_ln=True)  # type: ignore[call-arg]


SHORT = {
    ("resid_post", 1): "blocks.1.resid_post",
    ("resid_pre", -1): "blocks.2.resid_pre",
    ("q", 0, "attn"): "blocks.0.attn.q",
    ("z", 0): "blocks.0.attn.z",
    ("pattern", 1, "attn"): "blocks.1.attn.pattern",
    ("attn", 1): "blocks.1.attn.pattern",
    ("attn_scores", 1): "blocks.1.attn.scores",
    ("attn_out", 1): "blocks.1.attn.out",
    ("mlp_out", 2): "blocks.2.mlp.out",
    ("post", 2): "blocks.2.mlp.post",
    ("post", 2, "mlp"): "blocks.2.mlp.post",
    ("scale", 0, "ln1"): "blocks.0.ln1.scale",
    ("scale",): "ln_final.scale",
    ("embed",): "embed",
}


def test_short_names_of_a_cache(llama: LanguageModel) -> None:
    run = llama.run(IDS, capture=list(SHORT.values()))
    for short, site in SHORT.items():
        assert torch.equal(run[short], run[site]), short
    cache: Any = llama.run(IDS, capture="blocks.*.attn.z")
    assert torch.equal(cache.stack_activation("z"), cache.stack("blocks.*.attn.z"))
    with pytest.raises(NoSuchSite, match="did not capture"):
        run["v", 0]


# Something else: the call that does it


@pytest.mark.parametrize("name", MODEL)
def test_a_name_at_a_model_says_the_call(llama: LanguageModel, name: str) -> None:
    assert not hasattr(llama, name)  # the error is an AttributeError too
    with pytest.raises(CutawayError) as raised:
        getattr(llama, name)
    assert MODEL[name] in str(raised.value)
    assert "\n" not in str(raised.value)


def test_modules_are_in_the_hugging_face_model_and_typing_errors_are_errors(llama: LanguageModel) -> None:
    with pytest.raises(AttributeError, match=r"lm\.hf\.lm_head"):
        llama.lm_head  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'to_tokenz'"):
        llama.to_tokenz  # type: ignore[attr-defined]  # noqa: B018


def test_a_name_at_a_run_or_generation_says_the_call(llama: LanguageModel) -> None:
    run, made = llama.run(IDS), llama.generate(IDS, max_new_tokens=1)
    for name, call in RUN.items():
        for held in (run, made):
            if name in type(held).__dict__:
                continue
            with pytest.raises(AttributeError) as raised:
                getattr(held, name)
            assert call in str(raised.value)


def _taking(lm: LanguageModel) -> list[tuple[dict[str, Any], Callable[..., Any]]]:
    return [
        (RUN_OPTIONS, lambda **o: lm.run(IDS, **o)),
        (GENERATE_OPTIONS, lambda **o: lm.generate(IDS, **o)),
        (LOAD_OPTIONS, lambda **o: cutaway.load("atlas", **o)),
    ]


def test_every_option_that_is_something_else_says_the_call(llama: LanguageModel) -> None:
    for table, call in _taking(llama):
        for name, option in table.items():
            if isinstance(option, str) and not option.startswith("="):
                with pytest.raises(TypeError) as raised:
                    call(**{name: object()})
                assert option in str(raised.value)
                assert isinstance(raised.value, CutawayError)


# A run is a mapping


def test_a_run_is_a_mapping_of_what_it_captured(llama: LanguageModel) -> None:
    run = llama.run(IDS, capture=["blocks.*.resid_post", "blocks.0.attn.z"])
    assert list(run) == list(run.keys()) == list(run.sites)
    assert len(run) == len(run.sites) == llama.n_layers + 1
    assert {site: value.shape for site, value in run.items()} == {site: run[site].shape for site in run}
    assert all(torch.equal(a, b) for a, b in zip(run.values(), (run[site] for site in run), strict=True))
    assert "blocks.0.hook_resid_post" in run
    assert "blocks.0.resid_pre" not in run
    assert "no such site" not in run
    assert run.get("blocks.1.attn.z") is None
    empty = llama.run(IDS)
    assert len(empty) == 0
    assert empty
    assert {run: 1}[run] == 1
    assert run != llama.run(IDS, capture=["blocks.*.resid_post", "blocks.0.attn.z"])
    assert len(llama.generate(IDS, max_new_tokens=1, capture="blocks.*.mlp.out")) == llama.n_layers
