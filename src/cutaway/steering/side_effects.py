"""What an edit changes where it should do nothing: the next-token distribution on neutral text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cutaway.artifacts.statistics import bootstrap_interval
from cutaway.model.edits.edits import Edit
from cutaway.model.language_model import Inputs, LanguageModel
from cutaway.model.tokens import next_tokens


@dataclass(frozen=True)
class SideEffects:
    """How far an edit moves the predictions on neutral text.

    Attributes:
        kl: KL(unedited || edited) in nats per token, the mean over rows of each row's mean.
        interval: Its 95 % interval over rows (bootstrap).
        loss: Next-token loss before the edit, nats per token.
        loss_edited: The same after it.
        n_tokens: Predictions that the losses are the mean of.
        n_rows: Rows of text.
        kl_per_token: The KL as the mean over all tokens of all rows, so that long rows weigh more.
    """

    kl: float
    interval: tuple[float, float]
    loss: float
    loss_edited: float
    n_tokens: int
    n_rows: int
    kl_per_token: float

    def to_json(self) -> dict[str, Any]:
        """The figures as plain data."""
        return {
            "kl": self.kl,
            "interval": list(self.interval),
            "loss": self.loss,
            "loss_edited": self.loss_edited,
            "n_tokens": self.n_tokens,
            "n_rows": self.n_rows,
            "kl_per_token": self.kl_per_token,
        }

    def __str__(self) -> str:
        return f"KL {self.kl:.3f} nats per token (loss {self.loss:.3f} to {self.loss_edited:.3f}, n {self.n_tokens})"


def side_effects_of(
    lm: LanguageModel, text: Inputs, edits: Edit | Sequence[Edit], *, batch_rows: int | None = 16
) -> SideEffects:
    """Run neutral text with and without the edits.

    Args:
        lm: The model.
        text: Texts, ids or `Tokens`, of at least two tokens per row.
        edits: What is done to the model.
        batch_rows: Rows per run; None for all at once, which edits of single rows (`rows=`) need.

    Example:
        >>> lm = cutaway.load("atlas")
        >>> sides = ["She loved it", "A fine film"], ["She hated it", "A bad film"]
        >>> direction = difference_of_means(lm, *sides, positions=(-1,)).get(layer=3, position=-1)
        >>> side_effects_of(lm, ["The capital of France is Paris."], add_direction(direction, 2.0)).n_rows
        1
    """
    return side_effects_of_each(lm, text, [edits], batch_rows=batch_rows)[0]


def side_effects_of_each(
    lm: LanguageModel,
    text: Inputs,
    choices: Sequence[Edit | Sequence[Edit]],
    *,
    where: Tensor | None = None,
    batch_rows: int | None = 16,
) -> list[SideEffects]:
    """Side effects of several sets of edits on the same text; the unedited run is made once.

    Args:
        lm: The model.
        text: Texts, ids or `Tokens`, of at least two tokens per row.
        choices: The sets of edits.
        where: Mask [b, p] of the tokens whose predictions count; every real token by default.
        batch_rows: Rows per run; None for all at once, which edits of single rows (`rows=`) need.
    """
    tokens = lm.tokens(text)
    chosen = tokens.mask if where is None else where.to(tokens.mask.device) & tokens.mask
    kls: list[list[float]] = [[] for _ in choices]
    total, after = [0.0] * len(choices), [0.0] * len(choices)
    before, count = 0.0, 0
    step = batch_rows or len(tokens)
    for first in range(0, len(tokens), step):
        rows = list(range(first, min(first + step, len(tokens))))
        part, mask = tokens[rows], chosen[rows][:, : tokens[rows].ids.shape[1]]
        p = _log_probabilities(lm, part, ())
        weight = mask.to(p)
        following, both = next_tokens(part.ids, part.mask, lm.d_vocab)
        following, both = following[..., None], both & mask[:, :-1]
        before -= p[:, :-1].gather(-1, following)[..., 0][both].sum().item()
        count += int(both.sum())
        for i, edits in enumerate(choices):
            q = _log_probabilities(lm, part, edits)
            kl = (p.exp() * (p - q)).sum(-1) * weight
            kls[i] += (kl.sum(1) / weight.sum(1))[mask.any(1)].tolist()
            total[i] += kl.double().sum().item()
            after[i] -= q[:, :-1].gather(-1, following)[..., 0][both].sum().item()
    n = max(1, int(chosen.sum()))
    return [
        SideEffects(
            kl=sum(of) / len(of),
            interval=bootstrap_interval(of),
            loss=before / max(1, count),
            loss_edited=loss / max(1, count),
            n_tokens=count,
            n_rows=len(of),
            kl_per_token=summed / n,
        )
        for of, loss, summed in zip(kls, after, total, strict=True)
    ]


def _log_probabilities(lm: LanguageModel, part: Inputs, edits: Edit | Sequence[Edit]) -> Tensor:
    return lm.run(part, edits=edits, logits="all").all_logits.float().log_softmax(-1)
