"""Where a run that takes over the stream of an earlier one starts."""

from __future__ import annotations

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.model.attached import Attached
from cutaway.model.forward.run import Run
from cutaway.model.sites import layer_of
from cutaway.model.tokens import Tokens


def resume_point(lm: Attached, source: Run, touched: set[str], tokens: Tokens) -> tuple[int, Tensor | None]:
    """The deepest layer that a run of the same tokens lets us start at, and the stream there.

    What the source edited is not taken over: the stream is read below its first edit.
    """
    if getattr(source, "site_table", None) is not lm.sites():
        raise CutawayError(f"resume= needs a run of {lm.name}; this one comes from another model.")
    if source.weights != lm.weights_state():
        raise CutawayError(f"resume= needs a run of {lm.name} as it is; its weights were changed since: run again.")
    given = source.tokens
    if len(given) not in (1, len(tokens)) or given.ids.shape[1] != tokens.ids.shape[1]:
        raise CutawayError("resume= needs a run of the same tokens, or of one row of the same length.")
    same_ids = torch.equal(given.ids.expand_as(tokens.ids), tokens.ids)
    if not same_ids or not torch.equal(given.mask.expand_as(tokens.mask), tokens.mask):
        raise CutawayError("resume= needs a run of the same tokens; these differ.")
    ends = {name for name in touched if layer_of(name) is None and name in ("embed", "pos_embed")}
    inside = [layer for name in touched if (layer := layer_of(name)) is not None]
    deepest = 0 if ends else min(inside, default=lm.n_layers - 1)
    edited = [lm.sites().order(receipt.site) for receipt in source.receipts]
    for layer in range(deepest, 0, -1):
        for name in (f"blocks.{layer}.resid_pre", f"blocks.{layer - 1}.resid_post"):
            if name in source and min(edited, default=len(lm.sites())) > lm.sites().order(name):
                return layer, source[name].expand(len(tokens), -1, -1).clone()
    return 0, None
