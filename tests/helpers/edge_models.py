"""Small random models of many families in float64, and prompt pairs of token ids for them."""

from collections.abc import Sequence
from typing import Any

import torch
from bed import BED, bed_model  # pyright: ignore[reportMissingImports]
from torch import Tensor

from cutaway.data.pairs import AlignedPairs, PromptPair, aligned
from cutaway.model.language_model import LanguageModel, attach

FAMILIES = (
    "llama",
    "gpt2",
    "gpt_neox",
    "phi",
    "gemma2",
    "mistral",
    "falcon",
    "bloom",
    "olmo2",
    "granite",
    "cohere",
    "opt",
)


ALL_FAMILIES = tuple(BED)


def single(family: str) -> LanguageModel:
    """A random model of three layers and four heads, in float32: experts have no other kernel on a CPU."""
    return attach(bed_model(family), name=family)


def double(family: str, **changes: Any) -> LanguageModel:
    """A random model of three layers and four heads, in float64."""
    return attach(bed_model(family, **changes).double(), name=family)


def pairs_for(lm: LanguageModel, lengths: Sequence[int] = (7, 7, 6, 5), seed: int = 0) -> AlignedPairs:
    """Pairs of these lengths that differ in their third token, every second one in its fifth too."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i, length in enumerate(lengths):
        ids = torch.randint(3, lm.d_vocab, (length,), generator=generator).tolist()
        other = list(ids)
        other[2] = (ids[2] + 5) % (lm.d_vocab - 3) + 3
        if i % 2:
            other[4] = (ids[4] + 7) % (lm.d_vocab - 3) + 3
        found.append(PromptPair(tuple(ids), tuple(other), 5 + i, 9 + i))
    return aligned(lm, found)


def difference(logits: Tensor, pairs: AlignedPairs) -> Tensor:
    """The logit difference in the logits' own precision."""
    return (logits.gather(1, pairs.answer[:, None]) - logits.gather(1, pairs.wrong[:, None]))[:, 0]


def repeated_heads(lm: LanguageModel) -> LanguageModel:
    """The same model with the keys and values of a group given to every query head."""
    import copy

    config = copy.deepcopy(lm.hf.config)
    config.num_key_value_heads = lm.n_heads
    model: Any = type(lm.hf)(config)
    state = dict(lm.hf.state_dict())
    for name in [n for n in state if "k_proj." in n or "v_proj." in n]:
        by_head = state[name].unflatten(0, (lm.n_kv_heads, -1))
        state[name] = by_head.repeat_interleave(lm.n_heads // lm.n_kv_heads, 0).flatten(0, 1)
    model.load_state_dict(state)
    return attach(model.double().eval(), name="repeated")
