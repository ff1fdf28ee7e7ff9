"""Which direction, and how to use it? Chosen on validation prompts that are not the test prompts.

A candidate is a (layer, position) and a method. It is scored without generation: by the log-odds, at the prompt's last
token, of the first tokens with which the model refuses against those with which it answers (Arditi et al. 2024, with
the token sets read off the model's own unsteered replies).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CannotDoTask, CutawayError
from cutaway.draw.result import Result
from cutaway.model.edits.edits import Edit
from cutaway.model.forward.run import Run
from cutaway.model.language_model import Inputs, LanguageModel
from cutaway.model.tokens import Tokens
from cutaway.steering.directions import (
    Direction,
    Directions,
    Position,
    ablate_direction,
    add_direction,
    clamp_to_negative,
    describe,
)
from cutaway.steering.replies import Judge, judge_refusal

Method = Callable[[LanguageModel, Direction], list[Edit]]


@dataclass(frozen=True)
class ReplyTokens:
    """First tokens of the model's own replies.

    Attributes:
        marked: Ids with which it begins marked replies, such as refusals.
        plain: Ids with which it begins plain ones, such as answers.
    """

    marked: Tensor
    plain: Tensor

    def score(self, logits: Tensor) -> Tensor:
        """Log-odds of a marked first token against a plain one.

        Args:
            logits: Logits at the prompts' last tokens [b, V].

        Returns:
            The log-odds in nats [b].
        """
        z = logits.float()
        return z[:, self.marked.to(z.device)].logsumexp(-1) - z[:, self.plain.to(z.device)].logsumexp(-1)


def reply_tokens(
    lm: LanguageModel,
    positive: Tokens,
    negative: Tokens,
    *,
    judge: Judge = judge_refusal,
    marked: str = "refused",
    plain: str = "answered",
    max_new_tokens: int = 6,
) -> ReplyTokens:
    """Read off unsteered replies with which tokens the model begins a marked and a plain reply.

    Args:
        lm: The model.
        positive: Prompts that should get marked replies; for chats `lm.chat_tokens(...)`.
        negative: Prompts that should get plain ones.
        judge: From a reply to its label.
        marked: The label of a marked reply.
        plain: The label of a plain reply.
        max_new_tokens: Tokens per reply at most.

    Raises:
        CannotDoTask: It makes no marked reply to the positive prompts, no plain one to the negative, or begins both
            with the same tokens.
    """
    sets = []
    for prompts, label in ((positive, marked), (negative, plain)):
        replies = lm.generate(prompts, max_new_tokens=max_new_tokens)
        chosen = {int(ids[0]) for ids, text in zip(replies.new_ids, replies.texts, strict=True) if judge(text) == label}
        if not chosen:
            raise CannotDoTask(f"{lm.name} gives no reply that is judged “{label}”, so there is no direction to choose")
        sets.append(chosen)
    both = sets[0] & sets[1]
    if not (sets[0] - both and sets[1] - both):
        raise CannotDoTask(
            f"{lm.name} begins “{marked}” and “{plain}” replies with the same tokens; judge whole replies"
        )
    return ReplyTokens(torch.tensor(sorted(sets[0] - both)), torch.tensor(sorted(sets[1] - both)))


@dataclass(frozen=True)
class Candidate:
    """A direction and a method on validation prompts.

    Attributes:
        direction: The direction.
        method: "ablate", "clamp", or "add ×2" and the like.
        score: Mean log-odds of a marked first token.
        rate: Share of prompts where they are above 0.
        kl: Mean change (nats) of the next-token distribution on the prompts of the other class, which should be left
            alone.
    """

    direction: Direction
    method: str
    score: float
    rate: float
    kl: float

    def to_json(self) -> dict[str, Any]:
        """The figures as plain data."""
        return {
            "layer": self.direction.layer,
            "position": self.direction.position,
            "method": self.method,
            "score": self.score,
            "rate": self.rate,
            "kl": self.kl,
        }


@dataclass(frozen=True, repr=False)
class Selection(Result):
    """Directions and methods tried on validation prompts, and the best to remove and to induce the behaviour.

    Attributes:
        candidates: All that were tried.
        eligible: Those early enough in the model to be chosen.
        remove: The best that removes the behaviour.
        induce: The best that induces it.
        positive_score: Log-odds of a marked first token on the positive prompts, unsteered.
        negative_score: The same on the negative prompts.
        n: Positive and negative prompts.
    """

    title = "Choice of a direction"

    candidates: tuple[Candidate, ...]
    eligible: tuple[Candidate, ...]
    remove: Candidate
    induce: Candidate
    positive_score: float
    negative_score: float
    n: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        """All candidates and the two chosen, as plain data."""
        return {
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "remove": self.remove.to_json(),
            "induce": self.induce.to_json(),
            "positive_score": self.positive_score,
            "negative_score": self.negative_score,
            "n": list(self.n),
        }

    def best(self, method: str) -> Candidate:
        """The best candidate of one method: lowest score for a method that removes, highest for one that adds.

        Args:
            method: The method: "ablate", "clamp", or "add ×2" and the like.

        Raises:
            CutawayError: No candidate early enough in the model uses it.
        """
        of = [candidate for candidate in self.eligible if candidate.method == method]
        if not of:
            raise CutawayError(f"no candidate uses the method {method!r}")
        return max(of, key=lambda c: c.score) if method.startswith("add") else min(of, key=lambda c: c.score)

    def rows(self) -> list[dict[str, Any]]:
        """One row per candidate."""
        return [
            {**one.to_json(), "position": describe(one.direction.position), "eligible": one in self.eligible}
            for one in self.candidates
        ]

    def summary(self) -> str:
        """The two chosen, with their log-odds, rate and KL, beside the unsteered log-odds."""
        lines = [f"unsteered log-odds {self.positive_score:+.2f} (positive), {self.negative_score:+.2f} (negative)"]
        for title, c in (("remove", self.remove), ("induce", self.induce)):
            where = f"layer {c.direction.layer}, {describe(c.direction.position)}"
            lines.append(f"  {title}: {c.method} at {where}: log-odds {c.score:+.2f}, rate {c.rate:.2f}, KL {c.kl:.2f}")
        return "\n".join(lines)

    def drawing(self) -> Markup:
        """A heat map of the log-odds under each candidate, direction by method."""
        from cutaway.draw.heatmap import heatmap_html, heatmap_scale

        methods = list(dict.fromkeys(one.method for one in self.candidates))
        places: dict[tuple[int, Position], dict[str, float]] = {}
        for one in self.candidates:
            places.setdefault((one.direction.layer, one.direction.position), {})[one.method] = one.score
        values = [[scores.get(method) for method in methods] for scores in places.values()]
        return heatmap_html(
            rows=[f"layer {layer}, {describe(position)}" for layer, position in places],
            columns=methods,
            values=values,
            title="Log-odds of a marked first token",
            scale=heatmap_scale(values, True),
        )

    def __str__(self) -> str:
        return self.summary()


_REMOVING: dict[str, Method] = {"ablate": ablate_direction, "clamp": clamp_to_negative}


def select_direction(
    lm: LanguageModel,
    directions: Directions,
    positive: Inputs,
    negative: Inputs,
    words: ReplyTokens | None = None,
    *,
    scales: Sequence[float] = (1.0, 2.0),
    max_kl: float = 0.5,
    max_depth: float = 0.8,
) -> Selection:
    """Try every direction with every method on validation prompts and choose one to remove, one to induce.

    Removing (ablate, clamp) is scored on the positive prompts, lowest is best; inducing (add × scale) on the negative
    prompts, highest is best.

    Args:
        lm: The model.
        directions: Read from other prompts (`difference_of_means`).
        positive: Validation prompts of the behaviour; for chats `lm.chat_tokens(...)`.
        negative: Validation prompts without it.
        words: First tokens of marked and plain replies; read off unsteered replies by default (`reply_tokens`).
        scales: Multiples of the direction that are added.
        max_kl: A removing candidate that moves the negative prompts' next-token distribution by more nats is not chosen
            while a gentler one brings the log-odds below 0.
        max_depth: Layers from this share of the model's depth on are listed but not chosen: so near the unembedding an
            edit just writes the answer's logits.

    Raises:
        CannotDoTask: The model makes no such replies (`reply_tokens`).
        CutawayError: No scales.
    """
    if not scales:
        raise CutawayError("scales is empty; give at least one multiple of the direction to add, such as (1.0,)")
    plus, minus = lm.tokens(positive), lm.tokens(negative)
    words = reply_tokens(lm, plus, minus) if words is None else words
    # the stream of the unedited runs is where every edited run of a later layer can start
    base_plus, base_minus = (lm.run(side, capture="blocks.*.resid_pre", logits="last") for side in (plus, minus))
    found: list[Candidate] = []
    for direction in directions:
        for name, method in _REMOVING.items():
            edits = method(lm, direction)
            found.append(_candidate(lm, direction, name, edits, base_plus, words, base_minus))
        for scale in scales:
            name = f"add ×{scale:g}"
            found.append(_candidate(lm, direction, name, add_direction(direction, scale), base_minus, words, base_plus))
    early = [c for c in found if c.direction.layer < max_depth * lm.n_layers] or found
    removing = [c for c in early if c.method in _REMOVING]
    gentle = [c for c in removing if c.kl <= max_kl and c.score < 0]
    return Selection(
        candidates=tuple(found),
        eligible=tuple(early),
        remove=min(gentle or removing, key=lambda c: c.score),
        induce=max((c for c in early if c.method not in _REMOVING), key=lambda c: c.score),
        positive_score=words.score(base_plus.last_logits.float()).mean().item(),
        negative_score=words.score(base_minus.last_logits.float()).mean().item(),
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
    p, q = bystanders.last_logits.float().log_softmax(-1), _edited(lm, bystanders, edits).log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    return Candidate(direction, method, scores.mean().item(), (scores > 0).float().mean().item(), kl)


def _edited(lm: LanguageModel, base: Run, edits: Sequence[Edit]) -> Tensor:
    return lm.run(base.tokens, edits=edits, logits="last", resume=base).last_logits.float()
