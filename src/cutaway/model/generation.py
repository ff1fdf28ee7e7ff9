"""Generation with edits, under the key-value cache, through Hugging Face's own `generate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from cutaway.artifacts.errors import CutawayError
from cutaway.model.addressing import resolve
from cutaway.model.edits import Edit
from cutaway.model.execution import Execution
from cutaway.model.run import Generation
from cutaway.model.tokens import Tokens, pad_rows

if TYPE_CHECKING:
    from cutaway.model.language_model import LanguageModel


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
    if max_new_tokens < 1 or num_return_sequences < 1 or temperature < 0:
        raise CutawayError("max_new_tokens and num_return_sequences are at least 1, and temperature is not negative.")
    if temperature == 0 and num_return_sequences > 1:
        raise CutawayError("Greedy decoding gives the same text every time; set a temperature for several sequences.")
    longest = int(prompts.lengths.max())
    if longest + max_new_tokens > lm.context_length:
        raise CutawayError(
            f"{longest} prompt and {max_new_tokens} new tokens exceed the context of {lm.name} ({lm.context_length})."
        )
    prompts = _left_padded(prompts, lm)
    n = num_return_sequences
    table = lm.sites()
    resolved = [
        resolve(i, edit, table[name], prompts, max_new_tokens, n)
        for i, edit in enumerate(edits)
        for name in table.expand(edit.site)
    ]
    execution = Execution(lm, (), resolved, prompts.mask.repeat_interleave(n, 0))
    ends = end_ids(lm)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        num_return_sequences=n,
        num_beams=1,
        use_cache=use_cache,
        eos_token_id=ends or None,
        pad_token_id=lm.pad_id if lm.pad_id is not None else (ends[0] if ends else 0),
        bos_token_id=lm.bos_id,
        **({"temperature": temperature, "top_k": top_k or 0, "top_p": top_p or 1.0} if temperature > 0 else {}),
    )

    def follow(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        execution.offset = 0 if cache is None else int(cache.get_seq_length())

    def call() -> Tensor:
        return lm.hf.generate(  # type: ignore[operator]
            input_ids=prompts.ids, attention_mask=prompts.mask.long(), generation_config=config, custom_generate=None
        )

    handle = lm.hf.register_forward_pre_hook(follow, with_kwargs=True)
    devices = [lm.device] if lm.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            out = execution.forward(call)
    finally:
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
