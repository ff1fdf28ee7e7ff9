"""What a library user may get wrong in memory: one sentence each, and the model answers as before."""

import math
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
