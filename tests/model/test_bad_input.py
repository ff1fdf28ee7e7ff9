"""What a library user may get wrong in memory: one sentence each, and the model answers as before."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bed import bed_model
from torch import Tensor

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.model.language_model import LanguageModel, attach

SITE = "blocks.1.resid_post"
IDS = [[3, 4, 5, 6, 7], [8, 9, 10, 11, 12]]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return attach(bed_model("llama"))


def first(logits: Tensor, _tokens: Any) -> Tensor:
    return logits[:, 3]


def cells() -> list[cutaway.Edit]:
    return [cutaway.zero(SITE, positions=i) for i in range(3)]


D = 32
WRONG: dict[str, tuple[Callable[[LanguageModel], Any], str]] = {
    "sparse ids": (lambda lm: lm.run(torch.ones(2, 3).long().to_sparse()), "neither sparse nor on the meta"),
    "ids on meta": (lambda lm: lm.run(torch.ones(1, 3, dtype=torch.long, device="meta")), "meta device"),
    "bos": (lambda lm: lm.run(IDS, bos="yes"), "bos= is True, False or None"),  # type: ignore[arg-type]
    "grad": (lambda lm: lm.run(IDS, grad=3, capture=SITE), "function of the logits"),  # type: ignore[arg-type]
    "limit of text": (lambda lm: lm.run(IDS, capture=SITE, limit_bytes="1"), "number of bytes"),  # type: ignore[arg-type]
    "limit of nan": (lambda lm: lm.run(IDS, capture=SITE, limit_bytes=math.nan), "number of bytes"),  # type: ignore[arg-type]
    "set on meta": (lambda _: cutaway.set(SITE, torch.zeros(D, device="meta")), "on the meta device"),
    "set sparse": (lambda _: cutaway.set(SITE, torch.zeros(D).to_sparse()), "sparse"),
    "set complex": (lambda _: cutaway.set(SITE, torch.zeros(D, dtype=torch.complex64)), "complex"),
    "patch on meta": (lambda _: cutaway.patch(SITE, torch.zeros(2, 5, D, device="meta")), "on the meta device"),
    "patch of nan": (lambda lm: lm.run(IDS, edits=cutaway.patch(SITE, torch.full((2, 5, D), math.nan))), "NaN"),
    "too large to set": (
        lambda lm: lm.run(IDS, edits=cutaway.set(SITE, torch.full((D,), 1e300, dtype=torch.float64))),
        "larger than the model's dtype holds",
    ),
    "too large to scale": (lambda lm: lm.run(IDS, edits=cutaway.scale(SITE, 1e38)), "NaN or infinite"),
    "larger than fp32": (lambda _: cutaway.clamp(SITE, torch.ones(D), minimum=1e300), "as fp32 holds them"),
    "too large to generate": (
        lambda lm: lm.generate(IDS, max_new_tokens=2, edits=cutaway.scale(SITE, 1e38)),
        "NaN or infinite",
    ),
    "clamp by text": (lambda _: cutaway.clamp(SITE, torch.ones(D), minimum="a", maximum=1), "is a number"),  # type: ignore[arg-type]
    "complex function": (
        lambda lm: lm.run(IDS, edits=cutaway.function(SITE, lambda x: x.to(torch.complex64))),
        "complex",
    ),
    "no cells": (lambda lm: lm.sweep(IDS, None, first), "cells= is a list"),  # type: ignore[arg-type]
    "one cell": (lambda lm: lm.sweep(IDS, cells()[0], first), "cells= is a list"),  # type: ignore[arg-type]
    "no metric": (lambda lm: lm.sweep(IDS, cells(), 3), "metric= is a function"),  # type: ignore[arg-type]
    "rows of text": (lambda lm: lm.sweep(IDS, cells(), first, batch_rows="2"), "batch_rows is a whole"),  # type: ignore[arg-type]
    "start": (lambda lm: lm.sweep(IDS, cells(), first, start=3), "start= is an earlier part"),  # type: ignore[arg-type]
    "layer": (lambda lm: lm.w_o(9), "no layer 9"),
    "layer of text": (lambda lm: lm.w_q("1"), "no layer '1'"),  # type: ignore[arg-type]
    "stream": (lambda lm: lm.unembed(torch.zeros(3)), r"is \[..., 32\]"),
    "vocabulary": (lambda lm: lm.output_directions([999]), "between 0 and 96"),
    **{
        f"ids {name}": (lambda lm, ids=ids: lm.output_directions(ids), "Token ids (are whole numbers|must be between)")
        for name, ids in {
            "text": ["zz"],
            "one text": "zz",
            "none": None,
            "fractions": [1.5],
            "huge": [10**30],
            "below 0": [-1],
            "float tensor": torch.tensor([1.0]),
            "mask": torch.tensor([True]),
            "on meta": torch.ones(1, device="meta").long(),
            "ragged": [[1], [1, 2]],
            "object": object(),
        }.items()
    },
    **{
        f"strings {name}": (lambda lm, ids=ids: lm.token_strings(ids), "Token(s| ids) (are|must be)")
        for name, ids in {
            "below 0": [-1],
            "above": [97],
            "huge": [10**30],
            "text": "ab",
            "nan": [math.nan],
            "none": None,
            "number": 3,
            "rows": [[1, 2]],
            "fraction": [1.5],
        }.items()
    },
    "pickled model": (pickle.dumps, r"neither pickled nor copied; load it again by its name \(LlamaForCausalLM\)"),
    "copied model": (copy.deepcopy, "neither pickled nor copied"),
    "pickled run": (lambda lm: pickle.dumps(lm.run(IDS)), r"write it with run\.save"),
    "pickled generation": (lambda lm: pickle.dumps(lm.generate(IDS, max_new_tokens=1)), "is not pickled"),
    "pickled edit with a run": (lambda lm: pickle.dumps(cutaway.patch(SITE, lm.run(IDS, capture=SITE))), "save_edits"),
    "no stream": (lambda lm: lm.unembed([0.0] * D), "is a tensor"),  # type: ignore[arg-type]
    "stream on meta": (lambda lm: lm.unembed(torch.zeros(D, device="meta")), "nor on the meta device"),
    "complex stream": (lambda lm: lm.unembed(torch.zeros(D, dtype=torch.complex64)), "real numbers"),
    "sparse stream": (lambda lm: lm.unembed(torch.zeros(2, D).to_sparse()), "neither sparse"),
    "too few rows": (
        lambda lm: lm.run(IDS, edits=cutaway.function(SITE, lambda x: x[:1])),
        r"\[1, 5, 32\]; it was given",
    ),
    "too few rows in a sweep": (
        lambda lm: lm.sweep(IDS, [cutaway.function(SITE, lambda x: x[:1])], first),
        r"returned a tensor of shape \[1, .*; it was given",
    ),
    "too few rows in a generation": (
        lambda lm: lm.generate(IDS, max_new_tokens=2, edits=cutaway.function(SITE, lambda x: x[:-1])),
        "returned a tensor of shape",
    ),
    "sparse function": (lambda lm: lm.run(IDS, edits=cutaway.function(SITE, lambda x: x.to_sparse())), "sparse"),
    "complex metric": (lambda lm: lm.run(IDS, capture=SITE, grad=lambda x: x.sum() * 1j), "is complex"),
    "beams": (
        lambda lm: lm.generate(IDS, max_new_tokens=2, decoding=cutaway.Decoding(num_beams=10**6)),
        "more than the 97 tokens",
    ),
    **{
        f"device {name}": (
            lambda _, name=name: cutaway.load("atlas", device=name),
            "not a device|cannot be used here|no GPU here|PyTorch sees|holds no values",
        )
        for name in ("cuda:7", "mps", "meta", "xpu", "hpu", "vulkan", "cuda:x")
    },
    "user": (lambda _: cutaway.load("~nobody-of-this-name/model"), "check the name"),
    "zero byte": (lambda _: cutaway.load("a\0b"), "check the name"),
    "tokenizer": (lambda lm: attach(lm.hf, "atlas"), "one of transformers; got 'atlas'"),  # type: ignore[arg-type]
    "model": (lambda _: cutaway.load(3), "named by text or a path; got 3"),  # type: ignore[arg-type]
    "device": (lambda _: cutaway.load("atlas", device=object()), "not a device"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("what", WRONG)
def test_bad_input_is_one_sentence_and_leaves_the_model_alone(lm: LanguageModel, what: str) -> None:
    before = lm.run(IDS).logits
    do, says = WRONG[what]
    with pytest.raises(CutawayError, match=says) as raised:
        do(lm)
    assert "\n" not in str(raised.value)
    assert before is not None
    assert torch.equal(before, lm.run(IDS).logits)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [
        {name: value}
        for name in ("max_new_tokens", "seed", "num_return_sequences", "num_beams", "temperature")
        for value in ("a", None, True, *([] if name == "temperature" else [1.5]))
    ]
    + [{"top_k": 1.5}, {"top_k": "a"}, {"top_p": "a"}, {"stop": 3}, {"stop": None}],
    ids=str,
)
def test_settings_of_another_type_are_refused(lm: LanguageModel, settings: dict[str, Any]) -> None:
    for generate in (lm.generate, lm.generate_stream):
        with pytest.raises(CutawayError, match=next(iter(settings)) if "seed" not in settings else "(?i)seed"):
            generate(IDS, **{"max_new_tokens": 2, **settings})


@pytest.mark.parametrize("length", [1e-30, 1.0, 1e30])
def test_a_direction_of_any_length_is_the_same_direction(lm: LanguageModel, length: float) -> None:
    u = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(0))
    run = lm.run(IDS, edits=cutaway.project_out(SITE, length * u), capture=SITE)
    left = run[SITE] @ (u / u.norm())
    assert float(left.abs().max()) < 1e-5 * float(run[SITE].abs().max())
    assert run.receipts[0].mean_abs_delta > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_of_two_dtypes_are_named_where_the_model_itself_cannot_run(family: str, dtype: torch.dtype) -> None:
    lm = attach(bed_model(family))
    before = lm.run(IDS).logits
    layer = lm.family.layers[1].module
    layer.to(dtype)
    short = str(dtype).removeprefix("torch.")
    calls: dict[str, Callable[[], Any]] = {
        "run": lambda: lm.run(IDS),
        "capture": lambda: lm.run(IDS, capture="blocks.*.resid_post"),
        "gradient": lambda: lm.run(IDS, capture=SITE, grad=lambda x: x.sum()),
        "sweep": lambda: lm.sweep(IDS, cells(), first),
        "generate": lambda: lm.generate(IDS, max_new_tokens=2),
    }
    for call in calls.values():
        with pytest.raises(
            CutawayError, match=f"cannot be run: in layer 1 .* is {short}, and in layer 0 float32; give"
        ):
            call()
    layer.to(torch.float32)
    if dtype is torch.float64:  # nothing was lost
        assert torch.equal(lm.run(IDS).logits, before)  # type: ignore[arg-type]


def test_an_unembedding_of_another_dtype_is_named() -> None:
    lm = attach(bed_model("llama"))
    lm.family.unembed.half()
    with pytest.raises(CutawayError, match="its unembedding is float16, and its layers are float32"):
        lm.run(IDS)


def test_tokens_go_through_pickle_with_their_strings(lm: LanguageModel) -> None:
    tokens = lm.tokens([IDS[0], IDS[1][:2]])
    there = pickle.loads(pickle.dumps(tokens))
    assert there.strings == tokens.strings
    assert torch.equal(there.ids, tokens.ids)
    assert torch.equal(there.mask, tokens.mask)
    assert there.lengths.tolist() == [5, 2]
    assert torch.equal(lm.run(there).logits, lm.run(tokens).logits)  # type: ignore[arg-type]
