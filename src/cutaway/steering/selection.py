"""Which direction, and how to use it? Chosen on validation prompts that are not the test prompts.

A candidate is a (layer, position) and a method. It is scored without generation: by the log-odds, at the prompt's last
token, of the first tokens with which the model refuses against those with which it answers (Arditi et al. 2024, with
the token sets read off the model's own unsteered replies).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.model.edits.edits import Edit
from cutaway.model.forward.run import Run
from cutaway.model.language_model import LanguageModel
from cutaway.model.tokens import Tokens
from cutaway.steering.directions import (
    Direction,
    Directions,
    ablate_direction,
    add_direction,
    clamp_to_negative,
    describe,
)
from cutaway.steering.replies import Judge, refusal

Method = Callable[[LanguageModel, Direction], list[Edit]]


@dataclass(frozen=True)
class ReplyTokens:
    """First tokens of the model's own replies: `marked` (such as refusals) and `plain` (such as answers)."""

    marked: Tensor
    plain: Tensor

    def score(self, logits: Tensor) -> Tensor:
        """Log-odds [b] of a marked opening against a plain one, from last-position logits [b, V]."""
        z = logits.float()
        return z[:, self.marked.to(z.device)].logsumexp(-1) - z[:, self.plain.to(z.device)].logsumexp(-1)


def reply_tokens(
    lm: LanguageModel,
    positive: Tokens,
    negative: Tokens,
    *,
    judge: Judge = refusal,
    marked: str = "refused",
    plain: str = "answered",
    max_new_tokens: int = 6,
) -> ReplyTokens:
    """Read off unsteered replies with which tokens the model opens a `marked` and a `plain` reply.

    Raises `CutawayError` when it makes no marked reply to the positive prompts, or no plain one to the negative.
    """
    sets = []
    for prompts, label in ((positive, marked), (negative, plain)):
        replies = lm.generate(prompts, max_new_tokens=max_new_tokens)
        chosen = {int(ids[0]) for ids, text in zip(replies.new_ids, replies.texts, strict=True) if judge(text) == label}
        if not chosen:
            raise CutawayError(f"{lm.name} gives no reply that is judged “{label}”, so there is no direction to choose")
        sets.append(chosen)
    both = sets[0] & sets[1]
    if not (sets[0] - both and sets[1] - both):
        raise CutawayError(
            f"{lm.name} opens “{marked}” and “{plain}” replies with the same tokens; judge whole replies"
        )
    return ReplyTokens(torch.tensor(sorted(sets[0] - both)), torch.tensor(sorted(sets[1] - both)))


@dataclass(frozen=True)
class Candidate:
    """A direction and a method on validation prompts.

    `score` is the mean log-odds of a marked opening, `rate` the share of prompts where it is above 0, `kl` the mean
    change (nats) of the next-token distribution on the prompts of the other class, which should be left alone.
    """

    direction: Direction
    method: str
    score: float
    rate: float
    kl: float

    def to_json(self) -> dict[str, Any]:
        return {
            "layer": self.direction.layer,
            "position": self.direction.position,
            "method": self.method,
            "score": self.score,
            "rate": self.rate,
            "kl": self.kl,
        }


@dataclass(frozen=True)
class Selection:
    """All candidates, those early enough to be chosen, and the best one to remove and to induce the behaviour."""

    candidates: tuple[Candidate, ...]
    eligible: tuple[Candidate, ...]
    remove: Candidate
    induce: Candidate
    positive_score: float
    negative_score: float
    n: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        return {
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "remove": self.remove.to_json(),
            "induce": self.induce.to_json(),
            "positive_score": self.positive_score,
            "negative_score": self.negative_score,
            "n": list(self.n),
        }

    def best(self, method: str) -> Candidate:
        """The best candidate of one method: lowest score for a method that removes, highest for one that adds."""
        of = [candidate for candidate in self.eligible if candidate.method == method]
        if not of:
            raise CutawayError(f"no candidate uses the method {method!r}")
        return max(of, key=lambda c: c.score) if method.startswith("add") else min(of, key=lambda c: c.score)

    def __str__(self) -> str:
        lines = [f"unsteered log-odds {self.positive_score:+.2f} (positive), {self.negative_score:+.2f} (negative)"]
        for title, c in (("remove", self.remove), ("induce", self.induce)):
            where = f"layer {c.direction.layer}, {describe(c.direction.position)}"
            lines.append(f"  {title}: {c.method} at {where}: log-odds {c.score:+.2f}, rate {c.rate:.2f}, KL {c.kl:.2f}")
        return "\n".join(lines)


REMOVING: dict[str, Method] = {"ablate": ablate_direction, "clamp": clamp_to_negative}


def select_direction(
    lm: LanguageModel,
    directions: Directions,
    positive: Any,
    negative: Any,
    words: ReplyTokens | None = None,
    *,
    scales: Sequence[float] = (1.0, 2.0),
    max_kl: float = 0.5,
    max_depth: float = 0.8,
) -> Selection:
    """Try every direction with every method on validation prompts and choose one to remove, one to induce.

    Removing (ablate, clamp) is scored on the positive prompts, lowest is best; inducing (add × scale) on the negative
    prompts, highest is best. A removing candidate that moves the negative prompts' next-token distribution by more than
    `max_kl` nats is not chosen while a gentler one brings the log-odds below 0. Layers from `max_depth` of the model's
    depth on are listed but not chosen: so near the unembedding an edit just writes the answer's logits.
    """
    plus, minus = lm.tokens(positive), lm.tokens(negative)
    words = reply_tokens(lm, plus, minus) if words is None else words
    # the stream of the unedited runs is where every edited run of a later layer can start
    base_plus, base_minus = (lm.run(side, capture="blocks.*.resid_pre", logits="last") for side in (plus, minus))
    found: list[Candidate] = []
    for direction in directions:
        for name, method in REMOVING.items():
            edits = method(lm, direction)
            found.append(_candidate(lm, direction, name, edits, base_plus, words, base_minus))
        for scale in scales:
            name = f"add ×{scale:g}"
            found.append(_candidate(lm, direction, name, add_direction(direction, scale), base_minus, words, base_plus))
    early = [c for c in found if c.direction.layer < max_depth * lm.n_layers] or found
    removing = [c for c in early if c.method in REMOVING]
    gentle = [c for c in removing if c.kl <= max_kl and c.score < 0]
    return Selection(
        candidates=tuple(found),
        eligible=tuple(early),
        remove=min(gentle or removing, key=lambda c: c.score),
        induce=max((c for c in early if c.method not in REMOVING), key=lambda c: c.score),
        positive_score=words.score(_last(base_plus)).mean().item(),
        negative_score=words.score(_last(base_minus)).mean().item(),
        n=(len(plus.ids), len(minus.ids)),
    )


def _candidate(
    lm: LanguageModel,
    direction: Direction,
    method: str,
    edits: Sequence[Edit],
    prompts: Run,
    words: ReplyTokens,
    bystanders: Run,
) -> Candidate:
    scores = words.score(_edited(lm, prompts, edits))
    p, q = _last(bystanders).log_softmax(-1), _edited(lm, bystanders, edits).log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    return Candidate(direction, method, scores.mean().item(), (scores > 0).float().mean().item(), kl)


def _last(run: Run) -> Tensor:
    assert run.logits is not None
    return run.logits[:, 0].float()


def _edited(lm: LanguageModel, base: Run, edits: Sequence[Edit]) -> Tensor:
    return _last(lm.run(base.tokens, edits=edits, logits="last", resume=base))
