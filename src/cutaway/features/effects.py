"""Which tokens a latent's decoder direction raises and lowers, on the direct path to the output."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.latent import direct_logits
from cutaway.draw.result import Result
from cutaway.model.language_model import LanguageModel


@dataclass(frozen=True, repr=False)
class LogitEffects(Result):
    """The tokens whose logit one unit of a latent raises and lowers by the largest amounts, on the direct path only.

    What later layers make of the direction is not in these numbers.
    """

    title = "Direct logit effects of a latent"

    latent: int
    """The latent's number."""
    promotes: tuple[tuple[str, float], ...]
    """(token, change of its logit against the mean over the vocabulary, per unit of activation and at a final-norm
    divisor of 1), by falling change."""
    suppresses: tuple[tuple[str, float], ...]
    """The same of the tokens whose logit falls, the largest fall first."""

    def summary(self) -> str:
        up = " ".join(f"{token!r} {value:+.2f}" for token, value in self.promotes)
        down = " ".join(f"{token!r} {value:+.2f}" for token, value in self.suppresses)
        return f"latent {self.latent} promotes {up}; suppresses {down} (direct path)"

    def to_json(self) -> dict[str, Any]:
        return {"latent": self.latent, "promotes": list(self.promotes), "suppresses": list(self.suppresses)}

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"latent": self.latent, "effect": name, "rank": rank, "token": token, "logit": value}
            for name, some in (("promotes", self.promotes), ("suppresses", self.suppresses))
            for rank, (token, value) in enumerate(some, start=1)
        ]

    def drawing(self) -> Markup:
        from cutaway.draw.heatmap import heatmap_html

        both = [self.promotes, self.suppresses]
        return heatmap_html(
            rows=["promotes", "suppresses"],
            columns=[str(rank + 1) for rank in range(len(self.promotes))],
            values=[[value for _, value in some] for some in both],
            cell_text=[[token for token, _ in some] for some in both],
            title=f"Latent {self.latent}: change of logits per unit, direct path",
            units="logit",
            scale="diverging",
        )


def logit_effects(lm: LanguageModel, dictionary: Dictionary, latents: Sequence[int], k: int = 8) -> list[LogitEffects]:
    """The tokens that each of some latents promotes and suppresses on the direct path.

    Args:
        lm: The model.
        dictionary: Its decoder rows lie in the residual stream.
        latents: The latents' numbers.
        k: How many tokens of each.

    Returns:
        One `LogitEffects` per latent, in the order of `latents`.

    Example:
        >>> lm, dictionary = cutaway.load("atlas"), cutaway.dictionaries.load("atlas/blocks.3.resid_post")
        >>> len(logit_effects(lm, dictionary, [7], k=4)[0].promotes)
        4
    """
    logits = direct_logits(lm, dictionary.W_dec[list(latents)].detach())
    up, down = logits.topk(k, -1), (-logits).topk(k, -1)
    found = []
    for row, latent in enumerate(latents):
        promoted = zip(lm.token_strings(up.indices[row].tolist()), up.values[row].tolist(), strict=True)
        suppressed = zip(lm.token_strings(down.indices[row].tolist()), (-down.values[row]).tolist(), strict=True)
        found.append(LogitEffects(latent, tuple(promoted), tuple(suppressed)))
    return found
