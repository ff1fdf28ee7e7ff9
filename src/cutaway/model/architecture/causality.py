"""Whether attention looks back alone: what a cache of keys and values, and a shared prefix, rely on."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

from cutaway.model.attached import Attached
from cutaway.model.forward.execution import Execution
from cutaway.model.forward.shadow import shadowed
from cutaway.model.sweep.shortcuts import call
from cutaway.model.tokens import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_LENGTH = 8


def says_bidirectional(model: PreTrainedModel) -> bool:
    """Whether the configuration says that text attends both ways ("vision" is about images alone)."""
    return getattr(model.config.get_text_config(), "use_bidirectional_attention", None) in (True, "all")


def is_causal(lm: Attached) -> bool:
    """Whether later tokens leave what is computed at earlier ones as it is, by a forward of two short rows that differ
    in their second half. Dropout is off in it. A row of one token is all that a context of one holds: True.
    """
    if says_bidirectional(lm.hf):
        return False
    length = min(_LENGTH, lm.context_length)
    same = length // 2
    if same == 0:
        return True
    ids = torch.randint(0, lm.d_vocab_in, (1, length), generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    ids[1, same:] = (ids[1, same:] + 1) % lm.d_vocab_in
    tokens = Tokens.whole(ids.to(lm.device), ())
    with ExitStack() as stack:
        for module in lm.hf.modules():
            if module.training:
                stack.enter_context(shadowed(module, "training", bool))
        logits = Execution(lm, (), (), tokens.mask).forward(lambda: call(lm, tokens, 0, None)).logits
    one, other = logits[:, :same].double()
    # both rows are in one forward, where rounding is the same but for odd places in a batch of an expert's
    allowed = 1e-4 if lm.dtype in (torch.float32, torch.float64) else 1e-2
    return float((one - other).abs().max()) <= allowed * float(one.abs().max())
