"""Which tokens a latent's decoder direction raises and lowers, on the direct path to the output."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cutaway.dictionaries.dictionary import Dictionary
from cutaway.model.language_model import LanguageModel


@dataclass(frozen=True)
class LogitEffects:
    """Tokens whose logit one unit of a latent raises most and lowers most, on the direct path only.

    `promotes`, `suppresses`: (token, change of its logit against the mean over the vocabulary, per unit of activation
    and at a final-norm divisor of 1). What later layers make of the direction is not in these numbers.
    """

    latent: int
    promotes: tuple[tuple[str, float], ...]
    suppresses: tuple[tuple[str, float], ...]

    def to_json(self) -> dict[str, Any]:
        return {"latent": self.latent, "promotes": list(self.promotes), "suppresses": list(self.suppresses)}

    def __str__(self) -> str:
        up = " ".join(f"{token!r} {value:+.2f}" for token, value in self.promotes)
        down = " ".join(f"{token!r} {value:+.2f}" for token, value in self.suppresses)
        return f"latent {self.latent} promotes {up}; suppresses {down} (direct path)"


def direct_logits(lm: LanguageModel, directions: Tensor) -> Tensor:
    """Change of every logit per unit of a direction [n, d] in the last stream: [n, V], centred over the vocabulary.

    With its divisor fixed (here at 1) the final norm is linear: it subtracts the mean (LayerNorm only) and multiplies
    by the gain. A final softcap is left out.
    """
    norm = lm.family.ln_final
    d = directions.detach().to(lm.device, torch.float32)
    d = d if norm is None else norm.linear(d)
    logits = d @ lm.output_directions(torch.arange(lm.d_vocab, device=lm.device)).float().T
    return logits - logits.mean(-1, keepdim=True)


def logit_effects(lm: LanguageModel, dictionary: Dictionary, latents: Sequence[int], k: int = 8) -> list[LogitEffects]:
    """Promoted and suppressed tokens of some latents."""
    logits = direct_logits(lm, dictionary.W_dec[list(latents)].detach())
    up, down = logits.topk(k, -1), (-logits).topk(k, -1)
    found = []
    for row, latent in enumerate(latents):
        promoted = zip(lm.token_strings(up.indices[row].tolist()), up.values[row].tolist(), strict=True)
        suppressed = zip(lm.token_strings(down.indices[row].tolist()), (-down.values[row]).tolist(), strict=True)
        found.append(LogitEffects(latent, tuple(promoted), tuple(suppressed)))
    return found
