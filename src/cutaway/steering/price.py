"""What an edit costs where it should do nothing: the change of the next-token distribution on neutral text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cutaway.artifacts.statistics import bootstrap_interval
from cutaway.model.edits import Edit
from cutaway.model.language_model import LanguageModel
from cutaway.model.tokens import Tokens


@dataclass(frozen=True)
class Price:
    """KL(unedited || edited) in nats per token, with a 95 % interval over rows, and the loss before and after."""

    kl: float
    interval: tuple[float, float]
    loss: float
    loss_edited: float
    n_tokens: int
    n_rows: int

    def to_json(self) -> dict[str, Any]:
        return {
            "kl": self.kl,
            "interval": list(self.interval),
            "loss": self.loss,
            "loss_edited": self.loss_edited,
            "n_tokens": self.n_tokens,
            "n_rows": self.n_rows,
        }

    def __str__(self) -> str:
        return f"KL {self.kl:.3f} nats a token (loss {self.loss:.3f} to {self.loss_edited:.3f}, n {self.n_tokens})"


def price(lm: LanguageModel, text: Any, edits: Edit | Sequence[Edit], *, batch_rows: int = 16) -> Price:
    """Run neutral text with and without the edits. `text`: texts, ids or `Tokens`, of at least two tokens a row."""
    tokens: Tokens = lm.tokens(text)
    kls: list[float] = []
    before = after = 0.0
    count = 0
    for first in range(0, len(tokens.ids), batch_rows):
        part = tokens[list(range(first, min(first + batch_rows, len(tokens.ids))))]
        plain, edited = (lm.run(part, edits=e, logits="all").logits for e in ((), edits))
        assert plain is not None
        assert edited is not None
        p, q = plain.float().log_softmax(-1), edited.float().log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)
        mask = part.mask.to(kl)
        kls += ((kl * mask).sum(1) / mask.sum(1)).tolist()
        both = part.mask[:, 1:] & part.mask[:, :-1]
        following = part.ids[:, 1:, None].to(p.device)
        before -= p[:, :-1].gather(-1, following)[..., 0][both].sum().item()
        after -= q[:, :-1].gather(-1, following)[..., 0][both].sum().item()
        count += int(both.sum())
    return Price(
        kl=float(torch.tensor(kls).mean()),
        interval=bootstrap_interval(kls),
        loss=before / max(1, count),
        loss_edited=after / max(1, count),
        n_tokens=count,
        n_rows=len(kls),
    )
