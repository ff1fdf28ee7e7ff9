"""Logit lens: what would the model say if it stopped after this layer? (nostalgebraist 2020)

Each layer's residual stream goes through the model's own final norm and unembedding, with the stream's own statistics.
The last layer is the model's output exactly. A token that is readable early is not thereby *used* early: the lens
looks, it does not intervene.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.model.language_model import LanguageModel
from cutaway.model.tokens import Tokens


@dataclass(frozen=True)
class LogitLens:
    """The lens at every layer and position, for b rows of p columns.

    There are L+1 layers; the first, "embed", is what layer 0 receives.

    `top_ids`, `top_probability` [L+1, b, p, k]; `target_probability`, `target_rank` (0 is the most probable), `entropy`
    and `kl` (from this layer's distribution to the final one: KL(final || layer)), in nats, [L+1, b, p]. `target_ids`
    [b, p]. Columns of padding, and the last token's target when targets are the next tokens, are NaN (rank -1).
    """

    model: str
    layers: tuple[str, ...]
    tokens: Tokens
    top_ids: Tensor
    top_strings: tuple[tuple[tuple[str, ...], ...], ...]
    top_probability: Tensor
    target_ids: Tensor
    target_probability: Tensor
    target_rank: Tensor
    entropy: Tensor
    kl: Tensor

    def at_last(self, values: Tensor) -> Tensor:
        """`values` [L+1, b, p, ...] at each row's last real token [L+1, b, ...]."""
        rows = torch.arange(values.shape[1])
        return values[:, rows, self.tokens.last.cpu()]

    def to_json(self, row: int = 0) -> dict[str, Any]:
        """One row as plain data; positions are its real tokens."""
        columns = self.tokens.mask[row].cpu().nonzero()[:, 0]
        first = int(columns[0])
        return {
            "model": self.model,
            "layers": list(self.layers),
            "tokens": list(self.tokens.strings[row]),
            "top": [[self.top_strings[i][row][int(c) - first] for c in columns] for i in range(len(self.layers))],
            "probability": self.top_probability[:, row, columns, 0].tolist(),
            "target_probability": self.target_probability[:, row, columns].tolist(),
            "target_rank": self.target_rank[:, row, columns].tolist(),
            "entropy": self.entropy[:, row, columns].tolist(),
            "kl": self.kl[:, row, columns].tolist(),
        }

    def __str__(self) -> str:
        lines = [f"logit lens of {self.model} at the last token of {''.join(self.tokens.strings[0])!r}"]
        lines.append(f"  {'':<22}{'top token':<16}{'p':>6}{'entropy':>9}{'KL':>8}{'p(target)':>11}{'rank':>6}")
        at = int(self.tokens.last[0])
        for i, layer in enumerate(self.layers):
            top = self.top_strings[i][0][-1]
            lines.append(
                f"  {layer:<22}{top!r:<16}{self.top_probability[i, 0, at, 0]:>6.2f}{self.entropy[i, 0, at]:>9.2f}"
                f"{self.kl[i, 0, at]:>8.2f}{self.target_probability[i, 0, at]:>11.3f}"
                f"{int(self.target_rank[i, 0, at]):>6}"
            )
        return "\n".join(lines)


def logit_lens(
    lm: LanguageModel,
    inputs: Any,
    k: int = 5,
    targets: Sequence[str | int] | str | int | None = None,
    *,
    bos: bool | None = None,
) -> LogitLens:
    """Read every layer of the residual stream through the final norm and the unembedding.

    `targets`: one token a row (an id, or a text whose first token is meant), followed at every position; by default
    each position's target is the token that really comes next. Raises `CutawayError` when targets and rows differ in
    number, or a target text has no token.
    """
    tokens = lm.tokens(inputs, bos=bos)
    names = ["blocks.0.resid_pre", *(f"blocks.{layer}.resid_post" for layer in range(lm.n_layers))]
    run = lm.run(tokens, capture=names, logits="all")
    assert run.logits is not None
    mask = tokens.mask
    target_ids = _target_ids(lm, tokens, targets).to(run.logits.device)
    known = target_ids >= 0
    final = run.logits.float().log_softmax(-1)
    parts: list[tuple[Tensor, ...]] = []
    for name in names:
        # the last layer is the model's own output, bit for bit
        logits = run.logits if name == names[-1] else lm.unembed(run[name])
        log_p = logits.float().log_softmax(-1)
        p = log_p.exp()
        top_p, top_ids = p.topk(min(k, p.shape[-1]), dim=-1)
        target = log_p.gather(-1, target_ids.clamp(min=0)[..., None])
        rank = (log_p > target).sum(-1)
        entropy = -torch.where(p > 0, p * log_p, torch.zeros_like(p)).sum(-1)
        kl = torch.where(final.exp() > 0, final.exp() * (final - log_p), torch.zeros_like(p)).sum(-1).clamp(min=0)
        nan = torch.full_like(entropy, float("nan"))
        parts.append(
            (
                top_ids.cpu(),
                top_p.cpu(),
                torch.where(known, target[..., 0].exp(), nan).cpu(),
                torch.where(known, rank, torch.full_like(rank, -1)).cpu(),
                torch.where(mask, entropy, nan).cpu(),
                torch.where(mask, kl, nan).cpu(),
            )
        )
    top_ids, top_p, target_p, rank, entropy, kl = (torch.stack(column) for column in zip(*parts, strict=True))
    real = mask.cpu()
    strings = tuple(
        tuple(tuple(lm.token_strings(ids[row][real[row]][:, 0].tolist())) for row in range(len(real)))
        for ids in top_ids
    )
    return LogitLens(
        model=lm.name,
        layers=("embed", *names[1:]),
        tokens=tokens,
        top_ids=top_ids,
        top_strings=strings,
        top_probability=top_p,
        target_ids=target_ids.cpu(),
        target_probability=target_p,
        target_rank=rank,
        entropy=entropy,
        kl=kl,
    )


def _target_ids(lm: LanguageModel, tokens: Tokens, targets: Sequence[str | int] | str | int | None) -> Tensor:
    """Target token of every position [b, p], -1 where there is none."""
    ids, mask = tokens.ids.cpu(), tokens.mask.cpu()
    if targets is None:
        following = torch.full_like(ids, -1)
        following[:, :-1] = torch.where(mask[:, :-1] & mask[:, 1:], ids[:, 1:], -1)
        return following
    given = [targets] if isinstance(targets, str | int) else list(targets)
    if len(given) != len(ids):
        raise CutawayError(f"{len(given)} targets for {len(ids)} rows; give one a row")
    column = torch.tensor([first_token(lm, target) for target in given])
    return torch.where(mask, column[:, None].expand_as(ids), -1)


def first_token(lm: LanguageModel, target: str | int) -> int:
    """The id itself, or the first token of a text (write the leading space that the text has in its sentence)."""
    if isinstance(target, int):
        return target
    tokens = lm.tokens(target, bos=False)
    if int(tokens.lengths[0]) == 0:
        raise CutawayError(f"the target {target!r} has no token")
    return int(tokens.ids[0, tokens.first[0]])
