"""What an edit costs where it should do nothing: the change of the next-token distribution on neutral text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cutaway.artifacts.statistics import bootstrap_interval
from cutaway.model.edits.edits import Edit
from cutaway.model.language_model import LanguageModel
from cutaway.model.tokens import Tokens, next_tokens


@dataclass(frozen=True)
class SideEffects:
    """KL(unedited || edited) in nats a token: the mean over rows of each row's mean, with its 95 % interval over rows.

    `loss`, `loss_edited` are the next-token loss before and after, over `n_tokens` predictions.
    """

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


def side_effects_of(lm: LanguageModel, text: Any, edits: Edit | Sequence[Edit], *, batch_rows: int = 16) -> SideEffects:
    """Run neutral text with and without the edits. `text`: texts, ids or `Tokens`, of at least two tokens a row."""
    return side_effects_of_each(lm, text, [edits], batch_rows=batch_rows)[0]


def side_effects_of_each(
    lm: LanguageModel, text: Any, choices: Sequence[Edit | Sequence[Edit]], *, batch_rows: int = 16
) -> list[SideEffects]:
    """Side effects of several sets of edits on the same text; the unedited run is made once."""
    tokens: Tokens = lm.tokens(text)
    kls: list[list[float]] = [[] for _ in choices]
    after = [0.0] * len(choices)
    before, count = 0.0, 0
    for first in range(0, len(tokens), batch_rows):
        part = tokens[list(range(first, min(first + batch_rows, len(tokens))))]
        plain = lm.run(part, logits="all").logits
        assert plain is not None
        p = plain.float().log_softmax(-1)
        mask = part.mask.to(p)
        following, both = next_tokens(part.ids, part.mask, lm.d_vocab)
        following = following[..., None]
        before -= p[:, :-1].gather(-1, following)[..., 0][both].sum().item()
        count += int(both.sum())
        for i, edits in enumerate(choices):
            edited = lm.run(part, edits=edits, logits="all").logits
            assert edited is not None
            q = edited.float().log_softmax(-1)
            kl = (p.exp() * (p - q)).sum(-1)
            kls[i] += ((kl * mask).sum(1) / mask.sum(1)).tolist()
            after[i] -= q[:, :-1].gather(-1, following)[..., 0][both].sum().item()
    return [
        SideEffects(
            kl=sum(of) / len(of),
            interval=bootstrap_interval(of),
            loss=before / max(1, count),
            loss_edited=loss / max(1, count),
            n_tokens=count,
            n_rows=len(of),
        )
        for of, loss in zip(kls, after, strict=True)
    ]
