"""Generation with edits, under the key-value cache, through Hugging Face's own `generate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cutaway.artifacts.errors import CutawayError
from cutaway.model.addressing import resolve
from cutaway.model.edits import Edit
from cutaway.model.execution import Execution, active
from cutaway.model.run import Generation
from cutaway.model.tokens import Tokens, pad_rows

if TYPE_CHECKING:
    from cutaway.model.language_model import LanguageModel


# Settings that a checkpoint's generation_config may carry and that would otherwise be added to what was asked.
_NEUTRAL: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
    "num_return_sequences": 1,
}


class _Draw(LogitsProcessor):
    """Leaves one token, drawn with a generator of its own: other threads and the global seed have no part in it."""

    def __init__(self, seed: int, device: torch.device) -> None:
        try:
            self.generator = torch.Generator(device).manual_seed(seed)
        except (TypeError, ValueError, RuntimeError) as error:
            raise CutawayError(f"A seed is a whole number below 2**63; got {seed!r}.") from error

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        drawn = torch.multinomial(scores.float().softmax(-1), 1, generator=self.generator)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


def end_ids(lm: LanguageModel) -> list[int]:
    """Token ids that end a text."""
    found = getattr(lm.hf.generation_config, "eos_token_id", None)
    if found is None and lm.tokenizer is not None:
        found = lm.tokenizer.eos_token_id
    return [] if found is None else [int(i) for i in ([found] if isinstance(found, int) else found)]


def generate(
    lm: LanguageModel,
    prompts: Tokens,
    edits: tuple[Edit, ...],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    num_return_sequences: int,
    use_cache: bool,
) -> Generation:
    """See `LanguageModel.generate`."""
    if max_new_tokens < 1 or num_return_sequences < 1 or not temperature >= 0:
        raise CutawayError("max_new_tokens and num_return_sequences are at least 1, and temperature is not negative.")
    if temperature == 0 and num_return_sequences > 1:
        raise CutawayError("Greedy decoding gives the same text every time; set a temperature for several sequences.")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise CutawayError("top_k is at least 1, and top_p lies between 0 and 1.")
    longest = int(prompts.lengths.max())
    if longest + max_new_tokens > lm.context_length:
        raise CutawayError(
            f"{longest} prompt and {max_new_tokens} new tokens exceed the context of {lm.name} ({lm.context_length})."
        )
    layout, prompts = prompts, _left_padded(prompts, lm)
    n = num_return_sequences
    table = lm.sites()
    resolved = [
        resolve(i, edit, table[name], prompts, max_new_tokens, n, layout)
        for i, edit in enumerate(edits)
        for name in table.expand(edit.site)
    ]
    execution = Execution(lm, (), resolved, prompts.mask.repeat_interleave(n, 0))
    ends = end_ids(lm)
    config = GenerationConfig(
        **_NEUTRAL,
        max_new_tokens=max_new_tokens,
        use_cache=use_cache,
        eos_token_id=ends or None,
        pad_token_id=lm.pad_id if lm.pad_id is not None else (ends[0] if ends else 0),
        bos_token_id=lm.bos_id,
    )
    draw = LogitsProcessorList()
    if temperature > 0:
        draw.append(TemperatureLogitsWarper(float(temperature)))
        if top_k is not None:
            draw.append(TopKLogitsWarper(top_k))
        if top_p is not None:
            draw.append(TopPLogitsWarper(top_p))
        draw.append(_Draw(seed, lm.device))

    def follow(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        if active() is execution:
            cache = kwargs.get("past_key_values")
            execution.end = (0 if cache is None else int(cache.get_seq_length())) + kwargs["input_ids"].shape[1]

    def answer(_module: nn.Module, _args: Any, output: Any) -> Any:
        if active() is execution and execution.editing("logits"):
            output.logits = execution.edit("logits", output.logits)
        return output

    def call() -> Tensor:
        return lm.hf.generate(  # type: ignore[operator]
            input_ids=prompts.ids.repeat_interleave(n, 0),
            attention_mask=prompts.mask.long().repeat_interleave(n, 0),
            generation_config=config,
            logits_processor=draw,
            custom_generate=None,
        )

    handles = [lm.hf.register_forward_pre_hook(follow, with_kwargs=True), lm.hf.register_forward_hook(answer)]
    try:
        with torch.no_grad():
            out = execution.forward(call)
    finally:
        for handle in handles:
            handle.remove()
    return _collect(lm, prompts, out, n, set(ends), execution)


def _left_padded(tokens: Tokens, lm: LanguageModel) -> Tokens:
    if not tokens.padded:
        return tokens
    pad = lm.pad_id if lm.pad_id is not None else 0
    ids, mask = pad_rows([tokens.row_ids(i) for i in range(len(tokens))], pad, side="left")
    return Tokens(ids.to(lm.device), mask.to(lm.device), tokens.strings)


def _collect(
    lm: LanguageModel, prompts: Tokens, out: Tensor, n: int, ends: set[int], execution: Execution
) -> Generation:
    width = prompts.ids.shape[1]
    new_rows, rows = [], []
    for i, sequence in enumerate(out[:, width:].tolist()):
        stop = next((j for j, token in enumerate(sequence) if token in ends), len(sequence))
        new_rows.append(tuple(sequence[:stop]))
        rows.append([*prompts.row_ids(i // n), *sequence[:stop]])
    ids, mask = pad_rows(rows, lm.pad_id if lm.pad_id is not None else 0)
    strings = tuple(tuple(lm.token_strings(row)) for row in rows)
    texts = tuple(
        str(lm.tokenizer.decode(list(row), skip_special_tokens=True)) if lm.tokenizer is not None else ""
        for row in new_rows
    )
    return Generation(
        texts=texts,
        new_ids=tuple(new_rows),
        prompts=prompts,
        tokens=Tokens(ids.to(lm.device), mask.to(lm.device), strings),
        receipts=execution.receipts(prompts.first.repeat_interleave(n)),
    )
