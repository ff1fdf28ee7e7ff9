"""One threshold for all latents such that a wanted number of them are active on a token, on average."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.dictionaries import sparse
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.selectors import BatchTopK, ReLU, TopK


@torch.no_grad()
def calibrate(
    dictionary: Dictionary, batches: Callable[[], Iterable[Tensor]], l0: float, *, at_most: bool = False
) -> Dictionary:
    """Give a dictionary one threshold for all latents, such that a wanted number of them are active per token.

    Then a = relu(h)·1[h > θ]; θ is exact: the (l0·N + 1)-th largest pre-activation of all N tokens.

    Args:
        dictionary: Of ReLU, TopK or BatchTopK.
        batches: Gives batches [n, d_in] of the sample, the same each time it is called.
        l0: Active latents per token, on average.
        at_most: Where fewer are ever positive, let all of those be active, instead of raising.

    Returns:
        A BatchTopK dictionary of the same weights.

    Raises:
        CutawayError: another selector, an empty sample, an l0 that is not positive, or more than are ever positive.
    """
    if not isinstance(dictionary.selector, ReLU | TopK | BatchTopK):
        raise CutawayError(f"a {dictionary.selector.name} dictionary has thresholds of its own")
    if not l0 > 0 or not math.isfinite(l0):
        raise CutawayError(f"l0 = {l0}: a threshold is set for more than 0 active latents per token")
    room = 4.0
    while True:
        kept: list[Tensor] = []
        lowest = -math.inf  # everything above it has been kept
        tokens = 0
        for x in batches():
            pre = dictionary.pre_activations(x)
            count = math.ceil(room * l0 * len(x))
            values = pre.view(-1)[sparse.largest_of_all(pre, count)]
            if len(values) == count:
                lowest = max(lowest, float(values.min()))
            kept.append(values)
            tokens += len(x)
        if not tokens:
            raise CutawayError("there are no activations to set a threshold on")
        found = torch.cat(kept)
        wanted = round(l0 * tokens)
        if lowest == -math.inf and len(found) <= wanted:
            if len(found) < wanted and not at_most:
                raise CutawayError(
                    f"only {len(found) / tokens:.4g} latents are positive on a token, fewer than the wanted {l0:g}"
                )
            threshold = 0.0
        else:
            threshold = float(found.kthvalue(len(found) - wanted).values) if len(found) > wanted else -math.inf
        if threshold >= lowest:
            k = max(1, min(dictionary.d_sae, round(l0)))
            return replace(dictionary, selector=BatchTopK(k, max(0.0, threshold)))
        room *= 2
