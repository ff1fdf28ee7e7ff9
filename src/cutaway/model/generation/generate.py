"""Generation with edits and captures, under the key-value cache, through Hugging Face's own `generate`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cutaway.artifacts.errors import CutawayError
from cutaway.model.attached import Attached
from cutaway.model.edits.edit import Edit, Receipt
from cutaway.model.edits.resolve import resolve
from cutaway.model.forward.current import active
from cutaway.model.forward.run import CAPTURE_LIMIT, Generation, check_capture_size
from cutaway.model.generation.decoding import Draw, Ends, GenerationStep, LogProbabilities, Recorder, Steps, cut
from cutaway.model.generation.settings import Settings
from cutaway.model.own.module import OwnModel
from cutaway.model.tokens import Tokens, pad_rows

# Settings that a checkpoint's generation_config may carry and that would otherwise be added to what was asked.
_NEUTRAL: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
}


def _end_ids(lm: Attached) -> list[int]:
    """Token ids that end a text."""
    found = getattr(lm.hf.generation_config, "eos_token_id", None)
    if found is None and lm.tokenizer is not None:
        found = lm.tokenizer.eos_token_id
    return [] if found is None else [int(i) for i in ([found] if isinstance(found, int) else found)]


def generate(
    lm: Attached,
    prompts: Tokens,
    edits: tuple[Edit, ...],
    settings: Settings,
    on_step: Callable[[GenerationStep, Callable[[], None]], object] | None = None,
) -> Generation:
    """See `LanguageModel.generate`. `on_step` gets each step, and a function that ends the generation after it."""
    if prompts.longest + settings.max_new_tokens > lm.context_length:
        raise CutawayError(
            f"{prompts.longest} prompt and {settings.max_new_tokens} new tokens exceed the context of {lm.name} "
            f"({lm.context_length})."
        )
    if settings.num_beams > 1 and (on_step is not None or any(edit.rows is not None for edit in edits)):
        raise CutawayError(
            "Beams trade places as they go, so they take no edits of single rows and cannot be streamed; leave out "
            "num_beams, or edit every row."
        )
    if settings.num_beams > lm.d_vocab:
        raise CutawayError(
            f"num_beams is {settings.num_beams}, more than the {lm.d_vocab} tokens there are; take fewer."
        )
    if settings.num_beams > 1 and any(edit.kind == "noise" for edit in edits):
        raise CutawayError(
            "Noise depends on a row's own tokens, and beams trade them as they go; leave out num_beams, or the noise."
        )
    if isinstance(lm.hf, OwnModel):  # which keeps no keys and values
        settings = replace(settings, use_cache=False)
        if lm.d_vocab > lm.d_vocab_in:
            raise CutawayError(
                f"{lm.name} answers with {lm.d_vocab} ids and reads {lm.d_vocab_in}, so it cannot read its answers."
            )
    if settings.stops and lm.tokenizer is None:
        raise CutawayError("stop= names texts, and this model has no tokenizer; attach one to use text.")
    captured, cached = settings.capture is not None, settings.use_cache
    if cached and not lm.causal:
        raise CutawayError(
            f"Attention in {lm.name} is not causal: each new token changes what is computed at those before it, and a "
            "cache would keep that as it was; generate with use_cache=False."
        )
    if lm.ropes is not None:
        new = settings.max_new_tokens
        lm.ropes.check_generation(lm.name, prompts.lengths, new, captured=captured, cached=cached)
    layout, prompts = prompts, _left_padded(prompts, lm)
    width, n = prompts.ids.shape[1], settings.num_return_sequences
    copies = max(n, settings.num_beams)  # rows that a prompt takes inside generate
    table = lm.sites()
    names = [] if settings.capture is None else table.expand_all(settings.capture)
    limit = CAPTURE_LIMIT if settings.limit_bytes is None else settings.limit_bytes
    columns = width + settings.max_new_tokens
    check_capture_size(table, names, len(prompts) * n, columns, lm.dtype.itemsize, limit)
    resolved = [
        resolve(i, edit, table[name], prompts, settings.max_new_tokens, copies, layout)
        for i, edit in enumerate(edits)
        for name in table.expand(edit.site)
    ]
    recorder = Recorder(lm, names, resolved, prompts.mask.repeat_interleave(copies, 0), settings.use_cache)
    ends = _end_ids(lm)
    until = Ends(lm.tokenizer, settings.stops, width, len(prompts) * n, late=bool(names))
    scores = LogProbabilities()
    steps = None
    if on_step is not None:

        def stop_now() -> None:
            until.cancelled = True

        steps = Steps(
            lm.tokenizer,
            ends,
            until,
            settings.max_new_tokens,
            lambda step: on_step(step, stop_now),
        )
    out = _call(lm, prompts, settings, recorder, ends, until, scores, steps)
    if settings.num_beams > 1:  # beams of one prompt count as one row
        for edit in resolved:
            edit.touched = edit.touched.unflatten(0, (len(prompts), copies)).any(1)
        receipts = recorder.receipts(prompts.first)
    else:
        scores.settle(out)
        receipts = recorder.receipts(prompts.first.repeat_interleave(n))
    made = settings.max_new_tokens if steps is None or not until.cancelled else steps.made
    return _collect(lm, prompts, out, settings, ends, until.lengths, made, recorder, names, scores, receipts, edits)


def _call(
    lm: Attached,
    prompts: Tokens,
    settings: Settings,
    recorder: Recorder,
    ends: list[int],
    until: Ends,
    scores: LogProbabilities,
    steps: Steps | None,
) -> Tensor:
    """The call of transformers' `generate`: prompts and new tokens, [rows, columns]."""
    beams, n = settings.num_beams, settings.num_return_sequences
    config = GenerationConfig(
        **_NEUTRAL,
        **({"length_penalty": 1.0, "early_stopping": False} if beams > 1 else {}),
        num_beams=beams,
        num_return_sequences=n if beams > 1 else 1,
        # to look at the last token too, one more is generated and thrown away
        max_new_tokens=settings.max_new_tokens + bool(recorder.capture),
        use_cache=settings.use_cache,
        eos_token_id=ends or None,
        pad_token_id=lm.pad_id if lm.pad_id is not None else (ends[0] if ends else 0),
        bos_token_id=lm.bos_id,
    )
    processors = LogitsProcessorList([scores] if beams == 1 else [])
    if settings.temperature > 0:
        processors.append(TemperatureLogitsWarper(float(settings.temperature)))
        if settings.top_k is not None:
            processors.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p is not None:
            processors.append(TopPLogitsWarper(settings.top_p))
        processors.append(Draw(settings.seed, prompts, n))
    options: dict[str, Any] = {}
    if (
        recorder.capture & {"logits", "logits_precap"}
        and "logits_to_keep" in inspect.signature(lm.hf.forward).parameters
    ):
        options["logits_to_keep"] = 0  # all of them
    if settings.stops or steps is not None:
        options["stopping_criteria"] = StoppingCriteriaList([until])

    def follow(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        if active() is recorder:
            recorder.begin(kwargs["input_ids"])

    def answer(_module: nn.Module, _args: Any, output: Any) -> Any:
        if active() is recorder and recorder.wants("logits"):
            output.logits = recorder.touch("logits", output.logits)
        return output

    def call() -> Tensor:
        return lm.hf.generate(  # type: ignore[operator]
            input_ids=prompts.ids.repeat_interleave(1 if beams > 1 else n, 0),
            attention_mask=prompts.mask.long().repeat_interleave(1 if beams > 1 else n, 0),
            generation_config=config,
            logits_processor=processors,
            streamer=steps,
            custom_generate=None,
            **options,
        )

    handles = [lm.hf.register_forward_pre_hook(follow, with_kwargs=True), lm.hf.register_forward_hook(answer)]
    try:
        with torch.no_grad():
            return recorder.forward(call)
    finally:
        for handle in handles:
            handle.remove()


def _left_padded(tokens: Tokens, lm: Attached) -> Tokens:
    if not tokens.padded:
        return tokens
    pad = lm.pad_id if lm.pad_id is not None else 0
    ids, mask = pad_rows([tokens.row_ids(i) for i in range(len(tokens))], pad, side="left")
    return Tokens(ids.to(lm.device), mask.to(lm.device), tokens.spelling)


def _collect(
    lm: Attached,
    prompts: Tokens,
    out: Tensor,
    settings: Settings,
    ends: list[int],
    lengths: list[int | None],
    made: int,
    recorder: Recorder,
    names: list[str],
    scores: LogProbabilities,
    receipts: tuple[Receipt, ...],
    edits: tuple[Edit, ...],
) -> Generation:
    width, n = prompts.ids.shape[1], settings.num_return_sequences
    new_rows, rows, texts = [], [], []
    for i, sequence in enumerate(out[:, width:].tolist()):
        end = next((j for j, token in enumerate(sequence) if token in ends), len(sequence))
        new = tuple(sequence[: min(end, made, lengths[i] or made)])
        new_rows.append(new)
        rows.append([*prompts.row_ids(i // n), *new])
        text = "" if lm.tokenizer is None else str(lm.tokenizer.decode(list(new), skip_special_tokens=True))
        texts.append(cut(text, settings.stops))
    ids, mask = pad_rows(rows, lm.pad_id if lm.pad_id is not None else 0)
    tokens = Tokens(ids.to(lm.device), mask.to(lm.device), lambda: lm.spelled(rows))
    first = prompts.first.repeat_interleave(n).tolist()
    return Generation(
        texts=tuple(texts),
        new_ids=tuple(new_rows),
        prompts=prompts,
        tokens=tokens,
        receipts=receipts,
        logprobs=scores.rows(new_rows) if settings.num_beams == 1 else None,
        captured=recorder.aligned(names, tokens, first),
        edits=edits,
        site_table=lm.sites(),
        model=lm.name,
        identity=lm.identity_at(lm.weights_state()),
    )
